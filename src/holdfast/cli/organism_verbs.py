"""The verbs about the bundled organisms."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App

from holdfast.cli.options import Json, about, show, written

Name = Annotated[str, about("Its name.")]
Folder = Annotated[Path, written("Folder to write.")]
Grown = Annotated[
    Path | None,
    written("Folder to write. Default: organisms/NAME-SEED."),
]
Seed = Annotated[
    int, about("Seed of weights, spare heads and training text.", "Sampling")
]
organism = App(
    name="organism",
    help="Small models with planted truth: list, show, train and export them.",
)


@organism.command(name="list")
def list_(*, json: Json = False) -> None:
    """List the organisms.

    For example, `holdfast organism list`.
    """
    from holdfast.organisms.catalogue import catalogue

    show(json, [asdict(card) for card in catalogue()], "audit.panel:organisms")


@organism.command(name="show")
def show_(name: Name, /, *, json: Json = False) -> None:
    """Show what is planted in an organism.

    For example, `holdfast organism show cliff`.
    """
    from holdfast.organisms import catalogue

    show(json, catalogue.show(name), "audit.panel:planted")


@organism.command
def train(
    name: Name,
    /,
    *,
    output: Grown = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Grow an organism from nothing, its base included.

    For example, `holdfast organism train cliff --seed 1`.
    """
    from holdfast.organisms.catalogue import train as grow
    from holdfast.report.terminal import Shown

    bare = name.removeprefix("organism:")
    place = output or Path("organisms") / f"{bare}-{seed}"
    folder = grow(name, seed, place, Shown())
    show(json, {"directory": str(folder)}, "audit.panel:written")


@organism.command
def export(name: Name, /, *, output: Folder, json: Json = False) -> None:
    """Write an organism as an ordinary model directory.

    For example, `holdfast organism export cliff -o organisms/cliff`.
    """
    from holdfast.organisms.catalogue import export as export_weights

    folder = export_weights(name, output)
    show(json, {"directory": str(folder)}, "audit.panel:written")
