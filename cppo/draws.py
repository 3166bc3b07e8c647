"""The questions of a run, drawn and encoded for one of its processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cppo.config import CPPOConfig
from cppo.processes import Processes
from cppo.prompts import EncodedQuestion, PromptEncoder
from cppo.questions.errors import QuestionError
from cppo.questions.rows import Dataset, question_at
from cppo.questions.stream import QuestionStream


class QuestionDraws:
    """Draws the questions of every step from a shuffled data set.

    All processes walk through one order of rows, and each reads and encodes its own. Questions that
    are left out (`max_prompt_tokens`, `skip_bad_questions`) are replaced by the next ones.

    Args:
        say: prints a line.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Any,
        config: CPPOConfig,
        processes: Processes,
        say: Callable[[str], None],
    ) -> None:
        self.dataset = dataset
        self.encode = PromptEncoder(processor, config.chat_template_kwargs or {})
        self.skipped = 0
        """Bad questions of this process that were left out so far."""
        self._stream = QuestionStream(dataset, config.seed)
        self._config, self._processes, self._say = config, processes, say

    @property
    def position(self) -> int:
        """Rows that all processes together have drawn: all there is to remember."""
        return self._stream.position

    @position.setter
    def position(self, position: int) -> None:
        self._stream.position = position

    def draw(self, count: int) -> list[EncodedQuestion]:
        """The next `count` questions of each process, of which it gets its own. Collective.

        Raises: QuestionError for a bad question that is not to be left out; ValueError if an epoch
            goes by in which all are.
        """
        rank, needs = self._processes.rank, [count] * self._processes.size
        drawn: list[EncodedQuestion] = []
        start = self.position
        while any(needs):
            rows = [[self._stream.next_row() for _ in range(need)] for need in needs]
            encoded = [self._encoded(row) for row in rows[rank]]
            drawn += [question for question in encoded if question is not None]
            needs = self._processes.gather(encoded.count(None))
            has_none = sum(needs) == count * self._processes.size
            if has_none and self.position - start > len(self.dataset):
                raise ValueError(
                    "cppo.CPPOTrainer: no question of train_dataset can be asked, all are left out "
                    f"by max_prompt_tokens = {self._config.max_prompt_tokens} or "
                    f"skip_bad_questions = {self._config.skip_bad_questions}"
                )
        return drawn

    def _encoded(self, row: int) -> EncodedQuestion | None:
        """The question of a row as the model reads it; None if it is left out."""
        try:
            encoded = self.encode(question_at(self.dataset, row))
        except QuestionError as error:
            if not self._config.skip_bad_questions:
                raise
            self.skipped += 1
            self._say(f"skipped a question: {error}")
            return None
        length, limit = len(encoded.input_ids), self._config.max_prompt_tokens
        if limit is None or length <= limit:
            return encoded
        self._say(f"skipped a question: its prompt has {length} tokens, the limit is {limit}")
        return None
