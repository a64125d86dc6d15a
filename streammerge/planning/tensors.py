"""What will happen to each output tensor, for those who want to know it of every one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from streammerge.planning.jobs import CopyJob, Job
from streammerge.planning.traffic import Traffic, traffic
from streammerge.sources.weighted import WeightedSum
from streammerge.words import TensorSpec

# `copied` and `cast`: stored rows are the result, as they are or in another dtype.
Action = Literal["copied", "cast", "merged"]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: what is done, from which models where they are merged, what that moves."""

    spec: TensorSpec
    action: Action
    models: tuple[str, ...]
    traffic: Traffic
    spilled_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; sizes in bytes."""
        return {
            "name": self.spec.name,
            "shape": list(self.spec.shape),
            "dtype": self.spec.dtype.label,
            "action": self.action,
            "models": list(self.models),
            "statistics": [list(names) for names in self.traffic.passes],
            "reads": self.traffic.reads,
            "read_bytes": self.traffic.read_bytes,
            "write_bytes": self.traffic.write_bytes,
            "spilled_bytes": self.spilled_bytes,
        }


def tensor_plan(job: Job, models: Sequence[str]) -> TensorPlan:
    """Of one job; `models` are the names of the recipe's entries."""
    moved = traffic(job)
    if isinstance(job, CopyJob):
        return TensorPlan(job.target.spec, "copied", (), moved, 0)
    plain = isinstance(job.merged, WeightedSum) and job.merged.same_as() is not None
    if plain and job.beyond is None:
        return TensorPlan(job.target.spec, "cast", (), moved, 0)
    names = tuple(models[position] for position in job.models)
    return TensorPlan(job.target.spec, "merged", names, moved, job.spilled_bytes)
