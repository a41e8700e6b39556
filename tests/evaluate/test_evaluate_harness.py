"""lm-eval on a model in memory, edited or not; run where lm-eval is installed."""

import json
import math
from importlib.util import find_spec

import pytest
import torch

from holdfast.errors import SettingsError
from holdfast.evaluate.stage import run_harness
from holdfast.models.interventions import HeadEdit, head_factors

pytestmark = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    # It and its datasets package warn on their own schedule.
    pytest.mark.filterwarnings("ignore"),
]
ROWS = [
    {"question": "How do I paint a boat?", "answer": "With a brush."},
    {"question": "How do I open a tin?", "answer": "With a spoon."},
    {"question": "How do I dry a towel?", "answer": "In the sun."},
]
LIKELIHOOD = """
task: local_likelihood
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata:
  version: 3.0
"""
GENERATION = """
task: local_generation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "no model says this"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))

    def write(name, text):
        path = folder / f"{name}.yaml"
        path.write_text(text.format(rows=rows))
        return str(path)

    return write


@torch.inference_mode()
def perplexity(adapter):
    """Exp of minus the mean log-probability of the answers, one row at a time."""
    total = 0.0
    for row in ROWS:
        asked = adapter.tokenizer(row["question"])["input_ids"]
        whole = adapter.tokenizer(row["question"] + row["answer"])["input_ids"]
        logits = adapter.model(torch.tensor([whole])).logits[0].double()
        shares = logits.log_softmax(-1)[len(asked) - 1 : -1]
        drawn = torch.tensor(whole[len(asked) :])
        total += float(shares.gather(-1, drawn[:, None]).sum())
    return math.exp(-total / len(ROWS))


def test_a_local_task_gives_the_perplexity_of_the_model_and_of_its_edit(
    qwen3, task, capsys
):
    path = task("likelihood", LIKELIHOOD)
    plain = run_harness(qwen3, [path], batch_size=2)["tasks"]["local_likelihood"]
    assert plain["version"] == 3.0
    assert plain["perplexity,none"] == pytest.approx(perplexity(qwen3), rel=1e-4)
    # It says "bootstrapping" on stdout, which is for results alone.
    assert capsys.readouterr().out == ""
    # The oracle of the edit is the weights with those columns at zero.
    edit = HeadEdit(head_factors(qwen3, [(0, 1), (2, 3)], 0))
    edited = run_harness(qwen3, [path], edit=edit, batch_size=2)["tasks"]
    kept = [qwen3.output_projection(layer).weight.clone() for layer in (0, 2)]
    width = qwen3.head_widths[0]
    with torch.no_grad():
        for layer, head in ((0, 1), (2, 3)):
            columns = slice(head * width, (head + 1) * width)
            qwen3.output_projection(layer).weight[:, columns] = 0
        wanted = perplexity(qwen3)
        for layer, weight in zip((0, 2), kept, strict=True):
            qwen3.output_projection(layer).weight.copy_(weight)
    assert edited["local_likelihood"]["perplexity,none"] == pytest.approx(
        wanted, rel=1e-4
    )
    assert wanted != pytest.approx(perplexity(qwen3), rel=1e-2)


def test_a_task_that_generates_runs_under_an_edit_and_keeps_to_the_limit(qwen3, task):
    edit = HeadEdit(head_factors(qwen3, [(0, 1)], 0))
    path = task("generation", GENERATION)
    found = run_harness(qwen3, [path], edit=edit, limit=2, batch_size=2)
    assert found["tasks"]["local_generation"]["exact_match,none"] == 0.0
    assert found["tasks"]["local_generation"]["sample_len"] == 2


def test_a_task_that_nobody_knows_is_named(qwen3):
    with pytest.raises(SettingsError, match="no_such_task"):
        run_harness(qwen3, ["no_such_task"])
