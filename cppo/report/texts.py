"""The completions that a report shows: a question's before and after, the best and the worst."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from cppo.questions import question_text
from cppo.report.record import RunRecord
from cppo.report.words import count, finite, number

MOST_QUESTIONS = 8
_FOLDED_AFTER = 1200  # characters
_MOST = 20_000  # characters of a text on the page
_INLINE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")
# Control characters would be lost on a page, or break it: their pictures are shown.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


class Text(NamedTuple):
    """A text of any length: its beginning, and if that is not all, the whole up to a limit."""

    start: str
    whole: str | None
    size: str
    left_out: int


class Shown(NamedTuple):
    """A completion.

    mood: "right", "wrong", or "" for a reward that is not 0 or 1.
    """

    when: str
    text: Text
    badge: str
    mood: str
    note: str


class Asked(NamedTuple):
    """A question, with the addresses of its images, and what the model wrote."""

    question: Text
    answer: str | None
    shown: list[Shown]
    images: list[str]


def text_of(value: str) -> Text:
    """A text as a page shows it."""
    shown, size = value.translate(_VISIBLE), f"{len(value):,} characters"
    is_long = len(shown) > _FOLDED_AFTER or shown.count("\n") > 40
    if not is_long:
        return Text(shown, None, size, 0)
    start = "\n".join(shown[: _FOLDED_AFTER // 2].split("\n")[:20])
    return Text(start + " \u2026", shown[:_MOST], size, max(0, len(shown) - _MOST))


def before_and_after(run: RunRecord) -> list[Asked]:
    """The held-out questions that were kept, with the first and the newest completion of each.

    The most probable completions are preferred: a difference between two of them is no chance.
    """
    mode = "greedy" if any(row["mode"] == "greedy" for row in run.held_out) else "sampled"
    rows = [row for row in run.held_out if row["mode"] == mode]
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row.get("question")), []).append(row)
    asked = []
    for own in list(found.values())[:MOST_QUESTIONS]:
        ends = [own[0], own[-1]] if own[-1]["step"] > own[0]["step"] else [own[-1]]
        question = text_of(str(own[0].get("text") or ""))
        shown = [_held_out(run, row) for row in ends]
        asked.append(Asked(question, _answer(own[0]), shown, _images(own[0])))
    return asked


def best_and_worst(run: RunRecord) -> list[Asked]:
    """The best and the worst completion of the newest step, of training.

    If all of that step have one reward, the newest completion that has another is taken as well.
    """
    rows = [row for row in run.completions if finite(row.get("reward")) is not None]
    if not rows:
        return []
    newest = [row for row in rows if row["step"] == rows[-1]["step"]]
    best, worst = max(newest, key=_reward), min(newest, key=_reward)
    chosen = [best]
    if _reward(best) == _reward(worst):
        others = [row for row in rows if _reward(row) != _reward(best)]
        chosen += others[-1:]
    else:
        chosen.append(worst)
    chosen.sort(key=_reward, reverse=True)
    return [Asked(_question(row), _answer(row), [_trained_on(run, row)], []) for row in chosen]


def _reward(row: Mapping[str, Any]) -> float:
    return finite(row["reward"]) or 0.0


def _question(row: Mapping[str, Any]) -> Text:
    with suppress(LookupError, TypeError, AttributeError):
        return text_of(question_text(row["question"]))
    return text_of(str(row.get("question") or ""))


def _images(row: Mapping[str, Any]) -> list[str]:
    """Images that are in the row itself: a page loads nothing from elsewhere."""
    given = row.get("images")
    found = given if isinstance(given, list) else []
    return [one for one in found if isinstance(one, str) and _INLINE.fullmatch(one)]


def _answer(row: Mapping[str, Any]) -> str | None:
    answer = row.get("answer")
    return None if answer is None else text_of(str(answer)).start


def _held_out(run: RunRecord, row: Mapping[str, Any]) -> Shown:
    name = run.evaluated[0] if run.evaluated else next(iter(row["rewards"]), "reward")
    reward, tokens = finite(row["rewards"].get(name)), row.get("tokens")
    when = "before training" if row["step"] == 0 else f"after step {row['step']:,}"
    length = count(tokens, "token") if isinstance(tokens, int) else ""
    note = ", ".join(part for part in (str(row["mode"]), length) if part)
    badge, mood = _badge(name, reward), _mood(run, name, reward)
    return Shown(when, text_of(row["completion"]), badge, mood, note)


def _trained_on(run: RunRecord, row: Mapping[str, Any]) -> Shown:
    reward, advantage = finite(row["reward"]), finite(row.get("advantage"))
    names = run.reward_names
    name = names[0] if len(names) == 1 else "reward"
    fate = ("trained on" if row["kept"] else "pruned") if "kept" in row else None
    notes = [f"advantage {advantage:+.2f}" if advantage is not None else None, fate]
    badge, mood = _badge("reward", reward), _mood(run, name, reward)
    note = ", ".join(filter(None, notes))
    return Shown(f"step {row['step']:,}", text_of(row["completion"]), badge, mood, note)


def _badge(name: str, reward: float | None) -> str:
    return f"{name} does not apply" if reward is None else f"{name} {number(reward)}"


def _mood(run: RunRecord, name: str, reward: float | None) -> str:
    if reward not in (0, 1) or not run.is_share(name):
        return ""
    return "right" if reward == 1 else "wrong"
