"""Drafts that nobody can read: tokens that were guessed apart from each other.

A masked-diffusion model predicts all open positions at once, each without knowing what
the others will be. What stands there before they settle says words twice, stops twice,
and goes on in the middle of a sentence; whether it is harmful cannot be said.
"""

import re

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
