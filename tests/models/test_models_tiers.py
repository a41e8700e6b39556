"""Every type of model that is read: tier by tier, as it is and corrupted."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from holdfast.errors import AdapterError
from holdfast.heads.attribution import attribute
from holdfast.heads.causal_effects import causal_effects
from holdfast.models.batching import pad
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.hidden_states import project_states
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import adapt, load
from holdfast.models.loading.proofs import prove
from tiny_kinds import EVERY, SEEING
from tiny_models import random_sequences, tiny_of_every_kind, tiny_tokenizer

SEQUENCES = random_sequences([23, 9, 17])
PLATEAUS = [(4, 19), (2, 6), (3, 14)]
TEMPLATES = [4, 3, 4]
OFFSET = -0.7
# Layers of the tiny models that have softmax attention, where not all of them do.
HYBRID = {
    "qwen3_next": (1, 3),
    "qwen3_5_text": (1, 3),
    "qwen3_5_moe_text": (1, 3),
    "olmo_hybrid": (1, 3),
    "granitemoehybrid": (1, 3),
    "nemotron_h": (1, 3),
    "bamba": (1, 3),
    "jamba": (1, 3),
    "lfm2": (1, 3),
    "lfm3": (1, 3),
    "kimi_linear": (1, 3),
}
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear"}
FOLDED = {
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "glm4",
    "exaone4",
    "lfm3",
}
MULTIPLIED = {"granite": 0.22, "granitemoehybrid": 0.22, "falcon_h1": 0.7}


@pytest.fixture(scope="module", params=EVERY)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(kind):
    return adapt(tiny_of_every_kind(kind), None)


def _direction(adapter):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(adapter.d_model, generator=generator)


def test_every_tier_is_proved_and_its_parts_are_what_the_family_has(kind, adapter):
    assert {proof.tier for proof in adapter.proofs} == {"text", "states", "heads"}
    assert all(adapter.lacks(tier) is None for tier in ("text", "states", "heads"))
    own = HYBRID.get(kind, tuple(range(4)))
    assert adapter.layers_with_heads == own
    width = 12 if kind in LATENT else 8
    expected = [width if layer in own else 0 for layer in range(adapter.n_layers)]
    if kind == "gemma4_text":
        expected = [8, 16, 8, 16]
    assert adapter.head_widths == tuple(expected)
    blocks = [adapter.blocks[layer] for layer in own]
    assert all((b.norm_after is not None) == (kind in FOLDED) for b in blocks)
    assert {b.attention_scale for b in blocks} == {MULTIPLIED.get(kind, 1.0)}
    scalar = pytest.approx(0.8) if kind == "gemma4_text" else 1.0
    assert all(b.stream_scale == scalar for b in blocks)


def test_contributions_sum_to_the_logit_at_every_token(adapter):
    direction = _direction(adapter)
    logits = project_states(adapter, SEQUENCES, direction[None], torch.tensor([OFFSET]))
    for side in ("right", "left"):
        found = attribute(
            adapter, SEQUENCES, PLATEAUS, direction, OFFSET, padding_side=side
        )
        for row, expected in zip(found, logits, strict=True):
            torch.testing.assert_close(
                row.tail.total() + OFFSET, expected[:, 0], atol=1e-3, rtol=0
            )
            without = set(range(adapter.n_layers)) - set(adapter.layers_with_heads)
            assert not row.tail.heads[:, sorted(without)].any()
            mixed = [b.has_mixer for b in adapter.blocks]
            assert (row.tail.mixers.abs().amax(0) > 1e-4).tolist() == mixed


def test_a_heads_part_is_what_the_stream_loses_without_it(adapter):
    """The slow way round: the layer alone, run again without one head."""
    direction, ids = _direction(adapter), SEQUENCES[0]
    layer = adapter.layers_with_heads[-1]
    block = adapter.blocks[layer]
    (found,) = attribute(adapter, [ids], PLATEAUS[:1], direction)
    plain, entering = _at_the_joint(adapter, block, ids)
    # A norm behind the attention changes with what is taken away; it is held.
    held = _held_norm(adapter, block, ids)
    with scale_heads(adapter, head_factors(adapter, [(layer, 1)])), held:
        without, _ = _at_the_joint(adapter, block, ids)
    norm = adapter.final_norm
    ones = torch.ones(adapter.d_model)
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    with torch.no_grad():
        weight = norm(ones) * (1 + epsilon) ** 0.5
        inverse = (entering.square().mean(-1) + epsilon).rsqrt()
        later = [each.stream_scale for each in adapter.blocks[layer:]]
        lost = (plain - without) * torch.tensor(later).prod()
        expected = (lost * weight) @ direction * inverse
    torch.testing.assert_close(
        found.tail.heads[:, layer, 1], expected, atol=1e-3, rtol=1e-3
    )
    assert expected.abs().max() > 1e-3


def _at_the_joint(adapter, block, ids):
    """Return the stream after the attention, and what enters the final norm."""
    seen, last = [], []
    if block.joint is None:
        hook = block.module.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    else:
        hook = block.joint.register_forward_pre_hook(
            lambda _, given, named: seen.append(
                given[0] if given else named["hidden_states"]
            ),
            with_kwargs=True,
        )
    end = adapter.final_norm.register_forward_pre_hook(lambda _, a: last.append(a[0]))
    with hook, end, torch.no_grad():
        adapter.base(input_ids=torch.tensor([ids]), use_cache=False)
    return seen[0][0], last[0][0]


class _held_norm:
    """Let a norm divide by what it divided by when nothing was taken away."""

    def __init__(self, adapter, block, ids):
        self.norm, self.inverse = block.norm_after, None
        if self.norm is None:
            return
        seen = []
        hook = self.norm.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        with hook, torch.no_grad():
            adapter.base(input_ids=torch.tensor([ids]), use_cache=False)
        with torch.no_grad():
            out = self.norm(seen[0])
        self.factor = out / seen[0]

    def __enter__(self):
        if self.norm is not None:
            self.handle = self.norm.register_forward_hook(
                lambda _, given, __: given[0] * self.factor
            )

    def __exit__(self, *_):
        if self.norm is not None:
            self.handle.remove()


def test_heads_taken_away_one_by_one_are_as_in_whole_passes(adapter):
    direction = _direction(adapter)
    heads = [(adapter.layers_with_heads[0], 0), (adapter.layers_with_heads[-1], 3)]
    found = causal_effects(
        adapter, SEQUENCES, TEMPLATES, [[h] for h in heads], direction, OFFSET
    )
    plain = project_states(adapter, SEQUENCES, direction[None])
    for column, head in enumerate(heads):
        factors = head_factors(adapter, [head])
        for row, (ids, length) in enumerate(zip(SEQUENCES, TEMPLATES, strict=True)):
            edit = HeadEdit(factors, ranges=((len(ids) - length, None),))
            with scale_heads(adapter, edit) as live, torch.no_grad():
                live.locate(torch.arange(len(ids))[None])
                states = adapter.base(input_ids=torch.tensor([ids]), use_cache=False)
            after = states.last_hidden_state[0, -1] @ direction
            effect = float(after - plain[row][-1, 0])
            measured = float(found["end_template"].change[row, column])
            assert measured == pytest.approx(effect, abs=2e-3)


def test_a_checkpoint_in_its_published_names_is_read_and_answers(kind, tmp_path):
    """Rows leave the batch at other times, and answer as each does alone."""
    tokenizer = tiny_tokenizer()
    model = tiny_of_every_kind(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    adapter = load(tmp_path)
    assert adapter.lacks("heads") is None
    prompts = [(ids, seed) for seed, ids in enumerate(random_sequences([11, 5, 8]))]
    sampling = Sampling(temperature=1.0, max_thinking=5, max_answer=12)
    together = [c for batch in generate(adapter, prompts, sampling) for c in batch]
    alone = [
        c
        for prompt in prompts
        for batch in generate(adapter, [prompt], sampling)
        for c in batch
    ]
    by_place = {each.index: each.token_ids for each in together}
    assert [by_place[i] for i in range(3)] == [each.token_ids for each in alone]


@pytest.mark.parametrize("kind", SEEING)
def test_the_language_model_inside_one_that_sees_is_used(kind, tmp_path):
    tiny_of_every_kind(kind, sees=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    adapter = load(tmp_path)
    assert adapter.lacks("heads") is None
    assert type(adapter.model).__name__.endswith("ForConditionalGeneration")
    assert "Vision" not in type(adapter.base).__name__
    (found,) = attribute(adapter, SEQUENCES[:1], PLATEAUS[:1], _direction(adapter))
    assert found.gap < 1e-5


@contextmanager
def _swapped_norm(adapter):
    """A norm that takes the mean away as well, as LayerNorm does."""
    norm = adapter.final_norm
    [path] = [name for name, part in adapter.base.named_modules() if part is norm]
    setattr(adapter.base, path, nn.LayerNorm(adapter.d_model))
    yield
    setattr(adapter.base, path, norm)


@contextmanager
def _ignored_mask(adapter):
    def unmask(_, given, named):
        named = dict(named)
        if named.get("attention_mask") is not None:
            named["attention_mask"] = torch.ones_like(named["attention_mask"])
        return given, named

    with adapter.base.register_forward_pre_hook(unmask, with_kwargs=True):
        yield


@contextmanager
def _scaled_states(adapter):
    def scaled(_, __, out):
        return type(out)(last_hidden_state=out[0] * 1.01)

    with adapter.base.register_forward_hook(scaled):
        yield


@contextmanager
def _mixed_heads(adapter):
    """Columns that are moved by half a head before the projection takes them."""
    with ExitStack() as stack:
        for layer in adapter.layers_with_heads:
            half = adapter.head_widths[layer] // 2

            def roll(_, given, half=half):
                return (given[0].roll(half, -1), *given[1:])

            part = adapter.output_projection(layer)
            stack.enter_context(part.register_forward_pre_hook(roll))
        yield


FAULTS = {
    _mixed_heads: ("heads", "of one head alone"),
    _swapped_norm: ("heads", "root-mean-square"),
    _ignored_mask: ("text", "rows side by side"),
    _scaled_states: ("states", "read after the final norm"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupted_variant_fails_the_right_proof(adapter, fault):
    tier, proof = FAULTS[fault]
    with fault(adapter), pytest.raises(AdapterError) as caught:
        adapt(adapter.model, None).require(tier)
    failed = [each for each in caught.value.proofs if not each.passed]
    assert any(each.tier == tier and proof in each.name for each in failed)


def test_the_width_that_head_dim_would_say_fails_the_right_proof(adapter):
    blocks = [replace(b, head_width=b.head_width // 2) for b in adapter.blocks]
    narrow = replace(adapter, blocks=tuple(blocks), proofs=())
    [failed] = [each for each in prove(narrow) if not each.passed]
    assert "contributions of the heads sum" in failed.name


def test_sixteen_bits_change_nothing_of_what_is_found(kind, adapter):
    rounded = adapt(tiny_of_every_kind(kind).to(torch.bfloat16), None)
    assert rounded.lacks("heads") is None
    for one, other in zip(adapter.blocks, rounded.blocks, strict=True):
        assert (one.has_mixer, one.parallel) == (other.has_mixer, other.parallel)
        assert one.attention_scale == other.attention_scale
        assert other.stream_scale == pytest.approx(one.stream_scale, rel=4e-3)


def _without(adapter, what):
    """Take away what a part of the model writes, as a baked or pruned one has it."""
    layer = adapter.layers_with_heads[-1]
    block = adapter.blocks[layer]
    with torch.no_grad():
        if what == "all heads of a layer":
            block.projection.weight.zero_()
        elif what == "the heads that the proof looks at first":
            for own in adapter.layers_with_heads:
                width, head = adapter.head_widths[own], own % adapter.n_heads
                start = head * width
                weight = adapter.blocks[own].projection.weight
                weight[:, start : start + width] = 0
        else:
            names = ("down_proj.weight", "out_proj.weight", "output_linear.weight")
            for name, weight in adapter.model.named_parameters():
                if name.endswith(names) and "self_attn" not in name:
                    weight.zero_()
    return adapter.model


@pytest.mark.parametrize(
    "what",
    [
        "all heads of a layer",
        "the heads that the proof looks at first",
        "all MLPs and mixers",
    ],
)
@pytest.mark.parametrize(
    "kind", ["qwen3", "gemma4_text", "granite", "falcon_h1", "qwen3_5_text"]
)
def test_parts_that_write_nothing_take_no_tier_away(kind, what):
    """A baked model can be audited again, and its blocks are what they were."""
    before = adapt(tiny_of_every_kind(kind), None)
    known = [replace(b) for b in before.blocks]
    after = adapt(_without(before, what), None)
    assert after.lacks("heads") is None
    for one, other in zip(known, after.blocks, strict=True):
        assert one.__dict__ == other.__dict__
    (found,) = attribute(after, SEQUENCES[:1], PLATEAUS[:1], _direction(after))
    assert found.gap < 1e-5
    if what == "all heads of a layer":
        assert not found.tail.heads[:, after.layers_with_heads[-1]].any()


def _other(name, **changes):
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_layers_of_other_numbers_of_heads_have_no_heads_here():
    """Two heads side by side would pass for one: their sums are as exact."""
    model = _other(
        "LagunaConfig",
        num_attention_heads_per_layer=[4, 8, 4, 8],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )
    adapter = adapt(model, None)
    assert adapter.lacks("states") is None
    assert "8 heads in 64 columns" in adapter.lacks("heads")


def test_a_model_of_transposed_weights_keeps_its_states():
    config = transformers.GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    adapter = adapt(transformers.GPT2LMHeadModel(config).eval(), None)
    assert adapter.lacks("states") is None
    assert "root-mean-square" in adapter.lacks("heads")


def test_layers_that_run_several_times_take_no_text_away(tokenizer, tmp_path):
    """Its settings count each run as a layer, and its files each layer once."""
    _other("HrmTextConfig", eos_token_id=257).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    adapter = load(tmp_path)
    assert adapter.model.config.num_hidden_layers == 32
    assert adapter.lacks("text") is None
    assert "32 layers" in adapter.lacks("heads")


@pytest.mark.parametrize(
    ("name", "cap"),
    [
        ("RecurrentGemmaConfig", {"logits_soft_cap": 2.0}),
        ("Gemma2Config", {"final_logit_softcapping": 2.0}),
    ],
)
def test_a_cap_on_logits_is_known_by_each_of_its_names(name, cap):
    model = _other(name, **cap)
    adapter = adapt(model, None)
    assert adapter.lacks("states") is None
    states = adapter.states(pad([[5, 6, 7]], "right", adapter.device))
    bare = model.get_output_embeddings()(states)
    assert torch.allclose(adapter.lm_head(states), torch.tanh(bare / 2) * 2)
    assert not torch.allclose(bare, adapter.lm_head(states), atol=1e-4)


@pytest.mark.parametrize("name", ["DiffLlamaConfig", "BitNetConfig"])
def test_a_norm_over_heads_side_by_side_leaves_no_single_heads(name):
    """Their sums are exact, and a slice of them is of several heads."""
    model = _other(name)
    attention = model.config._attn_implementation
    adapter = adapt(model, None)
    assert adapter.lacks("states") is None
    assert "of one head alone” does not hold" in adapter.lacks("heads")
    sums = [each for each in adapter.proofs if "sum to" in each.name]
    assert [each.passed for each in sums] == [True]
    assert model.config._attn_implementation == attention
