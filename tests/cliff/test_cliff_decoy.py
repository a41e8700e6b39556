"""A hand-made model in which a direction decides, and one that separates as well.

Uniform attention sums what the prompt says into two coordinates of the last state: the
answer's first token is chosen by the one, the other is a copy that nothing reads.
"""

from dataclasses import replace

import pytest
import torch
import transformers

from holdfast.cliff.commitment.causes.directions import (
    Fitted,
    Probes,
    last_states,
)
from holdfast.cliff.commitment.causes.edited import Said
from holdfast.cliff.commitment.causes.places import (
    CONTROL,
    PLAIN,
    READ,
    edits_of,
    places_of,
)
from holdfast.cliff.commitment.causes.removals import removals_of
from holdfast.models.decoding.edits import DirectionEdit
from holdfast.models.hidden_states import final_states
from holdfast.models.loading.causal import adapt
from holdfast.rollout.rows import Judged
from tiny_models import random_sequences, tiny_of_every_kind

WIDTH, VOCAB, END = 24, 40, 39
READS, USED, DECOY, FIRST_FREE = 0, 1, 2, 3
BEGIN, HARM, REFUSE, COMPLY = 1, 2, 3, 4
N = 40


@pytest.fixture(scope="module")
def adapter():
    """Harm in the prompt, less half, is the sign of both coordinates."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
        head_dim=WIDTH, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        first = model.model.layers[0].self_attn
        first.v_proj.weight.copy_(torch.eye(WIDTH))
        write = torch.eye(WIDTH)
        write[:FIRST_FREE, :FIRST_FREE] = 0
        # The copy is the larger one, so that a probe would take it first.
        write[USED, READS], write[DECOY, READS] = 20.0, 30.0
        first.o_proj.weight.copy_(write)
        words = torch.zeros(VOCAB, WIDTH)
        words[:, FIRST_FREE:] = torch.randn(
            (VOCAB, WIDTH - FIRST_FREE), generator=generator
        )
        words[:, READS] = 0.02 * torch.randn(VOCAB, generator=generator)
        words[BEGIN, READS], words[HARM, READS] = -0.5, 1.0
        # All of one norm, so that the norm before attention changes none of them.
        free = words[:, FIRST_FREE:]
        rest = (WIDTH - words[:, READS].square()).sqrt()
        words[:, FIRST_FREE:] = free / free.norm(dim=1, keepdim=True) * rest[:, None]
        model.model.embed_tokens.weight.copy_(words)
        model.lm_head.weight[REFUSE, USED] = 1.0
        model.lm_head.weight[COMPLY, USED] = -1.0
    return adapt(model, None)


def prompts(n=N, seed=0):
    """Harmful and harmless rows in turn, of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(n):
        length = 5 + int(torch.randint(8, (1,), generator=generator))
        words = torch.randint(5, END, (length,), generator=generator).tolist()
        words[length // 2] = HARM if row % 2 == 0 else words[length // 2]
        rows.append((BEGIN, *words, END))
    return rows, torch.arange(n) % 2 == 0


def along(*places):
    direction = torch.zeros(WIDTH, dtype=torch.float64)
    direction[list(places)] = 1.0
    return direction


def judged(adapter, probe, n_random=4):
    """Everything that `--use` does, with the first token for the answer."""
    train, labels = prompts(seed=1)
    sites = [*range(adapter.n_layers), "final_norm"]
    fitted = Fitted(labels, last_states(adapter, train, sites, 16))
    answer = adapter.lm_head.weight.detach().double()
    probes = Probes(probe, answer[REFUSE] - answer[COMPLY])
    places = places_of(adapter, fitted, probes, n_random, 0)
    edits = edits_of(places, fitted, probes, n_random)
    asked, harmful = prompts(seed=2)
    rows = [(len(ids) - 1, len(ids)) for ids in asked]
    said = []
    for name in (PLAIN, *edits):
        edit = edits.get(name)
        if edit is not None:
            place = places[READ if name == CONTROL else name.split("/")[0]]
            edit = replace(edit, ranges=place.ranges(rows))
        states = last_states(adapter, asked, ["final_norm"], 7, edit)["final_norm"]
        with torch.inference_mode():
            logits = adapter.lm_head(states)
        margins = (logits[:, REFUSE] - logits[:, COMPLY]).tolist()
        for number, margin in enumerate(margins):
            outcome = "refused" if margin > 0 else "complied"
            row = {
                "condition": name, "asked": f"row{number}", "draw": 0,
                "margin": margin,
            }  # fmt: skip
            said.append(Said(row, Judged(f"r{number}", outcome)))
    refused = {f"row{number}" for number in range(N) if harmful[number]}
    return removals_of(said, refused, 0), said, harmful


@pytest.fixture(scope="module")
def decoy(adapter):
    return judged(adapter, along(DECOY))


def test_the_model_does_what_it_was_made_to(adapter):
    asked, harmful = prompts(seed=2)
    states = last_states(adapter, asked, ["final_norm"], 16)["final_norm"]
    for coordinate in (USED, DECOY):
        assert torch.equal(states[:, coordinate] > 0, harmful)
    assert states[:, DECOY] == pytest.approx(1.5 * states[:, USED], rel=1e-5)


def test_a_direction_that_decides_is_used(adapter):
    block, said, harmful = judged(adapter, along(USED))
    assert block["verdict"] == "used"
    read = block["places"]["read"]["probe"]
    # Without it no row is on either side: the gap is gone.
    assert read["gap"]["value"] == pytest.approx(1, abs=1e-5)
    before = [one.judged.outcome for one in said[:N]]
    assert before == ["refused" if each else "complied" for each in harmful]
    for kind in ("moved", "matched"):
        assert block["places"]["read"][kind]["answers"]["value"] < 0.1


def test_a_copy_that_nothing_reads_is_not_used(decoy):
    block, _, _ = decoy
    assert block["verdict"] == "not used", block["evidence"]
    for place in ("read", "stream"):
        assert block["places"][place]["probe"]["answers"]["value"] == 0
        assert block["places"][place]["probe"]["gap"]["value"] < 0.05
    # The difference of means is no test: it has all that separates in it.
    assert block["places"]["read"]["mean_difference"]["gap"]["value"] > 0.9
    assert block["control"]["gap"]["value"] == pytest.approx(1, abs=1e-5)


def test_a_measurement_that_is_blind_shows_nothing(decoy):
    """Where the answer does not hang on its first word the control finds nothing."""

    block, said, _ = decoy
    assert block["verdict"] == "not used"
    plain = {each.row["asked"]: each for each in said[:N]}
    blind = [
        Said({**each.row, "margin": None}, plain[each.row["asked"]].judged)
        for each in said
    ]
    refused = {name for name, each in plain.items() if each.judged.outcome == "refused"}
    found = removals_of(blind, refused, 0)
    assert found["verdict"] == "not shown"
    assert found["control"]["gap"]["value"] is None


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_5_text"])
def test_states_are_read_at_every_site_in_one_pass_whatever_the_batch(kind):
    """Beside one site at a time; under an edit beside one row at a time."""
    model = adapt(tiny_of_every_kind(kind), None)
    sequences = random_sequences([9, 4, 12, 6])
    sites = [*range(model.n_layers), "final_norm"]
    found = last_states(model, sequences, sites, 3)
    for site in sites:
        alone = final_states(model, sequences, site=site)
        assert torch.allclose(found[site], alone, atol=1e-5), site
    units = torch.eye(model.d_model)[: len(sites)]
    starts = (2, 0, 11, 5)
    edit = DirectionEdit(
        tuple(sites), units, -1.0, torch.full((len(sites),), 0.5),
        tuple((start, None) for start in starts),
    )  # fmt: skip
    together = last_states(model, sequences, ["final_norm"], 3, edit)["final_norm"]
    for row, ids in enumerate(sequences):
        own = replace(edit, ranges=(edit.ranges[row],))
        [alone] = last_states(model, [ids], ["final_norm"], 1, own)["final_norm"]
        assert torch.allclose(together[row], alone, atol=1e-5), row
    assert not torch.allclose(together, found["final_norm"], atol=1e-2)
