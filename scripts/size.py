"""How large the code is: a mirror, not a fence. Sizes of files and functions, comments, tests.

python scripts/size.py
"""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path
from statistics import median

LONG_FILE = 400
LONG_FUNCTION = 50


def lines_of(path: Path) -> int:
    return path.read_text("utf-8").count("\n")


def functions(path: Path) -> list[tuple[int, str]]:
    """`(lines, place)` of every function."""
    tree = ast.parse(path.read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [((n.end_lineno or 0) - n.lineno + 1, f"{path}:{n.lineno} {n.name}") for n in found]


def comment_lines(path: Path) -> int:
    with tokenize.open(path) as file:
        tokens = tokenize.generate_tokens(file.readline)
        return sum(1 for token in tokens if token.type == tokenize.COMMENT)


def main() -> None:
    files = [path for path in sorted(Path("streammerge").rglob("*.py")) if lines_of(path)]
    sizes = [lines_of(path) for path in files]
    every = [function for path in files for function in functions(path)]
    tests = sum(lines_of(path) for path in Path("tests").rglob("*.py"))
    comments = sum(comment_lines(path) for path in files)
    print(f"{len(files)} files, {sum(sizes)} lines, median {median(sizes):.0f}, most {max(sizes)}")
    print(f"{len(every)} functions, median {median(size for size, _ in every):.0f} lines")
    share = 100 * comments / sum(sizes)
    print(f"{share:.1f} % comments; {tests / sum(sizes):.2f} lines of tests a line")
    for size, path in zip(sizes, files, strict=True):
        if size > LONG_FILE:
            print(f"  {path}: {size} lines")
    for size, place in sorted(every, reverse=True):
        if size > LONG_FUNCTION:
            print(f"  {place}: {size} lines")


if __name__ == "__main__":
    main()
