"""What the tests of the two losses share: every backend of each, and a call on rows of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cppo
from cppo import Views, backends

RUNS = [
    (op, backend) for op in ("cppo_loss", "linear_cppo_loss") for backend in backends.available(op)
]
BACKENDS = backends.available("cppo_loss")
every_run = pytest.mark.parametrize(("op", "backend"), RUNS)


def loss_of(op: str, backend: str, rows: Any, **inputs: Any) -> Any:
    """The loss of rows of logits; the op on hidden states gets the identity as its head."""
    if op == "linear_cppo_loss":
        first = rows.anchor if isinstance(rows, Views) else rows
        inputs["weight"] = torch.eye(first.shape[-1], dtype=first.dtype)
    return getattr(cppo, op)(rows, **inputs, backend=backend)
