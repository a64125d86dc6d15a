"""The floors of the house: imports go down only, rooms on one floor do not import each other.

A lower floor can be understood, tested and reused without anything above it; a room that wanted
its neighbour would tie two things that are meant to vary on their own, such as adapter kinds and
storage formats. Planning puts them together.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "streammerge"

# Each floor lists its rooms; a file or folder of the package is one room.
FLOORS = (
    {
        "__init__",
        "words",
        "declarations",
        "arrays",
        "grid",
        "noise",
        "memory",
        "scratch",
        "events",
        "errors",
        "sizes",
        "system",
        "manner",
        "device",
    },
    {"storage"},
    {"kernels"},
    {"statistics"},
    {"recipe", "methods", "adapters", "sources", "sinks"},
    {"planning"},
    {"scheduler", "report"},
    {"publication", "resume", "spoils", "trimming"},
    {"work"},
    {"building"},
    {"engine"},
    {"commands"},
    {"progress", "signals", "merge_options"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# On the lowest floor files import each other; there is nothing to keep apart.
SHARED = 0


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`(line, dotted name)` of every import from the package, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == PACKAGE)


def faults(root: Path) -> Iterator[str]:
    """One line for every import that goes up or sideways, and every room without a floor."""
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        if room not in LEVEL:
            yield f"{path}:1: the room {room!r} has no floor in {Path(__file__).name}"
            continue
        if room == "__init__":
            continue  # the public face hands on names of every floor, on first use
        for line, name in imports(ast.parse(path.read_text("utf-8"))):
            target = [*name.split("."), "__init__"][1]
            if target not in LEVEL:
                target = "__init__"  # a name that the package itself holds
            if target == room or LEVEL[target] < LEVEL[room]:
                continue
            if LEVEL[target] == LEVEL[room] == SHARED:
                continue
            relation = "its neighbour" if LEVEL[target] == LEVEL[room] else "a floor above"
            yield f"{path}:{line}: {room} imports {target}, {relation}"


def main() -> int:
    found = list(faults(Path(PACKAGE)))
    print("\n".join(found) or f"{len(LEVEL)} rooms on {len(FLOORS)} floors: imports go down only")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
