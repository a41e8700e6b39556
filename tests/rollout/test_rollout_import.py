import json

import tiny_thinker
from holdfast.cli.app import run
from holdfast.rollout.rows import from_table
from holdfast.study import Study


def completions():
    for request in tiny_thinker.requests(tiny_thinker.HARM, 60):
        for wrapper in (None, "song"):
            prompt, thought, answer = tiny_thinker.scene(request, wrapper, True)
            yield prompt, thought, answer, "harmful", wrapper, request
    for request in tiny_thinker.requests(tiny_thinker.CARE, 60):
        prompt, thought, answer = tiny_thinker.scene(request, None, False)
        yield prompt, thought, answer, "benign", None, request


def test_completions_made_elsewhere_walk_through_the_whole_audit(
    thinker, tmp_path, capsys
):
    path = tmp_path / "made.jsonl"
    lines = [
        {
            "prompt": prompt,
            "completion": f"{thought}\n</think>\n\n{answer}",
            "label": label,
            "wrapper": wrapper,
            "request_id": request,
        }
        for prompt, thought, answer, label, wrapper, request in completions()
    ]
    lines.append({"prompt": "What now?", "completion": "I am still thinking"})
    path.write_text("\n".join(map(json.dumps, lines)))
    study = tmp_path / "study"
    command = ["audit", str(thinker), "--import", str(path), "-o", str(study), "--json"]
    command += ["--max-thinking", "48", "--max-answer", "32"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    attack = report["attack_success"]["by_wrapper"]["song"]["attack_success"]
    assert attack["value"] == 1
    assert report["probe"]["accuracy"]["value"] >= 0.95
    assert report["data"]["sources"][0]["source"] == "made.jsonl"
    rows = from_table(Study.open(study).read_table("rollouts.parquet"))
    unfinished = next(row for row in rows if row.prompt == "What now?")
    assert not unfinished.closed
    assert unfinished.verdict == "degenerate"
    assert unfinished.group is None
    finished = rows[0]
    assert finished.thinking.startswith("The user wants")
    assert run(command) == 0
    assert "up to date" in capsys.readouterr().err
