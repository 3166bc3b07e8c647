"""Where an answer stands in a text, and the one spelling in which answers are compared."""

import pytest
from reward_cases import one, pairs, reward_of, spread

from cppo.rewards.answers import behind_hashes, formulas, last_boxed, last_tagged
from cppo.rewards.spelling import normalize_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *spread(
            {
                "17": r"so \boxed{17}",
                r"\frac{1}{2}": r"\boxed{1} then \boxed{\frac{1}{2}}",
                r"\left\{ 1, 2 \right\}": r"\boxed{\left\{ 1, 2 \right\}}",
                r"\{1\}": r"\boxed{\{1\}}",
                r"\text{yes}": r"\boxed{\text{yes}} ; \boxed\text{yes}.",
                "x": "\\boxed\n{x} ; \\boxed x",
                "5": "\\fbox{5} ; \\framebox[2cm][l]{5} ; \\boxed 5 ; \\boxed{%\n5}",
                "57": r"$\boxed 57$",
                "-1,000.5": r"\boxed -1,000.5.",
                r"\frac12": r"\boxed\frac12",
                r"\frac{\sqrt{3}}{2}": r"\boxed \frac{\sqrt{3}}{2}.",
                r"\sqrt2": r"\boxed\sqrt2",
                "3": r"\boxed{\boxed{3}} ; \boxed{\text{so }\fbox{3}}",
                "50%": r"\boxed{50%}",
                "50 %": r"\boxed{50 %}",
                r"50\%": r"\boxed{50\%}",
                "50% of them": "\\boxed{50% of them}\n}",
                "5 ": "\\boxed{5 % the sum }\n}",
                "1": r"\boxed{1}}",
                "": r"\boxed{}",
                "{{}}": r"\boxed{{{}}}",
                None: (
                    r"\boxed{\} ; \boxed{1} and \boxed{2 ; \boxed{\frac{1}{2} ; \boxed ; "
                    r"\boxedx{3} ; boxed{3} ; "
                ),
            }
        ),
        (r"\boxed  {x}", "x"),
        ("\\boxed{" + "{" * 50_000, None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


TAGGED = {
    "42": "<answer> 42 </answer>",
    "2": "<answer>1</answer><answer>2</answer> ; <answer>1<answer>2</answer>",
    "1": "<answer>1</answer> or </answer> ; <answer>1</answer><answer>2",
    None: "</answer>1<answer> ; <answer>1 ; 1",
}
HASHED = {"42": "a\n#### 42\nb", "2": "#### 1 #### 2", "": "####", None: "### 1"}


@pytest.mark.parametrize(
    ("found", "text", "expected"),
    [
        *((last_tagged, *case) for case in spread(TAGGED)),
        *((behind_hashes, *case) for case in spread(HASHED)),
    ],
)
def test_a_marked_answer(found, text, expected):
    assert found(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is $x$.", ["x"]),
        ("first $x$, then $y$", ["x", "y"]),
        ("$x = 1$ or $x = 2$.", ["x = 1, x = 2"]),
        (r"\(a\), \(b\), and \(c\), but \(d\)", ["a, b, c", "d"]),
        (r"\[ x \] is it", ["x"]),
        ("$$x^2$$", ["x^2"]),
        ("from $5 to $7", []),
        (r"\$5 and $x$", ["x"]),
        ("costs $5, or $x$", ["x"]),
        ("$x", []),
        ("", []),
    ],
)
def test_formulas(text, expected):
    assert formulas(text) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (r"\frac{\sqrt3}2", r"\dfrac{\sqrt{3}}{2}"),
        ("x^10", "x^{10}"),
        (r"a \leq b", r"a\le b"),
        (r"\left( 3,\! 4 \right).", "(3,4)"),
        (r"\text{Even}", "even"),
        (r"\pi r", r"\pi  r"),
    ],
)
def test_one_spelling(first, second):
    assert normalize_answer(first) == normalize_answer(second)


@pytest.mark.parametrize("text", ["3 4", "now here", r"\pi r", "AB", "ab"])
def test_spaces_and_capitals_that_say_something(text):
    other = {"AB": "ab", "ab": "AB"}.get(text, text.replace(" ", ""))
    assert normalize_answer(text) != normalize_answer(other)


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    pairs(
        {
            1: (
                r"so $2\sqrt{2}$ ~ \sqrt{8} ; so $x = 2$ or $x = 3$. ~ 2, 3 ; "
                "$x$ is $5$ ~ $5$ people ; It is 42. ~ 42 ; There are 5, then 42 apples ~ 42 ; "
                r"<answer>It is $\frac{28}{6}$.</answer> ~ \frac{14}{3}"
            ),
            0: (
                "it is $5$, not $x$ ~ 5 ; $y$ ~ $x = 1$ where $y$ is real ; "
                r"There are 5, then 42 apples ~ 5 ; It is 1 - \sqrt{2} ~ 1 ; from $5 to $7 ~ 5 ; "
                "no idea ~ 42 ;  ~ 42"
            ),
        }
    ),
)
def test_answers_of_math_verify_in_running_text(text, gold, reward):
    assert one(reward_of("math_verify"), text, gold) == reward
