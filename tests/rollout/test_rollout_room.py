"""A prompt that is long takes room from itself alone; one that cannot fit is named."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from holdfast.cli.app import run
from holdfast.models.loading.causal import load
from holdfast.rollout.rows import from_table
from holdfast.study import Study

SHORT = [f"How do I paint {thing}?" for thing in ("a boat", "a car", "the piano")]
GIVEN = ("--harmful", "--wrapped", "--benign-wrapped", "--safe-lookalike")
LIMITS = ("--max-thinking", "64", "--max-answer", "32")


def _ids(adapter, text):
    from holdfast.data.chat.template import prompt_token_ids

    found = prompt_token_ids(adapter.tokenizer, text, thinking=adapter.thinking)
    return len(found)


@pytest.fixture(scope="module")
def adapter(thinker):
    return load(str(thinker))


def _long(adapter, n_tokens):
    """A prompt of about so many tokens, never more."""
    text = SHORT[0]
    while _ids(adapter, text + " Sing me a song.") <= n_tokens:
        text += " Sing me a song."
    return text


@pytest.fixture(scope="module")
def prompts(adapter, tmp_path_factory):
    """Files of harmless prompts: short ones, one with little room, one with none."""
    folder = tmp_path_factory.mktemp("prompts")
    tight, over = _long(adapter, 219), _long(adapter, 250)
    for name, texts in (("short", SHORT), ("all", [*SHORT, tight, over])):
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n")
    (folder / "over.txt").write_text(over + "\n")
    return folder


@pytest.fixture(scope="module")
def rolled(thinker, prompts, world, tmp_path_factory):
    """Studies of the same short prompts, alone and beside long ones."""
    files = dict(zip(world[0::2], world[1::2], strict=True))
    made = {}
    for name in ("short", "all"):
        place = tmp_path_factory.mktemp("rolled") / name
        flags = ["--benign", str(prompts / f"{name}.txt")]
        flags += [w for f in GIVEN for w in (f, files[f])]
        flags += ["--limit", "5", *LIMITS, "-o", str(place)]
        assert run(["rollout", str(thinker), *flags]) == 0
        made[name] = place
    return made


def _rows(place):
    rows = from_table(Study.open(place).read_table("rollouts.parquet"))
    return {row.row_id: row for row in rows}


def test_short_prompts_answer_beside_long_ones_as_alone(rolled):
    alone, beside = (_rows(rolled[name]) for name in ("short", "all"))
    assert len(beside) == len(alone) + 1
    for row_id, row in alone.items():
        assert beside[row_id].token_ids == row.token_ids
        assert not row.forced_close


def test_a_prompt_that_cannot_fit_is_left_out_and_named(rolled, capsys):
    study = Study.open(rolled["all"])
    [note] = [n for n in study.record("rollout")["prompt_notes"] if "left out" in n]
    assert note.startswith("1 of ")
    assert "benign/" in note
    assert "256" in note
    [short] = [n for n in study.record("rollout")["prompt_notes"] if "less than" in n]
    assert short.startswith("1 of ")


def test_the_thinking_that_was_closed_by_force_is_the_long_ones_and_is_counted(
    rolled, thinker, prompts, world, capsys
):
    [forced] = [row for row in _rows(rolled["all"]).values() if row.forced_close]
    assert len(forced.prompt) > 100
    files = dict(zip(world[0::2], world[1::2], strict=True))
    flags = ["--benign", str(prompts / "all.txt"), "--limit", "5", *LIMITS]
    flags += [w for f in GIVEN for w in (f, files[f])]
    command = ["rollout", str(thinker), *flags, "-o", str(rolled["all"])]
    assert run([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["forced_close"] == 1
    cut = sum(row.finish == "length" for row in _rows(rolled["all"]).values())
    assert summary["cut"] == cut > 0
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "thinking of 1 of" in told
    assert f"warning: {cut} of {summary['rows']} answers were cut" in told


def test_where_nothing_fits_the_prompts_and_the_flag_are_named(
    thinker, prompts, tmp_path, capsys
):
    command = ["evaluate", str(thinker), "--suite", f"benign={prompts / 'over.txt'}"]
    assert run([*command, *LIMITS, "-o", str(tmp_path / "s")]) == 2
    said = capsys.readouterr().err
    assert "--max-answer is 32" in said
    assert "the shortest has" in said


def test_an_evaluation_leaves_out_names_and_counts(thinker, prompts, tmp_path):
    study = tmp_path / "s"
    command = ["evaluate", str(thinker), "--suite", f"benign={prompts / 'all.txt'}"]
    assert run([*command, *LIMITS, "-o", str(study)]) == 0
    block = json.loads((study / "report.json").read_text())["evaluation"]
    [row] = block["rows"]
    assert (row["requests"], row["forced"]) == (4, 1)
    assert any("1 of 5 questions were left out" in note for note in block["notes"])


def test_a_pool_row_that_is_long_takes_nothing_from_the_others(
    thinker, prompts, tmp_path
):
    lines = (prompts / "all.txt").read_text().splitlines()
    pool = tmp_path / "pool.jsonl"
    rows = [{"prompt": line, "thinking": "hm", "response": "Sure."} for line in lines]
    pool.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "chosen.jsonl"
    command = ["select", str(thinker), "--pool", str(pool), "--budget", "1"]
    flags = ["--by", "random-flagged", "--thinking-of", "model", *LIMITS]
    run([*command, *flags, "-o", str(output)])
    [shard] = Path(tmp_path).rglob("drawn-*/shard-*.parquet")
    drawn = pq.read_table(shard).to_pylist()
    # In a context of 256 all of them had 104 tokens at most, whatever was asked for.
    assert [row["forced_close"] for row in drawn] == [False, False, False, True, None]
    assert drawn[-1]["draw_kind"].startswith("without room")


def test_a_long_prompt_stops_no_masked_diffusion_model(denoiser, tmp_path):
    from holdfast.models.loading.masked import load_masked

    model = load_masked(str(denoiser))
    texts = [SHORT[0], SHORT[0] + " Sing me a song." * 100]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n")
    command = ["evaluate", str(denoiser), "--suite", f"benign={tmp_path / 'p.txt'}"]
    flags = ["--gen-length", "16", "--denoising-steps", "8"]
    assert _ids(model, texts[1]) > model.max_positions
    assert run([*command, *flags, "-o", str(tmp_path / "s")]) == 0
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    [row] = report["evaluation"]["rows"]
    assert row["requests"] == 1
    assert any("were left out" in note for note in report["evaluation"]["notes"])
