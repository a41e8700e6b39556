"""The settings of `holdfast finetune`; this module loads no tensors."""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from holdfast.errors import SettingsError
from holdfast.flags import Texts, flat
from holdfast.ranges import flag_of, require_numbers
from holdfast.rollout.settings import parse_columns

if TYPE_CHECKING:
    from holdfast.finetune.defenses.options import Options

Method = Literal["lora", "full"]
LossOn = Literal["answer", "both", "template"]


@dataclass(frozen=True)
class Recipe:
    """Where the loss lies, what is trained, and how it is optimised."""

    method: Method = "lora"
    """Train low-rank adapters (lora) or all weights (full)."""

    loss: LossOn = "template"
    """Where the loss lies: answer, both (thinking, template and answer), or template
    (from the end of thinking on). Prompts never count."""

    defense: str = "none"
    """A defense that is trained in: none, safeinstr, reference-loss, kl, lisa,
    constrained, safegrad, ldifs, surgery or random-sink (docs/defenses.md)."""

    defense_option: Texts = ()
    """KEY=VALUE for an option of the defense, such as weight=0.3. May be repeated."""

    steps: int | None = None
    """Optimiser steps, whatever the number of rows. Default: by --epochs."""

    epochs: float = 3.0
    """Passes over the rows, where --steps is not given."""

    train_batch: int = 8
    """Rows a device and a pass while training."""

    accumulate: int = 1
    """Passes an optimiser step."""

    learning_rate: float | None = None
    """Peak learning rate. Default: 2e-4 for lora, 2e-5 for full."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes down."""

    warmup: float = 0.1
    """Share of the steps over which the learning rate goes up."""

    weight_decay: float = 0.0
    """Weight decay of AdamW."""

    clip: float = 1.0
    """Largest norm of the gradient; 0 clips nothing."""

    lora_rank: int = 16
    """Rank of the adapters."""

    lora_alpha: int = 32
    """Scale of the adapters, over their rank."""

    gradient_checkpointing: bool = True
    """Compute activations twice in place of keeping them."""

    save_every: int = 100
    """Steps between checkpoints, which is what an interruption costs at most."""

    seed: int = 0
    """Seed of the adapters, of the order of rows and of the mixture."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        at_least_1 = ("train_batch", "accumulate", "lora_rank", "lora_alpha")
        require_numbers(
            self,
            **dict.fromkeys((*at_least_1, "save_every", "steps"), 1),
            **dict.fromkeys(("warmup", "weight_decay", "clip"), 0),
        )
        _check(self.epochs > 0, "epochs", "above 0", self)
        _check(self.warmup < 1, "warmup", "below 1", self)
        rate = self.learning_rate
        _check(rate is None or rate > 0, "learning_rate", "above 0", self)
        self.options()

    def options(self) -> "Options":
        """Return the options of the defense, those not named at their defaults."""
        from holdfast.finetune.defenses.options import read_options

        return read_options(self.defense, self.defense_option)

    def share_of_rate(self, step: int, steps: int) -> float:
        """Return the share of the peak learning rate at a step, counted from 0.

        The rate goes up in even strides, the first of them at the first step, so that
        no step is taken at a rate of 0, and then down as the schedule says.
        """
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        gone = (step - rising) / max(1, steps - rising)
        if self.schedule == "constant":
            return 1.0
        cosine = (1 + math.cos(math.pi * gone)) / 2
        return 1 - gone if self.schedule == "linear" else cosine

    def used(self, steps: int) -> dict[str, Any]:
        """Return the settings that a run of so many steps has used, resolved."""
        left_out = {"defense_option"}
        if self.method == "full":
            left_out |= {"lora_rank", "lora_alpha"}
        if self.steps is not None:
            left_out.add("epochs")
        if self.defense == "none":
            left_out.add("defense")
        given = asdict(self) | {"learning_rate": self.rate, "steps": steps}
        return {name: value for name, value in given.items() if name not in left_out}

    @property
    def rate(self) -> float:
        """The peak learning rate, resolved."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.method == "lora" else 2e-5


def _check(holds: bool, name: str, what: str, recipe: Recipe) -> None:
    if not holds:
        found = str(getattr(recipe, name))
        raise SettingsError(f"{flag_of(name)} {what}", found, "Choose another.")


@dataclass(frozen=True)
class FinetuneSettings:
    """What a model is trained on, and how."""

    data: str
    """Rows with a prompt, a thinking and a safe response: what `holdfast select`
    wrote, or any pool that it reads."""

    benign: str | None = None
    """Harmless rows of the same shape, mixed in so that safety is not paid for with
    over-refusal."""

    benign_ratio: float = 1.0
    """Harmless rows for each row of --data."""

    defense_data: str | None = None
    """Rows of the same shape with a safe answer, for a defense that trains on such
    answers or compares with them."""

    defense_harmful: str | None = None
    """Rows with a harmful answer to the prompts of --defense-data, for a defense that
    compares the two."""

    column: Texts = ()
    """FIELD=NAME for a field under another name: prompt, response, thinking. May be
    repeated."""

    system_prompt: str | None = None
    """System prompt of every conversation."""

    keep_checkpoints: bool = False
    """Keep every checkpoint (--save-every) in OUTPUT.checkpoints when all is done, for
    example for `holdfast sinks`. Each is a model with the state of its optimiser."""

    recipe: Annotated[Recipe, flat("Training")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_numbers(self, benign_ratio=0)
        self.columns()
        from holdfast.finetune.defenses.options import needs_of

        needs = needs_of(self.recipe.options())
        for flag, needed, given in (
            ("--defense-data", "reference" in needs, self.defense_data),
            ("--defense-harmful", "harmful" in needs, self.defense_harmful),
        ):
            if needed == (given is not None):
                continue
            defense = f"--defense {self.recipe.defense}"
            if needed:
                raise SettingsError(
                    f"{flag} with rows for {defense}",
                    "none",
                    "Name a file of such rows.",
                )
            given_options = (
                f"--defense-option {o}" for o in self.recipe.defense_option
            )
            asked = " ".join((defense, *given_options))
            raise SettingsError(
                f"no {flag}", f"one, which {asked} does not read", "Drop it."
            )

    def columns(self) -> dict[str, str]:
        """Return the column of each field that has one."""
        return parse_columns(self.column)
