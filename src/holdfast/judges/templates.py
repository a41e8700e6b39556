"""Prompts of judges: guard models that are known by name, and texts filled in safely.

Prompts lie byte for byte in `templates.json`, each with the place it was read at, and
how a guard is asked and understood in `guards.json`. A guard whose tokenizer brings a
chat template is asked by that template; ours is what stands in for it, and a test holds
the two equal where both are known.

Llama Guard 4 has no text of ours: its prompt could not be read from a source that
shows every byte of it, so only the template of its own tokenizer will do. The lines of
WildGuard's reply are read by their place, like its authors' code does, not by what
stands before the colon; ShieldGemma's guidelines are those of Google's notebook as
several repositories copy it; "Controversial" of Qwen3Guard is not unsafe: the loose
reading of its authors.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from holdfast.errors import SettingsError
from holdfast.judges.base import Measures


@dataclass(frozen=True, slots=True)
class Question:
    """One question that a guard answers in its reply."""

    # Finds the answer; its first group is the word that says it.
    pattern: re.Pattern[str]
    yes: tuple[str, ...]  # Words that mean yes (harmful, or refused).
    no: tuple[str, ...]  # Words that mean no.


@dataclass(frozen=True, slots=True)
class GuardTemplate:
    """How one family of guard models is asked and understood."""

    # For `--judge-template`; a model whose name has it in it is recognised.
    name: str
    harm: Question  # Whether the response is harmful.
    max_tokens: int  # Tokens within which a reply is complete.
    # Name of the stored text; None if only the model's own will do.
    published: str | None
    # Whether the response is a refusal, where the guard says so.
    refusal: Question | None = None
    # Name of the stored text for requests with a context.
    contextual: str | None = None
    # Whether the chat template of the tokenizer goes before our text.
    own_chat: bool = False
    # Whether that template has to be told to open a reply.
    generation_prompt: bool = False
    add_bos: bool = False  # Whether our text leaves the first token to the tokenizer.
    # What a completion must not say, beside special tokens.
    markers: tuple[str, ...] = ()
    # Policies that are asked about one by one; the worst counts.
    guidelines: tuple[str, ...] = ()
    # Whether only the very words count, not variants in case and spacing.
    exact: bool = False

    @property
    def measures(self) -> Measures:
        """What the outcomes of this guard tell apart."""
        return "harm" if self.refusal is None else "refusal and harm"


def _stored(name: str) -> Any:
    return json.loads(files("holdfast.judges").joinpath(name).read_text("utf-8"))


def _template(record: dict[str, Any]) -> GuardTemplate:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in record.items()
    }
    for key in {"harm", "refusal"} & record.keys():
        asked = record[key]
        words = (tuple(asked[answer]) for answer in ("yes", "no"))
        fields[key] = Question(re.compile(asked["pattern"]), *words)
    return GuardTemplate(**fields)


GUARDS = {record["name"]: _template(record) for record in _stored("guards.json")}


def guard_template(model: str, name: str | None = None) -> GuardTemplate:
    """Return the template of a guard, by its own name or by that of the model.

    `name`: Name of the template; None to recognise the model.
    """
    if name is not None:
        if name in GUARDS:
            return GUARDS[name]
        raise SettingsError(
            f"a guard template: {', '.join(GUARDS)}",
            name,
            "Choose one of them with --judge-template.",
        )
    spelled = model.lower().replace("_", "-")
    for known, template in GUARDS.items():
        if known in spelled:
            return template
    raise SettingsError(
        f"a guard model that is known by name ({', '.join(GUARDS)})",
        model,
        "Say which of them it is with --judge-template.",
    )


GENERIC_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|eot|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|header_start|>"),
    *("<|header_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<start_of_turn>"),
    *("<end_of_turn>", "<s>", "</s>", "<bos>", "<eos>", "<think>", "</think>"),
)
"""Turn markers of common templates, for judges whose tokenizer is out of reach."""


class Published(NamedTuple):
    """A prompt template as it was published, and where it was read."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@cache
def published(name: str) -> Published:
    """Return a published template by name, byte for byte."""
    stored = _stored("templates.json")[name]
    return Published("\n".join(stored["lines"]), stored["source"])


def fill(template: str, **slots: str) -> str:
    """Fill the slots of a template in one pass.

    Braces elsewhere, and slot names inside what is filled in, stay as they are.

    `template`: Text with slots such as `{request}`.
    """
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in slots))
    return pattern.sub(lambda found: slots[found[0][1:-1]], template)


def break_markers(text: str, markers: tuple[str, ...]) -> tuple[str, int]:
    """Break up every marker in a text by a space after its first character.

    `markers`: What must not occur, compared without regard to case.
    """
    longest_first = sorted(set(markers), key=lambda marker: (-len(marker), marker))
    if not longest_first:
        return text, 0
    pattern = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
    total = 0
    # Breaking one marker may bring the parts of another together, as in
    # "<<|x|>|x|>"; each round makes the text longer between its characters, and a
    # broken marker never matches again, so this ends.
    while True:
        text, count = pattern.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        if not count:
            return text, total
        total += count
