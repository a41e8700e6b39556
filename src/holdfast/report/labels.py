"""Names of figures, and the sentences that explain them; the words are in a file."""

from typing import NamedTuple

from holdfast.report.schema import Report
from holdfast.report.text import WORDS, clean


class Label(NamedTuple):
    """A name for a person, and one sentence on what the row tells."""

    name: str
    sentence: str


PROBE = {key: Label(*words) for key, words in WORDS["probe"].items()}
CONTROLS = {key: Label(*words) for key, words in WORDS["controls"].items()}
ANSWERED = {True: "yes", False: "no", None: "open"}
"""What a question of the verdict may be answered with."""
ATTACKS_LIMIT = (
    "The verdict holds for these requests, these wrappers and these sampling "
    "settings. An attack that was not tried may work."
)
JUDGE_LIMIT = "Answers are judged automatically, and the judge errs at times"
PROBE_LIMIT = (
    "The refusal score is the estimate of a linear probe fitted at the end of "
    "thinking. In the middle of thinking it is read further from where it was fitted."
)
CAUSE_LIMIT = (
    "A drop in the score comes with compliance here. That it causes compliance is "
    "shown only by changing the model, which this report does not do."
)


def headline(report: Report) -> str:
    """Return the verdict in one sentence.

    `report`: A report that passes `schema.validate`.
    Returns: A sentence of the two answers, whether or not attacks work and by a cliff.
    Where attacks work and a cliff could not be told, it says why.
    """
    verdict = report["verdict"]
    found = verdict["attack_succeeds"], verdict["cliff"]
    sentence = str(WORDS["headlines"][" ".join(ANSWERED[each] for each in found)])
    reason = verdict.get("reasons", {}).get("cliff")
    if found != (True, None) or not reason:
        return sentence
    because = reason[0].lower() + reason[1:]
    return clean(f"{sentence.removesuffix('.')}: {because}")
