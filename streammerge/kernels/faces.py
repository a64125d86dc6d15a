"""A kernel has two faces: one for numpy arrays, one in `gpu` for torch tensors on a device.

Callers name the kernel and hand over what they have. torch is imported by whoever made the tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

_P = ParamSpec("_P")
_R = TypeVar("_R")


def two_faced(by: int = 0) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """The kernel of the same name in `gpu`, where the argument at place `by` is a tensor."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def called(*arguments: _P.args, **others: _P.kwargs) -> _R:
            if on_host(arguments[by]):
                return function(*arguments, **others)
            from streammerge.kernels import gpu

            return cast(_R, getattr(gpu, function.__name__)(*arguments, **others))

        return called

    return decorate


def to_host(rows: Any) -> Any:
    """As an array, whichever it is."""
    return rows if on_host(rows) else rows.cpu().numpy()


def on_host(rows: Any) -> bool:
    """Whether it is no tensor, nor a list of tensors."""
    one = rows[0] if isinstance(rows, list | tuple) else rows
    return isinstance(one, np.ndarray) or type(one).__module__.partition(".")[0] != "torch"
