"""A process, told apart from any other that ever had its number."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    """Who made something on disk: `boot` and `started` tell processes of one number apart."""

    host: str
    boot: str  # the kernel's own name of this start of the machine
    pid: int
    started: str  # clock ticks since boot

    @staticmethod
    def this() -> Owner:
        """The process that asks."""
        boot = _read("/proc/sys/kernel/random/boot_id")
        return Owner(socket.gethostname(), boot, os.getpid(), _started(os.getpid()))

    @staticmethod
    def read(path: Path) -> Owner | None:
        """Whom a file names; None where that cannot be read, as while it is being written."""
        try:
            return Owner(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def is_here(self) -> bool:
        """Whether it is of this machine, so that something can be said of it."""
        return self.host == socket.gethostname()

    def is_dead(self) -> bool:
        """Whether it cannot be running any more. Of another machine nobody can tell."""
        here = Owner.this()
        if self.host != here.host:
            return False
        return self.boot != here.boot or _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""  # no such process, or no /proc


def _started(pid: int) -> str:
    """When a process started; empty when there is none of that number."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""
