"""Heads of one run in another: against the plain loop, and in a toy made by hand."""

import itertools

import pytest
import torch
import transformers

from holdfast.errors import InputError, SettingsError
from holdfast.heads.attribution import attribute
from holdfast.heads.causal_effects import causal_effects
from holdfast.heads.interchange.exchange import Run, exchange
from holdfast.heads.interchange.null import beyond_null
from holdfast.models.decoding import shared_prefix
from holdfast.models.decoding.head_swap import KEEP, HeadSwap
from holdfast.models.loading.causal import adapt
from shapes import smollm2
from tiny_models import random_sequences, tiny_model, tiny_of_every_kind

TEMPLATE = [7, 8, 9]
MIXED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
KINDS = ["llama", "mistral", "mixed", "qwen3", "qwen3_5_text", "gemma2"]


def model_of(kind):
    if kind == "mixed":
        return tiny_model("qwen2", **MIXED)
    if kind in ("qwen3_5_text", "gemma2"):
        return tiny_of_every_kind(kind)
    return tiny_model(kind)


def sequences(lengths=(19, 14)):
    return [ids[:-3] + TEMPLATE for ids in random_sequences(lengths)]


def direction(model):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(model.config.get_text_config().hidden_size, generator=generator)


def reads(model):
    along = direction(model)
    return lambda states: states.float() @ along


def projections(model):
    """The output projections by layer, found without our tools."""
    named = [name for name, _ in model.named_modules() if name.endswith(".o_proj")]
    return {int(n.split("layers.")[1].split(".")[0]): n for n in named}


def slowly(model, ids, hooks):
    """One whole pass without a cache; `hooks`: by layer, what changes the heads."""
    handles = []
    for layer, name in projections(model).items():
        if layer in hooks:

            def change(_, arguments, layer=layer):
                states = arguments[0].clone()
                hooks[layer](states)
                return (states,)

            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(change))
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return float(states.last_hidden_state[0, -1] @ direction(model))


def plain_loop(model, ids, source, span, source_span, heads, n_heads):
    """Put heads of one run into another, one by one, the slow way."""
    written = {}

    def keep(layer):
        return lambda states: written.__setitem__(layer, states.clone())

    slowly(model, source, {layer: keep(layer) for layer in projections(model)})
    count = min(span[1] - span[0], source_span[1] - source_span[0])
    here = slice(span[1] - count, span[1])
    there = slice(source_span[1] - count, source_span[1])
    found = []
    for layer, head in heads:

        def put(states, layer=layer, head=head):
            width = states.shape[-1] // n_heads
            columns = slice(head * width, (head + 1) * width)
            states[0, here, columns] = written[layer][0, there, columns]

        found.append(slowly(model, ids, {layer: put}))
    return torch.tensor(found)


def every_head(adapter):
    heads = list(itertools.product(adapter.layers_with_heads, range(adapter.n_heads)))
    take = torch.full((len(heads), adapter.n_layers, adapter.n_heads), KEEP)
    for place, (layer, head) in enumerate(heads):
        take[place, layer, head] = 0
    return heads, take


def end(ids, count=3):
    return (len(ids) - count, len(ids))


@pytest.fixture(scope="module", params=[*KINDS, "smollm2"])
def adapter(request):
    kind = request.param
    return adapt(smollm2() if kind == "smollm2" else model_of(kind), None)


@pytest.fixture(scope="module")
def llama():
    return adapt(tiny_model("llama"), None)


def test_every_head_does_what_the_plain_loop_without_a_cache_does(adapter):
    one, other = sequences()
    heads, take = every_head(adapter)
    runs = [Run(one, end(one), (1,), take), Run(other, end(other), (0,), take)]
    found = exchange(adapter, runs, reads(adapter.model))
    for each, ids, source in zip(found, (one, other), (other, one), strict=True):
        plain = slowly(adapter.model, ids, {})
        assert each.plain == pytest.approx(plain, abs=1e-4)
        expected = plain_loop(
            adapter.model, ids, source, end(ids), end(source), heads, adapter.n_heads
        )
        torch.testing.assert_close(each.after, expected, atol=2e-4, rtol=0)
        assert each.change.abs().max() > 1e-2


def test_heads_of_the_run_itself_change_nothing(adapter):
    one, other = sequences()
    _, take = every_head(adapter)
    kept = torch.full_like(take[:1], KEEP)
    every = take.amax(0, keepdim=True)
    copies = torch.cat([take, kept, every])
    runs = [
        Run(ids, end(ids), (place,), copies) for place, ids in enumerate((one, other))
    ]
    for each in exchange(adapter, runs, reads(adapter.model)):
        assert each.change.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "mixed", "qwen3"])
def test_all_heads_at_once_are_the_other_run_where_the_tokens_are_the_same(kind):
    """Nothing but heads carries what came before to the tokens of the template."""
    adapter = adapt(model_of(kind), None)
    one, other = sequences()
    every = torch.zeros((1, adapter.n_layers, adapter.n_heads), dtype=torch.long)
    runs = [Run(one, end(one), (1,), every), Run(other, end(other), (0,), every)]
    first, second = exchange(adapter, runs, reads(adapter.model))
    assert float(first.after) == pytest.approx(second.plain, abs=1e-4)
    assert float(second.after) == pytest.approx(first.plain, abs=1e-4)
    assert abs(first.plain - second.plain) > 0.1


def test_heads_of_nothing_are_ablated_heads(llama):
    ids = sequences()
    heads, take = every_head(llama)
    runs = [Run(each, end(each), (None,), take) for each in ids]
    found = torch.stack([e.change for e in exchange(llama, runs, reads(llama.model))])
    expected = causal_effects(
        llama, ids, [3, 3], [[head] for head in heads], direction(llama.model)
    )
    torch.testing.assert_close(
        found, expected["end_template"].change, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("lengths", [(9, 4), (4, 9)])
@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text"])
def test_a_longer_span_is_aligned_at_its_end(kind, lengths):
    """Tokens stand behind the span, as the template does behind the thinking."""
    adapter = adapt(model_of(kind), None)
    one, other = sequences()
    heads, take = every_head(adapter)
    spans = [
        (len(ids) - 3 - n, len(ids) - 3)
        for ids, n in zip((one, other), lengths, strict=True)
    ]
    runs = [Run(one, spans[0], (1,), take), Run(other, spans[1])]
    found, gave = exchange(adapter, runs, reads(adapter.model))
    expected = plain_loop(adapter.model, one, other, *spans, heads, adapter.n_heads)
    torch.testing.assert_close(found.after, expected, atol=2e-4, rtol=0)
    assert len(gave.after) == 0


def test_neither_batches_nor_memory_change_a_result(llama, monkeypatch):
    ids = sequences((19, 14, 11))
    _, take = every_head(llama)
    runs = [
        Run(each, end(each), ((place + 1) % 3,), take) for place, each in enumerate(ids)
    ]
    together = exchange(llama, runs, reads(llama.model))
    alone = exchange(
        llama, [runs[0]._replace(sources=(1,)), Run(ids[1], end(ids[1]))],
        reads(llama.model),
    )[0]  # fmt: skip
    torch.testing.assert_close(alone.after, together[0].after, atol=1e-4, rtol=0)
    small = exchange(llama, runs, reads(llama.model), max_bytes=1)
    swapped, failed = shared_prefix.swap_heads, []

    def narrow(adapter, swap, positions):
        if len(swap.take) > 2:
            failed.append(len(swap.take))
            raise torch.OutOfMemoryError("out of memory")
        return swapped(adapter, swap, positions)

    monkeypatch.setattr(shared_prefix, "swap_heads", narrow)
    halved = exchange(llama, runs, reads(llama.model))
    assert failed
    for one, other, third in zip(together, small, halved, strict=True):
        torch.testing.assert_close(other.after, one.after, atol=1e-4, rtol=0)
        torch.testing.assert_close(third.after, one.after, atol=1e-4, rtol=0)
    assert not together[0].after.is_inference()


def test_a_pair_of_runs_costs_two_prefills_and_the_template_for_each_head(llama):
    shapes = []
    ids = sequences((60, 55))
    _, take = every_head(llama)
    runs = [Run(ids[0], end(ids[0]), (1,), take), Run(ids[1], end(ids[1]), (0,), take)]
    handle = llama.base.register_forward_pre_hook(
        lambda _, __, named: shapes.append(tuple(named["input_ids"].shape)),
        with_kwargs=True,
    )
    exchange(llama, runs, reads(llama.model))
    handle.remove()
    assert shapes == [(2, 57), (2, 3), (2, 3 * len(take))]


def test_spans_and_sources_that_are_not_there_are_refused(llama):
    [ids, _] = sequences()
    for span in ((0, 3), (5, 5), (16, 20)):
        with pytest.raises(InputError, match=f"{span[0]}:{span[1]}"):
            exchange(llama, [Run(ids, span)], reads(llama.model))
    take = torch.full((1, 3, 4), 1)
    with pytest.raises(SettingsError, match="sources from 0 to 0"):
        HeadSwap(take, {}, torch.ones((1, 1, 3), dtype=torch.bool))


# Rooms of the residual stream of the toy, one column each.
BOS, MARKED, GOOD, BAD, CLOSING, SWITCH, SAID = range(7)
FILLER, REFUSE, COMPLY, END = 1, 2, 3, 4
GATE, LATE = (0, 2), ((1, 0), (1, 1))


def toy():
    """Two layers by hand: a head of the first switches two of the second.

    At every token `GATE` looks at the marked one and writes `SWITCH`: up for REFUSE,
    down for COMPLY. That column is in no unembedding. Both of `LATE` look at the tokens
    that close the thinking, and write what stands in their `SWITCH` as `SAID`, which
    is all that the unembedding reads.
    """
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=4,
        max_position_embeddings=64, tie_word_embeddings=False,
        # The second pair of columns of a head does not turn.
        rope_parameters={"rope_type": "default", "rope_theta": 1e16},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        embed = model.model.embed_tokens.weight
        embed[:, BOS] = 1
        embed[REFUSE, [MARKED, GOOD]] = 1
        embed[COMPLY, [MARKED, BAD]] = 1
        embed[END, CLOSING] = 1
        first, second = (layer.self_attn for layer in model.model.layers)

        def looks(attention, head, at):
            attention.q_proj.weight[4 * head + 1, BOS] = 6
            attention.k_proj.weight[4 * head + 1, at] = 6

        looks(first, GATE[1], MARKED)
        first.v_proj.weight[4 * GATE[1], [GOOD, BAD]] = torch.tensor([1.0, -1.0])
        first.o_proj.weight[SWITCH, 4 * GATE[1]] = 1
        for _, head in LATE:
            looks(second, head, CLOSING)
            second.v_proj.weight[4 * head, SWITCH] = 1
            second.o_proj.weight[SAID, 4 * head] = 1
        model.lm_head.weight[5, SAID], model.lm_head.weight[6, SAID] = 1, -1
    return model


def runs_of_toy(*takes):
    """Two runs of one request: REFUSE in the one is COMPLY in the other."""
    ids = [[1, FILLER, mark, *[FILLER] * 8, END, END, END] for mark in (COMPLY, REFUSE)]
    return [Run(each, end(each), (1 - i, i), takes[i]) for i, each in enumerate(ids)]


def said(states):
    """Log-odds of token 5, which refuses, and token 6, which complies."""
    return 2 * states.float()[..., SAID]


def test_interchange_finds_the_gate_that_attribution_must_miss():
    adapter = adapt(toy(), None)
    heads, take = every_head(adapter)
    runs = runs_of_toy(take, take)
    complied, refused = exchange(adapter, runs, said)
    assert complied.plain < -0.1
    assert refused.plain > 0.1
    along = torch.zeros(16)
    along[SAID] = 1
    found = attribute(
        adapter, [run.token_ids for run in runs], [(3, 11)] * 2, along, tail=1
    )
    written = found[0].tail.heads[-1].flatten().abs()
    places = {head: place for place, head in enumerate(heads)}
    assert float(written[places[GATE]]) < 1e-6
    for head in LATE:
        assert float(written[places[head]]) > 0.1
    order = [heads[i] for i in complied.change.argsort(descending=True).tolist()]
    assert order[0] == GATE
    assert set(order[1:3]) == set(LATE)
    assert order[0] == heads[int(refused.change.argmin())]
    # It does all that the two late ones do together, and no other head anything.
    back = refused.plain - complied.plain
    assert float(complied.change[places[GATE]]) == pytest.approx(back, rel=0.02)
    others = [i for head, i in places.items() if head not in (GATE, *LATE)]
    assert complied.change[others].abs().max() < 1e-5


def test_a_late_head_does_nothing_once_its_gate_is_exchanged():
    adapter = adapt(toy(), None)
    takes = torch.full((4, 2, 4), KEEP)
    for place, table in enumerate(
        ({GATE: 0}, {LATE[0]: 0}, {GATE: 0, LATE[0]: 0}, {GATE: 0, LATE[0]: 1})
    ):
        for (layer, head), source in table.items():
            takes[place, layer, head] = source
    complied, _ = exchange(adapter, runs_of_toy(takes, None), said)
    gate, late, both, held = complied.change.tolist()
    assert late > 0.3 * gate > 0.05
    # The late head follows its gate by itself, so that there is nothing left to add.
    assert both == pytest.approx(gate, rel=0.02)
    # Held where it was, it keeps its half from the gate.
    assert gate - held == pytest.approx(gate / 2, rel=0.15)


def test_few_exchanges_are_all_tried_and_the_p_value_is_their_share():
    effects = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    nothing = torch.zeros_like(effects)
    clusters = ["a", "b", "c", "d"]
    found = beyond_null(effects, nothing, clusters, torch.Generator())
    assert found.excess.tolist() == [2.0, 0.0]
    # All four signs must be as they are, of sixteen.
    assert float(found.p_value[0]) == 1 / 16
    assert float(found.p_value[1]) == 1
    assert found.p_any.tolist() == [1 / 16, 1]
    # Two rows of one request change sides together: eight cases.
    paired = beyond_null(effects, nothing, ["a", "b", "c", "c"], torch.Generator())
    assert float(paired.p_value[0]) == 1 / 8


def test_a_head_that_does_as_much_from_a_run_that_ended_alike_is_not_beyond():
    effects = 5 + torch.randn((40, 6), generator=torch.Generator().manual_seed(0))
    clusters = [str(row) for row in range(40)]
    draw = torch.Generator().manual_seed(1)
    assert beyond_null(effects, effects, clusters, draw).p_any.min() == 1
    shifted = effects.clone()
    shifted[:, 2] += 3
    found = beyond_null(shifted, effects, clusters, draw)
    assert float(found.p_any[2]) < 0.001
    assert found.p_any[[0, 1, 3, 4, 5]].min() == 1


def test_the_correction_holds_over_all_heads_and_never_helps_one():
    """Of many worlds without an effect, few have any head beyond the null."""
    false, n_worlds = 0, 200
    clusters = [str(row) for row in range(24)]
    for world in range(n_worlds):
        draw = torch.Generator().manual_seed(world)
        effects, same = torch.randn((2, 24, 30), generator=draw)
        found = beyond_null(effects, same, clusters, draw, n_draws=400)
        false += bool(found.p_any.min() < 0.05)
        assert bool((found.p_any >= found.p_value).all())
        ordered = found.p_any[found.excess.argsort(descending=True)]
        assert bool((ordered.diff() >= 0).all())
    # 5 % of 200, and three standard errors of that.
    assert false <= 10 + 3 * (200 * 0.05 * 0.95) ** 0.5


def test_runs_that_behave_alike_give_no_head_beyond_the_null(llama):
    """Sequences of no outcome at all, called twins."""
    ids = sequences(tuple(range(20, 36)))
    heads, take = every_head(llama)
    both = torch.cat([take, torch.where(take == 0, 1, KEEP)])
    n = len(ids)
    runs = [
        Run(each, end(each), (place ^ 1, (place + 2) % n), both)
        for place, each in enumerate(ids)
    ]
    changes = torch.stack([e.change for e in exchange(llama, runs, reads(llama.model))])
    mine, theirs = changes[::2].split(len(heads), 1)
    found = beyond_null(
        mine, theirs, [str(i) for i in range(n // 2)], torch.Generator()
    )
    assert found.p_any.min() > 0.05
