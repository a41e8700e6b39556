import json
import os
import random
import signal
import time

import pytest

from holdfast.cli.app import run
from holdfast.engines import port
from holdfast.errors import StorageError
from holdfast.models.decoding import generate as decoding_generate
from holdfast.rollout.rows import from_table
from holdfast.study import Study

RUN = """
import sys
from holdfast.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def without_run(path):
    report = json.loads(path.read_text())
    report.pop("run")
    return report


def finished(study):
    stages = json.loads((study / "study.json").read_text())["stages"]
    return {name for name, record in stages.items() if record["state"] == "done"}


def wait_for_files(study, count):
    """Wait until a running audit has written so many more batches."""
    seen = parts(study)
    deadline = time.monotonic() + 120
    while count > 0 and time.monotonic() < deadline:
        new = parts(study) - seen
        seen |= new
        count -= len(new)
        time.sleep(0.003)
    assert count <= 0


def parts(study):
    return {str(path) for path in study.glob("parts/*/[!.]*.parquet")}


def test_five_kills_lose_one_batch_each_and_change_nothing(
    nursery, thinker, world, tmp_path
):
    study, timed = tmp_path / "killed", tmp_path / "undisturbed"
    # Single heads come last, after more files than the kills wait for.
    flags = ["--no-heads", "--batch-size", "16", "--json", "-o"]
    command = ["audit", str(thinker), *world, *flags]
    assert nursery.start(RUN, [*command, timed]).wait() == 0
    chance = random.Random(0)
    for _ in range(5):
        before = parts(study)
        child = nursery.start(RUN, [*command, study])
        wait_for_files(study, chance.randint(2, 14))
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        # What was on disk is still there, or was merged into its stage's own file.
        assert before <= parts(study) or finished(study)
    told = tmp_path / "told.json"
    assert nursery.start(RUN, [*command, study], stdout=told).wait() == 0
    report = json.loads(told.read_text())
    assert not (study / "parts").exists()
    assert not list(study.rglob("*.tmp"))
    assert without_run(study / "report.json") == without_run(timed / "report.json")
    assert report["verdict"]["attack_succeeds"] is True


def test_ctrl_c_says_how_to_go_on_and_keeps_what_was_drawn(
    thinker, world, tmp_path, monkeypatch, capsys
):
    study = tmp_path / "interrupted"
    command = ["rollout", str(thinker), *world, "-o", str(study), "--batch-size", "24"]
    command += ["--limit", "20"]
    real, calls = decoding_generate.generate, []

    def generate(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(port, "generate", generate)
    # A shell starts its background jobs with SIGINT ignored, and CI may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Run the same command again to continue" in capsys.readouterr().err
    assert len(parts(study)) == 3
    assert run(command) == 0
    # Three batches were kept; the fourth was begun and is drawn again.
    n_rows = Study.open(study).read_table("rollouts.parquet").num_rows
    assert len(calls) == 4 + -(-n_rows // 24) - 3


def test_a_full_disk_ends_with_a_message_and_keeps_what_was_drawn(
    thinker, world, tmp_path, monkeypatch, capsys
):
    study = tmp_path / "full"
    command = ["rollout", str(thinker), *world, "-o", str(study), "--batch-size", "32"]
    command += ["--limit", "20"]
    real, writes = os.fsync, []

    def fsync(descriptor):
        writes.append(1)
        if len(writes) > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert run(command) == 5
    message = capsys.readouterr().err
    assert "no space left" in message
    assert "Traceback" not in message
    kept = parts(study)
    assert 0 < len(kept) < 5
    assert run(command) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_disk_is_told_as_such(thinker, world, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=32k tmpfs {disk} 2>/dev/null"):
        pytest.skip("this machine lets nobody mount")
    try:
        command = ["rollout", str(thinker), *world, "-o", str(disk / "study")]
        status = run([*command, "--batch-size", "16"])
    finally:
        os.system(f"umount {disk}")
    assert status == 5
    assert "no space left" in capsys.readouterr().err


def test_a_read_only_study_ends_with_a_message(
    audited, thinker, world, monkeypatch, capsys
):
    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    command = ["audit", str(thinker), *world, "-o", str(audited), "--seed", "5"]
    assert run(command) == 5
    assert "read-only file system" in capsys.readouterr().err


def test_a_study_under_a_read_only_folder_is_no_traceback(tmp_path):
    study = Study.create(tmp_path / "study")
    with pytest.raises(StorageError, match="permission to write"):
        # A folder in the place of the file is the one refusal that root meets too.
        _write_over_a_folder(study)


def _write_over_a_folder(study):
    from holdfast.study import storing

    with storing(study.path("x")):
        raise PermissionError(13, "Permission denied")


def test_the_plan_of_batches_never_changes_an_answer(thinker, world, tmp_path):
    drawn = []
    for size in ("1", "7", "32"):
        study = tmp_path / size
        flags = ["--batch-size", size, "--temperature", "1.3", "--limit", "12"]
        assert run(["rollout", str(thinker), *world, "-o", str(study), *flags]) == 0
        rows = from_table(Study.open(study).read_table("rollouts.parquet"))
        drawn.append({row.row_id: row for row in rows})
    first, *others = drawn
    assert len({row.token_ids for row in first.values()}) > 40
    for other in others:
        assert other.keys() == first.keys()
        for name, row in first.items():
            assert other[name].token_ids == row.token_ids or row.min_top2_gap < 1e-4


def test_two_samples_of_a_prompt_differ_and_share_their_cluster(
    thinker, world, tmp_path
):
    study = tmp_path / "samples"
    flags = ["--samples", "2", "--temperature", "1.5", "--limit", "10"]
    assert run(["rollout", str(thinker), *world, "-o", str(study), *flags]) == 0
    rows = from_table(Study.open(study).read_table("rollouts.parquet"))
    pairs = {}
    for row in rows:
        pairs.setdefault((row.role, row.prompt_id), []).append(row)
    assert all(len(pair) == 2 for pair in pairs.values())
    assert all(a.request_id == b.request_id for a, b in pairs.values())
    assert all(a.seed != b.seed for a, b in pairs.values())
    assert any(a.token_ids != b.token_ids for a, b in pairs.values())
