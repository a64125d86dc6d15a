"""A folder that PEFT saved: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.adapters.config import LoraConfig, read_config
from streammerge.adapters.faults import listed
from streammerge.errors import BadInput, InputMissing, Problems, StreammergeError
from streammerge.storage.header import Header, read_header
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


def open_adapter(path: Path, name: str) -> AdapterFolder:
    """Open an adapter's folder: its config and the header of its tensors, no tensor byte.

    `name` is what the recipe calls it. Raises InputMissing when the folder or one of its two files
    is not there, BadInput when it is no LoRA adapter, asks for more than plain LoRA or is damaged,
    and Refused when several things are wrong.
    """
    held = _names_in(path)
    if CONFIG not in held:
        raise _no_config(path, held)
    problems = Problems()
    config = read_config(path / CONFIG, problems)
    header = _read_weights(path, held, problems)
    problems.raise_any()
    assert config is not None and header is not None  # else there was a problem
    notes = tuple(note for field, note in _TRAINING_ONLY.items() if field in config.ignored)
    return AdapterFolder(path, name, header, config, notes)


def _read_weights(path: Path, held: list[str], problems: Problems) -> Header | None:
    try:
        if WEIGHTS not in held and PICKLE in held:
            raise BadInput(
                "the adapter is a pickle, which can run code and is not opened",
                where=str(path),
                found=PICKLE,
                expected=WEIGHTS,
                remedy="convert it where you trust it: PeftModel.from_pretrained(base, folder)"
                ".save_pretrained(folder) writes safetensors",
            )
        return read_header(path / WEIGHTS)
    except StreammergeError as problem:
        problems.add(problem)
        return None


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


def _no_config(path: Path, held: list[str]) -> StreammergeError:
    """Why there is no adapter here: it is a level further down, a full model, or incomplete."""
    inner = [name for name in held if os.path.isfile(path / name / CONFIG)]
    if inner:
        return InputMissing(
            "this folder is no adapter, but holds some",
            where=str(path),
            found=listed([f"{name}/" for name in inner]),
            expected=f"{CONFIG} and {WEIGHTS} in the folder itself",
            remedy=f"name one of them, such as {path / inner[-1]}",
        )
    if "config.json" in held:
        return BadInput(
            "this is a full model, not an adapter",
            where=str(path),
            found="config.json",
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
