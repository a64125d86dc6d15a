"""Tensors in pickles of PyTorch (`torch.save`), read where they lie, for `--allow-pickle`.

Such a file is a zip archive without compression: a pickle that says which tensors there are, and
their bytes (https://docs.pytorch.org/docs/stable/notes/serialization.html). So once torch has said
where they lie, they are read like those of any other file. torch does so in a process of its own:
its memory is not the merge's, and a file that brings it down brings nothing else down.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streammerge import system
from streammerge.errors import BudgetError, ConfigError, Problems, StreammergeError
from streammerge.memory import over_budget
from streammerge.storage.header import Header, TensorTable, checked_entries
from streammerge.storage.smallfile import bad, open_regular
from streammerge.storage.unpickle import LEAST_TORCH, is_safe
from streammerge.words import DType

WAY_OUT = "or read its tensors, and nothing else, with --allow-pickle"
_CONVERT = "convert it to safetensors where you trust it"
# What the other process takes: torch 2.13 for the CPU 219 MiB, and 2 KiB for each tensor. One that
# takes more, as a build for CUDA may, is found out when it is done.
LOOK_BYTES = 240 << 20
_UNPICKLE = Path(__file__).with_name("unpickle.py")
_DTYPES = {
    "bool": DType.BOOL,
    "uint8": DType.U8,
    "int8": DType.I8,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
    "uint16": DType.U16,
    "int16": DType.I16,
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "uint32": DType.U32,
    "int32": DType.I32,
    "float32": DType.F32,
    "uint64": DType.U64,
    "int64": DType.I64,
    "float64": DType.F64,
}


class Pickles:
    """Leave to look into pickles, within a budget, and the memory that it took."""

    def __init__(self, budget_bytes: int | None = None) -> None:
        """`budget_bytes` bounds what this process and torch's hold together; None: nothing does."""
        self._budget_bytes = budget_bytes
        self._refused: BudgetError | None = None  # one error, however many folders come to it
        self.peak_bytes = 0  # of both, as foreseen and as it was; 0 where there was no pickle

    def read(self, paths: Sequence[Path], problems: Problems) -> list[Header]:
        """The tables of those pickles that hold tensors and nothing else; no tensor byte is read.

        What is wrong with the others is a problem: `BadInput` where they hold more, `ConfigError`
        where there is no torch that can be trusted with them, or no memory for it (`BudgetError`).
        """
        stamps: dict[str, os.stat_result] = {}
        found = []
        try:
            for path in map(os.fspath, paths):
                with open_regular(path) as (_, stamps[path]):
                    pass
            self._account(LOOK_BYTES)
            answers, peak_bytes = _ask(list(stamps))
            self._account(peak_bytes)
        except StreammergeError as error:
            problems.add(error)
            return []
        for (path, stamp), answer in zip(stamps.items(), answers, strict=True):
            try:
                found.append(_header(path, stamp, answer))
            except StreammergeError as error:
                problems.add(error)
        return found

    def _account(self, others_bytes: int) -> None:
        """Count what the other process takes, beside this one."""
        self.peak_bytes = max(self.peak_bytes, system.resident_bytes() + others_bytes)
        if self._budget_bytes is not None and self.peak_bytes > self._budget_bytes:
            what, otherwise = "torch, which looks into pickles,", "; or convert them to safetensors"
            peak, budget = self.peak_bytes, self._budget_bytes
            self._refused = self._refused or over_budget(what, peak, budget, otherwise)
            raise self._refused


def _ask(paths: list[str]) -> tuple[list[dict[str, Any]], int]:
    """What torch says of each file, and the memory it took; `unpickle.py` says in which form."""
    command = [sys.executable, "-P", str(_UNPICKLE), *paths]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    version, *answers = map(json.loads, done.stdout.splitlines() or [b"null"])
    if done.returncode == 0 and (version is None or not is_safe(version)):
        least = ".".join(map(str, LEAST_TORCH))
        raise ConfigError(
            "--allow-pickle needs a torch that can be trusted with pickles",
            found=f"torch {version}" if version else "no torch in this environment",
            expected=f"torch {least} or newer",
            remedy=f"pip install 'streammerge[pickle]', or {_CONVERT}",
        )
    if len(answers) <= len(paths):
        last = (done.stderr.decode("utf-8", "replace").splitlines() or [""])[-1]
        found = f"exit code {done.returncode} {last}".rstrip()
        what = "brought down the process that looked into it"
        at = min(len(answers), len(paths) - 1)
        raise bad(paths[at], what, found, "a file of torch.save", _CONVERT)
    *answers, peak = answers
    return answers, peak["peak_bytes"]


def _header(path: str, stamp: os.stat_result, answer: dict[str, Any]) -> Header:
    if "tensors" not in answer:
        raise bad(path, answer["what"], answer["found"], "tensors by their names", _CONVERT)
    document = {name: _labelled(one) for name, one in answer["tensors"].items()}
    entries = checked_entries(path, document, stamp.st_size)
    return Header(
        path=path,
        size_bytes=stamp.st_size,
        mtime_ns=stamp.st_mtime_ns,
        inode=stamp.st_ino,
        device=stamp.st_dev,
        data_start=0,
        tensors=TensorTable(path, entries, 0),
        metadata={},
        digest=hashlib.sha256(json.dumps(document).encode()).hexdigest(),
    )


def _labelled(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with its dtype as a header of safetensors has it, where it is one of those."""
    dtype = _DTYPES.get(entry["dtype"])
    return {**entry, "dtype": dtype.label} if dtype else entry
