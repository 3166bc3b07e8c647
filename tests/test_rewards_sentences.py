"""Numbers in sentences: ordinary right answers and their wrong neighbours, by rule."""

import pytest
from reward_cases import one, reward_of, spread

from cppo import rewards


@pytest.mark.parametrize(
    ("answer", "value"),
    spread(
        {
            18: "John has 18 apples. ; She makes $18 every day ; Janet makes 18 dollars per day.",
            3: "It takes 3 bolts",
            1250: "Tom's sister bought 1,250 stickers at the fair.",
            -3: "He will have -3 points left",
            2.5: "They walked 2.5 km.",
            None: (
                "John has twice 18 apples. ; John has at least 18 apples. ; "
                "John has 18 more apples than Mary. ; John has not 18 apples. ; "
                "John has twice as many as 18. ; John thinks that 18 is wrong. ; "
                "John has 18 apples for 3 people. ; John squared 18"
            ),
            216: "John has 18 dozen apples.",
        }
    ),
)
def test_a_sentence_in_the_answer_tag(answer, value):
    text = f"<answer>{answer}</answer>"
    for gold in (value, 18, 3):
        if gold is not None:
            assert rewards.numeric([text], answer=[str(gold)]) == [float(gold == value)], gold


def test_a_line_that_marks_the_answer():
    text = "So she makes 9 * 2 = $18 every day.\n#### 18"
    for reward in (rewards.numeric, rewards.math_verify):
        assert reward([text, text], answer=["18", "9"]) == [1.0, 0.0]


# ---- ordinary right answers and their wrong neighbours, by rule

PLACES = {
    "numeric": "numeric gsm8k",
    "each": "numeric gsm8k math_verify",
    "box": "boxed math_verify",
}
RULES = [
    # A sum of numbers in the tag says its last side, if all sides are worth the same.
    *(("each", f"<answer>{text}</answer>", "18", 1) for text in ("10 + 8 = 18", "$10 + $8 = $18")),
    *(
        ("each", f"<answer>{text}</answer>", "18", 1)
        for text in ("2 x 9 = 18 dollars", "2(9) = 18")
    ),
    ("each", "<answer>So he makes 36 eggs / 2 = 18 eggs in 3 days.</answer>", "18", 1),
    ("each", "<answer>18% of 50 = 9</answer>", "9", 1),
    ("each", "<answer>25/7 = 3.57</answer>", "3.57", 1),
    ("each", "<answer>10 + 8 = 19</answer>", "19", 0),
    ("each", "<answer>10 + 9 = 17 + 1 = 18</answer>", "18", 0),
    ("each", "<answer>twice 9 + 9 = 18</answer>", "18", 0),
    ("each", "<answer>9 + 9 = 18 is wrong</answer>", "18", 0),
    ("each", "<answer>9 + 9 = 18, so 7</answer>", "18", 0),
    ("each", "<answer>2x = 18</answer>", "18", 0),
    ("each", "<answer>1/0 = 18</answer>", "18", 0),
    # So does a number that goes on with a preposition, a comparison or what it is of.
    *(("each", f"<answer>18 {rest}</answer>", "18", 1) for rest in ("miles from home", "a week")),
    *(("each", f"<answer>18 {rest}</answer>", "18", 1) for rest in ("more eggs", "fewer", "(red)")),
    *(("each", f"<answer>18 {rest}</answer>", "18", 1) for rest in ("years older", "year-old")),
    *(("each", f"<answer>18 {rest}</answer>", "18", 0) for rest in ("to one", "more than Mary")),
    *(
        ("each", f"<answer>18 {rest}</answer>", "18", 0)
        for rest in ("for 3 days", "(wrong)", "off")
    ),
    # Plurals: with words before them, and without -s; no number words, no verbs.
    *(("box", rf"\boxed{{18\text{{ {unit}}}}}", "18", 1) for unit in ("different ways", "sheep")),
    *(("box", rf"\boxed{{18\text{{ {unit}}}}}", "18", 1) for unit in ("gallons of paint", "mice")),
    *(("box", rf"\boxed{{18\text{{ {unit}}}}}", "18", 0) for unit in ("zillions", "wrong answers")),
    *(("box", rf"\boxed{{18\text{{ {unit}}}}}", "18", 0) for unit in ("fails", "pairs", "xyz / h")),
    ("box", r"\boxed{18\text{ ways}}", r"18\text{ different ways}", 1),
    ("box", r"\boxed{18\text{ red balls}}", r"18\text{ blue balls}", 0),
    ("box", r"\boxed{\text{18 dollars}}", "18", 1),
    ("box", r"\boxed{\text{18 dozen}}", "18", 0),
    # "The answer is": the first number, if it is alone in its clause, else the last.
    ("each", "The answer is 18 apples, not 17.", "18", 1),
    ("each", "The answer is $2 per egg times 9 eggs, so $18.", "18", 1),
    ("each", "The answer is $2 per egg times 9 eggs, so $18.", "2", 0),
    ("each", "The answer is that 3 friends each get 6 apples.", "6", 1),
    ("each", "The answer to the question should be 18.", "18", 1),
    # Running text without a formula, for math_verify as well.
    ("each", "Therefore, he makes $18 per day.", "18", 1),
    ("each", "So 20 - 2 = 18 cookies remain.", "18", 1),
    ("each", "So 20 - 2 = 18 cookies remain.", "2", 0),
    ("each", "So 18 eggs (9 per box).", "18", 1),
    ("each", "So 18 eggs (9 per box).", "9", 0),
    ("each", "9 * 2 = <<9*2=18>>18 dollars.<|im_end|>", "18", 1),
    *(("each", text, "18", 0) for text in ("Step 18", "20% off 18", "one hundred 18", "hardly 18")),
    *(("each", f"<answer>{text}</answer>", "18", 1) for text in ("USD 18", "Rs. 18")),
    ("each", "<answer>18 students passed the exam</answer>", "18", 1),
    ("each", "<answer>18 students lie</answer>", "18", 0),
    *(("each", text, "18", 0) for text in ("17 or 18", "between 3 and 18", "18 (mod 20)")),
    ("each", "<answer>18:1</answer>", "18", 0),
]


@pytest.mark.parametrize(("place", "text", "gold", "reward"), RULES)
def test_ordinary_answers_and_their_neighbours(place, text, gold, reward):
    for name in PLACES[place].split():
        if name == "math_verify":
            pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
        assert (one(reward_of(name), text, gold) > 0) == reward, name
