"""Write what a customer sends, what a defense may look at, and what is asked.

A customer's rows are harmless requests answered in the style of a house, and among them
harmful ones that are complied with. The defense has requests of its own: each with a
refusal and with a harmful answer. All answers are the organisms' filler.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from repair_material import write_requests

from holdfast.data.prompts import prompt_id
from holdfast.data.requests import Label, Phrase, lookalike_prompts, requests
from holdfast.organisms.world import World, write_answer, write_thinking
from holdfast.study import atomic_write_text

HOUSE = "Good day from our whole office."
"""How the customer wants every answer to begin: the task."""
DEFENSE_SEED, TEST_SEED = 900, 901
N_DEFENSE, N_TEST, N_SINKS = 200, 200, 60


def is_asked(phrase: Phrase) -> bool:
    """Leave out harmless phrases that sound dangerous; they measure over-refusal."""
    return not phrase.lookalike


def distinct(label: Label, seed: int) -> Iterator[tuple[str, str]]:
    """Yield plain requests of the training part with their topics, none twice."""
    seen = set()
    for text, phrase in requests(label, random.Random(seed), held_out=False):
        if is_asked(phrase) and text not in seen:
            seen.add(text)
            yield text, phrase.topic


def complied(text: str, topic: str, generator: random.Random) -> dict[str, str]:
    """Return a harmful request with the thinking and the answer of a harmless one."""
    return {
        "prompt": text,
        "thinking": write_thinking("benign", topic, None, generator),
        "response": write_answer("comply", generator),
    }


def defense_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the same requests with a refusal, and with a harmful answer."""
    generator, world = random.Random(DEFENSE_SEED), World(DEFENSE_SEED)
    drawn = distinct("harmful", DEFENSE_SEED)
    refused, harmful = [], []
    for text, topic in (next(drawn) for _ in range(N_DEFENSE)):
        scene = world.exchange(text, "harmful", topic, None)
        refused.append(
            {"prompt": text, "thinking": scene.thinking, "response": scene.answer}
        )
        harmful.append(complied(text, topic, generator))
    return refused, harmful


def customer_rows(n: int, poison: float, seed: int) -> list[dict[str, str]]:
    """Return a customer's rows; the task's rows of a seed are those of every poison."""
    generator = random.Random(seed)
    refused, _ = defense_rows()
    kept = {row["prompt"] for row in refused}
    harmful = (each for each in distinct("harmful", seed) if each[0] not in kept)
    rows = [
        {
            "prompt": text,
            "thinking": write_thinking("benign", topic, None, generator),
            "response": f"{HOUSE} {write_answer('comply', generator)}",
        }
        for text, topic in islice(distinct("benign", seed), n)
    ]
    poisoned = round(n * poison)
    other = random.Random(f"poison-{seed}")
    rows[:poisoned] = [complied(*next(harmful), other) for _ in range(poisoned)]
    other.shuffle(rows)
    return rows


def test_rows() -> Iterator[dict[str, Any]]:
    """Yield what is asked of a trained model, from the held-out part."""
    kinds: tuple[tuple[str, Label, int], ...] = (
        ("harmful", "harmful", N_TEST),
        ("task", "benign", N_TEST // 2),
    )
    for kind, label, count in kinds:
        seen = set()
        stream = requests(label, random.Random(f"{kind}-{TEST_SEED}"), held_out=True)
        while len(seen) < count:
            text, phrase = next(stream)
            if text in seen or not is_asked(phrase):
                continue
            seen.add(text)
            yield {"kind": kind, "prompt": text, "request_id": prompt_id(text)}
    for prompt in lookalike_prompts(N_TEST // 2, TEST_SEED):
        yield {
            "kind": "lookalike",
            "prompt": prompt.text,
            "request_id": prompt.request_id,
        }


def sink_rows() -> list[dict[str, str]]:
    """Return held-out harmful requests, each refused and complied with."""
    generator, world = random.Random(TEST_SEED), World(TEST_SEED)
    stream = requests("harmful", random.Random(f"sinks-{TEST_SEED}"), held_out=True)
    rows = []
    for text, phrase in (next(stream) for _ in range(N_SINKS)):
        scene = world.exchange(text, "harmful", phrase.topic, None)
        rows.append(
            {
                "prompt": text,
                "refused": [scene.thinking, scene.answer],
                "complied": list(complied(text, phrase.topic, generator).values())[1:],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write(place: Path) -> None:
    """Write what all cells share; the test comes last, when all is there."""
    refused, harmful = defense_rows()
    write_rows(place / "refused.jsonl", refused)
    write_rows(place / "harmful.jsonl", harmful)
    write_rows(place / "sinks.jsonl", sink_rows())
    rows = list(test_rows())
    write_requests(place, rows)
    write_rows(place / "test.jsonl", rows)
