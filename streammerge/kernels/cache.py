"""Where numba keeps what it compiled: a place that can be written, chosen before numba starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def _candidates() -> list[Path]:
    places = [os.environ.get(name) for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")]
    chosen = [Path(place) for place in places if place]
    if home := os.environ.get("HOME"):
        chosen.append(Path(home) / ".cache")
    if cache := os.environ.get("STREAMMERGE_CACHE"):  # --cache: on clusters HOME may be read-only
        chosen.append(Path(cache))
    return [place / "streammerge" / "kernels" for place in chosen]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# None where no place can be written: the kernels are then compiled anew in each process.
FOLDER: Path | None = next((place for place in _candidates() if _writable(place)), None)
CACHED = FOLDER is not None

if FOLDER is not None:
    os.environ["NUMBA_CACHE_DIR"] = str(FOLDER)
