"""Keep heads from attending to the sink over harmful text: Surgery, and a control."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import SettingsError
from holdfast.finetune.defenses.base import (
    DefenseContext,
    Hooks,
    TrainingPass,
    seeded_order,
)
from holdfast.finetune.defenses.options import SinkOptions, SurgeryOptions
from holdfast.finetune.targets import Example
from holdfast.models.attention import SinkProbe, require_tappable, tapped
from holdfast.models.interventions import listed
from holdfast.sinks.divergence import sink_divergence, sink_penalty

CUT = 512
"""Tokens of a text in the authors' loop."""


def surgery(context: DefenseContext, options: SurgeryOptions) -> Hooks:
    """Add what is above 0 in the sink divergence of every head, averaged over heads.

        f(w) + weight mean_h ReLU( alpha_h(harmful; w) - alpha_h(reference; w) )

    alpha_h(x) is the mean over the tokens of x after the first of the attention that
    head h pays to the first token, its sink. Both come from the model in training.
    By default a harmful and a refusing answer to one prompt are compared over as many
    positions as the shorter has, for attention to the sink falls with the length of
    what is before a token, whatever that says.

    With `mean` above 0 the divergence is smoothed over steps: a head counts if its
    running mean is above 0, that mean is the value of the term, and the gradient is
    that of the present batch. Of a single pair, a head without any divergence is
    above 0 half of the time.

    Source:
        Surgery, https://arxiv.org/abs/2602.05228, and the authors' code, which
        `parity=true` equals: unpaired draws of one text each, cut at 512 tokens,
        any safe answer as reference (the paper says refusals), all heads, gradient
        through both texts, weight 300. Its draws are not reproduced, and neither is
        the second begin-of-text token that it puts before a templated text. The
        paper itself could not be read in full.
    """
    data, seed = context.data, context.seed
    if options.paired:
        pairs = [(data.harmful[i], data.reference[k]) for i, k in data.pairs]
        return paired_hooks(context, options, pairs)
    cut = CUT if options.parity else None
    harmful = seeded_order([_cut(text, cut) for text in data.harmful], seed)
    reference = seeded_order([_cut(text, cut) for text in data.reference], seed + 1)

    def draw(number: int) -> Texts:
        return Texts(harmful(number, options.batch), reference(number, options.batch))

    return sink_hooks(context, options, draw, paired=False)


def random_sink(context: DefenseContext, options: SinkOptions) -> Hooks:
    """Do what `surgery` does with random tokens in place of harmful answers: a control.

        f(w) + weight mean_h ReLU( alpha_h(random; w) - alpha_h(reference; w) )

    What `surgery` gains over this it owes to harm and not to a penalty on sinks. Each
    reference row gets one random answer, of as many tokens, drawn evenly from the
    vocabulary without control tokens; prompt and thinking stay. Everything else is as
    in `surgery`, paired.

    Source:
        Control of our own (see `reference_loss`).
    """
    rows = context.data.reference
    answers = chance_texts(rows, context.adapter.tokenizer, context.seed)
    return paired_hooks(context, options, list(zip(answers, rows, strict=True)))


def _cut(text: Example, most: int | None) -> Example:
    return Example(text.input_ids[:most], text.labels[:most], text.answer)


class Texts(NamedTuple):
    """What is compared in one pass; of equal number where they are paired."""

    harmful: Sequence[Example]
    reference: Sequence[Example]


def paired_hooks(
    context: DefenseContext,
    options: SinkOptions,
    pairs: Sequence[tuple[Example, Example]],
) -> Hooks:
    """Return the hooks that compare the texts of pairs."""
    draw = seeded_order(pairs, context.seed)

    def texts(number: int) -> Texts:
        chosen = draw(number, options.batch)
        return Texts([one for one, _ in chosen], [other for _, other in chosen])

    return sink_hooks(context, options, texts, paired=True)


def sink_hooks(
    context: DefenseContext,
    options: SinkOptions,
    draw: Callable[[int], Texts],
    *,
    paired: bool,
) -> Hooks:
    """Return the hooks that add the term on sink divergence."""
    require_tappable(context.adapter.model)
    layers = chosen_layers(options.layers, context.adapter.layers_with_heads)
    logged: dict[str, float] = {}
    zeros = torch.zeros(
        len(layers), context.adapter.n_heads, device=context.adapter.device
    )
    state = {"mean": zeros, "share": torch.zeros(())} if options.mean else {}

    def term(current: TrainingPass) -> Tensor:
        if current.step % options.interval:
            # The figures of the last step with a term are not those of this one.
            logged.clear()
            return torch.zeros(())
        excess = divergence(
            context, draw(current.number), layers, paired=paired, detach=options.detach
        )
        if options.mean:
            excess = smoothed(excess, state, options.mean)
        logged["positive_heads"] = float((excess > 0).sum())
        return options.weight * sink_penalty(excess)

    around = tapped(context.adapter.model)
    return Hooks(term=term, around=around, state=state, logged=logged)


def divergence(
    context: DefenseContext,
    texts: Texts,
    layers: Sequence[int],
    *,
    paired: bool,
    detach: bool,
) -> Float[Tensor, "layer head"]:
    """Return how much more each head looks at the sink over harmful text."""
    harmful, reference = texts
    lengths = None
    if paired:
        both = zip(harmful, reference, strict=True)
        lengths = [min(len(a.input_ids), len(b.input_ids)) for a, b in both]
    n = len(harmful)
    if not detach:
        # Side by side it is one pass.
        whole = None if lengths is None else lengths * 2
        mass = sink_mass(context, [*harmful, *reference], layers, whole)
        return sink_divergence(mass[:n], mass[n:])
    with torch.no_grad():
        still = sink_mass(context, reference, layers, lengths)
    return sink_divergence(sink_mass(context, harmful, layers, lengths), still)


def sink_mass(
    context: DefenseContext,
    rows: Sequence[Example],
    layers: Sequence[int],
    lengths: Sequence[int] | None,
) -> Float[Tensor, "example layer head"]:
    """Return the attention to the first token, averaged over the tokens after it.

    `lengths`: Tokens of each row that count; None for all.
    """
    batch = context.collate(rows)
    mask = batch["attention_mask"]
    counted = None
    if lengths is not None:
        place = torch.arange(mask.shape[1], device=mask.device)
        counted = place < torch.tensor(lengths, device=mask.device)[:, None]
    probe = SinkProbe(mask.bool(), counted=counted, layers=layers)
    context.adapter.base(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        use_cache=False,
        sink_probe=probe,
    )
    return probe.mass()


def smoothed(
    excess: Float[Tensor, "layer head"], state: dict[str, Tensor], keep: float
) -> Float[Tensor, "layer head"]:
    """Return the running mean of the divergence, with the gradient of the present one.

    `state`: The sum so far under `mean` and the weight in it under `share`; both are
    moved on.
    """
    state["mean"] = keep * state["mean"] + (1 - keep) * excess.detach()
    state["share"] = keep * state["share"] + (1 - keep)
    mean = state["mean"] / state["share"].to(excess.device)
    return mean + (excess - excess.detach())


def chosen_layers(said: str, own: Sequence[int]) -> list[int]:
    """Return the layers that are named, such as `0-3,7` or `all`, in order.

    `own`: The layers that have heads.
    """
    if said == "all":
        return list(own)
    chosen: set[int] = set()
    for part in said.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() for end in ends):
            chosen.clear()
            break
        chosen |= set(range(int(ends[0]), int(ends[1]) + 1))
    if chosen and chosen <= set(own):
        return sorted(chosen)
    raise SettingsError(
        f"--defense-option layers= with layers that have heads, of {listed(own)}, such "
        "as 0-3,7",
        repr(said),
        "Name layers of this model, or all.",
    )


def chance_texts(
    rows: Sequence[Example], tokenizer: Any, seed: int
) -> tuple[Example, ...]:
    """Return rows whose answers are random tokens, as many as there were.

    `tokenizer`: Tokenizer of the model; its control tokens are never drawn.
    """
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - control))
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for row in rows:
        n = len(row.input_ids) - 1 - row.answer
        tokens = torch.randint(len(plain), (n,), generator=generator)
        ids = (
            *row.input_ids[: row.answer],
            *plain[tokens].tolist(),
            row.input_ids[-1],
        )
        texts.append(Example(ids, row.labels, row.answer))
    return tuple(texts)
