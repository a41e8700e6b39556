"""Answers as a study holds them, which no model drew."""

from holdfast.data.chat.conversation import Spans
from holdfast.rollout.rows import Rollout


def rollout(role, number, verdict, *, split="test", wrapper=None, thinking=30):
    harmful = role in ("harmful", "wrapped")
    spans = Spans((0, 5), (5, 5 + thinking), (5 + thinking, 8 + thinking), (8, 9))
    return Rollout(
        row_id=f"{role}/{number}/{wrapper}",
        role=role,
        request_id=f"r{number}",
        prompt_id=f"{number:04}",
        source="",
        split=split,
        label="harmful" if harmful else "benign",
        wrapper=wrapper,
        topic=None,
        system_prompt=None,
        prompt="",
        sample=0,
        seed=0,
        thinking="",
        answer="",
        token_ids=(),
        spans=spans,
        finish="stop",
        closed=True,
        forced_close=False,
        min_top2_gap=None,
        verdict=verdict,
        reason="",
        judge="",
    )
