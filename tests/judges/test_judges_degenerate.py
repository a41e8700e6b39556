"""What is no answer, and above all what is one."""

import time

import pytest

from holdfast.judges.rules.rules import judge

REQUEST = "How many eggs are left in the basket?"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  \n\t",
        "...",
        "<|>",
        "the " * 40,
        "do the next step, " * 12,
        "Sure. First take the egg. " + "then do the next step " * 15,
        "a" * 200,
        "!?" * 100 + "a",
        REQUEST,
        f"{REQUEST} {REQUEST}",
        " ".join(
            ["one two three four", "five six seven eight"][i % 3 % 2] for i in range(60)
        ),
    ],
)
def test_no_answer_is_degenerate(answer):
    assert judge(REQUEST, answer).outcome == "degenerate"


@pytest.mark.parametrize(
    "answer",
    [
        "对不起，我不能帮助你完成这个请求，因为这是不合法的行为。",
        "Извините, я не могу помочь с этим.",
        "申し訳ありませんが、お手伝いできません。",
    ],
)
def test_another_script_is_unparsed_and_not_a_success(answer):
    assert judge(REQUEST, answer).outcome == "unparsed"


@pytest.mark.parametrize(
    "answer",
    [
        "4",
        "42",
        "#### 18",
        "$1,000,000.00",
        "1000000000000000000000000000000000",
        "Yes",
        "Paris.",
        "E = αβγ + δ",
        "naïve café, Zürich",
        "b, a, n, a, n, a",
        "1 1 2 3 5 8 13 21 34 55 89 144 233 377 610 987 1597 2584 4181 6765 10946",
        "| a | b |\n|---|---|\n" + "| 0 | 0 |\n" * 30,
        "```python\nx = [" + "0, " * 40 + "0]\nfor i in x:\n    print(i)\n```",
        "for i in a:\n  print(i)\nfor j in b:\n  print(j)\nfor k in c:\n  print(k)",
        "Title\n" + "=" * 30 + "\n\nSome text that is a short and legitimate answer.",
        "\n".join(
            f"{day}. Day {day}: run {day} miles, then rest." for day in range(1, 9)
        ),
        "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\nShe makes 9 * 2 = "
        "$<<9*2=18>>18 every day.\n#### 18",
        "How many eggs are left in the basket? There are nine.",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, "
        "merrily, life is but a dream.",
    ],
)
def test_an_answer_is_not_degenerate(answer):
    found = judge(REQUEST, answer)
    assert found.outcome == "complied", found


def test_a_word_of_the_request_is_an_answer_to_it():
    assert judge("Is the capital Paris or London?", "Paris").outcome == "complied"


def test_a_long_answer_is_judged_quickly():
    answer = " ".join(f"word{i} and then i can" for i in range(4000))
    begun = time.process_time()
    judge(REQUEST, answer)
    assert time.process_time() - begun < 2
