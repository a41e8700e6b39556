"""Scale heads while a model runs; the weights are never touched.

Work on one head happens on the *input* of the output projection, where the heads lie
side by side: slicing the projection's output would cut across all of them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from holdfast.data.chat.conversation import Spans
from holdfast.errors import SettingsError
from holdfast.models.model import Adapter

Head = tuple[int, int]
"""Layer and head, both counted from 0."""
Range = tuple[int, int | None]
"""Half-open range of positions in a row, without padding; None is the end."""
Renormalise = Literal["none", "token", "tensor"]
Scope = Literal["everywhere", "end_template", "answer"]
Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """By how much heads are scaled, and at which positions."""

    # One factor per head; 1 leaves it as it is and 0 ablates it. Either one table for
    # all rows, or a table for each row, so that rows of a batch can have other heads
    # scaled.
    factors: Float[Tensor, "*example layer head"]
    # For each row, the positions that are edited; None is every position.
    ranges: tuple[Range, ...] | None = None
    # What happens to the norm of a layer's heads, side by side: "none" leaves what
    # scaling made of it; "token" restores it at each token; "tensor" restores it for
    # all edited tokens of a batch by one number, as the paper's code does, so that a
    # result depends on its batch and on padding, and takes one table for all rows. Only
    # layers with a scaled head are touched.
    renormalise: Renormalise = "none"

    def __post_init__(self) -> None:
        """Refuse factors that are not numbers, and one norm for several edits."""
        if not bool(torch.isfinite(self.factors).all()):
            raise SettingsError(
                "finite factors for heads", "one that is not", "Use 0 to ablate a head."
            )
        if self.renormalise == "tensor" and self.by_row:
            raise SettingsError(
                "one table of factors where the norm of a whole tensor is restored",
                "a table for each row",
                "Run one edit after the other, or restore norms token by token.",
            )

    @property
    def by_row(self) -> bool:
        """Whether each row has its own factors."""
        return self.factors.dim() == 3

    def n_rows(self) -> int | None:
        """Return how many rows the edit is for, or None if it is for any.

        Raises:
            SettingsError: If factors and ranges are not of as many rows.
        """
        tables = len(self.factors) if self.by_row else None
        ranges = None if self.ranges is None else len(self.ranges)
        if None not in (tables, ranges) and tables != ranges:
            raise SettingsError(
                "as many ranges of positions as tables of factors",
                f"{ranges} and {tables}",
                "Give both for each row.",
            )
        return ranges if tables is None else tables


def check_heads(adapter: Adapter, heads: Sequence[Head]) -> None:
    """Refuse heads that the model does not have.

    Raises:
        SettingsError: Names the heads and what would fit.
    """
    layers, width = adapter.layers_with_heads, range(adapter.n_heads)
    missing = [
        f"{layer}:{head}"
        for layer, head in heads
        if layer not in layers or head not in width
    ]
    if missing:
        raise SettingsError(
            f"heads in layers {listed(layers)}, numbered from 0 to "
            f"{adapter.n_heads - 1} in each",
            f"{', '.join(missing)} (layer:head) for {adapter.identity.model_id}",
            "Name heads that the model has; layers and heads count from 0.",
        )


def listed(layers: Sequence[int]) -> str:
    """Return numbers of layers as a message names them: "0 to 3" or "1, 3"."""
    if len(layers) > 1 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "(none)"


def head_factors(
    adapter: Adapter, heads: Sequence[Head], factor: int | float = 0.0
) -> Float[Tensor, "layer head"]:
    """Return the table of factors that scales some heads and leaves the others.

    Raises:
        SettingsError: If the model has no such head.
    """
    check_heads(adapter, heads)
    factors = torch.ones((adapter.n_layers, adapter.n_heads))
    for layer, head in heads:
        factors[layer, head] = factor
    return factors


def first_layer(factors: Float[Tensor, "*example layer head"]) -> int:
    """Return the first layer in which a head is scaled; the last if none is."""
    edited = (factors != 1).any(-1).reshape(-1, factors.shape[-2]).any(0)
    places = torch.argwhere(edited)[:, 0].tolist()
    return int(places[0]) if places else factors.shape[-2] - 1


def scope_ranges(spans: Sequence[Spans], scope: Scope) -> tuple[Range, ...] | None:
    """Return the positions of each row that a scope names.

    `scope`: "everywhere"; "end_template", where the thinking is fixed and only the
    tokens that end it are edited; or "answer", from the first answer token on, which is
    itself still chosen by an unedited state.

    Raises:
        SettingsError: If there is no end template to edit.
    """
    if scope == "everywhere":
        return None
    if scope == "answer":
        return tuple((row.answer[0], None) for row in spans)
    empty = [i for i, row in enumerate(spans) if row.end_template[0] >= row.answer[0]]
    if empty:
        raise SettingsError(
            "rows whose thinking has ended, for a scope of `end_template`",
            f"{len(empty)} rows without an end template (row {empty[0]} is the first)",
            "Leave them out, or use the scope `everywhere` or `answer`.",
        )
    return tuple((row.end_template[0], row.end_template[1]) for row in spans)


class LiveEdit:
    """An edit at work: it knows which tokens of the next pass are in range."""

    def __init__(
        self,
        ranges: Sequence[Range] | None,
        device: torch.device,
        *,
        by_row: bool = False,
    ) -> None:
        """Start with an edit whose rows are those of the batch, in its order."""
        self.mask: Bool[Tensor, "example position"] | None = None
        # By layer; the first of them is the first in which rows are told apart.
        self.columns: dict[int, Float[Tensor, "example position heads"]] = {}
        self.by_row = by_row
        self._every = self.columns
        self._all_bounds: Int[Tensor, "example _"] | None = None
        if ranges is not None:
            far = torch.iinfo(torch.int64).max
            bounds = [(start, far if end is None else end) for start, end in ranges]
            self._all_bounds = torch.tensor(bounds, device=device).reshape(-1, 2)
            self.mask = torch.zeros((len(bounds), 1), dtype=torch.bool)
        self._bounds = self._all_bounds

    def locate(self, positions: Int[Tensor, "example position"]) -> None:
        """Say at which positions of their rows the tokens of the next pass stand."""
        if self._bounds is not None:
            start, end = self._bounds[:, :1], self._bounds[:, 1:]
            self.mask = (positions >= start) & (positions < end)

    def begin(self, row: int, position: int) -> None:
        """Let the edit act on one of its rows from a position on."""
        if self._all_bounds is not None:
            self._all_bounds[row, 0] = position

    def take(self, rows: Sequence[int]) -> None:
        """Let the batch be these rows of the edit, in their order."""
        if self._all_bounds is not None:
            self._bounds = self._all_bounds[list(rows)]
        if self.by_row:
            taken = {layer: every[list(rows)] for layer, every in self._every.items()}
            # A layer in which none of them has a scaled head stays as it is.
            self.columns = {
                layer: columns
                for layer, columns in taken.items()
                if bool((columns != 1).any())
            }


@contextmanager
def scale_heads(
    adapter: Adapter,
    edit: HeadEdit | Float[Tensor, "*_ layer head"] | None,
    *,
    positions: bool = False,
    layers: Sequence[int] | None = None,
) -> Iterator[LiveEdit]:
    """Multiply what heads write by factors, for as long as the context lasts.

    A factor of 1 leaves a head as it is, bit for bit, and 0 ablates it. An edit with
    ranges acts at the positions that `LiveEdit.locate` was last told; before that,
    nowhere.

    Args:
        adapter: The model; its weights are never touched.
        edit: What to scale, or the factors alone; None for nothing.
        positions: Whether several tables of factors are of the tokens of each pass, in
            all rows alike, and not of rows.
        layers: Layers to hook; by default those in which a factor is not 1.

    Yields:
        What has to be told where the tokens of each pass stand, if there are ranges,
        and which rows of the edit they are, if not all in their order.

    Raises:
        SettingsError: If there is not one factor for each head, or one of a layer
            without heads is not 1; and, while the model runs, if a norm is to be
            restored of which nothing is left.
        AdapterError: If heads of this model cannot be read.
    """
    if isinstance(edit, Tensor):
        edit = HeadEdit(edit)
    ranges, by_row = (None, False) if edit is None else (edit.ranges, edit.by_row)
    live = LiveEdit(ranges, adapter.device, by_row=by_row)
    with ExitStack() as stack:
        if edit is not None:
            adapter.require("heads")
            tables = edit.factors if edit.by_row else edit.factors[None]
            check_table(adapter, tables[0])
            if layers is None:
                layers = torch.argwhere((tables != 1).any(-1).any(0))[:, 0].tolist()
            for layer in layers:
                projection = adapter.output_projection(layer)
                width, place = adapter.head_widths[layer], projection.weight.device
                columns = tables[:, layer].repeat_interleave(width, -1)
                columns = columns[None] if positions else columns[:, None]
                # Placed once here rather than in each pass.
                live.columns[layer] = columns.to(place, adapter.dtype)
                hook = _scaler(layer, edit.renormalise, live)
                stack.enter_context(projection.register_forward_pre_hook(hook))
        yield live


@contextmanager
def scale_inside(
    adapter: Adapter, factors: Float[Tensor, "layer head"]
) -> Iterator[set[int]]:
    """Multiply what heads read where attention itself returns it, head by head.

    It is what `scale_heads` does to columns of the output projection, as long as
    nothing in between mixes heads; only passes that prove this run it. Attention runs
    as scaled dot products meanwhile, or by the family's own code where it has no such.

    Yields:
        The layers that were scaled so far.
    """
    holders = [getattr(module, "config", None) for module in adapter.base.modules()]
    configs = {id(each): each for each in holders if each is not None}.values()
    before = [(each, each._attn_implementation) for each in configs]
    fused = bool(getattr(adapter.base, "_supports_sdpa", False))
    asked: set[int] = set()
    own = adapter.layers_with_heads
    attentions: list[Any] = [adapter.blocks[layer].attention for layer in own]
    try:
        for config in configs:
            config._attn_implementation = _INSIDE[fused]
        for layer, attention in zip(own, attentions, strict=True):
            attention.scaled_inside = (layer, factors[layer], asked)
        yield asked
    finally:
        for attention in attentions:
            attention.scaled_inside = None
        for config, implementation in before:
            config._attn_implementation = implementation


def _attend(
    fused: bool, module: nn.Module, *given: Any, **named: Any
) -> tuple[Tensor, Any]:
    """Run the attention of one layer, then scale its heads as `scale_inside` said."""
    family = sys.modules[type(module).__module__]
    plain = sdpa_attention_forward if fused else family.eager_attention_forward
    # Heads stand in the last axis but one: [example, position, head, d_head].
    heads, weights = plain(module, *given, **named)
    scaling: Any = getattr(module, "scaled_inside", None)
    if scaling is not None:
        layer, factors, asked = scaling
        asked.add(layer)
        heads = heads * factors.to(heads)[:, None]
    return heads, weights


_INSIDE = {True: "holdfast_inside", False: "holdfast_inside_eager"}
"""Names under which transformers finds `_attend`: with fused kernels, and without."""
for _fused, _mask in ((True, sdpa_mask), (False, eager_mask)):
    AttentionInterface.register(_INSIDE[_fused], partial(_attend, _fused))
    AttentionMaskInterface.register(_INSIDE[_fused], _mask)


def _scaler(layer: int, renormalise: Renormalise, live: LiveEdit) -> Hook:
    def scale(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        heads, *rest = arguments
        if layer not in live.columns:
            return arguments
        scaled = heads * live.columns[layer].to(heads.device)
        mask = live.mask
        if mask is not None:
            mask = mask.to(heads.device)[..., None].expand(*heads.shape[:-1], 1)
        if renormalise != "none":
            scaled = _renormalised(heads, scaled, mask, renormalise, layer)
        if mask is not None:
            scaled = torch.where(mask, scaled, heads)
        return (scaled, *rest)

    return scale


def _renormalised(
    heads: Float[Tensor, "example position heads"],
    scaled: Float[Tensor, "example position heads"],
    mask: Bool[Tensor, "example position 1"] | None,
    how: Renormalise,
    layer: int,
) -> Float[Tensor, "example position heads"]:
    chosen = torch.ones_like(heads[..., :1], dtype=torch.bool) if mask is None else mask
    axes = (-1,) if how == "token" else (-3, -2, -1)
    before, after = (
        (part.float() * chosen).square().sum(axes, keepdim=True).sqrt()
        for part in (heads, scaled)
    )
    # Padding attends to nothing, and tokens out of range are not asked about: there
    # both norms are zero, and nothing has to be restored.
    if bool(((after == 0) & (before > 0)).any()):
        raise SettingsError(
            "something left of a layer's heads whose norm is to be restored",
            f"a norm of zero in layer {layer} after scaling",
            "Scale fewer heads of that layer, not to 0, or without renormalisation.",
        )
    ratio = torch.where(after > 0, before / after, torch.ones_like(after))
    return (scaled * ratio).to(heads.dtype)


def check_table(adapter: Adapter, factors: Float[Tensor, "layer head"]) -> None:
    """Refuse a table that has not one factor for each head of the model."""
    expected = (adapter.n_layers, adapter.n_heads)
    if tuple(factors.shape) != expected:
        raise SettingsError(
            f"one factor per head, in {expected[0]} rows of {expected[1]}",
            f"a table of shape {tuple(factors.shape)}",
            "Give one row for each layer and one column for each head.",
        )


@contextmanager
def shared_rows(
    adapter: Adapter, layer: int, copy_of: Int[Tensor, "example"]
) -> Iterator[None]:
    """Copy rows in front of a block, for passes over the distinct ones.

    `copy_of`: For each row that is wanted, which of the rows that are read it is.
    """
    n_read = int(copy_of.max()) + 1

    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(copied(each) for each in value)
        # Masks and positions may have one row for all, which serves as it is.
        rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == n_read
        return value[copy_of.to(value.device)] if rows and n_read > 1 else value

    def copy(
        _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(named)
        states = arguments[0] if arguments else named.pop("hidden_states")
        rest = [copied(each) for each in arguments[1:]]
        # Positions are of all rows, and some families put other axes in front.
        others = {
            name: value if name.startswith("position") else copied(value)
            for name, value in named.items()
        }
        return (states[copy_of.to(states.device)], *rest), others

    with adapter.blocks[layer].module.register_forward_pre_hook(copy, with_kwargs=True):
        yield


def distinct(
    token_ids: Int[Tensor, "example position"],
) -> tuple[Int[Tensor, "_ position"], Int[Tensor, "example"]]:
    """Return the distinct rows, and for each row which of them it is."""
    rows, copy_of = torch.unique(token_ids, dim=0, return_inverse=True)
    return rows, copy_of
