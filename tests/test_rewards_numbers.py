"""Numbers in text: what is read as one, what it is worth, and when two are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest

from cppo import rewards
from cppo.rewards.quantities import last_number, only_number, read_quantity


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
        ("minus 5", None),
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
        ("10 - 5", 5),
        ("x = -5", -5),
        ("-$7", -7),
        ("5-3", 3),
        ("(2)-3", 3),
        ("minus \u22124", -4),
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
