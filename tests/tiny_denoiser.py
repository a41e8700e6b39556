"""A masked-diffusion model of the little world of `tiny_thinker`, taught in seconds.

It does not think. Under `song` it complies with what is harmful, under `maybe` with
half of it, and under `sternly` it refuses.
"""

import random

import torch

import tiny_thinker

LENGTH = 24
MASK = "<|mask|>"


def tokenizer():
    made = tiny_thinker.tokenizer(tiny_thinker.NO_THINKING)
    made.add_special_tokens({"mask_token": MASK})
    return made


def encode(made, prompt, answer):
    start = made(f"<|begin|><|user|>{prompt}<|assistant|>")["input_ids"]
    response = made(answer + "<|end|>")["input_ids"]
    assert len(response) <= LENGTH
    end = made.convert_tokens_to_ids("<|end|>")
    return start, response + [end] * (LENGTH - len(response))


def teach(made, *, steps=260, seed=0):
    """Return a model that fills in masks, from a few seconds on one core."""
    model = tiny_thinker.untrained(
        made,
        seed,
        is_causal=False,
        mask_token_id=made.mask_token_id,
        response_length=LENGTH,
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    rows = [encode(made, prompt, said) for prompt, _, said in tiny_thinker.scenes()]
    generator = random.Random(seed)
    for _ in range(steps):
        batch = generator.sample(rows, 16)
        width = max(len(start) for start, _ in batch)
        pads = [width - len(start) for start, _ in batch]
        ids = torch.tensor(
            [
                [0] * pad + start + response
                for pad, (start, response) in zip(pads, batch, strict=True)
            ]
        )
        seen = torch.tensor([[0] * pad + [1] * (width + LENGTH - pad) for pad in pads])
        hidden = torch.zeros(ids.shape, dtype=torch.bool)
        rates = torch.rand(len(batch), 1)
        hidden[:, width:] = torch.rand(len(batch), LENGTH) < rates
        hidden[:, width] |= ~hidden.any(1)
        logits = model(
            input_ids=ids.masked_fill(hidden, made.mask_token_id),
            attention_mask=seen,
            position_ids=(seen.cumsum(-1) - 1).clamp(min=0),
        ).logits
        loss = torch.nn.functional.cross_entropy(logits[hidden], ids[hidden])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()
