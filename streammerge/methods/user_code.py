"""The user's code, run so that what goes wrong in it is told with its file and line."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from streammerge.declarations import MethodSpec
from streammerge.errors import MethodError, Place, StreammergeError

# What code may raise; KeyboardInterrupt is the user's own.
FAULTS = (Exception, SystemExit)


def run_file(path: Path, source: bytes) -> ModuleType:
    """The module of a file of that content, run.

    Nothing is written beside it, as an import would, nor read: bytecode that is kept there may be
    of an older version, when both were written within a second.
    """
    module = ModuleType(f"own_method_{sha256(source).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses and annotations look names up
    linecache.checkcache(str(path))
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except FAULTS as error:
        what = f"the merge method in {path.name} cannot be loaded"
        raise unloadable(what, error, str(path)) from error
    return module


def guarded(spec: MethodSpec, path: str) -> MethodSpec:
    """The method whose faults are those of the file at `path`, and told so."""

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            try:
                return function(*arguments, **named)
            except StreammergeError:
                raise
            except FAULTS as error:
                place, line = _last(error, path)
                raise MethodError(
                    f"the merge method {spec.name} fails: {_shown(error)}",
                    where=place,
                    found=line,
                    remedy="correct it, then run the same command again",
                ) from error

        return run

    check = guard(spec.check) if spec.check else None
    return replace(spec, function=guard(spec.function), check=check)


def unloadable(what: str, error: BaseException, path: str | None = None) -> MethodError:
    """What is said of code that does not run; the recipe is the place that names it."""
    place, line = _last(error, path)
    return MethodError(
        f"{what}: {_shown(error)}",
        found=f"{place}: {line}" if line else str(place),
        expected="code that runs, with one typed function under @method(...)",
        remedy="docs/own-methods.md shows one",
    )


def _shown(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last(error: BaseException, path: str | None) -> tuple[Place, str]:
    """Place and text of the last line of that file that had a part in it, or of all."""
    if isinstance(error, SyntaxError) and error.filename:
        place = Place(error.filename, error.lineno or 1, error.offset or 1)
        return place, (error.text or "").strip()
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if frame.filename == path] or frames
    place = Place(last[-1].filename, last[-1].lineno or 1, (last[-1].colno or 0) + 1)
    return place, last[-1].line or ""
