"""What defenses read alike: safe rows in turn, and both models' states of some rows."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from holdfast.training.defenses.contract import Pass, Scene
from holdfast.training.defenses.draws import Draws
from holdfast.training.defenses.options import Where
from holdfast.training.defenses.passing import Batch, States, states_of


class Both(NamedTuple):
    """Rows, and what the model as it is and as it was makes of them."""

    batch: Batch
    trained: States
    aligned: States


def reference_batches(scene: Scene, size: int) -> Callable[[int], Batch]:
    """Return what gives the safe rows of a pass, by the number of the pass.

    Args:
        scene: The scene.
        size: Rows a pass.
    """
    rows = scene.material.reference
    draws = Draws(len(rows), scene.seed)
    return lambda number: scene.collate([rows[at] for at in draws.take(number, size)])


def both(
    scene: Scene, on: Where, size: int, reads: Literal["last", "blocks"]
) -> Callable[[Pass], Both]:
    """Return what gives both models' states of the rows of a pass.

    Args:
        scene: The scene.
        on: Whose rows: the task's, whose states are there already, or the safe ones.
        size: Safe rows a pass.
        reads: Which states.
    """
    if on == "task":
        return lambda each: Both(
            each.batch, each.states, scene.aligned.states(each.batch, reads)
        )
    draw = reference_batches(scene, size)

    def read(each: Pass) -> Both:
        batch = draw(each.number)
        return Both(
            batch,
            states_of(scene.parts, batch, reads),
            scene.aligned.states(batch, reads),
        )

    return read
