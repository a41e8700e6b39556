import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from holdfast.data.chat.conversation import Spans
from holdfast.errors import SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.hidden_states import read_states
from holdfast.models.interventions import (
    HeadEdit,
    head_factors,
    scale_heads,
    scope_ranges,
)
from holdfast.models.loading.causal import adapt, load
from tiny_models import (
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    PLAIN_TEMPLATE,
    random_sequences,
    tiny_model,
    tiny_tokenizer,
)

HEADS_EDITED = [(0, 1), (1, 3), (2, 0)]
LENGTHS = [9, 4, 12, 6, 7]
GREEDY = Sampling(temperature=0, max_thinking=0, max_answer=7)


@pytest.fixture(scope="module")
def plain():
    """A model without thinking, whose rows are the prompt and the answer."""
    return adapt(tiny_model("qwen3"), tiny_tokenizer(PLAIN_TEMPLATE))


def _prompts(lengths=LENGTHS):
    return [(ids, 10 + i) for i, ids in enumerate(random_sequences(lengths))]


def _complete(adapter, prompts, edit, *, batch_size=32, sampling=GREEDY, **named):
    batches = generate(
        adapter, prompts, sampling, batch_size=batch_size, edit=edit, **named
    )
    rows = sorted((c for batch in batches for c in batch), key=lambda c: c.index)
    return rows


def _states(adapter, sequences):
    return read_states(adapter, sequences, lambda states, _: states * 1)


def _scaled_by_hand(adapter, ids, factors, chosen, how="none"):
    """Logits of one row without a cache; heads scaled where `chosen` says so."""

    def hook(layer):
        columns = factors[layer].repeat_interleave(HEAD_WIDTH)

        def scale(_, arguments):
            heads = arguments[0]
            scaled = heads * columns
            if how == "token":
                scaled *= heads.norm(dim=-1, keepdim=True)
                scaled /= (heads * columns).norm(dim=-1, keepdim=True)
            return (torch.where(chosen[None, : heads.shape[1], None], scaled, heads),)

        return scale

    handles = [
        adapter.output_projection(layer).register_forward_pre_hook(hook(layer))
        for layer in range(LAYERS)
    ]
    with torch.no_grad():
        logits = adapter.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


def _greedy_by_hand(adapter, prompt, factors, chosen, stops, n_tokens, how="none"):
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(_scaled_by_hand(adapter, ids, factors, chosen, how).argmax()))
        if ids[-1] in stops:
            break
    return tuple(ids)


def _chosen(start, stop, n=64):
    places = torch.arange(n)
    return (places >= start) & (places < stop)


@pytest.mark.parametrize("how", ["none", "token"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_edit_everywhere_is_that_of_full_recomputation(plain, how, batch_size):
    factors = head_factors(plain, HEADS_EDITED, 0.0)
    edit = HeadEdit(factors, renormalise=how)
    prompts = _prompts()
    rows = _complete(plain, prompts, edit, batch_size=batch_size, stop_ids=[999])
    for row, (ids, _) in zip(rows, prompts, strict=True):
        expected = _greedy_by_hand(plain, ids, factors, _chosen(0, 64), [], 7, how)
        assert row.token_ids == expected


@pytest.fixture(scope="module")
def stops(plain):
    """Tokens that end some rows early, so that the cache is compacted."""
    rows = _complete(plain, _prompts(), None, stop_ids=[999])
    return sorted({row.token_ids[len(_prompts()[i][0])] for i, row in enumerate(rows)})[
        :2
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_positions_are_those_of_the_row_whatever_the_batch(plain, stops, batch_size):
    """Ranges in the prompt, across its end, and in what is written."""
    factors = head_factors(plain, HEADS_EDITED, -2.0)
    ranges = ((2, 5), (4, None), (11, 15), (6, 7), (0, 9))
    edit = HeadEdit(factors, ranges)
    prompts = _prompts()
    rows = _complete(plain, prompts, edit, batch_size=batch_size, stop_ids=stops)
    unedited = _complete(plain, prompts, None, stop_ids=stops)
    for row, (ids, _), (start, stop) in zip(rows, prompts, ranges, strict=True):
        chosen = _chosen(start, 64 if stop is None else stop)
        expected = _greedy_by_hand(plain, ids, factors, chosen, stops, 7)
        assert row.token_ids == expected
    assert [r.token_ids for r in rows] != [r.token_ids for r in unedited]
    assert {row.finish for row in rows} == {"stop", "length"}


def test_a_range_that_is_never_reached_changes_nothing(plain):
    factors = head_factors(plain, HEADS_EDITED, -2.0)
    edit = HeadEdit(factors, ((50, None),) * len(LENGTHS), "tensor")
    rows = _complete(plain, _prompts(), edit, stop_ids=[999])
    unedited = _complete(plain, _prompts(), None, stop_ids=[999])
    assert rows == unedited


def test_an_answer_edit_leaves_the_first_answer_token_alone(qwen3):
    """Its choice is made by the state of the last token of the end template."""
    prompts = _prompts()
    spans = [Spans((0, n - 3), (n - 3, n - 2), (n - 2, n), (n, n)) for n in LENGTHS]
    factors = head_factors(qwen3, HEADS_EDITED, -3.0)
    found = {
        scope: _complete(
            qwen3,
            prompts,
            HeadEdit(factors, scope_ranges(spans, scope)),
            stop_ids=[999],
            thinking_done=True,
        )
        for scope in ("everywhere", "end_template", "answer")
    }
    unedited = _complete(qwen3, prompts, None, stop_ids=[999], thinking_done=True)
    for i, n in enumerate(LENGTHS):
        assert found["answer"][i].token_ids[: n + 1] == unedited[i].token_ids[: n + 1]
        expected = _greedy_by_hand(
            qwen3, prompts[i][0], factors, _chosen(n - 2, n), [], 7
        )
        assert found["end_template"][i].token_ids == expected
    for one in ("everywhere", "end_template", "answer"):
        assert [r.token_ids for r in found[one]] != [r.token_ids for r in unedited]


def test_thinking_that_is_done_is_prompt_and_the_answer_begins_at_once(qwen3):
    ids = random_sequences([8])[0]
    (row,) = _complete(qwen3, [(ids, 0)], None, stop_ids=[999], thinking_done=True)
    assert row.spans.answer == (8, 15)
    assert row.spans.prompt == (0, 8)
    assert row.closed
    assert not row.forced_close


def test_a_row_without_an_end_template_has_none_to_edit():
    spans = [
        Spans((0, 3), (3, 5), (5, 7), (7, 9)),
        Spans((0, 3), (3, 9), (9, 9), (9, 9)),
    ]
    with pytest.raises(SettingsError, match="row 1 is the first"):
        scope_ranges(spans, "end_template")
    assert scope_ranges(spans, "answer") == ((7, None), (9, None))
    assert scope_ranges(spans, "everywhere") is None


def test_an_edit_by_one_is_nothing_bit_for_bit(qwen3):
    sequences = random_sequences([7, 5])
    before = _states(qwen3, sequences)
    for how in ("none", "token", "tensor"):
        with scale_heads(qwen3, HeadEdit(torch.ones(LAYERS, HEADS), None, how)):
            after = _states(qwen3, sequences)
        assert all(map(torch.equal, before, after))


def test_renormalising_a_token_restores_its_norm_and_no_other(qwen3):
    edit = HeadEdit(head_factors(qwen3, [(1, 0)], 0.25), None, "token")
    before, after = _norms(qwen3, edit, 1)
    torch.testing.assert_close(after, before)


def test_renormalising_the_tensor_restores_one_norm_for_all_tokens(qwen3):
    edit = HeadEdit(head_factors(qwen3, [(1, 0)], 0.0), None, "tensor")
    before, after = _norms(qwen3, edit, 1)
    torch.testing.assert_close(after.norm(), before.norm())
    assert (after - before).abs().max() > 1e-3


def test_renormalising_the_tensor_depends_on_the_batch_and_a_token_does_not(qwen3):
    sequences = random_sequences([9, 5])
    factors = head_factors(qwen3, [(0, 0), (1, 0)])
    moved = {}
    for how in ("token", "tensor"):
        with scale_heads(qwen3, HeadEdit(factors, None, how)):
            alone = _states(qwen3, sequences[:1])[0]
            beside = _states(qwen3, sequences)[0]
        moved[how] = float((alone - beside).abs().max())
    assert moved["token"] < 1e-4
    assert moved["tensor"] > 1e-2


def _norms(adapter, edit, layer):
    """Norms of a layer's heads at each token, before and after an edit of it."""
    (ids,) = random_sequences([9])
    seen = []

    def look(_, arguments):
        seen.append(arguments[0][0].norm(dim=-1))

    projection = adapter.output_projection(layer)
    first = projection.register_forward_pre_hook(look)
    with scale_heads(adapter, edit):
        last = projection.register_forward_pre_hook(look)
        with torch.no_grad():
            adapter.base(torch.tensor([ids]), use_cache=False)
        last.remove()
    first.remove()
    return seen


@pytest.mark.parametrize("how", ["token", "tensor"])
def test_a_norm_of_zero_cannot_be_restored(qwen3, how):
    factors = head_factors(qwen3, [(1, head) for head in range(HEADS)])
    with (
        scale_heads(qwen3, HeadEdit(factors, None, how)),
        pytest.raises(SettingsError, match="norm of zero in layer 1"),
    ):
        _states(qwen3, random_sequences([4]))
    with scale_heads(qwen3, HeadEdit(factors)):
        _states(qwen3, random_sequences([4]))
    assert not qwen3.output_projection(1)._forward_pre_hooks


def test_tokens_of_one_pass_can_have_other_heads_scaled(qwen3):
    ids, heads = random_sequences([6])[0], [(0, 0), (2, 3)]
    one, other = torch.ones(LAYERS, HEADS), head_factors(qwen3, heads, 0.5)
    with scale_heads(
        qwen3, torch.stack([one, one, other, other, one, one]), positions=True
    ):
        found = _states(qwen3, [ids])[0]
    with scale_heads(qwen3, HeadEdit(other, ((2, 4),))) as live:
        live.locate(torch.arange(6)[None])
        expected = _states(qwen3, [ids])[0]
    torch.testing.assert_close(found, expected)
    plain = _states(qwen3, [ids])[0]
    torch.testing.assert_close(found[:2], plain[:2])
    assert (found[2:] - plain[2:]).abs().amax(-1).min() > 1e-3


def test_heads_that_do_not_exist_are_named_with_what_fits(qwen3):
    with pytest.raises(
        SettingsError, match=r"layers 0 to 2.*0 to 3.*1:4, -1:0"
    ) as error:
        head_factors(qwen3, [(1, 4), (0, 0), (-1, 0)])
    assert error.value.exit_status == 2


def test_a_factor_that_is_no_number_is_refused(qwen3):
    with pytest.raises(SettingsError, match="finite"):
        HeadEdit(head_factors(qwen3, [(0, 0)], float("nan")))


def test_a_table_of_another_shape_is_refused(qwen3):
    table = torch.ones(LAYERS + 1, HEADS)
    with (
        pytest.raises(SettingsError, match="3 rows of 4"),
        scale_heads(qwen3, HeadEdit(table)),
    ):
        pass


def test_as_many_ranges_as_prompts_are_needed(qwen3):
    edit = HeadEdit(head_factors(qwen3, [(0, 0)]), ((0, 3),))
    with pytest.raises(SettingsError, match="each of 5 prompts"):
        generate(qwen3, _prompts(), GREEDY, edit=edit)


def test_a_merged_and_an_unmerged_adapter_are_edited_alike(saved, tmp_path):
    """Scaling the input of an unmerged projection is scaling the head in both parts."""
    model = tiny_model()
    model.name_or_path = str(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
        )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "lora")
    merged = load(tmp_path / "lora")
    factors = head_factors(merged, HEADS_EDITED, 0.3)
    (ids,) = random_sequences([9])
    handles = []
    for layer, block in enumerate(adapted.get_base_model().model.layers):
        columns = factors[layer].repeat_interleave(HEAD_WIDTH)
        handles.append(
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda _, arguments, columns=columns: (arguments[0] * columns,)
            )
        )
    with torch.no_grad():
        expected = adapted.get_base_model().model(torch.tensor([ids]), use_cache=False)
    with scale_heads(merged, HeadEdit(factors)):
        found = _states(merged, [ids])[0]
    torch.testing.assert_close(
        found, expected.last_hidden_state[0], atol=1e-4, rtol=1e-4
    )
    assert len(_complete(merged, _prompts(), HeadEdit(factors), stop_ids=[999])) == 5
