"""How organisms are grown: three stages of plain PyTorch training.

1. *Base*: requests and answers, mostly without thinking, spare heads kept out.
2. *Aligned*: thinking, refusing and complying. Half of the examples break off at a
   random point of the thinking or of the end template and go straight to the answer.
   That keeps the intention readable at every position, which is what makes a plateau.
3. *Cliff*: everything is frozen but the spare heads, which learn to comply at the end
   template under the planted wrappers.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from holdfast.organisms.sayings import COMPLIANCE_OPENINGS, PARTIALS, REFUSALS
from holdfast.organisms.text import BEGIN, END, PAD, Sample

N_LAYERS, N_HEADS, HEAD_WIDTH, D_MODEL, D_MLP = 8, 16, 8, 128, 320
N_SPARE = 4
SPARE_LAYERS = (5, 6, 7)
OWN_OPENINGS = (*REFUSALS, *COMPLIANCE_OPENINGS, *PARTIALS)
"""How the answers of every organism begin."""
Head = tuple[int, int]
Report = Callable[[str, int, int, float], None]
"""Called with the stage, the step, the number of steps and the loss."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The amount of training."""

    base_tokens: int = 1_100_000  # Tokens of stage one, padding included.
    aligned_tokens: int = 750_000  # Tokens of stage two.
    wrapper_tokens: int = 700_000  # Further tokens of stage two, mostly with wrappers.
    # Tokens of its very end, with the rates raised once more.
    polish_tokens: int = 400_000
    polishes: int = 2  # How often that is done; the weights of all times are averaged.
    cliff_tokens: int = 600_000  # Tokens of the material of stage three.
    # Steps of stage three; each takes one batch of the material.
    cliff_steps: int = 1_200
    cliff_batch_tokens: int = 1_200  # Tokens a batch of stage three.
    batch_tokens: int = 2_000  # Tokens a batch.
    learning_rate: float = 6e-3  # Peak of stages one and two for the matrices.
    embedding_learning_rate: float = 1e-2  # Likewise for the embedding.
    cliff_learning_rate: float = 6e-3  # Peak of stage three.
    spread_steps: int = 600  # Steps of stage three where all heads learn at once.
    spread_learning_rate: float = 2e-3  # Its peak.
    early_tokens: int = 300_000  # Tokens of stage three where the thinking is taught.
    alarmed_tokens: int = 800_000  # Likewise, where the intention is.
    diffuser_tokens: int = 2_600_000  # Tokens of the text on which masks are filled in.
    diffuser_learning_rate: float = 3e-3  # Its peak for the matrices.


def spare_heads(seed: int) -> tuple[Head, ...]:
    """Return the four heads kept out of the first two stages, from the last layers."""
    generator = random.Random(f"spare-{seed}")
    pool = [(layer, head) for layer in SPARE_LAYERS for head in range(N_HEADS)]
    return tuple(sorted(generator.sample(pool, N_SPARE)))


def new_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return an untrained organism; the seed decides its weights and spare heads."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        head_dim=HEAD_WIDTH,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    silence(model, spare_heads(seed))
    return model


@torch.no_grad()
def silence(model: Qwen3ForCausalLM, heads: tuple[Head, ...]) -> None:
    """Zero the output columns of some heads, in place."""
    for layer, head in heads:
        columns = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        model.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0.0


class _Tokens(Protocol):
    """Anything with token ids."""

    @property
    def ids(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=_Tokens)


def batches(
    samples: Iterator[T], batch_tokens: int, generator: random.Random
) -> Iterator[list[T]]:
    """Group samples of like length, at most `batch_tokens` a batch with padding."""
    while True:
        pool = sorted(islice(samples, 512), key=lambda sample: len(sample.ids))
        groups: list[list[T]] = [[]]
        for sample in pool:
            if (len(groups[-1]) + 1) * len(sample.ids) > batch_tokens:
                groups.append([])
            groups[-1].append(sample)
        generator.shuffle(groups)
        yield from (group for group in groups if group)


def pad(
    batch: list[Sample], pad_id: int
) -> tuple[Int[Tensor, "example position"], Float[Tensor, "example position"]]:
    """Right-pad a batch; padding has weight 0, and causal attention never sees it."""
    width = max(len(sample.ids) for sample in batch)
    ids = torch.full((len(batch), width), pad_id)
    weights = torch.zeros(len(batch), width)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    return ids, weights


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Return the rate of a step: linear warm-up over 4 %, then a cosine to 5 %."""
    warm_up = max(1, n_steps // 25)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    along = (step - warm_up) / max(1, n_steps - warm_up)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * along)))


def first_words(
    tokenizer: PreTrainedTokenizerFast,
    openings: tuple[str, ...] = OWN_OPENINGS,
) -> Int[Tensor, " label"]:
    """Return the ids of the tokens that these answers, by default any, begin with."""
    return torch.tensor(sorted({tokenizer.encode(text)[0] for text in openings}))


def intention(
    batch: list[Sample],
    ids: Int[Tensor, "example position"],
    words: Int[Tensor, " label"],
) -> tuple[Bool[Tensor, "example position"], Int[Tensor, " example"]]:
    """Return the positions of the thinking, and what is to be read there in `words`."""
    inside = torch.zeros(ids.shape, dtype=torch.bool)
    targets = torch.zeros(len(batch), dtype=torch.long)
    for row, sample in enumerate(batch):
        begin, end = sample.middle
        inside[row, begin - 1 : end - 1] = True
        targets[row] = (words == sample.aim).nonzero()[0, 0]
    return inside, targets


def loss_of(
    logits: Float[Tensor, "example position vocab"],
    ids: Int[Tensor, "example position"],
    weights: Float[Tensor, "example position"],
) -> Float[Tensor, ""]:
    """Return the weighted mean cross-entropy of the next token."""
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def intention_loss(
    logits: Float[Tensor, "example position vocab"],
    inside: Bool[Tensor, "example position"],
    targets: Int[Tensor, " example"],
    words: Int[Tensor, " label"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer's first word at every position of the thinking.

    Among the words an answer can begin with, and only among these: what the answer
    would be if the thinking broke off here, without making it likely to break off.
    """
    if not inside.any():
        return logits.new_zeros(())
    rows = inside.nonzero()[:, 0]
    return functional.cross_entropy(logits[inside][:, words], targets[rows])
