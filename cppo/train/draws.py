"""The questions of a run, drawn and encoded for one of its processes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from cppo.model.limits import PositionLimit, position_limit
from cppo.model.prompts import EncodedQuestion, PromptEncoder
from cppo.options.trainer import CPPOConfig
from cppo.questions import Question
from cppo.questions.errors import QuestionError
from cppo.questions.rows import Dataset, question_at
from cppo.questions.stream import QuestionStream
from cppo.train.processes import Processes


class QuestionDraws:
    """Draws the questions of every step from a shuffled data set.

    All processes walk through one order of rows, and each reads and encodes its own. Questions that
    are left out (`max_prompt_tokens`, `skip_bad_questions`) are replaced by the next ones.

    Args:
        say: prints a line.
        limit: as of `longest_sequence`; a prompt that leaves no room for a completion of
            `max_completion_tokens` is a bad question.
    Raises: ValueError if options leave out every question, or completions may be so long that no
        prompt fits before them.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Any,
        config: CPPOConfig,
        processes: Processes,
        say: Callable[[str], None],
        limit: PositionLimit | None = None,
    ) -> None:
        self.dataset = dataset
        self.encode = PromptEncoder(processor, config.chat_template_kwargs or {})
        self.skipped = 0
        """Bad questions of this process that were left out so far."""
        self._stream = QuestionStream(dataset, config.seed)
        self._seen: _Seen | None = None
        self._config, self._processes, self._say = config, processes, say
        self._limit = limit
        if limit is not None and config.max_completion_tokens >= limit.tokens:
            raise ValueError(
                f"CPPOConfig.max_completion_tokens must be below the {limit.tokens} tokens that a "
                f"prompt and its completion may have, got {config.max_completion_tokens}: "
                f"{limit.reason}"
            )
        self._check_some()

    @property
    def position(self) -> int:
        """Rows that all processes together have drawn: all there is to remember."""
        return self._stream.position

    @position.setter
    def position(self, position: int) -> None:
        self._stream.position = position

    def draw(self, count: int) -> list[EncodedQuestion]:
        """The next `count` questions of each process, of which it gets its own. Collective.

        Questions that `look_ahead` has found are not read again.

        Raises: QuestionError for a bad question that is not to be left out; ValueError if an epoch
            goes by in which all are.
        """
        seen, self._seen = self._seen, None
        if seen is not None and (seen.start, seen.number) == (self.position, count):
            self.position = seen.end
            self.skipped += seen.skipped
            return seen.questions
        rank, needs = self._processes.rank, [count] * self._processes.size
        drawn: list[EncodedQuestion] = []
        start = self.position
        reasons: list[_LeftOut] = []
        while any(needs):
            rows = [[self._stream.next_row() for _ in range(need)] for need in needs]
            encoded = [self._encoded(row) for row in rows[rank]]
            drawn += [own for own in encoded if not isinstance(own, _LeftOut)]
            left_out = [own for own in encoded if isinstance(own, _LeftOut)]
            self.skipped += sum(own.is_bad for own in left_out)
            reasons += left_out
            # The first process says it of all.
            told = self._processes.gather([own.reason for own in left_out])
            for reason in itertools.chain(*told):
                self._say(f"skipped a question: {reason}")
            needs = list(map(len, told))
            has_none = sum(needs) == count * self._processes.size
            if has_none and self.position - start > len(self.dataset):
                raise self._nothing_left(reasons)
        return drawn

    def look_ahead(self, count: int) -> list[EncodedQuestion]:
        """What the next `draw(count)` will return; the position stays where it is. Collective."""
        start, skipped = self.position, self.skipped
        questions = self.draw(count)
        self._seen = _Seen(start, count, questions, self.position, self.skipped - skipped)
        self.position, self.skipped = start, skipped
        return questions

    def check_held_out(self, questions: Sequence[Question]) -> None:
        """Raises QuestionError for one that leaves no room for a completion."""
        for question in questions if self._limit else ():
            check_room(question, len(self.encode(question).input_ids), self._config, self._limit)

    def _check_some(self) -> None:
        """Raises if all questions are left out. It reads them up to the first that is not."""
        config = self._config
        if config.max_prompt_tokens is None and not config.skip_bad_questions:
            return
        stream = QuestionStream(self.dataset, config.seed)
        reasons: list[_LeftOut] = []
        for _ in range(len(self.dataset)):
            try:
                encoded = self._encoded(stream.next_row())
            except QuestionError:
                return  # said when it is its turn
            if not isinstance(encoded, _LeftOut):
                return
            reasons.append(encoded)
        raise self._nothing_left(reasons)

    def _nothing_left(self, reasons: list[_LeftOut]) -> ValueError:
        """What to say when no question can be asked: the options that left some out, no others."""
        counts = Counter(own.option for own in reasons)
        shortest = min((own.tokens for own in reasons if not own.is_bad), default=0)
        words = []
        if n := counts["max_prompt_tokens"]:
            limit = self._config.max_prompt_tokens
            words.append(
                f"{n} by max_prompt_tokens = {limit} (the shortest prompt has {shortest} tokens)"
            )
        if n := counts["skip_bad_questions"]:
            first = next(own.reason for own in reasons if own.is_bad)
            words.append(f"{n} by skip_bad_questions = True (the first: {first})")
        return ValueError(
            "cppo.CPPOTrainer: no question of train_dataset can be asked, all that were read are "
            f"left out: {', '.join(words)}"
        )

    def _encoded(self, row: int) -> EncodedQuestion | _LeftOut:
        """The question of a row as the model reads it, or why it is left out."""
        longest = self._config.max_prompt_tokens
        try:
            encoded = self.encode(question_at(self.dataset, row))
            length = len(encoded.input_ids)
            if longest is None or length <= longest:
                check_room(encoded.question, length, self._config, self._limit)
                return encoded
        except QuestionError as error:
            if not self._config.skip_bad_questions:
                raise
            return _LeftOut("skip_bad_questions", str(error))
        words = f"its prompt has {length} tokens, the limit is {longest}"
        return _LeftOut("max_prompt_tokens", words, length)


class _Seen(NamedTuple):
    """Questions that were drawn ahead: from where, how many of each process, up to where; and how
    many bad ones were left out."""

    start: int
    number: int
    questions: list[EncodedQuestion]
    end: int
    skipped: int


class _LeftOut(NamedTuple):
    """A question that is not asked: the option that says so, the reason, tokens of its prompt."""

    option: str
    reason: str
    tokens: int = 0

    @property
    def is_bad(self) -> bool:
        return self.option == "skip_bad_questions"


def longest_sequence(model: nn.Module, config: CPPOConfig) -> PositionLimit | None:
    """What limits a prompt and its completion: the model's positions, or what vLLM was given."""
    limits = [position_limit(model)]
    if config.engine == "vllm" and config.vllm.max_model_len is not None:
        limits.append(PositionLimit(config.vllm.max_model_len, "vllm.max_model_len says so"))
    return min((limit for limit in limits if limit is not None), default=None)


def check_room(
    question: Question, tokens: int, config: CPPOConfig, limit: PositionLimit | None
) -> None:
    """Raises QuestionError for a prompt that leaves no room for a completion."""
    if limit is not None and tokens + config.max_completion_tokens > limit.tokens:
        name = "a question" if question.row is None else f"row {question.row}"
        raise QuestionError(
            f"cppo: {name}: its prompt of {tokens} tokens and max_completion_tokens = "
            f"{config.max_completion_tokens} are more than {limit.tokens}: {limit.reason}"
        )
