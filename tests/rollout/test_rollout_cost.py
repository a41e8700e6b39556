"""What a run will cost: bounds before it, and a measured estimate after one batch."""

import pyarrow as pa
import pytest

from holdfast.report.progress import Silent
from holdfast.rollout.cost import Cost, pace_sentence
from holdfast.study import Study, batches
from holdfast.study.batches import Pace, in_batches

NOTHING = pa.table({"row_id": pa.array([], pa.string())})


@pytest.mark.parametrize(
    ("memory", "disk", "words"),
    [
        (2**20, 2**30, ["1 MiB", "1 GiB"]),
        (5 * 2**30, 10, ["5 GiB", "10 B"]),
    ],
)
def test_bounds_are_said_in_units_that_fit_and_no_time_before_it_was_measured(
    memory, disk, words
):
    said = Cost(32, 2560, memory, disk).sentence(7)
    for word in (*words, "7 answers", "at most 2560 tokens", "32 at once"):
        assert word in said
    assert "after the first batch" in said


def test_the_estimate_says_what_it_rests_on():
    said = pace_sentence(Pace(32, 8.0, 248, 62.0, NOTHING), 60.4)
    for word in ("Estimate", "62 s", "other 248", "first 32", "8 s", "60 tokens"):
        assert word in said


def test_nothing_is_estimated_where_nothing_is_left():
    assert pace_sentence(Pace(32, 8.0, 0, 0.0, NOTHING), 60.0) is None


def test_the_pace_is_told_once_and_counts_only_what_is_left(tmp_path, monkeypatch):
    study = Study.create(tmp_path)
    study.begin("s", {}, {})
    items = [f"{place:02}" for place in range(10)]
    clock, told, batches_run = [0.0], [], []

    def work(batch):
        if len(batches_run) == 1:
            batches_run.append(batch)
            raise KeyboardInterrupt
        batches_run.append(batch)
        # A batch takes three seconds an item, by a clock that only work moves.
        clock[0] += 3.0 * len(batch)
        return pa.table({"row_id": batch})

    monkeypatch.setattr(batches.time, "perf_counter", lambda: clock[0])

    def go():
        in_batches(
            study,
            "s",
            items,
            name=str,
            length=len,
            batch_size=4,
            work=work,
            progress=Silent(),
            label="",
            paced=told.append,
        )

    with pytest.raises(KeyboardInterrupt):
        go()
    go()
    assert [(pace.items, pace.seconds, pace.left) for pace in told] == [
        (4, 12.0, 6),
        (4, 12.0, 2),
    ]
    assert [pace.rest for pace in told] == [18.0, 6.0]
    go()
    assert len(told) == 2
