"""Short greedy replies of a model that is only asked, against a plain forward pass."""

import pytest
import torch
import transformers

from holdfast.errors import InputError, UnsupportedFamilyError
from holdfast.models.scoring import Scorer, load_scorer, replies
from tiny_models import VOCAB, edit_json, tiny_model, tiny_tokenizer

PROMPTS = [[72, 101, 108, 108, 111], [65], [80, 81, 82, 83, 84, 85, 86, 87]]
WATCH = [3, 99, 250]


@pytest.fixture(scope="module")
def scorer(saved):
    return load_scorer(saved)


def by_hand(scorer, prompt, steps):
    """Greedy decoding without cache, padding or batch."""
    ids, logs = list(prompt), []
    with torch.inference_mode():
        for _ in range(steps):
            logits = scorer.model(input_ids=torch.tensor([ids])).logits[0, -1]
            logs.append(logits.float().log_softmax(-1)[WATCH])
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :], torch.stack(logs)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_replies_are_those_of_one_prompt_alone(scorer, batch_size):
    found = replies(scorer, PROMPTS, WATCH, max_tokens=5, batch_size=batch_size)
    for prompt, reply in zip(PROMPTS, found, strict=True):
        tokens, logs = by_hand(scorer, prompt, 5)
        kept = len(reply.token_ids)
        assert reply.token_ids == tuple(tokens[:kept])
        assert torch.allclose(reply.watched[:kept], logs[:kept], atol=1e-4)
        assert reply.text == scorer.tokenizer.decode(list(reply.token_ids))


def test_the_step_of_a_character_is_that_of_its_token(scorer):
    [reply] = replies(scorer, [PROMPTS[0]], WATCH, max_tokens=6)
    for step, at in enumerate(reply.starts):
        assert reply.step_at(at) <= step or reply.starts[step - 1] == at
    assert reply.step_at(0) >= 0


def test_a_token_that_ends_the_reply_is_no_part_of_it(saved):
    scorer = load_scorer(saved)
    first, _ = by_hand(scorer, PROMPTS[0], 1)
    scorer.model.generation_config.eos_token_id = first
    [reply] = replies(scorer, [PROMPTS[0]], WATCH, max_tokens=4)
    assert reply.token_ids == ()
    assert reply.text == ""


def test_prompts_that_do_not_fit_are_named(scorer):
    with pytest.raises(InputError, match="prompt 1"):
        replies(scorer, [[1], []], WATCH, max_tokens=1)
    with pytest.raises(InputError, match="600 tokens in prompt 0"):
        replies(scorer, [[1] * 600], WATCH, max_tokens=1)
    assert replies(scorer, [], WATCH, max_tokens=1) == []


def test_a_family_that_cannot_be_measured_can_still_judge(tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path)
    assert isinstance(scorer, Scorer)
    assert scorer.identity.model_type == "gemma2"
    assert len(replies(scorer, PROMPTS, WATCH, max_tokens=2)) == 3


def test_a_model_with_eyes_is_asked_by_text_alone(tmp_path):
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 1,
        "moe_layers": [],
        "max_position_embeddings": 512,
        "attention_chunk_size": 128,
        "pad_token_id": 0,
    }
    eyes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    config = transformers.Llama4Config(text_config=text, vision_config=eyes)
    model = transformers.Llama4ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path)
    assert scorer.max_positions == 512
    together = replies(scorer, PROMPTS, WATCH, max_tokens=3)
    for prompt, reply in zip(PROMPTS, together, strict=True):
        [alone] = replies(scorer, [prompt], WATCH, max_tokens=3)
        assert reply.token_ids == alone.token_ids
        assert torch.allclose(reply.watched, alone.watched, atol=1e-4)


def test_a_chat_template_is_not_needed(saved, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    plain = tiny_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    assert load_scorer(tmp_path).identity.template_sha256 == ""


def test_code_that_travels_with_a_checkpoint_is_refused(copy):
    edit_json(
        copy / "config.json", model_type="mine", auto_map={"AutoModel": "mine.Mine"}
    )
    with pytest.raises(UnsupportedFamilyError, match="`mine`"):
        load_scorer(copy)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match="neither"):
        load_scorer("no such model")
    with pytest.raises(InputError, match=r"config\.json"):
        load_scorer(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="PEFT adapter"):
        load_scorer(tmp_path)
