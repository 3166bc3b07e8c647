"""What `cppo.inspect` found, and how it is shown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Args:
        text: decoded by itself.
        id: in the vocabulary.
        logps: by view, of this token, at the temperature.
        entropies: by view, of the distribution that it was drawn from, in nats.
        shift: entropy under the negative view minus that under the anchor, in nats.
        selected: whether it is a perception token (`cppo.perception_mask`).
    """

    text: str
    id: int
    logps: dict[str, float]
    entropies: dict[str, float]
    shift: float
    selected: bool


@dataclass(frozen=True)
class Answer:
    """An answer of the model: its text and its tokens, with the closing one.

    is_cut: whether it ended at the limit of tokens.
    """

    text: str
    tokens: list[Token]
    is_cut: bool

    @property
    def perception_share(self) -> float:
        """The share of perception tokens."""
        return sum(token.selected for token in self.tokens) / max(1, len(self.tokens))


@dataclass(frozen=True)
class Inspection:
    """What a model looks at when it answers a question about images.

    Args:
        model: what was inspected.
        question: the text.
        views: by name, "anchor" (as the model sees it), "positive" and "negative", an image for
            each of the question's.
        answers: sampled, or the one that was given.
        options: whether the answer was given, temperature, fraction, perturbations and seed.
    """

    model: str
    question: str
    views: dict[str, list[Image.Image]]
    answers: list[Answer]
    options: dict[str, Any]

    @property
    def drawn(self) -> str:
        """How many answers there are, and where they are from."""
        if self.options["given"]:
            return "1, given"
        if self.options["temperature"] is None:
            return "1, greedy"
        return f"{len(self.answers)}, sampled at temperature {self.options['temperature']:g}"

    def json(self) -> str:
        """Everything but the images, as one JSON object."""
        found = {"model": self.model, "question": self.question, "options": self.options}
        answers = [asdict(own) for own in self.answers]
        return json.dumps({**found, "answers": answers}, indent=1, ensure_ascii=False)

    def html(self) -> str:
        """One self-contained page, without a script."""
        from cppo.report.parts import template

        shifts = [abs(token.shift) for own in self.answers for token in own.tokens]
        page = template(_FOLDER, "page.html.jinja", percent=_percent)
        return page.render(found=self, scale=max([*shifts, 1e-6]))

    def _repr_html_(self) -> str:
        """The page in a frame, whose styles stay in it: how a notebook shows it."""
        return (
            f'<iframe srcdoc="{escape(self.html())}" title="cppo.inspect" '
            'style="width: 100%; height: 40rem; border: 0"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Writes the page, or the JSON object if the file's name ends with .json."""
        path = Path(path)
        text = self.json() if path.suffix == ".json" else self.html()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def _percent(logp: float) -> str:
    """A probability, with as many digits as it needs to be told from 0."""
    share = 100 * math.exp(logp)
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"
