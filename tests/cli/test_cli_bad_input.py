import json
import shutil
import subprocess
import sys

import pytest

from holdfast.cli.app import run


def fails(capsys, status, *words, says):
    """Run a command that must fail with a status and one clear message."""
    assert run([str(word) for word in words]) == status
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in says:
        assert part in message, message
    return message


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", "", ["empty.csv"]),
        ("odd.csv", "alpha,beta\n1,2\n3,4\n", ["odd.csv", "alpha", "beta", "--column"]),
        ("bad.jsonl", '{"goal": "a"}\n{"goal": \n', ["bad.jsonl", "line 2"]),
        ("latin.txt", "caf\xe9 one\nmore\n".encode("latin-1"), ["latin.txt", "UTF-8"]),
        ("same.txt", "One thing.\none  thing.\n", ["same.txt", "say the same"]),
    ],
)
def test_a_bad_prompt_file_is_named(thinker, tmp_path, capsys, name, content, says):
    path = write(tmp_path, name, content)
    study = tmp_path / "study"
    fails(capsys, 2, "audit", thinker, "--harmful", path, "-o", study, says=says)
    assert not (study / "rollouts.parquet").exists()


def test_a_missing_prompt_file_is_named(thinker, tmp_path, capsys):
    command = ("audit", thinker, "--benign", tmp_path / "no.csv", "-o", tmp_path / "s")
    fails(capsys, 2, *command, says=["no.csv", "no such file"])


def test_a_directory_that_is_no_model_is_named(world, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(capsys, 2, "audit", empty, *world, "-o", tmp_path / "s", says=[str(empty)])


def test_a_refused_family_is_named_with_its_reason(thinker, world, tmp_path, capsys):
    model = tmp_path / "bert"
    shutil.copytree(thinker, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (model / "config.json").write_text(json.dumps(config))
    says = ["bert", "both ways"]
    fails(capsys, 3, "doctor", model, says=says)
    fails(capsys, 3, "audit", model, *world, "-o", tmp_path / "s", says=says)


def test_truncated_weights_are_named(thinker, world, tmp_path, capsys):
    model = tmp_path / "truncated"
    shutil.copytree(thinker, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    says = ["model.safetensors"]
    fails(capsys, 3, "audit", model, *world, "-o", tmp_path / "s", says=says)


def test_a_hub_id_while_offline_is_told_at_once(world, tmp_path, capsys):
    command = ("audit", "nobody/no-such-model", *world, "-o", tmp_path / "s")
    fails(capsys, 5, *command, says=["nobody/no-such-model"])


def test_a_hub_dataset_while_offline_is_told_at_once(thinker, tmp_path, capsys):
    command = (
        "audit",
        thinker,
        "--harmful",
        "hub:nobody/nothing",
        "-o",
        tmp_path / "s",
    )
    fails(capsys, 5, *command, says=["nobody/nothing"])


def test_required_thinking_without_a_format_is_an_error(
    plain_model, world, tmp_path, capsys
):
    command = ("audit", plain_model, *world, "-o", tmp_path / "s")
    fails(capsys, 3, *command, "--thinking", "required", says=["--thinking auto"])


def test_a_model_without_thinking_has_outcomes_and_a_reason(
    plain_model, world, tmp_path, capsys
):
    study = tmp_path / "s"
    command = ["audit", str(plain_model), *world, "-o", str(study), "--json"]
    assert run([*command, "--limit", "30"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["thinking"] is None
    assert report["verdict"]["cliff"] is None
    assert "no thinking format" in report["verdict"]["reasons"]["cliff"]
    assert report["verdict"]["reasons"]["sparse"] == (
        "Single heads could not be looked at: the model has no thinking format, so "
        "there is no plateau."
    )
    blocks = [report["controls"], *report["trace"].values()]
    figures = [f for block in blocks for f in block.values() if isinstance(f, dict)]
    assert {figure["reason"] for figure in figures} == {
        "the model has no thinking format, so there is no plateau"
    }
    assert "Add about" not in json.dumps(report)
    page = (study / "report.html").read_text()
    assert "No control was measured: the model has no thinking format" in page
    assert page.count("the model has no thinking format") < 8
    assert report["outcomes"]["harmful"]["refused"]["n"] == 30
    assert report["trace"]["benign"]["plateau"]["value"] is None
    assert (study / "report.html").exists()


def test_a_verb_says_why_a_model_without_thinking_has_no_probe_and_no_trace(
    plain_model, world, tmp_path, capsys
):
    study = str(tmp_path / "s")
    command = ["audit", str(plain_model), *world, "-o", study, "--limit", "26"]
    assert run(command) == 0
    told = capsys.readouterr()
    assert "wrapped: 26 of 180 rows from " in told.err
    assert "154 prompts were left out by --limit 26." in told.err
    page = (tmp_path / "s" / "report.html").read_text()
    assert "<td>26 of 180</td>" in page
    for _ in range(2):
        assert run(["probe", study, "--json"]) == 0
        told = capsys.readouterr()
        figures = json.loads(told.out)
        assert set(figures) >= {"accuracy", "auroc", "control_auroc"}
        assert {figure["value"] for figure in figures.values()} == {None}
        [reason] = {figure["reason"] for figure in figures.values()}
        assert "without thinking nothing would be read off it" in reason
        assert f"No probe was fitted: {reason}." in told.err
        assert "up to date" not in told.err
    assert run(["probe", study]) == 0
    assert "not measured" in capsys.readouterr().out
    assert run(["trace", study, "--json"]) == 0
    traced = json.loads(capsys.readouterr().out)
    assert {figure["value"] for figure in traced["controls"].values()} == {None}


def test_too_few_refusals_are_counted_and_the_outcomes_kept(
    thinker, world, tmp_path, capsys
):
    study = tmp_path / "few"
    command = ("audit", thinker, *world, "-o", study, "--limit", "26")
    message = fails(capsys, 4, *command, says=["refused harmful", "Add about"])
    assert "of 26 rows" in message
    assert "Raise --limit, which was 26" in message
    report = json.loads((study / "report.json").read_text())
    assert report["outcomes"]["harmful"]["refused"]["n"] == 26
    assert report["probe"]["accuracy"]["value"] is None
    assert "refused harmful" in report["probe"]["accuracy"]["reason"]
    fails(capsys, 4, "probe", study, says=["refused harmful"])


def test_stages_name_what_they_lack(tmp_path, capsys, audited):
    fails(capsys, 2, "probe", tmp_path, says=["no readable study.json"])
    fails(
        capsys, 2, "compare", audited, tmp_path / "x", says=["no readable study.json"]
    )
    broken = tmp_path / "broken"
    shutil.copytree(audited, broken)
    (broken / "probes" / "published.safetensors").write_bytes(b"nonsense")
    fails(capsys, 2, "trace", broken, says=["published.safetensors", "damaged"])
    (broken / "rollouts.parquet").unlink()
    fails(capsys, 2, "report", broken, says=["rollouts.parquet", "holdfast rollout"])


def test_a_study_of_another_model_is_not_written_over(
    audited, plain_model, world, capsys
):
    before = (audited / "rollouts.parquet").read_bytes()
    command = ("audit", plain_model, *world, "-o", audited)
    fails(capsys, 2, *command, says=["another study with -o"])
    assert (audited / "rollouts.parquet").read_bytes() == before


def test_other_weights_do_not_continue_a_study(audited, thinker, tmp_path, capsys):
    study = tmp_path / "study"
    shutil.copytree(audited, study)
    manifest = json.loads((study / "study.json").read_text())
    manifest["model"]["weights_sha256"] = "0" * 64
    (study / "study.json").write_text(json.dumps(manifest))
    command = ("trace", study, "--window", "9")
    fails(capsys, 2, *command, says=["weights_sha256"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["audit", "--limit", "0"], ["--limit"]),
        (["audit", "--temperature", "-1"], ["--temperature"]),
        (["audit", "--top-p", "2"], ["--top-p"]),
        (["audit", "--batch-size", "0"], ["--batch-size"]),
        (["audit", "--column", "sideways=goal"], ["sideways"]),
        (["audit", "--column", "a", "--column", "harmful=b"], ["harmful"]),
        (["audit", "--samples", "many"], ["--samples"]),
        (["audit", "--no-such-flag"], ["--no-such-flag"]),
        (["audit", "--thinking", "perhaps"], ["--thinking"]),
        (["no-such-verb"], ["no-such-verb"]),
        (["doctor", "organism:unicorn"], ["organism:cliff"]),
        (["audit", "--config", "no-such-file.toml"], ["no-such-file.toml"]),
    ],
)
def test_a_bad_command_says_what_is_wrong_with_it(words, says, capsys):
    fails(capsys, 2, *words, says=says)


def test_a_real_process_prints_no_traceback_and_has_its_status(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "holdfast", "report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("holdfast: expected a study")
    assert "Traceback" not in found.stderr
