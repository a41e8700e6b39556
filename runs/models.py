"""Load a tiny model of every type, and write the table of what each is good for.

Usage: models.py [--only TYPE ...] [--again]

Each checkpoint is random, is saved under the names of published weights, and is loaded
by `load`. Times are taken on a random model 12 times as wide, of four layers: reading
states at every position and all heads, over a plain pass of the base model, in CPU time
of rounds that alternate. What is measured goes into `docs/records/models/table.json` at
once, so a run that was stopped goes on; a type is measured anew with `--again`, or
under other versions. The table in `docs/models.md` is written from it at the end.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

ROOT: Final = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from holdfast.errors import HoldfastError  # noqa: E402
from holdfast.heads.attribution import attribute  # noqa: E402
from holdfast.models.hidden_states import read_states  # noqa: E402
from holdfast.models.loading.causal import adapt, load  # noqa: E402
from holdfast.models.model import USES, Adapter, Proof  # noqa: E402
from tiny_kinds import EVERY, FURTHER, SEEING  # noqa: E402
from tiny_models import (  # noqa: E402
    random_sequences,
    tiny_of_every_kind,
    tiny_tokenizer,
)

RECORD: Final = ROOT / "docs" / "records" / "models" / "table.json"
PAGE: Final = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
TIMES, ROUNDS, TOKENS = 12, 5, (4, 128)
HEADER: Final = (
    "type", "text", "states", "heads", "worst proof", "worst gap", "reading states",
    "all heads",
)  # fmt: skip
VERSIONS: Final = {"transformers": transformers.__version__, "torch": torch.__version__}


def kinds() -> dict[str, tuple[str, bool]]:
    """Return every type, with its settings' name and whether it sees as well."""
    found = {}
    for table, sees in ((EVERY | FURTHER, False), (SEEING, True)):
        for kind, (name, _) in table.items():
            found[getattr(transformers, name).model_type] = (kind, sees)
    return dict(sorted(found.items()))


def measured(kind: str, sees: bool, *, timed: bool = True) -> dict[str, Any]:
    """Return what holds for a type, from a checkpoint that is written and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_of_every_kind(kind, sees=sees)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        found: dict[str, Any] = {"class": type(model).__name__, "sees": sees}
        try:
            adapter = load(folder, device="cpu", dtype="float32")
        except HoldfastError as error:
            reason = _said(getattr(error, "proofs", ())) or str(error)
            reason = reason.replace(folder, "a tiny checkpoint")
            return {**found, "tiers": dict.fromkeys(USES, reason)}
    values = [p.value for p in adapter.proofs if p.passed and p.value is not None]
    found["tiers"] = {
        tier: adapter.lacks(tier) and _said(adapter.proofs) for tier in USES
    }
    found["norm"] = type(adapter.final_norm).__name__
    found["proofs"] = len(adapter.proofs)
    found["worst_proof"] = max(values)
    if adapter.lacks("heads") is None:
        found["worst_gap"] = max(each.gap for each in _attributed(adapter, (3, 60)))
    if timed and not sees:
        found |= _times(kind)
    return found


def _said(proofs: Sequence[Proof]) -> str:
    """Return what failed of the first tier that does not hold."""
    failed = [proof for proof in proofs if not proof.passed]
    below = [each for each in USES if each in {proof.tier for proof in failed}]
    first = [proof for proof in failed if proof.tier == below[0]] if below else []
    parts = [
        proof.failure() + f": {proof.detail}" * (proof.value == float("inf"))
        for proof in first
    ]
    # The advice is for whoever loads one model, and not for a table.
    advice = " Single heads of this model cannot be read; use another."
    return "; ".join(parts).replace(advice, "")


def _attributed(adapter: Adapter, size: tuple[int, int]) -> Any:
    direction = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(5))
    rows, length = size
    return attribute(
        adapter,
        random_sequences([length] * rows),
        [(length // 4, length)] * rows,
        direction,
    )


def _times(kind: str) -> dict[str, Any]:
    """Return CPU time over a plain pass: median, least and most of the rounds."""
    adapter = adapt(tiny_of_every_kind(kind, times=TIMES), None)
    rows = random_sequences([TOKENS[1]] * TOKENS[0])
    ids = torch.tensor(rows)

    def plain() -> None:
        with torch.inference_mode():
            adapter.base(input_ids=ids, use_cache=False)

    runs: dict[str, Callable[[], Any]] = {"plain": plain, "again": plain}
    if adapter.lacks("states") is None:
        runs["states"] = lambda: read_states(adapter, rows, lambda found, _: found)
    if adapter.lacks("heads") is None:
        runs["all_heads"] = lambda: _attributed(adapter, TOKENS)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name in np.roll(list(runs), turn).tolist():
            start = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - start)
    # The first round of each warms up.
    table = {name: np.array(spent[1:]) for name, spent in seconds.items()}
    ratios = {name: table[name] / table["plain"] for name in list(runs)[1:]}
    return {
        "seconds": round(float(np.median(table["plain"])), 4),
        "times": {
            name: [round(float(f(each)), 3) for f in (np.median, np.min, np.max)]
            for name, each in ratios.items()
        },
    }


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown: the table, and why a tier is not there."""
    rows = [_row(name, each) for name, each in record.items()]
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [
        f"- `{name}`: {_reason(each)}"
        for name, each in record.items()
        if any(each["tiers"].values())
    ]
    versions = {json.dumps(each["versions"]) for each in record.values()}
    assert len(versions) == 1, f"rows of several versions: {versions}; run --again"
    parts = [f"{k} {v}" for k, v in json.loads(versions.pop()).items()]
    timed = [each["times"]["again"][0] for each in record.values() if "times" in each]
    about = (
        f"{len(record)} types; {', '.join(parts)}; float32, one thread, on the CPU. "
        "“Worst proof” is the largest deviation of all that was proved on load, "
        "“worst gap” how far the contributions miss the logit at the worst token, "
        "relative to the sum of their sizes; both on a tiny random checkpoint. The "
        "last two columns are CPU time over a plain pass of the base model, of reading "
        f"states at every position and of all heads: median of {ROUNDS} rounds, on a "
        f"random model of width {32 * TIMES}, four layers, {TOKENS[0]} × {TOKENS[1]} "
        "tokens. At that size overhead shows more than in a large model; the same pass "
        f"against itself came to {min(timed):.2f} to {max(timed):.2f}."
    )
    return "\n\n".join([about, body, "What does not hold:", "\n".join(notes)])


def _row(name: str, each: dict[str, Any]) -> list[str]:
    shown = ["no" if each["tiers"][tier] else "yes" for tier in USES]
    numbers = [
        "–" if each.get(key) is None else f"{each[key]:.0e}"
        for key in ("worst_proof", "worst_gap")
    ]
    spent = [_ratio(each, key) for key in ("states", "all_heads")]
    title = f"`{name}`" + (", sees" if each["sees"] else "")
    return [title, *shown, *numbers, *spent]


def _reason(each: dict[str, Any]) -> str:
    reason = next(reason for reason in each["tiers"].values() if reason)
    if "root-mean-square" in reason:
        reason += f"; its norm is a {each['norm']}"
    return str(reason)


def _ratio(each: dict[str, Any], key: str) -> str:
    found = each.get("times", {}).get(key)
    return "–" if found is None else f"{found[0]:.2f} ×"


def write_page(record: dict[str, Any]) -> None:
    """Write the table between its marks in the page, and keep what is around it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page = f"{before}{BEGIN}\n{table(record)}\n{END}{after}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="types, as in config.json")
    parser.add_argument("--again", action="store_true", help="measure known ones too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Proofs are what is shown here, so none is taken from before.
    os.environ["HOLDFAST_CACHE"] = ""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    todo = [
        (name, *how)
        for name, how in kinds().items()
        if name in (options.only or kinds())
        if options.again or record.get(name, {}).get("versions") != VERSIONS
    ]
    start = time.monotonic()
    for done, (name, kind, sees) in enumerate(todo, 1):
        record[name] = {**measured(kind, sees), "versions": VERSIONS}
        text = json.dumps(dict(sorted(record.items())), indent=1, ensure_ascii=False)
        RECORD.write_text(text + "\n", encoding="utf-8")
        left = (time.monotonic() - start) / done * (len(todo) - done)
        tiers = [tier for tier, reason in record[name]["tiers"].items() if not reason]
        what = ", ".join(tiers) or "nothing"
        print(f"{done} of {len(todo)}: {name}: {what}; {left:.0f} s left", flush=True)
    write_page({name: record[name] for name in kinds() if name in record})


if __name__ == "__main__":
    main()
