"""Questions in training order."""

from __future__ import annotations

import torch

from cppo.questions.question import Question
from cppo.questions.rows import Dataset, question_at, require_dataset
from cppo.seeds import seed_from

__all__ = ["Dataset", "QuestionStream", "all_questions"]


class QuestionStream:
    """A dataset's questions without end, shuffled anew in every epoch.

    The order is a function of the seed; `position` is all there is to remember.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        require_dataset("cppo.CPPOTrainer: train_dataset", dataset)
        self.dataset, self._seed = dataset, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next_row(self) -> int:
        """The number of the next row."""
        epoch, place = divmod(self.position, len(self.dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_from(self._seed, "epoch", epoch))
            self._epoch = epoch
            self._order = torch.randperm(len(self.dataset), generator=generator)
        self.position += 1
        return int(self._order[place])

    def __next__(self) -> Question:
        """The question of the next row. Raises as `question_at`, and goes on behind it."""
        return question_at(self.dataset, self.next_row())


def all_questions(dataset: Dataset | None) -> list[Question]:
    """Every question of a held-out set; none for None. Raises as `question_at`."""
    if dataset is None:
        return []
    require_dataset("cppo.CPPOTrainer: eval_dataset", dataset)
    return [question_at(dataset, i) for i in range(len(dataset))]
