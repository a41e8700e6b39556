import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import tiny_thinker
from holdfast.cli.app import run
from holdfast.data.chat.conversation import build_conversation
from holdfast.errors import TooFewExamplesError
from holdfast.models.loading.causal import adapt, load
from holdfast.rollout.session import Session
from holdfast.sinks import stage
from holdfast.sinks import stage as sinks_stage
from holdfast.sinks.panel import summary_sentences
from holdfast.sinks.settings import SinksSettings
from holdfast.study import Study

N = 24
SHORT, LONG = "No.", tiny_thinker.COMPLIANCE


def write(path, requests, answer, *, thinking=True):
    rows = []
    for request in requests:
        prompt, thought, _ = tiny_thinker.scene(request, None, True)
        row = {"prompt": prompt, "response": answer}
        rows.append(row | ({"thinking": thought} if thinking else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(thinker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sinks")
    requests = tiny_thinker.requests(tiny_thinker.HARM, 2 * N)
    turned = list(reversed(requests[:N]))
    return SimpleNamespace(
        folder=folder,
        harmful=write(folder / "harmful.jsonl", requests[:N], tiny_thinker.COMPLIANCE),
        # In another order, and with rows that nobody is paired with.
        reference=write(
            folder / "reference.jsonl",
            [*turned, *requests[N : N + 5]],
            tiny_thinker.REFUSAL,
        ),
        elsewhere=write(folder / "elsewhere.jsonl", requests[N:], SHORT),
        adapter=load(thinker, device="cpu"),
    )


def sinks(*models, harmful, reference, study, flags=()):
    """The verb, as a user runs it."""
    command = ["sinks", *map(str, models), "--harmful", harmful]
    command += ["--reference", reference, *flags, "--json", "-o", str(study)]
    return run(command)


def found(study):
    table = pq.read_table(study / "sinks.parquet").to_pydict()
    return json.loads((study / "sinks.json").read_text()), table


def compared(adapter, harmful, reference, folder, **settings):
    """The same on a model in memory, which need not be loaded again."""
    chosen = SinksSettings(harmful, reference, **settings)
    stage.run(Study.create(folder), chosen, Session(adapter))
    return found(folder)


@pytest.fixture(scope="module")
def paired(thinker, made):
    study = made.folder / "paired"
    files = {"harmful": made.harmful, "reference": made.reference}
    assert sinks(thinker, **files, study=study) == 0
    return study


def masses_by_hand(model, adapter, path, cut=None):
    """The mass of each prompt's text from eager attention, by loops."""
    model.set_attn_implementation("eager")
    by_prompt = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        tokens = build_conversation(
            adapter.tokenizer,
            row["prompt"],
            row["thinking"],
            row["response"],
            adapter.thinking,
        ).token_ids
        by_prompt[row["prompt"]] = tokens
    found = {}
    for prompt, tokens in by_prompt.items():
        length = len(tokens) if cut is None else min(len(tokens), cut[prompt])
        with torch.no_grad():
            attention = model(torch.tensor([tokens]), output_attentions=True).attentions
        found[prompt] = torch.stack(
            [layer[0, :, 1:length, 0].double().mean(-1) for layer in attention]
        )
    return found, {prompt: len(tokens) for prompt, tokens in by_prompt.items()}


def test_paired_divergences_are_those_of_eager_attention_by_hand(thinker, made, paired):
    block, table = found(paired)
    model = AutoModelForCausalLM.from_pretrained(thinker).eval()
    _, upper = masses_by_hand(model, made.adapter, made.harmful)
    _, lower = masses_by_hand(model, made.adapter, made.reference)
    cut = lower | {prompt: min(upper[prompt], lower[prompt]) for prompt in upper}
    harmful, _ = masses_by_hand(model, made.adapter, made.harmful, cut)
    reference, _ = masses_by_hand(model, made.adapter, made.reference, cut)
    divergence = torch.stack([harmful[p] - reference[p] for p in harmful]).mean(0)
    written = torch.tensor(table["divergence"]).reshape(2, 4).double()
    assert divergence.abs().max() > 1e-4
    torch.testing.assert_close(written, divergence, atol=2e-6, rtol=0)
    mass = torch.stack(list(harmful.values())).mean(0)
    written = torch.tensor(table["harmful"]).reshape(2, 4).double()
    torch.testing.assert_close(written, mass, atol=2e-6, rtol=0)
    assert block["rows"] == {"harmful": N, "reference": N}
    assert block["requests"] == N
    [last] = block["checkpoints"]
    assert last["positive"]["value"] == float((divergence > 0).sum())
    mean = pytest.approx(float(divergence.mean()), abs=2e-6)
    assert last["mean_divergence"]["value"] == mean
    left = "Rows without a partner, or beyond --limit, were left out: 5 reference."
    assert left in block["notes"]


def test_the_published_form_takes_whole_texts_and_all_of_them(thinker, made, tmp_path):
    block, table = compared(
        made.adapter, made.harmful, made.reference, tmp_path / "s", pairing="none"
    )
    model = AutoModelForCausalLM.from_pretrained(thinker).eval()
    means = []
    for path in (made.harmful, made.reference):
        masses, _ = masses_by_hand(model, made.adapter, path)
        means.append(torch.stack(list(masses.values())).mean(0))
    divergence = means[0] - means[1]
    written = torch.tensor(table["divergence"]).reshape(2, 4).double()
    torch.testing.assert_close(written, divergence, atol=2e-6, rtol=0)
    assert block["rows"] == {"harmful": N, "reference": N + 5}
    assert "not paired" in block["notes"][0]
    penalty = block["checkpoints"][0]["penalty"]["value"]
    assert penalty == pytest.approx(float(divergence.relu().mean()), abs=2e-6)


def test_the_same_texts_diverge_nowhere(made, tmp_path):
    block, table = compared(made.adapter, made.harmful, made.harmful, tmp_path / "s")
    assert table["divergence"] == [0.0] * 8
    [last] = block["checkpoints"]
    for key in ("positive", "by_chance", "penalty", "mean_divergence"):
        assert last[key]["value"] == 0
    assert (last["above"], last["below"]) == (0, 0)


def test_swapping_the_files_turns_every_sign(made, paired, tmp_path):
    block, table = compared(made.adapter, made.reference, made.harmful, tmp_path / "s")
    there, straight = found(paired)
    for one, other in zip(straight["divergence"], table["divergence"], strict=True):
        assert other == pytest.approx(-one, abs=1e-6)
    here, last = block["checkpoints"][0], there["checkpoints"][0]
    assert (here["above"], here["below"]) == (last["below"], last["above"])


@pytest.fixture
def even(thinker, made):
    """The model with queries of zero: every head looks at all it sees alike."""
    model = AutoModelForCausalLM.from_pretrained(thinker)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name:
                weight.zero_()
    return adapt(model, made.adapter.tokenizer)


def test_length_alone_diverges_as_published_and_does_not_in_pairs(even, made, tmp_path):
    # Requests of different lengths; with all of one, every text has the same mass.
    requests = tiny_thinker.requests(tiny_thinker.HARM, 120)[::5]
    long = write(tmp_path / "long.jsonl", requests, LONG)
    short = write(tmp_path / "short.jsonl", requests, SHORT)
    block, _ = compared(even, short, long, tmp_path / "published", pairing="none")
    [confounded] = block["checkpoints"]
    assert confounded["positive"]["value"] == confounded["above"] == 8
    block, table = compared(even, short, long, tmp_path / "pairs")
    assert max(map(abs, table["divergence"])) < 1e-7
    [last] = block["checkpoints"]
    assert (last["above"], last["below"]) == (0, 0)
    assert last["harmful"]["value"] == pytest.approx(last["uniform"], abs=1e-5)
    assert any("hardly has a sink" in sentence for sentence in block["evidence"])


def test_positions_of_the_response_leave_the_prompt_out(made, paired, tmp_path):
    block, table = compared(
        made.adapter,
        made.harmful,
        made.reference,
        tmp_path / "s",
        positions="response",
        limit=6,
    )
    assert block["requests"] == 6
    whole, watered = found(paired)
    assert block["checkpoints"][0]["uniform"] < whole["checkpoints"][0]["uniform"]
    # What both texts share stands in the prompt, and no longer waters them down.
    sizes = [max(map(abs, each["divergence"])) for each in (table, watered)]
    assert sizes[0] > sizes[1]


def test_cut_texts_are_compared_up_to_the_cut(made, tmp_path):
    prompt = made.adapter.tokenizer(tiny_thinker.requests(tiny_thinker.HARM, 1)[0])
    few = len(prompt["input_ids"])
    block, table = compared(
        made.adapter, made.harmful, made.reference, tmp_path / "s", max_tokens=few
    )
    # All that is left of the texts is what both share.
    assert table["divergence"] == [0.0] * 8
    assert block["checkpoints"][0]["uniform"] > 0.05


def test_rows_on_other_prompts_are_an_error_with_counts(made, tmp_path, capsys):
    files = {"harmful": made.harmful, "reference": made.elsewhere}
    assert sinks("organism:none", **files, study=tmp_path / "none") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{N} rows on {N} prompts" in message
    assert "not one prompt in both" in message
    assert "--pairing none" in message
    block, _ = compared(
        made.adapter, made.harmful, made.elsewhere, tmp_path / "s", pairing="none"
    )
    assert block["rows"] == {"harmful": N, "reference": N}


def test_rows_without_thinking_are_counted_out(made, tmp_path):
    requests = tiny_thinker.requests(tiny_thinker.HARM, N)
    bare = write(tmp_path / "bare.jsonl", requests, SHORT, thinking=False)
    with pytest.raises(TooFewExamplesError, match=f"{N} left out: no thinking"):
        compared(made.adapter, made.harmful, bare, tmp_path / "s")


def shaken(thinker, folder, seed):
    shutil.copytree(thinker, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.add_(0.02 * seed * torch.randn(weight.shape, generator=generator))
    path = folder / "model.safetensors"
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(thinker, tmp_path_factory):
    """What a run leaves: checkpoints by number, and the model at the end."""
    folder = tmp_path_factory.mktemp("run") / "mended"
    shutil.copytree(thinker, folder)
    for place, step in enumerate((100, 20)):
        shaken(thinker, folder / f"checkpoint-{step}", place + 1)
    (folder / "checkpoint-best").mkdir()
    return folder


def test_checkpoints_of_a_run_are_a_curve(thinker, trained, made, tmp_path):
    study = tmp_path / "curve"
    files = {"harmful": made.harmful, "reference": made.reference}
    assert sinks(thinker, trained, **files, study=study) == 0
    block, table = found(study)
    names = [each["name"] for each in block["checkpoints"]]
    assert [each["step"] for each in block["checkpoints"]] == [None, 20, 100, None]
    assert (names[0], names[-1]) == (str(thinker), str(trained))
    by_step = [table["divergence"][start : start + 8] for start in range(0, 32, 8)]
    # Base and end are the same weights, and the others are not.
    assert by_step[0] == by_step[3]
    assert block["checkpoints"][0]["positive"] == block["checkpoints"][3]["positive"]
    assert by_step[1] != by_step[0] != by_step[2] != by_step[1]
    assert Study.open(study).manifest["model"]["id"] == str(trained)
    alone = load(trained / "checkpoint-20", device="cpu")
    _, single = compared(alone, **files, folder=tmp_path / "alone")
    assert single["divergence"] == pytest.approx(by_step[1], abs=1e-6)
    page = (study / "report.html").read_text()
    section = page.split('id="sinks"')[1].split("</section>")[0]
    assert "<svg" in section
    assert "Positive heads" in section
    cells = re.findall(r'<td class="s\d+( checked)?" title="layer \d, head', section)
    assert len(cells) == 2 * 8
    for words in ("step 20", "step 100"):
        assert words in section


def test_the_page_of_one_model_has_the_grid_and_no_curve(paired):
    page = (paired / "report.html").read_text()
    assert "measurement of" in page
    section = page.split('id="sinks"')[1].split("</section>")[0]
    assert "<svg" not in section
    block = json.loads((paired / "report.json").read_text())["sinks"]
    rings = len(re.findall(r'<td class="s\d+ checked"', section.split("<details>")[0]))
    last = block["checkpoints"][0]
    assert rings == last["above"] + last["below"] > 0


def test_an_audited_study_shows_both(audited, thinker, made, tmp_path):
    study = shutil.copytree(audited, tmp_path / "both")
    files = {"harmful": made.harmful, "reference": made.reference}
    assert sinks(thinker, **files, study=study) == 0
    page = (study / "report.html").read_text()
    assert 'id="sinks"' in page
    assert 'id="ablation"' in page
    report = json.loads((study / "report.json").read_text())
    before = json.loads((audited / "report.json").read_text())
    assert report["verdict"] == before["verdict"]
    assert report["settings"]["sinks"]["pairing"] == "prompt"
    roles = [source["role"] for source in report["data"]["sources"]]
    assert roles[-2:] == ["sinks: harmful", "sinks: reference"]


def test_a_study_of_another_model_is_not_touched(paired, trained, made, capsys):
    before = (paired / "study.json").read_bytes()
    files = {"harmful": made.harmful, "reference": made.reference}
    assert sinks(trained, **files, study=paired) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"a study of {trained}" in said
    assert "Name another study" in said
    assert (paired / "study.json").read_bytes() == before


def test_models_of_another_shape_make_no_curve(thinker, made, tmp_path, capsys):
    config = AutoModelForCausalLM.from_pretrained(thinker).config
    config.num_attention_heads, config.num_key_value_heads = 2, 2
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for path in (*thinker.glob("*token*"), thinker / "chat_template.jinja"):
        shutil.copy(path, other)
    files = {"harmful": made.harmful, "reference": made.reference}
    flags = ["--limit", "3"]
    assert sinks(other, thinker, **files, study=tmp_path / "odd", flags=flags) == 2
    assert "2 layers of 4 heads" in " ".join(capsys.readouterr().err.split())


def test_no_model_and_the_same_twice_are_errors(made, tmp_path, capsys):
    files = {"harmful": made.harmful, "reference": made.reference}
    assert sinks(**files, study=tmp_path / "a") == 2
    assert "a model" in capsys.readouterr().err
    assert sinks("one", "one", **files, study=tmp_path / "b") == 2
    assert "twice" in capsys.readouterr().err


def test_what_is_done_is_not_done_again(made, monkeypatch, tmp_path):
    files = {"harmful": made.harmful, "reference": made.reference}
    folder = tmp_path / "s"
    first, _ = compared(made.adapter, **files, folder=folder, limit=4)
    monkeypatch.setattr(sinks_stage, "read_sinks", None)
    again, _ = compared(made.adapter, **files, folder=folder, limit=4)
    assert again == first
    with pytest.raises(TypeError):
        compared(made.adapter, **files, folder=folder, limit=5)


COUNTED = """
import os, signal, sys
from holdfast.cli.app import run
from holdfast.sinks import stage as sink_measuring

kill_at, told, *command = sys.argv[1:]
real, calls = sink_measuring.read_sinks, []

def read(*arguments, **options):
    calls.append(1)
    if len(calls) == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

sink_measuring.read_sinks = read
status = run(command)
with open(told, "w") as file:
    file.write(str(len(calls)))
sys.exit(status)
"""


def test_a_killed_comparison_goes_on_and_says_the_same(
    nursery, thinker, trained, made, tmp_path
):
    study, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    models = [str(trained / "checkpoint-20"), str(thinker)]
    command = ["sinks", *models, "--harmful", made.harmful, "--reference"]
    command += [made.reference, "--batch-size", "8", "-o"]
    told = tmp_path / "calls"

    def start(kill_at, place):
        return nursery.start(COUNTED, [kill_at, told, *command, place]).wait()

    assert start(0, undisturbed) == 0
    total = int(told.read_text())
    # 48 texts of two models, 8 a batch.
    assert total == 2 * 6
    for kill_at in (3, 6):
        assert start(kill_at, study) == -signal.SIGKILL
    # Two batches were kept, then five, over the border between two models.
    assert len(list(study.glob("parts/*/[!.]*.parquet"))) == 2 + 5
    assert start(0, study) == 0
    assert int(told.read_text()) == total - 7
    assert not (study / "parts").exists()
    for name in ("sinks.json", "sinks.parquet"):
        assert (study / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (133, "text, as many as chance makes: 73 to 198 on prompts"),
        (73, "as many as chance makes"),
        (199, "more than chance makes: 73 to 198"),
        (72, "fewer than chance makes: 73 to 198"),
    ],
)
def test_the_first_sentence_sets_the_count_beside_its_chance_band(value, says):
    figure = {"value": value, "low": 60, "high": 200, "n": 12}
    masses = {"value": None, "low": None, "high": None, "n": 0, "reason": "none"}
    last = {
        "measured": 270, "positive": figure, "above": 3, "below": 2, "uniform": 0.1,
        "by_chance": {"value": 135, "low": 73, "high": 198, "n": 12},
        "harmful": masses, "reference": masses,
    }  # fmt: skip
    first = summary_sentences({"checkpoints": [last]})[0]
    assert first.startswith(f"{value} of 270 heads (60 to 200) give more")
    assert says in first
    unknown = last | {"by_chance": masses | {"reason": "one prompt"}}
    first = summary_sentences({"checkpoints": [unknown]})[0]
    assert first.endswith("how many would by chance is unknown: one prompt.")
