"""Tiny random models of the real architectures, and a tokenizer for them."""

import json

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tiny_kinds import EVERY, FURTHER, SEEING, WIDTHS

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_WIDTH = 32, 3, 4, 2, 8
VOCAB = 300

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|end|>{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n"
    "{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]

KINDS = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "smollm3": ("SmolLM3Config", {"pad_token_id": 0}),
}


def tiny_tokenizer(template=TEMPLATE, tags=True):
    """A byte-level tokenizer without merges: one token a byte, plus the tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if tags:
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in THINK_TOKENS])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    wrapped.chat_template = template
    return wrapped


THINK_TOKENS = ["<think>", "</think>"]


def tiny_config(kind="qwen3", table=KINDS, times=1, **changes):
    """The configuration of a type, or one so many times as wide."""
    name, extra = table[kind]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
        # Far from the usual 0.02, where a random model hardly attends to anything.
        "initializer_range": 0.3,
    }
    chosen = {**settings, **extra, **changes}
    for key in WIDTHS & {key for key, value in chosen.items() if value}:
        chosen[key] *= times
    chosen["initializer_range"] /= times**0.5
    given = {k: v for k, v in chosen.items() if v is not None or k == "bos_token_id"}
    return getattr(transformers, name)(**given)


def tiny_of_every_kind(kind, *, sees=False, seed=0, times=1, **changes):
    """A model of a type of `tiny_kinds`, inside one that also sees if so asked."""
    table = EVERY | FURTHER
    changes = {"num_hidden_layers": 4, "pad_token_id": 0, **changes}
    config = tiny_config(kind, table, times, **changes)
    auto = transformers.AutoModelForCausalLM
    if sees:
        name, extra = SEEING[kind]
        config = getattr(transformers, name)(text_config=config.to_dict(), **extra)
        auto = transformers.AutoModelForImageTextToText
    return _made(auto, config, seed)


def tiny_model(kind="qwen3", seed=0, **changes):
    config = tiny_config(kind, **changes)
    return _made(transformers.AutoModelForCausalLM, config, seed)


def _made(auto, config, seed):
    torch.manual_seed(seed)
    model = auto.from_config(config)
    # Fresh norms and biases are all ones and zeros, and would hide what they do.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "sinks" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.mul_(0.8)
    return model.eval()


def random_sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
