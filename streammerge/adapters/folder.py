"""A folder that PEFT saved: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.adapters.config import LoraConfig, read_config
from streammerge.adapters.faults import listed
from streammerge.errors import BadInput, InputMissing, Problems, StreammergeError
from streammerge.storage.folder import CONFIG as MODEL_CONFIG
from streammerge.storage.header import Header, read_headers
from streammerge.storage.pickles import WAY_OUT, Pickles
from streammerge.storage.smallfile import unreadable

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PICKLE: Final = "adapter_model.bin"

_TRAINING_ONLY: Final = {
    "velora_config": "trained with VeLoRA, which changed the backward pass only",
    "monteclora_config": "trained with MonteCLoRA; merged without its sampling, as PEFT merges it",
}


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A LoRA adapter on disk: what its config says, and where its tensors lie."""

    path: Path
    name: str
    header: Header
    config: LoraConfig
    notes: tuple[str, ...]  # one line each, for the plan


def open_adapter(
    path: Path,
    name: str,
    pickles: Pickles | None = None,
    *,
    assume_residual_base: bool = False,
) -> AdapterFolder:
    """Open an adapter's folder: its config and the header of its tensors, no tensor byte.

    `name` is what the recipe calls it, and `assume_residual_base` its word that the base is the one
    which the adapter's initialisation left behind; `pickles` is the leave to look into
    adapter_model.bin where that is all there is. Where the folder is the parent of one adapter, as
    trainers and PEFT's named adapters leave it, that one is opened. Raises InputMissing when the
    folder or one of its two files is not there, BadInput when it is no LoRA adapter, asks for more
    than can be merged or is damaged, and Refused when several things are wrong.
    """
    given, path = path, find_adapter(path)
    problems = Problems()
    config = read_config(path / CONFIG, problems, assume_residual_base=assume_residual_base)
    header = read_weights(path, pickles, problems)
    problems.raise_any()
    assert config is not None and header is not None  # else there was a problem
    notes = [note for field, note in _TRAINING_ONLY.items() if field in config.ignored]
    notes += _about_base(config, assume_residual_base)
    if path != given:
        notes.insert(0, f"found in {path.relative_to(given)}/ of the folder that is named")
    return AdapterFolder(path, name, header, config, tuple(notes))


def _about_base(config: LoraConfig, assume_residual_base: bool) -> list[str]:
    """What `assume_residual_base` does, where it stands."""
    if not assume_residual_base:
        return []
    if config.residual:
        fields = ", ".join(config.residual)
        return [f"{fields}: training changed its base, and the recipe says that this is that one"]
    return ["assume_residual_base has no effect: its initialisation leaves the base as it is"]


def find_adapter(path: Path) -> Path:
    """The folder that holds the adapter: the given one, else the only one up to two levels down.

    Raises InputMissing or BadInput when there is none, or when there are several to choose from.
    """
    held = _names_in(path)
    if CONFIG in held:
        return path
    inner = [] if MODEL_CONFIG in held else list(_adapters_below(path, held))
    if len(inner) != 1:
        raise _no_config(path, held, inner)
    return path / inner[0]


def _adapters_below(path: Path, held: list[str], levels: int = 2) -> Iterator[str]:
    """Names of folders with an adapter's config, relative to `path`; none within another one."""
    for name in held:
        if os.path.isfile(path / name / CONFIG):
            yield name
        elif levels > 1 and not name.startswith(".") and os.path.isdir(path / name):
            further = _adapters_below(path / name, _names_in(path / name), levels - 1)
            yield from (f"{name}/{below}" for below in further)


def read_weights(path: Path, pickles: Pickles | None, problems: Problems) -> Header | None:
    """The table of an adapter's tensors; None when there is a problem with it."""
    held = _names_in(path)
    pickled = WEIGHTS not in held and PICKLE in held
    if pickled and pickles is None:
        problems.add(
            BadInput(
                "the adapter is a pickle, which can run code and is not opened",
                where=str(path),
                found=PICKLE,
                expected=WEIGHTS,
                remedy="convert it where you trust it: PeftModel.from_pretrained(base, folder)"
                f".save_pretrained(folder) writes safetensors; {WAY_OUT}",
            )
        )
        return None
    read = pickles.read if pickles and pickled else read_headers
    return next(iter(read([path / (PICKLE if pickled else WEIGHTS)], problems)), None)


def _names_in(path: Path) -> list[str]:
    """What a folder holds, numbered names in the order of their numbers."""
    try:
        return sorted(os.listdir(path), key=_by_number)
    except NotADirectoryError as error:
        raise BadInput(
            "an adapter is a folder, not a file",
            where=str(path),
            remedy=f"name the folder that holds {CONFIG} and {WEIGHTS}: {path.parent}",
        ) from error
    except (OSError, ValueError) as error:
        raise unreadable(str(path), error) from error


def _by_number(name: str) -> tuple[str, int]:
    """Sorts checkpoint-500 before checkpoint-1000, so that the last one is the latest."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def _no_config(path: Path, held: list[str], inner: list[str]) -> StreammergeError:
    """Why there is no adapter here: there are several below, a full model, or it is incomplete."""
    if inner:
        return InputMissing(
            "this folder is no adapter, but holds several",
            where=str(path),
            found=listed([f"{name}/" for name in inner]),
            expected=f"{CONFIG} and {WEIGHTS} in the folder itself, or in one folder below it",
            remedy=f"name one of them, such as {path / inner[-1]}",
        )
    if MODEL_CONFIG in held:
        return BadInput(
            "this is a full model, not an adapter",
            where=str(path),
            found=MODEL_CONFIG,
            expected=f"{CONFIG} and {WEIGHTS}",
            remedy="list it under `models`",
        )
    return InputMissing(
        f"the folder has no {CONFIG}",
        where=str(path),
        found=listed(held) or "an empty folder",
        expected=f"{CONFIG}, which holds the scale of the update, and {WEIGHTS}",
        remedy="copy the whole folder that PEFT saved",
    )
