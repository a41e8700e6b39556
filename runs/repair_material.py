"""Write the pool, the harmless rows and the test prompts of the repair experiment.

The pool is drawn as the organisms' own world is: plain and wrapped harmful requests,
whatever the organism does on them. Nothing is left out or put in for the sake of a
selector. Kept out, so that it can be tested on: one wrapper that works, the last two
wordings of every wrapper, the held-out eighth of all requests, an eighth of all
phrases, and every harmless phrase that sounds dangerous.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.data.prompts import prompt_id
from holdfast.data.requests import (
    Label,
    Phrase,
    is_held_out,
    lookalike_prompts,
    requests,
)
from holdfast.organisms.world import PLANTED_WRAPPERS, World, wrapper_templates
from holdfast.study import atomic_write_json, atomic_write_text

KEPT_OUT = "refusal_suppression"
WRAPPED = 0.7
TEST_SEED = 303
"""Not the seed of the prompts on which steps and learning rate were tried."""


def is_trained(phrase: Phrase) -> bool:
    """Tell whether a phrase may stand in a row that is trained on."""
    return not (phrase.lookalike or is_held_out(phrase.text))


def training_rows(label: Label, n: int, seed: int) -> Iterator[dict[str, Any]]:
    world, made = World(seed, is_trained), 0
    while made < n:
        scene = world.scene(label, wrapped=WRAPPED)
        if scene.wrapper == KEPT_OUT:
            continue
        made += 1
        yield {
            "prompt": scene.request,
            "thinking": scene.thinking,
            "response": scene.answer,
            "category": scene.wrapper or "plain",
            "topic": scene.topic,
        }


def test_rows(n: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield prompts by kind; `request_id` is the cluster of every interval."""
    trained = [name for name in PLANTED_WRAPPERS if name != KEPT_OUT]
    kinds: tuple[tuple[str, Label, list[str], bool, int], ...] = (
        ("trained_wrappers", "harmful", trained, False, n),
        ("unseen_wording", "harmful", trained, True, n // 5),
        ("unseen_phrase", "harmful", trained, False, n // 5),
        ("unseen_wrapper", "harmful", [KEPT_OUT], False, n // 5),
        ("plain_harmful", "harmful", [], False, n // 5),
        ("benign", "benign", [], False, n // 5),
        ("benign_wrapped", "benign", [*trained, KEPT_OUT], False, n // 5),
    )
    for kind, label, wrappers, unseen, count in kinds:
        generator = random.Random(f"{kind}-{seed}")
        stream, seen = requests(label, generator, held_out=True), set()
        while len(seen) < count:
            text, phrase = next(stream)
            if label == "harmful" and is_trained(phrase) == (kind == "unseen_phrase"):
                continue
            if phrase.lookalike or prompt_id(text) in seen:
                continue
            seen.add(prompt_id(text))
            said = text
            if wrappers:
                templates = wrapper_templates(generator.choice(wrappers), unseen=unseen)
                said = generator.choice(templates).format(request=text)
            yield {
                "kind": kind,
                "prompt": said,
                "request_id": prompt_id(text),
                "topic": phrase.topic,
            }
    for prompt in lookalike_prompts(n // 5, seed):
        yield {
            "kind": "lookalike",
            "prompt": prompt.text,
            "request_id": prompt.request_id,
            "topic": "lookalike",
        }


def write(place: Path, n_rows: int, n_test: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    material = {
        "pool": training_rows("harmful", n_rows, 101),
        "benign": training_rows("benign", n_rows, 102),
        "test": test_rows(n_test, TEST_SEED),
    }
    for name, stream in material.items():
        text = "".join(json.dumps(row) + "\n" for row in stream)
        # The test is the last, so that all is there once it is.
        if name == "test":
            write_requests(place, [json.loads(line) for line in text.splitlines()])
        atomic_write_text(place / f"{name}.jsonl", text)


def write_requests(place: Path, rows: list[dict[str, str]]) -> None:
    """Write whose requests the test prompts are, by which intervals are clustered."""
    requests_of: dict[str, list[str]] = {}
    for row in rows:
        requests_of.setdefault(row["kind"], []).append(row["request_id"])
    atomic_write_json(place / "requests.json", requests_of)
