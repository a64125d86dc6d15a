"""Values of statistics as JSON and back, exactly: for the journal of a run that may be stopped.

A value is a dataclass of numbers, arrays, and dictionaries and lists of them.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from streammerge.statistics.column_norms import ColumnNorms
from streammerge.statistics.given import Same
from streammerge.statistics.select import Thresholds
from streammerge.words import StatisticValue

# By their names in the journal. A value of another kind is measured again.
KINDS: Mapping[str, type[Any]] = {
    "column norms": ColumnNorms,
    "same": Same,
    "thresholds": Thresholds,
}
_NAMES = {kind: name for name, kind in KINDS.items()}


def saved(value: object) -> dict[str, Any] | None:
    """A value as JSON, None where it is of none of the `KINDS`."""
    name = _NAMES.get(type(value))
    if name is None:
        return None
    return {"kind": name} | {one.name: _to_json(getattr(value, one.name)) for one in fields(value)}  # type: ignore[arg-type]


def restored(document: Mapping[str, Any]) -> StatisticValue:
    """The value of which `saved` gave the document."""
    given = {name: _from_json(one) for name, one in document.items() if name != "kind"}
    value: StatisticValue = KINDS[document["kind"]](**given)
    return value


def _to_json(one: Any) -> Any:
    if isinstance(one, np.ndarray):
        data = b64encode(np.ascontiguousarray(one).tobytes()).decode()
        return {"array": data, "dtype": one.dtype.str, "shape": one.shape}
    if isinstance(one, Mapping):
        return {"items": [[_to_json(key), _to_json(held)] for key, held in one.items()]}
    if isinstance(one, list | tuple):
        return [_to_json(part) for part in one]
    if isinstance(one, np.generic):
        return one.item()
    return one


def _from_json(one: Any) -> Any:
    if isinstance(one, list):
        return [_from_json(part) for part in one]
    if not isinstance(one, dict):
        return one
    if "items" in one:
        return {_from_json(key): _from_json(held) for key, held in one["items"]}
    array = np.frombuffer(b64decode(one["array"]), np.dtype(one["dtype"]))
    return array.reshape(one["shape"]).copy()
