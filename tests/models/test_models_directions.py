"""Moving states along a direction: exact, where it is told to, in every family."""

import pytest
import torch

from holdfast.errors import SettingsError
from holdfast.models.decoding.edits import DirectionEdit, move_states
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.hidden_states import final_states, read_states
from holdfast.models.loading.causal import adapt
from tiny_kinds import EVERY
from tiny_models import (
    PLAIN_TEMPLATE,
    random_sequences,
    tiny_of_every_kind,
    tiny_tokenizer,
)

KINDS = ("llama", "gemma2", "qwen3_5_text", "mistral")
LENGTHS = [9, 4, 12, 6, 7]
STARTS = (3, 1, 12, 2, 5)
GREEDY = Sampling(temperature=0, max_thinking=0, max_answer=6)


def of_kind(kind):
    assert kind in EVERY or kind == "llama"
    return adapt(tiny_of_every_kind(kind), tiny_tokenizer(PLAIN_TEMPLATE))


@pytest.fixture(scope="module", params=KINDS)
def adapter(request):
    return of_kind(request.param)


def unit(adapter, seed=0):
    drawn = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def everywhere(adapter, gain, shift, ranges=None):
    """An edit after every block, each along a direction of its own."""
    layers = range(adapter.n_layers)
    units = torch.stack([unit(adapter, seed) for seed in layers])
    return DirectionEdit(
        tuple(layers), units, gain, torch.full((len(units),), shift), ranges
    )


def prompts():
    return [(ids, 10 + i) for i, ids in enumerate(random_sequences(LENGTHS))]


def drawn(adapter, edit, batch_size=32, **more):
    batches = generate(
        adapter, prompts(), GREEDY, batch_size=batch_size, edit=edit, **more
    )
    rows = sorted((c for batch in batches for c in batch), key=lambda c: c.index)
    return [row.token_ids for row in rows]


def by_hand(adapter, edit, row, n_tokens=6):
    """Greedy tokens of one row, each from a whole pass without cache or padding."""
    start = None if edit.ranges is None else edit.ranges[row][0]
    ids = list(prompts()[row][0])

    def hook(place):
        along = edit.units[place]

        def move(_, __, output):
            states = output[0] if isinstance(output, tuple) else output
            moved = states.clone()
            reached = moved[:, start or 0 :]
            amount = edit.gain * (reached @ along) + edit.shifts[place]
            moved[:, start or 0 :] = reached + amount[..., None] * along
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return move

    for _ in range(n_tokens):
        handles = [
            adapter.blocks[site].module.register_forward_hook(hook(place))
            for place, site in enumerate(edit.sites)
        ]
        with torch.inference_mode():
            logits = adapter.model(torch.tensor([ids]), use_cache=False).logits
        for handle in handles:
            handle.remove()
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in adapter.stop_ids:
            break
    return tuple(ids)


@pytest.mark.parametrize("ranges", [None, tuple((start, None) for start in STARTS)])
def test_a_moved_row_is_what_whole_passes_by_hand_give(adapter, ranges):
    """Padding, cache and neighbours change nothing, wherever the edit begins."""
    edit = everywhere(adapter, -1.0, 0.7, ranges)
    for batch_size in (32, 2):
        rows = drawn(adapter, edit, batch_size)
        assert rows == [by_hand(adapter, edit, row) for row in range(len(rows))]
    assert rows != drawn(adapter, None)


def test_rows_of_one_prompt_keep_their_own_ranges(adapter):
    """The same prompt is read once up to the first edit, and not beyond."""
    ids = random_sequences([8])[0]
    asked = [(ids, 0)] * 3
    ranges = ((0, 0), (2, None), (7, 8))
    edit = DirectionEdit(
        (1,), unit(adapter)[None] * 1.0, 0.0, torch.tensor([9.0]), ranges
    )
    batches = generate(adapter, asked, GREEDY, edit=edit)
    together = {c.index: c.token_ids for batch in batches for c in batch}
    for row, place in enumerate(ranges):
        alone = DirectionEdit(
            (1,), unit(adapter)[None], 0.0, torch.tensor([9.0]), (place,)
        )
        [[one]] = generate(adapter, [(ids, 0)], GREEDY, edit=alone)
        assert together[row] == one.token_ids
    [[plain]] = generate(adapter, [(ids, 0)], GREEDY)
    assert together[0] == plain.token_ids


def test_a_draft_changes_no_row(adapter):
    edit = everywhere(adapter, -1.0, 0.7, tuple((start, None) for start in STARTS))
    drafts = [
        ids[len(prompt) :]
        for ids, (prompt, _) in zip(drawn(adapter, None), prompts(), strict=True)
    ]
    assert drawn(adapter, edit, drafts=drafts) == drawn(adapter, edit)


def test_nothing_moves_by_nothing(adapter):
    assert drawn(adapter, everywhere(adapter, 0.0, 0.0)) == drawn(adapter, None)


def test_what_is_projected_out_reads_its_constant(adapter):
    """Of the states where it is done nothing is left but the shift, orthogonal parts
    stay, and those before the edit are untouched.
    """
    along = unit(adapter)
    edit = DirectionEdit(("final_norm",), along[None], -1.0, torch.tensor([2.5]))
    sequences = random_sequences([7, 7])
    plain = final_states(adapter, sequences)
    with move_states(adapter, edit) as live:
        live.locate(torch.arange(7)[None])
        [*moved] = read_states(adapter, sequences, lambda states, _: states * 1)
    last = torch.stack([row[-1] for row in moved])
    assert last @ along == pytest.approx(torch.full((2,), 2.5), abs=1e-5)
    rest = plain - (plain @ along)[:, None] * along + 2.5 * along
    assert torch.allclose(last, rest, atol=1e-5)


def test_what_moves_before_the_answer_flows_into_later_states(adapter):
    """An edit of one early position changes what is written behind it."""
    ranges = tuple((0, 1) for _ in LENGTHS)
    edit = everywhere(adapter, 0.0, 25.0, ranges)
    assert drawn(adapter, edit) != drawn(adapter, None)


def test_a_site_that_is_not_there_is_refused(adapter):
    edit = DirectionEdit(
        (adapter.n_layers,), unit(adapter)[None], 0.0, torch.tensor([0.0])
    )
    with pytest.raises(SettingsError, match="block from 0 to"):
        drawn(adapter, edit)
