"""What prompts share is read once, and answers stay what they are."""

from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_thinker
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import adapt
from tiny_models import tiny_of_every_kind

CUTS, DRAWS = (0, 3, 9, 20), 3
CLOSE = (301, 302, 303)


def smollm2():
    """SmolLM2's shape, tiny and random, under a chat template with thinking."""
    tokenizer = tiny_thinker.tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=36,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return adapt(LlamaForCausalLM(config).eval(), tokenizer)


@pytest.fixture(scope="module", params=["qwen3", "smollm2", "qwen3_5_text"])
def adapter(request, tokenizer):
    if request.param == "smollm2":
        return smollm2()
    return adapt(tiny_of_every_kind(request.param), tokenizer)


def branches(adapter, *, trunks=3):
    """Prompts that follow trunks of several lengths up to several places, closed."""
    vocab = adapter.embedding.num_embeddings
    generator = torch.Generator().manual_seed(5)
    prompts, of = [], []
    for number in range(trunks):
        drawn = torch.randint(5, vocab, (26 + 5 * number,), generator=generator)
        trunk = tuple(drawn.tolist())
        for cut in CUTS:
            prompt = (*trunk[: 5 + cut], *(token % vocab for token in CLOSE))
            for draw in range(DRAWS):
                prompts.append((prompt, 1000 * number + 10 * cut + draw))
                of.append(trunk)
        # The trunk itself: nothing stands behind it.
        prompts.append((trunk, 7))
        of.append(trunk)
    return prompts, of


def drawn(adapter, prompts, temperature, **how):
    sampling = Sampling(temperature=temperature, max_thinking=0, max_answer=8)
    parts = generate(
        adapter, prompts, sampling, thinking_done=True, stop_ids=[2], **how
    )
    rows = {each.index: each for part in parts for each in part}
    return [rows[place] for place in range(len(prompts))]


@contextmanager
def read(adapter):
    """Count the tokens that the model reads, padding included."""
    counts = []

    def note(_, arguments, named):
        counts.append(named["input_ids"].numel())

    handle = adapter.base.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_answers_behind_shared_trunks_are_the_plain_ones(
    adapter, temperature, batch_size
):
    prompts, trunks = branches(adapter)
    plain = drawn(adapter, prompts, temperature, batch_size=64)
    shared = drawn(adapter, prompts, temperature, batch_size=batch_size, trunks=trunks)
    for one, other in zip(plain, shared, strict=True):
        near = min(one.min_top2_gap, one.min_margin)
        assert one.token_ids == other.token_ids, near
        assert (one.finish, one.spans) == (other.finish, other.spans)
    if temperature:
        # Draws from one cut differ, so that equal ones above say something.
        assert len({each.token_ids for each in plain[:DRAWS]}) > 1


def test_a_trunk_is_read_once_where_layers_keep_all_tokens(adapter):
    prompts, trunks = branches(adapter, trunks=1)
    longer = [
        ((*trunk, *prompt), seed)
        for (prompt, seed), trunk in zip(prompts, trunks, strict=True)
    ]
    trunks = [(*trunk, *trunk) for trunk in trunks]
    with read(adapter) as plain:
        drawn(adapter, longer, 0, batch_size=64)
    with read(adapter) as shared:
        drawn(adapter, longer, 0, batch_size=64, trunks=trunks)
    hybrid = "linear_attention" in (
        getattr(adapter.model.config, "layer_types", None) or ()
    )
    assert (sum(shared) < sum(plain)) is not hybrid


def test_a_trunk_that_prompts_do_not_follow_changes_nothing(adapter):
    prompts, trunks = branches(adapter)
    wrong = [tuple(reversed(trunk)) for trunk in trunks]
    plain = drawn(adapter, prompts, 1.0, batch_size=16)
    shared = drawn(adapter, prompts, 1.0, batch_size=16, trunks=wrong)
    assert [each.token_ids for each in plain] == [each.token_ids for each in shared]


def test_another_trunk_would_be_seen(adapter):
    """The answers do hang on what stands before the cut."""
    prompts, _ = branches(adapter)
    other = [((prompt[0] + 1, *prompt[1:]), seed) for prompt, seed in prompts]
    plain, changed = (drawn(adapter, each, 1.0) for each in (prompts, other))
    pairs = zip(plain, changed, strict=True)
    assert any(one.token_ids[1:] != two.token_ids[1:] for one, two in pairs)
