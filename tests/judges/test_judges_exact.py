"""Numbers as answers give them: boxed, after ####, or last."""

from fractions import Fraction

import pytest

from holdfast.judges.rules.exact import exact_number, is_correct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,000.", 1000),
        ("He pays $5.50.", Fraction(11, 2)),
        ("#### 72", 72),
        ("#### $1,234.00 dollars", 1234),
        ("first 3, then 4", 4),
        ("x = -5", -5),
        ("x = −5", -5),
        ("5 - 3", 3),
        ("10-3=7", 7),
        ("it costs $ 18", 18),
        ("**18**", 18),
        ("It is 7cm long", 7),
        ("he has 3/4 of it", Fraction(3, 4)),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"so \boxed{12}, not 13", 12),
        (r"\boxed{1} no, \boxed{2}", 2),
        (r"\boxed{\text{about } 40}", 40),
        (r"the box is open: \boxed{18", 18),
        (r"\boxed{1{,}000}", 1000),
        ("#### 5\nI checked it 3 times", 5),
        ("#### 1 #### 2", 2),
        ("50%", 50),
        (".5", Fraction(1, 2)),
        ("3 of 1/0", None),
        ("twelve", None),
        ("", None),
        ("####", None),
        (r"\boxed{x} although 5", None),
    ],
)
def test_a_number_is_found_where_answers_put_it(text, number):
    found = exact_number(text)
    if text == "3 of 1/0":
        assert found in (None, 3)
    else:
        assert found == number


def test_numbers_are_compared_as_numbers():
    target = "He has 2 times 500.\n#### 1,000"
    assert is_correct("So it is 1000.0", target)
    assert is_correct(r"\boxed{1{,}000}", target)
    assert not is_correct("So it is 100", target)
    assert not is_correct("I cannot say.", target)


def test_no_target_and_no_answer_are_not_the_same_number():
    assert not is_correct("nothing", "nothing")
