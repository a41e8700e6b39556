"""The bundled organisms: list them, show what is planted, train and export them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.organisms import cards, catalogue
from holdfast.session.progress import Progress, Silent


def names() -> list[dict[str, Any]]:
    """Return the card of every organism."""
    return [asdict(card) for card in cards.catalogue()]


def show(name: str) -> dict[str, Any]:
    """Return the card of one organism and what is planted in it.

    Args:
        name: Its name, with or without `organism:`.

    Raises:
        SettingsError: If there is no such organism.
    """
    return asdict(cards.card(name)) | {"truth": catalogue.truth(name)}


def train(
    name: str, out: Path, *, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Grow an organism from nothing.

    Args:
        name: Its name.
        out: Folder to write.
        seed: Seed of weights, spare heads and training text.
        progress: Where it is told how far it is.

    Returns:
        The folder.

    Raises:
        SettingsError: If there is no such organism.
        StorageError: If the folder cannot be written.
    """
    listener = progress or Silent()
    last = ""

    def told(stage: str, step: int, steps: int, loss: float) -> None:
        nonlocal last
        tenth = f"{stage}: {10 * step // max(1, steps) * 10} %"
        if tenth != last:
            last = tenth
            listener.say(f"{tenth} (loss {loss:.3f})")

    return catalogue.train(name, seed, out, told)


def export(name: str, out: Path) -> Path:
    """Write a bundled organism as an ordinary model directory.

    Args:
        name: Its name.
        out: Folder to write.

    Returns:
        The folder.

    Raises:
        SettingsError: If there is no such organism.
        StorageError: If the folder cannot be written.
    """
    return catalogue.export(name, out)
