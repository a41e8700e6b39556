"""What can be measured of a model without a chat template: states and heads, on tokens.

The texts are pages of this project's own documentation. Each figure of agreement is the
largest over all texts, and compares two ways to one number: Holdfast's hooks, and the
model's own forward on one text alone. Texts are of one length: what padding changes,
`doctor` has proved.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.heads.attribution import attribute
from holdfast.heads.causal_effects import causal_effects
from holdfast.models.batching import pad
from holdfast.models.hidden_states import read_states
from holdfast.models.interventions import Head, HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import load
from holdfast.models.loading.weights import read_tokenizer
from holdfast.models.model import Adapter
from holdfast.models.sink_mass import read_sinks
from holdfast.stats.bootstrap import bootstrap_means
from holdfast.study.figures import figure_of, generator
from holdfast.study.files import file_sha256

PAGES = ("cliff", "concepts", "evaluation", "glossary", "heads", "models", "sinks")
N_TOKENS = 64
N_HEADS = 3
TAIL = 8
"""Tokens at the end of a text that stand for an end template."""
Rows = Sequence[Sequence[int]]


def measure(model: Path, docs: Path) -> dict[str, Any]:
    """Load a model without its template, and measure it on the beginnings of pages."""
    adapter = load(str(model), device="cpu", needs_template=False)
    if adapter.source is None:
        raise AssertionError("A model that was read from files knows them.")
    tokenizer = read_tokenizer(adapter.source)
    pages = [(docs / f"{page}.md").read_text("utf-8") for page in PAGES]
    rows = [tokenizer(page)["input_ids"][:N_TOKENS] for page in pages]
    named = {f"{page}.md": file_sha256(docs / f"{page}.md") for page in PAGES}
    counts = {"texts": len(rows), "tokens": sum(map(len, rows))}
    return {"pages": named, **counts, **all_of(adapter, rows)}


def all_of(adapter: Adapter, rows: Rows) -> dict[str, Any]:
    """Return everything that is measured, figures alone."""
    with torch.no_grad():
        # The logit of the token that the model finds likeliest after each text.
        logits = [adapter.model(torch.tensor([row])).logits[0, -TAIL:] for row in rows]
        likeliest = [int(each[-1].argmax()) for each in logits]
        tails = [each[:, token] for each, token in zip(logits, likeliest, strict=True)]
    directions = adapter.model.get_output_embeddings().weight.detach()[likeliest]
    return {
        "states": states(adapter, rows),
        "contributions": contributions(adapter, rows, directions, tails),
        "ablations": ablations(adapter, rows, directions),
        "sinks": sinks(adapter, rows),
    }


@torch.no_grad()
def states(adapter: Adapter, rows: Rows) -> dict[str, Any]:
    """Compare states at every position, after every block, with the model's own."""
    own = [
        adapter.base(torch.tensor([row]), output_hidden_states=True).hidden_states
        for row in rows
    ]
    worst, n = 0.0, 0
    # The model shows its last block only behind the final norm.
    for site in [*range(adapter.n_layers - 1), "final_norm"]:
        found = read_states(adapter, rows, lambda states, _: states, site=site)
        for read, each in zip(found, own, strict=True):
            expected = each[-1 if site == "final_norm" else site + 1][0]
            worst = max(worst, float((read - expected).abs().max() / expected.std()))
            n += len(read)
    return {"sites": adapter.n_layers, "states": n, "largest_difference": worst}


def contributions(
    adapter: Adapter, rows: Rows, directions: Tensor, logits: Sequence[Tensor]
) -> dict[str, Any]:
    """Compare the sum over heads and other parts with the logit.

    The gap is over all tokens, relative to the sum of the parts' sizes; the difference
    from the model's own logits is over the last tokens of each text.
    """
    gaps, off, shares = [], [], []
    for row, direction, expected in zip(rows, directions, logits, strict=True):
        (found,) = attribute(adapter, [row], [(0, len(row))], direction, tail=TAIL)
        gaps.append(found.gap)
        off.append(float((found.tail.total() - expected).abs().max()))
        shares.append(found.tail.heads[-1].sum() / found.tail.total()[-1])
    return {
        "heads": adapter.total_heads,
        "gap": max(gaps),
        "largest_difference": max(off),
        "largest_logit": max(float(each.abs().max()) for each in logits),
        "heads_of_logit": _mean(torch.stack(shares)[:, None], "share")[0],
    }


def ablations(adapter: Adapter, rows: Rows, directions: Tensor) -> dict[str, Any]:
    """Take random heads away one by one, over a cache and in whole passes."""
    heads = _random_heads(adapter)
    fast, whole = [], []
    for row, direction in zip(rows, directions, strict=True):
        each = [[head] for head in heads]
        found = causal_effects(adapter, [row], [TAIL], each, direction)
        fast.append(torch.cat([effects.change for effects in found.values()]))
        plain = _logit(adapter, row, direction)
        starts = {"final_token": len(row) - 1, "end_template": len(row) - TAIL}
        changes = [
            [_logit(adapter, row, direction, head, starts[moment]) for head in heads]
            for moment in found
        ]
        whole.append(torch.tensor(changes) - plain)
    quick, slow = torch.stack(fast), torch.stack(whole)
    effects = _mean(slow.flatten(1), "effects")
    names = [(when, head) for when in ("final", "tail") for head in heads]
    return {
        "passes": slow.numel(),
        "largest_difference": float((quick - slow).abs().max()),
        "largest_change": float(slow.abs().max()),
        "effects": [
            {"kind": when, "layer": layer, "head": head, "change": effect}
            for (when, (layer, head)), effect in zip(names, effects, strict=True)
        ],
    }


def sinks(adapter: Adapter, rows: Rows) -> dict[str, Any]:
    """Return how much of their attention heads spend on the first token."""
    found = read_sinks(adapter, rows)
    own = found.mass[:, list(adapter.layers_with_heads)]
    # What a head that looks at all it sees alike would have.
    alike = [
        sum(1 / (place + 1) for place in range(1, len(row))) / (len(row) - 1)
        for row in rows
    ]
    heads = own.mean(0).flatten()
    return {
        "mass": _mean(own.mean((1, 2))[:, None], "sinks")[0],
        "uniform": sum(alike) / len(alike),
        "heads": len(heads),
        "heads_above_half": int((heads > 0.5).sum()),
        "largest": float(heads.max()),
        "least": float(heads.min()),
        "by_layer": dict(enumerate(own.mean((0, 2)).tolist())),
    }


def _random_heads(adapter: Adapter) -> list[Head]:
    every = [
        (layer, head)
        for layer in adapter.layers_with_heads
        for head in range(adapter.n_heads)
    ]
    drawn = torch.randperm(len(every), generator=generator(0, "heads"))[:N_HEADS]
    return [every[place] for place in sorted(drawn.tolist())]


@torch.no_grad()
def _logit(
    adapter: Adapter,
    row: Sequence[int],
    direction: Tensor,
    head: Head | None = None,
    start: int = 0,
) -> float:
    """Return the logit from one whole pass, a head away from a position on."""
    edit = None
    if head is not None:
        edit = HeadEdit(head_factors(adapter, [head]), ((start, None),))
    with scale_heads(adapter, edit) as live:
        live.locate(torch.arange(len(row))[None])
        batch = pad([row], "right", adapter.device)
        return float(adapter.states(batch)[0, -1] @ direction)


def _mean(values: Tensor, name: str) -> list[dict[str, Any]]:
    """Return means over texts, with intervals over texts."""
    texts = [str(place) for place in range(len(values))]
    found = bootstrap_means(values, texts, generator(0, name))
    return [figure_of(each) for each in found]
