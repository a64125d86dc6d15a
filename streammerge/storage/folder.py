"""A Hugging Face model folder, headers only: which files hold it, and what is wrong with them.

The weights are one `model.safetensors`, or shards that `model.safetensors.index.json` lists
(https://huggingface.co/docs/transformers/big_models). Whatever is wrong is said at once.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from streammerge.errors import BadInput, InputMissing, Problems, StreammergeError
from streammerge.storage.header import Header, read_headers
from streammerge.storage.pickles import WAY_OUT, Pickles
from streammerge.storage.smallfile import REPAIR, bad, parse_json, read_small, show, unreadable
from streammerge.storage.ties import find_ties
from streammerge.words import FLOAT_NAMES, DType, Extent

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = f"{SINGLE}, or {INDEX} and its shards"
_SAFE_STEM = re.compile(r"[^/\\\x00-\x1f\x7f]{1,240}")
_REINDEX = "download the folder again, or save the model again so that index and shards agree"


@dataclass(frozen=True, slots=True)
class _Kind:
    """A way to store a model's weights: what its files are called, and who reads their headers."""

    single: str  # alone, or else the shards that the index lists
    index: str
    suffix: str
    shard: re.Pattern[str]  # their usual names


_SAFETENSORS = _Kind(
    SINGLE,
    INDEX,
    ".safetensors",
    re.compile(r"model-\d{5}-of-\d{5}\.safetensors"),
)

_PICKLES = _Kind(
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    ".bin",
    re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"),
)


class FolderTensors(Mapping[str, Extent]):
    """The tensors of all shards, in shard order, then in file order; those that are read last.

    `reads` names tensors that are the same as others: a tied head is read from its embedding.
    """

    __slots__ = ("_names", "_tables")

    def __init__(self, shards: Sequence[Header], reads: Mapping[str, str] | None = None) -> None:
        self._tables = {name: shard.tensors for shard in shards for name in shard.tensors}
        self._names = {n: of for n, of in (reads or {}).items() if n not in self._tables}

    def __getitem__(self, name: str) -> Extent:
        if name in self._names:
            extent = self[self._names[name]]
            return replace(extent, spec=replace(extent.spec, name=name))
        return self._tables[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._tables or name in self._names

    def __iter__(self) -> Iterator[str]:
        yield from self._tables
        yield from self._names

    def __len__(self) -> int:
        return len(self._tables) + len(self._names)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder whose headers were read and found sound; no tensor byte was read."""

    path: Path
    shards: tuple[Header, ...]  # in the order of their file names
    tensors: Mapping[str, Extent]  # a tied head among them, whether it is stored or not
    config: Mapping[str, Any]  # empty when there is no config.json
    notes: tuple[str, ...]  # what is unusual and harmless, one line each
    ties: Mapping[str, str] = field(default_factory=dict)  # tensor -> the one that it seems to be

    def with_head(self, head: str, embedding: str) -> ModelFolder:
        """The same folder, once it is known what its tied head is called."""
        ties = {**self.ties, head: embedding}
        return replace(self, ties=ties, tensors=FolderTensors(self.shards, ties))

    def stored(self, name: str) -> bool:
        """Whether a tensor lies in a file under this name."""
        return any(name in shard.tensors for shard in self.shards)


def open_model(path: Path, pickles: Pickles | None = None) -> ModelFolder:
    """Read the headers, the index and the config of a model folder.

    `pickles` is the leave to look into those of a folder that holds no safetensors.
    Raises `InputMissing` or `BadInput` for one problem, `Refused` for several, each with its file.
    """
    names = list_folder(path)
    kind = _kind(path, names, pickles)
    problems, notes = Problems(), list[str]()
    config = _config(path, names, problems, notes)
    indexed = kind.index in names
    index, weight_map = _index(path, kind, problems) if indexed else ({}, {})
    used = sorted(set(weight_map.values())) if indexed else [kind.single]
    if used:
        _check_leftovers(path, kind, names - set(used), problems, notes)
    read = pickles.read if pickles and kind is _PICKLES else read_headers
    shards = read(_present(path, kind, used, names, problems), problems)
    if weight_map:
        _check_placement(kind, weight_map, shards, problems)
        if kind is _SAFETENSORS and len(shards) == len(used):  # pickles share bytes among tensors
            notes += _total_size_note(index, shards)
    for shard in shards:
        _check_dtypes(shard, problems)
    problems.raise_any()
    ties = find_ties(FolderTensors(shards), config)
    tensors = FolderTensors(shards, ties)
    return ModelFolder(path, tuple(shards), tensors, config, tuple(notes), ties)


def shard_names(count: int) -> tuple[str, ...]:
    """The usual file names of a model in `count` shards."""
    if count == 1:
        return (SINGLE,)
    return tuple(f"model-{shard:05}-of-{count:05}.safetensors" for shard in range(1, count + 1))


# ---------------------------------------------------------------------------- what kind of folder


def holds_model(path: Path) -> bool:
    """Whether anything in a folder says that it is a model's, be it one that cannot be opened."""
    kinds = (_SAFETENSORS, _PICKLES)
    names = [CONFIG, *(name for kind in kinds for name in (kind.single, kind.index))]
    return any(os.path.exists(path / name) for name in names)


def list_folder(path: Path) -> frozenset[str]:
    where = os.fspath(path)
    try:
        return frozenset(os.listdir(path))
    except NotADirectoryError as error:
        remedy = f"name the folder that holds it: {path.parent}"
        raise bad(where, "is not a folder", "a file", "a model folder", remedy) from error
    except FileNotFoundError as error:
        found = (
            f"a link to {os.readlink(path)}, which is gone" if os.path.islink(path) else "nothing"
        )
        remedy = "check the path, or download the model"
        raise InputMissing("no such folder", where=where, found=found, remedy=remedy) from error
    except (OSError, ValueError) as error:
        raise unreadable(where, error) from error


def _kind(path: Path, names: frozenset[str], pickles: Pickles | None) -> _Kind:
    """How the folder's weights are stored; raises when it is not one that holds a model's."""
    where, what = str(path), "is not a model in safetensors"
    if "model_index.json" in names:
        weights = {n: [path / n / file for file in (SINGLE, INDEX)] for n in sorted(names)}
        parts = [name for name, files in weights.items() if any(map(os.path.exists, files))]
        found = "a diffusers pipeline" + (f" of the models {_some(parts)}" if parts else "")
        raise bad(where, what, found, _WEIGHTS, "name the folder of one of its models")
    if INDEX in names or SINGLE in names:
        return _SAFETENSORS
    if pickles and names & {_PICKLES.single, _PICKLES.index}:
        return _PICKLES
    raise _another_kind(where, what, names)


def _another_kind(where: str, what: str, names: frozenset[str]) -> StreammergeError:
    """The error that says what a folder without a model's safetensors is instead."""
    if "adapter_config.json" in names:
        remedy = "name it under `adapters`, and the model it was trained on as `base_model`"
        return bad(where, what, "an adapter", _WEIGHTS, remedy)
    if shards := sorted(filter(_SAFETENSORS.shard.fullmatch, names)):
        remedy = "download the index, or save the model again"
        what, found = f"{INDEX} is missing", _some(shards)
        return InputMissing(what, where=where, found=found, expected=_WEIGHTS, remedy=remedy)
    if pickles := _matching(names, "pytorch_model*.bin"):
        remedy = f"convert it to safetensors, as a pickle can run code; {WAY_OUT}"
        return bad(where, what, _some(pickles), _WEIGHTS, remedy)
    if others := _matching(names, "*.safetensors", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack"):
        remedy = "use the model in the layout of transformers, or convert it to that"
        return bad(where, what, _some(others), _WEIGHTS, remedy)
    found, remedy = _some(sorted(names)) or "nothing", "check the path, or download the model"
    what = "holds no model weights"
    return InputMissing(what, where=where, found=found, expected=_WEIGHTS, remedy=remedy)


def _matching(names: Iterable[str], *patterns: str) -> list[str]:
    return sorted(n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns))


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(show(name).strip("'\"") for name in names[:most]) + more


# --------------------------------------------------------------------------------------- config


def _config(
    path: Path, names: frozenset[str], problems: Problems, notes: list[str]
) -> dict[str, Any]:
    if CONFIG not in names:
        notes.append(f"no {CONFIG}: the output will have none, and will not load by itself")
        return {}
    try:
        config = _read_json(path / CONFIG)
    except StreammergeError as error:
        problems.add(error)
        return {}
    for part in _config_and_parts(config):
        quantised = part.get("quantization_config") or part.get("compression_config")
        if quantised:
            problems.add(_quantised(str(path / CONFIG), quantised))
    return config


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(read_small(path), str(path))


def _config_and_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and the configs nested in it: of the text or vision model, of an encoder."""
    rest = [config]
    while rest:
        part = rest.pop()
        yield part
        rest += [
            value
            for key, value in part.items()
            if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value)
        ]


def output_config(
    config: Mapping[str, Any],
    *,
    dtype: DType | None,
    untied: bool = False,
    vocabulary: int | None = None,
) -> dict[str, Any]:
    """The config of the output: `config` with its dtype keys set, when `dtype` is given.

    Both `dtype` and the older `torch_dtype` are set where they stand, in nested configs too.
    `untied` says that the head has a weight of its own now, and `vocabulary` how many words there
    are now: in the config and in that of the text model in it, whichever of the two counts. A
    decoder within a model that has a config of its own is told, too, that it is untied.
    `_name_or_path` is left out: it may be a path of the machine where the model was trained.
    """
    names = {float_dtype: name for name, float_dtype in FLOAT_NAMES.items()}
    result = copy.deepcopy(dict(config))
    for part in _config_and_parts(result):
        part.pop("_name_or_path", None)
        if dtype is not None:
            part.update({key: names[dtype] for key in ("dtype", "torch_dtype") if key in part})
    text = result.get("text_config")
    if untied:
        inner = (part for part in result.values() if isinstance(part, dict))
        for part in [result, *(one for one in inner if one is text or "vocab_size" in one)]:
            part["tie_word_embeddings"] = False
    for part in [result, *([text] if isinstance(text, dict) else [])]:
        if vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = vocabulary
    return result


# ------------------------------------------------------------------------------ index and shards


def _index(path: Path, kind: _Kind, problems: Problems) -> tuple[dict[str, Any], dict[str, str]]:
    """The index and its weight_map; the map is empty when it is not fit to be followed."""
    where, what = str(path / kind.index), "weight_map names no file of the folder"
    try:
        index = _read_json(path / kind.index)
    except StreammergeError as error:
        problems.add(error)
        return {}, {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        expected = "an object from tensor names to file names"
        problems.add(bad(where, "weight_map is malformed", show(weight_map), expected, REPAIR))
        return index, {}
    # Names are checked as text alone: the files of a hub cache are links that leave the folder.
    unsafe = {show(v) for v in weight_map.values() if not _is_safe_name(v, kind.suffix)}
    for found in sorted(unsafe):
        expected = f"a name that ends in {kind.suffix}, without folders"
        problems.add(bad(where, what, found, expected, REPAIR))
    return index, {} if unsafe else weight_map


def _is_safe_name(value: object, suffix: str) -> bool:
    if not isinstance(value, str) or not value.endswith(suffix):
        return False
    return _SAFE_STEM.fullmatch(value.removesuffix(suffix)) is not None


def _check_leftovers(
    path: Path, kind: _Kind, unused: frozenset[str], problems: Problems, notes: list[str]
) -> None:
    """Other weights of a model are refused: which of the two is meant? Anything else is noted."""
    files = _matching(unused, f"*{kind.suffix}")
    models = [name for name in files if name == kind.single or kind.shard.fullmatch(name)]
    for name in models:
        what, found = "does not belong to the model here", "weights of two models in one folder"
        expected = f"{kind.single} alone, or the shards that {kind.index} lists"
        remedy = "remove what is left of the other model"
        problems.add(bad(str(path / name), what, found, expected, remedy))
    if others := [name for name in files if name not in models]:
        notes.append(f"not read: {_some(others)}")


def _present(
    path: Path, kind: _Kind, files: Sequence[str], names: frozenset[str], problems: Problems
) -> list[Path]:
    what, remedy = f"is listed in {kind.index} and not there", "download the folder again"
    for file in files:
        if file not in names:
            problems.add(InputMissing(what, where=str(path / file), remedy=remedy))
    return [path / file for file in files if file in names]


def _check_placement(
    kind: _Kind, weight_map: Mapping[str, str], shards: Sequence[Header], problems: Problems
) -> None:
    """Each tensor must be in the shard that the index says, in no other, and be listed."""
    counts = Counter(name for shard in shards for name in shard.tensors)
    placed: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        placed.setdefault(file, []).append(name)
    for shard in shards:
        file, held = os.path.basename(shard.path), shard.tensors
        wrong = {
            "holds tensors that another shard holds too": [n for n in held if counts[n] > 1],
            f"holds tensors that {kind.index} does not place there": [
                n for n in held if counts[n] == 1 and weight_map.get(n) != file
            ],
            f"lacks tensors that {kind.index} places there": [
                n for n in placed[file] if n not in held
            ],
        }
        for what, names in wrong.items():
            if names:
                found = f"{len(names)}: {_some(names)}"
                problems.add(bad(shard.path, what, found, "each tensor once", _REINDEX))


def _total_size_note(index: Mapping[str, Any], shards: Sequence[Header]) -> list[str]:
    held = sum(shard.data_bytes for shard in shards)
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is None or stated == held:
        return []
    return [f"{INDEX} states a total_size of {show(stated)} bytes; the shards hold {held}"]


# ------------------------------------------------------------------------------------ quantised

_FLOATS = "weights in F16, BF16, F32 or F64"
_DEQUANTISE = "use the model in its original precision, or dequantise it and save it again"


def _quantised(where: str, quantisation: Any) -> BadInput:
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    found = f"a quantization_config{f' of {show(method)}' if method else ''}"
    what = "the weights are quantised, and codes cannot be merged as numbers"
    return bad(where, what, found, _FLOATS, _DEQUANTISE)


def _check_dtypes(shard: Header, problems: Problems) -> None:
    narrow = {dtype for dtype in shard.tensors.dtypes() if dtype.kind == "float8"}
    if narrow:
        names = [name for name, extent in shard.tensors.items() if extent.spec.dtype in narrow]
        found = f"{len(names)} tensors: {_some(names)}"
        what = "8-bit floats cannot be merged: their scales are not read yet"
        problems.add(bad(shard.path, what, found, _FLOATS, _DEQUANTISE))
