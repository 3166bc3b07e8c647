"""The shape set that `pytest benchmarks/` runs."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", default="toy", choices=("toy", "small", "paper", "full"), help="shape set"
    )
