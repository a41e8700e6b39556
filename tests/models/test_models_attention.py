import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from holdfast.errors import InputError, ModelError, UnsupportedFamilyError
from holdfast.models.attention import ATTENTION, SinkProbe, require_tappable, tapped
from holdfast.models.batching import pad
from tiny_models import HEADS, KINDS, LAYERS, random_sequences, tiny_config, tiny_model

SEQUENCES = random_sequences([19, 12, 7])
CPU = torch.device("cpu")
SIDES = ("none", "left", "right")


def twins(kind="qwen3", **changes):
    """Two models of the same weights: one that is tapped, one with eager attention."""
    # Of a size at which heads differ by much, but scores are not so large that the
    # rounding of states in front of them, which is not ours, comes near 1e-6.
    changes = {"initializer_range": 0.15} | changes
    model = tiny_model(kind, **changes)
    eager = tiny_model(kind, **changes)
    eager.set_attn_implementation("eager")
    return model, eager


def batch_of(side):
    sequences = SEQUENCES[:1] * 2 if side == "none" else SEQUENCES
    return pad(sequences, "right" if side == "none" else side, CPU)


def inputs(batch):
    """The batch with its mask, as a trainer hands it over."""
    named = {"input_ids": batch.token_ids, "attention_mask": batch.mask.long()}
    return named | {"position_ids": batch.positions(), "use_cache": False}


def column(eager, batch):
    """What eager attention says, [example, layer, head, position]."""
    found = eager(**inputs(batch), output_attentions=True).attentions
    sinks = batch.mask.long().argmax(-1)
    rows = range(len(sinks))
    return torch.stack(
        [torch.stack([layer[r, :, :, sinks[r]] for r in rows]) for layer in found], 1
    )


def expected_mean(weights, batch, window=None):
    """The mean by its definition, with loops."""
    rows = []
    for row, per_layer in enumerate(weights):
        [real] = torch.nonzero(batch.mask[row], as_tuple=True)
        queries = [q for q in real[1:] if window is None or q - real[0] < window]
        rows.append(sum(per_layer[:, :, q] for q in queries) / len(queries))
    return torch.stack(rows)


def gradients(model):
    return torch.cat(
        [
            torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )


def weighting():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(LAYERS, HEADS, generator=generator)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mass_is_the_column_of_eager_attention(kind, side):
    model, eager = twins(kind)
    batch = batch_of(side)
    probe = SinkProbe(batch.mask, by_position=True)
    with torch.no_grad():
        expected = column(eager, batch)
        plain = model(**inputs(batch)).logits
        probe = SinkProbe(batch.mask, by_position=True)
        with tapped(model):
            logits = model(**inputs(batch), sink_probe=probe).logits
    real = batch.mask
    found = probe.positions()
    assert (found - expected).permute(0, 3, 1, 2)[real].abs().max() < 1e-6
    # Heads differ by thousands of times the tolerance.
    assert probe.mass().std(dim=-1).min() > 1e-3
    torch.testing.assert_close(logits[real], plain[real], atol=2e-5, rtol=2e-5)
    window = KINDS[kind][1].get("sliding_window")
    mean = expected_mean(expected, batch, window)
    torch.testing.assert_close(probe.mass(), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_the_gradient_is_that_of_eager_attention(kind, side, checkpointing):
    model, eager = twins(kind)
    batch = batch_of(side)
    window = KINDS[kind][1].get("sliding_window")
    mean = expected_mean(column(eager, batch), batch, window)
    (mean * weighting()).sum().backward()
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with tapped(model):
        probe = SinkProbe(batch.mask)
        model(**inputs(batch), sink_probe=probe)
        mass = probe.mass()
        (mass * weighting()).sum().backward()
    torch.testing.assert_close(mass, mean, atol=1e-6, rtol=0)
    assert probe.mass() is not mass
    torch.testing.assert_close(probe.mass(), mass, atol=0, rtol=0)
    expected, found = gradients(eager), gradients(model)
    assert expected.norm() > 0.1
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_mass_and_output_send_their_gradients_through_one_call():
    model, eager = twins()
    batch = batch_of("left")
    found = eager(**inputs(batch), output_attentions=True, output_hidden_states=True)
    sinks = batch.mask.long().argmax(-1)
    weights = torch.stack(found.attentions, 1)
    rows = [weights[row, ..., sinks[row]] for row in range(len(sinks))]
    mean = expected_mean(torch.stack(rows), batch)
    states = found.hidden_states[-1][batch.mask]
    ((mean * weighting()).sum() + states.square().mean()).backward()
    with tapped(model):
        probe = SinkProbe(batch.mask)
        states = model.base_model(**inputs(batch), sink_probe=probe).last_hidden_state
        loss = (probe.mass() * weighting()).sum()
        (loss + states[batch.mask].square().mean()).backward()
    expected = gradients(eager)
    assert (gradients(model) - expected).norm() / expected.norm() < 1e-5


def test_padding_and_neighbours_change_no_mass():
    model = tiny_model()
    with torch.no_grad(), tapped(model):
        alone = []
        for sequence in SEQUENCES:
            batch = pad([sequence], "right", CPU)
            probe = SinkProbe(batch.mask)
            model.base_model(**batch.inputs(), sink_probe=probe)
            alone.append(probe.mass())
        for side in ("left", "right"):
            batch = pad(SEQUENCES, side, CPU)
            probe = SinkProbe(batch.mask)
            model.base_model(**batch.inputs(), sink_probe=probe)
            torch.testing.assert_close(
                probe.mass(), torch.cat(alone), atol=1e-6, rtol=0
            )


def test_without_a_mask_of_the_model_padding_would_show():
    # What is registered for the attention has to be registered for its mask too.
    model = tiny_model()
    batch = batch_of("left")
    kept = transformers.AttentionMaskInterface._global_mapping.pop(ATTENTION)
    try:
        with torch.no_grad():
            plain = model(**inputs(batch)).logits[batch.mask]
            with tapped(model):
                blind = model(**inputs(batch)).logits[batch.mask]
            transformers.AttentionMaskInterface.register(ATTENTION, kept)
            with tapped(model):
                seeing = model(**inputs(batch)).logits[batch.mask]
    finally:
        transformers.AttentionMaskInterface.register(ATTENTION, kept)
    assert (blind - plain).abs().max() > 0.1
    assert torch.equal(seeing, plain)


def test_late_queries_of_a_sliding_window_are_not_counted():
    model = tiny_model("mistral", sliding_window=6)
    batch = batch_of("none")
    counted = torch.zeros_like(batch.mask)
    counted[0, 3:] = True
    counted[1, 8:] = True
    probe = SinkProbe(batch.mask, counted=counted)
    with torch.no_grad(), tapped(model):
        probe = SinkProbe(batch.mask, counted=counted)
        model(**inputs(batch), sink_probe=probe)
    assert probe.seen().tolist() == [[3] * LAYERS, [0] * LAYERS]
    assert (probe.mass()[0] > 0).all()
    assert torch.equal(probe.mass()[1], torch.zeros(LAYERS, HEADS))


def test_only_the_layers_asked_for_are_taken():
    model = tiny_model()
    batch = batch_of("right")
    with torch.no_grad(), tapped(model):
        whole, part = SinkProbe(batch.mask), SinkProbe(batch.mask, layers=[2, 1])
        model(**inputs(batch), sink_probe=whole)
        model(**inputs(batch), sink_probe=part)
    torch.testing.assert_close(part.mass(), whole.mass()[:, 1:], atol=1e-6, rtol=0)


def test_lora_is_tapped_and_gets_the_gradient():
    model, eager = twins()
    batch = batch_of("left")
    found = []
    for each in (model, eager):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "o_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(each, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
        if each is eager:
            mean = expected_mean(column(adapted, batch), batch)
            (mean * weighting()).sum().backward()
        else:
            with tapped(adapted):
                probe = SinkProbe(batch.mask)
                adapted(**inputs(batch), sink_probe=probe)
                (probe.mass() * weighting()).sum().backward()
        found.append(gradients(adapted))
    torch.testing.assert_close(probe.mass(), mean, atol=1e-6, rtol=0)
    assert found[1].norm() > 0.01
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-5


@pytest.mark.parametrize("side", SIDES)
def test_means_of_16_bit_weights_are_taken_in_32_bits(side):
    model = tiny_model(dtype=torch.bfloat16)
    exact = tiny_model().bfloat16().float()
    exact.set_attn_implementation("eager")
    batch = batch_of(side)
    with torch.no_grad(), tapped(model):
        expected = expected_mean(column(exact, batch), batch)
        probe = SinkProbe(batch.mask)
        model.bfloat16()(**inputs(batch), sink_probe=probe)
    assert probe.mass().dtype is torch.float32
    difference = (probe.mass() - expected).abs()
    # States that run in bfloat16 are off by per cents; the first layer reads them
    # before that, and is off by the rounding of single weights, averaged.
    assert difference[:, 0].max() < 4e-3
    assert difference.mean() < 2e-2
    halves = probe.mass() * 256
    assert (halves != halves.round()).float().mean() > 0.9


def test_the_attention_is_given_back_also_after_an_error():
    model = tiny_model()
    with tapped(model):
        assert model.config._attn_implementation == ATTENTION
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="mine"), tapped(model):
        raise RuntimeError("mine")
    assert model.config._attn_implementation == "sdpa"


def test_a_pass_without_a_probe_is_plain_attention_bit_for_bit(tmp_path):
    model = tiny_model()
    batch = batch_of("left")
    with torch.no_grad():
        plain = model(**inputs(batch)).logits
        with tapped(model):
            assert torch.equal(model(**inputs(batch)).logits, plain)
            model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0}
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}


@pytest.mark.parametrize(
    ("name", "extra", "reason"),
    [
        ("Gemma2Config", GEMMA2, "`gemma2`.*caps the scores"),
        ("GptOssConfig", GPT_OSS, "`gpt_oss`.*learned sink"),
        ("GPTJConfig", {"rotary_dim": 4}, "`gptj`.*no scaled dot-product"),
    ],
)
def test_other_attention_is_refused_by_name(name, extra, reason):
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, name)(**{**shape, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedFamilyError, match=reason):
        require_tappable(model)
    with pytest.raises(UnsupportedFamilyError, match=reason), tapped(model):
        pass


def test_something_else_than_a_model_is_refused():
    with pytest.raises(UnsupportedFamilyError, match=r"`Linear`.*no model"):
        require_tappable(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("s_aux", torch.zeros(4), "learned sink"),
        ("softcap", 30.0, "caps the scores"),
        ("position_bias", torch.zeros(1), "bias"),
    ],
)
def test_what_shows_in_a_pass_alone_is_refused_there(argument, value, reason):
    model = tiny_model()
    batch = batch_of("none")
    with tapped(model), pytest.raises(UnsupportedFamilyError, match=reason):
        model(**inputs(batch), sink_probe=SinkProbe(batch.mask), **{argument: value})


def test_dropout_on_attention_is_refused():
    model = tiny_model(attention_dropout=0.1).train()
    batch = batch_of("none")
    with tapped(model), pytest.raises(InputError, match=r"dropout of 0\.1"):
        model(**inputs(batch), sink_probe=SinkProbe(batch.mask))


def test_a_mask_of_numbers_is_refused():
    model = tiny_model()
    batch = batch_of("none")
    length = batch.mask.shape[1]
    added = torch.zeros(2, 1, length, length).triu(1) * -1e9
    with tapped(model), pytest.raises(UnsupportedFamilyError, match="does not say"):
        model(
            input_ids=batch.token_ids,
            attention_mask=added,
            sink_probe=SinkProbe(batch.mask),
        )


def test_a_pass_over_other_rows_is_refused():
    model = tiny_model()
    batch = batch_of("left")
    with tapped(model), pytest.raises(InputError, match="19 queries and 19 keys in 1"):
        model(batch.token_ids[:1], sink_probe=SinkProbe(batch.mask))


def test_rows_of_several_sequences_are_refused():
    model = tiny_model()
    batch = batch_of("none")
    places = torch.cat([torch.arange(9), torch.arange(10)])[None].expand(2, -1)
    with tapped(model), pytest.raises(InputError, match="one sequence a row"):
        model(
            input_ids=batch.token_ids,
            position_ids=places,
            sink_probe=SinkProbe(batch.mask),
        )


def test_a_probe_takes_one_pass():
    model = tiny_model()
    batch = batch_of("none")
    probe = SinkProbe(batch.mask)
    with tapped(model):
        model(**inputs(batch), sink_probe=probe)
        with pytest.raises(InputError, match="taken a pass already"):
            model(**inputs(batch), sink_probe=probe)


def test_a_mass_that_no_gradient_would_reach_is_refused():
    model = tiny_model().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch = batch_of("none")
    with tapped(model), pytest.raises(ModelError, match="use_reentrant=False"):
        model(**inputs(batch), sink_probe=SinkProbe(batch.mask))


def test_a_probe_that_nobody_handed_on_says_so():
    model = tiny_model()
    batch = batch_of("none")
    probe = SinkProbe(batch.mask)
    with tapped(model):
        model(**inputs(batch))
    with pytest.raises(ModelError, match="not handed the probe"):
        probe.mass()


def test_positions_have_to_be_asked_for():
    model = tiny_model()
    batch = batch_of("none")
    probe = SinkProbe(batch.mask)
    with tapped(model):
        model(**inputs(batch), sink_probe=probe)
    with pytest.raises(InputError, match="by_position=True"):
        probe.positions()


def test_a_row_of_padding_is_refused():
    with pytest.raises(InputError, match="a row of padding"):
        SinkProbe(torch.tensor([[True, True], [False, False]]))


def test_values_narrower_than_keys_have_room_for_the_mark():
    from holdfast.models.attention import attend

    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 4, 9, 16)
    value = torch.randn(1, 4, 9, 8)
    module = torch.nn.Module()
    module.layer_idx = 0
    probe = SinkProbe(torch.ones(1, 9, dtype=torch.bool), by_position=True)
    output, _ = attend(module, query, key, value, None, sink_probe=probe)
    scores = (query @ key.transpose(-1, -2) / 4).masked_fill(
        torch.ones(9, 9).triu(1).bool(), -torch.inf
    )
    weights = scores.softmax(-1)
    torch.testing.assert_close(probe.positions()[:, 0], weights[..., 0])
    torch.testing.assert_close(output, (weights @ value).transpose(1, 2))


def test_a_config_names_no_attention_of_ours():
    assert ATTENTION not in tiny_config().to_json_string()
