"""How a row of each published set becomes a question and the answers that are right.

Each function takes the columns of a row and raises ValueError, with a predicate whose subject is
the row, for one that it cannot use.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from cppo.questions.layouts import Asked
from cppo.questions.messages import IMAGE_MARKER, sequence
from cppo.rewards.answers import last_boxed
from cppo.rewards.spelling import normalize_answer, same_answer

_PICK = "Answer with the letter of the right choice."
_SHOWN = "Answer the question that is shown in the image."
# "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer"
_LABEL = re.compile(r"(?:^|[;\n])\s*([A-Z])\s*[.:)\u3001\uff0e]")
_NUMBERED = re.compile(r"<image ?(\d+)>")  # markers of MathVision and MMMU-Pro


def given(answer: Any) -> Any:
    """The answer as it is."""
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise ValueError("has no answer")
    return answer


def boxed(solution: Any) -> str:
    """The answer of a solution: what its last box holds."""
    found = last_boxed(str(solution))
    if not found:
        raise ValueError(f"has no \\boxed{{}} in {solution!r:.200}")
    return found


def mathvista(row: Mapping[str, Any]) -> Asked:
    """A question with its unit and the form of its answer, or with its choices."""
    _require_image(row, "decoded_image")
    question, answer = _question(row), given(row["answer"])
    if row["unit"]:
        question = f"{question} (Unit: {row['unit']})"
    choices = _listed(row["choices"], "choices")
    if choices:
        right = [place for place, choice in enumerate(choices) if choice == str(answer)]
        if not right:
            raise ValueError(f"has the answer {answer!r}, which is none of its choices {choices}")
        return _choice(question, choices, right)
    return Asked(f"{question}\n{_form(row['answer_type'], row['precision'])}".strip(), answer)


def _form(answer_type: Any, precision: Any) -> str:
    if answer_type == "integer":
        return "Answer with a whole number."
    if answer_type == "float" and precision is not None:
        places = int(precision)
        return f"Answer with a number of {places} decimal place{'s' if places != 1 else ''}."
    return "Answer with a list, such as [1, 2, 3]." if answer_type == "list" else ""


def mathverse(row: Mapping[str, Any]) -> Asked:
    """A question that holds its choices, stands in the image, or has no image."""
    has_image = not str(row["problem_version"]).lower().replace("_", " ").startswith("text only")
    if has_image:
        _require_image(row, "image")
    question = str(row["question"] or "").strip() or (_SHOWN if has_image else "")
    answer = given(row["answer"])
    if row["question_type"] == "multi-choice":
        question, answer = f"{question}\n{_PICK}", ascii_uppercase[_place(answer, 26)]
    return Asked(question, answer, None if has_image else ())


def mathvision(row: Mapping[str, Any]) -> Asked:
    """A question with or without choices, which may stand in the image."""
    _require_image(row, "decoded_image")
    question = _one_marker(_question(row))
    choices, answer = _listed(row["options"], "options"), given(row["answer"])
    if not choices:
        return Asked(question, answer)
    right = _place(answer, len(choices))
    if choices == list(ascii_uppercase[: len(choices)]):  # they stand in the image
        return Asked(f"{question}\n{_PICK}", ascii_uppercase[right])
    return _choice(question, [_NUMBERED.sub(r"[image \1]", c) for c in choices], [right])


def _one_marker(question: str) -> str:
    """The question with its first marker as ours: the set has one image for all of them."""
    return _NUMBERED.sub(r"[image \1]", _NUMBERED.sub(IMAGE_MARKER, question, count=1))


def logicvista(row: Mapping[str, Any]) -> Asked:
    """A question that holds its choices, of which several may be right."""
    _require_image(row, "image")
    pick = "Answer with the letter of the right choice, or with all such letters."
    return Asked(f"{_question(row)}\n{pick}", given(row["answer"]))


def wemath(row: Mapping[str, Any]) -> Asked:
    """A question with choices in one text."""
    _require_image(row, "image_path")
    choices = _labelled(row["option"])
    return _choice(_question(row), choices, [_place(row["answer"], len(choices))])


def mmmu_pro(row: Mapping[str, Any]) -> Asked:
    """A question with choices and images in either."""
    choices = _listed(row["options"], "options")
    asked = _choice(_question(row), choices, [_place(row["answer"], len(choices))])
    named = tuple(f"image_{number}" for number in _NUMBERED.findall(asked.question))
    named = named or tuple(name for name in row if name.startswith("image_") and row[name])
    for name in named or ("image_1",):
        _require_image(row, name)
    return asked._replace(question=_NUMBERED.sub(IMAGE_MARKER, asked.question), images=named)


def mmmu_pro_vision(row: Mapping[str, Any]) -> Asked:
    """A question that stands in the image with its choices."""
    _require_image(row, "image")
    choices = _listed(row["options"], "options")
    asked = _choice("", choices, [_place(row["answer"], len(choices))])
    return asked._replace(question=f"{_SHOWN}\n{_PICK}")


def _question(row: Mapping[str, Any]) -> str:
    question = row["question"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"has no question, got {question!r}")
    return question.strip()


def _require_image(row: Mapping[str, Any], name: str) -> None:
    if not row.get(name):
        raise ValueError(f"has no image in {name!r}")


def _choice(question: str, choices: Sequence[str], right: Sequence[int]) -> Asked:
    """A question with its choices as lines, and the answers that say one of the right ones."""
    lines = [
        f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)
    ]
    answers = [ascii_uppercase[place] for place in right]
    text = choices[right[0]].strip()
    others = [choice for place, choice in enumerate(choices) if place not in right]
    says_itself = len(normalize_answer(text)) > 1 or text.isdigit()  # and is no letter of another
    if says_itself and "<image" not in text and not any(same_answer(o, text) for o in others):
        answers.append(text)
    return Asked("\n".join([question, *lines, _PICK]), answers)


def _place(answer: Any, count: int) -> int:
    """The number of the choice that a letter names: "B", "(B)" or "B."."""
    letter = str(answer).strip().strip("().").upper()
    place = ascii_uppercase.find(letter) if len(letter) == 1 else -1
    if not 0 <= place < count:
        last = f"A to {ascii_uppercase[count - 1]}" if count else "none"
        raise ValueError(f"has the answer {answer!r}, and its choices are {last}")
    return place


def _listed(stored: Any, name: str) -> list[str]:
    """Choices as texts: a list, or what Python writes of one."""
    if isinstance(stored, str) and stored.strip():
        try:
            stored = ast.literal_eval(stored.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"has {name} that are no list: {stored!r:.200}") from None
    several = sequence(stored or [])
    if several is None or len(several) > len(ascii_uppercase):
        raise ValueError(f"must have a list of up to 26 {name}, got {stored!r:.200}")
    return [str(choice) for choice in several]


def _labelled(stored: Any) -> list[str]:
    """The choices of "A. 45; B. 60; C. 72"."""
    text = str(stored or "")
    labels = list(_LABEL.finditer(text))
    if not labels or "".join(label[1] for label in labels) != ascii_uppercase[: len(labels)]:
        raise ValueError(f"has an option that is not 'A. ...; B. ...': {stored!r:.200}")
    stops = [label.start() for label in labels[1:]] + [len(text)]
    return [text[a.end() : b].strip() for a, b in zip(labels, stops, strict=True)]
