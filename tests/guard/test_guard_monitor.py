"""The monitor: scores that are the same however tokens come, and policies on them."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from live_bundles import DETECTORS, LONG, RATE, random_bundle, threshold

from holdfast.cliff.cliff import row_cliff
from holdfast.errors import InputError, SettingsError
from holdfast.guard.monitor.bundle import (
    Calibration,
    Serving,
    read_bundle,
    require_match,
    write_bundle,
)
from holdfast.guard.monitor.control import (
    MESSAGE,
    Guard,
    guarded,
    second_opinions,
    stream,
)
from holdfast.guard.monitor.monitor import Monitor
from holdfast.guard.monitor.rules import ANY, LiveDetector, Place, Scale, Scorer
from holdfast.judges.base import JudgeIdentity, RulesJudge
from holdfast.judges.verdict import Verdict
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.hidden_states import project_states
from holdfast.models.interventions import HeadEdit

GREEDY = Sampling(temperature=0, max_thinking=30, max_answer=20)
PROMPTS = [
    (f"<|user|>{words}<|end|><|assistant|><think>\n", seed)
    for seed, words in enumerate(
        ["How are you?", "Tell me of boats, please, and of the sea.", "Why", "A b c d"]
    )
]


def answers(adapter, sampling=GREEDY, **more):
    batches = generate(adapter, PROMPTS, sampling, **more)
    rows = [row for batch in batches for row in batch]
    return sorted(rows, key=lambda row: row.index)


def pairs(rows):
    cut = [row.spans.prompt[1] for row in rows]
    return [
        (row.token_ids[:n], row.token_ids[n:-1])
        for row, n in zip(rows, cut, strict=True)
    ]


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], abs=2e-4), name


def firing(adapter, name="last"):
    """A bundle whose detector fires on one row alone, and the token where it does."""
    paths = Monitor(adapter, random_bundle(adapter)).score_texts(
        pairs(answers(adapter))
    )
    best = [path[-1].scores.get(name, -math.inf) for path in paths]
    order = sorted(range(len(best)), key=lambda i: best[i])
    top, second = order[-1], order[-2]
    limit = (best[top] + best[second]) / 2
    at = next(s.index for s in paths[top] if s.scores.get(name, -math.inf) > limit)
    return random_bundle(adapter, {name: limit}, acts_on=name), top, at


def feed(detector, values, channel="answer"):
    scorer = Scorer([detector], {})
    for value in values:
        scorer.push(Place(channel, False, 0), {detector.reads: value})
    return scorer.scores().get(detector.name)


def test_the_segment_rule_fires_exactly_where_so_many_tokens_of_a_window_agree():
    draws = torch.Generator().manual_seed(0)
    detector = LiveDetector("s", "a", "answer", "segment", 5, 3)
    for _ in range(200):
        values = torch.randn(9, generator=draws).tolist()
        windows = [values[i : i + 5] for i in range(5)]
        limit = float(torch.randn(1, generator=draws))
        agrees = any(sum(v > limit for v in each) >= 3 for each in windows)
        assert (feed(detector, values) > limit) == agrees


def test_the_rolling_mean_is_the_highest_of_whole_windows():
    values = [9.0, -9.0, 1.0, 2.0, 3.0, -5.0]
    detector = LiveDetector("m", "a", "answer", "rolling", 3)
    assert feed(detector, values) == pytest.approx(2.0)
    assert feed(detector, values[:2]) is None
    assert feed(detector._replace(sign=-1.0), values) == pytest.approx(2.0)


def test_hesitation_is_the_share_of_tokens_near_the_boundary():
    detector = LiveDetector("h", "a", "answer", "hesitation", 4, band=1.0)
    assert feed(detector, [0.5, 3.0, 3.0, 3.0]) == pytest.approx(0.25)
    assert feed(detector, [3.0, 3.0, 3.0, 3.0, 0.5]) == pytest.approx(0.2)
    assert feed(detector, [0.5, 0.5]) is None


def test_one_loud_token_moves_a_rolling_mean_and_no_segment():
    quiet = [0.0] * 20
    loud = [*quiet[:10], 100.0, *quiet[11:]]
    mean = LiveDetector("m", "a", "answer", "rolling", 8)
    segment = LiveDetector("s", "a", "answer", "segment", 8, 4)
    assert feed(mean, loud) > 10
    assert feed(segment, loud) == 0.0


def test_the_cliff_in_flight_is_that_of_the_trace_once_the_thinking_is_over():
    draws = torch.Generator().manual_seed(1)
    thinking, ends = 40, 3
    logits = torch.randn(thinking + ends + 5, generator=draws, dtype=torch.float64)
    detector = LiveDetector("c", "a", "thinking", "cliff")
    best = -math.inf
    scorer = Scorer([detector], {})
    for at, value in enumerate(logits.tolist()):
        over = at >= thinking
        channel = "answer" if at >= thinking + ends else "thinking"
        place = Place(channel, over and channel == "thinking", min(at + 1, thinking))
        scorer.push(place, {"a": value})
        if place.ends:
            row = row_cliff(logits, slice(0, thinking), at)
            best = max(best, row.plateau_logit - row.final_logit)
            assert scorer.scores()["c"] == pytest.approx(best)
        elif not over:
            assert scorer.scores() == {}
    assert scorer.scores()["c"] == pytest.approx(best)


def test_thinking_that_is_too_short_has_no_cliff():
    scorer = Scorer([LiveDetector("c", "a", "thinking", "cliff")], {})
    for at in range(12):
        scorer.push(Place("thinking", at > 9, min(at + 1, 10)), {"a": 5.0 - at})
    assert scorer.scores() == {}


def test_rarity_rises_without_end_and_is_the_knots_own():
    scale = Scale((1.0, 2.0, 4.0, 5.0))
    assert scale.rarity(2.0) == pytest.approx(1.0)
    assert scale.rarity(4.5) == pytest.approx(2.5)
    values = [scale.rarity(-3 + 0.1 * step) for step in range(200)]
    assert all(a < b for a, b in pairwise(values))


def test_decoding_chunks_and_one_prefill_give_the_same_scores(qwen3):
    monitor = Monitor(qwen3, random_bundle(qwen3))
    rows = answers(qwen3)
    prefill = monitor.score_texts(pairs(rows))
    live = guarded(monitor, PROMPTS, GREEDY)
    for found, path in zip(live, prefill, strict=True):
        assert found.last.index == path[-1].index
        close(found.last.scores, path[-1].scores)
    # By chunks of three, from states that were read at once.
    for (prompt, written), path in zip(pairs(rows), prefill, strict=True):
        logits = _states(qwen3, (*prompt, *written))
        watch, chunks = monitor.open(prompt), []
        monitor.begin([watch], logits[len(prompt) - 1][None])
        own = logits[len(prompt) :]
        for at in range(0, len(written), 3):
            chunks += monitor.read_many(watch, own[at : at + 3], written[at : at + 3])
        assert [each.channel for each in chunks] == [each.channel for each in path]
        for one, other in zip(chunks, path, strict=True):
            close(one.scores, other.scores)


def _states(adapter, token_ids):
    from holdfast.models.hidden_states import read_states

    return read_states(adapter, [token_ids], lambda states, _: states)[0]


def test_scores_are_those_of_a_plain_pass(qwen3):
    bundle = random_bundle(qwen3)
    monitor = Monitor(qwen3, bundle)
    row = answers(qwen3)[1]
    direction = bundle.directions["b"]
    logits = project_states(
        qwen3, [row.token_ids], direction.weight[None], torch.tensor([direction.offset])
    )[0][:, 0]
    answer = logits[row.spans.answer[0] : len(row.token_ids) - 1]
    last = monitor.score_texts(pairs([row]))[0][-1]
    assert last.scores["last"] == pytest.approx(float(answer.max()), abs=1e-4)


def test_watching_changes_no_row_and_a_row_that_fires_none_beside_it(qwen3):
    bundle, top, _ = firing(qwen3, "mean")
    plain = answers(qwen3)
    monitor = Monitor(qwen3, bundle)
    for policy in ("observe", "stop", "refuse", "steer", "redraw"):
        found = guarded(monitor, PROMPTS, GREEDY, policy=policy)
        assert [each.fired_at is not None for each in found] == [
            index == top for index in range(len(PROMPTS))
        ]
        for index, (each, before) in enumerate(zip(found, plain, strict=True)):
            if index != top or policy == "observe":
                assert each.completion.token_ids == before.token_ids
            else:
                assert each.completion.token_ids != before.token_ids, policy


def test_a_stopped_row_ends_at_the_token_at_which_it_fired(qwen3):
    bundle, top, at = firing(qwen3)
    before = answers(qwen3)[top]
    found = guarded(Monitor(qwen3, bundle), PROMPTS, GREEDY, policy="stop")[top]
    n = before.spans.prompt[1]
    assert found.fired_at == at
    assert found.completion.finish == "guard"
    assert found.completion.token_ids == before.token_ids[: n + at + 1]


@pytest.mark.parametrize("name", ["last", "mean"])
def test_a_refused_row_says_the_message_and_nothing_more(qwen3, name):
    bundle, top, at = firing(qwen3, name)
    before = answers(qwen3)[top]
    long = replace(GREEDY, max_answer=200)
    found = guarded(Monitor(qwen3, bundle), PROMPTS, long, policy="refuse")[top]
    row = found.completion
    kept = before.token_ids[: before.spans.prompt[1] + at + 1]
    assert row.token_ids[: len(kept)] == kept
    assert row.answer.endswith(MESSAGE)
    assert row.closed
    if name == "mean":
        assert row.answer == MESSAGE
        assert row.spans.thinking[1] == len(kept)


def test_steering_is_the_edit_from_the_next_token_on(qwen3):
    bundle, top, at = firing(qwen3, "mean")
    start = answers(qwen3)[top].spans.prompt[1] + at + 1
    ranges = [(1 << 40, None)] * len(PROMPTS)
    ranges[top] = (start, None)
    [expected] = [
        row
        for row in answers(qwen3, edit=HeadEdit(bundle.edit, tuple(ranges)))
        if row.index == top
    ]
    found = guarded(Monitor(qwen3, bundle), PROMPTS, GREEDY, policy="steer")[top]
    assert found.completion.token_ids == expected.token_ids
    assert expected.token_ids != answers(qwen3)[top].token_ids


def test_drawing_again_ends_the_same_thinking_with_the_edit(qwen3):
    bundle, top, at = firing(qwen3)
    monitor = Monitor(qwen3, bundle)
    before = answers(qwen3)[top]
    found = guarded(monitor, PROMPTS, GREEDY, policy="redraw")[top]
    kept = before.token_ids[: before.spans.thinking[1]]
    prompt = (*kept, *monitor.rules.template_ids)
    edit = HeadEdit(bundle.edit, ((len(kept), None),))
    [[expected]] = generate(
        qwen3, [(prompt, top)], GREEDY, edit=edit, thinking_done=True
    )
    row = found.completion
    assert row.token_ids == expected.token_ids
    assert row.answer == expected.answer
    assert row.thinking == before.thinking
    assert row.spans.thinking == before.spans.thinking
    assert found.first.token_ids == before.token_ids[: before.spans.prompt[1] + at + 1]


def test_a_stream_holds_a_token_back_until_it_is_read(qwen3):
    bundle, top, at = firing(qwen3)
    monitor = Monitor(qwen3, bundle)
    before = answers(qwen3)[top]
    written = before.token_ids[before.spans.prompt[1] :]
    prompt, seed = PROMPTS[top]
    watched = list(stream(monitor, prompt, seed, GREEDY))
    assert tuple(token for token, _ in watched) == written
    assert [score and score.index for _, score in watched] == [
        *range(len(written) - 1),
        None,
    ]
    stopped = list(stream(monitor, prompt, seed, GREEDY, policy="stop"))
    assert tuple(token for token, _ in stopped) == written[:at]
    # What is said in place of the rest was written by nobody, and has no scores.
    long = replace(GREEDY, max_answer=200)
    refused = list(stream(monitor, prompt, seed, long, policy="refuse"))
    known = [score is not None for _, score in refused]
    assert known == [True] * (at + 1) + [False] * (len(refused) - at - 1)
    assert len(refused) > at + len(MESSAGE)
    with pytest.raises(SettingsError, match="lets stand what was let out"):
        next(stream(monitor, prompt, seed, GREEDY, policy="redraw"))


def test_beyond_what_it_was_calibrated_on_the_monitor_abstains(qwen3):
    low = {each.name: -1e9 for each in DETECTORS}
    known = Calibration(9, 9, {"benign": 9}, "", LONG | {"answer": 3}, ("LATIN",))
    monitor = Monitor(qwen3, random_bundle(qwen3, low, calibration=known))
    row = answers(qwen3)[1]
    path = monitor.score_texts(pairs([row]))[0]
    answer = [each for each in path if each.channel == "answer"]
    assert [each.abstains is None for each in answer[:4]] == [True] * 3 + [False]
    assert "4 tokens of answer" in answer[3].abstains
    # What had not fired by then does so no more.
    assert "segment" not in path[-1].fired
    assert "segment" in path[-1].scores


def test_another_script_and_a_long_prompt_are_told_when_a_watch_is_opened(qwen3):
    known = Calibration(9, 9, {}, "", LONG | {"prompt": 60}, ("LATIN",))
    monitor = Monitor(qwen3, random_bundle(qwen3, calibration=known))
    encode = qwen3.encode
    assert monitor.open(encode("<|user|>How are you?")).abstains is None
    assert "CYRILLIC" in monitor.open(encode("<|user|>Как дела?")).abstains
    assert "tokens of prompt" in monitor.open(encode("a" * 61)).abstains


def test_a_state_that_is_no_number_silences_its_own_row_alone(qwen3):
    low = {"last": -1e9}
    monitor = Monitor(qwen3, random_bundle(qwen3, low))
    prompt = qwen3.encode("<|user|>Hi<|assistant|><think>\n</think>\n\n")
    watches = [monitor.open(prompt), monitor.open(prompt)]
    states = torch.zeros((2, qwen3.d_model))
    states[1, 3] = torch.nan
    # The answer begins behind a closing tag.
    closing = monitor.rules.template_ids
    for token in (*closing, 65):
        good, bad = monitor.read(watches, states, [token, token])
    assert good.abstains is None
    assert "last" in good.fired
    assert bad.fired == ()
    assert "not finite" in bad.abstains


def test_a_bundle_is_the_same_when_it_has_been_written_and_read(qwen3, tmp_path):
    bundle = random_bundle(qwen3, {"last": 1.5, ANY: 2.5})
    write_bundle(tmp_path / "bundle", bundle)
    read = read_bundle(str(tmp_path / "bundle"))
    assert read.facts() == bundle.facts()
    for name, tensor in bundle.tensors().items():
        assert torch.equal(read.tensors()[name], tensor)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "| `last` | b | answer | 1 % | 1.5 |" in card
    with pytest.raises(InputError, match="a new directory"):
        write_bundle(tmp_path / "bundle", bundle)


def test_a_bundle_that_is_not_there_is_not_told_as_a_place_to_write_to(tmp_path):
    with pytest.raises(InputError, match="No such file") as told:
        read_bundle(tmp_path / "none")
    assert "write " not in str(told.value).replace("Write one", "")


@pytest.mark.parametrize("name", ["bundle.json", "bundle.safetensors"])
def test_a_damaged_bundle_is_refused(qwen3, tmp_path, name):
    write_bundle(tmp_path / "bundle", random_bundle(qwen3))
    path = tmp_path / "bundle" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="guard bundle"):
        read_bundle(tmp_path / "bundle")


def test_a_bundle_of_another_model_or_template_is_refused(qwen3, llama):
    bundle = random_bundle(llama)
    with pytest.raises(InputError, match="differs in weights_sha256"):
        Monitor(qwen3, bundle)
    other = dict(random_bundle(qwen3).model) | {"template_sha256": "0"}
    with pytest.raises(InputError, match="differs in template_sha256"):
        Monitor(qwen3, random_bundle(qwen3, model=other))
    with pytest.raises(SettingsError, match=re.escape("rate among 0.01")):
        Monitor(qwen3, random_bundle(qwen3), rate=0.5)


def test_another_way_of_serving_makes_thresholds_stale_and_says_in_what(qwen3):
    bundle = random_bundle(qwen3)
    assert require_match(bundle, qwen3, bundle.serving) == []
    other = Serving("vllm", "bfloat16", 0.7, 1.0, "awq")
    said = require_match(bundle, qwen3, other)
    assert len(said) == 4
    assert "temperature 0 and are stale with 0.7" in said[2]
    assert Monitor(qwen3, bundle, serving=other).stale == said
    # The arithmetic of the model itself is known in any case.
    half = random_bundle(qwen3, serving=Serving(dtype="bfloat16"))
    assert Monitor(qwen3, bundle).stale == []
    assert "dtype bfloat16 and are stale with float32" in Monitor(qwen3, half).stale[0]


def test_without_an_edit_there_is_nothing_to_steer_with(qwen3):
    monitor = Monitor(qwen3, random_bundle(qwen3, edit=None))
    for policy in ("steer", "redraw"):
        with pytest.raises(SettingsError, match="an edit of heads"):
            Guard(monitor, policy)


class Asked:
    """A judge that remembers what it was asked, and says that all of it is harmful."""

    identity = JudgeIdentity("asked", "1", "harm", "")

    def __init__(self):
        self.seen = []

    def judge(self, exchanges):
        self.seen += exchanges
        return [Verdict("complied", "", "asked-1", score=1.0) for _ in exchanges]


def test_a_slower_judge_is_asked_only_where_the_monitor_is_unsure(qwen3):
    plain = guarded(Monitor(qwen3, random_bundle(qwen3)), PROMPTS, GREEDY)
    best = [each.last.scores["last"] for each in plain]
    low, *_, second, high = sorted(best)
    by_rate = {RATE: threshold((second + high) / 2), 0.2: threshold((low + second) / 2)}
    bundle = random_bundle(qwen3)
    changed = random_bundle(qwen3, thresholds={**bundle.thresholds, "last": by_rate})
    monitor, judge = Monitor(qwen3, changed), Asked()
    answers = guarded(monitor, PROMPTS, GREEDY)
    requests = [text for text, _ in PROMPTS]
    found = second_opinions(monitor, answers, requests, judge, 0.2)
    between = [by_rate[0.2].value < each <= by_rate[RATE].value for each in best]
    assert [each.verdict is not None for each in found] == between
    assert [each.request for each in judge.seen] == [
        text for text, asked in zip(requests, between, strict=True) if asked
    ]
    assert [each.flagged for each in found] == [
        each > by_rate[0.2].value for each in best
    ]
    # Written rules measure refusal: what they call none is flagged.
    rules = second_opinions(monitor, answers, requests, RulesJudge(), 0.2)
    for opinion in rules:
        if opinion.verdict is not None:
            assert opinion.flagged == (opinion.verdict.outcome != "refused")
    with pytest.raises(SettingsError, match="looser rate"):
        second_opinions(Monitor(qwen3, changed, 0.2), answers, requests, judge, RATE)


def test_rates_and_thresholds_are_told_by_detector(qwen3):
    bundle = random_bundle(qwen3, {"last": 1.0})
    assert bundle.rates == (RATE,)
    assert bundle.at(RATE)["last"] == threshold(1.0)
