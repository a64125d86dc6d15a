"""Where the arithmetic is done: the CPU with numpy and numba, or a CUDA device with torch.

torch is imported when a device is used, never before. Rows are then tensors of the device, and
bytes of files go through pinned buffers of the host. For tests, `torch-cpu` is torch on the CPU.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge.errors import ConfigError
from streammerge.scratch import Scratch

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# What the driver makes for each device; looking costs nothing, torch 1.4 s.
_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Device:
    """`name` is cpu, cuda:N, or torch-cpu; `kind` is what the bits of a merge depend on."""

    name: str = "cpu"

    @property
    def on_host(self) -> bool:
        """Whether rows are numpy arrays."""
        return self.name == "cpu"

    @property
    def on_cuda(self) -> bool:
        """Whether rows have a memory, and copies and kernels a stream, of their own."""
        return self.name.startswith("cuda")

    @property
    def kind(self) -> str:
        """As in the fingerprint: the model of a GPU, not its number."""
        if not self.on_cuda:
            return self.name
        import torch

        return f"cuda {torch.cuda.get_device_name(self.name)}, torch {torch.__version__}"

    def scratch(self) -> Scratch:
        """Buffers for one thread."""
        return Scratch() if self.on_host else DeviceScratch(self)

    @property
    def out_of_memory(self) -> tuple[type[BaseException], ...]:
        """What is raised where the device has no room left."""
        if self.on_host:
            return ()
        import torch

        return (torch.OutOfMemoryError,)

    def warm_up(self) -> None:
        """Start its runtime, so that the memory this takes of the host is known."""
        if self.on_host:
            return
        import torch

        torch.set_num_threads(1)  # threads come from the pool of workers alone
        torch.set_grad_enabled(False)
        torch.backends.cuda.matmul.allow_tf32 = False
        ones = torch.ones((64, 64), device=self.torch_name)
        (ones @ ones).cpu()

    @property
    def torch_name(self) -> str:
        return "cpu" if self.name == "torch-cpu" else self.name


CPU = Device()


def choose(
    wanted: str, *, before: str | None = None, unfit: str | None = None
) -> tuple[Device, str | None]:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`, and what the user should know of it.

    `before` is the kind with which the merge was begun, which `auto` then means; `unfit` is why the
    merge cannot be done on a device, for which `auto` does not even ask torch. Raises ConfigError
    where a device that is asked for cannot be used.
    """
    if wanted in ("cpu", "torch-cpu"):
        return Device(wanted), None
    if wanted != "auto":
        return _cuda(wanted), None
    if before is not None and not before.startswith("cuda"):
        return CPU, None
    if not _driver_there():
        return CPU, None
    if unfit is not None:
        return CPU, f"the CUDA device is not used: {unfit}"
    if importlib.util.find_spec("torch") is None:
        return CPU, "a CUDA device is here, but not used: `pip install 'streammerge[gpu]'`"
    try:
        return _cuda("cuda"), None
    except ConfigError as problem:
        return CPU, f"the CUDA device is not used: {problem.what}"


def _driver_there() -> bool:
    return _DRIVER.is_dir() and any(_DRIVER.iterdir())


def _cuda(name: str) -> Device:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "a CUDA device is used with torch, which is not installed",
            found=f"--device {name}",
            remedy="`pip install 'streammerge[gpu]'`, or --device cpu",
        )
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise ConfigError(
            f"torch {torch.__version__} finds no such CUDA device",
            found=f"--device {name}; {count} devices",
            expected="a device that `nvidia-smi` lists, and a torch that is built for CUDA",
            remedy="--device cpu needs neither",
        )
    return Device(f"cuda:{index}")


def too_small(device: Device) -> ConfigError:
    """One item at a time is too much for it."""
    return ConfigError(
        "the device's memory does not hold one tile and the factors of its tensor",
        found=f"{device.name}, with what other programs leave of it",
        remedy="end what else runs there, or --device cpu",
    )


class DeviceScratch(Scratch):
    """Rows are tensors of the device; all other buffers are the host's, pinned for copies.

    What a thread asks of the device is queued on a stream of its own, so that one thread's copies
    go on while another's kernels run.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self._rows: dict[str, torch.Tensor] = {}
        self._stream: Any = None

    def _new(self, nbytes: int) -> NDArray[np.uint8]:
        if not self._device.on_cuda:
            return super()._new(nbytes)
        import torch

        pinned: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned

    def rows(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        import torch

        numel = int(np.prod(shape))
        buffer = self._rows.get(name)
        if buffer is None or buffer.numel() < numel:
            self._rows.pop(name, None)
            buffer = torch.empty(numel, dtype=torch.float32, device=self._device.torch_name)
            self._rows[name] = buffer
        rows: Any = buffer[:numel].reshape(shape)
        return rows  # type: ignore[no-any-return]  # a tensor stands for an array: see `Rows`

    def fresh(self) -> Scratch:
        return self._device.scratch()

    def settle(self) -> None:
        if self._device.on_cuda:
            import torch

            torch.cuda.current_stream(self._device.name).synchronize()

    def active(self) -> AbstractContextManager[Any]:
        if not self._device.on_cuda:
            return nullcontext()
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device.name)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)


class Lanes:
    """Buffers for so many items at once; fewer once the device had no room for all of them."""

    def __init__(self, device: Device, count: int) -> None:
        self._device = device
        self._most = count
        self._busy = 0
        self._idle: list[Scratch] = []
        self._changed = threading.Condition()

    @property
    def most(self) -> int:
        return self._most

    @contextmanager
    def one(self) -> Iterator[Scratch]:
        """Buffers of one's own, once a lane is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy < self._most)
            self._busy += 1
            scratch = self._idle.pop() if self._idle else self._device.scratch()
        kept = False
        try:
            with scratch.active():
                yield scratch
            kept = True
        finally:
            with self._changed:
                self._busy -= 1
                if kept and self._busy + len(self._idle) < self._most:
                    self._idle.append(scratch)
                self._changed.notify()

    def fewer(self, than: int) -> bool:
        """Give up a lane, unless another thread did since there were so many; False at the last.

        The memory of idle lanes goes back to the device.
        """
        with self._changed:
            if self._most < than:
                return True
            if than == 1:
                return False
            self._most -= 1
            self._idle.clear()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True
