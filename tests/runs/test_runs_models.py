"""The table of models: what stands in the page is what the record says."""

import json

import pytest

import models
from holdfast.models.model import USES

# What has a line, by name, whatever its tiers.
NAMED = """llama mistral ministral ministral3 mixtral qwen2 qwen3 qwen3_moe qwen3_next
qwen3_5 qwen3_5_moe gpt_oss gemma2 gemma3 gemma3_text gemma4 gemma4_text olmo2 olmo3
olmo_hybrid phi3 glm4 glm4_moe glm4_moe_lite deepseek_v2 deepseek_v3 minimax_m2 smollm3
seed_oss exaone4 granite granitemoehybrid nemotron_h falcon_h1 bamba jamba lfm2 lfm3
kimi_linear apertus ernie4_5 dots1 hunyuan_v1_dense""".split()


@pytest.fixture(scope="module")
def record():
    return json.loads(models.RECORD.read_text(encoding="utf-8"))


def test_the_page_shows_the_record(record):
    shown = models.PAGE.read_text(encoding="utf-8").split(models.BEGIN)[1]
    assert shown.split(models.END)[0].strip() == models.table(record)


def test_every_type_has_a_line_and_those_that_are_named_have_all_tiers(record):
    assert list(record) == list(models.kinds())
    for name in NAMED:
        assert record[name]["tiers"] == dict.fromkeys(USES), name
        assert record[name]["worst_gap"] < 1e-3


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("gemma3", []),
        ("gpt2", ["heads"]),
        ("opt", ["heads"]),
        ("nanochat", ["states", "heads"]),
        ("mamba2", ["text", "states", "heads"]),
    ],
)
def test_the_tiers_of_a_type_are_as_recorded(record, name, lacking):
    found = models.measured(*models.kinds()[name], timed=False)
    for each in (found, record[name]):
        assert [tier for tier in USES if each["tiers"][tier]] == lacking


def test_rows_of_other_versions_are_not_mixed(record):
    name = next(iter(record))
    other = record[name] | {"versions": {"transformers": "0"}}
    with pytest.raises(AssertionError, match="--again"):
        models.table(record | {name: other})
