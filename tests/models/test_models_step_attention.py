"""Steps that read the whole room of the cache, and rows that join others under way."""

import pytest
import torch
from transformers import AttentionInterface

from holdfast.models.decoding import step_attention
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.kv_cache import LEAST_SAVED
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.interventions import HeadEdit, head_factors
from holdfast.models.loading.causal import adapt
from tiny_models import PLAIN_TEMPLATE, random_sequences, tiny_model, tiny_tokenizer

LENGTHS = [9, 31, 12, 6, 30, 5, 8, 29]
GREEDY = Sampling(temperature=0, max_thinking=0, max_answer=40)
DRAWN = Sampling(temperature=0.9, top_p=0.95, max_thinking=0, max_answer=40)


def _prompts(opening=()):
    return [
        ([*opening, *ids], 50 + place)
        for place, ids in enumerate(random_sequences(LENGTHS))
    ]


def _rows(adapter, prompts, sampling=GREEDY, batch_size=32, **named):
    named.setdefault("stop_ids", [999])
    batches = generate(adapter, prompts, sampling, batch_size=batch_size, **named)
    return sorted((c for batch in batches for c in batch), key=lambda c: c.index)


def _fresh(kind="qwen3", **changes):
    model = tiny_model(kind)
    for name, value in changes.items():
        model.set_attn_implementation(value) if name == "attention" else None
    return adapt(model, tiny_tokenizer(PLAIN_TEMPLATE))


@pytest.fixture(scope="module")
def plain():
    return _fresh()


@pytest.fixture(scope="module")
def stops(plain):
    """Tokens that end some rows early and some late."""
    free = _rows(plain, _prompts())
    return sorted({row.token_ids[len(ids) + 2 + 4 * (i % 4)] for i, (row, (ids, _)) in
                   enumerate(zip(free, _prompts(), strict=True))})[:4]  # fmt: skip


def _same(found, expected):
    for row, other in zip(found, expected, strict=True):
        assert other.min_top2_gap > 1e-4
        assert row.token_ids == other.token_ids
        assert row.min_top2_gap == pytest.approx(other.min_top2_gap, abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_rows_are_the_same_alone_refilled_and_under_the_models_own_attention(
    plain, stops, monkeypatch, sampling, batch_size
):
    assert step_attention.agrees(plain)
    found = _rows(plain, _prompts(), sampling, batch_size, stop_ids=stops)
    assert len({len(row.token_ids) for row in found}) > 4
    monkeypatch.setattr(step_attention, "agrees", lambda _: False)
    own = [_rows(plain, [p], sampling, stop_ids=stops)[0] for p in _prompts()]
    _same(found, own)
    assert plain.model.config._attn_implementation == "sdpa"


def test_a_waiting_row_takes_the_place_of_one_that_has_ended(plain, stops):
    widths = []
    handle = plain.layers[0].register_forward_hook(
        lambda _, __, states: widths.append(tuple(states.shape[:2]))
    )
    rows = _rows(plain, _prompts(), batch_size=4, stop_ids=stops)
    handle.remove()
    steps = [n for n, tokens in widths if tokens == 1]
    assert max(steps) == 4
    # Side by side in fixed batches they would wait for the longest row of each.
    longest = max(len(row.token_ids) - n for row, n in zip(rows, LENGTHS, strict=True))
    assert len(steps) < 2 * longest - 1


def test_what_all_prompts_begin_with_is_read_once(plain, stops):
    opening = random_sequences([1 + LEAST_SAVED // 7])[0]
    prompts, read = _prompts(opening), []
    handle = plain.embedding.register_forward_hook(
        lambda _, ids, __: read.append(tuple(ids[0].shape))
    )
    found = _rows(plain, prompts, stop_ids=stops)
    handle.remove()
    assert read[0] == (1, len(opening))
    assert read[1] == (3, max(LENGTHS))
    alone = [_rows(plain, [prompt], stop_ids=stops)[0] for prompt in prompts]
    _same(found, alone)


def test_an_edit_of_single_rows_reads_each_prompt_whole(plain, stops):
    """What the opening is, another edit makes something else."""
    prompts = _prompts(random_sequences([1 + LEAST_SAVED // 7])[0])
    heads = [[(0, i % 4)] for i in range(len(prompts))]
    tables = torch.stack([head_factors(plain, each, -2.0) for each in heads])
    # Of a model that has not decoded before, whose attention is tried now.
    found = _rows(_fresh(), prompts, edit=HeadEdit(tables), stop_ids=stops)
    alone = [
        _rows(plain, [prompt], edit=HeadEdit(table), stop_ids=stops)[0]
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    _same(found, alone)
    free = _rows(plain, prompts, stop_ids=stops)
    assert [row.token_ids for row in found] != [row.token_ids for row in free]


@pytest.mark.parametrize("fault", ["no mask", "wrong scale", "other heads"])
def test_an_attention_that_does_not_agree_is_not_used(monkeypatch, fault):
    right = step_attention.attend

    def wrong(module, query, key, value, mask, **named):
        if fault == "no mask" and mask is not None and query.shape[2] == 1:
            mask.zero_()
        if fault == "wrong scale" and query.shape[2] == 1:
            query = query * 1.5
        if fault == "other heads" and query.shape[2] == 1:
            value = value.flip(1)
        return right(module, query, key, value, mask, **named)

    adapter = _fresh()
    expected = _rows(adapter, _prompts())
    assert step_attention.agrees(adapter)
    other = _fresh()
    AttentionInterface.register(step_attention.ATTENTION, wrong)
    try:
        assert not step_attention.agrees(other)
        _same(_rows(other, _prompts()), expected)
    finally:
        AttentionInterface.register(step_attention.ATTENTION, right)


def test_a_model_that_forgets_or_chose_another_attention_keeps_its_own():
    assert not step_attention.agrees(_fresh("mistral"))
    eager = _fresh(attention="eager")
    assert not step_attention.agrees(eager)
    assert eager.model.config._attn_implementation == "eager"


def test_in_sixteen_bits_a_step_is_as_close_to_exact_as_the_models_own():
    exact = _fresh()
    model = tiny_model("qwen3").to(torch.bfloat16)
    adapter = adapt(model, tiny_tokenizer(PLAIN_TEMPLATE))
    assert step_attention.agrees(adapter)
    found = _rows(adapter, _prompts())
    assert [len(row.token_ids) - n for row, n in zip(found, LENGTHS, strict=True)] == [
        40
    ] * len(LENGTHS)
    close = 0
    for row, n in zip(found, LENGTHS, strict=True):
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            logits = exact.model(ids).logits[0, n - 1 : -1]
        taken = logits.gather(-1, ids[0, n:, None])[:, 0]
        close += int((logits.amax(-1) - taken < 0.1 * logits.std(-1)).sum())
    assert close > 0.9 * 40 * len(LENGTHS)
