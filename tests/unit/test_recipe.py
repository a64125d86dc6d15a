"""Recipes that are right: what they are read as, and that they are written back to themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Literal

import pytest
import yaml

from streammerge.declarations import Knob, MethodSpec
from streammerge.errors import Place, Problems
from streammerge.recipe import Recipe, build_recipe, parse_recipe, read_recipe, to_yaml
from streammerge.words import DType

ONE = Knob(1.0)
DENSITY = Knob(1.0, above=0, up_to=1, nothing_at=0)
RESCALE = Knob("none", switch=("none", "l1"), choices=("none", "l1", "density"))
STEPS = Knob(10, at_least=1, whole=True)


def method(
    name: str,
    space: Literal["deltas", "weights"],
    per_model: Mapping[str, Knob],
    shared: Mapping[str, Knob],
    models: tuple[int, int | None] = (1, None),
) -> MethodSpec:
    return MethodSpec(name, print, space, "rows", per_model, shared, {}, models)


METHODS = {
    spec.name: spec
    for spec in (
        method("linear", "weights", {"weight": ONE}, {"normalize": Knob(True)}),
        method(
            "task_arithmetic", "deltas", {"weight": ONE}, {"lambda": ONE, "normalize": Knob(False)}
        ),
        method(
            "ties",
            "deltas",
            {"weight": ONE, "density": DENSITY},
            {"lambda": ONE, "normalize": Knob(True), "rescale": RESCALE, "steps": STEPS},
        ),
        method("passthrough", "weights", {"scale": ONE}, {}, models=(1, 1)),
        method("nearswap", "weights", {}, {"t": Knob()}, models=(1, 1)),
    )
}

SHORTHAND = """\
base_model: ./llama-70b
merge_method: ties
adapters:
  - {path: ./lora-math, weight: 0.5, density: 0.6}
  - {path: ./lora-code, weight: 0.3, density: 0.5}
out_dtype: bfloat16
"""

MERGEKIT = """\
base_model: org/base@main
merge_method: ties
parameters: {weight: 2, lambda: 0.5}
models:
  - model: org/tuned@v1+./lora@7
    parameters: {density: 0.25}
  - model: {model: {path: odd+name@x, revision: r}, lora: {path: other@lora}}
    name: odd
    parameters: {weight: 3}
adapters:
  - {path: org/style, revision: dev, density: 0.5}
  - {path: org/tone@v2, name: tone, parameters: {weight: -1}}
dtype: float32
out_dtype: float16
seed: 42
output: {path: ./out, kind: model, shard_size: 1.5GiB}
"""


def read(text: str, folder: Path = Path("/recipes")) -> Recipe:
    problems = Problems()
    recipe = parse_recipe(dedent(text), "cfg.yaml", folder, METHODS, problems)
    problems.raise_any()
    assert recipe is not None
    return recipe


def test_shorthand_is_the_base_with_each_adapter() -> None:
    recipe = read(SHORTHAND)
    assert [(e.name, e.model.text, e.adapter.text) for e in recipe.entries if e.adapter] == [
        ("lora-math", "./llama-70b", "./lora-math"),
        ("lora-code", "./llama-70b", "./lora-code"),
    ]
    assert recipe.entries[0].knobs == {"weight": 0.5, "density": 0.6}
    second = recipe.entries[1].adapter
    assert second is not None and second.place == Place("cfg.yaml", 5, 12)
    assert recipe.shared == {"lambda": 1.0, "normalize": True, "rescale": "none", "steps": 10}
    assert (recipe.out_dtype, recipe.seed, recipe.output) == (DType.BF16, 0, None)
    assert recipe.warnings == ()


def test_models_come_first_then_adapters_with_their_own_knobs_before_the_top_levels() -> None:
    recipe = read(MERGEKIT)
    pairs = [
        (e.model.text, e.model.revision, e.adapter.text, e.adapter.revision)
        for e in recipe.entries
        if e.adapter
    ]
    assert pairs == [
        ("org/tuned", "v1", "./lora", "7"),
        ("odd+name@x", "r", "other@lora", None),
        ("org/base", "main", "org/style", "dev"),
        ("org/base", "main", "org/tone", "v2"),
    ]
    assert [entry.name for entry in recipe.entries] == ["lora", "odd", "style", "tone"]
    knobs = [(entry.knobs["weight"], entry.knobs["density"]) for entry in recipe.entries]
    assert knobs == [(2, 0.25), (3, 1), (2, 0.5), (-1, 1)]
    assert recipe.shared["lambda"] == 0.5
    assert recipe.out_dtype is DType.F16
    assert (recipe.seed, recipe.output, recipe.shard_bytes) == (42, "./out", 3 << 29)


@pytest.mark.parametrize(
    "written, weight", [("1e-3", 0.001), (".5", 0.5), ("1E3", 1000), ("-2.", -2), ("+7", 7)]
)
def test_fault_7_numbers_that_yaml_1_1_takes_for_text(written: str, weight: float) -> None:
    recipe = read(
        f"{{merge_method: linear, models: [{{model: m, parameters: {{weight: {written}}}}}]}}"
    )
    assert recipe.entries[0].knobs["weight"] == weight


@pytest.mark.parametrize("name", ["no", "yes", "on", "0777", "1:30", "2001-01-01", "1_000", "0x1f"])
def test_fault_7_text_that_yaml_1_1_takes_for_something_else(name: str) -> None:
    recipe = read(f"merge_method: linear\nmodels: [{{model: {name}}}]")
    assert recipe.entries[0].model.text == name


def test_the_base_listed_under_a_method_on_deltas_takes_no_part_and_under_linear_does() -> None:
    text = "base_model: b\nmerge_method: {}\nmodels: [{{model: b}}, {{model: a}}]"
    dropped = read(text.format("ties"))
    assert [entry.name for entry in dropped.entries] == ["a"]
    assert dropped.warnings[0].startswith("cfg.yaml:3:10: the base listed as a model")
    assert [entry.name for entry in read(text.format("linear")).entries] == ["b", "a"]


def test_names_made_from_paths_are_unique() -> None:
    recipe = read(
        """\
        base_model: b
        merge_method: ties
        adapters: [{path: x/ckpt}, {path: y/ckpt}, {path: z, name: ckpt-2}, {path: .}]
        """
    )
    assert [entry.name for entry in recipe.entries] == ["ckpt", "ckpt-3", "ckpt-2", "model"]


def test_one_warning_for_each_key_without_effect() -> None:
    recipe = read(
        """\
        merge_method: linear
        name: mine
        parameters: {int8_mask: true}
        models:
          - {model: a, parameters: {density: 0.5, normalize: false}}
          - {model: b, parameters: {density: 0.5}}
        """
    )
    assert recipe.warnings == (
        "cfg.yaml:2:1: `name` has no effect: the output's folder names it",
        "cfg.yaml:3:14: `int8_mask` has no effect: linear does not use it",
        "cfg.yaml:5:29: `density` has no effect: linear does not use it (also at 6:29)",
        "cfg.yaml:5:43: `normalize` has no effect: all models share it, so it belongs under the "
        "top `parameters:`",
    )
    assert recipe.shared == {"normalize": True}


@pytest.mark.parametrize(
    ("value", "meant"), [("l1", "l1"), ("density", "density"), ("true", "l1"), ("false", "none")]
)
def test_a_named_choice_may_be_switched(value: str, meant: str) -> None:
    recipe = read(SHORTHAND + f"parameters: {{rescale: {value}, steps: 3}}\n")
    assert (recipe.shared["rescale"], recipe.shared["steps"]) == (meant, 3)
    assert isinstance(recipe.shared["steps"], int)


@pytest.mark.parametrize("where", ["config", "working directory"])
def test_text_that_is_a_path_as_a_whole_is_that_path(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a+b@c").mkdir()
    monkeypatch.chdir(tmp_path if where == "working directory" else "/")
    folder = tmp_path if where == "config" else Path("/nowhere")
    entry = read("merge_method: linear\nmodels: [{model: a+b@c}]", folder).entries[0]
    assert (entry.model.text, entry.model.revision, entry.adapter) == ("a+b@c", None, None)


def test_a_zero_sum_of_weights_is_fine_where_nothing_divides_by_it() -> None:
    models = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]"
    read(f"merge_method: linear\nparameters: {{normalize: false}}\n{models}")
    read(f"merge_method: ties\nbase_model: x\n{models}")


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf{}", b"{}"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_fault_12_a_byte_order_mark_and_crlf_are_fine(
    data: bytes, newline: str, tmp_path: Path
) -> None:
    text = dedent(SHORTHAND).replace("\n", newline).encode()
    path = tmp_path / "cfg.yaml"
    path.write_bytes(data.replace(b"{}", text))
    problems = Problems()
    recipe = read_recipe(path, METHODS, problems)
    problems.raise_any()
    assert recipe is not None
    assert recipe.folder == tmp_path
    assert recipe.entries[0].place == Place(str(path), 4, 5)


@pytest.mark.parametrize("text", [SHORTHAND, MERGEKIT])
def test_yaml_reads_back_to_an_equal_recipe(text: str) -> None:
    recipe = read(text)
    again = read(to_yaml(recipe))
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)


def test_canonical_yaml_says_everything_and_keeps_the_shorthand() -> None:
    assert to_yaml(read(SHORTHAND)) == dedent(
        """\
        base_model: ./llama-70b
        merge_method: ties
        adapters:
        - {path: ./lora-math, name: lora-math, weight: 0.5, density: 0.6}
        - {path: ./lora-code, name: lora-code, weight: 0.3, density: 0.5}
        parameters: {lambda: 1.0, normalize: true, rescale: none, steps: 10}
        out_dtype: bfloat16
        seed: 0
        """
    )


def test_the_word_on_a_residual_base_is_kept_with_its_adapter() -> None:
    text = """
        base_model: b
        merge_method: task_arithmetic
        models: [{model: b+m, assume_residual_base: true}, {model: b+n}]
        adapters: [{path: a, assume_residual_base: true, weight: 2}, {path: c}]
        """
    recipe = read(dedent(text))
    assert [one.assume_residual_base for one in recipe.entries] == [True, False, True, False]
    written = to_yaml(recipe)
    assert written.count("assume_residual_base: true") == 2
    assert read(written) == recipe


def test_other_readers_of_yaml_read_the_same_values() -> None:
    recipe = read("merge_method: passthrough\nmodels: [{model: no, parameters: {scale: 1e-30}}]")
    document = yaml.safe_load(to_yaml(recipe))
    assert document["models"] == [{"model": "no", "name": "no", "parameters": {"scale": 1e-30}}]


def test_a_mapping_that_would_be_misread_as_text_stays_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "a@r").mkdir()
    text = "merge_method: linear\nmodels: [{model: {model: {path: a, revision: r}}}]"
    recipe = read(text, tmp_path)
    assert read(to_yaml(recipe), tmp_path) == recipe


def test_portable_yaml_is_the_same_from_wherever_inputs_are_staged(tmp_path: Path) -> None:
    texts = set()
    for places in ("a/base", "b/c/base"):
        root = tmp_path / places
        root.mkdir(parents=True)
        (root.parent / "math").mkdir()
        config = tmp_path / "cfg.yaml"
        config.write_text(
            f"base_model: {places}\nmerge_method: ties\nadapters: [{{path: {places}/../math}}]\n"
        )
        recipe = read_recipe(config, METHODS, Problems())
        assert recipe is not None
        texts.add(to_yaml(recipe, portable=True))
    assert len(texts) == 1


def test_portable_yaml_names_no_folder_of_this_machine() -> None:
    recipe = read(
        """\
        base_model: /cache/models--org--base/snapshots/0123abc
        merge_method: ties
        adapters: [{path: /home/me/ckpt}, {path: /scratch/ckpt}, {path: ~/c@1}, {path: org/x@v1}]
        output: {path: /home/me/out, shard_size: 2GB}
        """
    )
    text = to_yaml(recipe, portable=True)
    assert "/home" not in text and "/scratch" not in text and "/cache" not in text
    again = read(text)
    assert again.base is not None and again.base.text == "org/base"
    assert [entry.name for entry in again.entries] == ["ckpt", "ckpt-2", "c", "x"]
    assert [entry.adapter.text for entry in again.entries if entry.adapter] == [
        "ckpt",
        "ckpt",
        "c",
        "org/x",
    ]
    assert (again.output, again.shard_bytes) == (None, 2 * 10**9)


def test_options_build_the_recipe_that_its_yaml_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=2").mkdir()
    problems = Problems()
    recipe = build_recipe(
        base="no",
        adapters=["Y=0.7", "a=b=1e-3", "run=2", "1e3", "x=late"],
        models=["org/m@v1+z=2"],
        method="ties",
        out_dtype="bfloat16",
        seed=3,
        shard_size="1GiB",
        methods=METHODS,
        problems=problems,
    )
    problems.raise_any()
    assert recipe is not None
    found = [(e.adapter.text, e.knobs["weight"]) for e in recipe.entries if e.adapter]
    assert found == [
        ("z", 2),
        ("Y", 0.7),
        ("a=b", 0.001),
        ("run=2", 1),
        ("1e3", 1),
        ("x=late", 1),
    ]
    assert recipe.base is not None and recipe.base.place.file == "<command line>"
    assert (recipe.folder, recipe.seed, recipe.shard_bytes) == (Path(), 3, 1 << 30)
    assert read(to_yaml(recipe), Path()) == recipe


def test_the_tokenizer_in_either_form() -> None:
    for text in ("tokenizer_source: union", "tokenizer: {source: union}"):
        recipe = read(f"merge_method: linear\nmodels: [{{model: a}}]\n{text}\n")
        assert recipe.tokenizer == "union"
        assert "tokenizer_source: union" in to_yaml(recipe)
