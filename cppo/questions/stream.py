"""Questions in training order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from cppo.questions import Question, as_question
from cppo.seeds import seed_from


class Dataset(Protocol):
    """Rows by number: a list of dicts, a `datasets.Dataset`, anything alike."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class QuestionStream:
    """A dataset's questions without end, shuffled anew in every epoch.

    The order is a function of the seed; `position` is all there is to remember.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        check_dataset("train_dataset", dataset)
        if len(dataset) == 0:
            raise ValueError("cppo.CPPOTrainer: train_dataset must have rows, got none")
        self.dataset, self._seed = dataset, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self.position = 0

    def __next__(self) -> Question:
        epoch, place = divmod(self.position, len(self.dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_from(self._seed, "epoch", epoch))
            self._epoch = epoch
            self._order = torch.randperm(len(self.dataset), generator=generator)
        self.position += 1
        row = int(self._order[place])
        return as_question(self.dataset[row], index=row)


def check_dataset(name: str, dataset: Any) -> None:
    """Raises TypeError for what is no dataset."""
    is_one = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not is_one or isinstance(dataset, (str, Mapping)):
        raise TypeError(
            f"cppo.CPPOTrainer: {name} must have __len__ and an integer __getitem__ (a list of "
            f"rows, a datasets.Dataset), got {type(dataset).__name__}"
        )


def all_questions(dataset: Dataset | None) -> list[Question]:
    """Every question of a held-out set; none for None."""
    if dataset is None:
        return []
    check_dataset("eval_dataset", dataset)
    return [as_question(dataset[i], index=i) for i in range(len(dataset))]
