"""The text of a recipe's file, whatever lies at that path."""

from __future__ import annotations

from pathlib import Path

from streammerge.errors import ConfigError, InputMissing, Problems, StorageError

# Nobody writes a recipe of a megabyte; but a shard of gigabytes may be named by mistake.
MOST_BYTES = 1 << 20


def read_text(path: Path, problems: Problems) -> str | None:
    """The text, without a byte order mark; None and one problem when there is none to be had."""
    try:
        return _decoded(_bytes(path), path)
    except (ConfigError, InputMissing, StorageError) as problem:
        problems.add(problem)
        return None


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissing(
            "there is no such recipe",
            where=str(path),
            found=f"no file {path.absolute()}",
            expected="a YAML file",
            remedy="check the path, or give --base, --adapter and --method instead of a file",
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            "a folder was given as the recipe",
            where=str(path),
            found="a folder",
            expected="a YAML file",
            remedy="name the file in it; a model's folder is given as `base_model` or with --base",
        ) from None
    except OSError as error:
        raise StorageError(
            "the recipe cannot be read",
            where=str(path),
            found=error.strerror,
            remedy="check the file's permissions and its disk",
        ) from error


def _decoded(data: bytes, path: Path) -> str:
    if len(data) > MOST_BYTES:
        raise ConfigError(
            "the file is too large to be a recipe",
            where=str(path),
            found="more than 1 MiB",
            expected="a YAML file of some lines",
            remedy="name the recipe's file, not a model's",
        )
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the recipe is not UTF-8 text",
            where=str(path),
            found=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            expected="UTF-8",
            remedy="save the file as UTF-8",
        ) from None
