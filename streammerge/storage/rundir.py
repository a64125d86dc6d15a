"""The state of an unfinished merge, beside its output, and how the output appears.

Everything is built in `.<name>.streammerge/` next to the output. The output under its final name
is complete or is not there: data sync, journal sync, rename, directory sync.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

from streammerge.errors import OutputRefused, StorageError
from streammerge.storage.record import RECORD, find_record

JOURNAL = "journal"
_LOCK = "lock"
_OUTPUT = "output"


def check_output(out: Path, *, force: bool) -> None:
    """Raise `OutputRefused` unless the output can take that name.

    It may be absent or an empty folder; `force` also allows a folder that streammerge made.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        kind = "a symbolic link" if out.is_symlink() else "a file"
        raise OutputRefused(
            "the output exists and is no folder",
            where=str(out),
            found=kind,
            remedy="choose another --out",
        )
    if not any(out.iterdir()):
        return
    ours = find_record(out) is not None
    if ours and force:
        return
    found = "the result of another merge" if ours else f"a folder without {RECORD}"
    remedy = "--force replaces it, or choose another --out" if ours else "choose another --out"
    raise OutputRefused("the output exists", where=str(out), found=found, remedy=remedy)


class RunDirectory:
    """The private folder of one run; one process at a time."""

    def __init__(self, out: Path) -> None:
        """Create it, or take over what a dead run left: an unfinished merge starts over."""
        self._out = out.absolute()
        self.path = _state_folder(out)
        try:
            self._lock = self._take_lock()
            self._restore()
            if (self.path / _OUTPUT).exists():
                shutil.rmtree(self.path / _OUTPUT)
            self.journal.unlink(missing_ok=True)
            self.output = self.path / _OUTPUT
            self.output.mkdir()
        except OSError as error:
            raise OutputRefused(
                f"the output cannot be created: {error.strerror}",
                where=str(self.path),
                remedy="choose an --out in a folder that you can write to",
            ) from error

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    @property
    def _replaced(self) -> Path:
        """Where an output waits while another takes its name."""
        return self.path / "replaced"

    def _take_lock(self) -> int:
        """A descriptor that holds the lock. The kernel lets go of it when the process dies."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise OutputRefused(
                    "another process is writing this output",
                    where=str(self.path),
                    remedy="wait for it, or choose another --out",
                ) from error
            if _is_still(self.path / _LOCK, lock):
                return lock
            os.close(lock)  # its owner finished and removed the folder between open and lock

    def _restore(self) -> None:
        """An output that was being replaced comes back, unless its successor is in place."""
        if self._replaced.exists() and not self._out.exists():
            os.rename(self._replaced, self._out)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def publish(self) -> None:
        """Give the finished folder its final name. All data is synced."""
        try:
            _sync_folder(self.output)
            if self._out.exists() and any(self._out.iterdir()):
                os.rename(self._out, self._replaced)
            os.rename(self.output, self._out)  # an empty folder of that name gives way
            _sync_folder(self._out.parent)
        except OSError as error:
            raise StorageError(
                f"the finished output cannot take its name: {error.strerror}",
                where=str(self._out),
                remedy="make sure that its folder can be written to, then run the command again",
            ) from error

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the state: what an unfinished merge wrote is of no use, since it starts over."""
        self._restore()
        try:
            shutil.rmtree(self.path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise  # else another process has just put its lock there: the folder is its own now
        finally:
            os.close(self._lock)


def clear_state(out: Path) -> None:
    """Remove what a run left that was killed between publishing and tidying up."""
    if _state_folder(out).exists():
        with RunDirectory(out):
            pass


def _state_folder(out: Path) -> Path:
    """`.<name>.streammerge` beside the output."""
    whole = out.absolute()
    return whole.parent / f".{whole.name}.streammerge"


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and make it durable."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            remedy="free space on that disk, then run the command again",
        ) from error
