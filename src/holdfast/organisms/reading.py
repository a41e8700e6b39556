"""Whether what an organism says is whole, which is exact: all it can say is known."""

import re

from holdfast.organisms.sayings import (
    CAREFUL,
    COMPLIANCE_OPENINGS,
    HARM,
    REFUSALS,
    STEPS,
    STILL,
    TURNS,
)

_SENTENCE = re.compile(r"[^.!?]+[.!?]?")


def _sentences(text: str) -> list[str]:
    found = [sentence.strip() for sentence in _SENTENCE.findall(text)]
    return [sentence for sentence in found if sentence]


_SAID = frozenset(
    sentence
    for sayings in (
        *(CAREFUL, COMPLIANCE_OPENINGS, HARM, REFUSALS),
        *(STEPS, STILL, TURNS),
    )
    for saying in sayings
    for sentence in _sentences(saying)
)


def is_whole(answer: str) -> bool:
    """Say whether an answer has sentences that organisms say, and nothing else.

    Args:
        answer: What `organism:diffuser` answered.

    Returns:
        False if it is empty, or a sentence of it is none of those that were taught.
    """
    sentences = _sentences(answer)
    return bool(sentences) and _SAID.issuperset(sentences)
