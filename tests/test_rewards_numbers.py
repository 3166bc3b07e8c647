"""Numbers in text: what is read as one, what it is worth, and when two are the same."""

from fractions import Fraction

import pytest
from reward_cases import one, pairs, reward_of, spread

from cppo import rewards
from cppo.rewards.quantities import read_quantity
from cppo.rewards.sentences import last_number, only_number

WHOLE = [
    *spread(
        {
            42: "42",
            -5: "-5 ; \u2212 5",
            3: "+3",
            Fraction(-2469, 2): "-1,234.5",
            12345678: "12,345,678",
            12000: "12 000 ; 12\\,000 ; 12{,}000 ; 12,\\!000 ; 12, \\! 000 ; 12\u202f000",
            None: (
                "3 4 ; 1,2 ; 1,00,000 ; 0 123 ; 1 3/2 ; 1/0 ; 1e999999999 ; 2x ; 5 m ; 2 xy ; "
                r"2\pi ; 2i ; 2\mathrm{i} ; 5! ; 5^2 ; \sqrt{2} ; 1 - \sqrt{2} ; 5 squared ; "
                "3 \\text{ or } 4 ; --5 ; \u0663 ; x ; "
            ),
            Fraction(1, 2): ".5 ; 1/2.",
            5: "5. ; \uff15 ; \u20ac5 ; 5 percent ; 5 \\text{ m} ; 5\\,\\mathrm{m/s^2} ; 5 cm^2",
            Fraction(3, 4): r"3/4 ; \dfrac34",
            Fraction(-3, 4): r"-\frac{3}{4} ; \frac{-3}{4}",
            Fraction(1, 25): r"\frac1{25}",
            Fraction(3, 2): r"1 1/2 ; 1\frac{1}{2}",
            Fraction(-9, 4): r"-2 \tfrac14",
            Fraction(5, 2): "2\xbd",
            5000: "5e3 ; 5 x 10^3 ; 5 \xd7 10^3 ; 5\\cdot10^{3} ; 5*10**3",
            Fraction(3, 2000): "1.5E-3",
            Fraction(1, 200): r"5 \times 10^{-3}",
            10**23: "10^23",
            1000: "$1,000",
            Fraction(-15, 2): r"-\$7.50",
            50: r"50\%",
            90: "90^\\circ ; 90\xb0",
            25: r"25^{\circ}\mathrm{C}",
            18: "18 apples",
            5_000_000: "5 million",
            2_500_000_000: r"\$2.5 \text{ billion}",
            1011: "1011_2",
        }
    ),
    ("9" * 500, int("9" * 500)),
    ("9" * 1_000_000, None),
]


@pytest.mark.parametrize(("text", "value"), WHOLE)
def test_read_quantity(text, value):
    for wrapped in (text, f" {text} ", f"{{{text}}}", rf"\({text}\)", rf"\[{text}\]"):
        number = read_quantity(wrapped)
        assert (None if number is None else number.value) == value


@pytest.mark.parametrize(
    ("text", "unit"),
    spread(
        {
            "": "5 ; 1011_{10}",
            "percent": r"5\%",
            "dollar": r"\$5 ; 5 USD",
            "dollar / day": "$5 per day",
            "cm^2": r"5\text{ cm}^2 ; 5 square centimeters",
            "in": r"5\text{ inches}",
            "apple": "5 apples",
            "celsius": "25 degrees Celsius",
            "base 2": "1011_2",
        }
    ),
)
def test_units_have_one_name(text, unit):
    assert read_quantity(text).unit == unit


@pytest.mark.parametrize(
    ("text", "value"),
    spread(
        {
            18: "about 18 apples ; = 18 ; \u2248 18 ; 18 m\xb2",
            42: "The answer is 42. ; $42 per day ; It is **42**",
            -5: "x = -5 ; minus 5",
            7: r"\text{Total: } 7",
            Fraction(3, 2): "1 1/2 cups of flour",
            5: "5 m",
            None: (
                "18 apples for 3 people ; 10:30 ; 3-4 ; 1 - x ; f(5) ; sin(5) ; "
                "np.arcsin(10/13) ; 2x ; H2O ; half of 5 ; no digits"
            ),
        }
    ),
)
def test_only_number(text, value):
    number = only_number(text)
    assert (None if number is None else number.value) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *spread(
            {
                17: "3+5=8, 8+9=17.",
                Fraction(2469, 2): "$1,234.50",
                1234: "that is 1,234, I think",
                3: "1,2,3",
                12345678: "12,345,678 in all",
                45: "45%",
                50: r"\$5 or 50\%",
                5: "10 - 5 = 5",
                None: "10 - 5 ; 5-3 ; (2)-3 ; minus \u22124 ; no digits ; ",
                -5: "x = -5",
                -7: "-$7",
                -4: "minus 4",
                Fraction(157, 50): "3.14.",
                Fraction(1, 2): r"it is .5 ; so it is 1/2. ; so it is \frac{1}{2}.",
                1000: "it is 1e3 ; 1{,}000 m",
                5000: "so 5 x 10^3 grams",
                Fraction(3, 2): "1 1/2 cups",
            }
        ),
        ("a" * 9999 + " 5 " + "b" * 9999, 5),
        ("9" * 400, None),
    ],
)
def test_last_number(text, value):
    number = last_number(text)
    assert (None if number is None else number.value) == value


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    pairs(
        {
            0: (
                "9007199254740993 ~ 9007199254740992 ; 9007199254740993.0 ~ 9007199254740992 ; "
                "1000001 ~ 1000000 ; 1/3 ~ 33333333333333333/100000000000000000 ; "
                "6.6e-34 ~ 1.6e-19 ; 1e-9 ~ 0 ; 41.99999 ~ 42 ; 1234567.5 ~ 1234567 ; "
                r"0.33333 ~ 1/3 ; 0.666666 ~ \frac23 ; 16.67 ~ 50/3 ; 5 cm ~ 5 \text{ m} ; "
                "5 cm^2 ~ 5 cm ; \u20ac5 ~ \\$5 ; 90% ~ 90^\\circ ; 50% ~ 5 ; 0.5\\% ~ 50\\% ; "
                "1011_3 ~ 1011_2 ; 1011_2 ~ 1011 ; 1 1/2 ~ 5.5 ; 1 1/2 ~ 11/2 ; 3 4 ~ 34 ; "
                "1,2 ~ 12"
            ),
            1: (
                r"0.1 ~ 1/10 ; 42.0 ~ 42 ; 2/4 ~ \frac{1}{2} ; 6.6e-34 ~ 6.6 \times 10^{-34} ; "
                r"41.9999999 ~ 42 ; 0.333333 ~ 1/3 ; 0.666667 ~ \frac23 ; 16.6667 ~ 50/3 ; "
                r"5 cm ~ 5 ; 5 ~ 5 \text{ cm} ; 5 centimeters ~ 5 \text{ cm} ; 90 ~ 90^\circ ; "
                r"50% ~ 50 ; 50% ~ 0.5 ; 0.5 ~ 50\% ; 50 ~ 50\% ; 1011_2 ~ 1011_2 ; "
                "1011 ~ 1011_2 ; 1 1/2 ~ 3/2 ; 12 000 ~ 12000"
            ),
        }
    ),
)
@pytest.mark.parametrize("name", ["numeric", "boxed", "math_verify"])
def test_equal_numbers(name, answer, gold, equal):
    assert one(reward_of(name), rf"\boxed{{{answer}}}", gold) == equal


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
    pairs(
        {
            1: (
                r"so it is 42. ~ 42 ; \boxed{42} because 1+41 ~ 42 ; "
                "<answer>42</answer>, not 43 ~ 42 ; $1,000,000 ~ 1000000 ; "
                "<answer>forty-two</answer> 42 ~ 42 ; "
                "<answer>18 apples</answer> for 3 people ~ 18 ; <answer>1/2.</answer> ~ 0.5 ; "
                "<answer>5 x 10^3</answer> ~ 5000 ; 42 ~ steps 7\n#### 42 ; 42 ~ so \\boxed{42} ; "
                "42 ~ <answer>42</answer>"
            ),
            0: (
                "42 apples and 7 pears ~ 42 ; <answer>18 apples for 3 people</answer> ~ 3 ; "
                "<answer>18 apples for 3 people</answer> ~ 18 ; "
                r"<answer>1 - \sqrt{2}</answer> ~ 1 ; <answer>1 - \sqrt{2}</answer> ~ 2 ; "
                "<answer>-5</answer> ~ 5 ; steps\n#### 42\nand 1 more ~ 42 ; -42 ~ 42 ; x ~ 42 ; "
                " ~ 42"
            ),
        }
    ),
)
def test_numeric(text, gold, reward):
    assert one(rewards.numeric, text, gold) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        *pairs(
            {
                2.0: (
                    "<think>a</think>\n<answer>42</answer> ~ 42 ; <answer>1,042</answer> ~ 1042 ; "
                    "<answer>1042</answer> ~ steps\n#### 1,042"
                ),
                1.5: (
                    "<answer>42.0</answer> ~ 42 ; <answer>$42 per day</answer> ~ 42 ; "
                    r"<answer>\boxed{42}</answer> ~ 42 ; it is 42 ~ 42 ; "
                    "steps\n#### 42\nand 1 more ~ 42 ; #### Step 1\nIt is 42 ~ 42"
                ),
                0.0: (
                    "<answer>42 apples for 3 people</answer> ~ 42 ; <answer>43</answer> 42 ~ 42 ; "
                    "42 or 43 ~ 42 ;  ~ 42"
                ),
            }
        ),
        ("<answer>42</answer>", ["41", "42"], 2.0),
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
    for text in (rf"\boxed{{5\text{{ {words}}}}}", rf"\boxed{{5 {words}}}"):
        assert one(reward_of(name), text, "5") == (value == 5), text
        assert value in (5, None) or one(reward_of(name), text, str(value)) == 1, text
        if name != "numeric":
            assert one(reward_of(name), text, text) == 1


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        *pairs(
            {
                0: (
                    "<answer>5 m</answer> ~ 5 cm ; <answer>5 g</answer> ~ 5 kg ; "
                    "<answer>5 s</answer> ~ 5 hours ; <answer>5 kg</answer> ~ 5 g ; "
                    "<answer>about 5 kg</answer> ~ 5 g ; <answer>5 goats</answer> ~ 5 sheep ; "
                    "<answer>10\u2076</answer> ~ 10 ; The population is 1.5 million. ~ 1.5 ; "
                    "$2 million ~ 2 ; 3 thousand ~ 3 ; The answer is negative 7 ~ 7 ; = - 5 ~ 5 ; "
                    r"20 squared ~ 20 ; 2^{10} ~ 10 ; 2^{10} ~ 2 ; \sqrt{4} ~ 4 ; $x^2$ ~ 2 ; "
                    "0x10 ~ 10 ; 1/2/3 ~ 3 ; 5\u2074 ~ 5 ; The mass is 5 kg. ~ 5 g ; "
                    "It is 5! ~ 5 ; The answer is 5. I checked 3 times. ~ 3 ; "
                    r"$\frac{x}{5}$ ~ 5 ; so $5\pi$ ~ 5 ; $\log_2 5$ ~ 5 ; it is 10:30 ~ 30 ; "
                    "It is 3-5 ~ 5 ; x > 5 ~ 5 ; 10^400 ~ 400 ; 10^400 ~ 10"
                ),
                1: (
                    "<answer>5 sheep</answer> ~ 5 sheep ; <answer>5</answer> ~ 5 sheep ; "
                    "<answer>5 meters</answer> ~ 5 m ; <answer>5m</answer> ~ 5 m ; "
                    "<answer>60 mph</answer> ~ 60 miles per hour ; "
                    "<answer>10\u2076</answer> ~ 1000000 ; "
                    r"<answer>0.\overline{3}</answer> ~ 1/3 ; "
                    r"<answer>0.1\overline{6}</answer> ~ 1/6 ; "
                    "The population is 1.5 million. ~ 1500000 ; $2 million ~ 2000000 ; "
                    "The answer is negative 7 ~ -7 ; = - 5 ~ -5 ; it is - 5 ~ -5 ; "
                    "- 3 apples\n- 5 apples ~ 5 ; It is 10\u2076. ~ 1000000 ; "
                    "The mass is 5 kg. ~ 5 kg ; The area is 5 cm^2. ~ 5 ; It is 5m ~ 5 ; "
                    "There are 5 in total. ~ 5 ; it rang 4 + 1 = 5 times. ~ 5 ; "
                    "it costs $14 - $9 = $5 more than mine ~ 5 ; that is $60/12 = $5/month ~ 5 ; "
                    "700 kg - 695 kg = 5 kg ~ 5 ; so 9 - 4 = 5 people did not come ~ 5 ; "
                    "She paid $5 that he will not pay ~ 5 ; so 60/12 = 5 dozen eggs ~ 60 ; "
                    "The answer is 5. I checked 3 times. ~ 5 ; "
                    "the answer is 5 because 2 + 3 = 5 ~ 5 ; the answer is 2 + 3 = 5 ~ 5 ; "
                    r"<answer>five</answer> 5 ~ 5 ; 10^400 ~ 10**400 ; \boxed{10^{400}} ~ 10^400"
                ),
            }
        ),
        ("10**400", 10**400, 1),
    ],
)
def test_what_stands_beside_a_number(text, gold, reward):
    assert one(rewards.numeric, text, gold) == reward


@pytest.mark.parametrize("name", ["boxed", "exact_match", "math_verify", "numeric"])
@pytest.mark.parametrize("gold", ["10**400", "10^400", 10**400, "10^{400}"])
def test_powers_that_no_float_holds(name, gold):
    right = rf"\boxed{{{gold}}}"
    assert one(reward_of(name), right, gold) == 1
    assert one(reward_of(name), right, "5") == one(reward_of(name), "5", gold) == 0


@pytest.mark.parametrize("answer", ["4,2", ",42,", "42,", "0,42"])
def test_commas_that_set_no_thousands_apart(answer):
    assert one(rewards.gsm8k, f"<answer>{answer}</answer>", "42") < 2
    assert one(rewards.gsm8k, "<answer>4,2</answer>", "42") == 0
