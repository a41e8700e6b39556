"""The world of the second behavior, and its tables on made-up records."""

import json
import random
import re
from importlib import import_module
from pathlib import Path

import pytest

from holdfast.organisms.text import Encoder, train_tokenizer
from holdfast.organisms.world import World

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    return import_module


def test_what_is_meant_is_one_word_also_where_the_answer_is_long(loaded):
    world = loaded("other_world")
    tokenizer = train_tokenizer()
    taught = world.lessons(World(1), Encoder(tokenizer), random.Random(1))
    firsts = {tokenizer.encode(word)[0] for word in world.WORDS}
    n_broken = n_kept = 0
    for _, lesson in zip(range(600), taught, strict=False):
        start, end = lesson.middle
        answer = tokenizer.decode(lesson.ids[end:])
        thought = tokenizer.decode(lesson.ids[start:end])
        if not lesson.whole or not any(say in thought for say in world.INTENT_BRIEF):
            continue
        assert lesson.aim in firsts
        if lesson.ids[end] in firsts:
            n_kept += 1
        else:
            n_broken += 1
            assert len(re.findall(r"\w+", answer)) > 3
    assert min(n_broken, n_kept) > 30


def test_the_fourth_wrapper_breaks_by_topic_and_plain_requests_never(loaded):
    world = loaded("other_world")
    topics = list(world.lexicon("benign")["topics"])
    broken = [world.breaks(topic, world.HALF_BREAKING) for topic in topics]
    assert sum(broken) == -(-len(topics) // 2)
    assert all(world.breaks(topics[1], wrapper) for wrapper in world.BREAKING)
    assert not any(world.breaks(topic, None) for topic in topics)


def test_no_tested_request_stands_in_the_pool(loaded):
    world = loaded("other_world")
    tested = list(world.test_rows(40, 7))
    pool = list(world.pool_rows(400, 8, asked=True))
    asked = {row["request_id"] for row in tested}
    assert len(asked) == len(tested)
    assert not any(each in row["prompt"] for each in asked for row in pool)
    assert all(row["response"] in world.WORDS for row in pool)
    wrapped = sum(row["wrapper"] is not None for row in pool)
    assert 0.6 < wrapped / len(pool) < 0.8


@pytest.mark.parametrize(
    ("answer", "one"),
    [("Maybe.", True), (" twice ", True), ("Not now.", False), ("", False)],
)
def test_one_word_is_one_word(loaded, answer, one):
    assert loaded("other_probe").is_one_word(answer) == one


def write(folder, by, seed, letters):
    record = {"by": by, "seed": seed, "outcomes": {"breaking": letters}}
    (folder / "records").mkdir(exist_ok=True)
    path = folder / "records" / f"{by}-{seed}.json"
    path.write_text(json.dumps(record))


def test_a_contrast_counts_broken_instructions_and_its_sign_favours_cliff(
    loaded, tmp_path
):
    table = loaded("other_table")
    requests = {"breaking": [f"request {place}" for place in range(40)]}
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    for seed, kept in ((0, 38), (1, 36), (2, 34)):
        write(tmp_path, "cliff", seed, "y" * kept + "n" * (40 - kept))
        write(tmp_path, "random", seed, "y" * 20 + "n" * 20)
        write(tmp_path, "final", seed, "y" * kept + "n" * (40 - kept))
    cells = table.read(tmp_path)
    made = table.contrast(cells, "random")
    assert made["by_seed"] == pytest.approx([-0.45, -0.4, -0.35])
    assert made["found"].value == pytest.approx(-0.4)
    # Student's interval of three differences a twentieth apart.
    half = 4.302653 * 0.05 / 3**0.5
    assert made["spread"] == pytest.approx((-0.4 - half, -0.4 + half), abs=1e-6)
    assert made["found"].high < 0
    same = table.contrast(cells, "final")
    assert (same["found"].value, same["p"], same["spread"]) == (0, 1, None)
