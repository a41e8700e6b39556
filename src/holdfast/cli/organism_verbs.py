"""The verbs about the bundled organisms."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from holdfast.report import terminal

Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]
organism = App(
    name="organism",
    help="Small models with planted truth: list, show, train and export them.",
)


@organism.command(name="list")
def list_(*, json: Json = False) -> None:
    """List the organisms.

    Args:
        json: Print them as JSON, and nothing else, on stdout.
    """
    from holdfast.organisms import catalogue as stage

    cards = [asdict(card) for card in stage.catalogue()]
    if json:
        return terminal.print_json(cards)
    rows = [
        [f"organism:{card['name']}", card["planted"], card["expected"]]
        for card in cards
    ]
    columns = ("name", "what is planted", "a correct audit says")
    return terminal.print_table("Organisms", columns, rows)


@organism.command
def show(name: str, /, *, json: Json = False) -> None:
    """Show what is planted in an organism.

    Args:
        name: Its name.
        json: Print it as JSON, and nothing else, on stdout.
    """
    from holdfast.organisms import catalogue as stage

    found = stage.show(name)
    if json:
        return terminal.print_json(found)
    planted = found.pop("truth")
    facts = {**found, **planted}
    rows = [[key, str(value)] for key, value in facts.items()]
    return terminal.print_table(f"organism:{found['name']}", ("", ""), rows)


@organism.command
def train(
    name: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Grow an organism from nothing, its base included.

    Args:
        name: Its name.
        output: Folder to write. Default: organisms/NAME-SEED.
        seed: Seed of weights, spare heads and training text.
        json: Print the folder as JSON, and nothing else, on stdout.
    """
    from holdfast.organisms import catalogue as stage

    bare = name.removeprefix("organism:")
    place = output or Path("organisms") / f"{bare}-{seed}"
    _told(stage.train(name, seed, place, terminal.Shown()), json)


@organism.command
def export(
    name: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    json: Json = False,
) -> None:
    """Write an organism as an ordinary model directory.

    Args:
        name: Its name.
        output: Folder to write.
        json: Print the folder as JSON, and nothing else, on stdout.
    """
    from holdfast.organisms import catalogue as stage

    _told(stage.export(name, output), json)


def _told(folder: Path, json: bool) -> None:
    if json:
        terminal.print_json({"directory": str(folder)})
    else:
        terminal.print_lines(f"Written to {folder}")
