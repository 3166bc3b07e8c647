"""A test of calls that are refused, which many ops have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def refused(cases: Sequence[tuple[Any, ...]], op: str = "") -> Callable[..., None]:
    """The test that each call is refused in words that begin with the op.

    Args:
        cases: (call, words) for a ValueError, or (call, error, words).
        op: the public name, where it is one and the same.
    """
    full = [(case[0], case[1] if len(case) == 3 else ValueError, case[-1]) for case in cases]
    begin = rf"^cppo\.{op}: .*" if op else r"^cppo\..*"

    @pytest.mark.parametrize(("call", "error", "words"), full, ids=[case[-1] for case in cases])
    def test(call: Callable[[], Any], error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=begin + re.escape(words)):
            call()

    return test
