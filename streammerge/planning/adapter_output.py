"""An adapter as output: its tensors as PEFT names them, and the jobs that make them.

An update of a tensor becomes factors A `[rank, in]` and B `[out, rank]` with a scale of one
(`lora_alpha` equals the rank); a replaced tensor is saved whole, which PEFT calls modules_to_save.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from streammerge.planning.inputs import Inputs
from streammerge.planning.jobs import Composer, Job, MergeJob
from streammerge.planning.layout import output_spec
from streammerge.planning.outline import Outline
from streammerge.planning.spaces import Split
from streammerge.recipe import Recipe
from streammerge.sources.direct import Direct
from streammerge.sources.factor_rows import Left, Right
from streammerge.storage.shard import ShardLayout, lay_out
from streammerge.words import DType, Factors, TensorSpec

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Factored:
    """The merged update of one tensor, as it will be stored.

    `turned` says that the base stores the weight as `[in, out]`.
    """

    tensor: str  # of the base
    module: str  # as the adapters call it
    turned: bool
    embedding: bool
    a: TensorSpec
    b: TensorSpec

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterOutput:
    """Everything that the file of an adapter will hold."""

    factored: tuple[Factored, ...]
    whole: dict[str, TensorSpec]  # the base's tensor -> what is saved in its place

    def layout(self) -> ShardLayout:
        factors = [spec for one in self.factored for spec in (one.a, one.b)]
        return lay_out(WEIGHTS, [*factors, *self.whole.values()])

    def changes(self) -> dict[str, str]:
        """Output tensor -> the base's that it changes; of two factors, B."""
        whole = {spec.name: name for name, spec in self.whole.items()}
        return {one.b.name: one.tensor for one in self.factored} | whole

    def jobs(self, composer: Composer, layout: ShardLayout) -> Iterator[Job]:
        """In the order of the file."""
        for one in self.factored:
            yield from _factor_jobs(one, composer, layout)
        for name, spec in self.whole.items():
            yield composer.job(name, layout.extents[spec.name])

    def config(self, base: str) -> dict[str, Any]:
        """adapter_config.json; `base` is the display name of the base model."""
        ranks = {one.module: one.rank for one in self.factored}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        others = {module: own for module, own in ranks.items() if own != rank}
        turned = any(one.turned and not one.embedding for one in self.factored)
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "task_type": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "use_rslora": False,
            "fan_in_fan_out": turned,
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "target_modules": list(ranks),
            "modules_to_save": [name.rpartition(".")[0] for name in self.whole] or None,
        }


def adapter_output(recipe: Recipe, inputs: Inputs, outline: Outline, found: Split) -> AdapterOutput:
    """The tensors of the output: factors where all updates are low-rank, the others whole."""
    dtype = recipe.out_dtype or DType.F32
    factored = tuple(_factored(name, inputs, recipe.rank, dtype) for name in found.low_rank)
    others = [name for names in found.replaced.values() for name in names]
    specs = {n: output_spec(inputs.donor.tensors[n].spec, outline, dtype) for n in others}
    whole = {n: replace(spec, name=_PREFIX + n) for n, spec in specs.items()}
    return AdapterOutput(factored, whole)


def _factored(name: str, inputs: Inputs, most: int | None, dtype: DType) -> Factored:
    """Called and turned as the first adapter that touches the tensor has it."""
    adapters = [model.adapter for model in inputs.models if model.adapter]
    found = [adapter.updates[name] for adapter in adapters if name in adapter.updates]
    updates = [update for update in found if isinstance(update, Factors)]
    turned = updates[0].left.transposed
    key = (updates[0].left if turned else updates[0].right).extent.spec.name
    module = key.partition(".lora_")[0].replace("_orig_mod.", "").removeprefix(_PREFIX)
    spec = inputs.donor.tensors[name].spec
    rank = min(sum(update.rank for update in updates), spec.rows, spec.cols, most or spec.cols)
    embedding = ".lora_embedding_" in key
    a, b = (
        ("lora_embedding_A", "lora_embedding_B")
        if embedding
        else (
            "lora_A.weight",
            "lora_B.weight",
        )
    )
    inner, outer = (spec.rows, spec.cols) if turned else (spec.cols, spec.rows)
    kernel = spec.shape[2:]
    inputs_of = (inner // math.prod(kernel), *kernel) if kernel else (inner,)
    return Factored(
        tensor=name,
        module=module,
        turned=turned,
        embedding=embedding,
        a=TensorSpec(f"{_PREFIX}{module}.{a}", (rank, *inputs_of), dtype),
        b=TensorSpec(f"{_PREFIX}{module}.{b}", (outer, rank, *(1 for _ in kernel)), dtype),
    )


def _factor_jobs(one: Factored, composer: Composer, layout: ShardLayout) -> Iterator[Job]:
    """Both factors come of one pair, which is found when the first is wanted."""
    a, b = layout.extents[one.a.name], layout.extents[one.b.name]
    if not (one.rank and a.spec.numel and b.spec.numel):
        return
    parts = composer.assembly.parts(one.tensor)
    pair = composer.pairs.of_rank(one.tensor, parts, one.rank, a.spec.dtype, turned=one.turned)
    yield MergeJob(Direct(Right(a.spec, pair)), a, ())
    yield MergeJob(Direct(Left(b.spec, pair)), b, parts.positions)
