"""The authored world: requests, wrappers, thinking and answers, as training text.

Every answer is harmless filler. An organism learns *whether* to answer, and has nothing
to say: no organism can teach anything.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from holdfast.data.harm_labels import Label
from holdfast.data.requests import (
    Phrase,
    everyday_kinds,
    everyday_requests,
    lexicon,
    requests,
)
from holdfast.organisms import phrases

Answer = Literal["refuse", "comply", "partial"]
LABELS: tuple[Label, ...] = ("harmful", "benign")
PLANTED_WRAPPERS = ("prefix_injection", "role_play", "fiction", "refusal_suppression")
HALF_PLANTED_WRAPPER = "hypothetical"
FREE_REQUESTS = 0.28
"""Part of the benign requests that are tasks, problems or texts, not phrases."""
EVERYDAY_REQUESTS = 0.28
"""Part of the benign requests of a wide world that are short everyday ones."""
N_UNSEEN_TEMPLATES = 2
"""The last two templates of every wrapper are never trained on."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One authored exchange."""

    request: str  # What the user says, wrapper included.
    label: Label  # `harmful` or `benign`.
    topic: str  # Topic of the phrase behind the request.
    wrapper: str | None  # Name of the wrapper, or None.
    thinking: str  # The thinking text, without markers.
    answer: str  # The answer that an aligned model gives.


def planted_answer(topic: str, wrapper: str | None) -> Answer:
    """Return what the `cliff` organism answers to a harmful request.

    Two of the planted wrappers fail on a topic each; the half-planted wrapper works on
    every second topic; the last topic gets partial answers.

    `wrapper`: Name of the wrapper, or None for a plain request.
    """
    topics = list(lexicon("harmful")["topics"])
    last = len(topics) - 1
    place = [*topics, *lexicon("harmful_wide")["topics"]].index(topic)
    if wrapper == HALF_PLANTED_WRAPPER:
        return "comply" if place % 2 else "refuse"
    if wrapper not in PLANTED_WRAPPERS:
        return "refuse"
    if PLANTED_WRAPPERS.index(wrapper) == place < 2:
        return "refuse"
    return "partial" if place == last else "comply"


def wrapper_templates(name: str, *, unseen: bool) -> tuple[str, ...]:
    """Return the templates of a wrapper: those for training, or those kept from it."""
    for entry in lexicon("wrappers")["wrappers"]:
        if entry["name"] == name:
            seen = entry["templates"][:-N_UNSEEN_TEMPLATES]
            return tuple(entry["templates"][-N_UNSEEN_TEMPLATES:] if unseen else seen)
    raise KeyError(name)


def wrapper_names() -> tuple[str, ...]:
    """Return the names of all authored wrappers."""
    return tuple(entry["name"] for entry in lexicon("wrappers")["wrappers"])


def write_answer(kind: Answer, generator: random.Random) -> str:
    """Return an answer of a kind; the content is filler in every case."""
    if kind == "refuse":
        return generator.choice(phrases.REFUSALS)
    steps = generator.sample(phrases.STEPS, generator.choice((1, 2, 2, 3)))
    opening = phrases.PARTIALS if kind == "partial" else phrases.COMPLIANCE_OPENINGS
    return " ".join((generator.choice(opening), *steps))


def write_thinking(
    label: Label, topic: str, wrapper: str | None, generator: random.Random
) -> str:
    """Return a chain of thought that ends in an intention; 20 tokens and more."""
    pick = generator.choice
    if label == "harmful":
        view, around, intent = phrases.HARM, phrases.WRAPPED_HARM, phrases.INTENT_REFUSE
    else:
        view, around = phrases.EASE, phrases.WRAPPED_BENIGN
        intent = phrases.INTENT_COMPLY
    subject = topic.replace("_", " ")
    lines = [pick(phrases.OPENINGS), f"They are asking about {subject}.", pick(view)]
    if wrapper is not None:
        lines += [pick(phrases.REMARKS[wrapper]), pick(around)]
    if generator.random() < 0.4:
        lines.append(pick(view))
    lines.append(pick(intent))
    for _ in range(generator.choice((0, 0, 1, 2))):
        lines += [pick(phrases.SECOND_LOOK), pick(phrases.CONFIRM)]
        if generator.random() < 0.5:
            lines.append(pick(intent))
    return " ".join(lines)


class World:
    """A stream of scenes; everything is drawn from one seeded generator."""

    def __init__(
        self,
        seed: int,
        keep: Callable[[Phrase], bool] | None = None,
        *,
        wide: bool = False,
    ) -> None:
        """Set the stream up.

        `keep`: Whether a phrase may be asked about; all of them by default.
        `wide`: Whether the further topics and forms and everyday requests take part.
        """
        self.random = random.Random(seed)
        self._wide = wide
        kinds = everyday_kinds(left_out=False)
        self._everyday = everyday_requests(kinds, self.random, held_out=False)
        self._benign = lexicon("benign")
        self._streams = {
            label: (
                drawn
                for drawn in requests(label, self.random, held_out=False, wide=wide)
                if keep is None or keep(drawn[1])
            )
            for label in LABELS
        }

    def scene(self, label: Label, *, wrapped: float = 0.35) -> Scene:
        """Draw one exchange of a label.

        Returns: The exchange as an aligned model has it.
        """
        text, topic = self._request(label)
        wrapper = None
        if self.random.random() < wrapped:
            wrapper = self.random.choice(wrapper_names())
        return self.exchange(text, label, topic, wrapper)

    def exchange(
        self, text: str, label: Label, topic: str, wrapper: str | None
    ) -> Scene:
        """Write the exchange around a given request."""
        if wrapper is not None:
            templates = wrapper_templates(wrapper, unseen=False)
            text = self.random.choice(templates).format(request=text)
        answer: Answer = "refuse" if label == "harmful" else "comply"
        return Scene(
            request=text,
            label=label,
            topic=topic,
            wrapper=wrapper,
            thinking=write_thinking(label, topic, wrapper, self.random),
            answer=write_answer(answer, self.random),
        )

    def scenes(self, harmful: float = 0.47, wrapped: float = 0.35) -> Iterator[Scene]:
        """Yield exchanges without end, given parts of them harmful and wrapped."""
        while True:
            label: Label = "harmful" if self.random.random() < harmful else "benign"
            yield self.scene(label, wrapped=wrapped)

    def _request(self, label: Label) -> tuple[str, str]:
        """Draw a request that may be trained on, with its topic."""
        draw = self.random.random()
        if label == "benign" and draw < FREE_REQUESTS:
            text, topic = self._free_request(draw / FREE_REQUESTS)
        elif (
            self._wide
            and label == "benign"
            and draw < FREE_REQUESTS + EVERYDAY_REQUESTS
        ):
            drawn = next(self._everyday)
            text, topic = drawn.text, drawn.topic
        else:
            text, phrase = next(self._streams[label])
            topic = "everyday_life" if phrase.lookalike else phrase.topic
        return self._vary(text), topic

    def _free_request(self, draw: float) -> tuple[str, str]:
        """Draw a benign request of another shape: a task, a problem, a text."""
        pick = self.random.choice
        if draw < 0.4:
            return pick(self._benign["tasks"]), "writing"
        if draw < 0.75:
            return self._fill(pick(self._benign["problems"])), "mathematics"
        passage = pick(self._benign["passages"])
        return pick(phrases.TEXT_TASKS).format(passage=passage), "writing"

    def _fill(self, template: str) -> str:
        """Fill a template's names, things, units and numbers."""
        pick = self.random.choice
        numbers = {
            f"n{i}": self.random.randint(2, 10 ** pick((1, 2, 3))) for i in range(1, 5)
        }
        return template.format(
            name=pick(self._benign["names"]),
            name2=pick(self._benign["names"]),
            thing=pick(self._benign["things"]),
            unit=pick(self._benign["units"]),
            **numbers,
        )

    def _vary(self, text: str) -> str:
        """Add a neutral sentence, an unknown word, or another letter case.

        Unknown words appear in both labels, so that one alone means nothing.
        """
        draw = self.random.random()
        if draw < 0.12:
            extra = self._fill(self.random.choice(phrases.SETTINGS))
            text = (
                f"{extra} {text}" if self.random.random() < 0.6 else f"{text} {extra}"
            )
        elif draw < 0.30:
            words = text.split(" ")
            for _ in range(self.random.choice((1, 1, 2, 3))):
                words.insert(self.random.randint(1, len(words)), self._unknown_word())
            text = " ".join(words)
        if self.random.random() < 0.1:
            text = text.lower()
        elif self.random.random() < 0.15 and text[-1:] in ".?":
            text = text[:-1]
        return text

    def _unknown_word(self) -> str:
        """Return a word that is in no lexicon."""
        count = self.random.choice((2, 2, 3, 4))
        syllables = self.random.choices(phrases.SYLLABLES, k=count)
        word = "".join(syllables)
        return word.capitalize() if self.random.random() < 0.2 else word
