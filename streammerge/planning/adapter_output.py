"""An adapter as output: its tensors as PEFT names them, and the jobs that make them.

An update of a tensor becomes factors A `[rank, in]` and B `[out, rank]` with a scale of one
(`lora_alpha` equals the rank); a replaced tensor is saved whole, which PEFT calls modules_to_save.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streammerge.adapters.lora import CONV1D_MODELS
from streammerge.planning.adapter_fit import Fit
from streammerge.planning.inputs import Inputs
from streammerge.planning.jobs import Composer, Job, MergeJob
from streammerge.planning.layout import output_spec
from streammerge.planning.outline import Outline
from streammerge.planning.spaces import count
from streammerge.recipe import Recipe
from streammerge.sources.direct import Direct
from streammerge.sources.factor_rows import Left, Right
from streammerge.sources.sketched import Sketch, Sketched
from streammerge.storage.shard import ShardLayout, lay_out
from streammerge.words import DType, Factors, TensorSpec

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What `CONV1D_MODELS` call their layers that store [in, out]; their others are ordinary ones.
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass(frozen=True, slots=True)
class Factored:
    """The merged update of one tensor, as it will be stored.

    `turned` says that the base stores the weight as `[in, out]`.
    """

    tensor: str  # of the base
    module: str  # as the adapters call it
    turned: bool
    embedding: bool
    sketched: bool  # from a dense update, not from factors
    a: TensorSpec
    b: TensorSpec

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def most(self) -> int:
        """The most rank that its shape allows."""
        return min(self.b.shape[0], math.prod(self.a.shape[1:]))

    def of_rank(self, rank: int) -> Factored:
        """The same of another rank."""
        a = replace(self.a, shape=(rank, *self.a.shape[1:]))
        b = replace(self.b, shape=(self.b.shape[0], rank, *self.b.shape[2:]))
        return replace(self, a=a, b=b)


@dataclass(frozen=True, slots=True)
class AdapterOutput:
    """Everything that the file of an adapter will hold.

    With a `missed_share`, factors are cut to the least rank that misses no more of the squared norm
    of the update: ranks are then the most that there may be, and the file is written twice.
    """

    factored: tuple[Factored, ...]
    whole: dict[str, TensorSpec]  # the base's tensor -> what is saved in its place
    seed: int
    missed_share: float | None = None

    @property
    def sketched_rank(self) -> int:
        """How many directions are looked for in the matrices that are sketched, at the most."""
        return max((one.rank for one in self.factored if one.sketched), default=0)

    def notes(self) -> list[str]:
        """For the plan."""
        all_of = [one.tensor for one in self.factored if one.sketched and one.rank == one.most]
        if self.missed_share is None or not all_of:
            return []
        return [
            f"every direction is looked for in {count(all_of)}: a `rank`, which is then the most "
            "that one may have, would bound time and memory"
        ]

    def of_ranks(self, ranks: Mapping[str, int]) -> AdapterOutput:
        """With the factors of some of the base's tensors cut to a rank."""
        cut = (one.of_rank(ranks.get(one.tensor, one.rank)) for one in self.factored)
        return replace(self, factored=tuple(cut))

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
            if one.a.numel and one.b.numel:
                yield from self._factor_jobs(one, composer, layout)
        for name, spec in self.whole.items():
            yield composer.job(name, layout.extents[spec.name])

    def _factor_jobs(self, one: Factored, composer: Composer, layout: ShardLayout) -> Iterator[Job]:
        """A, then B; what both come of is found when the first is wanted."""
        a, b = layout.extents[one.a.name], layout.extents[one.b.name]
        parts = composer.assembly.parts(one.tensor)
        if one.sketched:
            update, dtype = composer.update(one.tensor), a.spec.dtype
            sketch = Sketch(update, one.rank, dtype, self.seed, turned=one.turned)
            first = MergeJob(Sketched(a.spec, sketch, "A"), a, ())
            yield first
            yield MergeJob(Sketched(b.spec, sketch, "B"), b, parts.positions, after=first)
            return
        of_rank = composer.pairs.of_rank
        pair = of_rank(one.tensor, parts, one.rank, a.spec.dtype, turned=one.turned)
        yield MergeJob(Direct(Right(a.spec, pair)), a, ())
        yield MergeJob(Direct(Left(b.spec, pair)), b, parts.positions)

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


def adapter_output(recipe: Recipe, inputs: Inputs, outline: Outline, fit: Fit) -> AdapterOutput:
    """The tensors of the output: factors of what is a matrix, and what is saved whole."""
    dtype = recipe.out_dtype or DType.F32
    factored = []
    for name in (*fit.paired, *fit.sketched):
        spec, place = inputs.donor.tensors[name].spec, _place(name, inputs)
        most = min(recipe.rank or spec.cols, spec.rows, spec.cols)
        rank = min(most, _ranks(name, inputs)) if name in fit.paired else most
        factored.append(_factored(spec, place, rank, dtype, sketched=name in fit.sketched))
    specs = {n: output_spec(inputs.donor.tensors[n].spec, outline, dtype) for n in fit.whole}
    whole = {n: replace(spec, name=_PREFIX + n) for n, spec in specs.items()}
    return AdapterOutput(tuple(factored), whole, recipe.seed, recipe.missed_share)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where PEFT finds a tensor: its module, whether that is an embedding, or stores [in, out]."""

    module: str
    embedding: bool = False
    turned: bool = False


def _place(name: str, inputs: Inputs) -> _Place:
    """As the first adapter that touches the tensor has it; else as the base calls it."""
    for update in _updates(name, inputs):
        turned = update.left.transposed
        key = (update.left if turned else update.right).extent.spec.name
        module = key.partition(".lora_")[0].replace("_orig_mod.", "").removeprefix(_PREFIX)
        return _Place(module, ".lora_embedding_" in key, turned)
    module = name.removesuffix(".weight")
    turned = inputs.donor.config.get("model_type") in CONV1D_MODELS
    return _Place(module, turned=turned and module.rpartition(".")[2] in _CONV1D)


def _updates(name: str, inputs: Inputs) -> Iterator[Factors]:
    for model in inputs.models:
        update = model.adapter.updates.get(name) if model.adapter else None
        if isinstance(update, Factors):
            yield update


def _ranks(name: str, inputs: Inputs) -> int:
    return sum(update.rank for update in _updates(name, inputs))


def _factored(
    spec: TensorSpec, place: _Place, rank: int, dtype: DType, *, sketched: bool
) -> Factored:
    """Kernels of convolutions stay in A; B is one of size one."""
    a, b = ("A", "B") if place.embedding else ("A.weight", "B.weight")
    start = f"{_PREFIX}{place.module}.lora_{'embedding_' if place.embedding else ''}"
    outer, *inner = (spec.cols, spec.rows) if place.turned else spec.shape
    return Factored(
        tensor=spec.name,
        module=place.module,
        turned=place.turned,
        embedding=place.embedding,
        sketched=sketched,
        a=TensorSpec(start + a, (rank, *inner), dtype),
        b=TensorSpec(start + b, (outer, rank, *(1 for _ in inner[1:])), dtype),
    )
