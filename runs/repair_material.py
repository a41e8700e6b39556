"""Write the pool, the harmless rows and the test prompts of the repair experiment.

Usage: repair_material.py FOLDER [ROWS] [TEST]

The pool is drawn as the organisms' own world is: plain and wrapped harmful requests,
whatever the organism does on them. Nothing is left out or put in for the sake of a
selector. One wrapper that works is kept out of the pool, and so are the last two
wordings of every wrapper and the held-out eighth of all requests.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.data.lookalikes import lookalike_prompts
from holdfast.data.prompts import prompt_id
from holdfast.data.requests import Label, requests
from holdfast.organisms.world import PLANTED_WRAPPERS, World, wrapper_templates

KEPT_OUT = "refusal_suppression"
WRAPPED = 0.7


def training_rows(label: Label, n: int, seed: int) -> Iterator[dict[str, Any]]:
    world, made = World(seed), 0
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
        ("unseen_wording", "harmful", trained, True, n),
        ("unseen_wrapper", "harmful", [KEPT_OUT], False, n // 4),
        ("plain_harmful", "harmful", [], False, n // 4),
        ("benign", "benign", [], False, n // 4),
        ("benign_wrapped", "benign", [*trained, KEPT_OUT], False, n // 4),
    )
    for kind, label, wrappers, unseen, count in kinds:
        generator = random.Random(f"{kind}-{seed}")
        stream, seen = requests(label, generator, held_out=True), set()
        while len(seen) < count:
            text, phrase = next(stream)
            if prompt_id(text) in seen:
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
    for prompt in lookalike_prompts(n // 4, seed):
        yield {
            "kind": "lookalike",
            "prompt": prompt.text,
            "request_id": prompt.request_id,
            "topic": "lookalike",
        }


def main(folder: str, rows: str = "20000", test: str = "1000") -> None:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    n = int(rows)
    material = {
        "pool": training_rows("harmful", n, 101),
        "benign": training_rows("benign", n, 102),
        "test": test_rows(int(test), 103),
    }
    for name, stream in material.items():
        text = "".join(json.dumps(row) + "\n" for row in stream)
        # Renamed when whole, so that a broken run leaves no short file.
        temporary = place / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place / f"{name}.jsonl")


if __name__ == "__main__":
    main(*sys.argv[1:])
