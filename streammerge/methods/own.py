"""Methods of the user's own: a Python file that the recipe names, or an installed package's.

`merge_method: ./soup.py` is the one method of that file, `./soup.py:soup` one of several; paths
are relative to the recipe, else to the working directory. `merge_method: soup` may be the name of
an entry point of the group `streammerge.methods`. Nothing is run that the recipe does not name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsourcefile
from pathlib import Path
from types import ModuleType

from streammerge.errors import ConfigError
from streammerge.words import MethodSpec

GROUP = "streammerge.methods"
_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<function>\w+))?")


class WithOwn(Mapping[str, MethodSpec]):
    """A catalogue in which the user's own methods are found too; listed are the catalogue's.

    Raises ConfigError for a file or package that gives no method.
    """

    def __init__(self, known: Mapping[str, MethodSpec], folders: Sequence[Path]) -> None:
        self._known = known
        self._folders = folders
        self._own: dict[str, MethodSpec] = {}

    def __getitem__(self, name: str) -> MethodSpec:
        if name in self._known:
            return self._known[name]
        if name not in self._own:
            file = _FILE.fullmatch(name)
            found = self._of_file(file) if file else _of_package(name)
            self._own[name] = replace(found, name=name, digest=_digest(found))
        return self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _of_file(self, file: re.Match[str]) -> MethodSpec:
        written = Path(file["path"]).expanduser()
        paths = [folder / written for folder in self._folders]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ConfigError(
                "the file of the merge method is not there",
                found=f"no file {' nor '.join(map(str, dict.fromkeys(paths)))}",
                remedy="paths are relative to the recipe, else to the working directory",
            )
        return _chosen(_run(path), path, file["function"])


def _run(path: Path) -> ModuleType:
    """The module of a file, run."""
    spec = spec_from_file_location(f"own_method_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # for a name that ends in .py
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise _broken(str(path), error) from error
    return module


def _broken(where: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the merge method in {where} cannot be loaded",
        found=f"{type(error).__name__}: {error}",
        expected="a file that runs, with one typed function under @method(...)",
        remedy="CONTRIBUTING.md and docs/own-methods.md show one",
    )


def _chosen(module: ModuleType, path: Path, function: str | None) -> MethodSpec:
    found = {n: one for n, one in vars(module).items() if isinstance(one, MethodSpec)}
    own = {n: one for n, one in found.items() if one.function.__module__ == module.__name__}
    if function is None and len(own) == 1:
        return next(iter(own.values()))
    if function in own:
        return own[function]
    raise ConfigError(
        f"which method of {path.name} is meant is not clear"
        if function is None
        else f"{path.name} has no method {function}",
        found=", ".join(own) or "no function under @method(...)",
        expected="one method" if function is None else f"one called {function}",
        remedy=f"write {path.name}:{next(iter(own), 'NAME')}",
    )


def _of_package(name: str) -> MethodSpec:
    """The method of an entry point. Raises KeyError when there is none of the name."""
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise KeyError(name)
    try:
        spec = found[0].load()
    except Exception as error:  # whatever the package raises
        raise _broken(found[0].value, error) from error
    if not isinstance(spec, MethodSpec):
        raise _broken(found[0].value, TypeError(f"it is a {type(spec).__name__}, no @method"))
    return spec


def _digest(spec: MethodSpec) -> str:
    """sha256 of the file that defines it: another file may give other bytes."""
    source = getsourcefile(spec.function)
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
