"""Which positions a masked-diffusion step commits to, and which token each gets.

Pure functions of logits, settings and numbers drawn beforehand, row by row.

Source:
    The sampler of LLaDA, https://arxiv.org/abs/2502.09992, and `generate.py` of
    https://github.com/ML-GSAI/LLaDA; ranking by entropy and by margin after Dream,
    https://arxiv.org/abs/2508.15487; the threshold after Fast-dLLM,
    https://arxiv.org/abs/2505.22618. Differences are listed in `docs/diffusion.md`.
"""

from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.errors import SettingsError
from holdfast.ranges import require_all, require_finite

Remasking = Literal["low_confidence", "random", "entropy", "margin"]
RANKINGS: tuple[Remasking, ...] = ("low_confidence", "random", "entropy", "margin")


@dataclass(frozen=True, kw_only=True)
class UnmaskingSchedule:
    """How a masked-diffusion model decodes."""

    gen_length: int = 128  # Tokens of the response.
    # Tokens of a block; blocks are finished from left to right. None for one block. 1
    # commits to one token after the other, left to right, while every state still
    # attends to the masks that follow.
    block_length: int | None = None
    # Forward passes for the whole response; None with a threshold.
    steps: int | None = 32
    # What decides where to commit: the probability of the predicted token, chance, the
    # least entropy, or the lead over the second token.
    remasking: Remasking = "low_confidence"
    # 0 takes the likeliest token at every position, otherwise Gumbel noise of this size
    # is added to the logits.
    temperature: int | float = 0.0
    # How far to go from the logits without the prompt past those with it; 0 leaves the
    # prompt's own.
    cfg_scale: int | float = 0.0
    # Commit to every token whose probability is above this, and to the likeliest in any
    # case; steps then are as many as that takes.
    threshold: int | float | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that the settings fit together."""
        require_finite("temperature", (self.temperature,))
        require_finite("cfg_scale", (self.cfg_scale,))
        adaptive = self.threshold is not None
        one = self.block_length is None or self.block_length >= 1
        rules = (
            ("a response of 1 or more tokens", self.gen_length, self.gen_length >= 1),
            ("a block of 1 or more tokens", self.block_length, one),
            ("a temperature of 0 or more", self.temperature, self.temperature >= 0),
            ("a guidance scale of 0 or more", self.cfg_scale, self.cfg_scale >= 0),
            ("a known remasking", self.remasking, self.remasking in RANKINGS),
            ("a threshold from 0 to 1", self.threshold, 0 <= (self.threshold or 0) < 1),
            (
                "no number of steps where a threshold decides",
                self.steps,
                not (adaptive and self.steps is not None),
            ),
            (
                "low_confidence remasking where a threshold decides",
                self.remasking,
                not adaptive or self.remasking == "low_confidence",
            ),
            (
                "1 or more steps, or a threshold",
                self.steps,
                adaptive or (self.steps or 0) >= 1,
            ),
        )
        require_all(rules)
        self.plan(self.gen_length)

    def plan(self, gen_length: int) -> "StepPlan":
        """Return how many tokens each step commits to, and up to where.

        Raises:
            SettingsError: If blocks do not divide the response, or steps not the
                blocks, or a step would commit to nothing.
        """
        block = self.block_length or gen_length
        if gen_length < 1 or gen_length % block:
            raise SettingsError(
                f"a response length that is a multiple of the block length, {block}",
                str(gen_length),
                f"Take {max(1, gen_length // block) * block}, or a block length that "
                "divides it.",
            )
        n_blocks = gen_length // block
        if self.steps is None:
            return StepPlan(block, (), ())
        if self.steps % n_blocks or self.steps > gen_length:
            raise SettingsError(
                f"steps that are a multiple of the {n_blocks} blocks, and at most "
                f"{gen_length}, one per token",
                f"{self.steps} steps",
                f"Take {min(gen_length, -(-self.steps // n_blocks) * n_blocks)} steps.",
            )
        per_block = self.steps // n_blocks
        least, more = divmod(block, per_block)
        quotas = chain(repeat(least + 1, more), repeat(least, per_block - more))
        ends = (block * (step // per_block + 1) for step in range(self.steps))
        return StepPlan(block, tuple(quotas) * n_blocks, tuple(ends))


class StepPlan(NamedTuple):
    """What each step of one row does."""

    block: int  # Tokens of a block.
    # Tokens that each step commits to; empty where a threshold decides.
    quotas: tuple[int, ...]
    # End of the block that each step works on, in positions; likewise.
    ends: tuple[int, ...]


class Predicted(NamedTuple):
    """One token for each open position, and how sure it is."""

    tokens: Int[Tensor, "position"]  # The token.
    # Its probability, without noise or temperature.
    confidence: Float[Tensor, "position"]
    # What decides where to commit first; the larger, the sooner.
    priority: Float[Tensor, "position"]
    # Lead of the token over the second, in logits with their noise.
    gaps: Float[Tensor, "position"]


def predict(
    logits: Float[Tensor, "position vocab"],
    sampler: UnmaskingSchedule,
    generator: torch.Generator | None = None,
) -> Predicted:
    """Predict a token at each position.

    `logits`: Logits in float64, of positions of one row if there is noise.
    `generator`: Where the row's noise comes from; None at temperature 0.

    Returns:
        Tokens, probabilities, priorities (0 under random remasking, where they are
        drawn beforehand) and gaps.
    """
    noisy = logits
    if sampler.temperature > 0:
        drawn = torch.rand(
            logits.shape, generator=generator, dtype=logits.dtype, device=logits.device
        )
        exponential = -drawn.clamp(min=torch.finfo(logits.dtype).tiny).log()
        noisy = logits - sampler.temperature * exponential.log()
    best = noisy.topk(2, dim=-1)
    tokens = best.indices[:, 0]
    shares = logits.softmax(-1)
    confidence = shares.gather(-1, tokens[:, None])[:, 0]
    priority = torch.zeros_like(confidence)
    if sampler.remasking == "low_confidence":
        priority = confidence
    elif sampler.remasking == "entropy":
        priority = torch.special.entr(shares).sum(-1).neg()
    elif sampler.remasking == "margin":
        largest = shares.topk(2, dim=-1).values
        priority = largest[:, 0] - largest[:, 1]
    gaps = best.values[:, 0] - best.values[:, 1]
    return Predicted(tokens, confidence, priority, gaps)


class Committed(NamedTuple):
    """Where a step commits, and how close that was."""

    fresh: Bool[Tensor, "example position"]
    margins: Float[Tensor, "example"]


def commit_best(
    priority: Float[Tensor, "example position"],
    allowed: Bool[Tensor, "example position"],
    quota: Int[Tensor, "example"],
) -> Committed:
    """Commit to the positions of highest priority; the first of equal ones.

    `quota`: How many in each row; never more than are allowed.
    """
    ranked = priority.masked_fill(~allowed, -torch.inf)
    ordered, order = ranked.sort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    fresh = (ranks < quota[:, None]) & allowed
    end = torch.nn.functional.pad(ordered, (1, 1), value=-torch.inf)
    last, following = end.gather(-1, torch.stack([quota, quota + 1], -1)).unbind(-1)
    margins = torch.where(following == -torch.inf, torch.inf, last - following)
    return Committed(fresh, margins)


def commit_above(
    confidence: Float[Tensor, "example position"],
    allowed: Bool[Tensor, "example position"],
    threshold: float,
) -> Committed:
    """Commit to all positions above a threshold, and to the surest in any case."""
    found = confidence.masked_fill(~allowed, -torch.inf)
    surest = torch.zeros_like(allowed).scatter_(
        -1, found.argmax(-1, keepdim=True), value=True
    )
    above = found > threshold
    off = (found - threshold).abs().masked_fill(~allowed, torch.inf).amin(-1)
    two = torch.nn.functional.pad(found, (0, 1), value=-torch.inf).topk(2).values
    # Where none is above, the lead of the surest decides as well.
    lead = two[:, 0] - two[:, 1]
    margins = torch.where(above.any(-1), off, torch.minimum(off, lead))
    margins = margins.masked_fill(~allowed.any(-1), torch.inf)
    return Committed((above | surest) & allowed, margins)
