"""The term on sink divergence: texts in, a loss with gradient out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.sinks import sink_divergence, sink_penalty
from holdfast.errors import SettingsError
from holdfast.models.attention import SinkProbe, require_tappable, tapped
from holdfast.training.defenses.contract import Hooks, Pass, Scene
from holdfast.training.defenses.options import SinkOptions
from holdfast.training.targets import Example


class Texts(NamedTuple):
    """What is compared in one pass; of equal number where they are paired."""

    harmful: Sequence[Example]
    reference: Sequence[Example]


def sink_hooks(
    scene: Scene,
    options: SinkOptions,
    draw: Callable[[int], Texts],
    *,
    paired: bool,
) -> Hooks:
    """Return the hooks that add the term on sink divergence.

    Args:
        scene: The scene.
        options: Strength, layers, interval, running mean.
        draw: Gives the texts of a pass, by the number of the pass.
        paired: Whether texts of one place are answers to one prompt, which are
            compared over equal positions.

    Raises:
        SettingsError: If a layer is named that the model does not have.
        UnsupportedFamilyError: If the model's attention cannot be tapped.
    """
    require_tappable(scene.adapter.model)
    layers = chosen_layers(options.layers, scene.adapter.n_layers)
    logged: dict[str, float] = {}
    zeros = torch.zeros(len(layers), scene.adapter.n_heads, device=scene.adapter.device)
    state = {"mean": zeros, "share": torch.zeros(())} if options.mean else {}

    def term(each: Pass) -> Tensor:
        if each.step % options.interval:
            # The figures of the last step with a term are not those of this one.
            logged.clear()
            return torch.zeros(())
        found = divergence(
            scene, draw(each.number), layers, paired=paired, detach=options.detach
        )
        if options.mean:
            found = smoothed(found, state, options.mean)
        logged["positive_heads"] = float((found > 0).sum())
        return options.weight * sink_penalty(found)

    around = tapped(scene.adapter.model)
    return Hooks(term=term, around=around, state=state, logged=logged)


def divergence(
    scene: Scene,
    texts: Texts,
    layers: Sequence[int],
    *,
    paired: bool,
    detach: bool,
) -> Float[Tensor, "layer head"]:
    """Return how much more each head looks at the sink over harmful text.

    Args:
        scene: The scene; its model is tapped.
        texts: What is compared.
        layers: Blocks to look at.
        paired: Whether to compare over equal positions.
        detach: Whether the reference text is run without gradient.

    Returns:
        Mean mass over harmful texts less that over reference texts.
    """
    harmful, reference = texts
    if paired:
        both = zip(harmful, reference, strict=True)
        lengths = [min(len(a.input_ids), len(b.input_ids)) for a, b in both]
    else:
        lengths = None
    n = len(harmful)
    if not detach:
        # Side by side it is one pass.
        whole = None if lengths is None else lengths * 2
        mass = sink_mass(scene, [*harmful, *reference], layers, whole)
        return sink_divergence(mass[:n], mass[n:])
    with torch.no_grad():
        still = sink_mass(scene, reference, layers, lengths)
    return sink_divergence(sink_mass(scene, harmful, layers, lengths), still)


def sink_mass(
    scene: Scene,
    rows: Sequence[Example],
    layers: Sequence[int],
    lengths: Sequence[int] | None,
) -> Float[Tensor, "example layer head"]:
    """Return the attention to the first token, averaged over the tokens after it.

    Args:
        scene: The scene; its model is tapped.
        rows: Texts.
        layers: Blocks to look at.
        lengths: Tokens of each row that count; None for all.
    """
    batch = scene.collate(rows)
    mask = batch["attention_mask"]
    counted = None
    if lengths is not None:
        place = torch.arange(mask.shape[1], device=mask.device)
        counted = place < torch.tensor(lengths, device=mask.device)[:, None]
    probe = SinkProbe(mask.bool(), counted=counted, layers=layers)
    scene.parts.base(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        use_cache=False,
        sink_probe=probe,
    )
    return probe.mass()


def smoothed(
    found: Float[Tensor, "layer head"], state: dict[str, Tensor], keep: float
) -> Float[Tensor, "layer head"]:
    """Return the running mean of the divergence, with the gradient of the present one.

    Args:
        found: Divergence of this pass.
        state: The sum so far under `mean` and the weight in it under `share`; both
            are moved on.
        keep: Share that the mean keeps.
    """
    state["mean"] = keep * state["mean"] + (1 - keep) * found.detach()
    state["share"] = keep * state["share"] + (1 - keep)
    mean = state["mean"] / state["share"].to(found.device)
    return mean + (found - found.detach())


def chosen_layers(said: str, n_layers: int) -> list[int]:
    """Return the layers that are named, such as `0-3,7` or `all`, in order.

    Raises:
        SettingsError: If it cannot be read, or names a layer that is not there.
    """
    if said == "all":
        return list(range(n_layers))
    chosen: set[int] = set()
    for part in said.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() for end in ends):
            raise _no_layers(said, n_layers)
        chosen |= set(range(int(ends[0]), int(ends[1]) + 1))
    if not chosen or max(chosen) >= n_layers:
        raise _no_layers(said, n_layers)
    return sorted(chosen)


def _no_layers(said: str, n_layers: int) -> SettingsError:
    return SettingsError(
        f"--defense-option layers= with layers from 0 to {n_layers - 1}, such as 0-3,7",
        repr(said),
        "Name layers of this model, or all.",
    )
