"""The state of an unfinished merge, and how the output appears.

Everything is built in `.<name>.streammerge/` beside the output, or, where the output is an empty
folder that is there already (a mount point), in `.streammerge/` inside it. The output under its
final name is complete or is not there: data sync, journal sync, rename, directory sync.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from streammerge.errors import OutputRefused, StorageError
from streammerge.storage.durable import sync_folder
from streammerge.storage.lock import Lock
from streammerge.storage.record import RECORD, find_record

JOURNAL = "journal"
_OUTPUT = "output"
_APART = "apart"
_INSIDE = ".streammerge"
# What a fresh file system holds at its root.
_NOTHING = frozenset({_INSIDE, "lost+found"})


def check_output(out: Path, *, force: bool, differences: Sequence[str] = ()) -> None:
    """Raise `OutputRefused` unless the output can take that name.

    It may be absent, an empty folder, or one that an unfinished run is about to fill; `force` also
    allows a folder that streammerge made. `differences` set a finished merge that is there apart.
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
    if _awaits(out):
        return
    ours = find_record(out) is not None
    if ours and force:
        if os.path.ismount(out):
            what, remedy = "a mount point cannot be replaced as a whole", "empty it first"
            raise OutputRefused(what, where=str(out), remedy=remedy)
        return
    found = f"a folder without {RECORD}, so not made by streammerge"
    remedy = "choose another --out, or move away what is there: --force leaves it alone"
    if ours:
        remedy = "--force replaces it, or choose another --out"
        damaged = f"a damaged result: `streammerge verify {out}` says what is wrong"
        found = f"the result of another merge: {'; '.join(differences)}" if differences else damaged
    elif (out / RECORD).exists():
        found = f"a {RECORD} that cannot be read: `streammerge verify {out}` says why"
    raise OutputRefused("the output exists", where=str(out), found=found, remedy=remedy)


class RunDirectory:
    """The private folder of one run; one process at a time.

    `keep` says whether it holds anything that the same command could go on from.
    """

    def __init__(self, out: Path, path: Path | None = None) -> None:
        """Create it, or take over what another run left there."""
        self.out = out.absolute()
        self.path = path or state_folder(self.out)
        self.output = self.path / _OUTPUT  # where the output is built
        self.shards = self.output  # and its shards; see `write_apart`
        self.journal = self.path / JOURNAL
        self._replaced = self.path / "replaced"  # where one waits while another takes its name
        self._inside = self.path.parent == self.out
        self._published = False
        try:
            self._lock = Lock(self.path)
        except OSError as error:
            raise self._refused(error) from error
        try:
            self._restore()
            if not (self.journal.exists() and self.output.exists()):
                self._empty()  # nothing was begun, or it was published, or not all was tidied up
        except OSError as error:
            self._lock.release()
            raise self._refused(error) from error
        self.keep = self.journal.exists()

    def _refused(self, error: OSError) -> OutputRefused:
        return OutputRefused(
            f"the output cannot be created: {error.strerror}",
            where=str(self.path),
            remedy="choose an --out in a folder that you can write to",
        )

    def _restore(self) -> None:
        """An output that was being replaced comes back, unless its successor is in place."""
        if self._replaced.exists() and not self.out.exists():
            os.rename(self._replaced, self.out)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def start_over(self, published: Iterable[str] = ()) -> None:
        """Forget what another run left: its journal, its files, and those that it had put in place
        in an output folder that was there before."""
        with self._told("cannot be emptied"):
            for name in published if self._inside else ():
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self._empty()
        self.keep = False

    def _empty(self) -> None:
        for folder in (self.output, self.path / _APART):
            if folder.exists():
                shutil.rmtree(folder)
        self.journal.unlink(missing_ok=True)
        self.output.mkdir()

    def write_apart(self) -> None:
        """Shards are not part of the output as they are first written: they get another folder."""
        self.shards = self.path / _APART
        with self._told("cannot take shards that are to be cut"):
            self.shards.mkdir(exist_ok=True)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all files of a built output are here, or have taken their names already."""
        places = (self.output, self.out) if self._inside else (self.output,)
        return all(any((place / name).exists() for place in places) for name in names)

    def drop(self, path: Path) -> None:
        """Remove a file that is being built, if it is there."""
        with self._told(f"cannot get rid of {path.name}"):
            path.unlink(missing_ok=True)

    def publish(self, last: str) -> None:
        """Give the finished folder its final name. All data is synced.

        Inside an existing folder the files get their names one by one, `last` at the end: without
        it nobody takes the folder for a model.
        """
        try:
            sync_folder(self.output)
            if self._inside:
                self._move_in(last)
            else:
                self._rename()
        except OSError as error:
            raise StorageError(
                f"the finished output cannot take its name: {error.strerror}",
                where=str(self.out),
                remedy="make sure that its folder can be written to, then run the command again",
            ) from error
        self._published = True

    def _rename(self) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            os.rename(self.out, self._replaced)
        os.rename(self.output, self.out)  # an empty folder of that name gives way
        sync_folder(self.out.parent)

    def _move_in(self, last: str) -> None:
        names = sorted(os.listdir(self.output), key=lambda name: (name == last, name))
        taken = [name for name in names if os.path.lexists(self.out / name)]
        if taken:
            what, remedy = "others have put files into the output folder", "move them elsewhere"
            found = ", ".join(taken)
            raise OutputRefused(what, where=str(self.out), found=found, remedy=remedy)
        for name in names:
            if name == last:
                sync_folder(self.out)
            os.rename(self.output / name, self.out / name)
        sync_folder(self.out)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Remove the state, unless the same command can go on from it."""
        resumable = error is not None and getattr(error, "resumable", True)
        done = "the output is complete, and" if self._published else "the merge has failed, and"
        silent = suppress(StorageError) if error else nullcontext()  # which says more than this
        with silent, self._told(f"{done} its state cannot be removed"):
            self._restore()
            if self.keep and resumable and not self._published:
                self._lock.release()
            else:
                self._lock.remove_folder()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What the system refuses, as an error that says what it was for."""
        try:
            yield
        except OSError as error:
            remedy = "check the disk and who may write there, then run the command again"
            text = f"{what}: {error.strerror}"
            raise StorageError(text, where=str(self.path), remedy=remedy) from error


def clear_state(out: Path) -> Path | None:
    """Remove what a run left that was killed between publishing and tidying up.

    A merge that is half done, which was to replace the output, can be gone on with: its folder
    stays, and is returned.
    """
    whole = out.absolute()
    for folder in (_beside(whole), whole / _INSIDE):
        built = folder / _OUTPUT
        half_done = (folder / JOURNAL).exists() and built.exists() and any(built.iterdir())
        if half_done:
            return folder
        if folder.exists():
            with RunDirectory(out, folder):
                pass
    return None


def _beside(out: Path) -> Path:
    return out.parent / f".{out.name}.streammerge"


def state_folder(out: Path) -> Path:
    """Beside the output; inside it where that is an empty folder, which may be a mount point."""
    whole = out.absolute()
    beside = _beside(whole)
    inside = not beside.exists() and whole.is_dir() and _awaits(whole)
    return whole / _INSIDE if inside else beside


def _awaits(out: Path) -> bool:
    """Whether a folder is empty, or about to be filled by a run whose state is inside."""
    try:
        return {*os.listdir(out)} <= _NOTHING or (out / _INSIDE / _OUTPUT).is_dir()
    except OSError as error:
        what, remedy = f"the output cannot be read: {error.strerror}", "choose another --out"
        raise OutputRefused(what, where=str(out), remedy=remedy) from error
