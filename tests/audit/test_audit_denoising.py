"""A masked-diffusion model through rollout, signal, guard, report and evaluate."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_denoiser
import tiny_thinker
from holdfast.cli.app import run
from holdfast.dynamics.rows import read_signal
from holdfast.dynamics.signal import anchor_signal
from holdfast.dynamics.sources import PUBLISHED, read_anchors
from holdfast.dynamics.states import LiveSignal
from holdfast.dynamics.trajectories import UNPARSED
from holdfast.errors import UnsupportedFamilyError
from holdfast.judges.degenerate import is_half_decoded
from holdfast.models.diffusion.denoise import denoise
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.models.loading.masked import load_masked
from holdfast.rollout.rows import from_table
from holdfast.rollout.sampling import read_steps
from holdfast.rollout.session import Session
from holdfast.study import Study

STEPS = 6
FEW = ("--min-anchors", "8", "--steps", str(STEPS))
GUARD = ("--min-train", "4", "--min-calibration", "4", "--rates", "0.2")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Prompt files of the little world, as flags of the command line."""
    folder = tmp_path_factory.mktemp("asked")
    files = tiny_thinker.write_world(folder, n=40)
    return [
        word
        for role, path in files.items()
        for word in (f"--{role.replace('_', '-')}", path)
    ]


@pytest.fixture(scope="module")
def watched(denoiser, asked, tmp_path_factory):
    """A study with a signal, which no test changes."""
    study = tmp_path_factory.mktemp("denoised") / "study"
    command = ["rollout", str(denoiser), *asked, "--denoising-steps", str(STEPS)]
    assert run([*command, "-o", str(study)]) == 0
    assert run(["signal", str(study), *FEW]) == 0
    return study


def rows_of(study):
    table = Study.open(study).read_table("rollouts.parquet")
    return {row.row_id: row for row in from_table(table)}


def signal_of(study, channel="compliance_logit"):
    found = read_signal(Study.open(study))
    names = [row.row_id for row in found.rows]
    return dict(zip(names, found.channels[channel], strict=True))


def test_answers_have_their_steps_beside_them(watched, denoiser):
    rows, steps = rows_of(watched), read_steps(Study.open(watched))
    assert rows.keys() == steps.keys()
    tokenizer = AutoTokenizer.from_pretrained(denoiser)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for row_id, row in rows.items():
        how = steps[row_id]
        assert len(how.response) == tiny_denoiser.LENGTH
        assert how.n_steps == STEPS
        # Each step commits to as many tokens as every other.
        counts = torch.bincount(torch.tensor(how.committed_at)).tolist()
        assert counts == [tiny_denoiser.LENGTH // STEPS] * STEPS
        assert how.drafts[-1] == how.response
        written = row.token_ids[row.spans.answer[0] :]
        assert how.response[: len(written)] == written
        assert written[-1] == end
    verdicts = {(row.role, row.verdict) for row in rows.values()}
    assert {("harmful", "refused"), ("benign", "complied")} <= verdicts
    assert ("wrapped", "complied") in verdicts


@torch.no_grad()
def test_the_signal_is_that_of_a_slow_loop(watched, denoiser):
    """One row at a time, no batch: mask what was open, pass, pool what is settled."""
    model = AutoModelForCausalLM.from_pretrained(denoiser).eval()
    steps, rows = read_steps(Study.open(watched)), rows_of(watched)
    mask = model.config.mask_token_id

    def states(row_id):
        how, row = steps[row_id], rows[row_id]
        prompt, pooled = list(row.token_ids[: row.spans.prompt[1]]), []
        for step in range(STEPS):
            text = [
                mask if at >= step else token
                for token, at in zip(how.response, how.committed_at, strict=True)
            ]
            out = model(torch.tensor([prompt + text]), output_hidden_states=True)
            kept = [at <= step for at in how.committed_at]
            pooled.append(out.hidden_states[-1][0, len(prompt) :][kept].mean(0))
        return torch.stack(pooled)

    facts = json.loads((watched / "anchors/published.json").read_text())
    chosen = {"compliant": [], "refused": []}
    for row_id, row in rows.items():
        if row.split == "train" and row.request_id in facts["taken"]:
            if (row.role, row.verdict) == ("benign", "complied"):
                chosen["compliant"].append(states(row_id))
            if (row.role, row.verdict) == ("harmful", "refused"):
                chosen["refused"].append(states(row_id))
    held = read_anchors(watched, PUBLISHED, facts["identity"]).anchors
    for side, found in chosen.items():
        mean = torch.stack(found).mean(0)
        torch.testing.assert_close(getattr(held, side), mean, atol=1e-4, rtol=0)
    found = signal_of(watched)
    for row_id in list(rows)[::50]:
        near, far = (
            1 - torch.cosine_similarity(states(row_id).double(), side.double(), dim=-1)
            for side in (held.compliant, held.refused)
        )
        expected = torch.sigmoid((torch.log(far + 1e-8) - torch.log(near + 1e-8)) / 0.1)
        torch.testing.assert_close(
            torch.sigmoid(found[row_id]).double(), expected, atol=1e-4, rtol=0
        )


def test_the_signal_while_decoding_is_the_same(watched, denoiser):
    rows, found = rows_of(watched), signal_of(watched)
    facts = json.loads((watched / "anchors/published.json").read_text())
    held = anchor_signal(read_anchors(watched, PUBLISHED, facts["identity"]).anchors)
    chosen = list(rows.values())[::40]
    prompts = [(row.token_ids[: row.spans.prompt[1]], row.seed) for row in chosen]
    traces = denoise(
        load_masked(denoiser),
        prompts,
        UnmaskingSchedule(gen_length=tiny_denoiser.LENGTH, steps=STEPS),
        batch_size=3,
        observe=LiveSignal(held, "committed"),
    )
    for drawn in (each for batch in traces for each in batch):
        row = chosen[drawn.index]
        if drawn.min_margin < 1e-5:
            continue
        assert drawn.token_ids == row.token_ids
        torch.testing.assert_close(
            torch.sigmoid(drawn.trace.observed),
            torch.sigmoid(found[row.row_id]),
            atol=1e-4,
            rtol=0,
        )


def test_another_batch_size_changes_nothing(watched, tmp_path):
    study = shutil.copytree(watched, tmp_path / "study")
    shutil.rmtree(study / "anchors")
    (study / "signal.safetensors").unlink()
    assert run(["signal", str(study), *FEW, "--batch-size", "5"]) == 0
    one, other = signal_of(watched), signal_of(study)
    for row_id, values in one.items():
        torch.testing.assert_close(
            torch.sigmoid(other[row_id]), torch.sigmoid(values), atol=1e-4, rtol=0
        )


def test_anchors_separate_and_drafts_are_read(watched):
    found = json.loads((watched / "signal.json").read_text())
    figures = found["figures"]
    assert figures["last_step_auroc"]["value"] > 0.95
    assert found["identity"]["sampler"]["kind"] == "diffusion"
    assert found["identity"]["sampler"]["steps"] == STEPS
    assert {"probe", "logit_difference", "reading"} <= set(found["channels"])
    # The two readings of the full-recovery rate have their own denominators.
    assert figures["text_remasked"]["n"] == figures["text_harmful"]["n"]
    assert figures["text_recovered_of_remasked"]["n"] <= figures["text_remasked"]["n"]
    readings, changed = signal_of(watched, "reading"), signal_of(watched, "changed")
    for row_id, row in rows_of(watched).items():
        assert float(changed[row_id][-1]) == 0
        expected = {"refused": 0.0, "complied": 1.0}.get(row.verdict, -1.0)
        assert float(readings[row_id][-1]) == expected


def test_drafts_that_nobody_can_read_are_neither_harm_nor_its_absence(watched):
    found = Study.open(watched)
    tokenizer = AutoTokenizer.from_pretrained(found.manifest["model"]["id"])
    steps, readings = read_steps(found), signal_of(watched, "reading")
    seen = set()
    for row_id, how in steps.items():
        for step, draft in enumerate(how.drafts[:STEPS]):
            text = tokenizer.decode(draft).split("<|end|>")[0]
            broken = draft != how.response and is_half_decoded(text)
            seen.add((broken, float(readings[row_id][step])))
            if broken:
                assert float(readings[row_id][step]) == UNPARSED
    assert {(True, -1.0), (False, 0.0), (False, 1.0)} <= seen


def test_detectors_and_the_page(watched, tmp_path):
    study = shutil.copytree(watched, tmp_path / "study")
    assert run(["guard", "fit", str(study), *GUARD]) == 0
    assert run(["guard", "evaluate", str(study), "--choose-on", "maybe"]) == 0
    assert run(["report", str(study)]) == 0
    report = json.loads((study / "report.json").read_text())
    named = {row["detector"] for row in report["guard"]["reported"]}
    assert {"autoencoder", "residual", "mahalanobis", "probe_mean", "text"} <= named
    assert "perplexity" not in named
    page = (study / "report.html").read_text()
    assert "What stood where at every step" in page
    assert page.count('class="fresh"') > page.count('<table class="grid">') > 0
    [example, *_] = json.loads((study / "signal_examples.json").read_text())
    marks = [[state for _, state in row] for row in example["grid"]]
    assert len(marks) == STEPS
    for place in range(len(marks[0])):
        column = [row[place] for row in marks]
        # Open, then fresh once, then kept.
        at = column.index("fresh")
        assert column == ["open"] * at + ["fresh"] + ["kept"] * (STEPS - at - 1)


def test_suites_are_asked_and_judged(denoiser, tmp_path):
    study = tmp_path / "study"
    command = ["evaluate", str(denoiser), "--limit", "2", "--attack", "role_play"]
    assert run([*command, "--block-length", "1", "-o", str(study)]) == 0
    found = json.loads((study / "evaluation.json").read_text())
    sampling = found["generation"]["sampling"]
    assert sampling["block_length"] == 1
    assert sampling["steps"] == sampling["gen_length"] == tiny_denoiser.LENGTH


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--block-length", "7"), "multiple of the block length, 7"),
        (("--gen-length", "0"), "--gen-length of 1 or more"),
        (("--denoising-steps", "99"), "at most 24"),
        (("--threshold", "0.9", "--denoising-steps", "4"), "no number of steps"),
        (("--top-p", "0.9"), "no --top-p with a masked-diffusion model"),
        (("--thinking", "required"), "thinking"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    denoiser, asked, tmp_path, capsys, flags, says
):
    command = ["rollout", str(denoiser), *asked, *flags, "-o", str(tmp_path / "s")]
    assert run(command) in (2, 3)
    said = capsys.readouterr().err
    assert says in said
    assert not (tmp_path / "s" / "rollouts.parquet").exists()


def test_flags_of_masks_are_refused_for_a_model_that_has_none(
    thinker, world, tmp_path, capsys
):
    command = ["rollout", str(thinker), *world, "--remasking", "random"]
    assert run([*command, "-o", str(tmp_path / "s")]) == 2
    assert "--remasking" in capsys.readouterr().err


def test_what_measures_heads_refuses_it(denoiser, capsys):
    with pytest.raises(UnsupportedFamilyError, match="Use `holdfast rollout`"):
        _ = Session(str(denoiser)).adapter
    # The proofs that run on loading are shown all the same.
    assert run(["doctor", str(denoiser), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["mask_token_id"] > 0
    assert all(proof["passed"] for proof in found["proofs"])


def test_too_few_refusals_are_refused_with_the_counts(watched, tmp_path, capsys):
    study = shutil.copytree(watched, tmp_path / "study")
    assert run(["signal", str(study), "--steps", "5"]) == 4
    said = capsys.readouterr().err
    assert "at least 20 training requests" in said
    assert "harmful refused" in said


@pytest.mark.parametrize(
    ("again", "flags", "says"),
    [
        (("--denoising-steps", "12"), ("--steps", "6"), "sampler.steps 12; found"),
        (
            ("--denoising-steps", "6", "--remasking", "random"),
            ("--steps", "6"),
            'sampler.remasking "random"; found sampler.remasking "low_confidence"',
        ),
        (("--denoising-steps", "6"), ("--steps", "7"), "steps 7; found steps 6"),
    ],
)
def test_anchors_of_another_sampler_are_refused(
    watched, denoiser, asked, tmp_path, capsys, again, flags, says
):
    study = tmp_path / "study"
    few = ["--limit", "4", "-o", str(study)]
    assert run(["rollout", str(denoiser), *asked, *again, *few]) == 0
    command = ["signal", str(study), *flags, "--anchors", str(watched)]
    assert run(command) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Fit anchors with these settings" in said


def test_answers_without_steps_are_refused(watched, tmp_path, capsys):
    study = shutil.copytree(watched, tmp_path / "study")
    (study / "steps.parquet").unlink()
    assert run(["signal", str(study), *FEW, "--mode", "repo"]) == 2
    assert "imported have no steps" in capsys.readouterr().err


def test_models_that_are_not_read_are_refused_by_name(denoiser, tmp_path, capsys):
    def changed(name, **config):
        folder = shutil.copytree(denoiser, tmp_path / name)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    def refused(folder):
        assert run(["rollout", str(folder), "-o", str(tmp_path / "study")]) == 3
        return capsys.readouterr().err

    nameless = changed("nameless", mask_token_id=None)
    tiny_thinker.tokenizer(tiny_thinker.NO_THINKING).save_pretrained(nameless)
    said = refused(nameless)
    assert "a tokenizer without a mask token" in said
    assert "Name the token that the model was trained to fill in" in said
    code = {"AutoModel": "modeling_sdar.SDAR"}
    said = refused(changed("sdar", model_type="sdar", auto_map=code))
    assert "`sdar`" in said
    assert "nobody has proved its attention" in said
    said = refused(changed("unheard_of", model_type="unheard_of", auto_map=code))
    assert "such code is never run" in said
    assert "converted to its class in transformers" in said
