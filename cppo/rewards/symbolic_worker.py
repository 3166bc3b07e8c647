"""The process in which math-verify runs: questions in, verdicts out, one per line.

`cppo.rewards.symbolic` runs this file as a script, so that it starts without torch and without the
user's own script. The first line is the parent's module path. Each further one is a question:
[seconds, truth], whether the truth can be read, or [seconds, truth, answer], whether they are
equal. The replies are "taken" and then "1" or "0". The end of the input ends the process.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import logging
import os
import re
import signal
import sys
from typing import Any

STARTING_SECONDS = 300.0
MEMORY = 3 * 2**30  # bytes of addresses
RENEWED_AT = 2**30  # bytes: a process that once held as much makes room for a new one
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_DECIMAL = re.compile(r"-?(\d*)\.(\d+)")


def main() -> None:
    """Serve until the input ends."""
    questions, replies = _take_standard_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    logging.disable()
    _limit_memory()
    _exit_after(STARTING_SECONDS)
    sys.path[:] = json.loads(questions.readline())
    try:
        _make_strict()
        equals("x^2", "x^{2}")  # the first question is the slowest: sympy and the grammar load
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=replies)
        return
    print("ready", file=replies)
    faulthandler.cancel_dump_traceback_later()
    for question in questions:
        seconds, *formulas = json.loads(question)
        print("taken", file=replies)
        _exit_after(seconds)
        verdict = equals(*formulas) if len(formulas) == 2 else bool(_parsed(*formulas))
        print(int(verdict), file=replies)
        faulthandler.cancel_dump_traceback_later()
        if _peak_memory() > RENEWED_AT:
            return


def equals(truth: str, answer: str) -> bool:
    """Whether math-verify finds an answer equal to a truth.

    Of an equation beside a formula it looks at the right side alone (3 = 5 for 5): all must equal.
    """
    sides, own = (_EQUALS.split(text) for text in (truth, answer))
    if (len(sides) > 1) != (len(own) > 1):
        return all(_are_equal(side, other) for side in sides for other in own)
    return _are_equal(truth, answer)


def _are_equal(truth: str, answer: str) -> bool:
    from math_verify import verify

    first, second = _parsed(truth), _parsed(answer)
    try:
        same = first and second and verify(first, second, timeout_seconds=None)
        return bool(same or _rounds(first[0], answer) or _is_symbol(first[0], second[0]))
    except Exception:  # whatever sympy makes of sampled text, it is not the answer
        return False


def _rounds(truth: Any, answer: str) -> bool:
    """Whether an answer is a decimal of six significant digits or more that the truth rounds to."""
    decimal = _DECIMAL.fullmatch(answer)
    if decimal is None or len((decimal[1] + decimal[2]).lstrip("0")) < 6 or not truth.is_number:
        return False
    return abs(complex(truth.evalf()) - float(answer)) <= 0.5 * 10.0 ** -len(decimal[2])


def _is_symbol(first: Any, second: Any) -> bool:
    """Whether one is a symbol and the other equals it, of which math-verify compares the names."""
    from sympy import Expr, Symbol, simplify

    is_one = isinstance(first, Symbol) or isinstance(second, Symbol)
    both = isinstance(first, Expr) and isinstance(second, Expr)
    return is_one and both and simplify(first - second) == 0


@functools.lru_cache(maxsize=1024)
def _parsed(formula: str) -> list[Any]:
    """What math-verify reads all of a formula as; empty if it cannot."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Its own removal of units takes all from the first \text to the last.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return parse(
        f"${formula}$",
        [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def _make_strict() -> None:
    """Have math-verify find numbers and equations equal only where the functions below do too."""
    from math_verify import grader

    def strict(compare: Any, check: Any) -> Any:
        return lambda one, other, *options: compare(one, other, *options) and check(one, other)

    for name, check in (
        ("sympy_numeric_eq", _are_close),
        ("sympy_compare_relational", _say_the_same),
    ):
        if hasattr(grader, name):
            setattr(grader, name, strict(getattr(grader, name), check))


def _are_close(first: Any, second: Any) -> bool:
    """Whether two numbers agree to a relative 1e-5; True for what is no number.

    math-verify rounds to six decimals, for which all small numbers are alike. Percentages, which
    it keeps unevaluated, are equal to it in either reading.
    """
    from sympy import Expr, UnevaluatedExpr

    if not all(isinstance(x, Expr) and x.is_number for x in (first, second)):
        return True
    if first.has(UnevaluatedExpr) or second.has(UnevaluatedExpr):
        return True
    try:
        x, y = complex(first.evalf()), complex(second.evalf())
    except (TypeError, ValueError, OverflowError):
        return True
    return abs(x - y) <= 1e-5 * max(abs(x), abs(y))


def _say_the_same(first: Any, second: Any) -> bool:
    """Whether two equations say the same; True for other relations.

    To math-verify all equations without a solution are equal, and so are all that are always true.
    """
    from sympy import Eq, simplify, solve

    if not (isinstance(first, Eq) and isinstance(second, Eq)):
        return True
    if not first.free_symbols or not second.free_symbols:
        sides = (first.lhs - second.lhs, first.rhs - second.rhs)
        return all(simplify(side) == 0 for side in sides)
    ratio = simplify((first.lhs - first.rhs) / (second.lhs - second.rhs))
    if ratio.is_number and ratio.is_finite and ratio != 0:
        return True
    return bool(solve(first, first.free_symbols) and solve(second, second.free_symbols))


def _take_standard_streams() -> tuple[Any, Any]:
    """The streams to the parent, of which nothing else in this process knows."""
    questions = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    return questions, replies


def _exit_after(seconds: float) -> None:
    """End the process by a thread that needs no GIL, unless the next call comes first."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def _limit_memory() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (ImportError, OSError, ValueError):
        pass  # this system has no such limit


def _peak_memory() -> int:
    """The most bytes that this process has held; 0 where the system does not say.

    Not getrusage's number: on Linux it begins with what the parent held, which trains a model.
    """
    try:
        with open("/proc/self/status") as status:
            peaks = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    except OSError:
        return 0
    return 1024 * int(peaks[0]) if peaks else 0


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    main()
