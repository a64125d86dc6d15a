"""Recipe and headers in, a plan out: integers first, then bytes are moved."""

from streammerge.planning.jobs import CopyJob, Job, MergeJob
from streammerge.planning.plan import Plan, make_plan

__all__ = ["CopyJob", "Job", "MergeJob", "Plan", "make_plan"]
