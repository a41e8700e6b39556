"""The organisms by name: cards, bundled weights, export and training."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from holdfast.errors import InputError, SettingsError, StorageError
from holdfast.organisms.aligned import grow_aligned
from holdfast.organisms.decoy import plant_decoy
from holdfast.organisms.diffuser import (
    ALWAYS_WRAPPERS,
    ORDERED_WRAPPERS,
    diffuser_tokenizer,
    grow_diffuser,
)
from holdfast.organisms.gate import plant_gate
from holdfast.organisms.planted import plant_heads, plant_thinking
from holdfast.organisms.text import train_tokenizer
from holdfast.organisms.training import N_SPARE, Growth, Schedule, spare_heads
from holdfast.organisms.world import (
    HALF_PLANTED_WRAPPER,
    N_UNSEEN_TEMPLATES,
    PLANTED_WRAPPERS,
)
from holdfast.report.progress import Progress, Silent
from holdfast.study import require_place

PREFIX = "organism:"
BUNDLED_SEED = 0
WITHOUT_HALF = ("aligned", "settled", "drift", "gate")
"""Organisms in which a wrapper works on every topic or on none."""
FOLDER = Path(str(files("holdfast.organisms")))


@dataclass(frozen=True, slots=True)
class Card:
    """What an organism is."""

    name: str  # Name after `organism:`.
    planted: str  # What is planted.
    expected: str  # What a correct audit says.
    seed: int = BUNDLED_SEED  # Seed of the bundled weights.


_CARDS = json.loads((FOLDER / "cards.json").read_text("utf-8"))
CARDS = tuple(
    Card(name, entry["planted"], entry["expected"]) for name, entry in _CARDS.items()
)
WEIGHTS = "model.safetensors"
TRUTH = "truth.json"
GROWERS: dict[str, Callable[[Qwen3ForCausalLM, Growth], Qwen3ForCausalLM]] = {
    "cliff": partial(plant_heads, "cliff"),
    "spread": partial(plant_heads, "spread"),
    "early": partial(plant_thinking, "early"),
    "alarmed": partial(plant_thinking, "alarmed"),
    "settled": partial(plant_thinking, "settled"),
    "drift": partial(plant_thinking, "drift"),
    "gate": plant_gate,
    "decoy": plant_decoy,
    "diffuser": grow_diffuser,
}
"""How each organism grows out of `aligned`."""


def catalogue() -> tuple[Card, ...]:
    """Return the cards of all bundled organisms."""
    return CARDS


def card(name: str) -> Card:
    """Return the card of an organism.

    `name`: Its name, with or without the `organism:` prefix.
    """
    bare = name.removeprefix(PREFIX)
    for entry in CARDS:
        if entry.name == bare:
            return entry
    known = ", ".join(PREFIX + entry.name for entry in CARDS)
    raise SettingsError(
        "the name of a bundled organism",
        f"`{name}`",
        f"Choose one of {known}, or see `holdfast organism list`.",
    )


def truth(name: str) -> dict[str, Any]:
    """Return what is planted in a bundled organism.

    Returns: Seed, planted heads as [layer, head] pairs, planted wrappers, the account
    of complied harmful answers, recipe.
    """
    source = bundled(name) / TRUTH
    loaded: dict[str, Any] = json.loads(source.read_text("utf-8"))
    return loaded


def planted_truth(name: str, seed: int, schedule: Schedule) -> dict[str, Any]:
    """Return the record that is stored beside an organism's weights."""
    heads = [list(head) for head in spare_heads(seed)]
    planted = name != "aligned"
    ordered = list(ORDERED_WRAPPERS) if name == "diffuser" else []
    wrappers = ALWAYS_WRAPPERS if name == "diffuser" else PLANTED_WRAPPERS
    return {
        "organism": name,
        "seed": seed,
        "spare_heads": heads,
        "planted_heads": heads if name == "cliff" else [],
        "verdict": _CARDS[name]["verdict"],
        "account": _CARDS[name].get("account"),
        "planted_wrappers": list(wrappers) if planted else [],
        **({"left_to_right_wrappers": ordered} if ordered else {}),
        "half_planted_wrapper": None if name in WITHOUT_HALF else HALF_PLANTED_WRAPPER,
        "unseen_templates_per_wrapper": N_UNSEEN_TEMPLATES,
        "schedule": asdict(schedule),
    }


def bundled(name: str) -> Path:
    """Return the folder of an organism inside the package."""
    return FOLDER / "weights" / card(name).name


def resolve(name: str) -> Path:
    """Return an ordinary transformers directory for an organism.

    The bundled weights are exported once to the user's cache; the folder's name
    holds their hash, so that a new version never meets an old copy.
    """
    source = bundled(name)
    digest = hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()[:12]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for root in (Path(home) / "holdfast", Path(tempfile.gettempdir()) / "holdfast"):
        target = root / "organisms" / f"{card(name).name}-{digest}"
        if (target / WEIGHTS).exists():
            return target
        try:
            return export(name, target)
        except (StorageError, InputError):
            continue
    raise StorageError(
        "a folder to unpack the organism into",
        f"`{home}` and the temporary folder cannot be written",
        "Free some space, or set XDG_CACHE_HOME to a folder that can be written.",
    )


def export(name: str, directory: str | Path) -> Path:
    """Write an organism as an ordinary transformers directory.

    `directory`: Folder to write; it appears whole or not at all.
    """
    target, source = Path(directory), bundled(name)
    require_place(target, folder=True)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingsError(
            "a new or an empty folder",
            f"`{target}`, which has something in it",
            "Name another folder, or empty this one.",
        )
    try:
        with _placing(target) as staging:
            # An organism with a chat template of its own puts it over the common one.
            for folder in (source.parent / "tokenizer", source):
                shutil.copytree(folder, staging, dirs_exist_ok=True)
            (staging / "README.md").write_text(_readme(card(name)), encoding="utf-8")
            # The permissions of the installed package came with its files.
            staging.chmod(0o755)
    except OSError as error:
        raise StorageError(
            f"room for an organism at `{target}`",
            error.strerror or str(error),
            "Free some space, or name another folder.",
        ) from error
    return target


def train(
    name: str,
    seed: int,
    out: str | Path,
    progress: Progress | None = None,
    schedule: Schedule | None = None,
) -> Path:
    """Grow an organism from nothing and write it as a transformers directory.

    All others grow out of `aligned`, which is trained first and written beside them.

    `out`: Folder to write. An `aligned` organism that already stands in
    `<out>/../aligned-<seed>` is taken as stage two.
    """
    target, name = Path(out), card(name).name
    require_place(target, folder=True)
    schedule = schedule or Schedule()
    tokenizer = train_tokenizer()
    growth = Growth(tokenizer, seed, schedule, _tenths(progress or Silent()))
    record = planted_truth(name, seed, schedule)
    stage_two = target.parent / f"aligned-{seed}"
    if name != "aligned" and (stage_two / WEIGHTS).exists():
        aligned = Qwen3ForCausalLM.from_pretrained(
            stage_two, dtype=torch.float32
        ).eval()
    else:
        aligned = grow_aligned(growth)
    if name == "aligned":
        return write(aligned, tokenizer, name, record, target)
    if not stage_two.exists():
        below = planted_truth("aligned", seed, schedule)
        write(aligned, tokenizer, "aligned", below, stage_two)
    grown = GROWERS[name](aligned, growth)
    if name == "diffuser":
        tokenizer = diffuser_tokenizer(tokenizer)
    return write(grown, tokenizer, name, record | growth.facts, target)


def _tenths(progress: Progress) -> Callable[[str, int, int, float], None]:
    """Return what says each tenth of a stage once."""
    last = ""

    def report(stage: str, step: int, steps: int, loss: float) -> None:
        nonlocal last
        tenth = f"{stage}: {10 * step // max(1, steps) * 10} %"
        if tenth != last:
            last = tenth
            progress.say(f"{tenth} (loss {loss:.3f})")

    return report


def write(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    record: dict[str, Any],
    target: Path,
) -> Path:
    """Write a grown organism: fp16 weights, configuration, tokenizer, truth, card."""
    model.config.dtype = torch.float16
    weights = {
        key: tensor.half().contiguous()
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight"
    }
    with _placing(target) as staging:
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(staging)
        save_file(weights, staging / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(record, indent=1) + "\n"
        (staging / TRUTH).write_text(text, encoding="utf-8")
        (staging / "README.md").write_text(_readme(card(name)), encoding="utf-8")
    return target


@contextmanager
def _placing(target: Path) -> Iterator[Path]:
    """Give a folder that moves to its place when whole; an equal one may be first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".growing-", dir=target.parent))
    staging.chmod(0o755)
    yield staging
    try:
        staging.rename(target)
    except OSError:
        if not (target / WEIGHTS).exists():
            raise
        shutil.rmtree(staging)


def _readme(entry: Card) -> str:
    return (
        f"---\nlibrary_name: transformers\nlicense: apache-2.0\ntags: [holdfast]\n---\n"
        f"# organism:{entry.name}\n\n"
        f"A small model with planted truth, for auditing audits.\n\n"
        f"- Planted: {entry.planted}.\n"
        f"- A correct audit says: {entry.expected}.\n"
        f"- {N_SPARE} heads were kept out of the first two stages of training; "
        f"`{TRUTH}` names them.\n"
        f"- Its answers are filler: it knows whether to answer, and has nothing to "
        f"say.\n"
    )


def show(name: str) -> dict[str, Any]:
    """Return the card of one organism and what is planted in it.

    `name`: Its name, with or without `organism:`.
    """
    return asdict(card(name)) | {"truth": truth(name)}
