"""A pool that finishes what was submitted in an order drawn from a seed, and nothing by chance."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest


class AnyOrder(Executor):
    """Stands in for the pool and for the waiting: whoever waits makes one drawn item happen."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._work: dict[Future[Any], Callable[[], Any]] = {}
        self.most_waiting = 0

    def install(self, patch: pytest.MonkeyPatch) -> AnyOrder:
        """Let the engine and its scheduler use it."""
        patch.setattr("streammerge.building.ThreadPoolExecutor", lambda *_: self)
        patch.setattr("streammerge.scheduler.SimpleQueue", self.queue)
        return self

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._work[future] = lambda: fn(*args, **kwargs)
        self.most_waiting = max(self.most_waiting, len(self._work))
        return future

    def queue(self) -> Finished:
        """Where the futures that are over come in."""
        return Finished(self)

    def finish_one(self) -> None:
        """Make one of the futures happen."""
        chosen = self._random.choice(list(self._work))
        chosen.set_running_or_notify_cancel()
        try:
            chosen.set_result(self._work.pop(chosen)())
        except Exception as error:
            chosen.set_exception(error)


class Finished:
    """As `queue.SimpleQueue`, of a pool's futures."""

    def __init__(self, pool: AnyOrder) -> None:
        self._pool = pool
        self._futures: deque[Future[Any]] = deque()

    def put(self, future: Future[Any]) -> None:
        self._futures.append(future)

    def get(self) -> Future[Any]:
        if not self._futures:
            self._pool.finish_one()
        return self._futures.popleft()
