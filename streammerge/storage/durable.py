"""Small files and names, made to survive the machine."""

from __future__ import annotations

import os
from pathlib import Path

from streammerge import system
from streammerge.errors import StorageError


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and make it durable."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
        try:
            system.write_all(descriptor, data, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            remedy="free space on that disk, then run the command again",
        ) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: those of files that were created or renamed there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(
            f"the names in it cannot be made durable: {error.strerror}",
            where=str(path),
            remedy="check the disk, then run the command again",
        ) from error
