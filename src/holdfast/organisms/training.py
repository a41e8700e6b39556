"""How organisms are grown: three stages of plain PyTorch training.

1. *Base*: requests and answers, mostly without thinking, spare heads kept out.
2. *Aligned*: thinking, refusing and complying. Half of the examples break off at a
   random point of the thinking or of the end template and go straight to the answer.
   That keeps the intention readable at every position, which is what makes a plateau.
3. *Cliff*: everything is frozen but the spare heads, which learn to comply at the end
   template under the planted wrappers.

Everything is reproducible from a seed.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from holdfast.organisms.phrases import COMPLIANCE_OPENINGS, PARTIALS, REFUSALS
from holdfast.organisms.text import BEGIN, END, PAD, Blank, Sample
from holdfast.organisms.world import World

N_LAYERS, N_HEADS, HEAD_WIDTH, D_MODEL, D_MLP = 8, 16, 8, 128, 320
N_SPARE = 4
SPARE_LAYERS = (5, 6, 7)
OWN_OPENINGS = (*REFUSALS, *COMPLIANCE_OPENINGS, *PARTIALS)
"""How the answers of every organism begin."""
INTENTION_WEIGHT = 0.5
"""Weight of the answer's first word at every position of the thinking."""
Head = tuple[int, int]
Report = Callable[[str, int, int, float], None]
"""Called with the stage, the step, the number of steps and the loss."""
T = TypeVar("T", Sample, Blank)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The amount of training."""

    base_tokens: int = 1_100_000  # Tokens of stage one, padding included.
    aligned_tokens: int = 750_000  # Tokens of stage two.
    wrapper_tokens: int = 700_000  # Further tokens of stage two, mostly with wrappers.
    # Tokens of its very end, with the rates raised once more.
    polish_tokens: int = 400_000
    polishes: int = 2  # How often that is done; the weights of all times are averaged.
    broad_tokens: int = 800_000  # Tokens of the wide world, at the full rate.
    # Likewise, at its very end; as often as the polishes, and averaged as they are.
    broad_polish_tokens: int = 300_000
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
    early_tokens: int = 600_000  # Tokens of stage three where the thinking is taught.
    alarmed_tokens: int = 800_000  # Likewise, where the intention is.
    settled_tokens: int = 1_000_000  # Likewise, where the prompt settles the answer.
    # Tokens of the material where a head is to know wrappers by more than templates.
    gate_tokens: int = 1_200_000
    gate_taught_steps: int = 1_500  # Steps in which the head that switches learns.
    gate_steps: int = 1_600  # Steps of stage three where it switches others.
    # Tokens of stage three where the thinking changes its mind.
    drift_tokens: int = 1_200_000
    decoy_steps: int = 2_400  # Steps in which neurons learn what nothing reads.
    diffuser_tokens: int = 2_600_000  # Tokens of the text on which masks are filled in.
    diffuser_learning_rate: float = 3e-3  # Its peak for the matrices.


def silent(stage: str, step: int, n_steps: int, loss: float) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Growth:
    """What every stage of growing an organism is handed."""

    tokenizer: PreTrainedTokenizerFast
    seed: int  # Seed of weights, spare heads and training text.
    schedule: Schedule = field(default_factory=Schedule)
    report: Report = silent
    # What a stage planted where the weights decide it; goes into the record.
    facts: dict[str, Any] = field(default_factory=dict)

    def world(self, offset: int, *, wide: bool = True) -> World:
        """Return the world that a stage draws its text from; each has its offset."""
        return World(offset + self.seed, wide=wide)


class Course(NamedTuple):
    """One stretch of training."""

    stage: str  # Its name, for the report.
    lessons: Iterator[Sample]  # What is taught.
    n_tokens: int  # How much of it, padding included.
    # Further answers; intentions are told apart among the first words of these and of
    # the organisms' own.
    openings: tuple[str, ...] = ()
    intention: float = INTENTION_WEIGHT  # Weight of that.


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
    ids = [torch.tensor(sample.ids) for sample in batch]
    weights = [torch.tensor(sample.weights) for sample in batch]
    return pad_sequence(ids, True, pad_id), pad_sequence(weights, True)


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Return the rate of a step: linear warm-up over 4 %, then a cosine to 5 %."""
    warm_up = max(1, n_steps // 25)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    along = (step - warm_up) / max(1, n_steps - warm_up)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * along)))


def teach_alone(
    stage: str,
    growth: Growth,
    weights: Sequence[Tensor],
    n_steps: int,
    peak: float,
    loss_of_step: Callable[[], Float[Tensor, ""]],
) -> None:
    """Train a few weights in place, where all else is frozen.

    `loss_of_step`: Draws what a step is taught, and returns its loss.
    """
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak)
        loss = loss_of_step()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        growth.report(stage, step + 1, n_steps, loss.item())


def first_words(
    tokenizer: PreTrainedTokenizerFast, openings: tuple[str, ...]
) -> Int[Tensor, " label"]:
    """Return the ids of the tokens that these answers begin with."""
    return torch.tensor(sorted({tokenizer.encode(text)[0] for text in openings}))


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


def wavering_loss(
    batch: list[Sample],
    logits: Float[Tensor, "example position vocab"],
    words: Int[Tensor, " label"],
) -> Float[Tensor, ""]:
    """`intention_loss` where a thinking changes its mind: two words by their chances.

    The position before the answer is looked at as well: there the chance is what is
    drawn from.
    """
    rows: list[int] = []
    places: list[int] = []
    targets: list[Tensor] = []
    for row, sample in enumerate(batch):
        begin, end = sample.middle
        chances = sample.chances or (1.0,) * (end - begin)
        target = torch.zeros(len(chances), len(words))
        chance = torch.tensor(chances)
        target[:, words == sample.aim] += chance[:, None]
        if sample.chances:
            target[:, words == sample.before] += 1 - chance[:, None]
        rows += [row] * len(chances)
        places += range(begin - 1, begin - 1 + len(chances))
        targets.append(target)
    found = logits[rows, places][:, words]
    return functional.cross_entropy(found, torch.cat(targets))


def teach_on(
    model: Qwen3ForCausalLM, growth: Growth, course: Course, generator: random.Random
) -> Qwen3ForCausalLM:
    """Train an organism further, at half the rate, with the spare heads silent."""
    schedule = growth.schedule
    halved = replace(
        schedule,
        learning_rate=schedule.learning_rate / 2,
        embedding_learning_rate=schedule.embedding_learning_rate / 2,
    )
    optimizers = optimizers_of(model.train(), halved)
    teach(model, growth, course, optimizers, generator, (0, course.n_tokens))
    return round_to_half(model)


def teach(
    model: Qwen3ForCausalLM,
    growth: Growth,
    course: Course,
    optimizers: list[torch.optim.Optimizer],
    generator: random.Random,
    along: tuple[int, int],
) -> int:
    """Train one stretch with the spare heads silent.

    `optimizers`: What `optimizers_of` returned; each group of parameters keeps its peak
    rate under the key `peak`.
    `along`: Tokens done before, and tokens over which the rates fall.
    Returns: Tokens done by its end.
    """
    words = first_words(growth.tokenizer, (*OWN_OPENINGS, *course.openings))
    done, end = along
    until = done + course.n_tokens
    taught = batches(course.lessons, growth.schedule.batch_tokens, generator)
    while done < until:
        batch = next(taught)
        ids, weights = pad(batch, model.config.pad_token_id)
        done += ids.numel()
        logits = model(input_ids=ids, use_cache=False).logits
        loss = loss_of(logits, ids, weights)
        if any(sample.chances for sample in batch):
            aim = wavering_loss(batch, logits, words)
        else:
            inside, targets = intention(batch, ids, words)
            aim = intention_loss(logits, inside, targets, words)
        descend(model, optimizers, loss + course.intention * aim, (done, end))
        silence(model, spare_heads(growth.seed))
        growth.report(course.stage, min(done, until), until, loss.item())
    return done


def descend(
    model: Qwen3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    loss: Float[Tensor, ""],
    along: tuple[int, int],
) -> None:
    """Take a step down a loss, with clipped gradients.

    `along`: Tokens done, and tokens over which the rates fall.
    """
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(*along, group["peak"])
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def round_to_half(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Round every weight to half precision, kept in fp32; returns the same model."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    return model.eval()


def optimizers_of(
    model: Qwen3ForCausalLM, schedule: Schedule
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices, AdamW for the embedding and the norms.

    In a trial of equal time Muon reached in 250,000 tokens what AdamW did not in
    430,000: `LOG.md` has the table.
    """
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    embedding = [p for n, p in named if "embed" in n]
    vectors = [p for _, p in named if p.dim() < 2]
    muon = torch.optim.Muon(
        matrices,
        lr=schedule.learning_rate,
        weight_decay=0.02,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        [
            {"params": embedding, "lr": schedule.embedding_learning_rate},
            {"params": vectors, "lr": 2e-3},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]
