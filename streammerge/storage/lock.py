"""One process at a time in a folder: by `flock`, or by a file of its own where there is none.

The kernel lets go of a `flock` when its owner dies. Some network file systems have none; there a
file that only one process can create names its owner, so that one left by a dead process of this
machine is known for what it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from dataclasses import asdict
from pathlib import Path

from streammerge.errors import OutputRefused
from streammerge.storage.owner import Owner

_LOCK = "lock"
_OWNER = "owner"
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Lock:
    """Holds a folder for this process, creating the folder if need be, until `release`."""

    def __init__(self, folder: Path) -> None:
        """Raises `OutputRefused` where another process has it, OSError where nobody can."""
        self._folder = folder
        self._descriptor: int | None = None
        while not self._take():
            pass

    def _take(self) -> bool:
        """Whether it was taken; False: its owner removed the folder meanwhile, so try again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_FLOCK:
                return self._create_owner()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._taken(Owner.read(self._folder / _OWNER)) from error
            raise
        if not _is_still(path, descriptor):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        (self._folder / _OWNER).write_text(json.dumps(asdict(Owner.this())))
        return True

    def _create_owner(self) -> bool:
        path = self._folder / _OWNER
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileExistsError as error:
            owner = Owner.read(path)
            if owner is None or not owner.is_dead():
                raise self._taken(owner) from error
            self._put_aside(path, owner)
            return False
        except FileNotFoundError:
            return False
        with open(descriptor, "w") as file:
            json.dump(asdict(Owner.this()), file)
        return True

    def _put_aside(self, path: Path, dead: Owner) -> None:
        """Remove a dead process's file. Another may have done so, and put its own there."""
        aside = path.with_name(f"{_OWNER}.{os.getpid()}")
        os.rename(path, aside)
        if Owner.read(aside) != dead:
            os.rename(aside, path)
            raise self._taken(Owner.read(path))
        aside.unlink()

    def _taken(self, owner: Owner | None) -> OutputRefused:
        remedy = "wait for it, or choose another --out"
        if owner and owner.host != socket.gethostname():
            remedy += f"; if that process is gone, remove {self._folder / _OWNER}"
        return OutputRefused(
            "another process is writing this output",
            where=str(self._folder),
            found=str(owner) if owner else None,
            remedy=remedy,
        )

    def release(self) -> None:
        """Let go, once; what is left of the folder is for the next."""
        if self._descriptor is None:
            (self._folder / _OWNER).unlink(missing_ok=True)
        else:
            os.close(self._descriptor)

    def remove_folder(self) -> None:
        """Empty the folder, its lock last of all, remove it, and let go."""
        mine = (self._folder / _OWNER, self._folder / _LOCK)
        try:
            for entry in self._folder.iterdir():
                if entry in mine:
                    continue
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for path in mine:
                path.unlink(missing_ok=True)
            self._folder.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise  # else another process has just put its lock there: the folder is its own now
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)


def perhaps_at_work(folder: Path) -> Owner | None:
    """Who may be holding a folder, told without a try to take it; None where nobody is."""
    owner = Owner.read(folder / _OWNER)
    return None if owner is None or owner.is_dead() or owner == Owner.this() else owner


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
