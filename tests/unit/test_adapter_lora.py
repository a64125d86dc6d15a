"""One LoRA on one weight: orientation, fit, and the factors it hands out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from adapter_files import PREFIX, base_of, lora

from streammerge.adapters.config import AdaLora, LoraConfig, Patterns
from streammerge.adapters.faults import Findings
from streammerge.adapters.keys import Pair, sort_tensors
from streammerge.adapters.lora import Orientation, fits, low_rank
from streammerge.errors import Problems
from streammerge.words import DType, Extent

Shape = tuple[int, ...]


def pair_of(
    module: str, out_rows: int, in_cols: int, rank: int = 2, dtype: DType = DType.F32
) -> Pair:
    extents = base_of(lora(module, out_rows, in_cols, rank), dtype)
    (pair,) = sort_tensors(extents, Findings("")).pairs
    return pair


def weight(shape: Shape, dtype: DType = DType.BF16) -> Extent:
    return base_of({"w.weight": shape}, dtype)["w.weight"]


# ------------------------------------------------------------------------------------ orientation

SQUARE = ((4, 4), (4, 4))  # update, base
PLAIN = ((6, 4), (6, 4))
CONV1D = ((6, 4), (4, 6))


@pytest.mark.parametrize(
    ("others", "model_type", "flag", "transposed"),
    [
        # the others of its kind decide against everything else
        ({"mlp.c_proj": CONV1D}, "llama", False, True),
        ({"mlp.c_proj": PLAIN}, "gpt2", True, False),
        ({"mlp.c_proj": PLAIN, "mlp.c_fc": CONV1D}, "gpt2", True, False),
        # then the model's type: GPT-2's head is no Conv1D
        ({"lm_head": PLAIN}, "gpt2", False, True),
        ({}, "gpt2", False, True),
        ({}, "openai-gpt", False, True),
        ({}, "imagegpt", False, True),
        ({}, "decision_transformer", False, True),
        # then any other weight
        ({"mlp.c_fc": CONV1D}, "my-gpt", False, True),
        ({"mlp.c_fc": PLAIN}, "my-gpt", True, False),
        # then the flag, also where the others disagree or are square themselves
        ({}, "llama", False, False),
        ({}, "llama", True, True),
        ({}, None, True, True),
        ({"mlp.c_fc": SQUARE}, "llama", True, True),
        ({"mlp.c_fc": PLAIN, "lm_head": CONV1D}, "llama", True, True),
        ({"mlp.c_fc": PLAIN, "lm_head": CONV1D}, "llama", False, False),
    ],
)
def test_a_square_weight_follows_its_kin(
    others: dict[str, tuple[tuple[int, int], Shape]],
    model_type: str | None,
    flag: bool,
    transposed: bool,
) -> None:
    square = (pair_of("h.0.attn.c_proj", 4, 4), weight((4, 4)))
    kin = [
        (pair_of(module, *update), weight(stored)) for module, (update, stored) in others.items()
    ]
    orientation = Orientation(
        [square, *kin], {"model_type": model_type}, LoraConfig(fan_in_fan_out=flag)
    )
    assert orientation.transposed(*square) is transposed
    for pair, target in kin:
        if pair.update_shape != pair.update_shape[::-1]:
            assert orientation.transposed(pair, target) == (target.spec.shape != pair.update_shape)


# -------------------------------------------------------------------------------------------- fit


def judge(pair: Pair, target: Extent, rank: int = 2) -> tuple[bool, str]:
    findings, problems = Findings("adapter_model.safetensors"), Problems()
    good = fits(pair, target, LoraConfig(r=rank), findings)
    findings.report(problems)
    return good, "\n".join(map(str, problems))


@pytest.mark.parametrize("stored", [(6, 4), (4, 6)])
@pytest.mark.parametrize("dtype", [DType.F64, DType.F32, DType.F16, DType.BF16])
def test_either_orientation_and_every_float_fits(stored: Shape, dtype: DType) -> None:
    assert judge(pair_of("q", 6, 4, dtype=dtype), weight(stored, dtype)) == (True, "")


@pytest.mark.parametrize("stored", [(5, 4), (24,), (6, 4, 1), (4, 5), ()])
def test_another_shape_is_refused_with_both_shapes(stored: Shape) -> None:
    good, problems = judge(pair_of("q", 6, 4), weight(stored))
    assert not good
    assert f"q: update [6, 4], base {list(stored)}" in problems


CONVOLUTION = {"c.lora_A.weight": (2, 4, 3), "c.lora_B.weight": (6, 2, 1)}


@pytest.mark.parametrize(
    ("name", "stored", "says"),
    [
        ("c.weight", (6, 4, 3), ""),
        ("c.weight", (6, 4, 5), "update [6, 4, 3], base [6, 4, 5]"),
        ("c.weight", (4, 6, 3), "update [6, 4, 3], base [4, 6, 3]"),
        ("c.weight", (6, 2, 3), "c: 2 groups, base [6, 2, 3]"),
        ("c.weight", (6, 12), "update [6, 4, 3], base [6, 12]"),
        ("mlp.experts.c.weight", (6, 4, 3), "update [6, 4, 3], base [6, 4, 3]"),  # a stack
    ],
)
def test_a_kernel_fits_the_kernel_of_the_base(name: str, stored: Shape, says: str) -> None:
    (pair,) = sort_tensors(base_of(CONVOLUTION, DType.F32), Findings("")).pairs
    good, problems = judge(pair, base_of({name: stored})[name])
    assert good == (not says)
    assert says in problems


@pytest.mark.parametrize(
    ("beside", "config", "says"),
    [
        ({"lora_magnitude_vector": (6,)}, {"use_dora": True}, ""),
        ({"lora_magnitude_vector": (1, 6)}, {"use_dora": True}, ""),
        ({"lora_magnitude_vector": (4,)}, {"use_dora": True}, "lora_magnitude_vector [4], not 6"),
        ({"lora_magnitude_vector": (6,)}, {}, "there in the file, not there in the config"),
        ({}, {"use_dora": True}, "not there in the file, there in the config"),
        ({"lora_B.bias": (6,)}, {"lora_bias": True}, ""),
        ({"lora_B.bias": (6,)}, {}, "there in the file, not there in the config"),
        ({}, {"lora_bias": True}, "not there in the file, there in the config"),
        ({"lora_diag": (2,)}, {"kasa": True}, ""),
        ({"lora_diag": (3,)}, {"kasa": True}, "lora_diag [3], not 2"),
        ({"lora_diag": (2,)}, {}, "there in the file, not there in the config"),
        ({}, {"adalora": AdaLora(2)}, "not there in the file, there in the config"),
    ],
)
def test_what_stands_beside_the_factors_is_what_the_config_says(
    beside: Mapping[str, Shape], config: dict[str, Any], says: str
) -> None:
    shapes = lora("q", 6, 4) | {f"{PREFIX}q.{key}": shape for key, shape in beside.items()}
    (pair,) = sort_tensors(base_of(shapes, DType.F32), Findings("")).pairs
    findings, problems = Findings("adapter_model.safetensors"), Problems()
    assert fits(pair, weight((6, 4)), LoraConfig(r=2, **config), findings) == (not says)
    findings.report(problems)
    assert says in "\n".join(map(str, problems))


def test_a_rank_unlike_the_config_is_refused_with_both() -> None:
    good, problems = judge(pair_of("q", 6, 4, rank=3), weight((6, 4)), rank=8)
    assert not good
    assert "q: rank 3 in the file, 8 in the config" in problems


def test_the_rank_of_a_pattern_is_the_config() -> None:
    config = LoraConfig(r=8, rank_pattern=Patterns.of({"q": 3}))
    assert fits(pair_of("q", 6, 4, rank=3), weight((6, 4)), config, Findings(""))


def test_unequal_ranks_are_refused_with_both_shapes() -> None:
    a, b = pair_of("q", 6, 4, rank=2), pair_of("q", 6, 4, rank=3)
    good, problems = judge(Pair("q", a.a, b.b), weight((6, 4)))
    assert not good
    assert "q: lora_A [2, 4], lora_B [6, 3]" in problems


@pytest.mark.parametrize("dtype", [DType.I8, DType.F8_E4M3, DType.BOOL])
def test_codes_are_never_taken_for_numbers(dtype: DType) -> None:
    good, problems = judge(pair_of("q", 6, 4), weight((6, 4), dtype))
    assert not good
    assert f"q: {dtype.label} [6, 4]" in problems
    good, problems = judge(pair_of("q", 6, 4, dtype=dtype), weight((6, 4)))
    assert not good
    assert f"lora_A {dtype.label}" in problems


def test_all_that_is_wrong_with_a_pair_is_said() -> None:
    pair = pair_of("q", 6, 4, rank=3, dtype=DType.I8)
    good, problems = judge(pair, weight((128, 1), DType.U8))
    assert not good
    assert problems.count("(1 found)") == 4


# ---------------------------------------------------------------------------------------- factors


def test_factors_have_the_shape_of_the_stored_tensor() -> None:
    pair = pair_of("q", 6, 4)
    plain = low_rank(pair.a, pair.b, 0.5)
    assert (plain.left.extent, plain.right.extent) == (pair.b, pair.a)
    assert (plain.left.rows, plain.rank, plain.right.rows, plain.right.cols) == (6, 2, 2, 4)
    turned = low_rank(pair.a, pair.b, 0.5, transposed=True)
    assert (turned.left.extent, turned.right.extent) == (pair.a, pair.b)
    assert (turned.left.rows, turned.rank, turned.right.rows, turned.right.cols) == (4, 2, 2, 6)
    assert plain.scale == turned.scale == 0.5
