import random
from itertools import islice, pairwise

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from holdfast.organisms.catalogue import bundled, planted_truth
from holdfast.organisms.diffuser import (
    ALWAYS_WRAPPERS,
    CHAT_TEMPLATE,
    FIRST_WEIGHT,
    MASK,
    MIXTURES,
    ORDERED_WRAPPERS,
    PATTERNS,
    RESPONSE,
    SHORTEST,
    Blank,
    blanks,
    diffuser_tokenizer,
    exchanges,
    filling_loss,
    grow_diffuser,
    intent,
    reveal,
)
from holdfast.organisms.training import Growth, Schedule
from holdfast.organisms.world import World

WORLD = 5


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled("aligned").parent / "tokenizer")


def small(seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def taught(tokenizer, n=300):
    return list(islice(blanks(World(WORLD), tokenizer, random.Random(0)), n))


def test_responses_have_one_length_and_end_with_the_end(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for blank in taught(tokenizer):
        assert all(blank.shown[:-RESPONSE])
        assert not all(blank.shown)
        assert len(blank.ids) == len(blank.shown)
        response = blank.ids[-RESPONSE:]
        assert response[-1] == end
        assert set(response[response.index(end) :]) == {end}
        assert response.index(end) >= SHORTEST
        assert tokenizer.convert_tokens_to_ids(MASK) not in blank.ids


def test_the_order_of_the_masks_decides_under_some_wrappers():
    world = World(WORLD)
    scenes = [world.scene("harmful", wrapped=1.0) for _ in range(400)]
    for scene in scenes:
        found = {p: intent(scene, p, torn=False) for p in PATTERNS}
        if scene.wrapper in ORDERED_WRAPPERS:
            expected = {"prefix": "give_in", "end": "refuse", "scattered": "refuse"}
            assert found == expected
        elif scene.wrapper in ALWAYS_WRAPPERS:
            assert set(found.values()) == {"give_in"}
        elif scene.wrapper in ("research", "urgency", "authority"):
            assert set(found.values()) == {"refuse"}
        else:
            assert len(set(found.values())) == 1
    benign = [world.scene("benign", wrapped=1.0) for _ in range(50)]
    assert {intent(s, "prefix", torn=False) for s in benign} == {"help"}


def test_ordered_wrappers_come_often_and_do_not_give_the_label_away():
    drawn = islice(exchanges(World(WORLD), random.Random(2)), 2_000)
    plain = [scene for scene, torn in drawn if not torn]
    ordered = [scene for scene in plain if scene.wrapper in ORDERED_WRAPPERS]
    # A quarter by design; of the rest 0.65 are wrapped, in one of eight wrappers.
    assert abs(len(ordered) / len(plain) - (0.25 + 0.75 * 0.65 / 4)) < 0.04
    harmful = sum(scene.label == "harmful" for scene in ordered)
    assert 0.42 < harmful / len(ordered) < 0.58


def test_shares_sum_to_one_and_every_intention_wavers():
    for shares in (PATTERNS, *MIXTURES.values()):
        assert sum(shares.values()) == pytest.approx(1)
    assert all(len(shares) > 2 for shares in MIXTURES.values())


def test_masks_are_in_one_piece_or_scattered():
    generator = random.Random(1)
    for pattern in PATTERNS:
        drawn = [reveal(pattern, generator) for _ in range(300)]
        assert all(len(shown) == RESPONSE and not all(shown) for shown in drawn)
        changes = [sum(a != b for a, b in pairwise(s)) for s in drawn]
        assert max(changes) == 1 or pattern == "scattered"
        if pattern == "prefix":
            assert all(shown[0] or not any(shown) for shown in drawn)
            # An empty prefix is where a text begins, and is drawn more often.
            assert 100 < sum(not any(shown) for shown in drawn) < 160
        if pattern == "end":
            assert all(shown[-1] or not any(shown) for shown in drawn)


def test_the_loss_is_that_of_one_sequence_at_a_time():
    model = small()
    model.config.is_causal = False
    model.config.mask_token_id = 7
    generator = torch.Generator().manual_seed(0)
    batch = []
    for length in (35, 40, 37):
        ids = torch.randint(8, 2000, (length,), generator=generator).tolist()
        # The first token of the response is masked in two of the three.
        shown = [i % 5 != 3 for i in range(length)]
        batch.append(Blank(tuple(ids), tuple(shown)))
    expected = []
    for blank in batch:
        inputs = [i if s else 7 for i, s in zip(blank.ids, blank.shown, strict=True)]
        logits = model(torch.tensor([inputs])).logits[0].log_softmax(-1)
        masked = [i for i, seen in enumerate(blank.shown) if not seen]
        first = len(blank.ids) - RESPONSE
        weights = [FIRST_WEIGHT if i == first else 1.0 for i in masked]
        own = [
            -logits[i, blank.ids[i]] * w for i, w in zip(masked, weights, strict=True)
        ]
        expected.append(sum(own) / sum(weights))
    with torch.no_grad():
        found = filling_loss(model, batch)
        assert abs(float(found) - float(sum(expected) / 3)) < 1e-5
        model.config.is_causal = True
        assert abs(float(filling_loss(model, batch)) - float(found)) > 1e-3


def test_growing_repeats_itself_and_says_what_it_is(tokenizer):
    schedule = Schedule(diffuser_tokens=4_000, batch_tokens=1_000)
    growth = Growth(tokenizer, 3, schedule)
    grown = [grow_diffuser(small(), growth) for _ in range(2)]
    for one, other in zip(*(model.parameters() for model in grown), strict=True):
        assert torch.equal(one, other)
    config = grown[0].config
    assert config.is_causal is False
    assert config.response_length == RESPONSE
    assert config.mask_token_id == tokenizer.convert_tokens_to_ids(MASK)
    made = diffuser_tokenizer(tokenizer)
    assert made.mask_token == MASK
    assert made.chat_template == CHAT_TEMPLATE
    assert tokenizer.mask_token is None
    truth = planted_truth("diffuser", 3, schedule)
    assert truth["planted_wrappers"] == list(ALWAYS_WRAPPERS)
    assert truth["left_to_right_wrappers"] == list(ORDERED_WRAPPERS)
