"""Each known way to measure a rate wrongly, by its name; those of judges lie there."""

import pytest
import torch
import transformers
from tokenizers import processors

from holdfast.data.chat.template import prompt_token_ids, render_prompt
from holdfast.evaluate import stage
from holdfast.evaluate.settings import EvaluateSettings
from holdfast.judges.base import Exchange, RulesJudge
from holdfast.judges.settings import JudgeSettings
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.loading.causal import load
from holdfast.rollout.session import Session
from holdfast.stats.paired import mcnemar
from holdfast.stats.rates import wilson
from holdfast.study import Study


@pytest.fixture(scope="module")
def asked(world, thinker, tmp_path_factory):
    """Evaluate the same twelve requests under other settings."""
    files = dict(zip(world[0::2], world[1::2], strict=True))

    def run(name, **changes):
        study = Study.create(tmp_path_factory.mktemp("pitfalls") / name)
        settings = {"max_thinking": 64, "max_answer": 32, "limit": 12} | changes
        suite = (f"harmful={files['--harmful']}",)
        chosen = EvaluateSettings(suite=suite, **settings)
        block = stage.run(study, chosen, JudgeSettings(), Session(str(thinker)))
        return study, block

    return run


@pytest.fixture(scope="module")
def plain(asked):
    return asked("plain")


def test_end_of_text_alone(thinker):
    adapter = load(str(thinker))
    ids = prompt_token_ids(
        adapter.tokenizer, "How do I paint a boat?", thinking=adapter.thinking
    )
    everything = range(adapter.model.config.vocab_size)
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=32)
    [[made]] = generate(adapter, [(ids, 0)], sampling, stop_ids=everything)
    assert (made.answer, made.finish) == ("", "stop")
    [verdict] = RulesJudge().judge([Exchange("How do I paint a boat?", made.answer)])
    assert verdict.outcome == "degenerate"


def test_the_token_limit_changes_the_rate_and_is_in_the_record(asked, plain):
    _, whole = plain
    _, short = asked("short", max_answer=1)
    [row], [cut] = whole["rows"], short["rows"]
    assert (row["cut"], cut["cut"]) == (0, 12)
    assert cut["outcomes"]["refused"]["value"] != row["outcomes"]["refused"]["value"]
    limits = [b["generation"]["sampling"]["max_answer"] for b in (whole, short)]
    assert limits == [32, 1]


def test_another_system_prompt_is_another_evaluation(asked, plain):
    first, _ = plain
    second, block = asked("told", system_prompt="You are a painter.")
    assert block["generation"]["system_prompt"] == "You are a painter."
    prints = [each.record("generate")["fingerprint"] for each in (first, second)]
    assert prints[0] != prints[1]
    rows = second.read_table("generations.parquet").to_pylist()
    assert {row["system_prompt"] for row in rows} == {"You are a painter."}


def test_double_bos(thinker):
    tokenizer = transformers.AutoTokenizer.from_pretrained(thinker)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]
    )
    # The template writes one and the tokenizer would add one, which makes two.
    text = render_prompt(tokenizer, "How do I paint a boat?", thinking=None)
    assert tokenizer(text).input_ids.count(bos) == 2
    for system in (None, "Be brief."):
        ids = prompt_token_ids(
            tokenizer,
            "How do I paint a boat?",
            system_prompt=system,
            thinking=None,
        )
        assert (list(ids).count(bos), ids[0]) == (1, bos)


def test_a_rate_on_a_hundred_rows_is_known_to_ten_points():
    found = wilson(50, 100)
    assert 0.09 < found.high - 0.5 < 0.10
    assert 0.09 < 0.5 - found.low < 0.10


def test_before_and_after_are_compared_in_pairs():
    # 50 of 100 before and 40 after: the intervals overlap, yet all ten rows that
    # changed went the same way.
    before, after = wilson(50, 100), wilson(40, 100)
    assert after.high > before.low
    rows = torch.arange(100)
    found = mcnemar(rows < 40, rows < 50, [str(row) for row in range(100)])
    assert (found.gained, found.lost) == (0, 10)
    assert found.p_value < 0.01
