"""Questions as a model reads them: the chat template, token ids, pixels.

The ids and pixels are those of transformers' `apply_chat_template(tokenize=True)`, which is called
for one question at a time: so an error belongs to one question, and a question's ids do not depend
on its neighbours. Padding is done here: no tokenizer needs a pad token, and none is changed.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cppo.model.chat_template import check_template_arguments, control_tokens
from cppo.model.images import (
    PER_TOKEN,
    ImageBatch,
    check_token_types,
    image_token_mask,
    prepared_images,
    rotary_positions,
)
from cppo.model.wrappers import has_vision, unwrap
from cppo.questions.errors import QuestionError
from cppo.questions.messages import (
    Messages,
    strings_in,
    texts_of,
    with_images,
    with_last_text,
)
from cppo.questions.question import Question

_TAG = re.compile(r"<[^<>\n]*>|\[[^\[\]\n]*\]")
_END_OF_TEXT = "(cppo: the last message ends here)"
_SURROGATE = re.compile("[\ud800-\udfff]")  # which no tokenizer takes
_PAD = 0  # any id will do: the mask hides it


@dataclass(frozen=True)
class Prompts:
    """Questions as a model reads them.

    Args:
        questions: Q questions.
        input_ids: (Q, L) int64, padded on the left.
        attention_mask: (Q, L) bool.
        positions: (3, Q, L) rotary positions of a model that has three rows of them, else None.
        images: the questions' images as the processor prepared them; None without any.
        generation_prompts: Q texts that the chat template puts after the last message and that a
            completion continues, such as "<|im_start|>assistant\\n<think>\\n"; empty where it puts
            nothing there.
        unexpanded: Q prompts as the chat template writes them, in token ids: an image is what
            stands for it there, whatever a processor makes of that.
    """

    questions: list[Question]
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor | None
    images: ImageBatch | None
    generation_prompts: list[str] = field(default_factory=list)
    unexpanded: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.generation_prompts:
            object.__setattr__(self, "generation_prompts", [""] * len(self.questions))
        if not self.unexpanded:
            object.__setattr__(self, "unexpanded", self.token_ids())

    def token_ids(self) -> list[list[int]]:
        """Each question's own ids, without the padding."""
        rows = zip(self.input_ids.cpu(), self.attention_mask.cpu(), strict=True)
        return [ids[own].tolist() for ids, own in rows]

    def of(self, questions: Sequence[int]) -> Prompts:
        """Some of the questions, in the order given."""
        own = torch.tensor(list(questions), dtype=torch.int64, device=self.input_ids.device)
        return Prompts(
            [self.questions[q] for q in questions],
            self.input_ids[own],
            self.attention_mask[own],
            None if self.positions is None else self.positions[:, own],
            None if self.images is None else self.images.of(questions),
            [self.generation_prompts[q] for q in questions],
            [self.unexpanded[q] for q in questions],
        )


class EncodedQuestion(NamedTuple):
    """One question as a model reads it.

    Fields:
        question: what was asked.
        input_ids: token ids, image placeholders included.
        generation_prompt, unexpanded: as in `Prompts`.
        processed: what the processor made of its images, and how it tells their tokens from the
            others, by name; empty without any.
    """

    question: Question
    input_ids: list[int]
    generation_prompt: str
    unexpanded: list[int]
    processed: Mapping[str, Any]


def encode_questions(
    model: nn.Module,
    processor: Any,
    questions: list[Question],
    chat_template_kwargs: Mapping[str, Any] = {},
) -> Prompts:
    """Tokenizes questions and prepares their images, on the model's device.

    Raises: as `PromptEncoder`; ValueError for images that the model does not take.
    """
    if any(question.images for question in questions) and not has_vision(model):
        raise ValueError("cppo: questions have images, but the model takes none")
    encoder = PromptEncoder(processor, chat_template_kwargs)
    return collate(model, [encoder(question) for question in questions])


def collate(model: nn.Module, encoded: Sequence[EncodedQuestion]) -> Prompts:
    """Puts questions that a `PromptEncoder` encoded into one batch, on the model's device.

    Raises: ValueError for images that the model does not take.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask = (x.to(device) for x in _padded([own.input_ids for own in encoded]))
    images = _images(model, encoded, input_ids, device)
    grid = None if images is None else images.joined("image_grid_thw")
    return Prompts(
        [own.question for own in encoded],
        input_ids,
        attention_mask,
        rotary_positions(model, input_ids, attention_mask, grid),
        images,
        [own.generation_prompt for own in encoded],
        [own.unexpanded for own in encoded],
    )


def _images(
    model: nn.Module, encoded: Sequence[EncodedQuestion], input_ids: Tensor, device: torch.device
) -> ImageBatch | None:
    if not any(own.processed for own in encoded):
        return None
    prepared = tuple(prepared_images(unwrap(model), own.processed, device) for own in encoded)
    tokens = image_token_mask(model, input_ids).sum(1).tolist()
    for own, arguments, count in zip(encoded, prepared, tokens, strict=True):
        if own.question.images:
            check_token_types(unwrap(model), own.processed, torch.tensor(own.input_ids))
        if own.question.images and not (arguments and count):
            raise ValueError(
                f"cppo: {_name(own.question)}: its {len(own.question.images)} images must have "
                f"tokens in the prompt and tensors that the model takes, got {count} tokens and "
                f"{sorted(own.processed)}"
            )
    return ImageBatch(prepared, tuple(len(own.question.images) for own in encoded), tuple(tokens))


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def render(
    processor: Any,
    question: Question,
    chat_template_kwargs: Mapping[str, Any] = {},
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The question as the text that the model continues."""
    return processor.apply_chat_template(
        question.messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **chat_template_kwargs,
    )


class PromptEncoder:
    """Encodes questions by a processor or tokenizer; it needs no model.

    Args:
        processor: the processor of a vision-language model, the tokenizer of a text model.
        chat_template_kwargs: what the chat template is given besides the messages, such as
            {"enable_thinking": False}.
    Raises: TypeError or ValueError for a processor without a chat template, and for
        chat_template_kwargs that the template does not read or that are set here.
    """

    def __init__(self, processor: Any, chat_template_kwargs: Mapping[str, Any] = {}) -> None:
        check_template_arguments(processor, chat_template_kwargs)
        self._processor = processor
        self._arguments = chat_template_kwargs
        self._control = control_tokens(processor, tokenizer_of(processor))

    def __call__(self, question: Question) -> EncodedQuestion:
        """Return a question's ids and pixels.

        Raises: QuestionError naming the question, for text with a token that only the template may
            write, a message that the template refuses or leaves out, an image that the image
            processor refuses, and a prompt without tokens.
        """
        try:
            if question.images and not hasattr(self._processor, "image_processor"):
                raise QuestionError("has images, which a tokenizer does not prepare")
            self._check_text(question.messages)
            self._check_rendered(question, self._render(question))
            return self._encode(question)
        except QuestionError as error:
            raise QuestionError(f"cppo: {_name(question)}: {error}") from error.__cause__

    def _check_text(self, messages: Messages) -> None:
        for position, message in enumerate(messages):
            for text in strings_in(message):
                if _SURROGATE.search(text):
                    raise QuestionError(
                        f"prompt[{position}] has a lone surrogate, which is half a character"
                    )
                found = self._control.search(text)
                if found:
                    raise QuestionError(
                        f"prompt[{position}] has the special token {found[0]!r} in its text, which "
                        "only the chat template may write (roles are messages, images are <image> "
                        "markers or image parts)"
                    )

    def _render(self, question: Question, *, add_generation_prompt: bool = True) -> str:
        try:
            return render(
                self._processor,
                question,
                self._arguments,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template raises what it likes
            raise QuestionError(
                f"the chat template refused it: {type(error).__name__}: {error}"
            ) from error

    def _check_rendered(self, question: Question, rendered: str) -> None:
        """Raises if a message or an image is not in the text that the template made."""
        ends = [f"{_END_OF_TEXT[:-1]}, {place})" for place in range(len(question.messages))]
        marked = self._render(
            question._replace(
                messages=[
                    with_last_text(message, functools.partial(_before, end))
                    for message, end in zip(question.messages, ends, strict=True)
                ]
            )
        )
        for position, message in enumerate(question.messages):
            texts = [text.strip() for text in texts_of(message["content"])]
            # Templates may drop what an assistant thought in earlier turns. A short text may well
            # stand in the rendered one by chance, a mark does not.
            if message["role"] == "assistant" or not any(texts):
                continue
            if ends[position] in marked and all(text in rendered for text in texts):
                continue
            # Not there word for word: does anything depend on it?
            changed = list(question.messages)
            changed[position] = with_last_text(message, lambda text: text + _END_OF_TEXT)
            if self._render(question._replace(messages=changed)) == rendered:
                hint = "; give its text as a string" if isinstance(message["content"], list) else ""
                raise QuestionError(
                    f"the chat template leaves out prompt[{position}] "
                    f"(role {message['role']!r}){hint}"
                )
        has_parts = any(isinstance(message["content"], list) for message in question.messages)
        if has_parts and "'type': 'text'" in rendered:
            raise QuestionError(
                "the chat template writes a list of parts as it stands; give plain text"
            )
        # Some processors add an image's tokens by themselves.
        placed = self._placed(rendered)
        if placed and placed != len(question.images):
            raise _misplaced(placed, question)

    def _placed(self, rendered: str) -> int:
        """How many images the template has placed in the text."""
        marks = (getattr(self._processor, name, None) for name in ("image_token", "boi_token"))
        return max(
            (rendered.count(mark) for mark in marks if isinstance(mark, str) and mark), default=0
        )

    def processed(self, question: Question) -> Mapping[str, Any]:
        """What the processor returns, of a question whose text was checked before."""
        try:
            return self._processor.apply_chat_template(
                with_images(question.messages, question.images),
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                **self._arguments,
            )
        except Exception as error:
            raise self._refusal(question, error) from error

    def _encode(self, question: Question) -> EncodedQuestion:
        encoded = self.processed(question)
        ids = encoded["input_ids"][0].tolist()
        if not ids:
            raise QuestionError("the chat template makes no tokens of it")
        token = getattr(self._processor, "image_token_id", None)
        if question.images and token is not None and token not in ids:
            raise _misplaced(0, question)
        return EncodedQuestion(
            question,
            ids,
            self._generation_prompt(question),
            self._unexpanded(question) if question.images else ids,
            {
                name: value
                for name, value in encoded.items()
                if name not in PER_TOKEN or (question.images and name.endswith("token_type_ids"))
            },
        )

    def _unexpanded(self, question: Question) -> list[int]:
        """The ids of the rendered text itself."""
        text, tokenizer = self._render(question), tokenizer_of(self._processor)
        # As `apply_chat_template` does: what the template begins with is not put there again.
        has_begin = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not has_begin)["input_ids"]

    def _refusal(self, question: Question, error: Exception) -> QuestionError:
        """The error of a processor, with the image that it is about, if it is about one."""
        for number, image in enumerate(question.images):
            try:
                self._processor.image_processor(images=[image], return_tensors="pt")
            except Exception as own:
                width, height = image.size
                return QuestionError(
                    f"the image processor refused image {number} ({width} x {height}): {own}"
                )
        if question.images and not self._placed(self._render(question)):
            return _misplaced(0, question)
        return QuestionError(f"the processor refused it: {type(error).__name__}: {error}")

    def _generation_prompt(self, question: Question) -> str:
        """What the template puts behind the last message and a completion continues.

        That is what it writes with `add_generation_prompt` and not without it; where both are the
        same, it is all that stands there. The comparison begins behind a mark at the end of the
        last message, because a template may write another beginning, too.
        """
        *earlier, last = question.messages
        marked = [*earlier, with_last_text(last, lambda text: text + _END_OF_TEXT)]
        opened, closed = (
            self._render(question._replace(messages=marked), add_generation_prompt=flag)
            for flag in (True, False)
        )
        opened, closed = (text.rpartition(_END_OF_TEXT)[2] for text in (opened, closed))
        if opened == closed:
            return opened
        common = len(os.path.commonprefix([opened, closed]))
        # "<|assistant|>" and "<|endoftext|>" have "<|" in common: a tag is not cut.
        inside = [tag.start() for tag in _TAG.finditer(opened) if tag.start() < common < tag.end()]
        return opened[min([common, *inside]) :]


def _misplaced(placed: int, question: Question) -> QuestionError:
    return QuestionError(
        f"the chat template places {placed} images, the question has {len(question.images)}"
    )


def _before(end: str, text: str) -> str:
    return text + end


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids padded on the left, and the mask of what is no padding."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), _PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, own in enumerate(rows):
        ids[row, width - len(own) :] = torch.tensor(own)
        mask[row, width - len(own) :] = True
    return ids, mask


def _name(question: Question) -> str:
    text = " ".join(texts_of(question.messages[-1]["content"]))
    row = "" if question.row is None else f" of row {question.row}"
    return f"question {text[:60]!r}{row}"
