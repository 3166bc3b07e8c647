"""Equality by algebra: math-verify, in a process of its own.

Sampled text can make sympy run for ever or fill the memory (`10^{10^{10}}`), and Python can stop
neither in a thread. So each process of the run has one worker process. It is started when it is
first needed, answers many questions, and is replaced when it dies. It ends itself at the time
limit, at its memory limit and when its input ends, as it does however the parent ends.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

# Comparisons of one call that may reach their time limit, because a batch of hostile answers would
# take its size times the limit. The answers that are left then are not compared and get no verdict:
# an answer must not be wrong because of its neighbours. Those that may be hostile (towers of
# powers, large powers, factorials) come last, so that this is rare.
MOST_TIMEOUTS = 5
_RISK = re.compile(r"\^.{0,20}\^|\^\{?\d{3}|!|\\binom")
_SCRIPT = Path(__file__).with_name("symbolic_worker.py")


def require_math_verify(what: str) -> None:
    """Raise ImportError with the words to install it, if math-verify cannot be imported."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"cppo.rewards.{what}: needs the package math-verify: pip install 'cppo[math]'"
        ) from error


def equal_pairs(
    pairs: Iterable[tuple[str, str]], seconds: float
) -> dict[tuple[str, str], bool | None]:
    """Return whether math-verify finds a truth and an answer equal, for each pair.

    Args:
        pairs: formulas without delimiters, in the spelling of `latex.plain`.
        seconds: the time for one pair; a pair that takes longer is not equal. After MOST_TIMEOUTS
            of these no further pair is compared.
    Returns: {pair: verdict}; None for pairs that were not compared, and a warning says how many.
    Raises: RuntimeError if the worker cannot be started.
    """
    by_truth: dict[tuple[bool, str], list[str]] = {}
    for truth, answer in dict.fromkeys(pairs):
        is_risky = _RISK.search(truth) or _RISK.search(answer)
        by_truth.setdefault((bool(is_risky), truth), []).append(answer)
    equal: dict[tuple[str, str], bool | None] = {}
    timeouts = 0

    def ask(*question: str) -> bool | None:
        nonlocal timeouts
        if timeouts == MOST_TIMEOUTS:
            return None
        verdict = _worker.ask(seconds, *question)
        timeouts += verdict is None
        return verdict or False

    for _, truth in sorted(by_truth, key=lambda key: key[0]):
        can_be_read = ask(truth)
        for answer in by_truth[_, truth]:
            equal[truth, answer] = can_be_read and ask(truth, answer)
    if None in equal.values():
        warnings.warn(
            f"cppo.rewards.math_verify: {list(equal.values()).count(None)} of {len(equal)} answers "
            f"were not compared and have no reward, as {timeouts} took longer than {seconds} s",
            stacklevel=4,
        )
    return equal


class _Worker:
    """The worker process of this process, which one thread asks at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, seconds: float, truth: str, *answer: str) -> bool | None:
        """Whether an answer equals the truth, or, without one, whether the truth can be read.

        None if the worker dies of it, as it does at the time limit.
        """
        with self._lock:
            try:
                # One that has died since, or makes room for a new one, does not take the question.
                for _ in range(3):
                    self._start()
                    self._send([seconds, truth, *answer])
                    if self._read_line() == "taken":
                        verdict = self._read_line()
                        if verdict:
                            return verdict == "1"
                        break
                    self.stop()
                self.stop()
                return None
            except BaseException:
                self.stop()  # an interrupted worker would answer the next question with this one's
                raise

    def _start(self) -> None:
        """Start the worker if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the same verdict in every run
        )
        self._send([place for place in sys.path if isinstance(place, str)])
        reply = self._read_line()
        if reply != "ready":
            reason = reply or "it gives no reason"
            raise RuntimeError(f"cppo.rewards.math_verify: its process does not start: {reason}")

    def _send(self, message: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        except BrokenPipeError:
            pass  # it has died: no reply will come

    def _read_line(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().decode(errors="replace").strip()

    def stop(self) -> None:
        """End the worker, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.forget()

    def forget(self) -> None:
        """Close this process's ends of the pipes and begin again without a worker."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def after_fork(self) -> None:
        """Begin again in a forked child, in which no thread holds the lock."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0  # nothing to wait for: it is the parent's child
        self.forget()


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.after_fork)
