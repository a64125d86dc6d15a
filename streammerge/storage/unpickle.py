"""Where the tensors of pickles of PyTorch lie: run by `pickles`, in a process of its own.

    python unpickle.py FILE...

The first line of its output is the version of torch, or null; then follows one for each file, with
its tensors or why it has none to give, and last the most memory that all this took. torch maps the
file and takes nothing but tensors from the pickle in it (`weights_only`), so no byte of a tensor is
read, and no code in it runs.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import zipfile
from typing import Any

# Before, `weights_only` could be got round: GHSA-53q9-r3pm-6pq6 until 2.6, GHSA-63cw-57p8-fm3p
# until 2.10.
LEAST_TORCH = (2, 10)


def main(paths: list[str]) -> None:
    """Say what is in the files; does not look at them where torch is too old."""
    try:
        import torch
    except ImportError:
        print("null")
        return
    print(json.dumps(torch.__version__), flush=True)
    if is_safe(torch.__version__):
        for path in paths:
            print(json.dumps(_examined(path)), flush=True)
        print(json.dumps({"peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """The largest resident set, as the kernel counts it for this program alone."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def is_safe(version: str) -> bool:
    """Whether a torch of that version has the fixes."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= LEAST_TORCH


def _examined(path: str) -> dict[str, Any]:
    import torch

    try:
        _check_zip(path)
        held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return {"tensors": _places(path, held)}
    except pickle.UnpicklingError as error:
        return {"what": "asks for more than tensors", "found": _foreign(path) or _first(error)}
    except _Unfit as error:
        return {"what": str(error), "found": error.found}
    except Exception as error:  # whatever torch says of a file that may be anything
        return {"what": "cannot be read as a file of torch.save", "found": _first(error)}


class _Unfit(Exception):
    """What is in the file is no table of tensors that lie in it as they are."""

    def __init__(self, what: str, found: str) -> None:
        super().__init__(what)
        self.found = found


def _places(path: str, held: Any) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and offsets in the file, as a header of safetensors has them."""
    import torch

    if not isinstance(held, dict):
        raise _Unfit("holds no table of tensors", type(held).__name__)
    mapped = _mapped(path)
    places = {}
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = f"{type(tensor).__name__} under {name!r}"
            raise _Unfit("holds more than a table of tensors", found)
        start = _offset(mapped, tensor) if _is_plain(tensor) else None
        if start is None:
            found = f"shape {list(tensor.shape)}, {tensor.dtype}, {tensor.layout}"
            raise _Unfit(f"tensor {name!r} does not lie in it row after row", found)
        places[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
    return places


def _is_plain(tensor: Any) -> bool:
    """Whether its elements lie one after the other, as they are."""
    import torch

    return tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_neg()


def _check_zip(path: str) -> None:
    """Raise where torch could not map the file, or would turn its bytes round in memory."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            found = f"it begins with {file.read(16)!r}"
        raise _Unfit("is no zip archive, as torch.save writes since torch 1.6", found)
    with zipfile.ZipFile(path) as archive:
        orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
        for name in orders:
            if (order := archive.read(name).decode()) != sys.byteorder:
                raise _Unfit("holds its numbers in another byte order", order)


def _mapped(path: str) -> list[tuple[range, int]]:
    """The addresses where this process has mapped the file, and the offsets that they begin at."""
    inode, whole = str(os.stat(path).st_ino), os.path.realpath(path)
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, _, offset, _, number, *name = line.split(maxsplit=5)
            by_name = name == [f"{whole}\n"]  # layered file systems show another number
            if number == inode or by_name:
                begin, end = (int(part, 16) for part in addresses.split("-"))
                found.append((range(begin, end), int(offset, 16)))
    return found


def _offset(mapped: list[tuple[range, int]], tensor: Any) -> int | None:
    """Where in the file the bytes of a tensor begin; None where they are not in it."""
    if not tensor.nbytes:
        return 0
    address: int = tensor.data_ptr()
    for addresses, offset in mapped:
        if address in addresses:
            return offset + address - addresses.start
    return None


def _foreign(path: str) -> str:
    """What the pickle would have imported."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return ", ".join(sorted(get_unsafe_globals_in_checkpoint(path)))
    except Exception as error:  # the file is hostile, and this is for the message alone
        return _first(error)


def _first(error: Exception) -> str:
    """The first line of what torch says: what follows is advice to load it all the same."""
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main(sys.argv[1:])
