"""A pool that finishes what was submitted in an order drawn from a seed, and nothing by chance."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import pytest


class Finished(NamedTuple):
    """As `concurrent.futures.wait` gives it."""

    done: set[Future[Any]]
    not_done: set[Future[Any]]


class AnyOrder(Executor):
    """Stands in for the pool and for the waiting: whoever waits makes one drawn item happen."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._work: dict[Future[Any], Callable[[], Any]] = {}
        self.most_waiting = 0

    def install(self, patch: pytest.MonkeyPatch) -> AnyOrder:
        """Let the engine and its scheduler use it."""
        patch.setattr("streammerge.building.ThreadPoolExecutor", lambda *_: self)
        patch.setattr("streammerge.scheduler.wait", self.wait)
        return self

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._work[future] = lambda: fn(*args, **kwargs)
        self.most_waiting = max(self.most_waiting, len(self._work))
        return future

    def wait(self, futures: Iterable[Future[Any]], return_when: str = "") -> Finished:
        """Make one of the futures happen; for all to be over, only those that run count."""
        waiting = [future for future in futures if not future.done()]
        if not waiting:
            return Finished(set(futures), set())
        chosen = self._random.choice(waiting)
        chosen.set_running_or_notify_cancel()
        try:
            chosen.set_result(self._work.pop(chosen)())
        except Exception as error:
            chosen.set_exception(error)
        return Finished({chosen}, set(waiting) - {chosen})
