"""Which prompts and heads an ablation takes, and what its figures say."""

import pytest

from holdfast.audit.assemble import ablated_of
from holdfast.cliff.held_out import choose_prompts
from holdfast.errors import SettingsError, TooFewExamplesError
from holdfast.heads.ablation_effects import conditions_of, sparse_of
from holdfast.heads.checks import sparse_verdict
from holdfast.heads.conditions import main_condition, main_size, plan
from holdfast.heads.ranking import Head, RankedHead
from holdfast.heads.readings import select
from holdfast.heads.settings import AblateSettings
from holdfast.rollout.rows import Judged
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.study.figures import estimate_of
from made_rows import rollout

LAYERS, WIDTH = 8, 16
SETTINGS = AblateSettings(fractions=(0.01, 0.03, 0.1))


def wrapped(wrapper, split, verdicts, start=0):
    return [
        rollout("wrapped", start + i, verdict, split=split, wrapper=wrapper)
        for i, verdict in enumerate(verdicts)
    ]


YES, NO = "complied", "refused"
BENIGN = [rollout("benign", 900 + i, YES) for i in range(4)]


@pytest.mark.parametrize("verdict", ["refused", "partial", "complied", "degenerate"])
def test_over_refusal_is_refused_or_partial_in_evaluations_and_ablations(verdict):
    counts = verdict in ("refused", "partial")
    assert Judged("a", verdict).counts("over_refusal") is counts
    for measure in ("over_refusal", "lookalike_refusal"):
        assert Judged("a", verdict).counts(measure) is counts


def test_wrappers_that_work_are_found_on_training_requests_alone():
    rows = [
        *wrapped("works", "train", [YES] * 9 + [NO]),
        *wrapped("fails", "train", [NO] * 10, 20),
        *wrapped("half", "train", [YES] * 5 + [NO] * 5, 40),
        # On held-out requests it is the other way round, and nobody may look there.
        *wrapped("works", "test", [NO] * 3, 60),
        *wrapped("fails", "test", [YES] * 3, 70),
        *BENIGN,
    ]
    found = choose_prompts(rows, 48)
    assert found.wrappers == ["works"]
    assert {row.wrapper for row in found.harmful} == {"works"}
    assert {row.wrapper for row in found.others} == {"fails"}
    assert {row.split for part in found[:3] for row in part} == {"test"}


def test_where_no_attack_works_there_is_nothing_to_ablate():
    rows = [
        *wrapped("fails", "train", [NO] * 30),
        *wrapped("fails", "test", [NO] * 9, 40),
        *BENIGN,
    ]
    with pytest.raises(TooFewExamplesError, match="where no attack succeeds"):
        choose_prompts(rows, 48)


def test_attacks_that_were_tried_too_seldom_are_not_said_to_fail():
    rows = [
        *wrapped("works", "train", [YES] * 4),
        *wrapped("fails", "train", [NO] * 5, 20),
        *wrapped("works", "test", [YES] * 3, 40),
        *BENIGN,
    ]
    few = r"0 and 4; 1 of 2 kinds \(plain, or a wrapper\) have 5 training answers"
    with pytest.raises(TooFewExamplesError, match=few):
        choose_prompts(rows, 48)


def test_the_limit_takes_the_first_by_content_hash():
    rows = [
        *wrapped("works", "train", [YES] * 9),
        *wrapped("works", "test", [YES] * 9, 60),
        *BENIGN,
    ]
    few, many = choose_prompts(rows, 4).harmful, choose_prompts(rows[::-1], 9).harmful
    assert few == many[:4]


def test_heads_are_ranked_on_training_answers_with_enough_thinking():
    rows = [
        *wrapped("works", "train", [YES] * 12),
        *wrapped("works", "test", [YES] * 11, 20),
        rollout("wrapped", 50, YES, split="train", wrapper="works", thinking=19),
        rollout("wrapped", 51, NO, split="train", wrapper="works"),
    ]
    found = select(rows, 64)
    assert len(found.ranking.rows) == 12
    assert len(found.checking.rows) == 11
    train = {row.request_id for row in found.ranking}
    assert not train & {row.request_id for row in found.checking}


def test_too_few_complied_answers_are_counted():
    rows = [
        *wrapped("works", "train", [YES] * 12),
        *wrapped("w", "test", [YES] * 9, 20),
    ]
    with pytest.raises(TooFewExamplesError, match="found 12 and 9"):
        select(rows, 64)


def ranking():
    unknown = undefined(0, "not known")
    heads = [Head(layer, h) for layer in reversed(range(LAYERS)) for h in range(WIDTH)]
    return [
        RankedHead(rank, head, Estimate(1.0, 1.0, 1.0, 1), unknown, 0.0, 0.0)
        for rank, head in enumerate(heads, 1)
    ]


def spread_ranking():
    """Return a ranking whose top takes heads of every layer in turn."""
    found = ranking()
    order = sorted(found, key=lambda row: (row.head.head, -row.head.layer))
    return [row._replace(rank=rank) for rank, row in enumerate(order, 1)]


def test_every_condition_has_its_controls_in_every_scope():
    made = plan(spread_ranking(), WIDTH, SETTINGS, 0).conditions
    assert len({each.key for each in made}) == len(made)
    for scope, sizes in (("everywhere", {2, 4, 13}), ("end_template", {4})):
        here = [each for each in made if each.scope == scope]
        assert here[0].name == "none"
        assert {len(each.heads) for each in here[1:]} == sizes
        for size in sizes:
            names = [each.name for each in here if len(each.heads) == size]
            assert sorted(names) == ["positive", *["random"] * 5, "top"]
    assert len(made) == 1 + 3 * 7 + 2 * 8


def test_random_heads_are_of_the_same_layers_and_never_the_top_ones():
    made = plan(spread_ranking(), WIDTH, SETTINGS, 0).conditions
    for size in (2, 4, 13):
        here = [each for each in made if len(each.heads) == size]
        top = next(each.heads for each in here if each.name == "top")
        draws = {each.heads for each in here if each.name == "random"}
        assert len(draws) == 5
        for heads in draws:
            assert not set(heads) & set(top)
            assert sorted(h.layer for h in heads) == sorted(h.layer for h in top)


def test_a_second_round_adds_to_the_middle_size_in_the_first_scope_alone():
    second = (Head(0, 15), Head(0, 14))
    made = plan(spread_ranking(), WIDTH, SETTINGS, 0, second=second).conditions
    [found] = [each for each in made if each.name == "second_round"]
    assert found.heads == (*main_condition(made).heads, *second)
    assert found.scope == "everywhere"
    assert main_size([13, 2, 4]) == 4
    assert main_size([1, 2]) == 1


def test_a_size_without_controls_is_left_out_and_said():
    # The top 13 of this ranking are 13 of the 16 heads of one layer.
    made = plan(ranking(), WIDTH, SETTINGS, 0)
    assert {len(each.heads) for each in made.conditions if each.heads} == {2, 4}
    [note] = made.notes
    assert note.startswith("13 of 128 heads (0.1) were not switched off")
    with pytest.raises(SettingsError, match="half of a layer"):
        plan(ranking(), WIDTH, AblateSettings(fractions=(0.1,)), 0)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_that_selects_no_head_is_refused_before_there_is_a_ranking(fraction):
    with pytest.raises(SettingsError, match="--fractions above 0 and up to 1"):
        AblateSettings(fractions=(fraction,))


def answers(condition, n_heads, harmful, benign, draw=0):
    return [
        {
            "condition": condition,
            "fraction": None if condition == "none" else 0.03,
            "n_heads": n_heads,
            "scope": "everywhere",
            "draw": draw,
            "heads": "",
            "asked": f"{label}/{i}",
            "request_id": f"{label}{i}",
            "label": label,
            "role": label,
            "outcome": outcome,
            "forced_close": False,
        }
        for label, outcomes in (("harmful", harmful), ("benign", benign))
        for i, outcome in enumerate(outcomes)
    ]


def ablated(top, random):
    rows = answers("none", 0, [YES] * 45 + [NO] * 3, [YES] * 48)
    rows += answers("top", 4, top, [YES] * 48)
    for draw in range(5):
        rows += answers("random", 4, random, [YES] * 48, draw)
    return rows


def verdict_on(rows):
    block = sparse_of(rows, 128, 0)
    baseline = estimate_of(block["baseline"])
    return sparse_verdict(True, baseline, block["n_requests"], ablated_of(block)).sparse


def test_the_figures_of_a_sparse_model_say_so_and_those_of_another_do_not():
    restored, kept = [NO] * 48, [YES] * 45 + [NO] * 3
    assert verdict_on(ablated(restored, kept)) is True
    assert verdict_on(ablated(kept, kept)) is False
    assert verdict_on(ablated(restored, restored)) is False


def test_conditions_are_compared_prompt_by_prompt_and_draws_are_pooled():
    kept = [YES] * 45 + [NO] * 3
    swapped = [NO] * 3 + [YES] * 45
    found = {
        each["condition"]: each for each in conditions_of(ablated(kept, swapped), 0)
    }
    assert "change" not in found["none"]
    assert found["top"]["change"]["attack_success"]["value"] == 0
    # The rate is the same, and yet six prompts of each draw have changed.
    random = found["random"]["change"]["attack_success"]
    assert (random["value"], random["n"]) == (0, 5 * 48)
    assert random["high"] > found["top"]["change"]["attack_success"]["high"]
    assert found["random"]["draws"] == 5
