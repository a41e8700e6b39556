"""Where the parts of a causal model are, found by its own structure and one pass.

No list of architectures: a layer's dataflow is recorded on a few random tokens, and
the residual stream is solved for. Before the MLP it has to be the stream that came in
plus a fixed multiple of the attention's output (through a norm, where one takes it)
plus outputs of other parts; after the layer, a fixed multiple of that plus outputs of
others. What does not solve has no proof, and heads are not read from it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.errors import AdapterError
from holdfast.models.library import library_errors
from holdfast.models.model import Block, Proof, Tier

LINEAR_LAYERS = frozenset({"linear_attention", "conv", "mamba"})
"""Types of layers whose one part is a mixer of tokens, where nothing follows it."""


class Trunk(NamedTuple):
    """The model without its head, and what every language model has of it."""

    base: Any  # Called for states; the language model alone, of one that also sees.
    config: Any  # Configuration of that.
    embedding: nn.Embedding
    final_norm: nn.Module  # The part of the base whose output is its last state.


class Call(NamedTuple):
    """One call of a part of a layer."""

    name: str  # Path from the layer; empty for the layer itself.
    module: nn.Module
    entering: Tensor
    leaving: Tensor


@torch.no_grad()
def find_trunk(model: Any, token_ids: Sequence[int]) -> tuple[Trunk, list[Proof]]:
    """Return the trunk of a causal model, and what is missing of it as a failed proof.

    `token_ids`: A few random tokens to run it on.
    """
    base = getattr(model, "get_decoder", lambda: None)()
    if base is None or base is model:
        base = model.base_model
    # Of a model that sees it may be the whole language model, with its head.
    if base.get_output_embeddings() is not None:
        base = base.model
    embedding, last = model.get_input_embeddings(), []

    def seen(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            last.append((module, output))

    with ExitStack() as stack:
        for child in base.children():
            if not isinstance(child, nn.ModuleList):
                stack.enter_context(child.register_forward_hook(seen))
        ids = torch.tensor([list(token_ids)], device=embedding.weight.device)
        states = base(input_ids=ids, use_cache=False).last_hidden_state
    norms = [module for module, output in last if _same(output, states)]
    trunk = Trunk(
        base,
        model.config.get_text_config(),
        embedding,
        norms[-1] if norms else nn.Identity(),
    )
    if norms:
        return trunk, []
    reason = f"no part of a {type(base).__name__} returns its last state"
    return trunk, [_missing("the final norm is found", reason, "states")]


@torch.no_grad()
def find_blocks(
    model: Any, trunk: Trunk, token_ids: Sequence[int]
) -> tuple[tuple[Block, ...], list[Proof]]:
    """Return how each layer adds what its heads write to the residual stream.

    `token_ids`: A few random tokens to run it on.

    Returns:
        The layers, and what could not be told of them as a failed proof: layers that
        share weights or run more than once, or whose stream does not solve, have no
        heads here; where the layers themselves are not found, there are none.
    """
    lists = [each for each in trunk.base.children() if isinstance(each, nn.ModuleList)]
    found = [each for each in lists if len(each) == trunk.config.num_hidden_layers]
    if len(found) != 1:
        counts = ", ".join(str(len(each)) for each in lists) or "none"
        wanted = f"one list of {trunk.config.num_hidden_layers} layers is wanted"
        return (), [_missing("layers are found", f"{wanted}, found: {counts}")]
    layers = tuple(found[0])
    kinds = getattr(trunk.config, "layer_types", None) or [""] * len(layers)
    try:
        _require_own_weights(layers)
        wanted = "layers that can be looked into"
        with library_errors(AdapterError, wanted, ""), _calls(layers) as calls:
            ids = torch.tensor([list(token_ids)], device=trunk.embedding.weight.device)
            trunk.base(input_ids=ids, use_cache=False)
        blocks = tuple(
            _Layer(layer, kind, own, trunk).block()
            for layer, (kind, own) in enumerate(zip(kinds, calls, strict=True))
        )
    except AdapterError as error:
        bare = tuple(Block(layer) for layer in layers)
        return bare, [_missing("how heads add to the stream is found", str(error))]
    if not any(block.projection is not None for block in blocks):
        return blocks, [_missing("there are heads", "no layer has softmax attention")]
    return blocks, []


def _missing(name: str, reason: str, tier: Tier = "heads") -> Proof:
    return Proof(name, False, None, None, reason, tier)


def _require_own_weights(layers: Sequence[nn.Module]) -> None:
    weights = [id(weight) for layer in layers for weight in layer.parameters()]
    if len(set(weights)) < len(weights):
        raise _refusal(
            "layers with weights of their own",
            f"weights that several layers ({type(layers[0]).__name__}) share, so that "
            "an edit of one is an edit of all",
        )


_FACTORS: Mapping[str, bool] = {
    "logits_scaling": False,
    "logit_scale": True,
    "lm_head_multiplier": True,
}
"""Settings by which families scale their logits, and whether they multiply."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Settings by which families cap their logits softly."""


def logit_scaling(model: Any) -> tuple[float, float | None]:
    """Return what a family multiplies its logits by, and its soft cap, if any."""
    config = model.config.get_text_config()
    named = [(getattr(config, key, None), up) for key, up in _FACTORS.items()]
    scale = math.prod((f if up else 1 / f for f, up in named if f), start=1.0)
    cap = next(filter(None, (getattr(config, key, None) for key in _CAPS)), None)
    return scale, None if cap is None else float(cap)


def scaled_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from states after the final norm to logits.

    Some families scale what their head returns, or cap it softly.
    """
    head = model.get_output_embeddings()
    scale, cap = logit_scaling(model)
    if scale == 1 and not cap:
        return head  # type: ignore[no-any-return]

    def scaled(states: Tensor) -> Tensor:
        logits: Tensor = head(states) * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return scaled


@contextmanager
def _calls(layers: Sequence[nn.Module]) -> Iterator[list[list[Call]]]:
    """Record the calls of layers, of their parts, and of the parts of those."""
    found: list[list[Call]] = [[] for _ in layers]
    with ExitStack() as stack:
        for own, layer in zip(found, layers, strict=True):
            for name, module in layer.named_modules():
                if name.count(".") > 1 or isinstance(module, nn.ModuleList):
                    continue

                def hook(
                    module: nn.Module,
                    arguments: tuple[Any, ...],
                    named: Mapping[str, Any],
                    output: Any,
                    own: list[Call] = own,
                    name: str = name,
                ) -> Any:
                    given = (*arguments, named.get("hidden_states"), *named.values())
                    entering = next((x for x in given if isinstance(x, Tensor)), None)
                    leaving = output[0] if isinstance(output, tuple) else output
                    if entering is None or not isinstance(leaving, Tensor):
                        return output
                    if name and "." not in name and not bool(leaving.any()):
                        # Of a part that writes nothing no factor could be told.
                        leaving = _noise(leaving) * entering.float().std().to(leaving)
                        whole = isinstance(output, tuple)
                        output = (leaving, *output[1:]) if whole else leaving
                    own.append(Call(name, module, entering, leaving))
                    return output

                stack.enter_context(
                    module.register_forward_hook(hook, with_kwargs=True)
                )
        yield found


def _noise(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like)


class _Layer:
    """The calls of one layer, and the equations of its residual stream."""

    def __init__(
        self,
        number: int,
        kind: str,
        calls: Sequence[Call],
        trunk: Trunk,
    ) -> None:
        whole = [call for call in calls if not call.name]
        self.number, self.kind, self.config = number, kind, trunk.config
        if len(whole) != 1:
            raise self._refused("a layer that runs once", f"{len(whole)} runs")
        self.whole = whole[0]
        shape = self.whole.entering.shape
        # Hooks see a part when it returns, so parts stand in the order of their ends.
        # Experts may return all tokens in one row, and there is one example here.
        self.parts = [
            call if call.leaving.shape == shape else call._replace(leaving=wide[None])
            for call in calls
            if call.name and "." not in call.name
            if (wide := call.leaving).shape in (shape, shape[1:])
        ]
        self.within = [call for call in calls if "." in call.name]
        # In 16 bits every product is rounded, and so is what is solved from them.
        exact = trunk.embedding.weight.dtype == torch.float32
        self.slack, self.rounding = (1e-3, 1e-4) if exact else (3e-2, 2e-2)

    def block(self) -> Block:
        """Return the layer, its equations solved."""
        attention = self._attention()
        projection = self._projection(attention)
        heads, norm_after = attention and attention.leaving, None
        taken = [c for c in self.parts if heads is not None and c.entering is heads]
        if taken and not _same(taken[0].leaving, taken[0].entering):
            norm_after, heads = taken[0].module, taken[0].leaving
        joint, scale, mixed = self._before_the_joint(attention, heads)
        mixes = joint is not None or self.kind in LINEAR_LAYERS
        return Block(
            module=self.whole.module,
            attention=attention and attention.module,
            projection=projection and projection.module,
            head_width=self._width(attention and attention.module, projection),
            norm_after=norm_after,
            joint=joint and joint.module,
            attention_scale=scale,
            stream_scale=self._after_the_joint(joint),
            has_mixer=mixed and mixes,
            parallel=mixed and not mixes,
        )

    def _attention(self) -> Call | None:
        # Linear attention may stand under the same name, and has no causal flag.
        found = [call for call in self.parts if hasattr(call.module, "is_causal")]
        return found[0] if found and self.kind not in LINEAR_LAYERS else None

    def _projection(self, attention: Call | None) -> Call | None:
        """Return the last part of the attention that has weights: heads go into it."""
        if attention is None:
            return None
        found = [
            call
            for call in self.within
            if call.name.startswith(f"{attention.name}.")
            and hasattr(call.module, "weight")
            and call.leaving.shape == self.whole.entering.shape
        ]
        if not found:
            raise self._refused("an output projection in its attention", "none")
        if hasattr(found[-1].module, "base_layer"):
            raise self._refused(
                "an output projection with weights of its own (merge adapters first: "
                "`merge_and_unload`)",
                f"a {type(found[-1].module).__name__}",
            )
        return found[-1]

    def _width(self, module: Any, projection: Call | None) -> int:
        """Return the width of a head: of what goes in, whatever `head_dim` says.

        `module`: The attention.
        """
        if projection is None:
            return 0
        width, n_heads = projection.entering.shape[-1], self.config.num_attention_heads
        # Some families have more heads in some layers, which only their parts say.
        own = getattr(module, "num_heads", n_heads)
        if width % n_heads or own != n_heads:
            raise self._refused(
                f"an output projection of {n_heads} heads of one width",
                f"{own} heads in {width} columns",
            )
        return int(width // n_heads)

    def _before_the_joint(
        self, attention: Call | None, heads: Tensor | None
    ) -> tuple[Call | None, float, bool]:
        """Return the part that takes the stream after the attention or mixer.

        Returns:
            The part, by which factor the attention's output is added, and whether
            something else is added beside it.
        """
        entering = self.whole.entering
        begun = attention is None
        # The stream can end here as well, with nothing behind the attention.
        ends = [*self.parts, self.whole._replace(entering=self.whole.leaving)]
        for place, call in enumerate(ends):
            before = [part.leaving for part in self.parts[:place]]
            fresh = not any(call.entering is one for one in (entering, *before))
            if begun and fresh and call.entering.shape == entering.shape:
                others = [one for one in before if heads is None or one is not heads]
                columns = [entering, *([] if heads is None else [heads]), *others]
                factors, off = self._simplest(call.entering, columns, heads)
                if off <= self.slack and self._adds(factors, heads):
                    self._require_one(factors[0])
                    scale = 1.0 if heads is None else self._named(factors[1])
                    rest = factors[1:] if heads is None else factors[2:]
                    joint = None if call.name == "" else call
                    return joint, scale, any(self._counts(each) for each in rest)
            begun = begun or call is attention
        raise self._refused(
            "a stream after its attention that is the stream before, what the "
            "attention adds, and what other parts add",
            "none of its parts takes such a sum",
        )

    def _simplest(
        self, target: Tensor, columns: Sequence[Tensor], heads: Tensor | None
    ) -> tuple[list[float], float]:
        """Solve with the attention alone where that does, and else with all parts.

        In 16 bits, other parts would take up some of what is rounding.
        """
        if heads is not None:
            factors, off = _solved(target, columns[:2])
            if off <= self.rounding:
                return factors + [0.0] * (len(columns) - 2), off
        return _solved(target, columns)

    def _adds(self, factors: Sequence[float], heads: Tensor | None) -> bool:
        """Return whether a part is added to the stream at all."""
        wanted = factors[1:] if heads is None else factors[1:2]
        return any(self._counts(each) for each in wanted)

    def _counts(self, factor: float) -> bool:
        """Return whether a factor is more than what rounding makes of 0."""
        return abs(factor) > self.slack / 10

    def _after_the_joint(self, joint: Call | None) -> float:
        """Return by what the whole stream is multiplied at the end of the layer."""
        if joint is None:
            return 1.0
        place = self.parts.index(joint)
        later = [part.leaving for part in self.parts[place:]]
        factors, off = _solved(self.whole.leaving, [joint.entering, *later])
        scale = getattr(self.whole.module, "layer_scalar", None)
        known = [1.0, *([] if scale is None else [float(scale)])]
        close = [one for one in known if abs(factors[0] - one) <= self.slack]
        if off <= self.slack and close:
            return min(close, key=lambda one: abs(factors[0] - one))
        raise self._refused(
            "a stream that goes on as it is, or times `layer_scalar`, behind its MLP",
            f"a factor of {factors[0]:.4g}, and {off:.2g} of it left over",
        )

    def _require_one(self, factor: float) -> None:
        if abs(factor - 1) > self.slack:
            raise self._refused(
                "a stream that goes on as it is past the attention",
                f"a factor of {factor:.4g}",
            )

    def _named(self, factor: float) -> float:
        """Return the exact factor, which is 1 or one that the configuration names."""
        named = [
            float(value)
            for key, value in self.config.to_dict().items()
            if key.endswith("multiplier") and isinstance(value, int | float)
        ]
        close = [one for one in (1.0, *named) if abs(factor - one) <= self.slack]
        if not close:
            raise self._refused(
                "attention that is added as it is, or times a multiplier of its "
                "configuration",
                f"a factor of {factor:.4g}",
            )
        return min(close, key=lambda one: abs(factor - one))

    def _refused(self, expected: str, found: str) -> AdapterError:
        name = type(self.whole.module).__name__ if hasattr(self, "whole") else "layer"
        return _refusal(f"{expected}, in layer {self.number} ({name})", found)


def _refusal(expected: str, found: str) -> AdapterError:
    return AdapterError(
        expected, found, "Single heads of this model cannot be read; use another."
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _solved(
    target: Float[Tensor, "*position d_model"],
    columns: Sequence[Float[Tensor, "*position d_model"]],
) -> tuple[list[float], float]:
    """Return the factors of columns that sum to a target, and what is left over.

    A column that repeats an earlier one has a factor of 0. What is left over is
    relative to the largest entry of the target.
    """
    own = [
        place
        for place, one in enumerate(columns)
        if not any(_same(one, other) for other in columns[:place])
    ]
    table = torch.stack([columns[place].flatten().double().cpu() for place in own], 1)
    wanted = target.flatten().double().cpu()
    # Solvers are undefined on what is no number.
    if not bool(torch.isfinite(table).all() and torch.isfinite(wanted).all()):
        return [0.0] * len(columns), math.inf
    found = torch.linalg.lstsq(table, wanted[:, None]).solution[:, 0]
    off = (table @ found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    factors = dict(zip(own, found.tolist(), strict=True))
    return [factors.get(place, 0.0) for place in range(len(columns))], float(off)
