r"""Answers against ground truths: every kind of answer, in every wrapping, by every reward.

The values are worked out by hand: an answer equals its ground truth or it does not.
"""

import pytest
from reward_cases import one, pairs, reward_of, spread

from cppo import rewards

# ---- kinds of answers

# (ground truth, answers that equal it in spelling or in value, answers that only algebra can tell
# to be equal, answers that differ)
KINDS = [
    (r"\sqrt{2}", "\\sqrt2 ; \u221a2 ; \\sqrt {2}", r"\frac{2}{\sqrt{2}}", r"2 ; \sqrt{3}"),
    ("1", r"1.0 ; x = 1 ; \frac{3}{3}", r"\sin^2 x + \cos^2 x", r"1 - \sqrt{2} ; 1x ; -1"),
    (r"\frac{1}{2}", "\\frac12 ; \\dfrac{1}{2} ; 1/2 ; 0.5 ; \xbd", "2^{-1}", "1 ; 2"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}2", r"\sqrt{\frac{3}{4}}", r"\frac{3}{2}"),
    ("p - q", r"p-q ; p\,-\,q", "-q + p", "q - p ; p ; P - Q"),
    ("x^2+2x+1", "x^{2} + 2x + 1", "(x+1)^2", "x^2+2x ; x^2-2x+1"),
    (r"2\pi rh", "2 \\pi r h ; 2\u03c0rh", r"2 h r \pi", r"2\pi r"),
    ("y = 2x + 3", "y=2x+3 ; 2x + 3", "y = 3 + 2x", "y = 2x - 3 ; z = 2x + 3"),
    ("x = 5", "5 ; x=5 ; x = 5.0", "", "y = 5 ; x = 6 ; x"),
    ("x > 5", r"x>5 ; x \gt 5", "5 < x", r"x < 5 ; x \ge 5 ; 5"),
    (r"x \le 5", "x\\leq 5 ; x \\leqslant 5 ; x \u2264 5", r"5 \ge x", "x < 5"),
    ("(1, 2)", r"(1,2) ; \left( 1, 2 \right) ; (1.0, 4/2)", "", "(2,1) ; [1,2] ; (1,2]"),
    ("[0, 1)", r"[0,1) ; \left[0, 1\right)", "", r"(0,1) ; [0,1] ; [0,2) ; \{0, 1\}"),
    (r"(-\infty, 2)", r"(-\infty,2) ; \left(-\infty, 2\right)", "", r"(-\infty, 2]"),
    (
        r"(-\infty,2)\cup(3,\infty)",
        "(-\u221e, 2) \u222a (3, \u221e)",
        r"(3,\infty)\cup(-\infty,2)",
        r"(-\infty,2)\cup[3,\infty) ; (-\infty,2)",
    ),
    (r"\{1, 2\}", r"\{1,2\} ; \left\{ 1, 2 \right\}", r"\{2, 1\}", r"\{1,3\} ; (1,2)"),
    (r"\emptyset", "\\varnothing ; \u2205", "", r"0 ; \{0\}"),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix} ; "
            r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix} ; "
            r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \\ \end{array}\right)"
        ),
        r"\begin{pmatrix} 1 & 2 \\ 3 & 2^2 \end{pmatrix}",
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix} ; "
            r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"
        ),
    ),
    ("B", r"(B) ; \text{B} ; \textbf{(B)} ; B. ; B)", "", "A ; b ; (C) ; AB"),
    (r"\text{Evelyn}", r"Evelyn ; \mathrm{Evelyn} ; evelyn", "", "Evenly ; Eve ; yes"),
    ("east", r"\text{east} ; East", "", "seat ; west ; eats"),
    ("No", r"\text{no} ; no.", "", "yes ; on ; not"),
    ("two words", r"two  words ; \text{two words}", "", "twowords ; two ; words two"),
    ("nowhere", r"\text{nowhere}", "", "now here"),
    ("x", r"\(x\)", r"\frac{2x}{2} ; x + 0", "y ; X ; 2x"),
    ("1, 2", r"1,2 ; 1,\, 2", "2, 1", "12 ; 1 ; 1, 3 ; 1, 2, 3"),
    ("1,234", "1234 ; 1{,}234 ; 1 234", "", "1 ; 234 ; 1, 2, 3, 4"),
    ("11", "11.0", "", "1 1 ; 1, 1 ; 1/1"),
    ("3 + 2i", "3+2i", "2i + 3", "3 - 2i ; 3"),
    (r"90^\circ", "90 ; 90^{\\circ} ; 90\xb0 ; 90 degrees", "", r"9 ; 90\%"),
    (r"45\%", r"45 ; 45% ; 0.45 ; \frac{9}{20}", "", r"4.5 ; 55\%"),
    (r"10\text{ cm}^2", r"10 ; 10 \mathrm{cm}^2 ; 10 square centimeters", "", r"10\text{ m}^2"),
    (r"\$1{,}000", r"1000 ; $1,000$ ; \$1000 ; 1000 dollars", "", "100 ; \u20ac1000"),
    (r"1\frac{1}{2}", r"1 1/2 ; \frac{3}{2} ; 1.5", "", r"\frac{11}{2} ; 1 ; 5.5"),
    ("#### Notes", "#### Notes", "", "Notes"),
]

# "@" is the answer; each reward has its places for it.
ALONE = ["@", "<think>so @ or 7?</think>\n@", "$@$", r"\(@\)", r"\[ @ \]"]
TAGGED = [
    "<think>7</think>\n<answer>@</answer>",
    "<answer> $@$ </answer> 7",
    r"<answer>\(@\)</answer>",
]
BOXED = [
    r"so 7, then $\boxed{@}$.",
    "<think>\\boxed{7}</think>\n\\[ \\boxed{@} \\]",
    r"\fbox { @ }",
    r"Hence the answer is \boxed{@}, not 7.",
    r"<answer>\boxed{@}</answer>",
]
SENTENCES = [r"Hence the answer is \(@\).", "7 is wrong.\n<answer>It is $@$.</answer>"]


def wrapped(answer, *places):
    """The answer in each of some places; one that has its own `$` is not put between others."""
    has_dollars = "$" in answer.replace(r"\$", "")
    return [
        place.replace("@", answer)
        for place in sum(places, [])
        if not (has_dollars and "$@$" in place)
    ]


def cases(column):
    """Each ground truth with each of its answers in a column."""
    kinds = [(kind[0], answer) for kind in KINDS for answer in kind[column].split(" ; ") if answer]
    return [pytest.param(gold, answer, id=f"{gold}:{answer}") for gold, answer in kinds]


EQUAL, BY_ALGEBRA, DIFFERENT = [*cases(0), *cases(1)], cases(2), cases(3)


def every_gold(gold):
    """A ground truth as data sets spell it."""
    marked = [] if "$" in gold.replace(r"\$", "") else [f"${gold}$", rf"\({gold}\)"]
    return [gold, rf"so \boxed{{{gold}}}", f"<answer>{gold}</answer>", [gold], ["?", gold], *marked]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_answers(gold, answer):
    for text in wrapped(answer, BOXED):
        assert one(rewards.boxed, text, gold) == 1, text
    for spelled in every_gold(gold):
        assert one(rewards.boxed, rf"\boxed{{{answer}}}", spelled) == 1, spelled


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_answers_for_math_verify(gold, answer):
    math_verify = reward_of("math_verify")
    for text in wrapped(answer, ALONE, TAGGED, BOXED, SENTENCES):
        assert one(math_verify, text, gold) == 1, text
    for spelled in every_gold(gold):
        assert one(math_verify, f"<answer>{answer}</answer>", spelled) == 1, spelled


@pytest.mark.parametrize(("gold", "answer"), BY_ALGEBRA)
def test_answers_that_only_algebra_finds_equal(gold, answer):
    math_verify = reward_of("math_verify")
    for text in wrapped(answer, ALONE, TAGGED, BOXED, SENTENCES):
        assert one(math_verify, text, gold) == 1, text
    assert one(rewards.boxed, rf"\boxed{{{answer}}}", gold) == 0


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers(gold, answer):
    for text in wrapped(answer, BOXED):
        assert one(rewards.boxed, text, gold) == 0, text
    for text in wrapped(answer, ALONE, TAGGED, BOXED):
        assert one(rewards.exact_match, text, gold) == 0, text


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_for_math_verify(gold, answer):
    math_verify = reward_of("math_verify")
    for text in wrapped(answer, ALONE, TAGGED, BOXED, SENTENCES):
        assert one(math_verify, text, gold) == 0, text


@pytest.mark.parametrize("gold", [gold for gold, *_ in KINDS])
def test_exact_match(gold):
    for text in wrapped(gold, ALONE, TAGGED, BOXED):
        for spelled in every_gold(gold):
            assert one(rewards.exact_match, text, spelled) == 1, (text, spelled)


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        *pairs(
            {
                1: (
                    "<answer>two\n words</answer> ~ two words ; "
                    "# Title\n#### Part\ntext ~ # Title\n#### Part\ntext ; "
                    "<answer> **two words** </answer> ~ two words"
                ),
                0: "42.0 ~ 42 ; a ~ A ; the answer is 42 ~ 42 ; text ~ #### text ;  ~ 42",
            }
        ),
        (" 42\n", "42", 1),
        ("42", 42, 1),
        ("42", 42.0, 1),
        ("4", ["four", 4], 1),
    ],
)
def test_exact_match_is_letter_by_letter(text, gold, reward):
    assert one(rewards.exact_match, text, gold) == reward


@pytest.mark.parametrize("name", ["boxed", "exact_match", "math_verify"])
def test_any_of_several_accepted_answers(name):
    texts = [rf"\boxed{{{answer}}}" for answer in ("four", "4", "5")]
    found = reward_of(name)(texts, prompts=["?"] * 3, answer=[["4", "four"]] * 3)
    assert found == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("name", "right"), [("numeric", 1.0), ("gsm8k", 1.5)])
def test_a_number_among_the_accepted_answers_is_enough(name, right):
    texts = [rf"\boxed{{{answer}}}" for answer in ("four", "4", "5")]
    found = reward_of(name)(texts, prompts=["?"] * 3, answer=[["four", "4"]] * 3)
    assert found == [0.0, right, 0.0]


# ---- words, equations, choices, symbols


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *(("cat", "act"), ("tea", "eat"), ("Tom", "Mot"), ("Sue", "Use"), ("Ann", "nan")),
        *(("saw", "was"), ("RED", "DER"), ("BAC", "ABC"), ("2BA", "2AB"), ("ab", "ba")),
        *((r"\angle ABC", r"\angle ACB"), (r"\triangle ABC", r"\triangle BCA")),
        *(("cat, dog", "act, god"), ("x = cat", "x = act"), ("(cat, dog)", "(act, dog)")),
        *((r"\{cat, dog\}", r"\{act, dog\}"), (r"\text{cat}", r"\text{act}")),
        *((r"\overrightarrow{AB}", r"\overrightarrow{BA}"), ("big cat", "big act")),
        *((r"5\text{i}", "5"), ("5/", "5"), ("5 or 6", "5"), (r"x=5\text{ is wrong}", "5")),
        *((r"5 \text{ (wrong)}", "5"), (r"\text{at least } 5", "5"), ("Yes, 5", "5")),
        *((r"\sqrt{25}\text{ wrong}", "5"), (r"\sqrt{25}\text{ or more}", "5")),
    ],
)
def test_words_are_no_products(answer, gold):
    math_verify = reward_of("math_verify")
    for text in wrapped(answer, TAGGED, BOXED):
        assert one(rewards.boxed, text, gold) == one(math_verify, text, gold) == 0, text
    assert one(math_verify, rf"\boxed{{{gold}}}", gold) == 1


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("yx", "xy"), ("2hr", "2rh"), ("AB + CD", "CD + AB"), (r"b \cdot a", r"a \cdot b")],
)
def test_products_in_any_order(answer, gold):
    math_verify = reward_of("math_verify")
    assert one(math_verify, rf"\boxed{{{answer}}}", gold) == 1


EQUATIONS = spread(
    {
        0: (
            r"3=5 ; 7=5 ; x=7=5 ; 1+1=5 ; 2x=5 ; x^2=5 ; 5=7 ; \frac12=5 ; \sqrt{x}=5 ; "
            r"x(x+1)=5 ; x \ne 5 ; \pi \approx 5 ; -x=5 ; 5=x=7 ; 3<5 ; x<5"
        ),
        1: (
            r"|x|=5 ; \sin(x)=5 ; xy=5 ; x=5 ; f(x)=5 ; f(2)=5 ; \angle A = 5 ; AB=5 ; x_1=5 ; "
            r"Area = 5 ; \text{Area} = 5 ; \alpha=5 ; \overline{AB} = 5 ; P(A)=5 ; x=y=5 ; =5 ; "
            "Total cost = 5"
        ),
    }
)


EQUATIONS += [  # two letters, a function, a norm or brackets name a quantity; one unknown does not
    *(("a+b=5", 1), ("x^2+y^2=5", 1), ("100m+n=5", 1), ("x_1+x_2=5", 1), (r"\frac ab=5", 1)),
    *((r"\cos A=5", 1), (r"\det(A)=5", 1), (r"\|v\|=5", 1), (r"\lfloor x \rfloor=5", 1)),
    *(("[ABC]=5", 1), ("f(1)+f(2)=5", 1), ("f(g(2))=5", 1), (r"f^{-1}(x)=5", 1)),
    *(("3x+2=5", 0), ("x^2+x=5", 0), ("a+b=7=5", 0), ("a+b<5", 0), (r"\log 8=5", 0), ("|-7|=5", 0)),
]


@pytest.mark.parametrize(("answer", "reward"), EQUATIONS)
def test_an_equation_is_its_value_where_its_left_side_is_a_name(answer, reward):
    math_verify = reward_of("math_verify")
    assert one(rewards.boxed, rf"\boxed{{{answer}}}", "5") == reward
    for text in (rf"\boxed{{{answer}}}", f"<answer>{answer}</answer>"):
        assert one(math_verify, text, "5") == reward
        assert one(math_verify, text, answer) == 1


def test_an_equation_that_holds():
    math_verify = reward_of("math_verify")
    assert one(math_verify, r"\boxed{x = 2+3 = 5}", "5") == 1


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *(("x\u2074", "x^4"), ("10\u207b\u00b3", "0.001"), ("a\u2081", "a_1"), ("\u215b", "1/8")),
        *(("\u2220ABC", r"\angle ABC"), ("\u25b3ABC", r"\triangle ABC"), ("2*pi", r"2\pi")),
        *(("2**10", "1024"), ("pi/4", r"\frac{\pi}{4}"), ("sqrt(2)", r"\sqrt{2}")),
        *(("x\u2081\u2082", "x_{12}"), ("\U0001d465", "x"), ("1.41421", r"\sqrt2")),
        *((r"0.\overline{3}", r"\frac13"), (r"\text{B, A}", r"\text{A, B}"), ("2, 1", "1, 2")),
        *((r"x=2 \text{ or } x=3", "2, 3"), (r"3 \text{ and } 2", "2,3"), ("3 or 2", "2, 3")),
        *(("(x, y) = (1, 2)", "(1,2)"), ("x=1, y=2", "(1,2)"), (r"2\text{i} + 3", "3 + 2i")),
        *(("x = 3, x = 2", "2, 3"), ("infinity", r"\infty"), ("alpha", r"\alpha")),
        *(("60 mph", r"60\text{ miles per hour}"), ("The set is {1,2,3}", r"\{1,2,3\}")),
        *((r"The value is $\sqrt{2}$", r"\sqrt2"), ("dog, cat", "cat, dog")),
    ],
)
def test_other_spellings(answer, gold):
    math_verify = reward_of("math_verify")
    assert one(math_verify, f"<answer>{answer}</answer>", gold) == 1
    assert one(math_verify, f"<answer>{answer}</answer>", "7") == 0


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    pairs(
        {
            1: (
                r"\textbf{(A)}\ 5 ~ A ; \text{(A) 5} ~ A ; (C) 5 ~ C ; C. 5 ~ (C) ; "
                r"21 ~ \textbf{(C)}\ 21 ; C ~ \textbf{(C)}\ 21 ; (C) 21 ~ \textbf{(C)}\ 21"
            ),
            0: (
                "(C) 5 ~ A ; (C) and (D) ~ C ; (C) or D ~ C ; (C) is wrong ~ C ; "
                r"(C) 22 ~ \textbf{(C)}\ 21 ; (B) 21 ~ \textbf{(C)}\ 21 ; B ~ \textbf{(C)}\ 21"
            ),
        }
    ),
)
def test_labelled_choices(answer, gold, reward):
    assert one(rewards.boxed, rf"\boxed{{{answer}}}", gold) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    pairs(
        {
            1: (
                r"\boxed\sqrt[3]{2} ~ \sqrt[3]{2} ; \boxed{5},\boxed{6} ~ 5,6 ; "
                r"$\boxed{5}$ and $\boxed{6}$ ~ 5,6 ; \boxed{5}, so \boxed{6} ~ 6 ; "
                r"\boxed{\$} ~ \$ ; \boxed{**bold**} ~ **bold**"
            ),
            0: r"\boxed{5} or \boxed{6} ~ 6",
        }
    ),
)
def test_boxes(text, gold, reward):
    assert one(rewards.boxed, text, gold) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    pairs(
        {
            1: "So $x=4$, hence the answer is 5. ~ 5 ; The answer is $5$, since $y=3$. ~ 5",
            0: (
                "So $x=4$, hence the answer is 5. ~ 4 ; The answer is $5$, since $y=3$. ~ 3 ; "
                "It is not $5$. ~ 5 ; It is at least $5$. ~ 5 ; The answer is not $5$. ~ 5 ; "
                "The answer is twice $5$. ~ 5 ; $5$ is wrong. ~ 5"
            ),
        }
    ),
)
def test_what_is_said_of_a_formula(text, gold, reward):
    math_verify = reward_of("math_verify")
    assert one(math_verify, text, gold) == reward
