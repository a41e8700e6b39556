"""Drafts and edits row by row: fewer passes, and the same rows."""

from importlib import import_module

import pytest
import torch
import transformers

from holdfast.errors import SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.interventions import HeadEdit, head_factors
from holdfast.models.loading.causal import adapt
from tiny_models import (
    HEADS,
    LAYERS,
    PLAIN_TEMPLATE,
    random_sequences,
    tiny_model,
    tiny_tokenizer,
)

LENGTHS = [9, 4, 12, 6, 7, 5]
GREEDY = Sampling(temperature=0, max_thinking=6, max_answer=9)
DRAWN = Sampling(temperature=0.8, top_p=0.9, max_thinking=6, max_answer=9)
SETS = [[], [(0, 1)], [(1, 3), (2, 0)], [], [(2, 2)], [(0, 0), (1, 1)]]


def _prompts():
    return [(ids, 50 + i) for i, ids in enumerate(random_sequences(LENGTHS))]


def _complete(adapter, prompts, sampling=GREEDY, batch_size=32, **named):
    named.setdefault("stop_ids", [999])
    batches = generate(adapter, prompts, sampling, batch_size=batch_size, **named)
    return sorted((c for batch in batches for c in batch), key=lambda c: c.index)


def _written(rows, prompts):
    return [row.token_ids[len(ids) :] for row, (ids, _) in zip(rows, prompts, strict=1)]


def _tables(adapter, factor=-2.0):
    return torch.stack([head_factors(adapter, heads, factor) for heads in SETS])


@pytest.fixture(scope="module")
def plain():
    return adapt(tiny_model("qwen3"), tiny_tokenizer(PLAIN_TEMPLATE))


@pytest.fixture(scope="module")
def stops(qwen3):
    free = _complete(qwen3, _prompts())
    return sorted({row.token_ids[-1 - i] for i, row in enumerate(free)})[:3]


def _spoilt(drafts):
    """Drafts that are right, wrong at the start, in the middle, too short, too long."""
    wrong = [list(draft) for draft in drafts]
    wrong[1][0] += 1
    wrong[2][len(wrong[2]) // 2] += 1
    wrong[3] = wrong[3][:4]
    wrong[4] = []
    wrong[5] = wrong[5] + [7] * 40
    return wrong


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_draft_changes_no_row(qwen3, stops, sampling, batch_size):
    prompts = _prompts()
    plain = _complete(qwen3, prompts, sampling, stop_ids=stops)
    assert {row.finish for row in plain} == {"stop", "length"}
    for drafts in (_written(plain, prompts), _spoilt(_written(plain, prompts))):
        found = _complete(
            qwen3, prompts, sampling, batch_size, stop_ids=stops, drafts=drafts
        )
        for row, expected in zip(found, plain, strict=True):
            assert expected.min_top2_gap > 1e-4
            assert row.token_ids == expected.token_ids
            assert (row.spans, row.finish) == (expected.spans, expected.finish)
            assert row.min_top2_gap == pytest.approx(expected.min_top2_gap, abs=1e-4)


def test_a_right_draft_takes_one_pass_and_a_wrong_one_the_rest(plain, monkeypatch):
    prompts = _prompts()
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=9)
    drafts = _written(_complete(plain, prompts, sampling), prompts)
    passes = []
    handle = plain.layers[0].register_forward_hook(lambda *_: passes.append(1))
    _complete(plain, prompts, sampling, drafts=drafts)
    assert len(passes) == 1
    drafts[2] = [*drafts[2][:5], drafts[2][5] + 1, *drafts[2][6:]]
    _complete(plain, prompts, sampling, drafts=drafts)
    handle.remove()
    # The pass over the drafts gives 6 of the 9 tokens; the other 3 come one by one.
    assert len(passes) == 1 + 1 + 3


def test_logits_of_a_draft_can_be_looked_at_in_parts(qwen3, monkeypatch):
    prompts = _prompts()
    plain = _complete(qwen3, prompts, DRAWN)
    monkeypatch.setattr(
        import_module("holdfast.models.decoding.decoder"), "MAX_LOGITS", 1
    )
    found = _complete(qwen3, prompts, DRAWN, drafts=_written(plain, prompts))
    assert [row.token_ids for row in found] == [row.token_ids for row in plain]


def test_a_model_that_forgets_goes_on_without_drafts():
    adapter = adapt(tiny_model("mistral"), tiny_tokenizer(PLAIN_TEMPLATE))
    prompts = _prompts()
    plain = _complete(adapter, prompts)
    passes = []
    handle = adapter.layers[0].register_forward_hook(lambda *_: passes.append(1))
    found = _complete(adapter, prompts, drafts=_written(plain, prompts))
    handle.remove()
    assert [row.token_ids for row in found] == [row.token_ids for row in plain]
    assert len(passes) == GREEDY.max_answer


@pytest.mark.parametrize("how", ["none", "token"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_rows_with_heads_of_their_own_are_those_of_one_edit_each(
    qwen3, stops, how, batch_size
):
    """Some rows leave the cache early, and tables must follow the others."""
    prompts, tables = _prompts(), _tables(qwen3)
    ranges = ((2, 5), (4, None), (0, 64), (6, 7), (0, 9), (3, None))
    for places in (None, ranges):
        edit = HeadEdit(tables, places, how)
        found = _complete(qwen3, prompts, DRAWN, batch_size, edit=edit, stop_ids=stops)
        drafts = _written(_complete(qwen3, prompts, DRAWN, stop_ids=stops), prompts)
        drafted = _complete(
            qwen3, prompts, DRAWN, batch_size, edit=edit, stop_ids=stops, drafts=drafts
        )
        for i, prompt in enumerate(prompts):
            own = places and (places[i],)
            [expected] = _complete(
                qwen3, [prompt], DRAWN, edit=HeadEdit(tables[i], own, how),
                stop_ids=stops,
            )  # fmt: skip
            assert expected.min_margin > 1e-6
            assert found[i].token_ids == expected.token_ids
            assert drafted[i].token_ids == expected.token_ids
    plain = _complete(qwen3, prompts, DRAWN, stop_ids=stops)
    moved = [a.token_ids != b.token_ids for a, b in zip(found, plain, strict=True)]
    assert [moved[0], moved[3]] == [False, False]
    assert sum(moved) >= 2


def test_a_row_without_an_edit_is_the_same_beside_edited_ones_bit_for_bit(qwen3):
    from holdfast.models.hidden_states import read_states
    from holdfast.models.interventions import scale_heads

    sequences = random_sequences([7, 7, 7])
    tables = torch.stack([torch.ones(LAYERS, HEADS), *_tables(qwen3)[1:3]])

    def states():
        return read_states(qwen3, sequences, lambda each, _: each * 1)

    before = states()
    with scale_heads(qwen3, HeadEdit(tables)):
        after = states()
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_one_norm_for_a_whole_tensor_takes_one_edit(qwen3):
    with pytest.raises(SettingsError, match="one table of factors"):
        HeadEdit(_tables(qwen3), None, "tensor")


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"drafts": [[1]]}, "one draft for each of 6 prompts"),
        ({"edit": HeadEdit(torch.ones(5, LAYERS, HEADS))}, "each of 6 prompts"),
        (
            {"edit": HeadEdit(torch.ones(6, LAYERS, HEADS), ((0, 1),) * 5)},
            "as many ranges of positions as tables of factors",
        ),
    ],
)
def test_what_is_given_by_row_is_given_for_every_row(qwen3, named, says):
    with pytest.raises(SettingsError, match=says):
        generate(qwen3, _prompts(), GREEDY, **named)


def test_the_same_prompt_under_many_edits_is_read_once_up_to_the_first(plain):
    """Two prompts, each under every head of the last layer."""
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=9)
    two = _prompts()[:2]
    drafts = _written(_complete(plain, two, sampling), two)
    prompts = [prompt for _ in range(HEADS) for prompt in two]
    tables = torch.stack(
        [head_factors(plain, [(LAYERS - 1, i // 2)], -2.0) for i in range(2 * HEADS)]
    )
    edit, seen = HeadEdit(tables), []
    handles = [
        layer.register_forward_hook(
            lambda _, __, states, at=at: seen.append((at, len(states)))
        )
        for at, layer in enumerate(plain.layers)
    ]
    found = _complete(plain, prompts, sampling, edit=edit, drafts=drafts * HEADS)
    for handle in handles:
        handle.remove()
    first_pass = seen[:LAYERS]
    assert first_pass == [(0, 2), (1, 2), (2, 2 * HEADS)]
    expected = _complete(plain, prompts, sampling, edit=edit)
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]
    assert len({row.token_ids for row in found}) > 3


def test_padding_that_nobody_needs_any_more_is_let_go(plain):
    """A short prompt beside a long one that ends at once."""
    prompts = [(random_sequences([40])[0], 0), *_prompts()[:3]]
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=9)
    free = _complete(plain, prompts, sampling)
    ends = [free[0].token_ids[40]]
    alone = [_complete(plain, [p], sampling, stop_ids=ends)[0] for p in prompts]
    found = _complete(plain, prompts, sampling, stop_ids=ends)
    assert [row.token_ids for row in found] == [row.token_ids for row in alone]
    assert len(found[0].token_ids) == 41


@pytest.mark.parametrize("distinct", [1, 3, 5])
def test_positions_of_several_axes_are_those_of_every_row(distinct):
    """Models that see have one row of positions per axis, and three axes."""
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
        },
    }
    eyes = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**eyes, "out_hidden_size": 32}
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    adapter = adapt(model, tiny_tokenizer(PLAIN_TEMPLATE))
    prompts = _prompts()[:distinct]
    drafts = _written(_complete(adapter, prompts), prompts)
    # Every prompt twice, with a head off and without, so that rows are copied on.
    edits = [[(1, 2)]] * distinct + [[]] * distinct
    tables = torch.stack([head_factors(adapter, heads) for heads in edits])
    edit = HeadEdit(tables)
    plain = _complete(adapter, prompts * 2, edit=edit)
    drafted = _complete(adapter, prompts * 2, edit=edit, drafts=drafts * 2)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert _written(drafted[distinct:], prompts) == drafts
    assert _written(drafted[:distinct], prompts) != drafts
