"""The monitor in the `generate` of transformers, held against our own decoding."""

import inspect

import pytest
import torch
from live_bundles import random_bundle
from transformers import GenerationConfig

from holdfast.errors import InputError, SettingsError
from holdfast.guard.monitor.control import MESSAGE, Guard, guarded, require_policy
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.monitor.processors import watch_generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import adapt
from tiny_models import PLAIN_TEMPLATE, tiny_model, tiny_tokenizer

GREEDY = Sampling(temperature=0, max_thinking=0, max_answer=24)
TEXTS = [
    f"<|user|>{words}<|end|><|assistant|>"
    for words in ["How are you?", "Tell me of boats and of the sea.", "Why", "A b c d"]
]


@pytest.fixture(scope="module")
def plain():
    """A model without thinking: nothing is forced, so that both ways are the same."""
    return adapt(tiny_model(), tiny_tokenizer(PLAIN_TEMPLATE, tags=False))


def ours(monitor, policy="observe", sampling=GREEDY):
    asked = [(text, seed) for seed, text in enumerate(TEXTS)]
    return guarded(monitor, asked, sampling, policy=policy)


def firing(adapter, name="last"):
    """A bundle whose detector fires on one row alone."""
    best = [
        row.last.scores[name] for row in ours(Monitor(adapter, random_bundle(adapter)))
    ]
    first, second = sorted(best)[-1:-3:-1]
    limit = (first + second) / 2
    bundle = random_bundle(adapter, {name: limit}, acts_on=name)
    return Monitor(adapter, bundle), best.index(first)


def inputs(adapter, texts=TEXTS, side="left"):
    rows = [adapter.encode(text) for text in texts]
    width = max(map(len, rows))
    pads = [[257] * (width - len(row)) for row in rows]
    seen = [[1] * len(row) for row in rows]
    ids, mask = [], []
    for row, pad, own in zip(rows, pads, seen, strict=True):
        none = [0] * len(pad)
        ids.append([*pad, *row] if side == "left" else [*row, *pad])
        mask.append([*none, *own] if side == "left" else [*own, *none])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def drawn(adapter, watched, given=None, **more):
    given = inputs(adapter) if given is None else given
    more = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 257} | more
    found = adapter.model.generate(**given, **more, **watched.arguments)
    width = given["input_ids"].shape[1]
    return [tuple(row[width:].tolist()) for row in found]


def cut(row):
    """What a row said, up to its first end."""
    return row[: row.index(257)] if 257 in row else row


def said(found):
    row = found.completion
    return cut(row.token_ids[row.spans.prompt[1] :])


@pytest.mark.parametrize("policy", ["observe", "stop", "refuse", "steer"])
def test_every_policy_is_what_it_is_in_our_own_decoding(plain, policy):
    monitor, top = firing(plain)
    expected = ours(monitor, policy)
    with watch_generate(monitor, policy) as watched:
        rows = drawn(plain, watched)
    assert watched.fired_at == {top: expected[top].fired_at}
    for row, other in zip(rows, expected, strict=True):
        assert cut(row)[: len(said(other))] == said(other)
    for index, (watch, other) in enumerate(zip(watched.watches, expected, strict=True)):
        if index != top or policy in ("observe", "steer"):
            for name, score in other.last.scores.items():
                assert watch.last.scores[name] == pytest.approx(score, abs=2e-4)
    at = expected[top].fired_at
    if policy == "stop":
        assert cut(rows[top]) == rows[top][: at + 1]
    if policy == "refuse":
        text = plain.tokenizer.decode(cut(rows[top])[at + 1 :])
        assert MESSAGE.startswith(text)
        assert len(text) > 5 or at > 15


def test_a_cache_of_one_size_sees_each_prompt_without_its_padding(plain):
    """Its mask is one of queries and keys, with places for what is not written yet."""
    monitor, top = firing(plain)
    with watch_generate(monitor, "stop") as watched:
        rows = drawn(plain, watched)
        usual = [watch.written.token_ids for watch in watched.watches]
        fired = watched.fired_at
        fixed = drawn(
            plain, watched, cache_implementation="static", disable_compile=True
        )
        found = [watch.written.token_ids for watch in watched.watches]
    assert (fixed, found, watched.fired_at) == (rows, usual, fired)
    prompts = [tuple(plain.encode(text)) for text in TEXTS]
    starts = [
        tuple(ids[: len(prompt)]) for ids, prompt in zip(found, prompts, strict=True)
    ]
    assert starts == prompts
    assert set(fired) == {top}


def test_what_the_end_of_a_prompt_says_counts_where_nobody_thinks(plain):
    low = Monitor(plain, random_bundle(plain, {"end": -1e9}, acts_on="end"))
    found = ours(low, "stop")
    # It is told with the first token that is read.
    assert [each.fired_at for each in found] == [0] * len(TEXTS)
    with watch_generate(low, "stop") as watched:
        drawn(plain, watched)
    assert set(watched.fired_at.values()) == {0}
    assert all(
        path[0].fired == ("end",)
        for path in low.score_texts([(plain.encode(text), [65, 66]) for text in TEXTS])
    )


def test_nothing_of_one_call_is_left_in_the_next(plain):
    monitor, top = firing(plain)
    with watch_generate(monitor, "stop") as watched:
        first = drawn(plain, watched)
        others = [text for index, text in enumerate(TEXTS) if index != top]
        calm = drawn(plain, watched, inputs(plain, others))
        assert watched.fired_at == {}
        assert drawn(plain, watched) == first
        assert set(watched.fired_at) == {top}
    assert [cut(row) for row in calm] == [
        cut(row) for index, row in enumerate(first) if index != top
    ]
    # Behind the context the model is as it was.
    again = plain.model.generate(
        **inputs(plain), max_new_tokens=24, do_sample=False, pad_token_id=257
    )
    assert len(
        cut(tuple(again[top].tolist()[inputs(plain)["input_ids"].shape[1] :]))
    ) > (len(cut(first[top])))


def test_sampled_rows_are_stopped_as_well(plain):
    monitor = Monitor(plain, random_bundle(plain, {"last": -1e9}))
    with watch_generate(monitor, "stop") as watched:
        torch.manual_seed(0)
        rows = drawn(plain, watched, do_sample=True, temperature=2.0)
    # The state of the first token is there when the second is drawn.
    assert all(len(cut(row)) <= 1 for row in rows)
    assert {at for at in watched.fired_at.values()} <= {0}


@pytest.mark.parametrize(
    ("more", "match"),
    [
        # A single token is drawn before any beam is left for another.
        ({"num_beams": 2, "max_new_tokens": 1}, "one beam"),
        (
            {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=1)},
            "one beam",
        ),
        ({"use_cache": False}, "a pass with a cache"),
    ],
)
def test_what_cannot_be_watched_is_refused(plain, more, match):
    monitor = Monitor(plain, random_bundle(plain))
    with watch_generate(monitor) as watched, pytest.raises(SettingsError, match=match):
        drawn(plain, watched, **more)


@pytest.mark.parametrize("policy", ["Stop", "block", ""])
def test_what_is_no_policy_lets_nothing_through(plain, policy):
    monitor = Monitor(plain, random_bundle(plain))
    with pytest.raises(SettingsError, match="a policy among observe, stop"):
        require_policy(monitor, policy)
    # What asks for it looks first; types are checked at run time in tests alone.
    for begin in (
        lambda: next(inspect.unwrap(watch_generate)(monitor, policy)),
        lambda: inspect.unwrap(Guard.__init__)(object.__new__(Guard), monitor, policy),
    ):
        with pytest.raises(SettingsError, match="a policy among observe, stop"):
            begin()
    # Nothing is left on the model.
    assert "generate" not in vars(plain.model)


def test_padding_on_the_right_is_refused(plain):
    monitor = Monitor(plain, random_bundle(plain))
    given = inputs(plain, side="right")
    with watch_generate(monitor) as watched, pytest.raises(InputError, match="left"):
        drawn(plain, watched, given)


def test_continuous_batching_which_asks_no_criterion_is_refused(plain):
    monitor = Monitor(plain, random_bundle(plain))
    with (
        watch_generate(monitor, "stop"),
        pytest.raises(SettingsError, match="generate_batch"),
    ):
        plain.model.generate_batch([list(plain.encode(TEXTS[0]))])
    assert "generate_batch" not in vars(plain.model)


def test_an_answer_is_not_drawn_again_within_a_call(plain):
    monitor = Monitor(plain, random_bundle(plain))
    with (
        pytest.raises(SettingsError, match="guarded"),
        watch_generate(monitor, "redraw"),
    ):
        pass
