"""SIGINT and SIGTERM ask a run to stop; it does so where everything can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The terminal sends Ctrl-C to every process, and a launcher passes it on to them once more.
_SAME_WISH_SECONDS = 3.0


class Stopped(BaseException):
    """The run was asked to stop, and is at a place where it can.

    It is not an Exception, because a reward function may catch those.
    """


class Stopping:
    """Whether the run was asked to stop.

    Args:
        is_main: whether this process says that it has heard a signal.
    """

    def __init__(self, *, is_main: bool) -> None:
        self.signal: signal.Signals | None = None
        self._is_main = is_main
        self._at = 0.0
        self._may_break = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over, in the main thread; elsewhere nothing changes.

        A second signal ends the process at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal = None
        # A signal that was ignored when this process started stays ignored.
        heard = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
        before = {one: signal.signal(one, self._hear) for one in heard}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """What runs here may be broken off at any place, and is done again from its beginning.

        Raises: Stopped, also at the end: what ran may have caught it, as an `except:` does.
        """
        self.check()
        self._may_break = True
        try:
            yield
        finally:
            self._may_break = False
        self.check()

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What runs here, within `breaking`, is not broken off."""
        before, self._may_break = self._may_break, False
        try:
            yield
        finally:
            self._may_break = before

    def check(self) -> None:
        """Raises Stopped if a signal came."""
        if self.signal is not None:
            raise Stopped

    def _hear(self, number: int, frame: FrameType | None) -> None:
        is_launched = "TORCHELASTIC_RUN_ID" in os.environ
        if self.signal is not None:
            if is_launched and time.monotonic() - self._at < _SAME_WISH_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal, self._at = signal.Signals(number), time.monotonic()
        if self._is_main:
            words = f"\n{self.signal.name}: a checkpoint is written; the same again ends at once\n"
            with suppress(OSError):  # nobody may be reading any more
                os.write(2, words.encode())  # print may be what was interrupted
        if self._may_break:
            raise Stopped
