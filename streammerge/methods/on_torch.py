"""Methods that are written in torch: a function of torch tensors as a function of arrays.

Both see the same memory. torch is imported by whoever writes such a method, never here first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import numpy as np


def is_tensor(hint: Any) -> bool:
    """Whether a hint is `torch.Tensor`, annotated or not."""
    kind = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__name__', '')}" == "torch.Tensor"


def on_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Arrays in, an array out, by way of tensors; one torch thread, so that bits stay the same.

    Rows on a device are tensors already, and stay there; all else is brought to them.
    """

    @functools.wraps(function)
    def called(stack: Any, **arguments: Any) -> Any:
        import torch

        torch.set_num_threads(1)
        rows = _tensor(stack)
        place = rows.device if isinstance(rows, torch.Tensor) else torch.device("cpu")
        given = {name: _tensor(one, place) for name, one in arguments.items()}
        with torch.no_grad():
            found = function(rows, **given)
        if not isinstance(found, torch.Tensor):
            return found
        found = found.contiguous()
        return found if isinstance(stack, torch.Tensor) else found.numpy()

    return called


def _tensor(one: Any, place: Any = "cpu") -> Any:
    import torch

    return torch.from_numpy(one).to(place) if isinstance(one, np.ndarray) else one
