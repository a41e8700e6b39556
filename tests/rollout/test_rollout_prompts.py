import json

import pytest

from holdfast.data.prompts import Prompt
from holdfast.errors import PromptFileError
from holdfast.rollout.imported import read_completions
from holdfast.rollout.prompts import UNNAMED_WRAPPER, gather, row_seed, wrapped
from holdfast.rollout.settings import RolloutSettings


def prompt(name, label="harmful", wrapper=None):
    return Prompt(name, name, f"text of {name}", label, "test", wrapper)


def test_a_row_s_seed_depends_on_study_prompt_and_sample_and_nothing_else():
    assert row_seed(0, "a", 0) == row_seed(0, "a", 0)
    seeds = {row_seed(s, p, k) for s in (0, 1) for p in ("a", "b") for k in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_wrappers_of_a_request_do_not_depend_on_the_other_requests():
    rows = [prompt(f"p{index}") for index in range(6)]
    alone = wrapped(rows[:1], 3, seed=4)
    assert wrapped(rows, 3, seed=4)[:3] == alone
    assert len({row.wrapper for row in alone}) == 3
    assert {row.request_id for row in alone} == {"p0"}
    assert {row.label for row in alone} == {"harmful"}
    assert wrapped(rows, 3, seed=5) != wrapped(rows, 3, seed=4)


def test_authored_prompts_fill_what_is_not_given():
    asked = gather(RolloutSettings(limit=10))
    assert [len(asked.prompts[role]) for role in asked.prompts] == [
        *[10] * 5,
        0,
    ]
    plain = {row.request_id for row in asked.prompts["harmful"]}
    assert {row.request_id for row in asked.prompts["wrapped"]} <= plain
    assert all(row.wrapper for row in asked.prompts["benign_wrapped"])
    assert [source["role"] for source in asked.sources] == [
        "harmful",
        "wrapped",
        "benign",
        "benign_wrapped",
        "safe_lookalike",
    ]


def test_a_source_says_how_many_of_its_rows_the_limit_leaves_to_ask(tmp_path):
    path = tmp_path / "harmful.txt"
    path.write_text("".join(f"Say thing {place}.\n" for place in [*range(12), 3]))
    asked = gather(RolloutSettings(harmful=str(path), limit=5))
    sources = {source["role"]: source for source in asked.sources}
    counts = {role: (each["rows"], each["asked"]) for role, each in sources.items()}
    assert counts == {
        "harmful": (13, 5),
        "wrapped": (10, 5),
        "benign": (5, 5),
        "benign_wrapped": (10, 5),
        "safe_lookalike": (5, 5),
    }
    # Of the 13 rows one repeats another, which is not for the limit to answer.
    assert sources["harmful"]["notes"][-1] == "7 prompts were left out by --limit 5."
    assert sources["benign"]["notes"] == []
    unlimited = gather(RolloutSettings(harmful=str(path))).sources[0]
    assert (unlimited["rows"], unlimited["asked"]) == (13, 12)
    assert not any("--limit" in note for note in unlimited["notes"])


def test_the_limit_takes_the_same_prompts_whatever_their_order(tmp_path):
    lines = [f"Number {index}, please." for index in range(30)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines)))
    chosen = [
        gather(RolloutSettings(harmful=str(tmp_path / name), limit=7)).prompts[
            "harmful"
        ]
        for name in ("a.txt", "b.txt")
    ]
    assert [row.text for row in chosen[0]] == [row.text for row in chosen[1]]


def test_rows_go_where_their_own_label_and_wrapper_say(tmp_path):
    rows = [
        {"prompt": "one", "label": "harmful"},
        {"prompt": "two", "label": "benign"},
        {"prompt": "three", "label": "benign", "wrapper": "w"},
        {"prompt": "four", "label": "harmful", "wrapper": "w"},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    asked = gather(RolloutSettings(wrapped=str(path)))
    texts = {role: [row.text for row in found] for role, found in asked.prompts.items()}
    assert texts["wrapped"].count("one") == texts["wrapped"].count("four") == 1
    assert {"two", "three"} <= set(texts["benign_wrapped"])
    unnamed = {
        row.text for row in asked.prompts["wrapped"] if row.wrapper == UNNAMED_WRAPPER
    }
    assert unnamed == {"one"}


def test_a_prompt_in_two_sources_is_asked_once_and_said(tmp_path):
    (tmp_path / "a.txt").write_text("Shared prompt here.\nOnly in a.")
    (tmp_path / "b.txt").write_text("shared  prompt here.\nOnly in b.")
    settings = RolloutSettings(
        harmful=str(tmp_path / "a.txt"), second=str(tmp_path / "b.txt")
    )
    asked = gather(settings)
    assert [row.text for row in asked.prompts["second"]] == ["Only in b."]
    assert "1 prompts are in an earlier source" in asked.sources[-1]["notes"][-1]


def test_prompts_in_memory_come_before_files_and_defaults():
    given = {"harmful": ["one", prompt("p", wrapper="w")], "benign": ["two"]}
    asked = gather(RolloutSettings(), given)
    assert {row.text for row in asked.prompts["harmful"]} == {"one"}
    assert {row.text for row in asked.prompts["wrapped"]} == {"text of p"}
    assert {row.label for row in asked.prompts["benign_wrapped"]} == {"benign"}


def test_the_hash_of_the_prompts_sees_text_role_and_cluster():
    base = gather(RolloutSettings(), {"harmful": ["one"], "benign": ["two"]})
    same = gather(RolloutSettings(), {"harmful": ["one"], "benign": ["two"]})
    other = gather(RolloutSettings(), {"harmful": ["one"], "benign": ["three"]})
    assert base.sha256 == same.sha256 != other.sha256


def test_imported_completions_count_samples_and_name_a_bad_line(tmp_path):
    path = tmp_path / "made.jsonl"
    rows = [
        {"prompt": "a", "completion": "x"},
        {"prompt": "a", "completion": "y", "request_id": "r"},
        {"prompt": "b", "completion": "z", "label": "benign", "wrapper": "w"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_completions(str(path))
    assert [row.sample for row in found.rows] == [0, 1, 0]
    assert [row.role for row in found.rows] == ["harmful", "harmful", "benign_wrapped"]
    assert found.rows[1].prompt.request_id == "r"
    path.write_text('{"prompt": "a", "completion": "x"}\n{"prompt": "a"}\n')
    with pytest.raises(PromptFileError, match="line 2"):
        read_completions(str(path))
    with pytest.raises(PromptFileError, match="no such file"):
        read_completions(str(tmp_path / "none.jsonl"))


def test_two_files_that_disagree_on_the_harm_of_a_prompt_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n")
    (tmp_path / "b.txt").write_text("two.\nThree.\n")
    settings = RolloutSettings(
        harmful=str(tmp_path / "a.txt"), benign=str(tmp_path / "b.txt")
    )
    with pytest.raises(PromptFileError, match=r"harmful in `a.txt`.*benign in `b.txt`"):
        gather(settings)


@pytest.mark.parametrize(
    "bare",
    [
        {"goal": "Wave.", "prompt": "wave."},
        {"goal": "Wave.", "prompt": "Wave.", "wrapper": "DirectRequest"},
        {"prompt": "Wave.", "wrapper": "none", "request_id": "r"},
    ],
)
def test_a_bare_request_among_wrapped_ones_is_no_attack(tmp_path, bare):
    path = tmp_path / "a.jsonl"
    attack = {**bare, "prompt": "Kindly wave.", "wrapper": "polite"}
    path.write_text("\n".join(json.dumps(row) for row in (bare, attack)))
    given = {"harmful": ["Sing."]}
    asked = gather(RolloutSettings(wrapped=str(path), limit=9), given)
    said = {role: [row.text for row in rows] for role, rows in asked.prompts.items()}
    assert said["wrapped"] == ["Kindly wave."]
    assert sorted(said["harmful"]) == sorted(["Sing.", bare["prompt"]])
    [source] = [each for each in asked.sources if each["role"] == "wrapped"]
    assert any("1 prompts are the bare requests" in note for note in source["notes"])
    made = [row | {"completion": "No."} for row in (bare, attack)]
    path.write_text("\n".join(map(json.dumps, made)))
    roles = [row.role for row in read_completions(str(path)).rows]
    assert roles == ["harmful", "wrapped"]
