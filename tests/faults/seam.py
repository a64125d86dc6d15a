"""Every file call of a merge made to fail, one after the other.

The calls of `os` are the seam: those that open, read, write, sync, rename and remove files of the
output and its state are counted, and the n-th kills the process, or fails. Then the same merge is
run again. N = 1, 2, ... until a run passes untouched, as SQLite is tested. Two tensors are model
enough. Each run is a forked process, so that hundreds take seconds.

    python -m tests.faults.seam kill EIO:3
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streammerge as sm
from streammerge.engine import run
from tests.makers import write_model, write_safetensors

# The six kinds of call, and the functions that stand for each.
CALLS = {
    "open": ("open", "mkdir"),
    "read": ("pread", "preadv"),
    "write": ("pwrite", "copy_file_range", "posix_fallocate", "ftruncate"),
    "sync": ("fsync", "fdatasync"),
    "replace": ("rename", "replace"),
    "unlink": ("unlink", "rmdir"),
}
KINDS = {function: kind for kind, functions in CALLS.items() for function in functions}


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls the n-th call of some kinds; with `sticky`, all that follow too."""

    name: str
    kinds: tuple[str, ...]
    error: int | None = None  # None: the process is killed
    after: bool = False  # the call is made, and then
    sticky: bool = False
    inputs: bool = False  # of the inputs' files, not of the output's
    inside: bool = False  # the output is an empty folder that is there, as a mount point is


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill", tuple(CALLS)),
        Fault("kill after", ("write", "sync", "replace", "unlink"), after=True),
        Fault("kill inside", ("open", "sync", "replace", "unlink"), inside=True),
        Fault("EIO", ("open", "read", "write", "sync", "replace", "unlink"), errno.EIO),
        Fault("EIO of inputs", ("open", "read"), errno.EIO, inputs=True),
        Fault("ENOSPC", ("open", "write", "sync"), errno.ENOSPC, sticky=True),
        Fault("EDQUOT", ("open", "write"), errno.EDQUOT, sticky=True),
        Fault("EACCES", ("open", "replace"), errno.EACCES),
        Fault("EROFS", ("open", "write", "replace", "unlink"), errno.EROFS, sticky=True),
    )
}


class Seam:
    """Counts the calls on files below a folder, and lets the fault befall one."""

    def __init__(self, fault: Fault, nth: int, below: Path) -> None:
        self._fault = fault
        self._nth = nth
        self._below = f"{below}/"
        self.calls = 0

    def install(self) -> None:
        for name in KINDS:
            if KINDS[name] in self._fault.kinds:
                setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._concerns(*arguments, **options):
                return function(*arguments, **options)
            self.calls += 1
            due = self.calls == self._nth or (self._fault.sticky and self.calls > self._nth)
            if due and not self._fault.after:
                self._befall()
            result = function(*arguments, **options)
            if due:
                self._befall()
            return result

        return call

    def _befall(self) -> None:
        if self._fault.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self._fault.error, os.strerror(self._fault.error or 0))

    def _concerns(self, *arguments: Any, **options: Any) -> bool:
        """Whether one of a call's descriptors or paths lies below the folder."""
        folder = options.get("dir_fd")
        for one in arguments[:2]:
            if isinstance(one, int):
                place = _path_of(one)
            elif isinstance(one, str | os.PathLike):
                place = os.path.join(_path_of(folder) if folder else "", os.fspath(one))
            else:
                continue
            if f"{place}/".startswith(self._below):
                return True
        return False


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


# ------------------------------------------------------------------------------------- the rounds


@dataclass(slots=True)
class Rounds:
    """What came of all tries of a fault."""

    fault: str
    tries: int = 0
    survived: int = 0  # inputs unchanged, no half output, and the next run succeeded
    equal: int = 0  # with the bytes of an undisturbed one
    codes: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def make_inputs(folder: Path) -> Path:
    """Two tensors that an adapter changes, by a method of two reads, and one that is copied."""
    data = bytes(i % 60 for i in range(2048))  # small numbers
    values = dict.fromkeys(("m.a.weight", "m.b.weight", "m.c.weight"), data)
    tensors = {name: ("F16", (32, 32), data) for name, data in values.items()}
    write_model(folder / "base", tensors, 1, {"model_type": "llama", "torch_dtype": "float16"})
    adapter = folder / "lora"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {}
    for name in ("a", "b"):
        for part, shape in (("A", (2, 32)), ("B", (32, 2))):
            data = bytes([0, 60, 0, 52]) * 32  # 1.0 and 0.25
            factors[f"base_model.model.m.{name}.lora_{part}.weight"] = ("F16", shape, data)
    write_safetensors(adapter / "adapter_model.safetensors", factors)
    recipe = folder / "cfg.yaml"
    recipe.write_text(
        "base_model: ./base\nmerge_method: ties\nadapters: [{path: ./lora, density: 0.5}]\n"
    )
    return recipe


def rounds(fault: Fault, folder: Path, step: int = 1) -> Rounds:
    """Try every call, or every so manieth; the folder is for inputs and outputs."""
    recipe = make_inputs(folder / "in")
    made = sm.plan(recipe, threads=1, io="read")  # once: what is tested is to carry it out
    subject = recipe if fault.inputs else made
    undisturbed = folder / "undisturbed" / "out"
    assert _merge(subject, undisturbed) == 0
    expected, inputs = _contents(undisturbed), _contents(folder / "in")
    found = Rounds(fault.name)
    for nth in range(1, 10_000, step):
        outs = folder / f"try-{nth}"
        outs.mkdir()
        if fault.inside:
            (outs / "out").mkdir()
        seam = Seam(fault, nth, folder / "in" if fault.inputs else outs)
        code = _merge(subject, outs / "out", seam)
        if code == _UNTOUCHED:
            return found
        found.tries += 1
        found.codes[code] += 1
        problem = _judge(made, outs, code, expected, inputs, folder / "in")
        if problem is None:
            found.survived += 1
            found.equal += 1
        else:
            found.problems.append(f"{fault.name} at call {nth}, exit {code}: {problem}")
    raise AssertionError("no run passes untouched")


def _judge(
    made: sm.Plan,
    outs: Path,
    code: int,
    expected: dict[str, bytes],
    inputs: dict[str, bytes],
    read: Path,
) -> str | None:
    """What is wrong after a fault and a further run, if anything is."""
    out = outs / "out"
    if code not in (0, 66, 73, 74, -signal.SIGKILL):
        return "another exit code than is documented"
    looks_whole = (out / "model.safetensors").exists()  # what a loader asks for
    if looks_whole and _published(out) != expected:
        return f"a half output: {sorted(_contents(out))}"
    again = _merge(made, out)
    if again != 0:
        return f"the next run gives exit {again}"
    if _contents(out) != expected:
        return "the next run gives other bytes, or leaves others"
    if sorted(os.listdir(outs)) != ["out"]:
        return f"stray files: {sorted(os.listdir(outs))}"
    return None if _contents(read) == inputs else "the inputs are changed"


_UNTOUCHED = 99
_BUG = 98


def _merge(subject: Path | sm.Plan, out: Path, seam: Seam | None = None) -> int:
    """A merge in a process of its own; its exit code, or `_UNTOUCHED` by the fault."""
    child = os.fork()
    if child == 0:
        os._exit(_run(subject, out, seam))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _run(subject: Path | sm.Plan, out: Path, seam: Seam | None) -> int:
    code = 0
    try:
        if seam:
            seam.install()
        made = sm.plan(subject, threads=1, io="read") if isinstance(subject, Path) else subject
        run(made, out)
    except sm.StreammergeError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        return _BUG
    return _UNTOUCHED if seam and seam.calls < seam._nth else code


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _published(out: Path) -> dict[str, bytes]:
    """What is there but the state of a run."""
    return {n: data for n, data in _contents(out).items() if not n.startswith(".streammerge/")}


def _reports(names: list[str]) -> Iterator[dict[str, Any]]:
    for one in names:
        name, _, step = one.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            found = rounds(FAULTS[name], Path(folder), int(step or 1))
        yield {
            "fault": found.fault,
            "tries": found.tries,
            "survived": found.survived,
            "equal": found.equal,
            "codes": {str(code): count for code, count in sorted(found.codes.items())},
            "problems": found.problems,
        }


if __name__ == "__main__":
    for report in _reports(sys.argv[1:] or list(FAULTS)):
        print(json.dumps(report), flush=True)
