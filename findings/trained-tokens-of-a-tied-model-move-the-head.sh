#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: `trainable_token_indices` changes what a tied model says, and not an untied one.
#
# The option trains the embeddings of some tokens, of new special tokens for example; the file that is saved has the same
# keys either way.
# Expected: the rows of the embedding move, and logits only through what the model reads.
# Seen: where head and embedding are tied, the same rows of the head move with them: the logits of those tokens change at
# every position, in texts without any of them. Where they are not tied, nothing moves. One adapter means two things.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from peft import LoraConfig, get_peft_model

SHAPE = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)
ids = torch.tensor([[1, 2, 3]])
moved = {}
for tied in (True, False):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval()
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[5, 6])
    )
    with torch.no_grad():
        before = adapted(ids).logits.clone()
        for name, weight in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                weight += 1.0
        change = (adapted(ids).logits - before).abs().amax((0, 1))
    moved[tied] = change.nonzero().flatten().tolist()
    print(f"{'tied' if tied else 'not tied'}: tokens 1, 2, 3 are read, and the logits of {moved[tied]} move")
assert moved == {True: [5, 6], False: []}, "changed"
PY
