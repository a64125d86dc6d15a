"""Which tensors of an adapter belong together, and which are refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from adapter_files import PREFIX, base_of, lora

from streammerge.adapters.faults import Findings
from streammerge.adapters.keys import Contents, sort_tensors, unwrapped
from streammerge.errors import Problems

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def sort(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Contents, list[str]]:
    findings, problems = Findings("adapter_model.safetensors"), Problems()
    contents = sort_tensors(base_of(shapes), findings)
    findings.report(problems)
    return contents, [str(problem) for problem in problems]


def modules(contents: Contents) -> list[str]:
    return [pair.module for pair in contents.pairs]


def test_factors_are_paired() -> None:
    contents, problems = sort(lora(Q, 6, 4, rank=3) | lora(V, 4, 4))
    assert (modules(contents), problems) == ([Q, V], [])
    first = contents.pairs[0]
    assert (first.rank, first.update_shape) == (3, (6, 4))
    assert first.a.spec.name == f"{PREFIX}{Q}.lora_A.weight"
    assert first.b.spec.name == f"{PREFIX}{Q}.lora_B.weight"


@pytest.mark.parametrize("name", ["default", "math", "weight", "lora_A"])
def test_an_adapter_name_that_all_keys_share_is_dropped(name: str) -> None:
    keys = {key.replace(".weight", f".{name}.weight"): (2, 2) for key in lora(Q, 2, 2)}
    contents, problems = sort(keys)
    assert (modules(contents), problems) == ([Q], [])


@pytest.mark.parametrize("other", ["weight", "math.weight"])
def test_two_adapters_in_one_file_are_refused(other: str) -> None:
    named = {key.replace("weight", "default.weight"): (2, 2) for key in lora(Q, 2, 2)}
    second = {key.replace("weight", other): (2, 2) for key in lora(Q, 2, 2)}
    contents, problems = sort(named | second)
    assert contents.pairs == ()
    assert len(problems) == 1
    assert "more than one adapter name" in problems[0]
    assert f"{PREFIX}{Q}.lora_A.{other}" in problems[0]


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_factor_without_its_other_half_is_named(half: str) -> None:
    shapes = lora(Q, 2, 2) | lora(V, 2, 2)
    del shapes[f"{PREFIX}{V}.lora_{half}.weight"]
    contents, problems = sort(shapes)
    assert modules(contents) == [Q]
    assert len(problems) == 1
    assert f"{V}.lora_{'B' if half == 'A' else 'A'}.weight" in problems[0]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ([f"{PREFIX}{Q}", f"{PREFIX}{V}"], [Q, V]),
        ([Q, V], [Q, V]),
        ([f"{PREFIX}{Q}", V], [f"{PREFIX}{Q}", V]),  # not shared: not a wrapper
        ([f"_orig_mod.{PREFIX}{Q}", f"_orig_mod.{PREFIX}{V}"], [Q, V]),
        ([f"{PREFIX}_orig_mod.{Q}", f"{PREFIX}_orig_mod.{V}"], [Q, V]),
        ([f"{PREFIX}model._orig_mod.a", f"{PREFIX}model._orig_mod.b"], ["model.a", "model.b"]),
        ([f"{PREFIX}_orig_mod.{Q}", f"{PREFIX}{V}"], [f"_orig_mod.{Q}", V]),
        (["_orig_mod.a.b", "a._orig_mod.b"], ["_orig_mod.a.b", "a._orig_mod.b"]),  # would collide
        ([], []),
    ],
)
def test_wrappers_are_dropped_where_all_have_them(raw: list[str], clean: list[str]) -> None:
    assert unwrapped(raw) == clean


def test_both_projections_of_a_multihead_attention_are_one_problem() -> None:
    """Else the input projections would be looked for under a name that no tensor has."""
    attention = lora("head.attention", 12, 4) | lora("head.attention.base_layer.out_proj", 4, 4)
    contents, problems = sort(attention | lora(Q, 4, 4))
    assert modules(contents) == [Q]
    assert len(problems) == 1
    assert "MultiheadAttention" in problems[0]
    assert "twice" in problems[0]


OTHER_TENSORS = [
    ("model.layers.0.mlp.experts.base_layer.lora_A.weight", (8, 4), "several parameters"),
    (f"{Q}.lora_C.weight", (2, 4), "no known kind"),
    (f"{Q}.lora_E.weight", (2, 1), "no known kind"),
]


@pytest.mark.parametrize(("key", "shape", "name"), OTHER_TENSORS)
def test_more_than_pairs_is_refused_by_name(key: str, shape: tuple[int, ...], name: str) -> None:
    contents, problems = sort(lora(Q, 4, 4) | {PREFIX + key: shape})
    assert modules(contents) == [Q]
    assert len(problems) == 1
    assert name in problems[0]
    assert PREFIX + key in problems[0]


# Beside the factors of a module, under every name that PEFT or a raw checkpoint gives them.
BESIDE = {
    "magnitude": (
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default",
        "lora_magnitude_vector.default.weight",
    ),
    "bias": ("lora_B.bias", "lora_B.default.bias"),
    "values": ("lora_diag", "lora_diag.default"),
}


@pytest.mark.parametrize(
    ("field", "key"), [(field, key) for field, keys in BESIDE.items() for key in keys]
)
def test_what_stands_beside_the_factors_is_kept_with_them(field: str, key: str) -> None:
    shapes = lora(Q, 4, 4)
    if "default" in key:
        shapes = {name.replace(".weight", ".default.weight"): one for name, one in shapes.items()}
    contents, problems = sort(shapes | {f"{PREFIX}{Q}.{key}": (4,)})
    assert problems == []
    assert getattr(contents.pairs[0], field).spec.name == f"{PREFIX}{Q}.{key}"


@pytest.mark.parametrize("name", ["", ".default"])
def test_factors_of_embeddings_and_of_adalora(name: str) -> None:
    shapes = {
        f"{PREFIX}wte.lora_embedding_A{name}": (2, 9),
        f"{PREFIX}wte.lora_embedding_B{name}": (4, 2),
        f"{PREFIX}wte.lora_magnitude_vector{name}": (1, 4),
        f"{PREFIX}{Q}.lora_A{name}": (3, 6),
        f"{PREFIX}{Q}.lora_B{name}": (5, 3),
        f"{PREFIX}{Q}.lora_E{name}": (3, 1),
    }
    contents, problems = sort(shapes)
    assert problems == []
    embedding, svd = contents.pairs
    assert (embedding.embedding, embedding.update_shape, embedding.rank) == (True, (9, 4), 2)
    assert embedding.magnitude is not None
    assert (svd.svd, svd.update_shape, svd.rank) == (True, (5, 6), 3)
    assert svd.values is not None


@pytest.mark.parametrize("kernel", [(3,), (1, 1), (3, 2), (2, 3, 3)])
def test_kernels_are_laid_out_flat(kernel: tuple[int, ...]) -> None:
    keys = list(lora(Q, 1, 1))
    ones = (1,) * len(kernel)
    contents, problems = sort({keys[0]: (2, 4, *kernel), keys[1]: (6, 2, *ones)})
    assert problems == []
    (pair,) = contents.pairs
    assert (pair.rank, pair.update_shape) == (2, (6, 4, *kernel))
    assert pair.a.spec.shape == (2, 4 * math.prod(kernel))
    assert pair.b.spec.shape == (6, 2)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0,), (4, 2)),
        ((2, 4), ()),
        ((2, 4, 3, 3), (4, 2)),
        ((2, 4, 3), (4, 2, 3)),
        ((2, 4, 1, 1, 1, 1), (4, 2, 1, 1, 1, 1)),
    ],
)
def test_factors_that_are_no_matrices(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    keys = list(lora(V, 1, 1))
    contents, problems = sort(lora(Q, 4, 4) | dict(zip(keys, (a, b), strict=True)))
    assert modules(contents) == [Q]
    assert len(problems) == 1
    assert "FSDP" in problems[0]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["lora_embedding_A"], "without its other half"),
        (["lora_A", "lora_B"], "without its other half"),  # of AdaLoRA, without lora_E
        (["lora_magnitude_vector"], "without its other half"),
        (["lora_A.weight", "lora_B.weight", "lora_E"], "do not go together"),
        (["lora_A.weight", "lora_B.weight", "lora_embedding_A"], "do not go together"),
        (["lora_A", "lora_B", "lora_E", "lora_magnitude_vector"], "do not go together"),
        (["lora_embedding_A", "lora_embedding_B", "lora_B.bias"], "do not go together"),
    ],
)
def test_parts_that_make_no_pair_are_refused(keys: list[str], says: str) -> None:
    contents, problems = sort({f"{PREFIX}{Q}.{key}": (2, 2) for key in keys})
    assert contents.pairs == ()
    assert len(problems) == 1
    assert says in problems[0]


def test_tensors_without_factors_are_kept_apart() -> None:
    contents, problems = sort(lora(Q, 4, 4) | {f"{PREFIX}lm_head.weight": (9, 4)})
    assert problems == []
    assert [*contents.saved] == ["lm_head.weight"]
    assert contents.name is None


def test_each_kind_is_said_once_with_the_first_names_and_the_count() -> None:
    halves = {f"{PREFIX}layers.{layer}.lora_A.weight": (4, 4) for layer in range(224)}
    _, problems = sort(halves | {"x.lora_C": (2, 1)})
    assert len(problems) == 2
    text = "\n".join(problems)
    assert "(224 found)" in text
    assert "layers.4.lora_A.weight\n            and 219 more" in text
    assert "layers.5." not in text


def test_what_acted_in_training_only_is_counted_and_left_out() -> None:
    state = {
        f"{PREFIX}{Q}.lora_velora_embed": (4,),
        f"{PREFIX}{Q}.lora_monteclora_sampler.std_prior": (2,),
        f"{PREFIX}{Q}.lora_monteclora_sampler.default.expert_weights": (2,),
    }
    contents, problems = sort(lora(Q, 4, 4) | state)
    assert (contents.training_state, problems) == (3, [])
