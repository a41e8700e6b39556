"""What is done to a model while it writes: heads scaled, or states moved."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.models.hidden_states import Site, site_module
from holdfast.models.interventions import HeadEdit, LiveEdit, Range, scale_heads
from holdfast.models.model import Adapter


@dataclass(frozen=True, eq=False)
class DirectionEdit:
    """How far states move along one direction at each of some sites.

    A state `x` becomes `x + (gain * (r @ x) + shift) * u` with the unit direction `u`
    of its site and `r` the same or another one. A gain of -1 along `u` itself projects
    it out, and the shift is what stands in its place; a gain of 0 adds a multiple of
    it; another `r` moves states as far as taking `r` out would, and elsewhere.
    """

    sites: tuple[Site, ...]
    units: Float[Tensor, "layer d_model"]  # One direction of unit norm for each site.
    gain: float
    shifts: Float[Tensor, "layer"]  # One number for each site.
    # For each row, the positions that are edited; None is every position.
    ranges: tuple[Range, ...] | None = None
    # What is read at each site; the units themselves by default.
    readers: Float[Tensor, "layer d_model"] | None = None
    by_row: ClassVar[bool] = False
    renormalise: ClassVar[Literal["none"]] = "none"

    def n_rows(self) -> int | None:
        """Return how many rows the edit is for, or None if it is for any."""
        return None if self.ranges is None else len(self.ranges)


@contextmanager
def move_states(adapter: Adapter, edit: DirectionEdit) -> Iterator[LiveEdit]:
    """Move states along directions, for as long as the context lasts.

    Yields:
        What has to be told where the tokens of each pass stand, if there are ranges,
        and which rows of the edit they are, if not all in their order.

    Raises:
        SettingsError: If the model has no such site.
        AdapterError: If states of this model cannot be read.
    """
    live = LiveEdit(edit.ranges, adapter.device)
    with ExitStack() as stack:
        readers = edit.units if edit.readers is None else edit.readers
        for site, unit, reader, shift in zip(
            edit.sites,
            edit.units.float(),
            readers.float(),
            edit.shifts.tolist(),
            strict=True,
        ):
            hook = _mover(unit, reader, edit.gain, shift, live)
            stack.enter_context(site_module(adapter, site).register_forward_hook(hook))
            # Rows are told apart before the last block, if not earlier.
            layer = adapter.n_layers - 1 if site == "final_norm" else site
            live.columns[layer] = unit
        yield live


def _mover(
    unit: Float[Tensor, "d_model"],
    reader: Float[Tensor, "d_model"],
    gain: float,
    shift: float,
    live: LiveEdit,
) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def move(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        along = unit.to(states.device)
        amount = gain * (states.float() @ reader.to(states.device)) + shift
        moved = (states.float() + amount[..., None] * along).to(states.dtype)
        if live.mask is not None:
            moved = torch.where(live.mask.to(states.device)[..., None], moved, states)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return move


Edit = HeadEdit | DirectionEdit


def editing(adapter: Adapter, edit: Edit | None) -> AbstractContextManager[LiveEdit]:
    """Return the context in which an edit of either kind acts on a model."""
    if isinstance(edit, DirectionEdit):
        return move_states(adapter, edit)
    return scale_heads(adapter, edit)
