"""Running reward functions with a time limit, and asynchronously."""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class TooLong(BaseException):
    """The time limit is over. It is not an Exception, because a reward function may catch those."""


def within(seconds: float | None, call: Callable[[], _T]) -> _T:
    """What `call` returns. Raises TooLong if it takes more than `seconds`."""
    if seconds is None:
        return call()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and hasattr(signal, "setitimer"):
        return _within_by_signal(seconds, call)
    return _within_by_thread(seconds, call)


def _within_by_signal(seconds: float, call: Callable[[], _T]) -> _T:
    """Interrupts even a regular expression that never ends, which another thread cannot do."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _within_by_thread(seconds: float, call: Callable[[], _T]) -> _T:
    """Leaves the thread behind when the time is over: it cannot be stopped."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError as error:
        if done.done():
            raise  # the function's own
        raise TooLong from error


def started(call: Callable[[], Awaitable[_T]]) -> Future[_T]:
    """Starts what is awaited, on a thread of its own that all calls share."""

    async def run() -> _T:
        return await call()

    return asyncio.run_coroutine_threadsafe(run(), _event_loop())


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole run: the clients that reward functions keep belong to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run_on, args=(loop,), name="cppo rewards", daemon=True).start()
    return loop


def _run_on(loop: asyncio.AbstractEventLoop) -> None:
    """Runs the loop though a function exits: its caller, who waits for it, gets the same error."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue
