"""Damaged parts are worked out again; a place that cannot be is refused at once."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast.cli.app import run
from holdfast.errors import InputError
from holdfast.report.progress import Silent
from holdfast.rollout.session import Session
from holdfast.study import DamagedTableError, Study, read_table, require_place
from holdfast.study.batches import in_batches

ITEMS = [f"{place:02}" for place in range(8)]


def _cut_to(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def _spoil_the_middle(path):
    data = bytearray(path.read_bytes())
    data[4:60] = b"\x00" * 56
    path.write_bytes(bytes(data))


def _without_rows(path):
    pq.write_table(pa.table({"other": [1, 2]}), path)


DAMAGE = {
    "empty": _cut_to(0),
    "100 bytes": _cut_to(100),
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "another text": lambda path: path.write_text("x" * 100),
    "another table": _without_rows,
    "spoilt inside": _spoil_the_middle,
}


class Told(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


def _go(study, run_on, progress):
    def work(batch):
        run_on.append(batch)
        return pa.table({"row_id": batch, "text": [each * 50 for each in batch]})

    return in_batches(
        study,
        "s",
        ITEMS,
        name=str,
        length=len,
        batch_size=4,
        work=work,
        progress=progress,
        label="",
    )


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_part_is_worked_out_again_and_said(tmp_path, damage):
    study = Study.create(tmp_path / "s")
    study.begin("s", {}, {})
    expected = _go(study, [], Silent())
    first, second = study.parts("s")
    damage(first)
    again, told = [], Told()
    assert _go(study, again, told).equals(expected)
    [batch] = again
    assert not set(batch) & set(read_table(second).column("row_id").to_pylist())
    [warning] = told.warnings
    assert str(first) in warning
    # And the run after that finds all of them whole.
    again, told = [], Told()
    assert _go(study, again, told).equals(expected)
    assert (again, told.warnings) == ([], [])


def test_a_table_that_cannot_be_decoded_is_damaged_and_no_traceback(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"row_id": ["a" * 400] * 50}), path)
    _spoil_the_middle(path)
    with pytest.raises(DamagedTableError):
        read_table(path)
    study = Study.create(tmp_path / "s")
    (tmp_path / "s" / "x.parquet").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="damaged file"):
        study.read_table("x.parquet")


def test_every_damaged_shard_of_a_pool_is_scored_again(thinker, tmp_path, capsys):
    pool = tmp_path / "pool.jsonl"
    rows = [
        {"prompt": f"How do I paint {n} boats?", "thinking": "hm", "response": "Sure."}
        for n in range(6)
    ]
    pool.write_text("\n".join(map(json.dumps, rows)))
    command = ["select", str(thinker), "--pool", str(pool), "--budget", "2"]
    command += ["--by", "loss", "--shard-rows", "3", "-o", str(tmp_path / "a.jsonl")]
    assert run(command) == 0
    chosen = (tmp_path / "a.jsonl").read_bytes()
    first, second = sorted(tmp_path.rglob("scores-*/shard-*.parquet"))
    whole = first.read_bytes()
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:100])
    capsys.readouterr()
    assert run(command) == 0
    assert "damaged" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == chosen
    assert first.read_bytes() == whole


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    return path


VERBS = {
    "audit": ("audit", "MODEL"),
    "rollout": ("rollout", "MODEL"),
    "evaluate": ("evaluate", "MODEL"),
    "sinks": ("sinks", "MODEL", "--harmful", "h", "--reference", "r"),
    "finetune": ("finetune", "MODEL", "--data", "d.jsonl"),
    "select": ("select", "MODEL", "--pool", "POOL", "--budget", "1", "--by", "loss"),
    "compare": ("compare", "STUDY", "STUDY"),
    "export": ("export", "STUDY"),
    "organism export": ("organism", "export", "cliff"),
    "organism train": ("organism", "train", "cliff"),
}


@pytest.mark.parametrize("words", VERBS.values(), ids=VERBS)
def test_no_verb_begins_where_a_folder_on_the_way_is_a_file(
    words, file, tmp_path, capsys, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(Session, "speaker", property(never))
    Study.create(tmp_path / "study")
    pool = tmp_path / "pool.jsonl"
    pool.write_text(json.dumps({"prompt": "a", "thinking": "b", "response": "c"}))
    known = {"MODEL": "organism:cliff", "STUDY": tmp_path / "study", "POOL": pool}
    command = [str(known.get(word, word)) for word in words]
    below = file / ("x.jsonl" if words[0] == "select" else "x")
    assert run([*command, "-o", str(below)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert str(file) in said[-1]
    assert "no folder" in said[-1]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["n" * 300, "a/" + "n" * 300 + "/b"])
def test_a_name_that_no_file_system_takes_is_bad_input(tmp_path, name):
    with pytest.raises(InputError, match="too long"):
        Study.create(tmp_path / name)


def test_a_link_to_nowhere_and_one_in_circles_are_no_folders(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for name in ("nowhere", "round"):
        with pytest.raises(InputError, match="a place to write to"):
            require_place(tmp_path / name / "x", folder=True)


def test_a_folder_is_no_page(tmp_path, capsys):
    with pytest.raises(InputError, match="a folder of that name"):
        require_place(tmp_path, folder=False)
    require_place(tmp_path / "page.html", folder=False)
    require_place(Path("page.html"), folder=False)
