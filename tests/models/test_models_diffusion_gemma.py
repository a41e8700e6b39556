import json

import pytest
import torch
import transformers

from holdfast.errors import InputError, SettingsError, UnsupportedFamilyError
from holdfast.models.decoding.steps import NOTHING, Pooled
from holdfast.models.diffusion import gemma as diffusion_gemma
from holdfast.models.diffusion.gemma import (
    CanvasSampling,
    denoise_canvases,
    load_diffusion_gemma,
)
from tiny_models import PLAIN_TEMPLATE, random_sequences, tiny_tokenizer

CANVAS = 8
PROMPTS = [(ids, 7 + i) for i, ids in enumerate(random_sequences([5, 11]))]
SAMPLING = CanvasSampling(gen_length=16, steps=5, entropy_bound=4.0)
TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "sliding_window": 16,
    "pad_token_id": 0,
    "eos_token_id": 299,
    "bos_token_id": 1,
    "initializer_range": 0.3,
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    config = transformers.DiffusionGemmaConfig(
        text_config=TEXT,
        vision_config=VISION,
        canvas_length=CANVAS,
        boi_token_id=290,
        eoi_token_id=291,
        image_token_id=292,
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config)
    model.save_pretrained(directory)
    tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gemma(directory):
    return load_diffusion_gemma(directory)


def slow_loop(model, prompt, seed, steps, bound):
    """One canvas after the other, encoder anew each time, no hook and no cache."""
    torch.manual_seed(seed)
    text, seen = torch.tensor([prompt]), []
    vocab = TEXT["vocab_size"]
    for _ in range(16 // CANVAS):
        canvas = torch.randint(0, vocab, (1, CANVAS))
        signal = None
        for step in range(steps, 0, -1):
            found = model.model(
                input_ids=text,
                decoder_input_ids=canvas,
                self_conditioning_logits=signal,
            )
            states = found.last_hidden_state
            logits = (model.lm_head(states).float() / 30.0).tanh() * 30.0
            sure = logits.softmax(-1).amax(-1)
            warm = logits / (0.4 + 0.4 * step / steps)
            drawn = torch.multinomial(warm.softmax(-1)[0], 1).T
            draft = warm.argmax(-1)
            entropy = torch.distributions.Categorical(logits=warm).entropy()[0]
            accepted, spent = torch.zeros(CANVAS, dtype=torch.bool), 0.0
            for position in entropy.argsort().tolist():
                accepted[position] = spent <= bound
                spent += float(entropy[position])
            kept = torch.where(accepted, drawn, canvas)
            canvas = torch.where(accepted, kept, torch.randint(0, vocab, (1, CANVAS)))
            signal = warm
            seen.append((states[0], draft[0], sure[0], accepted))
        text = torch.cat([text, draft], -1)
    return text[0, len(prompt) :].tolist(), seen


def test_what_is_seen_is_the_slow_loop(gemma):
    sampling = CanvasSampling(
        gen_length=16, steps=5, entropy_bound=4.0, stops_early=False
    )
    looks = []

    def observe(look):
        looks.append(look.committed[0].clone())
        return look.states

    traces = list(denoise_canvases(gemma, PROMPTS, sampling, observe=observe))
    for row, (drawn, (prompt, seed)) in enumerate(zip(traces, PROMPTS, strict=True)):
        with torch.no_grad():
            text, seen = slow_loop(gemma.model, prompt, seed, 5, 4.0)
        assert drawn.trace.token_ids.tolist() == text
        assert len(seen) == len(drawn.trace.observed) == 10
        masks = torch.stack([accepted for *_, accepted in seen])
        assert 0 < masks.float().mean() < 1
        for step, (states, draft, sure, accepted) in enumerate(seen):
            here = slice(CANVAS * (step // 5), CANVAS * (step // 5 + 1))
            assert (drawn.trace.observed[step] - states).abs().max() < 1e-4
            assert torch.equal(drawn.trace.predictions[step, here], draft)
            assert (drawn.trace.predictions[step, here.stop :] == NOTHING).all()
            assert (drawn.trace.confidences[step, here] - sure).abs().max() < 1e-4
            assert torch.equal(looks[10 * row + step], accepted)
        for position, at in enumerate(drawn.trace.committed_at.tolist()):
            canvas, column = divmod(position, CANVAS)
            run = masks[5 * canvas : 5 * canvas + 5, column].tolist()
            expected = 4
            while expected and run[expected] and run[expected - 1]:
                expected -= 1
            assert at == 5 * canvas + expected


def test_a_row_does_not_depend_on_those_before_it(gemma):
    alone = next(
        denoise_canvases(gemma, PROMPTS[1:], SAMPLING, observe=Pooled("committed"))
    )
    _, second = denoise_canvases(gemma, PROMPTS, SAMPLING, observe=Pooled("committed"))
    assert torch.equal(alone.trace.token_ids, second.trace.token_ids)
    assert torch.equal(alone.trace.observed, second.trace.observed)
    assert alone.answer == second.answer


def test_the_model_is_left_as_it_was(gemma):
    before = torch.random.get_rng_state()
    next(denoise_canvases(gemma, PROMPTS, SAMPLING))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not gemma.final_norm._forward_hooks
    assert not gemma.model.lm_head._forward_hooks
    assert "_prepare_sampler" not in vars(gemma.model)


def test_what_does_not_fit_is_refused(gemma, directory, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="whole canvases of 8"):
        denoise_canvases(gemma, PROMPTS, CanvasSampling(gen_length=12))
    with pytest.raises(InputError, match="1 to 48 tokens"):
        denoise_canvases(gemma, [([1] * 50, 0)], SAMPLING)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada"}))
    with pytest.raises(UnsupportedFamilyError, match="`llada`"):
        load_diffusion_gemma(tmp_path)
    monkeypatch.setattr(diffusion_gemma, "MODEL_CLASS", "NotYetThere")
    with pytest.raises(UnsupportedFamilyError, match=r"Install transformers 5\.23"):
        load_diffusion_gemma(directory)
