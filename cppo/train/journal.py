"""The journal of a step: a run that is stopped within the step keeps what it has done of it.

The pieces of a step (a batch of completions, a call of the rewards, a micro-batch, a step of the
optimizer) go through `Journal.once`, which notes what each returned. A run that is stopped saves
the notes with its checkpoint; when it goes on, the same code runs again, and `once` returns what
was noted in place of computing it, up to where the run was stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cppo.train.stopping import Stopping

_T = TypeVar("_T")
Once = Callable[[Callable[[], _T]], _T]


def now(call: Callable[[], _T]) -> _T:
    """Runs a piece without a journal."""
    return call()


class Journal:
    """The pieces of one step, in their order.

    Args:
        step: steps that were finished before.
        position: the position in the data at which the step began.
        stopping: may stop the step after every piece.
    """

    def __init__(self, step: int = 0, position: int = 0, stopping: Stopping | None = None) -> None:
        self.step, self.position = step, position
        self.seconds: dict[str, float] = {}
        """What the phases of the step have taken before the run was stopped."""
        self._stopping = Stopping(is_main=False) if stopping is None else stopping
        self._notes: list[Any] = []
        self._played = 0
        self._random = random_state()

    @property
    def is_replaying(self) -> bool:
        """Whether the next piece was done before."""
        return self._played < len(self._notes)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is done yet."""
        return not self._notes

    def once(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, or what it returned before: tensors and numbers, in dicts or lists.

        A piece that raises is not noted.
        """
        if self.is_replaying:
            value = self._notes[self._played]
            self._played += 1
            if not self.is_replaying:
                set_random_state(self._random)
            return value
        value = call()
        self._notes.append(value)
        self._played += 1
        self._random = random_state()
        self._stopping.check()
        return value

    def once_breakable(self, call: Callable[[], _T]) -> _T:
        """`once` for a piece that a signal may break off at any moment."""

        def piece() -> _T:
            with self._stopping.breaking():
                return call()

        return self.once(piece)

    def state(self, gradients: Sequence[Tensor | None]) -> dict[str, Any]:
        """What `restored` needs, of types that `torch.load(weights_only=True)` reads.

        Args:
            gradients: what the micro-batches since the last step of the optimizer have left.
        """
        return {
            "step": self.step,
            "position": self.position,
            "seconds": dict(self.seconds),
            "notes": self._notes,
            "random": self._random,
            "gradients": list(gradients),
        }

    @classmethod
    def restored(cls, state: dict[str, Any], stopping: Stopping) -> Journal:
        """The journal of a step that goes on."""
        journal = cls(state["step"], state["position"], stopping)
        journal._notes, journal._random = state["notes"], state["random"]
        journal.seconds = state["seconds"]
        return journal


def random_state() -> dict[str, Any]:
    """The state of every generator that `accelerate.utils.set_seed` seeds."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        state["device"] = torch.get_device_module().get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts every generator where `random_state` found it."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["device"])
