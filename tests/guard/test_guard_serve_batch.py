"""The model's thread: policies, who waits, and what a failure does to the others."""

import asyncio
import threading
import time

import pytest
import torch
from guard_server import word_bundle
from live_bundles import RATE, random_bundle, threshold

from holdfast.data.chat.template import prompt_token_ids
from holdfast.guard.monitor.bundle import read_bundle
from holdfast.guard.monitor.control import guarded
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.monitor.rules import LiveDetector
from holdfast.guard.serve.asks import Ask, Mailbox, Scored, Verdict, joined
from holdfast.guard.serve.batch import Batcher, Busy
from holdfast.guard.serve.chat import Desk, Refused
from holdfast.guard.serve.moderation import Item, Scores, result
from holdfast.guard.serve.settings import ServeSettings
from holdfast.guard.serve.telemetry import Metrics
from holdfast.guard.serve.web.app import Server
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import adapt
from tiny_models import PLAIN_TEMPLATE, tiny_model, tiny_tokenizer

LAMP, WINDOW, KNOT = (
    "How do I polish a lamp?",
    "How do I clean a window?",
    "How do I tie a knot?",
)
GREEDY = Sampling(temperature=0, max_thinking=200, max_answer=100)


@pytest.fixture(scope="module")
def prompts(organism):
    return [
        (prompt_token_ids(organism.tokenizer, text, thinking=organism.thinking), 0)
        for text in (LAMP, WINDOW, KNOT)
    ]


@pytest.fixture(scope="module")
def plain(organism, prompts):
    return rows_of(generate(organism, prompts, GREEDY))


def rows_of(batches):
    found = [row for batch in batches for row in batch]
    return sorted(found, key=lambda row: row.index)


@pytest.fixture(scope="module")
def monitors(organism, tmp_path_factory):
    """Monitors that fire in the answer, or in the thinking, of some prompts."""
    factors = torch.ones((organism.n_layers, organism.n_heads))
    factors[organism.layers_with_heads[0]] = 0.0

    def make(channel, word, limit):
        folder = tmp_path_factory.mktemp("bundles") / channel
        more = {"channel": channel, "word": word, "edit": factors}
        bundle = read_bundle(word_bundle(organism, folder, limit=limit, **more))
        return Monitor(organism, bundle)

    return {
        "answer": make("answer", " parts", 8.0),
        "thinking": make("thinking", " ordinary", 6.0),
    }


class Thread:
    """A model's thread, and a loop on which its clients wait."""

    def __init__(self, organism, monitor, width=8, **given):
        settings = ServeSettings()
        for name, value in given.items():
            object.__setattr__(settings, name, value)
        self.batcher = Batcher(organism, monitor, settings, Metrics(), width)
        self.settings = settings
        self.loop = asyncio.new_event_loop()
        self.waiting = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self):
        self.waiting.start()
        return self

    def __exit__(self, *_):
        self.batcher.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.waiting.join()
        self.loop.close()

    def ask(self, prompt, sampling=GREEDY, seed=0, limit=1 << 20, seconds=60):
        box = Mailbox(self.loop)
        verdict = Verdict(self.settings.policy, self.batcher.monitor is not None)
        deadline = time.monotonic() + seconds
        asked = Ask(tuple(prompt), sampling, seed, limit, verdict, box, deadline)
        self.batcher.submit(asked)
        return asked

    def whole(self, ask):
        async def collect():
            return joined([piece async for piece in ask.box.pieces()])

        return asyncio.run_coroutine_threadsafe(collect(), self.loop).result(60)


def answers(organism, monitor, prompts, **given):
    with Thread(organism, monitor, **given) as thread:
        asked = [thread.ask(prompt) for prompt, _ in prompts]
        thread.batcher.start()
        return [(ask.verdict, thread.whole(ask)) for ask in asked]


def test_observe_lets_everything_stand_and_says_what_fired(
    organism, monitors, prompts, plain
):
    found = answers(organism, monitors["answer"], prompts, policy="observe")
    texts = [(whole.thinking, whole.answer) for _, whole in found]
    assert texts == [(row.thinking, row.answer) for row in plain]
    fired = [bool(verdict.fired) for verdict, _ in found]
    assert fired == [True, False, False]
    assert [verdict.action for verdict, _ in found] == [None] * 3


@pytest.mark.parametrize("policy", ["observe", "stop", "steer"])
def test_an_answer_on_which_the_guard_fires_is_counted_once(
    organism, monitors, prompts, policy
):
    with Thread(organism, monitors["answer"], policy=policy) as thread:
        asked = [thread.ask(prompt) for prompt, _ in prompts]
        thread.batcher.start()
        for ask in asked:
            thread.whole(ask)
        metrics = thread.batcher.metrics
    labels = {"policy": policy, "channel": "answer"}
    # It goes on for many tokens under `observe`, over its threshold to the end.
    assert metrics.registry.get_sample_value("holdfast_fired_total", labels) == 1


def test_refuse_says_the_message_in_place_of_the_answer(
    organism, monitors, prompts, plain
):
    found = answers(organism, monitors["answer"], prompts, policy="refuse")
    verdict, whole = found[0]
    assert verdict.action == "refused"
    assert whole.refusal == ServeSettings().refusal
    assert whole.finish == "content_filter"
    for (_, other), row in zip(found[1:], plain[1:], strict=True):
        assert (other.answer, other.refusal) == (row.answer, None)


@pytest.mark.parametrize("policy", ["steer", "redraw"])
def test_an_edit_acts_on_the_row_that_fired_as_it_does_in_generate(
    organism, monitors, prompts, plain, policy
):
    monitor = monitors["thinking"]
    wanted = guarded(monitor, prompts, GREEDY, policy=policy)
    found = answers(organism, monitor, prompts, policy=policy)
    for (verdict, whole), other in zip(found, wanted, strict=True):
        acted = {"steer": "steered", "redraw": "redrawn"}[policy]
        fired = other.fired_at is not None
        # What fired is kept in the thinking, and does not fire for it a second time.
        assert verdict.action == (acted if fired else None)
        assert whole.answer == other.completion.answer
        assert whole.thinking == other.completion.thinking
        assert [step.index for step in whole.steps] == list(range(len(whole.steps)))
        if fired:
            assert verdict.fired[0]["index"] == other.fired_at
    texts = [(whole.thinking, whole.answer) for _, whole in found]
    same = [(row.thinking, row.answer) for row in plain]
    # The edit does something, and only to rows that fired.
    for text, row, (verdict, _) in zip(texts, same, found, strict=True):
        assert (text == row) == (verdict.action is None)
    assert texts != same


def test_whoever_waits_too_long_or_finds_no_room_is_told(organism, prompts):
    prompt = prompts[0][0]
    with Thread(organism, None, width=1, queue=2) as thread:
        asked = [thread.ask(prompt, seconds=0.0) for _ in range(3)]
        with pytest.raises(Busy):
            thread.ask(prompt)
        # Who has gone makes room.
        asked[0].box.is_gone = True
        asked.append(thread.ask(prompt))
        thread.batcher.start()
        assert thread.whole(asked[1]).failure == "timeout"
        assert thread.whole(asked[3]).finish == "stop"


def test_rows_that_join_and_leave_at_any_time_are_those_of_generate(
    organism, prompts, plain
):
    warm = Sampling(temperature=1.0, top_p=0.9, max_thinking=200, max_answer=100)
    seeds = (1, 2, 3)
    drawn = rows_of(
        generate(
            organism, [(p, s) for (p, _), s in zip(prompts, seeds, strict=True)], warm
        )
    )
    with Thread(organism, None, width=3) as thread:
        thread.batcher.start()
        asked = []
        for (prompt, _), seed in zip(prompts, seeds, strict=True):
            asked.append((thread.ask(prompt), 0))
            asked.append((thread.ask(prompt, warm, seed), 1))
            time.sleep(0.05)
        found = [thread.whole(ask) for ask, _ in asked]
    wanted = [row for pair in zip(plain, drawn, strict=True) for row in pair]
    assert [(w.thinking, w.answer) for w in found] == [
        (row.thinking, row.answer) for row in wanted
    ]
    assert [w.usage.written for w in found] == [
        len(row.token_ids) - row.spans.prompt[1] for row in wanted
    ]


def test_a_failure_ends_who_was_running_and_nobody_after(
    organism, prompts, plain, monkeypatch
):
    from holdfast.models.decoding.decoder import Decoder

    advance, broken = Decoder.advance, [True]

    def fails(self):
        if broken.pop() if broken else False:
            raise RuntimeError("a fault of the device")
        return advance(self)

    monkeypatch.setattr(Decoder, "advance", fails)
    with Thread(organism, None) as thread:
        thread.batcher.start()
        assert thread.whole(thread.ask(prompts[0][0])).failure == "fault"
        assert thread.whole(thread.ask(prompts[0][0])).answer == plain[0].answer


@pytest.mark.parametrize("on_fault", ["closed", "open"])
def test_scores_that_are_no_numbers_end_the_answer_or_let_it_go_on(
    organism, monitors, prompts, plain, monkeypatch, on_fault
):
    """Fail closed by default; open says that nothing was watched."""
    monitor = monitors["answer"]
    read = monitor.read

    def odd(watches, states, token_ids):
        found = read(watches, states, token_ids)
        return [
            score._replace(scores={"word": float("nan")})
            if score.index == 10 and starts(watch, prompts[1][0])
            else score
            for watch, score in zip(watches, found, strict=True)
        ]

    monkeypatch.setattr(monitor, "read", odd)
    given = {"on_fault": on_fault, "policy": "observe"}
    found = answers(organism, monitor, prompts[1:], **given)
    verdict, whole = found[0]
    assert not verdict.watched
    assert "no numbers" in verdict.fault
    if on_fault == "closed":
        assert whole.finish == "content_filter"
        assert plain[1].thinking.startswith(whole.thinking)
        assert whole.answer == ""
    else:
        assert (whole.answer, whole.finish) == (plain[1].answer, "stop")
    assert found[1][0].watched
    assert found[1][1].answer == plain[2].answer


def test_readings_that_are_no_numbers_end_the_answer_where_states_are_fine(
    organism, monitors, prompts, monkeypatch
):
    """A direction may make none of a state: nothing would fire, and all would pass."""
    monitor = monitors["answer"]
    odd = torch.full_like(monitor._offsets, torch.nan)
    monkeypatch.setattr(monitor, "_offsets", odd)
    [(verdict, whole)] = answers(organism, monitor, prompts[:1], policy="stop")
    assert (verdict.watched, verdict.action) == (False, "stopped")
    assert (whole.finish, whole.answer) == ("content_filter", "")


def starts(watch, prompt):
    return tuple(watch.written.token_ids[: len(prompt)]) == prompt


def test_a_model_whose_layers_forget_decodes_batch_after_batch(tokenizer):
    """A sliding window: rows cannot join what runs, and wait for its end."""
    adapter = adapt(tiny_model("mistral"), tokenizer)
    text = "hello world"
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    limits = Sampling(temperature=0, max_thinking=8, max_answer=8)
    [wanted] = rows_of(generate(adapter, [(ids, 0)], limits))
    with Thread(adapter, None, width=2) as thread:
        asked = [thread.ask(ids, limits) for _ in range(5)]
        thread.batcher.start()
        found = [thread.whole(ask) for ask in asked]
    assert {whole.answer for whole in found} == {wanted.answer}


WORDS = ("How are you?", "Tell me of boats.", "Why", "A b c d")


def redrawn(adapter, texts, detector):
    """What is drawn again here, and by `guarded`, where one of several rows fires."""
    asked = [(tuple(adapter.encode(text)), seed) for seed, text in enumerate(texts)]
    limits = Sampling(temperature=0, max_thinking=20, max_answer=12)
    own = {"detectors": (detector,), "acts_on": "it", "scales": {}}
    never = {"it": {RATE: threshold(1e9)}}
    calm = Monitor(adapter, random_bundle(adapter, thresholds=never, **own))
    *_, second, top = sorted(
        row.last.scores.get("it", -1e9) for row in guarded(calm, asked, limits)
    )
    over = {"it": {RATE: threshold((second + top) / 2)}}
    monitor = Monitor(adapter, random_bundle(adapter, thresholds=over, **own))
    wanted = guarded(monitor, asked, limits, policy="redraw")
    with Thread(adapter, monitor, policy="redraw", width=4) as thread:
        rows = [thread.ask(prompt, limits) for prompt, _ in asked]
        thread.batcher.start()
        found = [(row.verdict, thread.whole(row)) for row in rows]
    for _, whole in found:
        assert [step.index for step in whole.steps] == list(range(len(whole.steps)))
    [at] = [n for n, row in enumerate(wanted) if row.fired_at is not None]
    assert [v.action is not None for v, _ in found] == [n == at for n in range(4)]
    return found[at], wanted[at].completion


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_what_is_drawn_again_is_under_the_edit_where_rows_cannot_join(kind):
    adapter = adapt(tiny_model(kind), tiny_tokenizer())
    texts = [f"<|user|>{words}<|end|><|assistant|><think>\n" for words in WORDS]
    detector = LiveDetector("it", "a", "thinking", "last")
    (verdict, whole), wanted = redrawn(adapter, texts, detector)
    assert verdict.action == "redrawn"
    assert (whole.thinking, whole.answer) == (wanted.thinking, wanted.answer)


def test_what_the_end_of_a_prompt_says_does_not_fire_for_what_is_drawn_again():
    """Of a model that does not think the prompt is all that is kept, and it fired."""
    adapter = adapt(tiny_model(), tiny_tokenizer(PLAIN_TEMPLATE, tags=False))
    texts = [f"<|user|>{words}<|end|><|assistant|>" for words in WORDS]
    detector = LiveDetector("it", "a", "thinking", "end")
    (verdict, whole), wanted = redrawn(adapter, texts, detector)
    assert verdict.action == "redrawn"
    assert whole.answer == wanted.answer


def test_tokens_that_end_a_thinking_twice_are_told_once():
    adapter = adapt(tiny_model("qwen3"), tiny_tokenizer())
    texts = [f"<|user|>{words}<|end|><|assistant|><think>\n" for words in WORDS]
    redrawn(adapter, texts, LiveDetector("it", "a", "thinking", "end"))


def test_readings_without_end_let_answers_begin(organism, prompts, plain):
    """Where nothing runs, each reading here asks for the next one."""
    going, counted = threading.Event(), []
    with Thread(organism, None) as thread:

        def reading():
            counted.append(1)
            if not going.is_set() and len(counted) < 20_000:
                thread.batcher.call(reading)

        thread.batcher.call(reading)
        ask = thread.ask(prompts[0][0])
        thread.batcher.start()
        assert thread.whole(ask).answer == plain[0].answer
        going.set()
    assert len(counted) < 20_000


def test_all_who_wait_are_told_of_the_end_beside_one_who_has_gone(organism, prompts):
    with Thread(organism, None) as thread:
        gone, here = [thread.batcher.call(lambda: 1) for _ in range(2)]
        assert gone.cancel()
        thread.batcher._ended = True
        thread.batcher.start()
        with pytest.raises(Busy):
            here.result(timeout=20)


@pytest.mark.parametrize("on_fault", ["closed", "open"])
def test_an_answer_of_anybody_that_cannot_be_read_is_not_cleared(
    organism, monitors, prompts, monkeypatch, on_fault
):
    """A gateway would take it for harmless; and so where nothing is promised anyway."""
    from holdfast.guard.monitor import monitor as reading

    read = reading.read_windows

    def odd(*given, **more):
        found = read(*given, **more)
        found[0][3] = torch.nan
        return found

    monkeypatch.setattr(reading, "read_windows", odd)
    monitor, written = monitors["answer"], (5, 6, 7, 8)
    for prompt in (prompts[0][0], prompts[0][0] * 40):
        with Thread(organism, monitor, on_fault=on_fault) as thread:
            settings, batcher = thread.settings, thread.batcher
            desk = Desk(organism, monitor, settings)
            server = Server(settings, "m", (), desk, batcher, monitor, Metrics())
            server.is_ready = True
            batcher.start()
            given = [Item(prompt, written, None), Item(prompts[1][0], written, None)]
            scoring = asyncio.run_coroutine_threadsafe(server.score(given), thread.loop)
            if on_fault == "closed":
                with pytest.raises(Refused, match="no numbers") as refused:
                    scoring.result(60)
                assert refused.value.status == 500
            else:
                broken, fine = scoring.result(60)
                assert "not finite" in broken.abstains
                assert fine.abstains is None


def test_an_answer_is_flagged_by_the_detector_that_is_acted_on_alone():
    """Each has the rate to itself, and ten of them would flag ten times as often."""
    verdict = Verdict("observe", True, acts_on="a")
    verdict.take(Scored(0, "answer", {"a": 0.0, "b": 9.0}, ("b",), None))
    assert not verdict.record()["flagged"]
    assert verdict.record()["fired"][0]["detector"] == "b"
    verdict.take(Scored(1, "answer", {"a": 9.0, "b": 9.0}, ("a", "b"), None))
    assert verdict.record()["flagged"]


def test_every_result_of_moderation_lists_what_is_stale(monitors):
    told = result(monitors["answer"], Scores.of([], None), ("with another engine",))
    assert told["holdfast"]["stale"] == ["with another engine"]
    assert result(monitors["answer"], Scores.of([], None))["holdfast"]["stale"] == []
