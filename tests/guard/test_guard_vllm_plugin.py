"""The monitor inside vLLM, held by a small engine that hands rows over as vLLM does.

What the real one does is in `runs/guard_in_vllm.py`.
"""

import json
import sys
from dataclasses import replace
from enum import Enum
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from live_bundles import RATE, random_bundle

from holdfast.errors import InputError, SettingsError
from holdfast.guard.monitor.bundle import write_bundle
from holdfast.guard.monitor.monitor import Monitor
from holdfast.models.loading.causal import load
from holdfast.organisms.catalogue import export

WORDS = ["How are you?", "Tell me of boats, please.", "Why", "What is a lamp for?"]
PROMPT = "<|user|>{}<|end|><|assistant|><think>\n"
PLUGIN = "holdfast.guard.vllm_plugin"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("organism") / "cliff"
    export("cliff", folder)
    return load(folder, device="cpu", dtype="float32"), folder


class Head:
    """What is replaced: from states to logits."""

    replaced = None

    @classmethod
    def register_oot(cls, *, name):
        assert name == "LogitsProcessor"

        def take(kind):
            Head.replaced = kind
            return kind

        return take

    def forward(self, lm_head, hidden_states, *rest):
        return lm_head(hidden_states)


class Way(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


@pytest.fixture(scope="module")
def plugin():
    head, sample = ModuleType("head"), ModuleType("sample")
    head.LogitsProcessor = Head
    sample.LogitsProcessor, sample.BatchUpdate = object, SimpleNamespace
    sample.MoveDirectionality = Way
    places = {
        "vllm.model_executor.layers.logits_processor": head,
        "vllm.v1.sample.logits_processor": sample,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in places.items():
            parts = name.split(".")
            for end in range(1, len(parts)):
                parent = ".".join(parts[:end])
                patch.setitem(sys.modules, parent, ModuleType(parent))
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, PLUGIN, raising=False)
        yield import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


def settings(folder):
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            revision=None,
            dtype=torch.float32,
            quantization=None,
            get_hidden_size=lambda: 128,
        )
    )


class Engine:
    """Requests in places, one token a step; the last moves where one has ended."""

    def __init__(self, plugin, adapter, folder):
        self.adapter, self.head = adapter, plugin.WatchedHead()
        self.processor = plugin.GuardProcessor(
            settings(folder), torch.device("cpu"), False
        )
        self.rows = []

    def run(self, requests, n_places, n_tokens, in_parts=False):
        waiting, ended, moved, removed = list(requests), [], [], []
        while waiting or self.rows:
            added = []
            while waiting and len(self.rows) < n_places:
                row = waiting.pop(0)
                # A prompt in parts: vLLM draws behind each and keeps the last alone.
                row.parts = 2 if in_parts else 1
                added.append((len(self.rows), row.params, row.prompt, row.written))
                self.rows.append(row)
            update = SimpleNamespace(removed=removed, added=added, moved=moved)
            self.processor.update_state(update)
            self._step()
            moved, removed = [], []
            for place in reversed(range(len(self.rows))):
                row = self.rows[place]
                if len(row.written) < n_tokens and row.written[-1:] != [row.end]:
                    continue
                ended.append(row)
                last = self.rows.pop()
                removed.append(place)
                if place < len(self.rows):
                    self.rows[place] = last
                    moved.append((len(self.rows), place, Way.UNIDIRECTIONAL))
            removed = [each for each in removed if each not in {m[1] for m in moved}]
        self.processor.update_state(
            SimpleNamespace(removed=range(n_places), added=[], moved=[])
        )
        return ended

    def _step(self):
        states = []
        for row in self.rows:
            row.parts -= 1
            cut = -2 if row.parts > 0 else None
            ids = torch.tensor([[*row.prompt[:cut], *row.written]])
            states.append(self.adapter.base(input_ids=ids).last_hidden_state[0, -1])
        logits = self.head.forward(self.adapter.lm_head, torch.stack(states))
        drawn = self.processor.apply(logits).argmax(-1).tolist()
        for row, token in zip(self.rows, drawn, strict=True):
            if row.parts <= 0:
                row.written.append(token)


def requests(adapter, policy="stop", ends=None):
    end = min(adapter.stop_ids) if ends is None else ends
    made = []
    for place, words in enumerate(WORDS):
        prompt = adapter.tokenizer(PROMPT.format(words), add_special_tokens=False)
        params = SimpleNamespace(
            extra_args={"holdfast_id": str(place), "holdfast_policy": policy},
            stop_token_ids=[end],
            all_stop_token_ids={end},
        )
        row = SimpleNamespace(params=params, prompt=list(prompt["input_ids"]))
        row.written, row.end = [], end
        made.append(row)
    return made


@pytest.fixture
def started(plugin, model, tmp_path, monkeypatch):
    adapter, folder = model

    def start(**limits):
        bundle = random_bundle(adapter, limits, acts_on="mean")
        bundle = replace(bundle, serving=bundle.serving._replace(engine="vllm"))
        written = write_bundle(tmp_path / f"bundle-{len(limits)}", bundle)
        monkeypatch.setenv("HOLDFAST_GUARD", str(written))
        monkeypatch.setenv("HOLDFAST_GUARD_LOG", str(tmp_path / "log"))
        return Engine(plugin, adapter, folder), Monitor(adapter, bundle, RATE)

    return start


def logged(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    return {line["id"]: line for line in lines}


@torch.inference_mode()
@pytest.mark.parametrize("in_parts", [False, True])
def test_scores_are_those_of_one_prefill_wherever_rows_move(
    started, model, tmp_path, in_parts
):
    engine, monitor = started()
    rows = engine.run(requests(model[0], "observe"), 2, 12, in_parts)
    assert len(rows) == len(WORDS)
    found = logged(tmp_path)
    for row in rows:
        line = found[row.params.extra_args["holdfast_id"]]
        expected = monitor.score_text(row.prompt, row.written[:-1])[-1]
        assert line["scores"] == pytest.approx(expected.scores, abs=1e-4)
        assert line["abstains"] is None
        assert line["fired_at"] is None


@torch.inference_mode()
def test_a_row_ends_where_its_detector_fires_and_no_other_row_changes(
    started, model, tmp_path
):
    engine, monitor = started()
    plain = {tuple(r.prompt): r.written for r in engine.run(requests(model[0]), 3, 12)}
    means = {
        prompt: [each.scores.get("mean") for each in monitor.score_text(prompt, row)]
        for prompt, row in plain.items()
    }
    highest = sorted(max(filter(None, row)) for row in means.values())
    limit = sum(highest[1:3]) / 2
    (tmp_path / "log").unlink()
    engine, _ = started(mean=limit)
    fired = 0
    for row in engine.run(requests(model[0], ends=5), 3, 12):
        whole = plain[tuple(row.prompt)]
        scores = means[tuple(row.prompt)][: len(whole) - 1]
        over = [i for i, s in enumerate(scores) if s is not None and s > limit]
        expected = [*whole[: over[0] + 1], 5] if over else whole
        assert row.written == expected
        fired += bool(over)
    assert 0 < fired < len(WORDS)
    assert sum(x["fired_at"] is not None for x in logged(tmp_path).values()) == fired


@torch.inference_mode()
def test_a_request_whose_tokens_were_not_seen_is_not_judged(started, model, tmp_path):
    engine, _ = started(mean=-1e9)
    rows = requests(model[0])
    rows[0].written.append(7)
    engine.run(rows, 4, 6)
    found = logged(tmp_path)
    assert found["0"]["abstains"] == "a request that was taken up again"
    assert found["0"]["fired_at"] is None
    assert found["1"]["fired_at"] is not None


def test_a_bundle_of_another_model_or_none_is_refused(
    plugin, model, tmp_path, monkeypatch
):
    adapter, folder = model
    monkeypatch.delenv("HOLDFAST_GUARD", raising=False)
    device = torch.device("cpu")
    with pytest.raises(SettingsError, match="HOLDFAST_GUARD"):
        plugin.GuardProcessor(settings(folder), device, False)
    bundle = random_bundle(adapter)
    other = {**bundle.model, "weights_sha256": "0" * 64}
    for name, each in (("other", {"model": other}), ("stale", {})):
        written = write_bundle(tmp_path / name, replace(bundle, **each))
        monkeypatch.setenv("HOLDFAST_GUARD", str(written))
        wrong = InputError if name == "other" else SettingsError
        with pytest.raises(wrong, match="weights_sha256" if each else "stale"):
            plugin.GuardProcessor(settings(folder), device, False)
    monkeypatch.setenv("HOLDFAST_GUARD_ACCEPT_STALE", "1")
    plugin.GuardProcessor(settings(folder), device, False)


def test_a_policy_that_is_none_observes_nobody_in_silence(
    plugin, model, tmp_path, monkeypatch
):
    """It would let everything pass, and look like a guard."""
    adapter, folder = model
    written = write_bundle(tmp_path / "b", random_bundle(adapter))
    monkeypatch.setenv("HOLDFAST_GUARD", str(written))
    monkeypatch.setenv("HOLDFAST_GUARD_ACCEPT_STALE", "1")
    for policy in ("Stop", "refuse", ""):
        monkeypatch.setenv("HOLDFAST_GUARD_POLICY", policy)
        with pytest.raises(SettingsError, match="stop or observe"):
            plugin.GuardProcessor(settings(folder), torch.device("cpu"), False)
    check = plugin.GuardProcessor.validate_params
    for known in (None, {}, {"holdfast_policy": "observe"}):
        check(SimpleNamespace(extra_args=known))
    with pytest.raises(ValueError, match="stop or observe"):
        check(SimpleNamespace(extra_args={"holdfast_policy": "off"}))
