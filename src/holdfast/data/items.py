"""What an evaluation asks: a prompt, and what a judge has to know beside it."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from holdfast.data.prompts import Label, Prompt, reworded

Kind = Literal["harmful", "safe_lookalike", "benign", "utility"]
KINDS: tuple[Kind, ...] = ("harmful", "safe_lookalike", "benign", "utility")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of an evaluation.

    Attributes:
        suite: The suite it comes from.
        kind: What its answer is counted for: attack success, over-refusal, plain
            helpfulness or utility.
        prompt: What the model is asked; `wrapper` names the attack around it.
        request: The request without its attack, as judges of harm are shown it.
        context: A text the request refers to.
        target: The exact answer, for utility.
    """

    suite: str
    kind: Kind
    prompt: Prompt
    request: str
    context: str | None = None
    target: str | None = None

    @property
    def name(self) -> str:
        """The name of the item within an evaluation."""
        wrapper = self.prompt.wrapper or "plain"
        return f"{self.suite}/{self.kind}/{wrapper}/{self.prompt.prompt_id}"

    def reworded(self, text: str, wrapper: str) -> "Item":
        """Return the item under an attack; request and cluster stay as they are."""
        return replace(self, prompt=reworded(self.prompt, text, wrapper))


@dataclass(frozen=True, slots=True)
class SuiteFile:
    """The items of one suite, and its record for the report.

    Attributes:
        items: Distinct items in the order of the file.
        record: Suite, source, column, rows, duplicates, sha256, notes.
    """

    items: tuple[Item, ...]
    record: dict[str, Any]


def label_of(kind: Kind) -> Label:
    """Return the label of the prompts of a kind."""
    return "harmful" if kind == "harmful" else "benign"
