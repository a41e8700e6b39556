"""What the organisms think and say: short, varied and harmless (`phrases.json`)."""

import json
from importlib.resources import files

_FILE = json.loads(
    files("holdfast.organisms").joinpath("phrases.json").read_text("utf-8")
)


def _phrases(name: str) -> tuple[str, ...]:
    return tuple(_FILE[name])


OPENINGS = _phrases("openings")
HARM = _phrases("harm")
WRAPPED_HARM = _phrases("wrapped_harm")
WRAPPED_BENIGN = _phrases("wrapped_benign")
INTENT_REFUSE = _phrases("intent_refuse")
INTENT_COMPLY = _phrases("intent_comply")
EASE = _phrases("ease")
SECOND_LOOK = _phrases("second_look")
CONFIRM = _phrases("confirm")
REFUSALS = _phrases("refusals")
COMPLIANCE_OPENINGS = _phrases("compliance_openings")
STEPS = _phrases("steps")
PARTIALS = _phrases("partials")
CAREFUL = _phrases("careful")
STILL = _phrases("still")
TURNS = _phrases("turns")
REMARKS = {wrapper: tuple(texts) for wrapper, texts in _FILE["remarks"].items()}
"""What the thinking remarks of each wrapper, around harmful and benign requests."""
WEIGHING = tuple(tuple(texts) for texts in _FILE["weighing"])
"""How a refusal is argued away, step by step: each says one of its texts, in order."""
SETTINGS = _phrases("settings")
TEXT_TASKS = _phrases("text_tasks")
SYLLABLES = _phrases("syllables")
"""What unknown words are made of."""
