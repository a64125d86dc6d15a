"""Signals that ask a merge to stop: it takes no new tiles, keeps what is done, and exits.

What batch systems and terminals send: SIGTERM, SIGINT, SIGUSR1, SIGHUP. A second one ends the
process at once, and so does time: whoever sends them will not wait for long.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from streammerge.errors import Interrupted

GRACE_SECONDS = 8.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Signals:
    """Inside `with`, signals are taken note of; `stopped` is for the main loop to ask.

    Before it first asks there is nothing to keep, and a signal raises KeyboardInterrupt.
    """

    def __init__(self, again: str) -> None:
        """`again` is the command line that goes on from what is done."""
        self._again = again
        self._first: str | None = None
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}
        self._timer = threading.Timer(GRACE_SECONDS, self._leave)
        self._timer.daemon = True

    def stopped(self) -> str | None:
        """The name of the signal that asked to stop, once one did."""
        self._asked = True
        return self._first

    def __enter__(self) -> Signals:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._first is not None:
            self._leave()
        self._first = signal.Signals(number).name
        self._timer.start()
        if not self._asked:
            raise KeyboardInterrupt

    def _leave(self) -> None:
        """End the process now. What the journal holds survives it, and the rest is done again."""
        text = f"stopped by {self._first}, without waiting; to go on, run\n    {self._again}\n"
        os.write(2, text.encode("utf-8", "backslashreplace"))
        os._exit(Interrupted.exit_code)
