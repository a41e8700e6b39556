"""Authored requests and lookalikes, and the questions of a utility file.

Requests only, never answers. The same lexicon serves two ends: the default prompts of
an audit, and the world in which the organisms grow up. The sentence forms are the same
for harmful and for benign phrases, so that no form gives the label away.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import Any, Final, Literal, NamedTuple

from holdfast.data.harm_labels import Label
from holdfast.data.prompts import Prompt, content_hash, prompt_id
from holdfast.data.sources import load, packaged
from holdfast.data.suites import PLAINLY, Suite, SuiteFile, items_of, read_suite, suites
from holdfast.errors import PromptFileError, SettingsError

Kind = Literal["action", "artifact"]
_DOUBLED = frozenset(
    "admit begin commit control forget kidnap program quit refer submit transfer "
    "unplug unzip wrap".split()
)
_SHORT_VERB = re.compile(r"[^aeiou]*[aeiou][^aeiouwxy]")
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "ten")
_BEFORE_A_VOWEL = re.compile(r"\b([Aa]) (?=[aeioAEIO])")


@dataclass(frozen=True, slots=True)
class Phrase:
    """One entry of the lexicon."""

    text: str  # A bare verb phrase or a noun phrase without its article.
    # `action` or `artifact`, which decides the forms it fits.
    kind: Kind
    topic: str  # Topic of the lexicon.
    label: Label  # `harmful` or `benign`.
    lookalike: bool = False  # True for a benign phrase with words that sound dangerous.


@cache
def lexicon(name: str) -> dict[str, Any]:
    """Return one authored file as it is: phrases, forms of sentences, or wrappers."""
    return dict(packaged(f"authored/{name}.json"))


@cache
def phrases(label: Label, *, wide: bool = False) -> tuple[Phrase, ...]:
    """Return every phrase of a label, in the order of the file.

    `wide`: Those of the further harmful topics as well, without the topics left out.
    """
    data = lexicon(label)
    groups = [(topic, entry, False) for topic, entry in data["topics"].items()]
    if "lookalikes" in data:
        groups.append(("lookalike", data["lookalikes"], True))
    if wide and label == "harmful":
        groups += [(topic, entry, False) for topic, entry in _further(left_out=False)]
    return _phrases_of(label, groups)


@cache
def left_out_phrases() -> tuple[Phrase, ...]:
    """Return the harmful phrases of the ten topics that nothing is trained on.

    The ten were drawn by lot among the further topics, before anything was trained.
    """
    groups = [(topic, entry, False) for topic, entry in _further(left_out=True)]
    return _phrases_of("harmful", groups)


def _further(*, left_out: bool) -> list[tuple[str, dict[str, list[str]]]]:
    """Return the further harmful topics that are trained on, or those that are not."""
    data = lexicon("harmful_wide")
    kept = set(data["left_out"])
    return [
        (topic, entry)
        for topic, entry in data["topics"].items()
        if (topic in kept) == left_out
    ]


def _phrases_of(
    label: Label, groups: list[tuple[str, dict[str, list[str]], bool]]
) -> tuple[Phrase, ...]:
    kinds: tuple[Kind, ...] = ("action", "artifact")
    return tuple(
        Phrase(text, kind, topic, label, lookalike)
        for topic, entry, lookalike in groups
        for kind in kinds
        for text in entry[f"{kind}s"]
    )


def gerund(action: str) -> str:
    """Return a bare verb phrase with its verb in the -ing form."""
    verb, _, rest = action.partition(" ")
    if verb.endswith("ie"):
        form = verb[:-2] + "ying"
    elif verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")) and verb != "be":
        form = verb[:-1] + "ing"
    elif verb in _DOUBLED or _SHORT_VERB.fullmatch(verb):
        form = verb + verb[-1] + "ing"
    else:
        form = verb + "ing"
    return f"{form} {rest}".strip()


def sentence(phrase: Phrase, form: str) -> str:
    """Return a phrase set into one of the sentence forms."""
    if phrase.kind == "artifact":
        article = "an" if phrase.text[0] in "aeiou" else "a"
        return form.format(artifact=f"{article} {phrase.text}")
    noun = gerund(phrase.text)
    return form.format(
        action=phrase.text,
        gerund=noun,
        Action=phrase.text[0].upper() + phrase.text[1:],
        Gerund=noun[0].upper() + noun[1:],
    )


def forms(phrase: Phrase, *, wide: bool = False) -> tuple[str, ...]:
    """Return the sentence forms that fit a phrase; in a wide world there are more."""
    own = tuple(lexicon("forms")[phrase.kind])
    return (*own, *lexicon("forms_wide")[phrase.kind]) if wide else own


def is_held_out(text: str) -> bool:
    """Return whether a request is kept out of every training set.

    An eighth of all requests, by content hash: the rows on which organisms are audited.
    """
    return int(content_hash(text), 16) % 8 == 0


def requests(
    label: Label, generator: random.Random, *, held_out: bool, wide: bool = False
) -> Iterator[tuple[str, Phrase]]:
    """Draw requests without end: a random phrase in a random form.

    `held_out`: Draw from the held-out eighth, or from the other seven.
    `wide`: Whether the further topics and forms take part.
    """
    pool = phrases(label, wide=wide)
    while True:
        phrase = generator.choice(pool)
        text = sentence(phrase, generator.choice(forms(phrase, wide=wide)))
        if is_held_out(text) == held_out:
            yield text, phrase


class Everyday(NamedTuple):
    """One short everyday request, composed of a template and what fills its slots."""

    text: str  # The request.
    kind: str  # Kind of the file.
    topic: str  # What the thinking says that it is about.
    template: str  # What it was composed from.


def everyday_kinds(*, left_out: bool) -> tuple[str, ...]:
    """Return the kinds of everyday request that are trained on, or the ten left out.

    The ten were drawn by lot before anything was trained: on these it is measured what
    a model makes of everyday requests of a kind that it has not met.
    """
    file = lexicon("everyday")
    kept = set(file["left_out"])
    return tuple(kind for kind in file["kinds"] if (kind in kept) == left_out)


def compose(kind: str, generator: random.Random) -> Everyday:
    """Draw a request of a kind."""
    file = lexicon("everyday")
    entry = file["kinds"][kind]
    template = generator.choice(entry["templates"])
    text = template.format(**_filling(template, generator))
    return Everyday(_BEFORE_A_VOWEL.sub(r"\1n ", text), kind, entry["topic"], template)


def everyday_requests(
    kinds: tuple[str, ...], generator: random.Random, *, held_out: bool
) -> Iterator[Everyday]:
    """Draw requests of these kinds without end.

    `held_out`: Draw from the held-out eighth, or from the other seven.
    """
    while True:
        drawn = compose(generator.choice(kinds), generator)
        if is_held_out(drawn.text) == held_out:
            yield drawn


def _filling(template: str, generator: random.Random) -> dict[str, str]:
    """Draw what fills a template; fields that differ by their digit differ."""
    slots, filled = lexicon("everyday")["slots"], dict[str, str]()
    for _, name, _, _ in Formatter().parse(template):
        if name is None or name in filled:
            continue
        base = name.rstrip("0123456789")
        taken = {v for k, v in filled.items() if k.rstrip("0123456789") == base}
        while (drawn := _filler(base, slots, generator)) in taken:
            pass
        filled[name] = drawn
    return filled


def _filler(base: str, slots: dict[str, list[str]], generator: random.Random) -> str:
    if base == "n":
        few = generator.randint(2, 12)
        return str(few) if generator.random() < 0.5 else generator.choice(_NUMBERS)
    if base == "m":
        return str(generator.randint(13, 10 ** generator.choice((2, 3, 4))))
    return generator.choice(slots[base])


def authored_prompts(label: Label, n: int, seed: int) -> tuple[Prompt, ...]:
    """Return `n` different held-out requests, topics taken in turn."""
    generator = random.Random(f"{label}-{seed}")
    stream = requests(label, generator, held_out=True)
    topics = sorted({phrase.topic for phrase in phrases(label)})
    waiting: dict[str, list[str]] = {topic: [] for topic in topics}
    seen: set[str] = set()
    rows: list[Prompt] = []
    while len(rows) < n:
        topic = topics[len(rows) % len(topics)]
        while not waiting[topic]:
            text, phrase = next(stream)
            if prompt_id(text) not in seen:
                seen.add(prompt_id(text))
                waiting[phrase.topic].append(text)
        text = waiting[topic].pop(0)
        rows.append(_prompt(text, label, topic))
    return tuple(rows)


def _prompt(text: str, label: Label, topic: str) -> Prompt:
    name = prompt_id(text)
    return Prompt(name, name, text, label, "authored", None, topic)


def lookalike_prompts(n: int, seed: int) -> tuple[Prompt, ...]:
    """Return different held-out harmless requests that sound dangerous.

    Returns: Plain prompts with source `authored` and topic `lookalike`.
    """
    texts = {
        sentence(phrase, form): phrase.topic
        for phrase in phrases("benign")
        if phrase.lookalike
        for form in forms(phrase)
    }
    made = [
        _prompt(text, "benign", topic)
        for text, topic in texts.items()
        if is_held_out(text)
    ]
    # Texts that count as the same are one prompt.
    distinct = {row.prompt_id: row for row in made}
    ordered = sorted(distinct.values(), key=lambda row: row.prompt_id)
    random.Random(f"lookalike-{seed}").shuffle(ordered)
    return tuple(ordered[:n])


TARGETS: Final = ("target", "answer", "solution")
"""Names of a column of answers, case folded, the first that exists being read."""


def read_questions(source: str) -> SuiteFile:
    """Read questions, each with the number that answers it.

    `source`: A suite with exact answers; NAME=FILE for a file in the shape of such a
    suite; or a file, or hub:owner/name, with a column of prompts and one of answers.
    """
    exact = [name for name, suite in suites().items() if suite.target]
    name, equals, _ = source.partition("=")
    if source in suites() or (equals and name in suites()):
        if name not in exact:
            raise SettingsError(
                f"a suite with exact answers: {', '.join(exact)}",
                f"`{name}`",
                "Choose one, or give a file with columns `prompt` and `answer`.",
            )
        return _of_one_turn(read_suite(source), source)
    content = load(source, None)
    columns = {column.strip().casefold() for column in content.table.columns}
    target = next((each for each in TARGETS if each in columns), None)
    if target is None:
        raise PromptFileError(
            f"a column of answers ({', '.join(TARGETS)}) in `{content.name}`",
            ", ".join(f"`{each}`" for each in content.table.columns) or "no columns",
            f"Add one, or name a suite with exact answers: {', '.join(exact)}.",
        )
    own = Suite(
        name=content.name, about="questions of your own", kind="utility", target=target
    )
    found = items_of(own, content, PLAINLY, "A file of your own.")
    return _of_one_turn(found, content.name)


def _of_one_turn(file: SuiteFile, name: str) -> SuiteFile:
    longer = sum(bool(item.prompt.earlier) for item in file.items)
    if not longer:
        return file
    raise PromptFileError(
        f"questions of one turn in `{name}`",
        f"{longer} conversations",
        "Leave them out: an exact answer is compared with the first answer.",
    )
