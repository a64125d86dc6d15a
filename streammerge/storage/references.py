"""From what a recipe calls a model to the folder that holds it; nothing is ever downloaded.

The layout of the Hugging Face cache, and the variables that place it, are those of huggingface_hub:
`models--org--name/refs/<revision>` holds a commit, `snapshots/<commit>` its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from streammerge.errors import ConfigError, InputMissing
from streammerge.storage.smallfile import bad, read_small, show

# A repository's id as the hub allows it: `name` or `org/name`.
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[\w.-]+(?:/[\w.-]+)*", re.ASCII)
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")


def resolve(text: str, revision: str | None, folders: Sequence[Path]) -> Path:
    """The existing folder that a model reference means.

    `text` is a path, absolute, below `~` or relative to one of `folders`, or else the id of a model
    in the local Hugging Face cache, at `revision` (a branch, tag or full commit; default main).
    Raises `ConfigError` where two folders fit or a revision is given for a path, `InputMissing`
    where none does, saying where was looked.
    """
    if not text:
        raise ConfigError("a model reference is empty", remedy="give a folder or a hub id")
    tried = _candidates(text, folders)
    found = [path for path in tried if os.path.isdir(path)]
    if found:
        _check_one(text, found)
        if revision is not None:
            raise ConfigError(
                f"{show(text)} is a local folder, which has no revisions",
                found=f"revision {show(revision)}",
                remedy="leave the revision out, or rename the folder if the hub's model is meant",
            )
        return found[0]
    if files := [path for path in tried if os.path.exists(path)]:
        remedy = f"name the folder that holds it: {files[0].parent}"
        raise bad(str(files[0]), "is not a folder", "a file", "a model folder", remedy)
    if is_hub_id(text):
        return _snapshot(text, revision, tried)
    found_at, remedy = f"nothing at {_list(tried)}", _near(tried) or "check the path"
    raise InputMissing(f"there is no folder {show(text)}", found=found_at, remedy=remedy)


def is_hub_id(text: str) -> bool:
    """Whether the text can be the id of a repository on the Hugging Face hub."""
    return bool(_HUB_ID.fullmatch(text)) and "--" not in text and ".." not in text


def display_name(path: Path) -> str:
    """A name that says nothing of this machine: the last part of the path, or the hub id."""
    whole = os.path.abspath(path)  # gives `.` and `..` a name; follows no link
    snapshot = _SNAPSHOT.search(whole)
    return snapshot[1].replace("--", "/") if snapshot else os.path.basename(whole)


def _candidates(text: str, folders: Sequence[Path]) -> list[Path]:
    # expanduser leaves `~` in place where there is no HOME and no entry for the user.
    expanded = os.path.expanduser(text)
    if os.path.isabs(expanded) or text.startswith("~"):
        return [Path(expanded)]
    return list(dict.fromkeys(folder / text for folder in folders))


def _check_one(text: str, found: Sequence[Path]) -> None:
    if any(not os.path.samefile(found[0], other) for other in found[1:]):
        raise ConfigError(
            f"{show(text)} could mean different folders",
            found=_list(found),
            expected="one folder, relative to the config file or to the working directory",
            remedy="write the absolute path",
        )


def _list(paths: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(os.path.abspath(path) for path in paths))


def _near(tried: Sequence[Path]) -> str:
    """A question after a folder that may be meant by a path that leads nowhere; else nothing."""
    for path in tried:
        beside = [one.name for one in path.parent.glob("*/")] if path.parent.is_dir() else []
        if near := get_close_matches(path.name, beside, 1):
            return f"did you mean {path.parent / near[0]}?"
    return ""


# ------------------------------------------------------------------------------ the hub's cache


def _hub_cache() -> Path:
    """Where huggingface_hub keeps its downloads, by the same variables in the same order."""
    env = os.environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(os.path.expanduser(os.path.expandvars(env[name])))
    cache = env.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = env.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expanduser(os.path.expandvars(home)), "hub")


def _snapshot(text: str, revision: str | None, tried: Sequence[Path]) -> Path:
    cached = _hub_cache() / f"models--{text.replace('/', '--')}"
    commit = _commit(cached, revision or "main")
    if commit and os.path.isdir(cached / "snapshots" / commit):
        return cached / "snapshots" / commit
    download = f"`hf download {text}{f' --revision {revision}' if revision else ''}`"
    near = _near(tried)
    what = f"there is no folder {show(text)}, and the Hugging Face cache does not hold it"
    raise InputMissing(
        what + (f" at revision {show(revision)}" if revision else ""),
        found=f"nothing at {_list([*tried, cached])}",
        remedy=f"{near} Or run {download}" if near else f"check the path, or run {download}",
    )


def _commit(cached: Path, revision: str) -> str | None:
    """The commit that the cache knows a revision by, None when it knows none."""
    if _COMMIT.fullmatch(revision):
        return revision
    parts = revision.split("/")
    if not _REVISION.fullmatch(revision) or ".." in parts or "." in parts:
        remedy = "give a branch, a tag or a full commit"
        raise ConfigError(f"{show(revision)} is no revision of a model", remedy=remedy)
    path = cached / "refs" / revision
    if not os.path.isfile(path):
        return None
    commit = read_small(path, limit=1024).decode("ascii", "replace").strip()
    if not _COMMIT.fullmatch(commit):
        remedy = "delete it and download the model again"
        raise bad(str(path), "holds no commit", show(commit), "40 hexadecimal digits", remedy)
    return commit
