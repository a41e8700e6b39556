"""A greedy search for the few heads whose removal brings attack success down.

It is the strongest search that is cheap: each step tries every head that is left,
together with those that were taken, and takes the one that moves the final logit most
towards refusal. Heads are chosen on complied answers to training requests; what their
removal does is measured by drawing the answers to held-out prompts anew.

One sequence is read once for all sets: its copies stand side by side as the rows of a
batch, each with its own heads scaled. Up to the first block in which any head is
scaled all rows would be the same, so that far one row is read, and then copied.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.held_out import choose_prompts
from holdfast.cliff.probe import Probe
from holdfast.cliff.probe_files import model_fingerprint, read_own_probe
from holdfast.errors import SettingsError
from holdfast.heads.ablation_effects import conditions_of
from holdfast.heads.causal_effects import Effects, causal_effects
from holdfast.heads.conditions import (
    Condition,
    Item,
    answer,
    with_outcomes,
)
from holdfast.heads.ranking import Head
from holdfast.heads.readings import select
from holdfast.heads.settings import AblateSettings
from holdfast.judges.choose import RulesJudge
from holdfast.judges.rows import verdicts_on
from holdfast.models.batching import with_batch_halving
from holdfast.models.hidden_states import check_lengths
from holdfast.models.interventions import Head as HeadPlace
from holdfast.models.interventions import (
    HeadEdit,
    first_layer,
    head_factors,
    scale_heads,
    shared_rows,
)
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout, from_table
from holdfast.rollout.sampling import sampling_of
from holdfast.rollout.session import Session
from holdfast.stats.bootstrap import Estimate
from holdfast.stats.rates import clustered_mean
from holdfast.study import Study, fingerprint
from holdfast.study.figures import figure_of, generator, study_seed

Where = Literal["end_template", "everywhere"]
WHERE: tuple[Where, ...] = ("end_template", "everywhere")
ROLLOUTS = "rollouts.parquet"
HALF = 0.5
"""Share of the attack success under which few heads count as enough."""


class Step(NamedTuple):
    """A head that the search took.

    Attributes:
        head: Which one.
        change: What it and all heads taken before do to the final logit of training
            answers, with an interval over requests.
    """

    head: Head
    change: Estimate


def greedy_heads(
    adapter: Adapter,
    rows: Sequence[Rollout],
    probe: Probe,
    count: int,
    *,
    where: Where = "end_template",
    seed: int = 0,
    batch_size: int = 32,
) -> list[Step]:
    """Take heads one by one, each the best beside those that were taken before.

    Args:
        adapter: The model.
        rows: Complied harmful answers to training requests.
        probe: Whose logit is to rise.
        count: How many heads.
        where: Removed over the end template, or at every token; the tokens stay.
        seed: Seed of the intervals.
        batch_size: Rows at once.

    Raises:
        SettingsError: If the model has not so many heads.
    """
    every = [
        Head(layer, head)
        for layer in range(adapter.n_layers)
        for head in range(adapter.n_heads)
    ]
    if not 0 < count <= len(every):
        raise SettingsError(
            f"from 1 to {len(every)} heads to look for", str(count), "Change --heads."
        )
    clusters = [row.request_id for row in rows]
    taken: list[Head] = []
    steps: list[Step] = []
    while len(steps) < count:
        left = [head for head in every if head not in taken]
        sets = [(*taken, head) for head in left]
        change = _change(adapter, rows, probe, sets, where, batch_size)
        best = int(change.mean(0).argmax())
        taken.append(left[best])
        draws = generator(seed, f"greedy/{where}/{len(taken)}")
        found = clustered_mean(change[:, best], clusters, draws)
        steps.append(Step(left[best], found))
    return steps


def search(
    study: Study,
    session: Session,
    *,
    count: int = 6,
    where: Where = "end_template",
    selection_prompts: int = 64,
    ablation_prompts: int = 48,
) -> dict[str, Any]:
    """Search, and measure by drawing answers after each step.

    Args:
        study: A study with rollouts and a probe.
        session: The model, and where progress is told.
        count: How many heads.
        where: Where they are removed while searching. Answers are drawn without them
            everywhere, with the thinking drawn anew.
        selection_prompts: Training answers to search on, at most.
        ablation_prompts: Held-out prompts of each label to measure on, at most.

    Returns:
        The heads, what they do to the logit, every condition with paired intervals,
        and whether attack success fell under half of what it was.

    Raises:
        InputError: If rollouts or probe are missing, or of another model.
        TooFewExamplesError: If no attack succeeds, or too few answers complied.
    """
    session.check_same(study)
    adapter, seed = session.adapter, study_seed(study)
    rows = from_table(study.read_table(ROLLOUTS))
    probe, _ = read_own_probe(study, "published")
    train = list(select(rows, selection_prompts).ranking)
    prompts = choose_prompts(rows, ablation_prompts)
    session.progress.say(
        f"Looking for {count} heads on {len(train)} answers, removed {where}."
    )
    batch_size = session.batch_size
    steps = greedy_heads(
        adapter, train, probe, count, where=where, seed=seed, batch_size=batch_size
    )
    total = adapter.n_layers * adapter.n_heads
    conditions = [Condition("none", "everywhere", None, 0, ())]
    for size in range(1, count + 1):
        heads = tuple(step.head for step in steps[:size])
        conditions.append(Condition("top", "everywhere", size / total, 0, heads))
    asked = [*prompts.harmful, *prompts.benign]
    items = [Item(each, row) for row in asked for each in conditions]
    session.progress.say(f"Drawing {len(items)} answers.")
    table = answer(
        adapter,
        items,
        sampling_of(study, adapter),
        AblateSettings(),
        batch_size,
        drawn_here="sampling" in study.record("rollout")["settings"],
    )
    answered = table.to_pylist()
    judged = with_outcomes(answered, verdicts_on(answered, RulesJudge()))
    order = {each.key: place for place, each in enumerate(conditions)}
    measured = conditions_of(_in_plan(judged, order), seed)
    found = {
        "where": where,
        "n_total": total,
        "searched_on": {
            "rows": len(train),
            "requests": len({row.request_id for row in train}),
        },
        "prompts": {"harmful": len(prompts.harmful), "benign": len(prompts.benign)},
        "steps": [
            {"layer": s.head.layer, "head": s.head.head, "change": figure_of(s.change)}
            for s in steps
        ],
        "conditions": measured,
        "under_half_with": under_half(measured),
        "model": model_fingerprint(study),
        "rollouts_sha256": study.input_hash(ROLLOUTS),
    }
    return found | {"fingerprint": fingerprint(found)}


def under_half(conditions: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the fewest heads that bring attack success under half, or None.

    Args:
        conditions: What `conditions_of` made, nothing first.
    """
    limit = HALF * float(conditions[0]["attack_success"]["value"])
    sizes = [
        int(each["n_heads"])
        for each in conditions[1:]
        if each["attack_success"]["value"] < limit
    ]
    return min(sizes, default=None)


def _change(
    adapter: Adapter,
    rows: Sequence[Rollout],
    probe: Probe,
    sets: Sequence[Sequence[Head]],
    where: Where,
    batch_size: int,
) -> Float[Tensor, "example _"]:
    direction, offset = probe.raw()
    sequences = [row.token_ids[: row.final + 1] for row in rows]
    if where == "everywhere":
        return effects_everywhere(
            adapter, sequences, sets, direction.float(), offset, batch_size=batch_size
        ).change.double()
    lengths = [row.final + 1 - row.spans.end_template[0] for row in rows]
    found = causal_effects(
        adapter,
        sequences,
        lengths,
        sets,
        direction.float(),
        offset,
        moments=["end_template"],
        batch_size=min(16, batch_size),
    )
    return found["end_template"].change.to(torch.float64)


def _in_plan(
    rows: Sequence[dict[str, Any]], order: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return rows condition by condition; a row's name begins with its condition."""
    return sorted(rows, key=lambda row: order[row["row_id"].partition("#")[0]])


@torch.inference_mode()
def effects_everywhere(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[HeadPlace]],
    direction: Float[Tensor, "d_model"],
    offset: int | float = 0.0,
    *,
    factor: int | float = 0.0,
    batch_size: int = 128,
) -> Effects:
    """Scale sets of heads at every token, and read the logit at the last one.

    The tokens stay as they are, so this is not what the model would say: a model
    without the heads may think something else.

    Args:
        adapter: The model.
        sequences: Token ids up to the token whose state is read.
        candidates: What is scaled together.
        direction: Direction in the space after the final norm.
        offset: The rest of the logit.
        factor: What heads are multiplied by.
        batch_size: Candidates in one pass; halved whenever memory runs out.

    Returns:
        Effects in float32 on the CPU, in the order of sequences and candidates.

    Raises:
        InputError: If a sequence has no tokens or too many.
        SettingsError: If the model has no such head.
        EnvironmentProblem: If one sequence alone does not fit in memory.
    """
    check_lengths(adapter, sequences)
    nothing: Sequence[HeadPlace] = ()
    tables = [head_factors(adapter, each, factor) for each in (nothing, *candidates)]
    unit = direction.to(adapter.device, torch.float32)
    size, lines = batch_size, []
    for sequence in sequences:
        ids = torch.tensor([list(sequence)], device=adapter.device)

        def run(part: Sequence[Tensor], ids: Tensor = ids) -> list[Tensor]:
            stacked = torch.stack(list(part))
            edit = HeadEdit(stacked)
            copies = torch.zeros(len(part), dtype=torch.long)
            first = first_layer(stacked)
            with scale_heads(adapter, edit), shared_rows(adapter, first, copies):
                states = adapter.base(input_ids=ids, use_cache=False).last_hidden_state
            last = states[:, -1].float()
            return list((last @ unit.to(last.device) + offset).cpu())

        logits, size = with_batch_halving(run, tables, size)
        lines.append(torch.stack(logits))
    found = torch.stack(lines)
    return Effects(found[:, 0], found[:, 1:] - found[:, :1])
