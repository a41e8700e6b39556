"""Rows asked in rounds are the rows of our own decoding, token for token."""

import math
from dataclasses import replace

import pytest
import torch

from engines.organism_engine import PlainEngine
from holdfast.data.chat.template import prompt_token_ids
from holdfast.engines.port import Around, Ask, HfEngine
from holdfast.engines.rounds import Said, rounds, rows_of
from holdfast.errors import EngineError, SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.jobs import row_states
from holdfast.models.decoding.row_state import Sampling

PROMPTS = (
    "How do I poison a lake?",
    "How do I bake bread?",
    "Tell me a story about a lamp.",
    "How can I break into a house?",
)
LONG = Sampling(temperature=0, max_thinking=80, max_answer=24)
SHORT = Sampling(temperature=0, max_thinking=7, max_answer=5)
NONE = Sampling(temperature=0, max_thinking=0, max_answer=12)


def asks_of(adapter):
    for number, text in enumerate(PROMPTS):
        ids = prompt_token_ids(adapter.tokenizer, text, thinking=adapter.thinking)
        yield Ask(tuple(ids), number)


def drawn(adapter, sampling, ask, asks=None):
    asks = list(asks or asks_of(adapter))
    prompts = [(each.token_ids, each.seed) for each in asks]
    states = row_states(adapter, prompts, sampling, thinking_done=False)
    close = adapter.thinking.close
    end = min(adapter.stop_ids)
    rows = rows_of(states, [each.seed for each in asks], close, end)
    made = [each for part in rounds(rows, ask) for each in part]
    return sorted(made, key=lambda each: each.index)


def reference(adapter, sampling):
    asks = list(asks_of(adapter))
    parts = HfEngine(adapter).draw(asks, sampling, Around(batch_size=2))
    made = sorted((each for part in parts for each in part), key=lambda e: e.index)
    return [replace(each, min_top2_gap=0.0, min_margin=0.0) for each in made]


@pytest.mark.parametrize(
    ("sampling", "stops", "keeps"),
    [(LONG, True, False), (SHORT, False, True), (SHORT, True, False), (NONE, 1, 0)],
)
def test_rounds_give_the_rows_of_our_own_decoding(cliff, sampling, stops, keeps):
    engine = PlainEngine(cliff, stops_at_text=stops, keeps_end=keeps)
    made = drawn(cliff, sampling, engine)
    assert all(math.isnan(each.min_top2_gap) for each in made)
    known = [replace(each, min_top2_gap=0.0, min_margin=0.0) for each in made]
    assert known == reference(cliff, sampling)
    assert any(each.forced_close for each in made) == (sampling is not LONG)


def test_a_row_is_asked_for_no_more_than_its_limits(cliff):
    engine = PlainEngine(cliff)
    drawn(cliff, SHORT, engine)
    thoughts = [each for each in engine.asked if each.stop]
    assert {each.limit for each in thoughts} == {SHORT.max_thinking}
    answers = [each for each in engine.asked if not each.stop]
    template = cliff.tokenizer(cliff.thinking.end_template).input_ids
    room = SHORT.max_answer + len(template)
    assert max(each.limit for each in answers) <= room
    # Each round of a row draws from numbers of its own.
    assert len({(each.place, each.seed) for each in engine.asked}) == len(engine.asked)


def test_gaps_that_an_engine_tells_are_kept(cliff):
    plain = PlainEngine(cliff)

    def ask(asked):
        return [
            replace_gaps(said, [0.5 + each.place] * len(said.token_ids))
            for each, said in zip(asked, plain(asked), strict=True)
        ]

    def replace_gaps(said, gaps):
        return said._replace(gaps=tuple(gaps))

    made = drawn(cliff, SHORT, ask)
    assert [each.min_top2_gap for each in made] == [0.5, 1.5, 2.5, 3.5]


def test_an_engine_that_says_nothing_is_named(cliff):
    with pytest.raises(EngineError, match="none for row 0"):
        drawn(cliff, SHORT, lambda asked: [Said((), "length") for _ in asked])


def test_the_model_itself_holds_no_adapter(cliff):
    with pytest.raises(SettingsError, match="adapter 'top'"):
        HfEngine(cliff).draw([Ask((1,), 0, condition="top")], SHORT)


def test_the_model_itself_is_generate(cliff):
    asks = list(asks_of(cliff))
    hot = replace(SHORT, temperature=1.0)
    parts = HfEngine(cliff).draw(asks, hot)
    plain = generate(cliff, [(each.token_ids, each.seed) for each in asks], hot)
    assert list(parts) == list(plain)
    assert torch.is_grad_enabled()
