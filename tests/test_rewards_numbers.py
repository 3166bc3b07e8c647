"""Numbers in text: what is read as one, what it is worth, and when two are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest

from cppo import rewards
from cppo.rewards.quantities import read_quantity
from cppo.rewards.sentences import last_number, only_number


def one(function, text, gold, **columns):
    (reward,) = function([text], prompts=["?"], answer=[gold], **columns)
    return reward


WHOLE = [
    ("42", 42),
    ("-5", -5),
    ("+3", 3),
    ("\u2212 5", -5),  # the minus sign of Unicode
    ("-1,234.5", Fraction(-2469, 2)),
    ("12,345,678", 12345678),
    ("12 000", 12000),  # groups of three, as in SI
    (r"12\,000", 12000),
    ("12{,}000", 12000),
    (r"12,\!000", 12000),
    (r"12, \! 000", 12000),
    ("12\u202f000", 12000),
    ("3 4", None),
    ("1,2", None),
    ("1,00,000", None),
    ("0 123", None),
    (".5", Fraction(1, 2)),
    ("5.", 5),
    ("3/4", Fraction(3, 4)),
    ("1/2.", Fraction(1, 2)),
    (r"-\frac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{4}", Fraction(-3, 4)),
    (r"\dfrac34", Fraction(3, 4)),
    (r"\frac1{25}", Fraction(1, 25)),
    ("1 1/2", Fraction(3, 2)),
    (r"1\frac{1}{2}", Fraction(3, 2)),
    (r"-2 \tfrac14", Fraction(-9, 4)),
    ("2\u00bd", Fraction(5, 2)),
    ("1 3/2", None),  # no proper fraction
    ("1/0", None),
    ("5e3", 5000),
    ("1.5E-3", Fraction(3, 2000)),
    ("5 x 10^3", 5000),
    ("5 \u00d7 10^3", 5000),
    (r"5 \times 10^{-3}", Fraction(1, 200)),
    (r"5\cdot10^{3}", 5000),
    ("5*10**3", 5000),
    ("10^23", 10**23),
    ("1e999999999", None),
    ("9" * 500, int("9" * 500)),
    ("9" * 1_000_000, None),
    ("\uff15", 5),  # a digit of full width
    ("$1,000", 1000),
    (r"-\$7.50", Fraction(-15, 2)),
    ("\u20ac5", 5),
    (r"50\%", 50),
    ("5 percent", 5),
    (r"90^\circ", 90),
    ("90\u00b0", 90),
    (r"25^{\circ}\mathrm{C}", 25),
    (r"5 \text{ m}", 5),
    (r"5\,\mathrm{m/s^2}", 5),
    ("5 cm^2", 5),
    ("18 apples", 18),
    ("5 million", 5_000_000),
    (r"\$2.5 \text{ billion}", 2_500_000_000),
    (r"1011_2", 1011),
    ("2x", None),
    ("5 m", None),  # a variable, outside of \text
    ("2 xy", None),
    (r"2\pi", None),
    ("2i", None),
    (r"2\mathrm{i}", None),
    ("5!", None),
    ("5^2", None),
    (r"\sqrt{2}", None),
    (r"1 - \sqrt{2}", None),
    ("5 squared", None),
    (r"3 \text{ or } 4", None),
    ("--5", None),
    ("\u0663", None),  # digits of other scripts
    ("x", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "value"), WHOLE)
def test_read_quantity(text, value):
    for wrapped in (text, f" {text} ", f"{{{text}}}", rf"\({text}\)", rf"\[{text}\]"):
        number = read_quantity(wrapped)
        assert (None if number is None else number.value) == value


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("5", ""),
        (r"5\%", "percent"),
        (r"\$5", "dollar"),
        ("5 USD", "dollar"),
        ("$5 per day", "dollar / day"),
        (r"5\text{ cm}^2", "cm^2"),
        ("5 square centimeters", "cm^2"),
        (r"5\text{ inches}", "in"),
        ("5 apples", "apple"),
        ("25 degrees Celsius", "celsius"),
        ("1011_2", "base 2"),
        ("1011_{10}", ""),
    ],
)
def test_units_have_one_name(text, unit):
    assert read_quantity(text).unit == unit


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("about 18 apples", 18),
        ("The answer is 42.", 42),
        ("$42 per day", 42),
        ("x = -5", -5),
        (r"\text{Total: } 7", 7),
        ("It is **42**", 42),
        ("= 18", 18),
        ("\u2248 18", 18),
        ("18 m\u00b2", 18),
        ("1 1/2 cups of flour", Fraction(3, 2)),
        ("5 m", 5),
        ("18 apples for 3 people", None),
        ("10:30", None),
        ("3-4", None),
        ("1 - x", None),
        ("f(5)", None),
        ("sin(5)", None),
        ("np.arcsin(10/13)", None),
        ("2x", None),
        ("H2O", None),
        ("minus 5", -5),
        ("half of 5", None),
        ("no digits", None),
    ],
)
def test_only_number(text, value):
    number = only_number(text)
    assert (None if number is None else number.value) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3+5=8, 8+9=17.", 17),
        ("$1,234.50", Fraction(2469, 2)),
        ("that is 1,234, I think", 1234),
        ("1,2,3", 3),
        ("12,345,678 in all", 12345678),
        ("45%", 45),
        (r"\$5 or 50\%", 50),
        ("10 - 5 = 5", 5),
        ("10 - 5", None),
        ("x = -5", -5),
        ("-$7", -7),
        ("5-3", None),
        ("(2)-3", None),
        ("minus 4", -4),
        ("minus \u22124", None),
        ("3.14.", Fraction(157, 50)),
        ("it is .5", Fraction(1, 2)),
        ("it is 1e3", 1000),
        ("1{,}000 m", 1000),
        ("so it is 1/2.", Fraction(1, 2)),
        (r"so it is \frac{1}{2}.", Fraction(1, 2)),
        ("so 5 x 10^3 grams", 5000),
        ("1 1/2 cups", Fraction(3, 2)),
        ("a" * 9999 + " 5 " + "b" * 9999, 5),
        ("9" * 400, None),
        ("no digits", None),
        ("", None),
    ],
)
def test_last_number(text, value):
    number = last_number(text)
    assert (None if number is None else number.value) == value


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        # exact where both are exact
        ("9007199254740993", "9007199254740992", 0),  # 2^53 + 1 and 2^53
        ("9007199254740993.0", "9007199254740992", 0),
        ("1000001", "1000000", 0),
        ("0.1", "1/10", 1),
        ("42.0", "42", 1),
        ("2/4", r"\frac{1}{2}", 1),
        ("1/3", "33333333333333333/100000000000000000", 0),
        # else relative, so that small numbers are as different as large ones
        ("6.6e-34", "1.6e-19", 0),
        ("6.6e-34", r"6.6 \times 10^{-34}", 1),
        ("1e-9", "0", 0),
        ("41.9999999", "42", 1),
        ("41.99999", "42", 0),
        ("1234567.5", "1234567", 0),
        # a decimal of six significant digits or more stands for what rounds to it
        ("0.333333", "1/3", 1),
        ("0.33333", "1/3", 0),
        ("0.666667", r"\frac23", 1),
        ("0.666666", r"\frac23", 0),
        ("16.6667", "50/3", 1),
        ("16.67", "50/3", 0),
        # units, where both have one
        ("5 cm", "5", 1),
        ("5", r"5 \text{ cm}", 1),
        ("5 centimeters", r"5 \text{ cm}", 1),
        ("5 cm", r"5 \text{ m}", 0),
        ("5 cm^2", "5 cm", 0),
        ("\u20ac5", r"\$5", 0),
        ("90", r"90^\circ", 1),
        ("90%", r"90^\circ", 0),
        # a percentage in both readings
        ("50%", "50", 1),
        ("50%", "0.5", 1),
        ("0.5", r"50\%", 1),
        ("50", r"50\%", 1),
        ("50%", "5", 0),
        (r"0.5\%", r"50\%", 0),
        # a base
        ("1011_2", "1011_2", 1),
        ("1011", "1011_2", 1),
        ("1011_3", "1011_2", 0),
        ("1011_2", "1011", 0),
        # white space
        ("1 1/2", "3/2", 1),
        ("1 1/2", "5.5", 0),
        ("1 1/2", "11/2", 0),
        ("3 4", "34", 0),
        ("1,2", "12", 0),
        ("12 000", "12000", 1),
    ],
)
@pytest.mark.parametrize("name", ["numeric", "boxed", "math_verify"])
def test_equal_numbers(name, answer, gold, equal):
    if name == "math_verify":
        pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    assert one(getattr(rewards, name), rf"\boxed{{{answer}}}", gold) == equal


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (0.1 + 0.2, "0.3"),
        (1 / 3, "1/3"),
        (4.0, "4"),
        (2**53 + 1, "9007199254740993"),
        (Fraction(1, 2), "0.5"),
        (1e22, r"10^{22}"),
    ],
)
def test_ground_truths_that_are_numbers(gold, text):
    assert one(rewards.numeric, text, gold) == one(rewards.boxed, rf"\boxed{{{text}}}", gold) == 1


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("so it is 42.", "42", 1),
        ("42 apples and 7 pears", "42", 0),
        (r"\boxed{42} because 1+41", "42", 1),
        ("<answer>42</answer>, not 43", "42", 1),
        ("$1,000,000", "1000000", 1),
        ("<answer>forty-two</answer> 42", "42", 1),  # no digit in the tag
        ("<answer>18 apples for 3 people</answer>", "3", 0),
        ("<answer>18 apples for 3 people</answer>", "18", 0),
        ("<answer>18 apples</answer> for 3 people", "18", 1),
        (r"<answer>1 - \sqrt{2}</answer>", "1", 0),
        (r"<answer>1 - \sqrt{2}</answer>", "2", 0),
        ("<answer>1/2.</answer>", "0.5", 1),
        ("<answer>5 x 10^3</answer>", "5000", 1),
        ("<answer>-5</answer>", "5", 0),
        ("steps\n#### 42\nand 1 more", "42", 0),  # GSM8K's mark is GSM8K's
        ("42", "steps 7\n#### 42", 1),
        ("42", r"so \boxed{42}", 1),
        ("42", "<answer>42</answer>", 1),
        ("-42", "42", 0),
        ("x", "42", 0),
        ("", "42", 0),
    ],
)
def test_numeric(text, gold, reward):
    assert one(rewards.numeric, text, gold) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("<think>a</think>\n<answer>42</answer>", "42", 2.0),
        ("<answer>1,042</answer>", "1042", 2.0),
        ("<answer>1042</answer>", "steps\n#### 1,042", 2.0),
        ("<answer>42.0</answer>", "42", 1.5),
        ("<answer>$42 per day</answer>", "42", 1.5),
        ("<answer>42 apples for 3 people</answer>", "42", 0.0),
        (r"<answer>\boxed{42}</answer>", "42", 1.5),
        ("it is 42", "42", 1.5),
        ("steps\n#### 42\nand 1 more", "42", 1.5),
        ("#### Step 1\nIt is 42", "42", 1.5),
        ("<answer>43</answer> 42", "42", 0.0),
        ("42 or 43", "42", 0.0),
        ("<answer>42</answer>", ["41", "42"], 2.0),
        ("", "42", 0.0),
    ],
)
def test_gsm8k(text, gold, reward):
    assert one(rewards.gsm8k, text, gold) == reward


# ---- words and signs beside a number

WRONG_BESIDE_5 = [
    *("twice 5", "double 5", "twenty 5", "at least 5", "exceeds 5", "5 is incorrect", "never 5"),
    *("5 crore", "5 bn", "not 5", "more than 5", "5 is wrong", "half of 5", "under 5", "up to 5"),
    *("5 or more", "\u00b15", "<5", "~5 million", "5^2", "5!", "2x=5", "5x", "minus 5"),
    *("negative 5", "one 5", "0x5", "5k", "5M", "5K", "5\u2074", "3 times 5", "5 squared", "2/5/1"),
    *("square root of 5", "5 and a half", "5 more than 2"),
]
# What only a reader of English can tell of running text; in a tag or a box it earns nothing.
WRONG_IN_A_TAG = [
    *("anything but 5", "cannot be 5", "quintuple 5", "hardly 5", "5 is a lie", "nobody has 5"),
    *("5+", "5?", "fifty-5", "5 below zero", "5 at most", "the square of the answer is 5"),
]


@pytest.mark.parametrize("text", WRONG_BESIDE_5 + WRONG_IN_A_TAG)
def test_words_that_may_change_a_number(text):
    texts = [f"<answer>{text}</answer>", rf"\boxed{{{text}}}", rf"\boxed{{\text{{{text}}}}}"]
    if text in WRONG_BESIDE_5:
        texts += [text, f"So it is {text}.", f"The answer is {text}."]
    for wrapped in texts:
        assert one(rewards.numeric, wrapped, "5") == 0, wrapped
        assert one(rewards.gsm8k, wrapped, "5") == 0, wrapped


@pytest.mark.parametrize("text", WRONG_BESIDE_5 + WRONG_IN_A_TAG)
def test_words_that_may_change_a_number_in_math_verify(text):
    pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    for wrapped in (f"<answer>{text}</answer>", rf"\boxed{{{text}}}", text):
        assert one(rewards.math_verify, wrapped, "5") == 0, wrapped
        assert one(rewards.math_verify, f"The answer is {wrapped}.", "5") == 0, wrapped


BEHIND = [  # words behind 5, what 5 is with them; None where only a truth with the words is equal
    *(("dozen", 60), ("dozen eggs", 60), ("lakh", 500_000), ("crore", 50_000_000)),
    *(("tenths", Fraction(1, 2)), ("hundredths", Fraction(1, 20)), ("eighths", Fraction(5, 8))),
    *(("fourths", Fraction(5, 4)), ("halves", Fraction(5, 2)), ("hundred thousand", 500_000)),
    *(("apples", 5), ("people", 5), ("children", 5), ("square units", 5), ("miles per hour", 5)),
    *(("cm^2", 5), ("a.m.", 5), ("cups", 5), ("degrees", 5), ("dollars per day", 5)),
    *(("sheep", 5), ("below zero", None), ("wrong", None), ("is wrong", None), ("xyz", None)),
]


@pytest.mark.parametrize(("words", "value"), BEHIND)
@pytest.mark.parametrize("name", ["numeric", "boxed", "math_verify"])
def test_words_behind_a_number(name, words, value):
    if name == "math_verify":
        pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    for text in (rf"\boxed{{5\text{{ {words}}}}}", rf"\boxed{{5 {words}}}"):
        assert one(getattr(rewards, name), text, "5") == (value == 5), text
        assert value in (5, None) or one(getattr(rewards, name), text, str(value)) == 1, text
        if name != "numeric":
            assert one(getattr(rewards, name), text, text) == 1


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        # in a tag
        ("<answer>5 m</answer>", "5 cm", 0),
        ("<answer>5 g</answer>", "5 kg", 0),
        ("<answer>5 s</answer>", "5 hours", 0),
        ("<answer>5 kg</answer>", "5 g", 0),
        ("<answer>about 5 kg</answer>", "5 g", 0),
        ("<answer>5 sheep</answer>", "5 sheep", 1),
        ("<answer>5 goats</answer>", "5 sheep", 0),
        ("<answer>5</answer>", "5 sheep", 1),
        ("<answer>5 meters</answer>", "5 m", 1),
        ("<answer>5m</answer>", "5 m", 1),
        ("<answer>60 mph</answer>", "60 miles per hour", 1),
        ("<answer>10\u2076</answer>", "1000000", 1),
        ("<answer>10\u2076</answer>", "10", 0),
        (r"<answer>0.\overline{3}</answer>", "1/3", 1),
        (r"<answer>0.1\overline{6}</answer>", "1/6", 1),
        # in running text
        ("The population is 1.5 million.", "1500000", 1),
        ("The population is 1.5 million.", "1.5", 0),
        ("$2 million", "2000000", 1),
        ("$2 million", "2", 0),
        ("3 thousand", "3", 0),
        ("The answer is negative 7", "-7", 1),
        ("The answer is negative 7", "7", 0),
        ("= - 5", "-5", 1),
        ("it is - 5", "-5", 1),
        ("= - 5", "5", 0),
        ("- 3 apples\n- 5 apples", "5", 1),
        ("20 squared", "20", 0),
        ("2^{10}", "10", 0),
        ("2^{10}", "2", 0),
        (r"\sqrt{4}", "4", 0),
        ("$x^2$", "2", 0),
        ("0x10", "10", 0),
        ("1/2/3", "3", 0),
        ("5\u2074", "5", 0),
        ("It is 10\u2076.", "1000000", 1),
        ("The mass is 5 kg.", "5 g", 0),
        ("The mass is 5 kg.", "5 kg", 1),
        ("The area is 5 cm^2.", "5", 1),
        ("It is 5m", "5", 1),
        ("There are 5 in total.", "5", 1),
        ("it rang 4 + 1 = 5 times.", "5", 1),
        ("it costs $14 - $9 = $5 more than mine", "5", 1),
        ("that is $60/12 = $5/month", "5", 1),
        ("700 kg - 695 kg = 5 kg", "5", 1),
        ("so 9 - 4 = 5 people did not come", "5", 1),
        ("She paid $5 that he will not pay", "5", 1),
        ("so 60/12 = 5 dozen eggs", "60", 1),  # and not 5, as nobody knows which is meant
        ("It is 5!", "5", 0),  # a factorial, or joy
        ("The answer is 5. I checked 3 times.", "5", 1),
        ("The answer is 5. I checked 3 times.", "3", 0),
        ("the answer is 5 because 2 + 3 = 5", "5", 1),
        ("the answer is 2 + 3 = 5", "5", 1),
        (r"$\frac{x}{5}$", "5", 0),
        (r"so $5\pi$", "5", 0),
        (r"$\log_2 5$", "5", 0),
        ("it is 10:30", "30", 0),
        ("It is 3-5", "5", 0),
        ("x > 5", "5", 0),
        ("<answer>five</answer> 5", "5", 1),
        # powers that no float holds
        ("10^400", "10**400", 1),
        ("10**400", 10**400, 1),
        (r"\boxed{10^{400}}", "10^400", 1),
        ("10^400", "400", 0),
        ("10^400", "10", 0),
    ],
)
def test_what_stands_beside_a_number(text, gold, reward):
    assert one(rewards.numeric, text, gold) == reward


@pytest.mark.parametrize("name", ["boxed", "exact_match", "math_verify", "numeric"])
@pytest.mark.parametrize("gold", ["10**400", "10^400", 10**400, "10^{400}"])
def test_powers_that_no_float_holds(name, gold):
    if name == "math_verify":
        pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    right = rf"\boxed{{{gold}}}"
    assert one(getattr(rewards, name), right, gold) == 1
    assert one(getattr(rewards, name), right, "5") == one(getattr(rewards, name), "5", gold) == 0


@pytest.mark.parametrize("answer", ["4,2", ",42,", "42,", "0,42"])
def test_commas_that_set_no_thousands_apart(answer):
    assert one(rewards.gsm8k, f"<answer>{answer}</answer>", "42") < 2
    assert one(rewards.gsm8k, "<answer>4,2</answer>", "42") == 0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("John has 18 apples.", 18),
        ("She makes $18 every day", 18),
        ("Janet makes 18 dollars per day.", 18),
        ("It takes 3 bolts", 3),
        ("Tom's sister bought 1,250 stickers at the fair.", 1250),
        ("He will have -3 points left", -3),
        ("They walked 2.5 km.", 2.5),
        # Sentences that say something else of the number, or of another one.
        ("John has twice 18 apples.", None),
        ("John has at least 18 apples.", None),
        ("John has 18 more apples than Mary.", None),
        ("John has not 18 apples.", None),
        ("John has twice as many as 18.", None),
        ("John thinks that 18 is wrong.", None),
        ("John has 18 apples for 3 people.", None),
        ("John has 18 dozen apples.", 216),
        ("John squared 18", None),
    ],
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
        assert (one(getattr(rewards, name), text, gold) > 0) == reward, name
