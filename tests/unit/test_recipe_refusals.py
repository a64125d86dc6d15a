"""Recipes that are wrong: each problem with its place, and all of them at once."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import dedent

import pytest
from test_recipe import METHODS

from streammerge.errors import ConfigError, InputMissing, Place, Problems, StorageError
from streammerge.recipe import Recipe, build_recipe, parse_recipe, read_recipe

TIES = "base_model: b\nmerge_method: ties\n"
LINEAR = "merge_method: linear\n"


def refused(text: str, folder: Path = Path("/recipes")) -> tuple[list[ConfigError], Recipe | None]:
    problems = Problems()
    recipe = parse_recipe(dedent(text), "cfg.yaml", folder, METHODS, problems)
    found = [problem for problem in problems if isinstance(problem, ConfigError)]
    assert len(found) == len(problems)
    return found, recipe


def only(text: str, folder: Path = Path("/recipes")) -> ConfigError:
    found, _ = refused(text, folder)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def assert_says(problem: ConfigError, line: int, column: int, *words: str) -> None:
    assert problem.where == Place("cfg.yaml", line, column)
    assert problem.remedy
    for word in words:
        assert word in str(problem)


def from_file(path: Path) -> Exception:
    problems = Problems()
    assert read_recipe(path, METHODS, problems) is None
    (problem,) = problems
    assert problem.where == str(path) and problem.remedy
    return problem


@pytest.mark.parametrize("text", ["", "\n# a comment\n", "---\n"])
def test_fault_1_empty(text: str) -> None:
    assert_says(only(text), 1, 1, "empty")


@pytest.mark.parametrize("text, found", [("- a\n", "a list"), ("just text", "'just text'")])
def test_not_a_mapping(text: str, found: str) -> None:
    assert_says(only(text), 1, 1, "mapping", found)


@pytest.mark.parametrize(
    "text, line, column, word",
    [
        ("a: 1\n\tb: 2\n", 2, 1, "spaces instead of the tab"),
        ("a: [1, 2\nb: 3\n", 2, 2, "starts at cfg.yaml:1:4"),
        ("a: 1\n  b: 2\n", 2, 4, "not allowed here"),
        ("a: 'open\n", 2, 1, "end of stream"),
        ("a: *b\n", 1, 4, "undefined alias"),
        ("a: 1\n---\nb: 2\n", 2, 1, "another document"),
        ("ab: \x01\n", 1, 5, "'\\x01'"),
    ],
)
def test_fault_2_syntax(text: str, line: int, column: int, word: str) -> None:
    assert_says(only(text), line, column, word)


@pytest.mark.parametrize(
    "text, line, column, words",
    [
        (LINEAR + "modles: []\nmodels: [{model: a}]", 2, 1, ("modles", "did you mean `models`")),
        (LINEAR + "models: [{model: a, wait: 1}]", 2, 21, ("models[0].wait", "remove it")),
        (LINEAR + "models: [{model: a, weight: 1}]", 2, 21, ("put it under `parameters:`",)),
        (LINEAR + "density: 1\nmodels: [{model: a}]", 2, 1, ("put it under `parameters:`",)),
        (TIES + "adapters: [{path: a, densty: 1}]", 3, 22, ("did you mean `density`",)),
        (TIES + "adapters: [{path: a, revison: r}]", 3, 22, ("did you mean `revision`",)),
        (
            TIES + "adapters: [{path: a, assume_residual: true}]",
            *(3, 22, ("did you mean `assume_residual_base`",)),
        ),
        (
            TIES + "adapters: [{path: a, assume_residual_base: pissa}]",
            *(3, 44, ("adapters[0].assume_residual_base", "true or false")),
        ),
        (
            TIES + "models: [{model: a, assume_residual_base: true}]",
            *(3, 21, ("beside a model without an adapter",)),
        ),
        (
            TIES + "models: [{model: a}]\nparameters: {lamda: 1}",
            4,
            14,
            ("parameters.lamda", "did you mean `lambda`"),
        ),
        (
            LINEAR + "models: [{model: {model: {path: a, rev: b}}}]",
            2,
            36,
            ("models[0].model.model.rev",),
        ),
        (LINEAR + "models: [{model: a}]\noutput: {pth: o}", 3, 10, ("did you mean `path`",)),
    ],
)
def test_fault_3_unknown_keys(text: str, line: int, column: int, words: tuple[str, ...]) -> None:
    assert_says(only(text), line, column, *words)


def test_an_unknown_method() -> None:
    problem = only("merge_method: linaer\nmodels: [{model: a}]")
    assert_says(problem, 1, 15, "'linaer'", "did you mean `linear`", "passthrough, ")


@pytest.mark.parametrize(
    "text, line, column, words",
    [
        (LINEAR + "models: [3]", 2, 10, ("models[0]", "3 (a number)")),
        (LINEAR + "models: {model: a}", 2, 9, ("a mapping", "a list of")),
        (LINEAR + "models: [{model: 12e4567}]", 2, 18, ('in quotes: "12e4567"',)),
        (LINEAR + "models: [{model: a}]\nseed: 1.5", 3, 7, ("whole number",)),
        (LINEAR + "models: [{model: a}]\nseed: true", 3, 7, ("true (true or false)",)),
        (LINEAR + "models: [{model: a}]\nseed: -1", 3, 7, ("-1",)),
        (LINEAR + "models: [{model: a}]\ndtype: float8", 3, 8, ("'float8'", "bfloat16")),
        (LINEAR + "models: [{model: a}]\nparameters: [1]", 3, 13, ("a list",)),
        (LINEAR + "models: [{model: ''}]", 2, 18, ("''",)),
        (LINEAR + 'models: [{model: "a\\u001b[31m"}]', 2, 18, ("\\x1b",)),
        (LINEAR + 'models: [{model: "a\\ud800"}]', 2, 18, ("\\ud800",)),
        (LINEAR + "models: [{model: a}]\noutput: {shard_size: much}", 3, 22, ("2GiB",)),
        (LINEAR + "models: [{model: a}]\noutput: {shard_size: 0}", 3, 22, ("2GiB",)),
        (LINEAR + "models: [{name: a}]", 2, 10, ("models[0].model is missing",)),
        (LINEAR + "models: [{model: a, parameters: {weight: 1e39}}]", 2, 42, ("infinite in",)),
        (LINEAR + "models: [{model: a}]\n7: x", 3, 1, ("cannot be a key",)),
        (LINEAR + "models: [{model: a}]\n[a]: x", 3, 1, ("cannot be a key",)),
    ],
)
def test_fault_4_wrong_types(text: str, line: int, column: int, words: tuple[str, ...]) -> None:
    assert_says(only(text), line, column, *words)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ('merge_method: linear\n"\\ud800": 1', 1),
        ('{base_model: {"\\ud800": }, merge_method: linear}', 14),
    ],
)
def test_fault_4_a_key_that_no_text_can_be(text: str, column: int) -> None:
    """Half of a surrogate pair, which an escape can spell and no encoding can write."""
    found, _ = refused(text)
    assert_says(found[0], 1, column, "is not valid", "a mapping of ")


@pytest.mark.parametrize(
    "value, found", [("'0.5'", "'0.5' (text)"), ("yes", "'yes'"), ("true", "true"), ("", "nothing")]
)
def test_fault_4_weights_that_are_no_numbers(value: str, found: str) -> None:
    problem = only(f"{LINEAR}models: [{{model: a, parameters: {{weight: {value}}}}}]")
    assert_says(problem, 2, 42 if value else 41, "models[0].parameters.weight", found, "one number")


@pytest.mark.parametrize("value", ["yes", "on", "1", "'true'"])
def test_fault_7_only_true_and_false_are_booleans(value: str) -> None:
    problem = only(f"{LINEAR}models: [{{model: a}}]\nparameters: {{normalize: {value}}}")
    assert_says(problem, 3, 25, "true or false")


def test_fault_5_a_key_given_twice_names_both_places() -> None:
    problem = only(LINEAR + "models: [{model: a}]\nmerge_method: ties")
    assert_says(problem, 3, 1, "merge_method", "cfg.yaml:1:1")


def test_fault_5_a_parameter_inline_and_under_parameters() -> None:
    problem = only(TIES + "adapters: [{path: a, weight: 1, parameters: {weight: 2}}]")
    assert_says(problem, 3, 46, "given twice", "cfg.yaml:3:22")


def test_fault_6_an_alias_bomb() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    assert "10,000" in str(only("\n".join(lines)))


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: " + "[" * 5000, "a: " + "{b: " * 200])
def test_fault_6_endless_and_deep_nesting(text: str) -> None:
    assert "nested too deep" in str(only(text))


def test_fault_6_a_large_file_that_is_no_recipe() -> None:
    assert_says(only("{vocabulary: [" + "a, " * 300_000 + "]}"), 1, 14, "10,000")


def test_aliases_within_reason_are_fine() -> None:
    text = "models: [{model: a, parameters: &p {weight: 2}}, {model: b, parameters: *p}]"
    found, recipe = refused(LINEAR + text)
    assert not found and recipe is not None
    assert [entry.knobs["weight"] for entry in recipe.entries] == [2, 2]


def test_merge_keys_are_refused_by_name() -> None:
    text = LINEAR + "models: [{model: a, parameters: &p {weight: 2}}, {<<: *p, model: b}]"
    assert_says(only(text), 2, 51, "'<<'", "merge keys are not supported")


@pytest.mark.parametrize("value", [".nan", "-.inf", ".inf", "1e999", "9" * 400])
def test_fault_8_numbers_that_are_not_finite(value: str) -> None:
    problem = only(f"{LINEAR}models: [{{model: a, parameters: {{weight: {value}}}}}]")
    assert_says(problem, 2, 42, "finite number")


@pytest.mark.parametrize("value", ["0", "-0.5", "1.5", "60"])
def test_fault_9_density_out_of_bounds(value: str) -> None:
    problem = only(f"{TIES}adapters:\n  - {{path: x, density: {value}}}\n")
    assert_says(problem, 4, 24, "adapters[0].density", value, "above 0 and up to 1")


@pytest.mark.parametrize("weights", [(1, -1), (0, 0), ("1e-9", "-2e-9")])
def test_fault_10_weights_that_sum_to_zero(weights: tuple[object, object]) -> None:
    models = ", ".join(f"{{model: m{w}, parameters: {{weight: {w}}}}}" for w in weights)
    models = models.replace("m0", "n", 1)
    assert_says(only(f"{LINEAR}models: [{models}]"), 2, 10, "sum", "normalize: false")


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.system [ls]", "!mine x", "!!timestamp 2001-01-01", "!!set {}"],
)
def test_fault_11_tags(value: str) -> None:
    assert_says(only(f"{LINEAR}models: {value}"), 2, 9, "models", "tag", value.split(" ")[0])


def test_fault_11_a_tag_that_does_not_fit_its_text() -> None:
    assert_says(only(f"{LINEAR}seed: !!int lots"), 2, 7, "!!int", "'lots'")


def test_fault_12_not_utf_8_names_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_bytes(b"merge_method: \xe9t\xe9")
    problem = from_file(path)
    assert isinstance(problem, ConfigError)
    assert "byte 0xe9 at offset 14" in str(problem)


def test_fault_13_references_are_known_beside_other_problems() -> None:
    found, recipe = refused(TIES + "adapters: [{path: gone, weight: x, color: red}]\nnonsense: 1")
    assert len(found) == 3
    assert recipe is not None and recipe.entries[0].adapter is not None
    assert recipe.entries[0].adapter.text == "gone"
    assert recipe.entries[0].adapter.place == Place("cfg.yaml", 3, 19)


def test_fault_14_the_same_model_twice() -> None:
    twice = TIES + "adapters: [{path: a%s}, {path: a%s}]"
    assert_says(only(twice % ("", "")), 3, 23, "'b with a'", "cfg.yaml:3:12", "name")
    assert_says(only(twice % (", name: x", "")), 3, 32, "twice")
    assert_says(only(twice % (", name: x", ", name: x")), 3, 32, "same name")
    assert refused(twice % (", name: x", ", name: y"))[0] == []
    assert refused(TIES + "adapters: [{path: a, revision: x}, {path: a}]")[0] == []


def test_fault_14_two_paths_to_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert "twice" in str(only(LINEAR + "models: [{model: a}, {model: ./link}]", tmp_path))


@pytest.mark.parametrize("key", ["modules", "chat_template"])
def test_keys_not_supported_yet_are_refused_by_name(key: str) -> None:
    problem = only(f"{LINEAR}models: [{{model: a}}]\n{key}: |\n  some\n  text\n")
    assert_says(problem, 3, 1, f"{key} is not supported yet")


@pytest.mark.parametrize(
    ("density", "part", "words"),
    [
        ("[]", "[]", ("an empty list", "a finite number above 0 and up to 1")),
        ("[0.5, 1.5]", "1.5", ("density[1] is not valid", "1.5")),
        ("[0.5, true]", "true", ("true",)),
        ("[0.5, [1]]", "[1]", ("density[1]",)),
        ("[{filter: mlp, value: 2}]", "2", ("density[0].value", "2")),
        ("[{filter: mlp, value: [1, 2]}]", "2", ("density[0].value[1]",)),
        ("[{filter: mlp, value: [{value: 1}]}]", "{value", ("density[0].value[0]",)),
        ("[{fliter: mlp, value: 1}]", "fliter", ("did you mean `filter`?",)),
        ("[{filter: 3, value: 1}]", "3", ("{filter: part of a tensor's name",)),
        (
            "[{filter: mlp}]",
            "{filter",
            ("density[0] is not valid", "the last one without a filter"),
        ),
        ("[{value: 1}, 0.5]", "{value", ("density[0]",)),
        ("0", "0", ("density is not valid",)),
    ],
)
def test_gradients_and_filters_that_are_wrong(
    density: str, part: str, words: tuple[str, ...]
) -> None:
    before = "models: [{model: a, parameters: {density: "
    column = len(before) + 1 + density.index(part)
    assert_says(only(f"{TIES}{before}{density}}}}}]"), 3, column, *words)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("{source: base, tokens: {}}", 27, ("tokenizer.tokens is not supported yet",)),
        ("{source: base, pad_to_multiple_of: 8}", 27, ("keeps its rows",)),
        ("{}", 12, ("tokenizer.source is missing",)),
        ("base", 12, ("{source: base}",)),
    ],
)
def test_tokenizers_of_other_forms(text: str, column: int, words: tuple[str, ...]) -> None:
    assert_says(only(f"{LINEAR}models: [{{model: a}}]\ntokenizer: {text}"), 3, column, *words)


def test_one_word_about_the_tokenizer() -> None:
    text = f"{LINEAR}models: [{{model: a}}]\ntokenizer: {{source: base}}\ntokenizer_source: base"
    assert_says(only(text), 3, 1, "exclude each other")


SOURCES = "sources: [{model: a, layer_range: [0, 4]}, {model: c, layer_range: %s}]"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("[2, 6]", ("slices that take models apart", "[2, 6]", "[0, number of layers]")),
        ("[0, 0]", ("slices that take models apart",)),
        ("[0, 8]", ("not equally long", "4 layers")),
        ("4", ("layer_range is not valid", "such as [0, 32]")),
        ("[0, 1, 2]", ("layer_range is not valid",)),
        ("[0, 1.5]", ("layer_range is not valid",)),
    ],
)
def test_a_range_of_layers_that_cannot_be_had(layers: str, words: tuple[str, ...]) -> None:
    line = f"slices: [{{{SOURCES % layers}}}]"
    assert_says(only(LINEAR + line), 2, line.rindex(layers) + 1, *words)


def test_several_slices_or_none() -> None:
    one = f"{{{SOURCES % '[0, 4]'}}}"
    assert_says(
        only(f"{LINEAR}slices: [{one}, {one}]"), 2, len(f"slices: [{one}, ") + 1, "2 slices"
    )
    assert_says(only(f"{LINEAR}slices: []"), 2, 9, "0 slices")


def test_slices_beside_models() -> None:
    both = f"{LINEAR}slices: [{{{SOURCES % '[0, 4]'}}}]\nmodels: [{{model: d}}]"
    assert_says(only(both), 2, 1, "slices and models exclude each other")


def test_a_slice_without_sources_and_a_source_without_layers() -> None:
    assert_says(only(f"{LINEAR}slices: [{{}}]"), 2, 10, "slices[0].sources is missing")
    text = f"{LINEAR}slices: [{{sources: [{{model: a}}]}}]"
    assert_says(only(text), 2, 21, "layer_range is missing", "[0, 32]")


def test_no_gradient_of_whole_numbers() -> None:
    problem = only(TIES + "models: [{model: a}]\nparameters: {steps: [1, 4]}")
    assert_says(problem, 4, 21, "parameters.steps", "between whose whole numbers")


def test_a_parameter_without_a_default_needs_a_last_value() -> None:
    text = "merge_method: nearswap\nbase_model: b\nmodels: [{model: a}]\n"
    problem = only(f"{text}parameters: {{t: [{{filter: mlp, value: 1}}]}}")
    assert_says(problem, 4, 17, "for every tensor", "- value: ...")


@pytest.mark.parametrize("value", ["l2", "L1", "1", "''"])
def test_a_name_that_is_no_choice(value: str) -> None:
    problem = only(TIES + f"models: [{{model: a}}]\nparameters: {{rescale: {value}}}")
    assert_says(problem, 4, 23, "parameters.rescale", "one of none, l1, density", "none")


@pytest.mark.parametrize("value", ["1.5", "0", "true"])
def test_a_number_that_is_not_whole(value: str) -> None:
    problem = only(TIES + f"models: [{{model: a}}]\nparameters: {{steps: {value}}}")
    assert_says(problem, 4, 21, "parameters.steps", "a whole number at least 1", "10")


@pytest.mark.parametrize(
    ("output", "column", "words"),
    [
        ("{rank: 8}", 10, ("output.rank does not go with kind: model", "kind: adapter")),
        ("{kind: adapter, shard_size: 1GB}", 25, ("output.shard_size does not go with",)),
        ("{kind: adapter, rank: 0}", 31, ("output.rank is not valid", "at least 1")),
        ("{kind: adapter, energy: 1}", 33, ("output.energy is not valid", "below 1")),
        ("{kind: adapter, error: 0}", 32, ("output.error is not valid", "above 0")),
        ("{error: 0.1}", 10, ("output.error does not go with kind: model", "kind: adapter")),
        ("{kind: lora}", 16, ("output.kind is not valid", "model or adapter")),
    ],
)
def test_an_output_of_two_minds(output: str, column: int, words: tuple[str, ...]) -> None:
    assert_says(only(f"{LINEAR}models: [{{model: a}}]\noutput: {output}"), 3, column, *words)


def test_isotropize_without_core_space() -> None:
    problem = only(LINEAR + "models: [{model: a}]\nisotropize: true")
    assert_says(problem, 3, 1, "isotropize needs core space", "space: core")


@pytest.mark.parametrize(
    ("output", "lacks"), [("", "kind: adapter and a rank"), ("output: {kind: adapter}", "a rank")]
)
def test_compressed_space_without_a_rank(output: str, lacks: str) -> None:
    problem = only(f"{LINEAR}models: [{{model: a}}]\nspace: compressed\n{output}")
    assert_says(problem, 3, 8, f"without {lacks} under `output`", "rank: 32")


@pytest.mark.parametrize("text", ["a+b+c", "a@b@c", "+b", "a+", "a@", "@r", "a@r+b@"])
def test_references_that_are_not_clear(text: str) -> None:
    assert_says(only(f"{LINEAR}models: [{{model: {text!r}}}]"), 2, 18, text, "lora")


@pytest.mark.parametrize(
    "text, line, words",
    [
        (LINEAR, 1, ("0 in `models`", "1 or more")),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", 2, ("exactly 1", "2 in")),
        (TIES + "models: [{model: b}]", 3, ("0 in `models`",)),
    ],
)
def test_numbers_of_models(text: str, line: int, words: tuple[str, ...]) -> None:
    assert_says(only(text), line, 1, *words)


def test_what_must_be_there() -> None:
    assert_says(only("models: [{model: a}]"), 1, 1, "merge_method is missing", "linear, ")
    assert_says(only("merge_method: ties\nmodels: [{model: a}]"), 1, 1, "base_model is missing")
    for method in ("linear", "ties"):
        problem = only(f"merge_method: {method}\nadapters: [{{path: a}}]")
        assert_says(problem, 2, 1, "base_model is missing")
    problem = only("merge_method: nearswap\nmodels: [{model: a}]")
    assert_says(problem, 1, 1, "nearswap needs the parameter `t`")


def test_a_base_with_an_adapter() -> None:
    problem = only("base_model: a+b\nmerge_method: ties\nmodels: [{model: c}]")
    assert_says(problem, 1, 13, "not supported yet", "'b'")


def test_all_problems_at_once_from_top_to_bottom() -> None:
    found, recipe = refused(
        """\
        base_model: b
        merge_method: ties
        colour: red
        models:
          - {model: a, parameters: {weight: .nan, density: 2}}
          - {modle: c}
          - {model: d+e+f}
        adapters:
          - {path: x, weight: '1'}
        parameters: {rescale: l3}
        seed: -1
        """
    )
    lines = [problem.where.line for problem in found if isinstance(problem.where, Place)]
    assert lines == [3, 5, 5, 6, 6, 7, 9, 10, 11]
    assert recipe is not None and [entry.name for entry in recipe.entries] == ["a", "x"]


def test_a_method_that_is_misspelt_hides_no_other_problem() -> None:
    text = "base_model: b\nmerge_method: tise\nadapters: [{path: a, wieght: 1, density: 2}]"
    found, recipe = refused(text)
    told = ["merge_method", "wieght", "density"]
    assert [word in str(problem) for word, problem in zip(told, found, strict=True)] == [True] * 3
    assert recipe is not None, "whose folders can be looked at"


def test_the_same_words_for_options() -> None:
    problems = Problems()
    build_recipe(
        base="b", adapters=["a=nan"], models=[], method="tis", methods=METHODS, problems=problems
    )
    method, weight = map(str, problems)
    assert method.startswith("<command line>:2:15: merge_method")
    assert weight.startswith("<command line>:4:21: adapters[0].weight")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert isinstance(from_file(tmp_path / "gone.yaml"), InputMissing)
    assert isinstance(from_file(tmp_path), ConfigError)
    (tmp_path / "shard.safetensors").write_bytes(b"\0" * (1 << 20) + b"\0")
    assert "too large" in str(from_file(tmp_path / "shard.safetensors"))
    assert isinstance(from_file(tmp_path / "shard.safetensors" / "x"), InputMissing)


@pytest.mark.skipif(os.name != "posix", reason="needs a link that leads to itself")
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert isinstance(from_file(tmp_path / "loop"), StorageError)
