"""An evaluation as a log of inspect_ai."""

import importlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from holdfast.errors import EnvironmentProblem, InputError
from holdfast.evaluate.panel import EVALUATED, TABLE, is_evaluated
from holdfast.evaluate.rows import counts_for, is_unjudged
from holdfast.study import Study, require_place

PACKAGE = "inspect_ai"
VALUES = {"complied": "C", "refused": "I", "partial": "P"}


def require_inspect() -> None:
    """Refuse to go on without inspect_ai."""
    if find_spec(PACKAGE) is None:
        raise EnvironmentProblem(
            "the package inspect_ai, for a log of its kind",
            "no such package here",
            "Install it in the folder of Holdfast: `pip install '.[inspect]'`.",
        )


def write_log(
    rows: Sequence[Mapping[str, Any]],
    block: Mapping[str, Any],
    model: Mapping[str, Any],
    created: str,
    path: Path,
) -> Path:
    """Write the rows of an evaluation as one log that `inspect view` opens.

    `block`: The block `evaluation` of the report.
    `model`: The block `model` of the report.
    """
    require_inspect()
    log = importlib.import_module(f"{PACKAGE}.log")
    generation = block["generation"]
    sampling = generation["sampling"]
    samples = [_sample(row, model["id"]) for row in rows]
    spec = log.EvalSpec(
        created=created,
        task="holdfast_evaluation",
        dataset=log.EvalDataset(
            name=", ".join(source["suite"] for source in block["sources"]),
            samples=len({sample.id for sample in samples}),
            sample_ids=list(dict.fromkeys(sample.id for sample in samples)),
        ),
        model=f"holdfast/{model['id']}",
        model_args={
            key: generation[key] for key in ("template_sha256", "weights_sha256")
        },
        config=log.EvalConfig(epochs=generation["samples"]),
        metadata={
            "judge": block["judge"],
            "calibration": block["calibration"],
            "generation": generation,
            "sources": block["sources"],
            "notes": block["notes"],
        },
        packages={},
    )
    spec.model_generate_config.temperature = sampling["temperature"]
    spec.model_generate_config.top_p = sampling["top_p"]
    spec.model_generate_config.max_tokens = sampling["max_answer"]
    scores = [_score(log, row, len(rows)) for row in block["rows"]]
    made = log.EvalLog(
        status="success",
        eval=spec,
        results=log.EvalResults(
            total_samples=len(samples), completed_samples=len(samples), scores=scores
        ),
        stats=log.EvalStats(started_at=created, completed_at=created),
        samples=samples,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    log.write_eval_log(made, str(path))
    return path


def _sample(row: Mapping[str, Any], model: str) -> Any:
    log = importlib.import_module(f"{PACKAGE}.log")
    kit = importlib.import_module(f"{PACKAGE}.model")
    scorer = importlib.import_module(f"{PACKAGE}.scorer")
    content = []
    if row["thinking"]:
        content.append(kit.ContentReasoning(reasoning=row["thinking"]))
    content.append(kit.ContentText(text=row["answer"]))
    answer = kit.ChatMessageAssistant(content=content, model=model, source="generate")
    messages = [kit.ChatMessageUser(content=row["prompt"])]
    if row["system_prompt"]:
        messages.insert(0, kit.ChatMessageSystem(content=row["system_prompt"]))
    stopped = "stop" if row["finish"] == "stop" else "max_tokens"
    written = row["n_thinking"] + row["n_answer"]
    output = kit.ModelOutput(
        model=model,
        choices=[kit.ChatCompletionChoice(message=answer, stop_reason=stopped)],
        usage=kit.ModelUsage(
            input_tokens=row["n_prompt"],
            output_tokens=written,
            total_tokens=row["n_prompt"] + written,
        ),
    )
    said = row["verdict"] or ("C" if row["correct"] else "I")
    score = scorer.Score(
        value=VALUES.get(said, said),
        answer=row["answer"],
        explanation=row["reason"],
        metadata={key: row[key] for key in ("verdict", "score", "judge", "correct")}
        | {"counts": None if is_unjudged(row) else counts_for(row)},
    )
    kept = ("suite", "kind", "wrapper", "request_id", "prompt_id", "topic", "seed")
    return log.EvalSample(
        id=row["row_id"].rpartition("/")[0],
        epoch=row["sample"] + 1,
        input=row["prompt"],
        target=row["target"] or "",
        messages=[*messages, answer],
        output=output,
        scores={row["judge"]: score},
        metadata={key: row[key] for key in kept},
    )


def _score(log: Any, row: Mapping[str, Any], n_rows: int) -> Any:
    figure = row["figure"]
    name = "/".join(filter(None, (row["suite"], row["kind"], row["wrapper"])))
    numbers = {row["measure"]: figure["value"]}
    if figure.get("bounds"):
        # A rate over answers that were not all judged is its bounds, and no number.
        low, high = figure["bounds"]
        numbers = {f"{row['measure']}_least": low, f"{row['measure']}_most": high}
    numbers |= {f"{row['measure']}_{end}": figure[end] for end in ("low", "high")}
    metrics = {
        key: log.EvalMetric(name=key, value=value)
        for key, value in numbers.items()
        if value is not None
    }
    return log.EvalScore(
        name=name,
        scorer="holdfast",
        metrics=metrics,
        scored_samples=figure["n"] - figure.get("unjudged", 0),
        unscored_samples=n_rows - figure["n"] + figure.get("unjudged", 0),
    )


FORMATS = ("inspect",)


def run(place: Path, to: str = "inspect", output: Path | None = None) -> list[Path]:
    """Write the evaluation of a study as a log of inspect_ai.

    `to`: The format; `inspect` is the only one.
    `output`: Folder to write to; by default `inspect` in the study.
    """
    if output is not None:
        require_place(output / "log", folder=False)
    study = Study.open(place)
    if to not in FORMATS:
        raise InputError("a format of inspect", f"`{to}`", "Leave out --to.")
    if not is_evaluated(study):
        raise InputError(
            f"an evaluation in {place}",
            "none that is done",
            "Run `holdfast evaluate MODEL -o STUDY` first.",
        )
    require_inspect()
    block = study.read_json(EVALUATED)
    record = study.record("generate")
    # inspect_ai reads a name as time, task and id, and a dash would end the id.
    label = "".join(c for c in block["judge"]["label"] if c.isalnum())
    day = record["started"].replace(":", "-")
    path = (output or study.path("inspect")) / f"{day}_holdfast-evaluation_{label}.eval"
    rows = study.read_table(TABLE).to_pylist()
    return [write_log(rows, block, study.manifest["model"], record["started"], path)]
