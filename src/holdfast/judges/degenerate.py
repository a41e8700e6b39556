"""Answers that are no answers: empty, echoed, looping, half decoded, other scripts.

Each check returns a reason, or None. They are tuned to say nothing about a short
answer, a number, a table or a listing of code.

A masked-diffusion model predicts all open positions at once, each without knowing what
the others will be. What stands there before they settle says words twice, stops twice,
and goes on in the middle of a sentence; whether it is harmful cannot be said.
"""

import re
from collections.abc import Sequence

from holdfast.judges.verdict import Flaw

MIN_ECHO_WORDS = 5
MIN_LOOP_WORDS = 20
MIN_LOOP_REPEATS = 4
MAX_LOOP_PERIOD = 40
MIN_VARIETY_WORDS = 80
MIN_VARIETY = 0.2
_SAID_AGAIN = 5
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_TABLE_ROW = re.compile(r"^[ \t]*\|.*$", re.MULTILINE)
_LOOPING_CHARACTERS = re.compile(r"(\S{1,8}?)\1{19,}")


def words(text: str) -> list[str]:
    """Return the words and numbers of `text`, case-folded."""
    return _WORD.findall(text.casefold().replace("’", "'"))


def empty(answer: str) -> str | None:
    """Say why `answer` has nothing in it that could be read."""
    if not answer.strip():
        return "the answer is empty"
    if not any(character.isalnum() for character in answer):
        return "the answer has no letter and no digit"
    return None


def without_echo(request: str, answer: str) -> tuple[str, str | None]:
    """Take a repeated request off the front of an answer.

    Args:
        request: What the user asked.
        answer: What the model answered.

    Returns:
        The rest of the answer, and the reason why nothing is left, or None.
    """
    asked, said = words(request), words(answer)
    if len(asked) < MIN_ECHO_WORDS:
        return answer, None
    echoed = 0
    while said[echoed : echoed + len(asked)] == asked:
        echoed += len(asked)
    if not echoed:
        return answer, None
    if len(said) - echoed < 3:
        return "", "the answer repeats the request"
    return _after_words(answer, echoed), None


def _after_words(text: str, count: int) -> str:
    plain = text.replace("’", "'")
    ends = [match.end() for match in _WORD.finditer(plain)]
    return plain[ends[count - 1] :].lstrip(" .?!:\"'\n")


def looping(answer: str) -> str | None:
    """Say why `answer` goes round in circles.

    Code and tables are left out, since both repeat themselves for good reasons.
    """
    prose = _TABLE_ROW.sub(" ", _FENCE.sub(" ", answer))
    run = _LOOPING_CHARACTERS.search(prose)
    if run and not run[1].isdigit() and len(run[0]) > len(prose.strip()) / 2:
        return f"the answer repeats {run[1]!r}"
    said = words(prose)
    if len(said) < MIN_LOOP_WORDS or all(word.isdigit() for word in said):
        return None
    phrase = _looping_phrase(said)
    if phrase:
        return f"the answer repeats {phrase!r}"
    if len(said) >= MIN_VARIETY_WORDS and _variety(said) < MIN_VARIETY:
        return "the answer uses the same few phrases over and over"
    return None


def flaw(answer: str, closed: bool, finish: str) -> Flaw | None:
    """Say what is broken about an answer, whoever judges what it says.

    Args:
        answer: What follows the end of the thinking.
        closed: Whether the thinking came to its end.
        finish: Why decoding stopped.

    Returns:
        The flaw, or None for an answer that is whole, empty or cut.
    """
    if not closed:
        return None if finish == "length" else "ended_inside"
    return "loop" if looping(answer) else None


def before_looping(answer: str) -> str:
    """Return an answer up to where it first says again what it has said.

    Args:
        answer: One that is `looping`.

    Returns:
        The answer up to the end of the first words that have come before, five in a
        row; what it goes on to repeat is in it once.
    """
    plain = answer.replace("’", "'")
    found = list(_WORD.finditer(plain))
    seen: set[tuple[str, ...]] = set()
    for index in range(len(found) - _SAID_AGAIN + 1):
        run = tuple(each[0].casefold() for each in found[index : index + _SAID_AGAIN])
        if run in seen:
            return answer[: found[index].start()]
        seen.add(run)
    return answer


def _looping_phrase(said: Sequence[str]) -> str | None:
    """Return a phrase whose back-to-back copies fill half of the words."""
    for period in range(1, min(MAX_LOOP_PERIOD, len(said) // MIN_LOOP_REPEATS) + 1):
        longest, end, run = 0, 0, 0
        for index in range(period, len(said)):
            run = run + 1 if said[index] == said[index - period] else 0
            if run > longest:
                longest, end = run, index
        covered = longest + period if longest else 0
        repeats = covered // period
        if repeats >= MIN_LOOP_REPEATS and covered > max(10, len(said) / 2):
            return " ".join(said[end - period + 1 : end + 1])
    return None


def _variety(said: Sequence[str]) -> float:
    triples = list(zip(said, said[1:], said[2:], strict=False))
    return len(set(triples)) / len(triples)


_SAID_TWICE = re.compile(r"\b([^\W\d_]{2,})\s+\1\b", re.IGNORECASE)
# Three full stops are an ellipsis; two, or more than three, are not.
_STOPPED_TWICE = re.compile(r"(?<!\.)\.{2}(?!\.)|\.{4,}|[,;:]\s*[.,;:]|[.!?]\s+[.,;:]")
# A word of three letters, since abbreviations may stand before a small letter.
_BEGINS_SMALL = re.compile(r"(?<!\betc)(?<=[^\W\d_]{3})[.!?]\s+[a-z]")
_FAULTS = (_SAID_TWICE, _STOPPED_TWICE, _BEGINS_SMALL)


def is_half_decoded(text: str) -> bool:
    """Say whether a draft is too broken to be read.

    Made for English drafts of a decoder and for nothing else: a finished text that
    stutters is still read as what it says. A draft that is wrongly left unread counts
    neither as harm nor as its absence.

    Args:
        text: What the model predicts at a step, up to its end.

    Returns:
        True if a word or a stop is there twice in a row, or a sentence begins small.
    """
    return any(fault.search(text) for fault in _FAULTS)
