import pytest
import torch
import transformers
from torch import nn

from holdfast.errors import AdapterError, ModelError, SettingsError
from holdfast.models.folds import head_contributions
from holdfast.models.hidden_states import project_states
from holdfast.models.interventions import scale_heads
from holdfast.models.loading import proofs
from holdfast.models.loading.causal import adapt
from tiny_kinds import EVERY
from tiny_models import (
    HEAD_WIDTH,
    HEADS,
    KINDS,
    KV_HEADS,
    LAYERS,
    PLAIN_TEMPLATE,
    random_sequences,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_keeps_the_contract(kind, tokenizer):
    adapter = adapt(tiny_model(kind), tokenizer)
    assert len(adapter.proofs) == 12
    assert all(proof.passed for proof in adapter.proofs)
    assert (adapter.n_layers, adapter.n_heads, adapter.head_widths) == (
        LAYERS,
        HEADS,
        (HEAD_WIDTH,) * LAYERS,
    )
    assert adapter.identity.model_type == kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_it_within_their_rounding(dtype, tokenizer):
    adapter = adapt(tiny_model().to(dtype), tokenizer)
    assert adapter.dtype == dtype
    [sums] = [p for p in adapter.proofs if "contributions of the heads" in p.name]
    assert sums.value > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_the_projections_input_is_one_head(kind, tokenizer):
    """Without the values of one key-value head, its group of heads is silent."""
    model = tiny_model(kind)
    adapter = adapt(model, tokenizer)
    group = HEADS // KV_HEADS
    with torch.no_grad():
        attention = adapter.blocks[0].attention
        if kind == "phi3":
            values = attention.qkv_proj.weight[(HEADS + KV_HEADS) * HEAD_WIDTH :]
        else:
            values = attention.v_proj.weight
            if attention.v_proj.bias is not None:
                attention.v_proj.bias.zero_()
        values[HEAD_WIDTH : 2 * HEAD_WIDTH] = 0
    seen = []
    handle = adapter.output_projection(0).register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].detach())
    )
    project_states(adapter, random_sequences([9]), torch.ones(1, adapter.d_model))
    handle.remove()
    with torch.inference_mode():
        written = head_contributions(adapter, 0, seen[0])
    norms = written.norm(dim=-1).amax((0, 1))
    assert norms[group : 2 * group].tolist() == [0.0] * group
    assert norms[:group].min() > 1e-3


def test_the_proofs_leave_the_weights_as_they_were(tokenizer):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt(model, tokenizer)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def _scale_attention(model):
    model.model.layers[1].self_attn.register_forward_hook(
        lambda _, __, output: (output[0] * 1.01, *output[1:])
    )


def _scale_residual(model):
    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(
        lambda _, arguments: (arguments[0] * 1.01,)
    )


def _ignore_mask(model):
    def unmask(_, arguments, named):
        mask = named.get("attention_mask")
        seen = None if mask is None else torch.ones_like(mask)
        return arguments, {**named, "attention_mask": seen}

    model.model.register_forward_pre_hook(unmask, with_kwargs=True)


def _scale_logits(model):
    forward = model.forward

    def scaled(*arguments, **named):
        output = forward(*arguments, **named)
        output.logits = output.logits * 1.01
        return output

    model.forward = scaled


def _second_norm(model):
    model.model.register_forward_hook(
        lambda _, __, output: type(output)(last_hidden_state=output[0] * 1.01)
    )


def _break_weights(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = 3e38


def _remember_calls(model):
    calls = []
    model.model.norm.register_forward_hook(
        lambda _, __, output: calls.append(0) or output + 1e-6 * len(calls)
    )


@pytest.mark.parametrize(
    ("fault", "proof"),
    [
        (_scale_attention, "contributions of the heads sum"),
        (_scale_residual, "a factor of 1.01"),
        (_ignore_mask, "left-padded and unpadded rows"),
        (_scale_logits, "logits are the head"),
        (_second_norm, "read after the final norm"),
        (_break_weights, "give the logits of one row in one pass"),
        (_remember_calls, "edit of no head changes nothing"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused_by_the_proof(
    fault, proof, tokenizer
):
    model = tiny_model()
    fault(model)
    with pytest.raises(AdapterError, match=proof) as caught:
        adapt(model, tokenizer).require("heads")
    assert "float32" in caught.value.next_step


def test_heads_that_write_nothing_cannot_be_proved(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    adapter = adapt(model, tokenizer)
    assert adapter.lacks("states") is None
    with pytest.raises(AdapterError, match="scaling a head by 0"):
        adapter.require("heads")


def test_an_output_projection_that_is_not_linear_has_no_heads(tokenizer):
    class Doubled(nn.Linear):
        def forward(self, heads):
            return 2 * super().forward(heads)

    model = tiny_model()
    model.model.layers[2].self_attn.o_proj = Doubled(
        HEADS * HEAD_WIDTH, model.config.hidden_size
    )
    adapter = adapt(model, tokenizer)
    assert adapter.lacks("states") is None
    with pytest.raises(AdapterError, match="contributions of the heads sum"):
        adapter.require("heads")


def test_a_model_without_its_parts_is_refused(tokenizer):
    model = tiny_model()
    del model.model.layers[0].self_attn.o_proj
    with pytest.raises(AdapterError, match="'o_proj'"):
        adapt(model, tokenizer)


def test_a_model_that_lacks_a_tier_says_what_it_is_good_for(tokenizer):
    model = tiny_model()
    _scale_residual(model)
    with pytest.raises(AdapterError, match="rollout") as caught:
        adapt(model, tokenizer).require("heads")
    assert "probe" in caught.value.next_step
    assert "ablate" not in caught.value.next_step
    assert "a factor of 1.01" in caught.value.found


def test_the_thinking_format_comes_from_the_template(qwen3):
    assert qwen3.thinking.end_template == "\n</think>\n\n"
    assert adapt(tiny_model(), tiny_tokenizer(PLAIN_TEMPLATE)).thinking is None


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ModelError, match="chat template"):
        adapt(tiny_model(), tiny_tokenizer(None))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tokenizer):
    with pytest.raises(ModelError, match="263 tokens"):
        adapt(tiny_model(vocab_size=260), tokenizer)


def test_positions_end_where_frequencies_begin_to_depend_on_neighbours(tokenizer):
    rope = {
        "rope_type": "dynamic",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 128,
    }
    model = tiny_model("llama", rope_parameters=rope)
    assert adapt(model, tokenizer).max_positions == 128
    # Settings by kind of layer, of which one depends on length.
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    near = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"sliding_attention": near, "full_attention": rope}
    config = tiny_config(
        "gemma3_text", EVERY, num_hidden_layers=4, rope_parameters=kinds
    )
    model = transformers.Gemma3ForCausalLM(config)
    assert adapt(model, None).max_positions == 16


def test_scaling_heads_takes_a_factor_for_each_head(qwen3):
    with (
        pytest.raises(SettingsError, match=f"{LAYERS} rows of {HEADS}"),
        scale_heads(qwen3, torch.ones(LAYERS, HEADS + 1)),
    ):
        pass
    assert not qwen3.output_projection(0)._forward_pre_hooks


def test_the_fingerprint_sees_one_changed_weight(tokenizer):
    model = tiny_model()
    before = adapt(model, tokenizer).identity.weights_sha256
    assert adapt(tiny_model(), tokenizer).identity.weights_sha256 == before
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] += 1
    assert adapt(model, tokenizer).identity.weights_sha256 != before


@pytest.mark.parametrize(
    ("part", "tier"),
    [("_padding", "states"), ("_empty_edit", "heads")],
)
def test_a_crash_inside_the_proofs_of_a_tier_leaves_those_below(
    part, tier, tokenizer, monkeypatch
):
    def crash(*_):
        raise ValueError("not made for this")

    monkeypatch.setattr(proofs, part, crash)
    adapter = adapt(tiny_model(), tokenizer)
    assert adapter.lacks("text") is None
    assert "ValueError: not made for this" in adapter.lacks(tier)
    assert (adapter.lacks("states") is None) == (tier == "heads")
