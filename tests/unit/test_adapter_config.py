"""adapter_config.json: what is read, what is refused by name, and what is ignored."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.adapters.config import LoraConfig, Patterns, read_config
from streammerge.adapters.fields import EXTRAS, IGNORED, NO_WEIGHTS, OTHER_WEIGHTS
from streammerge.errors import Problems


def judge(path: Path) -> tuple[LoraConfig | None, str]:
    """The config, and what is wrong with it as the user reads it."""
    problems = Problems()
    config = read_config(path, problems)
    assert (config is None) == (len(problems) > 0)
    return config, "\n".join(str(problem) for problem in problems)


def accepted(folder: Path, **fields: Any) -> LoraConfig:
    config, text = judge(write_config(folder, **fields))
    assert config is not None, text
    return config


def refused(folder: Path, **fields: Any) -> str:
    path = write_config(folder, **fields)
    config, text = judge(path)
    assert config is None
    assert text.startswith(str(path))
    return text


# ------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 2.0),
        ({"r": 3}, 4 / 3),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"lora_alpha": 0}, 0.0),
        ({"lora_alpha": 0.5}, 0.25),
        ({"lora_alpha": -1}, -0.5),
        ({"alpha_pattern": {"q_proj": 7}}, 3.5),
        ({"rank_pattern": {"q_proj": 8}}, 0.5),
        ({"rank_pattern": {"q_proj": 9}, "use_rslora": True}, 4 / 3),
        ({"rank_pattern": None, "alpha_pattern": None, "use_rslora": None}, 2.0),
    ],
)
def test_scale(tmp_path: Path, fields: dict[str, Any], scale: float) -> None:
    config = accepted(tmp_path, **fields)
    assert config.scale("model.layers.0.self_attn.q_proj") == scale


def test_defaults_are_those_of_peft(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA"}')
    config, _ = judge(path)
    assert config == LoraConfig(r=8, alpha=8)


@pytest.mark.parametrize(
    ("module", "rank"),
    [
        ("model.layers.1.self_attn.q_proj", 3),
        ("model.layers.0.self_attn.q_proj", 5),
        ("q_proj", 5),
        ("model.layers.0.self_attn.my_q_proj", 2),  # a pattern starts at a dot
        ("model.layers.0.self_attn.q_proj.inner", 2),  # and ends at the end
        ("model.layers.11.mlp.up_proj", 7),
        ("model.layers.1.mlp.up_proj", 2),
        ("deep.start.x", 2),
        ("start.x", 9),
    ],
)
def test_the_first_pattern_of_the_file_decides(tmp_path: Path, module: str, rank: int) -> None:
    patterns = {"1.self_attn.q_proj": 3, "q_proj": 5, r"layers\.1\d\..*": 7, "^start.x": 9}
    assert accepted(tmp_path, rank_pattern=patterns).rank(module) == rank


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "layers", "1", "11"]), min_size=1, max_size=3)


@given(keys=st.lists(WORDS, max_size=4), parts=WORDS)
def test_patterns_match_like_pefts_expression(keys: list[list[str]], parts: list[str]) -> None:
    values = {".".join(key): float(place) for place, key in enumerate(keys)}
    module = ".".join(parts)
    hits = [one for key, one in values.items() if re.match(rf"(.*\.)?({key})$", module)]
    assert Patterns.of(values).lookup(module, -1.0) == [*hits, -1.0][0]


# --------------------------------------------------------------------------------- trained tokens


def test_a_list_of_tokens_is_for_any_module_that_holds_some(tmp_path: Path) -> None:
    config = accepted(tmp_path, trainable_token_indices=[9, 2])
    assert config.token_indices("model.embed_tokens") == (9, 2)


def test_tokens_are_given_by_the_ends_of_names(tmp_path: Path) -> None:
    named = {"embed_tokens": [1], "lm_head": [2, 3]}
    config = accepted(tmp_path, trainable_token_indices=named)
    assert config.token_indices("model.embed_tokens") == (1,)
    assert config.token_indices("lm_head") == (2, 3)
    assert config.token_indices("model.norm") is None


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
def test_a_number_that_no_float_can_hold_is_refused(tmp_path: Path, field: str) -> None:
    value = {"q_proj": 10**400} if field.endswith("pattern") else 10**400
    assert f"`{field}` cannot be used" in refused(tmp_path, **{field: value})


@pytest.mark.parametrize("value", ["3", 3, [-1], [1.0], {"lm_head": 3}, {"lm_head": ["a"]}])
def test_tokens_that_are_no_rows(tmp_path: Path, value: object) -> None:
    assert "`trainable_token_indices`" in refused(tmp_path, trainable_token_indices=value)


def test_tokens_that_are_all_of_an_adapter(tmp_path: Path) -> None:
    tokens = {
        "peft_type": "TRAINABLE_TOKENS",
        "init_weights": True,
        "target_modules": "embed_tokens",
    }
    config = accepted(tmp_path, **tokens, token_indices=[9, 2])
    assert config.token_indices("model.embed_tokens") == (9, 2)
    assert "`token_indices`" in refused(tmp_path, **tokens, token_indices=[-1])
    assert "'token_indices'" in refused(tmp_path, token_indices=[9, 2])  # LoRA has no such field


def test_no_tokens(tmp_path: Path) -> None:
    for value in (None, [], {}):
        assert accepted(tmp_path, trainable_token_indices=value).token_indices("a") is None


def test_a_bias_that_peft_does_not_know(tmp_path: Path) -> None:
    assert "none, all or lora_only" in refused(tmp_path, bias="some")


# ---------------------------------------------------------------------------- refused and ignored

ASKED: dict[str, Any] = {
    "target_parameters": ["mlp.experts.down_proj"],
    "layer_replication": [[0, 4], [2, 5]],
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 0.1},
    "megatron_config": {"a": 1},
    "init_lora_weights": "pissa_niter_16",
}


def test_the_table_of_cases_is_complete() -> None:
    assert set(ASKED) == {extra.field for extra in EXTRAS}


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.field)
def test_more_than_plain_lora_is_refused_by_name(tmp_path: Path, extra: Any) -> None:
    text = refused(tmp_path, **{extra.field: ASKED[extra.field]})
    assert extra.what in text
    assert extra.why in text
    assert f"found:    {extra.field}: " in text
    assert extra.remedy in text
    for off in (None, False, [], *extra.plain):
        accepted(tmp_path, **{extra.field: off})


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "lora_ga", "new-thing"])
def test_initialisations_that_change_the_base_are_refused(tmp_path: Path, init: str) -> None:
    assert repr(init) in refused(tmp_path, init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_are_taken(tmp_path: Path, init: object) -> None:
    accepted(tmp_path, init_lora_weights=init)


@pytest.mark.parametrize("field", sorted(IGNORED))
def test_what_steered_the_training_is_ignored(tmp_path: Path, field: str) -> None:
    config = accepted(tmp_path, **{field: {"some": "value"}})
    assert config.ignored == (field,)


@pytest.mark.parametrize("off", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_is_ignored(tmp_path: Path, off: object) -> None:
    accepted(tmp_path, use_quantum=off)


@pytest.mark.parametrize("on", [True, 0, 1.5, "yes", [1], {"a": None}])
def test_an_unknown_field_that_is_set_is_refused_by_name(tmp_path: Path, on: object) -> None:
    assert "'use_quantum'" in refused(tmp_path, use_quantum=on)


@pytest.mark.parametrize("peft_type", [*NO_WEIGHTS, *OTHER_WEIGHTS])
def test_other_kinds_of_adapters_go_by_their_own_names(tmp_path: Path, peft_type: str) -> None:
    text = refused(tmp_path, peft_type=peft_type)
    assert {**NO_WEIGHTS, **OTHER_WEIGHTS}[peft_type] in text
    assert ("no merged weight" in text) == (peft_type in NO_WEIGHTS)


@pytest.mark.parametrize(
    ("peft_type", "found"), [("QUUX", "'QUUX'"), (None, "found:    nothing"), (3, "found:    3")]
)
def test_a_kind_that_nobody_knows_is_shown(tmp_path: Path, peft_type: object, found: str) -> None:
    assert found in refused(tmp_path, peft_type=peft_type)


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    text = refused(tmp_path, bias="some", use_quantum=1, r=0, alpha_pattern=[1])
    assert all(word in text for word in ("`bias`", "use_quantum", "`r`", "`alpha_pattern`"))


# ------------------------------------------------------------------------------------- residuals


@pytest.mark.parametrize(
    ("field", "value"), [("init_lora_weights", "pissa"), ("kasa_config", {"beta": 0.1})]
)
def test_a_residual_base_is_taken_at_the_recipes_word(
    tmp_path: Path, field: str, value: object
) -> None:
    path = write_config(tmp_path, **{field: value})
    assert "assume_residual_base: true" in judge(path)[1]
    problems = Problems()
    config = read_config(path, problems, assume_residual_base=True)
    assert config is not None
    assert config.kasa == (field == "kasa_config")


def test_the_word_does_not_excuse_anything_else(tmp_path: Path) -> None:
    problems = Problems()
    path = write_config(tmp_path, init_lora_weights="olora", layer_replication=[[0, 1]])
    assert read_config(path, problems, assume_residual_base=True) is None
    assert ["layer replication" in str(problem) for problem in problems] == [True]


# --------------------------------------------------------------------------------------- AdaLoRA

ADALORA = {"peft_type": "ADALORA", "init_r": 6, "lora_alpha": 3, "total_step": 9, "deltaT": 2}


def test_adalora_keeps_the_scale_of_its_first_rank(tmp_path: Path) -> None:
    pattern = {"m.q_proj.lora_E": [True, False, True, True, False, False], "m.v.lora_E": [False]}
    config = accepted(tmp_path, **ADALORA, rank_pattern=pattern, use_rslora=True)
    assert [config.rank(module) for module in ("m.q_proj", "m.v", "m.other")] == [3, 0, 6]
    assert config.scale("m.q_proj") == config.scale("m.other") == 3 / (6 + 1e-5)


def test_adalora_without_alpha_scales_by_its_rank(tmp_path: Path) -> None:
    config = accepted(tmp_path, **{**ADALORA, "lora_alpha": 0, "rank_pattern": None})
    assert config.scale("q") == 6 / (6 + 1e-5)


@pytest.mark.parametrize("pattern", [{"q.lora_E": 3}, {"q.lora_E": [1, 0]}, [True]])
def test_adaloras_pattern_is_a_list_of_flags(tmp_path: Path, pattern: object) -> None:
    assert "`rank_pattern`" in refused(tmp_path, **ADALORA, rank_pattern=pattern)


def test_adaloras_fields_mean_nothing_to_lora(tmp_path: Path) -> None:
    assert "'init_r'" in refused(tmp_path, init_r=12)


# ------------------------------------------------------------------------------------ wrong types


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 8.0),
        ("r", True),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", True),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("use_dora", "yes"),
        ("lora_bias", 1),
        ("fan_in_fan_out", "false"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"q_proj(": 8}),
        ("alpha_pattern", {"*q_proj": 8}),
        ("alpha_pattern", {"q_proj": None}),
        ("base_model_name_or_path", 3),
    ],
)
def test_wrong_types_name_the_field(tmp_path: Path, field: str, value: object) -> None:
    text = refused(tmp_path, **{field: value})
    assert f"`{field}`" in text
    assert "expected: " in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ('{"peft_type": "LORA",}', "line 1, column"),
        ('{"peft_type": "LORA", "r": 8, "r": 16}', "key twice"),
        ('{"rank_pattern": {"q": 1, "q": 2}}', "key twice"),
        ("[]", "not a JSON object"),
        ("[" * 200_000, "nested absurdly deep"),
        ('{"lora_alpha": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_damaged_json_names_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    config, found = judge(path)
    assert config is None
    assert found.startswith(str(path))
    assert says in found


def test_a_huge_file_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    config, found = judge(path)
    assert config is None
    assert "too large" in found


TEXT = st.text("ab.*([é\ud800", max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "use_rslora", "peft_type", "new"]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a loaded machine
@given(fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_json_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", **fields}))
    config, _ = judge(path)
    if config is not None:
        assert math.isfinite(config.scale("model.q_proj"))
