"""Scale heads in every row of a pass alike: for proofs, and for sets of heads at once.

What follows a row through a batch, as decoding needs it, is in `models.edits`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.models.edits import Hook, check_table
from holdfast.models.parts import Adapter


@contextmanager
def scaled_heads(
    adapter: Adapter, factors: Float[Tensor, "layer head"]
) -> Iterator[None]:
    """Multiply what each head writes by a factor, at every position.

    Every layer gets its hook, also one whose factors are all 1.

    Args:
        adapter: The model.
        factors: One factor a head; 1 leaves a head as it is, bit for bit, and 0
            ablates it.

    Yields:
        Nothing; the hooks are gone when the context ends.

    Raises:
        SettingsError: If there is not one factor for each head.
    """
    check_table(adapter, factors)
    with scaled_tokens(adapter, factors[None], range(adapter.n_layers)):
        yield


@contextmanager
def scaled_tokens(
    adapter: Adapter,
    factors: Float[Tensor, "position layer head"],
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Scale other heads at each token of a pass, in all rows of the batch alike.

    Args:
        adapter: The model.
        factors: A table for each token of the pass, or one for all.
        layers: Layers to hook; by default those in which a factor is not 1.

    Yields:
        Nothing; the hooks are gone when the context ends.
    """
    if layers is None:
        layers = torch.argwhere((factors != 1).any(0).any(-1))[:, 0].tolist()
    with ExitStack() as stack:
        for layer in layers:
            projection = adapter.output_projection(layer)
            columns = factors[:, layer].repeat_interleave(adapter.head_width, -1)
            # Placed once here rather than in each pass.
            hook = _multiplier(columns.to(projection.weight))
            stack.callback(projection.register_forward_pre_hook(hook).remove)
        yield


def _multiplier(columns: Float[Tensor, "position heads"]) -> Hook:
    def scale(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        heads, *rest = arguments
        return (heads * columns, *rest)

    return scale
