"""What is broken is counted beside what was said."""

from holdfast.data.chat.conversation import Spans
from holdfast.report.text import outcome_columns
from holdfast.rollout.rows import OUTCOMES, Rollout, from_table, outcome_block, to_table


def row(number, verdict, flaw=None, closed=True):
    return Rollout(
        f"harmful/{number}/0", "harmful", str(number), str(number), "s", "test",
        "harmful", None, None, None, "q", 0, 0, "t", "a", (1, 2),
        Spans((0, 1), (1, 1), (1, 1), (1, 2)), "stop", closed, False, None, verdict,
        "", "rules-3", flaw,
    )  # fmt: skip


ROWS = [
    row(1, "refused", "ended_inside", closed=False),
    row(2, "ended_inside", "ended_inside", closed=False),
    row(3, "refused", "loop"),
    row(4, "complied"),
]


def test_a_refusal_inside_the_thinking_is_counted_as_both():
    found = outcome_block(ROWS, 0)["harmful"]
    assert found["refused"]["value"] == 0.5
    assert found["ended_inside"]["value"] == 0.25
    assert found["degenerate"]["value"] == 0.0
    assert found["flag_ended_inside"]["value"] == 0.5
    assert found["flag_loop"]["value"] == 0.25
    assert sum(found[each]["value"] for each in OUTCOMES) == 1
    assert "Ended inside the thinking" in outcome_columns([found]).values()
    assert list(outcome_columns([outcome_block(ROWS[3:], 0)["harmful"]])) == [
        *("refused", "complied", "partial", "degenerate", "unparsed")
    ]


def test_a_row_keeps_its_flaw_and_an_older_table_has_none():
    table = to_table(ROWS)
    assert [each.flaw for each in from_table(table)] == [each.flaw for each in ROWS]
    assert from_table(table.drop_columns(["flaw"]))[0].flaw is None


def test_an_answer_without_the_end_of_its_thinking_is_in_no_group_of_the_trace():
    assert [each.group for each in ROWS] == [
        *(None, None, "harmful_refused", "harmful_complied")
    ]
