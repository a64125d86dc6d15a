"""The files that an output takes over from its donor: all of a model's folder but the weights."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from streammerge.errors import Problems
from streammerge.storage.folder import list_folder
from streammerge.storage.smallfile import read_small, unreadable

_Name = TypeVar("_Name", str, Path)

_DONATED = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.vocab", "bpe.codes", "*.jinja", "*.py",
    "licen[cs]e*", "copying*", "notice*", "use_policy*",
)  # fmt: skip
# Of the weights' layout, of another format's weights, of training, or of streammerge itself.
_KEPT_BACK = (
    "*.index.json", "model_index.json", "adapter_config.json", "streammerge.json", "params.json",
    "quantize_config.json", "trainer_state.json", "training_args.json", "*_results.json",
    "*.safetensors", "*.bin", ".*",
)  # fmt: skip
# What transformers' tokenizers save, and the chat template with them.
_TOKENIZER = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.spm", "spiece.model", "sentencepiece*.model",
    "*.tiktoken", "bpe.codes", "chat_template*",
)  # fmt: skip
# One of these is enough to make a tokenizer of.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def donated(donor: Path, tokenizer: Path | None = None) -> dict[Path, Path]:
    """Relative name -> where it lies, of every file that an output takes over; sorted.

    With `tokenizer`, a folder, the tokenizer's files and the chat template are those of that one.
    Raises as `donor_files` does.
    """
    given = {name: donor / name for name in donor_files(donor)}
    if tokenizer is not None:
        given = {name: path for name, path in given.items() if not _is_tokenizers(name)}
        own = (name for name in donor_files(tokenizer) if _is_tokenizers(name))
        given |= {name: tokenizer / name for name in own}
    return dict(sorted(given.items()))


def tokenizer_files(folder: Path) -> dict[Path, Path]:
    """Relative name -> where it lies, of a folder's tokenizer; empty when it holds none."""
    names = [name for name in donor_files(folder) if _is_tokenizers(name)]
    complete = any(name.name in _VOCABULARIES for name in names)
    return {name: folder / name for name in names} if complete else {}


def vocabulary_files(folder: Path) -> dict[str, Path]:
    """Name -> where it lies, of the files of a folder that say which tokens there are."""
    names = [str(name) for name in donor_files(folder)]
    return {name: folder / name for name in names if name in _VOCABULARIES}


def contents(files: Mapping[_Name, Path]) -> dict[_Name, bytes]:
    """Name -> what is in the file."""
    return {name: read_small(path) for name, path in files.items()}


def _is_tokenizers(name: Path) -> bool:
    first = name.parts[0].lower()
    return first == "additional_chat_templates" or bool(_matching([first], *_TOKENIZER))


def donor_files(folder: Path) -> tuple[Path, ...]:
    """What an output takes over from its donor, relative to the folder and sorted.

    Config, tokenizer, chat template, preprocessor and licence files, and the code of custom models;
    `config.json` is among them, and the output's is made of it by `output_config`. Never weights,
    the model card or hidden files. Raises `InputMissing` for one that is a dangling link.
    """
    relative = [Path(name) for name in sorted(list_folder(folder)) if _is_donated(name)]
    if os.path.isdir(folder / "additional_chat_templates"):
        templates = _matching(list_folder(folder / "additional_chat_templates"), "[!.]*.jinja")
        relative += [Path("additional_chat_templates", name) for name in templates]
    problems = Problems()
    files = tuple(path for path in sorted(relative) if _is_file(folder / path, problems))
    problems.raise_any()
    return files


def _is_donated(name: str) -> bool:
    lowered = name.lower()
    return bool(_matching([lowered], *_DONATED)) and not _matching([lowered], *_KEPT_BACK)


def _is_file(path: Path, problems: Problems) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        problems.add(unreadable(str(path), error))
        return False


def _matching(names: Iterable[str], *patterns: str) -> list[str]:
    return sorted(n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns))
