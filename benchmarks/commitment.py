"""What a commitment curve costs, beside drawing as many tokens plainly.

Answers of `organism:cliff` that complied are cut at nine places, and eight answers are
drawn from each. Variants draw in each round, in an order that rotates: behind trunks
that are read once; plainly, as rollouts are, thinking and answer, until about as many
tokens are drawn; and, with `--every`, plainly again, which is the noise, and without
trunks, each cut read by itself. CPU seconds per token that was drawn are divided by
those of plain drawing in the same round.

    python benchmarks/commitment.py --pairs 5 --rows 200 --json commitment.json
    python benchmarks/commitment.py --stretch 8 --rows 32 --every

`--stretch` repeats each thinking so many times, since those of the organism are short;
what is drawn behind it is nonsense then, and as long.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from measure import one_thread, summarise, verdict

from holdfast.cliff.commitment.cuts import SHARES, end_template
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.model import Adapter
from holdfast.rollout import stage
from holdfast.rollout.rows import from_table
from holdfast.rollout.session import Session
from holdfast.rollout.settings import RolloutSettings
from holdfast.study import Study

LIMIT, DRAWS, DRAW_TOKENS, MAX_THINKING = 1.5, 8, 32, 256
FEW = 100
"""Rows below which no more is asked than they need."""
PLAIN, AGAIN = "drawn plainly", "drawn plainly again (the noise)"
SHARED, APART = "commitment curve, trunks read once", "each cut read by itself"
Prompt = tuple[tuple[int, ...], int]


class Load(NamedTuple):
    """What is drawn from, with one prompt for each draw."""

    adapter: Adapter
    cut: list[Prompt]  # Prompt and a part of the thinking, closed.
    trunks: list[tuple[int, ...]]
    asked: list[Prompt]  # The prompt alone.
    mean_trunk: float  # Tokens.


def load(n_rows: int, stretch: int) -> Load:
    """Ask authored prompts, and cut the thinking of those that complied."""
    with tempfile.TemporaryDirectory() as folder:
        study, session = Study.create(folder), Session("organism:cliff")
        # Some three of five wrapped requests are complied with.
        limit = 2 * n_rows if n_rows < FEW else None
        stage.run(study, RolloutSettings(limit=limit), session)
        rows = from_table(study.read_table("rollouts.parquet"))
    complied = [row for row in rows if row.group == "harmful_complied"][:n_rows]
    adapter = session.adapter
    template = end_template(adapter)
    cut: list[Prompt] = []
    trunks, asked = [], []
    for number, row in enumerate(complied):
        start, end = row.spans.thinking
        prompt = row.token_ids[:start]
        thinking = row.token_ids[start:end] * stretch
        trunk = (*prompt, *thinking, *row.token_ids[end : row.final + 1])
        cuts = [
            (*prompt, *thinking[: round(share * len(thinking))], *template)
            for share in SHARES
        ]
        for place, tokens in enumerate((*cuts, trunk)):
            for draw in range(DRAWS):
                seed = (number * len(SHARES) + place) * DRAWS + draw
                cut.append((tokens, seed))
                trunks.append(trunk)
                asked.append((prompt, seed))
    return Load(adapter, cut, trunks, asked, float(np.mean([*map(len, trunks)])))


def runs_of(load: Load, batch_size: int, every: bool) -> dict[str, Callable[[], int]]:
    """Return the variants; each returns how many tokens it drew."""
    answer = Sampling(temperature=0.7, max_thinking=0, max_answer=DRAW_TOKENS)
    whole = Sampling(temperature=0.7, max_thinking=MAX_THINKING, max_answer=DRAW_TOKENS)

    def drawn(parts: Iterable[list[Completion]]) -> int:
        rows = [row for part in parts for row in part]
        return sum(len(row.token_ids) - row.spans.prompt[1] for row in rows)

    def behind(trunks: list[tuple[int, ...]] | None) -> int:
        return drawn(
            generate(
                load.adapter,
                load.cut,
                answer,
                batch_size=batch_size,
                thinking_done=True,
                trunks=trunks,
            )
        )

    needed = behind(load.trunks)
    each = drawn(generate(load.adapter, load.asked[:256], whole, batch_size=batch_size))
    # As many rows as it takes for as many tokens.
    n = min(len(load.asked), max(1, round(needed / (each / 256))))

    def plainly() -> int:
        return drawn(
            generate(load.adapter, load.asked[:n], whole, batch_size=batch_size)
        )

    runs = {PLAIN: plainly, SHARED: lambda: behind(load.trunks)}
    return runs | ({AGAIN: plainly, APART: lambda: behind(None)} if every else {})


def measure(runs: dict[str, Callable[[], int]], pairs: int) -> dict[str, Any]:
    """Return CPU seconds per token of every variant in every round, and tokens."""
    names = list(runs)
    paces: dict[str, list[float]] = {name: [] for name in names}
    tokens = {}
    for turn in range(pairs):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            tokens[name] = runs[name]()
            paces[name].append((time.process_time() - start) / tokens[name])
    return {
        "paces": {name: np.array(each) for name, each in paces.items()},
        "tokens": tokens,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--stretch", type=int, default=1)
    parser.add_argument("--every", action="store_true", help="every variant")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with one_thread():
        made = load(options.rows, options.stretch)
        found = measure(runs_of(made, options.batch_size, options.every), options.pairs)
    plain = found["paces"][PLAIN]
    lines = {
        name: {
            **summarise(pace / plain),
            "ms_per_token": 1000 * float(np.median(pace)),
            "tokens": found["tokens"][name],
        }
        for name, pace in found["paces"].items()
    }
    n_draws = len(made.cut)
    about = (
        f"organism:cliff, {n_draws // DRAWS // (len(SHARES) + 1)} rows × "
        f"{len(SHARES) + 1} cuts × {DRAWS} draws, trunks of {made.mean_trunk:.0f} "
        "tokens on average"
    )
    print(
        f"\n{about}, float32, one thread; {options.pairs} rounds; torch "
        f"{torch.__version__}, transformers {transformers.__version__}.\n"
    )
    print("| variant | CPU time per token ÷ plain [95 %] | ms per token | tokens |")
    print("|---|---|---|---|")
    for name, line in lines.items():
        print(
            f"| {name} | {line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}] "
            f"| {line['ms_per_token']:.3f} | {line['tokens']} |"
        )
    print(f"\nAt most {LIMIT} × plain: {verdict(lines[SHARED], LIMIT)}.")
    if options.json is not None:
        options.json.write_text(json.dumps({"about": about, "rows": lines}, indent=1))


if __name__ == "__main__":
    main()
