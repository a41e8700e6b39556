"""The training loop of the recipes; plain PyTorch, reproducible from a seed."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.organisms.recipes import (
    OWN_OPENINGS,
    Report,
    Schedule,
    batches,
    first_words,
    intention,
    intention_loss,
    learning_rate,
    loss_of,
    pad,
    silence,
    spare_heads,
)
from holdfast.organisms.text import Sample

INTENTION_WEIGHT = 0.5
"""Weight of the answer's first word at every position of the thinking."""


def silent(stage: str, step: int, n_steps: int, loss: float) -> None:
    """Report nothing."""


class Course(NamedTuple):
    """Further training of an organism."""

    stage: str  # Its name, for the report.
    lessons: Iterator[Sample]  # What is taught.
    n_tokens: int  # How much of it, padding included.
    seed: int  # The seed that the organism was grown from.
    # Further answers; intentions are told apart among the first words of these and of
    # the organisms' own.
    openings: tuple[str, ...] = ()


def teach_on(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    course: Course,
    schedule: Schedule,
    generator: random.Random,
    report: Report = silent,
) -> Qwen3ForCausalLM:
    """Train an organism further, at half the rate, with the spare heads silent."""
    halved = replace(
        schedule,
        base_tokens=0,
        aligned_tokens=course.n_tokens,
        learning_rate=schedule.learning_rate / 2,
        embedding_learning_rate=schedule.embedding_learning_rate / 2,
    )
    taught = batches(course.lessons, schedule.batch_tokens, generator)
    plan = Plan(course.stage, 0, course.n_tokens, halved, course.openings)
    optimizers = optimizers_of(model.train(), halved)
    teach(model, tokenizer, optimizers, taught, plan, report, course.seed)
    return round_to_half(model)


class Plan(NamedTuple):
    """One stage of training."""

    stage: str  # Its name, for the report.
    done: int  # Tokens done before it.
    until: int  # Tokens done by its end.
    schedule: Schedule  # Rates, and the amount over which they fall.
    openings: tuple[str, ...] = ()  # As in `Course`.


def teach(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizers: list[torch.optim.Optimizer],
    taught: Iterator[list[Sample]],
    plan: Plan,
    report: Report,
    seed: int,
) -> int:
    """Train one stage with the spare heads silent.

    `optimizers`: What `optimizers_of` returned; each group of parameters keeps its peak
    rate under the key `peak`.
    """
    words = first_words(tokenizer, (*OWN_OPENINGS, *plan.openings))
    done = plan.done
    end = plan.schedule.base_tokens + plan.schedule.aligned_tokens
    while done < plan.until:
        batch = next(taught)
        ids, weights = pad(batch, model.config.pad_token_id)
        done += ids.numel()
        logits = model(input_ids=ids, use_cache=False).logits
        loss = loss_of(logits, ids, weights)
        inside, targets = intention(batch, ids, words)
        aim = intention_loss(logits, inside, targets, words)
        descend(model, optimizers, loss + INTENTION_WEIGHT * aim, (done, end))
        silence(model, spare_heads(seed))
        report(plan.stage, min(done, plan.until), plan.until, loss.item())
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
