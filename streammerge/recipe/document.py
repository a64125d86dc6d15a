"""YAML text -> plain values and where each of them stands.

PyYAML reads YAML 1.1, which has traps for people: `no` is a boolean, `1:30` is 90, `0777` is 511
and `1e-3` is text. Here only `true` and `false` are booleans, only plain decimal numbers are
numbers, and everything else stays text, as in YAML 1.2's core schema. PyYAML also takes a key that
is given twice in silence; here that is an error. Nothing is ever constructed from a tag.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from streammerge.errors import ConfigError, Place, Problems
from streammerge.recipe.wording import KeyPath, dotted, quoted

# Aliases let a few lines stand for billions of values, so the expanded values are counted.
MOST_NODES = 10_000
# Deeper than any recipe, and far from the depth where Python's own recursion ends.
MOST_LEVELS = 32

YAML_TAG = "tag:yaml.org,2002:"
_MERGE = YAML_TAG + "merge"
_NUMBER = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", rf"{_NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value stands: its key (an item of a list: itself), itself, and how it is spelled."""

    key: Place
    value: Place
    spelled: str


@dataclass(frozen=True, slots=True)
class Document:
    """Plain values of a recipe, and the spot of each of them by its path of keys."""

    root: Any
    spots: Mapping[KeyPath, Spot]

    def at(self, path: KeyPath) -> Any:
        """The value at a path that exists."""
        value = self.root
        for part in path:
            value = value[part]
        return value

    def spot(self, path: KeyPath) -> Spot:
        """The spot of a value; of what should have held it, where it is missing."""
        while path not in self.spots:
            path = path[:-1]
        return self.spots[path]


def parse(text: str, file: str, problems: Problems) -> Document | None:
    """The document of a YAML text; `file` is what places call it.

    Adds a ConfigError for each problem. A key that is given twice keeps its first value; after any
    other problem there is no document to go on with.
    """
    try:
        node = _compose(text, file)
        walk = _Walk(problems)
        root = walk.value(node, (), node)
    except ConfigError as problem:
        problems.add(problem)
        return None
    return Document(root, walk.spots) if walk.sound else None


class _Loader(yaml.SafeLoader):
    """Composes nodes by the resolvers above, as many and as deep as a recipe may have."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own name; none of its YAML 1.1 ones
    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if parent is not None and self.depth > MOST_LEVELS:
            raise _too_deep(_place(parent.start_mark))
        if parent is not None and self.nodes > 2 * MOST_NODES:  # keys are nodes, too
            raise _too_many(_place(parent.start_mark))
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, _pattern, _first in RESOLVERS:
    _Loader.add_implicit_resolver(YAML_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _compose(text: str, file: str) -> yaml.Node:
    try:
        loader = _Loader(text)
        loader.name = file
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        raise _unreadable(error, text, file) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, file) from None
    if node is None or node.tag == YAML_TAG + "null":
        raise ConfigError(
            "the recipe is empty",
            where=Place(file, 1, 1),
            found="no key at all",
            expected="at least merge_method and a list of models or adapters",
            remedy="write the recipe, or give --base, --adapter and --method instead of a file",
        )
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            "the recipe is not a mapping of keys to values",
            where=_place(node.start_mark),
            found="a list" if isinstance(node, yaml.SequenceNode) else quoted(node.value),
            expected="lines such as `merge_method: ties`",
            remedy="check that this is the recipe's file, and that each key ends in `: `",
        )
    return node


class _Walk:
    """Expands nodes to plain values; remembers each one's spot."""

    def __init__(self, problems: Problems) -> None:
        self.spots: dict[KeyPath, Spot] = {}
        self.sound = True
        self._problems = problems

    def value(self, node: yaml.Node, path: KeyPath, key: yaml.Node) -> Any:
        place = _place(node.start_mark)
        spelled = node.value if isinstance(node, yaml.ScalarNode) else ""
        self.spots[path] = Spot(_place(key.start_mark), place, spelled)
        if len(self.spots) > MOST_NODES:
            raise _too_many(place)
        if len(path) > MOST_LEVELS:
            raise _too_deep(place)
        if isinstance(node, yaml.MappingNode) and node.tag == YAML_TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == YAML_TAG + "seq":
            return [self.value(item, (*path, i), item) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        return self._refuse(
            f"{dotted(path)} carries a tag that a recipe cannot have",
            node,
            found=quoted(node.tag.replace(YAML_TAG, "!!")),
            expected="plain text, numbers, true, false, lists and mappings",
            remedy="remove the tag; a recipe never makes objects or runs code",
        )

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return _SCALARS[node.tag](node.value)
        except ValueError:  # a tag such as !!int before text that is no number
            return self._refuse(
                "the value is not what its tag says",
                node,
                found=quoted(node.value),
                expected=node.tag.replace(YAML_TAG, "!!"),
                remedy="remove the tag",
            )

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, value in node.value:
            if self._is_key(key):
                if key.value in plain:
                    self._given_twice(key, (*path, key.value))
                else:
                    plain[key.value] = self.value(value, (*path, key.value), key)
        return plain

    def _is_key(self, key: yaml.Node) -> bool:
        scalar = isinstance(key, yaml.ScalarNode)
        if scalar and key.tag == YAML_TAG + "str":
            return True
        self._refuse(
            "this cannot be a key",
            key,
            found=quoted(key.value) if scalar else "a list or a mapping",
            expected="text such as `merge_method`",
            remedy=(
                "write the keys out here; merge keys are not supported"
                if key.tag == _MERGE
                else "correct the key, or put it in quotes"
            ),
        )
        return False

    def _given_twice(self, key: yaml.Node, path: KeyPath) -> None:
        self._problems.add(
            ConfigError(
                f"{dotted(path)} is given twice",
                where=_place(key.start_mark),
                found=f"the same key at {self.spots[path].key}",
                expected="each key once",
                remedy="remove one of the two",
            )
        )

    def _refuse(self, what: str, node: yaml.Node, **rest: str) -> None:
        self.sound = False
        self._problems.add(ConfigError(what, where=_place(node.start_mark), **rest))


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _integer(text: str) -> int | float:
    # Python refuses to read thousands of digits as an int; as a float they are merely too large.
    return int(text) if len(text) <= 30 else float(text)


def _floating(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: Mapping[str, Callable[[str], Any]] = {
    YAML_TAG + "str": str,
    YAML_TAG + "bool": _boolean,
    YAML_TAG + "int": _integer,
    YAML_TAG + "float": _floating,
    YAML_TAG + "null": lambda text: None,
}


def _place(mark: yaml.Mark) -> Place:
    return Place(mark.name, mark.line + 1, mark.column + 1)


def _too_many(place: Place) -> ConfigError:
    return ConfigError(
        "the recipe holds too many values, counting every alias in full",
        where=place,
        found=f"more than {MOST_NODES:,}",
        expected=f"at most {MOST_NODES:,}",
        remedy="remove the aliases (`*name`) that repeat large parts",
    )


def _too_deep(place: Place) -> ConfigError:
    return ConfigError(
        "the recipe is nested too deep",
        where=place,
        found=f"more than {MOST_LEVELS} levels, or an alias that holds itself",
        expected=f"at most {MOST_LEVELS} levels",
        remedy="remove the inner brackets or the alias",
    )


def _syntax(error: yaml.MarkedYAMLError, file: str) -> ConfigError:
    start = error.context_mark
    context = f"{error.context or ''}" + (f" that starts at {_place(start)}" if start else "")
    tab = "\\t" in (error.problem or "")
    return ConfigError(
        f"this is not valid YAML: {error.problem or error.context}",
        where=_place(error.problem_mark) if error.problem_mark else file,
        found=context.strip() or None,
        remedy=(
            "use spaces instead of the tab"
            if tab
            else "check indentation, colons, brackets and quotes here and just before"
        ),
    )


def _unreadable(error: yaml.reader.ReaderError, text: str, file: str) -> ConfigError:
    before = text[: error.position]
    line = before.count("\n") + 1
    return ConfigError(
        "a character here cannot stand in YAML",
        where=Place(file, line, len(before) - (before.rfind("\n") + 1) + 1),
        found=ascii(text[error.position : error.position + 1]),
        expected="printable text",
        remedy="remove the character; is this the recipe's file?",
    )
