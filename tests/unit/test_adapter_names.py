"""Finding the base's tensor of each module of an adapter."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.adapters.faults import Findings
from streammerge.adapters.names import AS_THEY_ARE, MOVES, Move, find_tensors, moves, nearest
from streammerge.errors import Problems

LLAMA = [
    *(f"model.layers.{n}.self_attn.{part}_proj" for n in range(3) for part in "qkvo"),
    *(f"model.layers.{n}.mlp.{part}_proj" for n in range(3) for part in ("gate", "up", "down")),
]


def weights(modules: Iterable[str]) -> list[str]:
    return [f"{module}.weight" for module in modules]


def find(
    modules: Sequence[str], base: Iterable[str], named_base: str | None = None
) -> tuple[Mapping[str, str], Move, str]:
    findings, problems = Findings("adapter_model.safetensors"), Problems()
    found, move = find_tensors(weights(modules), dict.fromkeys(base), findings, named_base)
    findings.report(problems)
    return found, move, "\n".join(map(str, problems))


def test_names_as_they_are() -> None:
    base = weights([*LLAMA, "lm_head", "model.norm"])
    found, move, problems = find(LLAMA, base)
    assert (move, problems) == (AS_THEY_ARE, "")
    assert found == {name: name for name in weights(LLAMA)}


@pytest.mark.parametrize(
    ("module", "tensor"),
    [
        ("model.layers.0.q", "layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("language_model.model.layers.0.q", "model.layers.0.q"),
        ("model.layers.0.q", "language_model.model.layers.0.q"),
        # the LLaVA family: what transformers trained, what lies on disk, and back
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
        ("encoder.layer.0.attention.q", "bert.encoder.layer.0.attention.q"),
        # Qwen2-VL
        ("model.language_model.layers.0.q", "model.layers.0.q"),
        ("model.layers.0.q", "model.language_model.layers.0.q"),
    ],
)
def test_one_change_of_leading_parts(module: str, tensor: str) -> None:
    found, move, problems = find([module], weights([tensor, "lm_head"]))
    assert problems == ""
    assert found == {f"{module}.weight": f"{tensor}.weight"}
    assert move is not AS_THEY_ARE


@pytest.mark.parametrize(
    ("modules", "tensors"),
    [
        (["layers.0.q", "lm_head"], ["model.layers.0.q", "lm_head"]),
        (["model.layers.0.q", "lm_head"], ["layers.0.q", "lm_head"]),
        (
            ["language_model.model.layers.0.q", "language_model.lm_head", "vision_tower.x"],
            ["model.language_model.layers.0.q", "lm_head", "model.vision_tower.x"],
        ),
        (
            ["model.language_model.layers.0.q", "lm_head", "model.multi_modal_projector.x"],
            [
                "language_model.model.layers.0.q",
                "language_model.lm_head",
                "multi_modal_projector.x",
            ],
        ),
        (
            ["model.layers.0.q", "visual.blocks.0.attn.qkv", "lm_head"],
            ["model.language_model.layers.0.q", "model.visual.blocks.0.attn.qkv", "lm_head"],
        ),
        (
            ["model.language_model.layers.0.q", "model.visual.blocks.0.attn.qkv"],
            ["model.layers.0.q", "visual.blocks.0.attn.qkv"],
        ),
        (
            ["model.language_model.layers.0.q", "model.audio_tower.x", "lm_head"],
            ["thinker.model.layers.0.q", "thinker.audio_tower.x", "thinker.lm_head"],
        ),
        (
            ["thinker.model.layers.0.q", "thinker.visual.x", "thinker.lm_head"],
            ["model.language_model.layers.0.q", "model.visual.x", "lm_head"],
        ),
        (["model.layers.0.q", "lm_head"], ["thinker.model.layers.0.q", "thinker.lm_head"]),
        (["gpt_neox.layers.0.q", "lm_head"], ["gpt_neox.layers.0.q", "embed_out"]),
        (
            ["vit.layers.0.attention.q_proj", "vit.layers.1.mlp.fc2", "classifier"],
            [
                "vit.encoder.layer.0.attention.attention.query",
                "vit.encoder.layer.1.output.dense",
                "classifier",
            ],
        ),
        (
            ["swin.encoder.layers.0.blocks.1.attention.q_proj", "swin.layernorm"],
            ["swin.encoder.layers.0.blocks.1.attention.self.query", "swin.layernorm"],
        ),
        (
            ["model.layers.0.mixer.in_proj", "lm_head"],
            ["backbone.layers.0.mixer.in_proj", "lm_head"],
        ),
        (
            ["dinov2.encoder.layer.0.attention.o_proj", "dinov2.encoder.layer.0.mlp.fc1"],
            ["dinov2.encoder.layer.0.attention.output.dense", "dinov2.encoder.layer.0.mlp.fc1"],
        ),
    ],
)
def test_head_and_vision_tower_move_their_own_way(modules: list[str], tensors: list[str]) -> None:
    found, _, problems = find(modules, weights(tensors))
    assert problems == ""
    assert found == dict(zip(weights(modules), weights(tensors), strict=True))


def test_a_change_for_some_modules_only_is_refused() -> None:
    """Two layers fit as they are and one after a change: no single change fits them all."""
    base = weights([*LLAMA[:2], LLAMA[2].removeprefix("model.")])
    found, _, problems = find(LLAMA[:3], base)
    assert "name no tensor of the base, out of 3 (1 found)" in problems
    assert LLAMA[2] in problems
    assert f"{LLAMA[2]}.weight" not in found


def test_names_that_fit_two_ways_are_refused() -> None:
    base = weights(["model.layers.0.q", "transformer.layers.0.q"])
    _, _, problems = find(["layers.0.q"], base)
    assert "fit two sets of tensors" in problems
    assert "layers.0.q.weight -> model.layers.0.q.weight (with `model.` in front)" in problems
    assert "layers.0.q.weight -> transformer.layers.0.q.weight" in problems


def test_two_modules_are_never_taken_for_one_tensor() -> None:
    found, _, problems = find(["model.layers.0.q", "layers.0.q"], weights(["layers.0.q"]))
    assert len(set(found.values())) == len(found)
    assert "name no tensor of the base, out of 2 (1 found)" in problems


def test_nothing_matched_names_the_base_it_was_trained_on() -> None:
    _, _, problems = find(LLAMA, weights(["h.0.attn"]), "someone/llama")
    assert f"name no tensor of the base, out of {len(LLAMA)} ({len(LLAMA)} found)" in problems
    assert "trained on 'someone/llama'" in problems
    assert f"and {len(LLAMA) - 5} more" in problems
    assert "nearest: h.0.attn.weight" in problems


def test_nearest_names_keep_what_is_equal_at_both_ends() -> None:
    base = weights(LLAMA)
    near = nearest("model.layers.7.self_attn.q_proj.weight", base)
    assert sorted(near) == weights([f"model.layers.{n}.self_attn.q_proj" for n in range(3)])
    near = nearest("model.layers.1.self_attn.qproj.weight", base)
    assert near[0] == "model.layers.1.self_attn.q_proj.weight"
    assert nearest("x", []) == []


def test_the_names_of_a_model_of_experts_are_compared_in_reasonable_time() -> None:
    experts = [f"model.layers.{n}.mlp.experts.{e}.w" for n in range(60) for e in range(1000)]
    begin = time.process_time()
    _, _, problems = find([f"{module}1" for module in experts], weights(experts))
    assert "and 59995 more" in problems
    assert time.process_time() - begin < 20  # 0.2 s for each name shown


PARTS = st.lists(st.sampled_from(["model", "layers", "0", "1", "q_proj", "lm_head"]), min_size=1)
NAMES = st.lists(PARTS.map(".".join), min_size=1, max_size=6, unique=True)


@given(
    base=NAMES,
    modules=NAMES,
    move=st.sampled_from([AS_THEY_ARE, *MOVES, *moves(["model.x"], ["layers.x"])]),
)
def test_every_module_finds_one_tensor_or_a_problem_is_said(
    base: list[str], modules: list[str], move: Move
) -> None:
    tensors = weights([*base, *map(move.apply, modules)])
    found, taken, problems = find(modules, tensors)
    assert set(found.values()) <= set(tensors)
    assert len(set(found.values())) == len(found)
    assert all(found[name] == taken.apply(name) for name in found)
    assert (len(found) == len(modules)) or problems
