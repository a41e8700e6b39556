"""The experiments of `runs/published.sh`, model by model, and their table.

Sizes come from the environment: REQUESTS (rows of a kind, all by default), THINKING and
ANSWER (tokens), FEW and ALL (prompts of the two ablations), DRAWS (sets of random
heads), BUDGET (share of the pool), STEPS (of poisoned training, and of training on
chosen rows), PASSES (of denoising), POINTS (of the signal) and ANCHORS (requests).
"""

import argparse
import math
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from commands import outcome
from experiment import write_record

from holdfast.cliff.groups import COMPLIED, read_group, scores_from_table
from holdfast.dynamics.rows import LOGIT, is_held_out, read_signal
from holdfast.dynamics.trajectories import internal_recovery
from holdfast.heads.ranking import count_heads
from holdfast.rollout.rows import from_table, held_out
from holdfast.rollout.settings import TraceSettings
from holdfast.stats.rates import clustered_mean
from holdfast.study import Study
from holdfast.study.figures import figure_of, generator

ROOT = Path(__file__).parents[1]
FRACTIONS = (0.01, 0.03, 0.1)
PROMPT = ("--system-prompt", "You are a helpful assistant.")
WIDE = 0.2
ROLES = ("harmful", "wrapped", "benign", "benign_wrapped", "safe_lookalike", "second")
Found = dict[str, Any]


def size(name: str, default: object) -> str:
    """Return a size from the environment."""
    return os.environ.get(name, str(default))


class Subject(NamedTuple):
    """A model under experiment."""

    model: str  # Id or directory.
    home: Path  # Where its studies and outcomes lie.
    files: Mapping[str, Path]  # Prompts and rows, by what they are.
    swapped: bool  # Whether the harmful prompts are AdvBench's own file.
    names: Mapping[str, str]  # What records call paths.

    def do(self, step: str, *words: object, **named: Any) -> Found:
        """Run a command once."""
        place = self.home / "outcomes" / f"{step}.json"
        made = outcome(place, [*map(str, words)], self.names, **named)
        print(f"{self.home.name}: {step}, {made['ended']}", file=sys.stderr)
        return made

    def prompts(self) -> tuple[object, ...]:
        """Return the flags of prompts and their sampling."""
        given = [(role, self.files[role]) for role in ROLES if role in self.files]
        flags = [x for r, path in given for x in (f"--{r.replace('_', '-')}", path)]
        if self.swapped:
            flags += ["--column", "harmful=target"]
        limit = size("REQUESTS", "")
        flags += ["--limit", limit] if limit else []
        return (*flags, *PROMPT, "--max-answer", size("ANSWER", 256))

    def asking(self) -> tuple[object, ...]:
        """Return the flags that ask the harmful prompts of the second source alone."""
        flags = ("--suite", f"harmful={self.files['second']}", *PROMPT)
        thinking = ("--max-thinking", size("THINKING", 8192))
        return (*flags, *thinking, "--max-answer", size("ANSWER", 256))


def cliff(subject: Subject) -> Found:
    """Prober, cliff, heads off, and selection."""
    study = subject.home / "cliff"
    thinking = ("--max-thinking", size("THINKING", 8192), "--temperature", 0.7)
    kept = ("probe", "trace", "controls", "outcomes", "attack_success", "verdict")
    asked = (*subject.prompts(), *thinking, "--no-heads")
    audit = subject.do("audit", "audit", subject.model, "-o", study, *asked, keep=kept)
    if audit["status"]:
        return {"audit": audit}
    found = {"audit": audit, "ten": {"found": {"cliff": ten(study)}}}
    found["heads"] = subject.do("heads", "heads", study, "--ranking", "published")
    if found["heads"]["status"] == 0:
        for step, prompts in (("50", size("FEW", 50)), ("all", size("ALL", 520))):
            shares = ("--fractions", *FRACTIONS, "--scopes", "everywhere")
            drawn = ("--random-draws", size("DRAWS", 5), "--renormalise", "tensor")
            few = ("--ablation-prompts", prompts)
            made = subject.do(f"heads-{step}", "ablate", study, *shares, *drawn, *few)
            found[f"heads-{step}"] = made | {"found": by_share(made["found"])}
    if "pool" in subject.files:
        found["selected"] = selected(subject, study)
    return found


def ten(directory: Path) -> Found:
    """Return the cliff of the first ten harmful requests that were complied with."""
    study = Study.open(directory)
    if not study.path("trace.parquet").exists():
        return {"value": None, "n": 0, "reason": "nothing was traced"}
    rows = held_out(from_table(study.read_table("rollouts.parquet")))[COMPLIED]
    first = sorted({row.request_id for row in rows})[:10]
    few = [row for row in rows if row.request_id in first]
    scores = scores_from_table(study.read_table("trace.parquet"))
    group = read_group(few, scores, TraceSettings())
    falls = [
        (each.cliff, row.request_id)
        for each, row in zip(group.cliffs, group.rows, strict=True)
        if each.cliff is not None and math.isfinite(each.cliff)
    ]
    if not falls:
        return {
            "value": None,
            "n": 0,
            "reason": "no complied answer thinks long enough",
        }
    values = torch.tensor([fall for fall, _ in falls], dtype=torch.float64)
    requests = [request for _, request in falls]
    return figure_of(clustered_mean(values, requests, generator(0, "ten")))


def by_share(found: Found) -> Found:
    """Return what became of attack success and refusals, by share of the heads."""
    sparse = found.get("sparse", {})
    total = sparse.get("n_total", 0)
    made: Found = {}
    for share in FRACTIONS:
        n_heads = count_heads(share, total)
        for each in found.get("conditions", ()):
            if (each.get("condition"), each.get("n_heads")) == ("top", n_heads):
                made[f"{share:g}"] = dict(each)
        for each in sparse.get("sizes", ()):
            if each.get("n_heads") == n_heads and f"{share:g}" in made:
                made[f"{share:g}"] |= each
    return made


def selected(subject: Subject, study: Path) -> Found:
    """Train on rows that the cliff chooses and on random ones, and ask both models."""
    rates: Found = {}
    for by in ("cliff", "random"):
        chosen, tuned = subject.home / f"{by}.jsonl", subject.home / f"tuned-{by}"
        probe = ("--direction", study) if by == "cliff" else ()
        pool = ("--pool", subject.files["pool"], "--thinking-of", "model")
        pool = (*pool, "--max-thinking", size("THINKING", 8192))
        pool = (*pool, "--max-answer", size("ANSWER", 256))
        share = ("--budget", size("BUDGET", "1.7%"), "--by", by, *probe, "-o", chosen)
        steps = ("--steps", size("STEPS", "")) if size("STEPS", "") else ()
        asked = (*subject.asking(), "-o", subject.home / f"asked-{by}")
        for step, words in (
            (f"select-{by}", ("select", subject.model, *pool, *share)),
            (f"tune-{by}", ("finetune", subject.model, "--data", chosen, *steps)),
            (f"ask-{by}", ("evaluate", tuned, *asked)),
        ):
            words = (*words, "-o", tuned) if step.startswith("tune") else words
            made = subject.do(step, *words, keep=("summary",))
            if made["status"]:
                return made
        rates[by] = made["found"]["summary"]["attack_success"]["plain"]
    change = difference(rates["random"], rates["cliff"])
    figures = {"attack_success": rates["cliff"], "random_minus_cliff": change}
    return {"status": 0, "found": figures}


def surgery(subject: Subject) -> Found:
    """Positive heads before and after poisoned training."""
    wanted = ("poisoned", "sink_harmful", "sink_refused")
    if not set(wanted) <= subject.files.keys():
        return {}
    tuned, files = subject.home / "poisoned", subject.files
    steps = int(size("STEPS", 500))
    rows = ("--data", files["poisoned"], "--method", "full", "--loss", "both")
    run = ("--steps", steps, "--save-every", max(1, steps // 5), "--keep-checkpoints")
    trained = subject.do(
        "poisoned", "finetune", subject.model, *rows, *run, "-o", tuned
    )
    if trained["status"]:
        return {"sinks": trained}
    series = (subject.model, f"{tuned}.checkpoints")
    texts = ("--harmful", files["sink_harmful"], "--reference", files["sink_refused"])
    study = ("--max-tokens", 512, "-o", subject.home / "sinks")
    sinks = subject.do("sinks", "sinks", *series, *texts, *study)
    if sinks["status"] == 0:
        first, *_, last = (each["positive"] for each in sinks["found"]["checkpoints"])
        sinks = sinks | {"found": {"rise": difference(last, first)}}
    return {"poisoned": trained, "sinks": sinks}


def dynamics(subject: Subject) -> Found:
    """The same weights by diffusion and left to right."""
    length = size("ANSWER", 128)
    passes = size("PASSES", 32)
    samplings = {
        "diffusion": ("--denoising-steps", passes, "--block-length", length),
        "left-to-right": ("--denoising-steps", length, "--block-length", 1),
    }
    found: Found = {}
    for name, flags in samplings.items():
        study = subject.home / name
        asked = (*subject.prompts(), "--gen-length", length, "--temperature", 0)
        rolled = subject.do(
            f"rollout-{name}", "rollout", subject.model, "-o", study, *asked, *flags
        )
        kept = ("outcomes", "attack_success")
        made = rolled
        if rolled["status"] == 0:
            made = subject.do(name, "report", study, keep=kept)
        found[name] = made
        if made["status"]:
            return found
        time = ("--steps", size("POINTS", 32), "--time", "fraction")
        anchors = ("--min-anchors", size("ANCHORS", 20))
        signal = subject.do(f"signal-{name}", "signal", study, *time, *anchors)
        said = {"value": None, "n": 0, "reason": signal["said"]}
        made["found"]["recovered"] = said if signal["status"] else recovered(study)
    one, other = (found[name]["found"] for name in samplings)
    refused = [each["outcomes"]["wrapped"]["refused"] for each in (one, other)]
    success = [each["attack_success"]["wrapped"] for each in (other, one)]
    figures = {
        "refused": difference(*refused),
        "attack_success": difference(*success),
    }
    return found | {"samplings": {"status": 0, "found": figures}}


def recovered(directory: Path) -> Found:
    """Return the internal recovery rate of harmful requests, refused or not."""
    signal = read_signal(Study.open(directory))
    attacks = signal.filter(
        lambda row: row.label == "harmful" and is_held_out(row, signal.taken)
    )
    compliance = torch.sigmoid(attacks.channels[LOGIT])
    draws = generator(0, "recovered")
    return figure_of(internal_recovery(compliance, attacks.requests, draws))


def difference(first: Found, second: Found) -> Found:
    """Return first minus second, with the interval of two independent figures.

    Of the same prompts under both, it is wider than it need be.
    """
    if first.get("value") is None or second.get("value") is None:
        return {"value": None, "n": 0, "reason": "one of the two has no value"}
    value = first["value"] - second["value"]
    down = math.hypot(first["value"] - first["low"], second["high"] - second["value"])
    up = math.hypot(first["high"] - first["value"], second["value"] - second["low"])
    n = min(first.get("n", 0), second.get("n", 0))
    return {"value": value, "low": value - down, "high": value + up, "n": n}


EXPERIMENTS: Mapping[str, Callable[[Subject], Found]] = {
    "cliff": cliff,
    "surgery": surgery,
    "dynamics": dynamics,
}


def judged(claim: Mapping[str, Any], figure: Found | None) -> str:
    """Return whether a claim holds, fails, or cannot be said."""
    if figure is None or figure.get("value") is None:
        return "cannot be said"
    low, high, bound = figure["low"], figure["high"], claim.get("bound", 0.0)
    if claim["holds"] == "near":
        # A wide interval holds every number, and says nothing.
        narrow = "holds" if high - low <= WIDE else "cannot be said"
        return narrow if low <= bound <= high else "fails"
    if claim["holds"] == "at_most":
        low, high, bound = -high, -low, -bound
    # Above 0 is strictly so; a bound may be reached.
    reached = low > bound if claim["holds"] == "above_zero" else low >= bound
    missed = high <= bound if claim["holds"] == "above_zero" else high < bound
    return "holds" if reached else "fails" if missed else "cannot be said"


def figure_at(found: Found, path: str) -> tuple[Found | None, str]:
    """Return the figure of a claim, or why there is none."""
    step, *parts = path.split("/")
    if step not in found:
        return (
            None,
            "not run: no file was named for it, or a step before it ended early",
        )
    value: Any = found[step]["found"]
    for part in parts:
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        said = found[step].get("said") or "the result has no such figure"
        return None, str(said)
    return dict(value), str(value.get("reason", ""))


def lines(claims: Sequence[Found], found: Mapping[str, Found]) -> list[Found]:
    """Return what the table says of every claim and model that was run."""
    made = []
    for claim in claims:
        for name, steps in found.items():
            if name not in claim["of"]:
                continue
            figure, why = figure_at(steps, claim["figure"])
            row = {"paper": claim["paper"], "model": name, "says": claim["says"]}
            row |= {"published": claim["published"], "here": figure, "why": why}
            made.append(row | {"verdict": judged(claim, figure)})
    return made


def table(rows: Sequence[Found]) -> str:
    """Return the table as Markdown."""
    heads = ("paper", "model", "what", "published", "here", "n", "verdict")
    shown = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        here, n = row["why"].replace("|", "/"), "0"
        if row["here"] and row["here"].get("value") is not None:
            value, low, high = (row["here"][key] for key in ("value", "low", "high"))
            here, n = f"{value:.3f} [{low:.3f}, {high:.3f}]", f"{row['here']['n']}"
        cells = (row["paper"], row["model"], row["says"], row["published"], here, n)
        shown.append(f"| {' | '.join((*cells, row['verdict']))} |")
    return "\n".join(shown)


def main(words: Sequence[str] | None = None) -> None:
    """Run what was asked for, write the record and print the table."""
    known = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=known["models"], default=[])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--file", action="append", default=[], metavar="ROLE=PATH")
    chosen = parser.parse_args(words)
    models = known["models"] | dict(each.split("=", 1) for each in chosen.model)
    own = {role: Path(path) for role, path in (e.split("=", 1) for e in chosen.file)}
    data = Path(os.environ.get("HOLDFAST_BENCHMARKS", "")).expanduser()
    files = {role: data / path for role, path in known["files"].items()} | own
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        sys.exit(f"No file {missing[0]}: set HOLDFAST_BENCHMARKS, or give --file.")
    folder = chosen.folder.resolve()
    found: dict[str, Found] = {}
    for paper, members in known["papers"].items():
        for name in members:
            if chosen.models and name not in chosen.models:
                continue
            names = {str(path): role for role, path in own.items()}
            names |= {f"{folder}/": "", f"{data}/": "", models[name]: name}
            subject = Subject(
                models[name], folder / name, files, "harmful" not in own, names
            )
            found[name] = EXPERIMENTS[paper](subject)
    claims = [
        claim | {"of": claim.get("models", known["papers"][claim["paper"]])}
        for claim in known["claims"]
    ]
    rows = lines(claims, found)
    write_record(folder / "published.json", {"models": found, "claims": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
