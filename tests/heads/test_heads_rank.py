"""Heads and ablation end to end, on the little thinker."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from holdfast.cli.app import run
from holdfast.heads.ranking import Head
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Sampling
from holdfast.models.interventions import HeadEdit, head_factors
from holdfast.models.loading import proofs
from holdfast.models.loading.causal import load
from holdfast.models.model import Proof
from holdfast.report.schema import validate
from holdfast.rollout.rows import from_table
from holdfast.study import Study


@pytest.fixture(scope="module")
def report(audited):
    return json.loads((audited / "report.json").read_text())


@pytest.fixture
def copy(audited, tmp_path):
    """A study that a test may change."""
    return shutil.copytree(audited, tmp_path / "copy")


def fails(capsys, status, *words, says):
    assert run([str(word) for word in words]) == status
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in says:
        assert part in message, message


def test_every_head_is_ranked_once_and_the_table_has_the_columns_of_the_design(audited):
    table = pq.read_table(audited / "heads.parquet")
    columns = ["layer", "head", "contribution", "low", "high", "causal_effect", "rank"]
    assert table.column_names[:7] == columns
    rows = table.to_pylist()
    assert {(row["layer"], row["head"]) for row in rows} == {
        (layer, head) for layer in range(2) for head in range(4)
    }
    assert [row["rank"] for row in rows] == list(range(1, 9))
    contributions = [row["contribution"] for row in rows]
    assert contributions == sorted(contributions, reverse=True)
    for row in rows:
        assert row["low"] <= row["contribution"] <= row["high"]


def test_contributions_of_all_parts_sum_to_the_fall_of_the_logit(report):
    parts = {name: each["value"] for name, each in report["heads"]["parts"].items()}
    fall = parts["plateau_logit"] - parts["final_logit"]
    parts_sum = sum(parts[each] for each in ("heads", "mlps", "biases", "embedding"))
    assert parts_sum == pytest.approx(fall, abs=1e-3)
    assert fall > 1


def test_heads_are_taken_away_on_held_out_rows_alone(audited, report):
    rows = from_table(Study.open(audited).read_table("rollouts.parquet"))
    complied = [row for row in rows if row.label == "harmful" and row.is_complied]
    counts = {
        split: len([row for row in complied if row.split == split])
        for split in ("train", "test")
    }
    heads = report["heads"]
    assert heads["ranked_on"]["rows"] <= counts["train"]
    assert heads["checked_on"]["rows"] <= counts["test"]
    asked = set(pq.read_table(audited / "ablation.parquet")["asked"].to_pylist())
    assert {row.split for row in rows if row.row_id in asked} == {"test"}


def test_the_effect_of_a_head_is_that_of_scoring_without_it(audited, thinker, report):
    """The slow way round: edit, run the whole sequence, and read the probe."""
    from holdfast.cliff.probe_files import read_own_probe
    from holdfast.heads.readings import select
    from holdfast.models.hidden_states import project_states
    from holdfast.models.interventions import scale_heads

    study, adapter = Study.open(audited), load(str(thinker))
    probe, _ = read_own_probe(study, "published")
    rows = list(select(from_table(study.read_table("rollouts.parquet")), 64).checking)
    direction, offset = probe.raw()
    first = report["heads"]["heads"][0]
    edit = HeadEdit(
        head_factors(adapter, [(first["layer"], first["head"])]),
        tuple((row.spans.end_template[0], None) for row in rows),
    )
    logits = []
    for each in (None, edit):
        with scale_heads(adapter, each) as live:
            found = []
            for place, row in enumerate(rows):
                ids = row.token_ids[: row.final + 1]
                if each is not None:
                    start = row.spans.end_template[0]
                    live.mask = (torch.arange(len(ids)) >= start)[None]
                del place
                one = project_states(
                    adapter, [ids], direction.float()[None], torch.tensor([offset])
                )
                found.append(float(one[0][-1, 0]))
            logits.append(torch.tensor(found))
    change = float((logits[1] - logits[0]).mean())
    assert first["end_template"]["value"] == pytest.approx(change, abs=1e-3)


def test_conditions_run_on_the_same_prompts(audited):
    rows = pq.read_table(audited / "ablation.parquet").to_pylist()
    prompts = {}
    for row in rows:
        key = (row["scope"], row["condition"], row["n_heads"], row["draw"])
        prompts.setdefault(key, []).append(row["asked"])
    assert len({tuple(asked) for asked in prompts.values()}) == 1
    names = {(scope, condition) for scope, condition, _, _ in prompts}
    for scope in ("everywhere", "end_template", "answer"):
        for condition in ("none", "top", "random", "positive"):
            assert (scope, condition) in names
    draws = {key[3] for key in prompts if key[1] == "random"}
    assert draws == set(range(5))


def test_without_an_edit_the_answers_are_those_of_the_rollout(audited):
    rows = from_table(Study.open(audited).read_table("rollouts.parquet"))
    known = {row.row_id: row for row in rows}
    for row in pq.read_table(audited / "ablation.parquet").to_pylist():
        if row["condition"] == "none":
            assert row["answer"] == known[row["asked"]].answer
            assert row["token_ids"] == list(known[row["asked"]].token_ids)


def test_no_edit_is_the_rollout_whether_it_is_taken_over_or_drawn_again(
    audited, thinker
):
    """Answers that are not drawn a second time are those that would be, bit for bit."""
    from holdfast.heads.conditions import Condition, Item, answer
    from holdfast.heads.settings import AblateSettings
    from holdfast.rollout.sampling import sampling_of

    study, adapter = Study.open(audited), load(str(thinker))
    rows = from_table(study.read_table("rollouts.parquet"))[::9]
    nothing = Condition("none", "everywhere", None, 0, ())
    items = [Item(nothing, row) for row in rows]
    sampling = sampling_of(study, adapter)
    taken, drawn = (
        answer(adapter, items, sampling, AblateSettings(), 16, drawn_here=here)
        for here in (True, False)
    )
    assert taken.equals(drawn)


@pytest.mark.parametrize("how", ["none", "token", "tensor"])
def test_conditions_side_by_side_give_what_each_gives_alone(audited, thinker, how):
    """Drafts, mixed batches and their size change no answer."""
    from holdfast.heads.conditions import Condition, Item, answer
    from holdfast.heads.settings import AblateSettings
    from holdfast.models.interventions import scope_ranges
    from holdfast.rollout.sampling import sampling_of

    study, adapter = Study.open(audited), load(str(thinker))
    rows = from_table(study.read_table("rollouts.parquet"))
    rows = [row for row in rows if row.split == "test" and row.closed][::11]
    sampling = sampling_of(study, adapter)
    settings = AblateSettings(renormalise=how, factor=0.1)
    conditions = [
        Condition(name, scope, 0.1, draw, heads)
        for scope in ("everywhere", "end_template", "answer")
        for name, draw, heads in (
            ("none", 0, ()),
            ("top", 0, (Head(0, 1), Head(1, 2))),
            ("random", 0, (Head(0, 3), Head(1, 0))),
            ("random", 1, (Head(0, 0), Head(1, 1))),
        )
    ]
    items = [Item(each, row) for row in rows for each in conditions]
    whole = answer(adapter, items, sampling, settings, 128).to_pylist()
    found = {row["row_id"]: tuple(row["token_ids"]) for row in whole}
    changed = 0
    for each in conditions:
        fixed = each.scope != "everywhere"
        ends = [
            (row.spans.answer if fixed else row.spans.prompt)[not fixed] for row in rows
        ]
        edit = HeadEdit(
            head_factors(adapter, each.heads, 0.1),
            scope_ranges([row.spans for row in rows], each.scope),
            how,
        )
        prompts = [
            (row.token_ids[:end], row.seed) for row, end in zip(rows, ends, strict=True)
        ]
        # The norm of a whole tensor depends on its batch, so there it is the same one.
        size = len(rows) if how == "tensor" else 3
        for part in generate(
            adapter, prompts, sampling, batch_size=size, edit=edit, thinking_done=fixed
        ):
            for made in part:
                name = Item(each, rows[made.index]).name
                changed += made.token_ids != rows[made.index].token_ids
                assert found[name] == made.token_ids
    assert changed > 1


def test_this_models_attack_is_not_in_few_heads_and_the_report_says_so(report):
    validate(report)
    assert report["verdict"]["sparse"] is False
    assert "sparse" not in report["verdict"]["reasons"]
    [sentence] = [s for s in report["verdict"]["evidence"] if "Switching off" in s]
    assert "the top head (12.5%)" in sentence


def test_the_page_shows_the_grid_and_the_conditions(audited):
    page = (audited / "report.html").read_text()
    assert page.count(' checked" title=') == 8
    for words in ("layer 1, head 3, rank", "random, same layers".capitalize()):
        assert words in page
    assert "Self-repair" in page


def test_heads_that_do_not_exist_are_named_with_what_fits(copy, capsys):
    says = ["layers 0 to 1", "0 to 3", "2:0, 1:9"]
    fails(capsys, 2, "ablate", copy, "--ablated-heads", "0:1,2:0,1:9", says=says)
    target = copy.parent / "baked"
    command = ("bake", copy, "-o", target, "--baked-heads", "2:0,1:9")
    fails(capsys, 2, *command, says=says)
    assert not target.exists()


def test_heads_that_cannot_be_read_are_named(copy, capsys):
    fails(capsys, 2, "ablate", copy, "--ablated-heads", "a:b", says=["layer:head"])


@pytest.mark.parametrize("key", ["weights_sha256", "template_sha256"])
@pytest.mark.parametrize("verb", ["heads", "ablate"])
def test_a_probe_of_another_model_or_template_is_refused(copy, capsys, verb, key):
    path = copy / "probes" / "published.json"
    facts = json.loads(path.read_text())
    facts["model"][key] = "0" * 64
    path.write_text(json.dumps(facts))
    fails(capsys, 2, verb, copy, says=[key, "holdfast probe"])


@pytest.mark.parametrize(
    "words",
    [
        ("heads", "--checked-heads", "1"),
        ("ablate", "--ablation-prompts", "12"),
        ("bake", "--output", "never"),
    ],
)
def test_a_model_whose_heads_do_not_add_up_is_refused_with_what_it_is_good_for(
    copy, capsys, monkeypatch, words
):
    def doubted(adapter, rows):
        name = "the contributions of the heads sum to the attention output"
        return (Proof(name, False, 0.5, 1e-4, "worst layer", "heads"),)

    monkeypatch.setattr(proofs, "_sums", doubted)
    says = ["heads sum to the attention output", "good for still: rollout", "trace"]
    fails(capsys, 3, words[0], copy, *words[1:], says=says)


def test_a_probe_of_another_width_cannot_be_tried(copy, audited, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(audited, tmp_path / "other")
    path = other / "probes" / "published.safetensors"
    tensors = {
        name: each[..., :9].contiguous() if each.ndim else each
        for name, each in load_file(path).items()
    }
    save_file(tensors, path)
    fails(capsys, 3, "probe-transfer", copy, other, says=["one shape"])


@pytest.mark.parametrize("fraction", ["0", "1.2"])
def test_a_fraction_that_selects_no_head_is_named(copy, capsys, fraction):
    says = ["--fractions above 0 and up to 1", f"found {fraction}"]
    fails(capsys, 2, "ablate", copy, "--fractions", fraction, says=says)
    says[0] = says[0].replace("fractions", "fraction")
    command = ("bake", copy, "-o", copy / "b", "--fraction", fraction)
    fails(capsys, 2, *command, says=says)


def test_questions_with_exact_answers_are_asked_under_every_condition(
    copy, capsys, tmp_path
):
    path = tmp_path / "sums.csv"
    path.write_text("prompt,answer\n" + "".join(f"{i}+1?,{i + 1}\n" for i in range(9)))
    few = ["--ablation-prompts", "12", "--fractions", "0.1", "--random-draws", "1"]
    command = ["ablate", str(copy), *few, "--utility", str(path), "--json"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"]["utility"]["source"] == "sums.csv"
    asked = found["prompts"]["utility"]["rows"]
    rows = pq.read_table(copy / "ablation.parquet").to_pylist()
    rows = [row for row in rows if row["role"] == "utility"]
    assert len(rows) == asked * len({(r["scope"], r["condition"]) for r in rows})
    assert {row["outcome"] for row in rows} <= {"correct", "wrong", "degenerate"}
    # This model cannot add, with its heads or without them.
    for each in found["conditions"]:
        assert (each["utility"]["value"], each["utility"]["n"]) == (0, asked)
        assert each["utility"]["high"] > 0.2
    change = found["conditions"][1]["change"]["utility"]
    assert change["low"] < -0.2 < 0.2 < change["high"]
    assert run(command) == 0
    assert "up to date" in capsys.readouterr().err
    assert run(["report", str(copy)]) == 0
    assert "questions from sums.csv" in (copy / "report.html").read_text()


def test_questions_without_answers_are_refused(copy, capsys, tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("prompt\n1+1?\n")
    says = ["a column of answers", "gsm8k"]
    fails(capsys, 2, "ablate", copy, "--utility", path, says=says)
    fails(capsys, 2, "ablate", copy, "--utility", "xstest", says=["exact answers"])


def test_a_study_without_heads_says_which_stage_is_missing(copy, capsys):
    (copy / "heads.parquet").unlink()
    fails(capsys, 2, "ablate", copy, says=["heads.parquet", "holdfast heads"])
    assert run(["report", str(copy), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"]["sparse"] is None
    assert "ablation" not in report


def test_an_audit_without_heads_says_so(thinker, world, audited, tmp_path, capsys):
    study = shutil.copytree(audited, tmp_path / "bare")
    manifest = json.loads((study / "study.json").read_text())
    for stage in ("heads", "ablate"):
        del manifest["stages"][stage]
    (study / "study.json").write_text(json.dumps(manifest))
    command = ["audit", str(thinker), *world, "-o", str(study), "--no-heads", "--json"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"]["sparse"] is None
    assert "has not been run" in report["verdict"]["reasons"]["sparse"]
    assert "heads" not in report


def test_heads_of_earlier_answers_are_not_reported(copy, capsys):
    path = copy / "rollouts.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)
    assert run(["report", str(copy), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "heads" not in report
    assert "earlier answers" in report["verdict"]["reasons"]["sparse"]


def test_an_interrupted_ablation_goes_on_and_gives_the_same(copy, monkeypatch, capsys):
    from holdfast.heads import ablate
    from holdfast.heads import conditions as heads_conditions

    undisturbed = pq.read_table(copy / "ablation.parquet")
    manifest = json.loads((copy / "study.json").read_text())
    del manifest["stages"]["ablate"]
    (copy / "study.json").write_text(json.dumps(manifest))
    inner, calls = heads_conditions.answer, []

    def stopped(*given, **named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return inner(*given, **named)

    monkeypatch.setattr(ablate, "answer", stopped)
    # Batches of another size than the first run's, and the same rows.
    assert run(["ablate", str(copy), "--batch-size", "48"]) == 130
    kept = len(list(copy.glob("parts/ablate/*.parquet")))
    assert kept == 4
    calls[:] = [1] * 5
    assert run(["ablate", str(copy), "--batch-size", "48"]) == 0
    assert "Going on where" in capsys.readouterr().err
    assert pq.read_table(copy / "ablation.parquet").equals(undisturbed)


def test_a_baked_model_answers_as_the_edited_one_and_carries_its_table(
    copy, thinker, capsys
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = copy.parent / "baked"
    command = ["bake", str(copy), "-o", str(target), "--baked-heads", "1:2", "--json"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("attack_success", "other_attack_success"):
        assert found["after"][key]["value"] <= found["before"][key]["value"]
    card = (target / "README.md").read_text()
    assert "| all other" not in card.split("## Before and after")[0]
    assert "attack success on all other held-out harmful prompts" in card
    record = json.loads((target / "holdfast_bake.json").read_text())
    [head] = record["heads"]
    assert record["provenance"]["prompts"]

    adapter = load(str(thinker))
    edit = HeadEdit(head_factors(adapter, [(head["layer"], head["head"])]))
    rows = from_table(Study.open(copy).read_table("rollouts.parquet"))[:6]
    prompts = [(row.token_ids[: row.spans.prompt[1]], row.seed) for row in rows]
    sampling = Sampling(temperature=0, max_thinking=64, max_answer=32)
    hooked = {
        each.index: each.token_ids
        for part in generate(adapter, prompts, sampling, edit=edit)
        for each in part
    }
    plain = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(target).chat_template
    for place, (ids, _) in enumerate(prompts):
        tokens = plain.generate(
            torch.tensor([list(ids)]), do_sample=False, max_new_tokens=96
        )[0].tolist()
        expected = list(hooked[place])
        assert tokens[: len(expected)] == expected


def test_an_adapter_is_tried_as_a_model_is_and_says_its_rank(copy, capsys):
    target = copy.parent / "off"
    command = ["bake", str(copy), "-o", str(target), "--baked-heads", "1:2"]
    assert run([*command, "--as", "adapter", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("attack_success", "other_attack_success"):
        assert found["after"][key]["value"] <= found["before"][key]["value"]
    assert "--max-lora-rank" in found["serving"]
    card = (target / "README.md").read_text()
    assert f"rank of {found['rank']}" in card
    assert "| base | this adapter |" in card
    assert not list(target.glob("model*"))


def test_an_adapter_that_makes_a_model_worse_is_not_kept(copy, capsys):
    target = copy.parent / "worse"
    command = ("bake", copy, "-o", target, "--baked-heads", "0:0,0:1")
    command = (*command, "--as", "adapter")
    fails(capsys, 3, *command, says=["before, ", " after", "Nothing was written"])
    assert not target.exists()
    assert not list(copy.parent.glob(".worse*"))


def test_a_model_whose_attack_success_rises_is_not_baked(copy, capsys):
    """The top head of this model, taken away, lets through what was refused."""
    target = copy.parent / "weaker"
    command = ("bake", copy, "-o", target, "--fraction", "0.1")
    fails(capsys, 3, *command, says=["all other held-out harmful prompts: "])
    assert not target.exists()


def test_a_probe_reads_its_own_model_and_its_twin_is_the_same(copy, audited, capsys):
    assert run(["probe-transfer", str(copy), str(audited), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cosine"] == pytest.approx(1)
    figures = found["figures"]
    for kind in ("plain", "wrapped"):
        own, other = figures[f"own_{kind}_auroc"], figures[f"other_{kind}_auroc"]
        assert own["value"] == pytest.approx(other["value"])
    assert found["trusted"] is True


def test_a_probe_that_reads_nothing_is_not_trusted(copy, audited, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(audited, tmp_path / "other")
    path = other / "probes" / "published.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    tensors["weight"] = -tensors["weight"] + 0.01 * torch.randn(
        tensors["weight"].shape, generator=generator, dtype=tensors["weight"].dtype
    )
    save_file(tensors, path)
    assert run(["probe-transfer", str(copy), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trusted"] is False
    assert "not to be trusted" in found["words"]
