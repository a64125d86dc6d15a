"""Methods of the user's own: a Python file that the recipe names, or an installed package's.

`merge_method: ./soup.py` is the one method of that file, `./soup.py:soup` one of several; paths
are relative to the recipe, else to the working directory. `merge_method: soup` may be the name of
an entry point of the group `streammerge.methods`. Nothing is run that the recipe does not name, and
nothing that lies where models come from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from importlib.metadata import entry_points
from inspect import getsourcefile
from pathlib import Path

from streammerge.declarations import MethodSpec
from streammerge.errors import ConfigError, MethodError
from streammerge.methods.user_code import FAULTS, guarded, run_file, unloadable

GROUP = "streammerge.methods"
_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<function>\w+))?")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


class WithOwn(Mapping[str, MethodSpec]):
    """A catalogue in which the user's own methods are found too; listed are the catalogue's.

    Raises ConfigError for a file or package that gives no method, MethodError with file and line
    for one that fails.
    """

    def __init__(self, known: Mapping[str, MethodSpec], folders: Sequence[Path]) -> None:
        self._known = known
        self._folders = folders

    def __getitem__(self, name: str) -> MethodSpec:
        if name in self._known:
            return self._known[name]
        if file := _FILE.fullmatch(name):
            path = _find(file["path"], self._folders)
            _refuse_model_folder(path)
            return _of_file(path, _read(path), file["function"], name)
        return _of_package(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def offered(self) -> list[str]:
        """The names that installed packages offer besides; no package is imported for it."""
        names = {point.name for point in entry_points(group=GROUP)}
        return sorted(names.difference(self._known))


def _named(spec: MethodSpec, name: str, path: str, source: bytes) -> MethodSpec:
    """As the recipe names it, of a file of that content."""
    return guarded(replace(spec, name=name, digest=sha256(source).hexdigest()), path)


# ---------------------------------------------------------------------------------- of a file


def _find(text: str, folders: Sequence[Path]) -> Path:
    written = Path(text).expanduser()
    paths = list(dict.fromkeys(Path(os.path.abspath(one / written)) for one in folders))
    found = {os.path.realpath(path): path for path in paths if path.is_file()}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ConfigError(
            "two files could be meant by the merge method",
            found=" and ".join(map(str, found.values())),
            remedy="write an absolute path",
        )
    raise ConfigError(
        "the file of the merge method is not there",
        found=f"no file {' nor '.join(map(str, paths))}",
        remedy="paths are relative to the recipe, else to the working directory",
    )


def _refuse_model_folder(path: Path) -> None:
    """Models are fetched from strangers, and so is code that lies among them."""
    for place in (path, Path(os.path.realpath(path))):
        for folder in place.parents:
            if _holds_weights(folder):
                raise ConfigError(
                    "no code is run from a model's folder",
                    found=f"{path}, and weights in {folder}",
                    remedy="read the file; if you trust it, copy it beside your recipe",
                )


def _holds_weights(folder: Path) -> bool:
    if (folder / "adapter_config.json").exists():
        return True
    has_config = (folder / "config.json").exists()
    return has_config and any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)


@cache  # a method that is named twice is one
def _of_file(path: Path, source: bytes, function: str | None, name: str) -> MethodSpec:
    """The method of that function, or the only one."""
    own = _methods_of(path, source)
    if function is None and len(own) == 1:
        return _named(next(iter(own.values())), name, str(path), source)
    if function is not None and function in own:
        return _named(own[function], name, str(path), source)
    raise ConfigError(
        f"which method of {path.name} is meant is not clear"
        if function is None
        else f"{path.name} has no method {function}",
        found=", ".join(own) or "no function under @method(...)",
        expected="one method" if function is None else f"one called {function}",
        remedy=f"write {path.name}:{next(iter(own), 'NAME')}",
    )


@cache  # a file is run once in a process
def _methods_of(path: Path, source: bytes) -> Mapping[str, MethodSpec]:
    """Those that the file defines itself, not those that it imports."""
    module = run_file(path, source)
    found = {n: one for n, one in vars(module).items() if isinstance(one, MethodSpec)}
    return {n: one for n, one in found.items() if one.function.__module__ == module.__name__}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"the file of the merge method cannot be read: {error.strerror}"
        raise ConfigError(what, found=str(path), remedy="give this user the right to") from error


# ------------------------------------------------------------------------------- of a package


def _of_package(name: str) -> MethodSpec:
    """The method of an entry point. Raises KeyError when there is none of the name."""
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        raise KeyError(name)
    try:
        spec = points[0].load()
    except FAULTS as error:
        raise unloadable(f"the installed method {name} cannot be loaded", error) from error
    if not isinstance(spec, MethodSpec):
        raise MethodError(
            f"the installed method {name} is none",
            found=f"{points[0].value}, a {type(spec).__name__}",
            expected="a function under @method(...)",
            remedy="ask the authors of the package, or do without it",
        )
    path = getsourcefile(spec.function) or ""
    return _named(spec, name, path, _read(Path(path)))
