from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from holdfast.cliff.fit import States, fit_control, strata
from holdfast.cliff.groups import NEUTRAL, SHUFFLED, Traced
from holdfast.cliff.probe import Probe
from holdfast.cliff.probe_files import read_probe, write_probe
from holdfast.data.chat.conversation import Spans
from holdfast.data.splits import Splits, Test, Train, Validation
from holdfast.errors import InputError, TooFewExamplesError
from holdfast.report.progress import Silent
from holdfast.rollout.rows import (
    Rollout,
    assign,
    attack_block,
    from_table,
    held_out,
    outcome_block,
    require_plain,
    to_table,
)
from holdfast.study import Study
from holdfast.study.batches import in_batches

ROW = Rollout(
    row_id="harmful/p/0",
    role="harmful",
    request_id="p",
    prompt_id="p",
    source="test",
    split="test",
    label="harmful",
    wrapper=None,
    topic=None,
    system_prompt=None,
    prompt="text",
    sample=0,
    seed=2**62,
    thinking="t",
    answer="a",
    token_ids=tuple(range(100, 140)),
    spans=Spans((0, 5), (5, 30), (30, 33), (33, 40)),
    finish="stop",
    closed=True,
    forced_close=False,
    min_top2_gap=None,
    verdict="refused",
    reason="r",
    judge="j",
)


def rows(n, role="harmful", verdict="refused", wrapper=None):
    label = "benign" if role.startswith("benign") else "harmful"
    return [
        replace(
            ROW,
            row_id=f"{role}/{verdict}/{wrapper}/{index}",
            role=role,
            label=label,
            verdict=verdict,
            wrapper=wrapper,
            request_id=f"{label}-{index}",
        )
        for index in range(n)
    ]


def test_rows_come_back_from_their_table_as_they_were():
    made = [ROW, replace(ROW, row_id="x", wrapper="w", min_top2_gap=0.25)]
    assert from_table(to_table(made)) == made


def test_shuffled_thinking_is_a_permutation_and_all_else_is_kept():
    ids = Traced(ROW, SHUFFLED).token_ids(seed=0)
    assert ids[:5] == list(range(100, 105))
    assert ids[30:] == [130, 131, 132]
    assert ids[5:30] != list(range(105, 130))
    assert sorted(ids[5:30]) == list(range(105, 130))
    assert ids == Traced(ROW, SHUFFLED).token_ids(seed=0)
    assert ids != Traced(ROW, SHUFFLED).token_ids(seed=1)


def test_the_neutral_template_is_as_long_and_made_of_the_rows_own_thinking():
    ids = Traced(ROW, NEUTRAL).token_ids(seed=0)
    assert ids[:30] == list(range(100, 130))
    assert len(ids) == 33
    assert set(ids[30:]) <= set(range(105, 130))


def test_a_request_never_straddles_and_a_second_source_is_test():
    every = [
        *rows(60),
        *rows(60, "benign", "complied"),
        *rows(60, "wrapped", "complied", "w"),
        *rows(5, "second"),
    ]
    assigned = assign(every, 0.4)
    by_request = {}
    for row in assigned.rows:
        if row.role != "second":
            by_request.setdefault(row.request_id, set()).add(row.split)
    assert all(len(splits) == 1 for splits in by_request.values())
    assert {row.split for row in assigned.rows if row.role == "second"} == {"test"}
    groups = held_out(assigned.rows)
    assert not any(row.role == "second" for found in groups.values() for row in found)
    assert {row.split for found in groups.values() for row in found} == {"test"}


def test_a_small_test_part_is_widened_and_said_and_a_hopeless_one_is_an_error():
    enough = [*rows(52), *rows(52, "benign", "complied")]
    assigned = assign(enough, 0.3)
    assert assigned.fractions[2] > 0.3
    assert "widened" in assigned.notes[0]
    few = [*rows(10), *rows(52, "benign", "complied")]
    assert assign(few, 0.4).fractions == pytest.approx((0.6, 0.0, 0.4))
    with pytest.raises(TooFewExamplesError, match="of 10 rows") as caught:
        require_plain(few, (0.6, 0.0, 0.4))
    assert caught.value.exit_status == 4


def test_the_control_needs_a_wrapper_with_twenty_of_either():
    train = Train(
        tuple(
            [
                *rows(19, "wrapped", "refused", "w"),
                *rows(90, "wrapped", "complied", "w"),
                *rows(90, "wrapped", "complied", "v"),
            ]
        )
    )
    splits = Splits(train, Validation(()), Test(()))
    found = strata(splits)
    assert not found.names
    assert "19 and 90" in found.reason
    with pytest.raises(TooFewExamplesError, match="19 and 90"):
        fit_control(train, States({}, torch.zeros(0, 2)), found, folds=5, seed=0)
    one_more = Test(tuple(rows(1, "wrapped", "refused", "w")))
    assert strata(Splits(train, Validation(()), one_more)).names == {"w"}


def test_attack_success_counts_full_and_partial_answers_and_nothing_else():
    every = [
        *rows(5, "wrapped", "complied", "w"),
        *rows(3, "wrapped", "partial", "w"),
        *rows(4, "wrapped", "degenerate", "w"),
        *rows(8, "wrapped", "refused", "v"),
        *rows(10, "benign_wrapped", "complied", "w"),
    ]
    block = attack_block(every, seed=0)
    assert block["wrapped"]["value"] == pytest.approx(8 / 20)
    assert block["by_wrapper"]["w"]["attack_success"]["value"] == pytest.approx(8 / 12)
    assert block["by_wrapper"]["v"]["attack_success"]["value"] == 0
    assert block["by_wrapper"]["w"]["benign_compliance"]["value"] == 1
    assert block["by_wrapper"]["v"]["benign_compliance"]["value"] is None
    assert block["harmful"]["reason"]
    outcomes = outcome_block(every, seed=0)["wrapped"]
    assert outcomes.pop("cut") == 0
    assert sum(found["value"] for found in outcomes.values()) == pytest.approx(1)


def test_a_batch_on_disk_is_not_run_again_and_the_order_is_that_of_the_items(tmp_path):
    study = Study.create(tmp_path)
    study.begin("s", {}, {})
    items = ["b", "dddd", "a", "ccc", "ee"]
    seen = []

    def work(batch):
        seen.append(batch)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return pa.table({"row_id": [each for each in batch for _ in each]})

    def go(batch_size):
        return in_batches(
            study,
            "s",
            items,
            name=str,
            length=len,
            batch_size=batch_size,
            work=work,
            progress=Silent(),
            label="",
        )

    with pytest.raises(KeyboardInterrupt):
        go(2)
    assert seen == [["dddd", "ccc"], ["ee", "a"]]
    table = go(2)
    assert seen[2:] == [["ee", "a"], ["b"]]
    assert table["row_id"].to_pylist() == [
        each for item in items for each in [item] * len(item)
    ]
    assert go(4).equals(table)
    assert len(seen) == 4


def test_a_probe_comes_back_and_a_damaged_one_is_named(tmp_path):
    study = Study.create(tmp_path)
    ones = torch.ones(4, dtype=torch.float64)
    probe = Probe(2 * ones, -0.5, 3 * ones, 4 * ones, 0.01)
    write_probe(study, "published", probe, {"site": "final_norm"}, difference=ones)
    found, others = read_probe(study, "published")
    assert torch.equal(found.weight, probe.weight)
    assert (found.bias, found.l2) == (-0.5, 0.01)
    assert torch.equal(others["difference"], ones)
    study.path("probes/published.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="damaged"):
        read_probe(study, "published")


def test_answers_that_were_cut_are_counted_by_role():
    whole, benign = rows(5, verdict="complied"), rows(2, "benign", "complied")
    every = [*(replace(row, finish="length") for row in whole[:3]), *whole[3:], *benign]
    block = outcome_block(every, seed=0)
    cut = {role: found["cut"] for role, found in block.items() if found["cut"]}
    assert cut == {"harmful": 3}
    assert block["benign"]["cut"] == 0
