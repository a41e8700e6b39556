"""Time left and progress, by a clock that only the work moves."""

import threading
from importlib import import_module

import pyarrow as pa
import pytest

from holdfast.report import terminal
from holdfast.report.progress import Silent, Tally, Tick, logged
from holdfast.study import Study
from holdfast.study.batches import Meter, Work, in_batches

WIDTH = 8


class World:
    """A machine: what reading a token and writing a step cost on it."""

    def __init__(self, read, step, attend, steps, overhead=0.0):
        self.now = 0.0
        self.read, self.step, self.attend = read, step, attend
        self.steps, self.overhead = steps, overhead

    def clock(self):
        return self.now

    def batch(self, lengths, meter):
        width, longest = len(lengths), max(lengths)
        self.now += self.read * width * longest
        meter.tick(Tick(0, width, width * longest, True))
        # The last rows end later in some batches than in others.
        n = round(self.steps * (0.85 + 0.3 * ((longest * 7919) % 100) / 100))
        for at in range(n):
            self.now += self.step + self.attend * width * (longest + at)
            meter.tick(Tick(width if at == n - 1 else 0, width, width, False))
        self.now += self.overhead


WORLDS = {
    "reading is most": World(read=1e-2, step=0.05, attend=1e-7, steps=30),
    "writing is most": World(read=1e-5, step=0.05, attend=1e-7, steps=200),
    "context is half": World(read=1e-4, step=0.05, attend=5e-6, steps=100),
    "steps cost alike": World(read=1e-3, step=0.05, attend=0.0, steps=100),
    "judging too": World(read=1e-3, step=0.02, attend=1e-6, steps=60, overhead=2.0),
}
LENGTHS = {
    "alike": [100 + place % 7 for place in range(200)],
    "spread": [20 + 10 * place for place in range(200)],
    "a few long ones": [4000] * 8 + [60 + place % 30 for place in range(192)],
    "half are long": [1500 + place for place in range(100)] + [50] * 100,
}


def _estimated(world, lengths, tmp_path, monkeypatch, width=WIDTH):
    """The estimate after the first batch, and what the rest then took."""
    study = Study.create(tmp_path)
    study.begin("s", {}, {})
    items = [(f"{place:03}", length) for place, length in enumerate(lengths)]
    meter, told = Meter(world.clock), []
    # What is believed of a step is not what it costs: no machine is a formula.
    work = Work(1.0, 1 / 5000)

    def answer(batch):
        world.batch([length for _, length in batch], meter)
        return pa.table({"row_id": [name for name, _ in batch]})

    def sizes(batch):
        return [length for _, length in batch]

    monkeypatch.setattr(
        import_module("holdfast.study.batches").time, "perf_counter", world.clock
    )
    in_batches(
        study,
        "s",
        items,
        name=lambda item: item[0],
        length=lambda item: item[1],
        batch_size=width,
        work=answer,
        progress=Silent(),
        label="",
        paced=lambda pace: told.append((pace, world.now)),
        meter=meter,
        cost=lambda batch, first: meter.cost(sizes(batch), sizes(first), work),
    )
    [(pace, at)] = told
    return pace, world.now - at


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_estimate_after_one_batch_is_near_what_the_rest_takes(
    world, lengths, tmp_path, monkeypatch
):
    pace, took = _estimated(world, lengths, tmp_path, monkeypatch)
    assert pace.left == 192
    assert took / 1.5 < pace.rest < took * 1.5


@pytest.mark.parametrize("n_rows", [130, 258, 386, 514])
def test_a_full_batch_is_measured_and_never_a_short_remainder(
    n_rows, tmp_path, monkeypatch
):
    world = World(read=1e-4, step=0.02, attend=1.5e-6, steps=60)
    lengths = [60 + place % 30 for place in range(n_rows)]
    pace, took = _estimated(world, lengths, tmp_path, monkeypatch, width=128)
    assert (pace.items, pace.left) == (128, n_rows - 128)
    assert took / 1.5 < pace.rest < took * 1.5


@pytest.mark.parametrize("name", ["spread", "a few long ones", "half are long"])
def test_an_estimate_by_rows_of_the_longest_would_not_be(name):
    world, lengths = WORLDS["reading is most"], sorted(LENGTHS[name], reverse=True)
    meter, times = Meter(world.clock), []
    for start in range(0, len(lengths), WIDTH):
        before = world.now
        world.batch(lengths[start : start + WIDTH], meter)
        times.append(world.now - before)
    assert times[0] * (len(times) - 1) > 1.5 * sum(times[1:])


class Bar(Silent):
    """Keeps every move of its bar."""

    def __init__(self):
        self.moves = []

    def track(self, label, total):
        from contextlib import nullcontext

        return nullcontext(lambda steps, tokens=0: self.moves.append((steps, tokens)))


def test_a_bar_moves_as_rows_end_and_never_beyond_its_batch(tmp_path):
    study, bar, meter = Study.create(tmp_path), Bar(), Meter()
    study.begin("s", {}, {})

    def work(batch):
        # Memory runs out after one row, and the batch begins again.
        for tick in (Tick(0, 3, 30, True), Tick(1, 3, 3, False)):
            meter.tick(tick)
        for tick in (Tick(0, 3, 30, True), Tick(2, 3, 3, False), Tick(1, 1, 1, False)):
            meter.tick(tick)
        return pa.table({"row_id": batch})

    in_batches(
        study,
        "s",
        list("abc"),
        name=str,
        length=len,
        batch_size=3,
        work=work,
        progress=bar,
        label="",
        meter=meter,
    )
    assert bar.moves == [(0, 0), (0, 3), (1, 3), (0, 3), (2, 3), (0, 1), (0, 0)]


def test_rows_of_an_interrupted_run_count_at_once(tmp_path):
    study, bar = Study.create(tmp_path), Bar()
    study.begin("s", {}, {})

    def go(batch_size, failing=False):
        def work(batch):
            if failing and "c" in batch:
                raise KeyboardInterrupt
            return pa.table({"row_id": batch})

        in_batches(
            study,
            "s",
            list("abcd"),
            name=str,
            length=len,
            batch_size=batch_size,
            work=work,
            progress=bar,
            label="",
        )

    with pytest.raises(KeyboardInterrupt):
        go(2, failing=True)
    bar.moves.clear()
    go(2)
    assert bar.moves == [(2, 0), (2, 0)]


def test_a_line_says_how_far_it_is():
    now = [0.0]
    tally = Tally("Drawing answers", 40, lambda: now[0])
    assert tally.line() == "Drawing answers: 0 of 40, after 0 s"
    tally.advance(3, 120)
    tally.advance(0, 5)
    now[0] = 125.0
    assert tally.line() == "Drawing answers: 3 of 40, 125 tokens, after 2 min 5 s"


def test_a_log_has_lines_while_a_step_takes_long_and_one_at_the_end():
    said, enough = [], threading.Event()

    def say(line):
        said.append(line)
        if len(said) == 3:
            enough.set()

    with logged(say, "Training", 2, every=0.001) as advance:
        # Nothing is done meanwhile, and lines come all the same.
        assert enough.wait(30)
        advance(2)
    assert all(line.startswith("Training: 0 of 2, after") for line in said[:3])
    assert said[-1].startswith("Training: 2 of 2, after")
    threads = [each for each in threading.enumerate() if "tell" in each.name]
    assert not threads


def test_what_is_no_terminal_gets_lines_and_no_bar(capsys):
    shown = terminal.Shown()
    with shown.track("Drawing answers", 5) as advance:
        advance(2, 30)
        advance(3, 70)
    said = capsys.readouterr().err
    assert said.startswith("Drawing answers: 5 of 5, 100 tokens, after")
    assert len(said.splitlines()) == 1
