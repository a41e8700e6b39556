"""From the records of the repair experiment to its table, contrasts and figure.

Usage: repair_table.py FOLDER

Prints Markdown and draws FOLDER/repair.svg. The primary contrasts are those of
docs/repair.md; all others are corrected by Holm's rule.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair
import torch
from scipy import stats

from holdfast.select.selectors import holm
from holdfast.stats.bootstrap import Estimate
from holdfast.stats.paired import paired_rate_difference, sign_flip
from holdfast.stats.rates import clustered_rate

PRIMARY = (("cliff@1%", "random-flagged@1%"), ("cliff@1%", "final@1%"))
TRAINED = "trained_wrappers"
ATTACK = (
    TRAINED,
    "unseen_wording",
    "unseen_phrase",
    "unseen_wrapper",
    "plain_harmful",
)
GAVE_IN, REFUSED, COMPLIED = "cp", "r", "c"
"""Letters of `repair_evaluate.LETTERS`."""

MEASURES = {
    **{kind: GAVE_IN for kind in ATTACK},
    "lookalike": REFUSED,
    "benign": COMPLIED,
    "benign_wrapped": COMPLIED,
}
Cells = dict[str, dict[int, dict[str, Any]]]


def read(folder: Path) -> Cells:
    """Read all records, and with them whose requests their letters are."""
    cells: Cells = defaultdict(dict)
    alike = set()
    requests = json.loads((folder / "requests.json").read_text("utf-8"))
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        alike.add(json.dumps([record["test_sha256"], record["plan"]], sort_keys=True))
        name = f"{record['selector']}@{record['budget']}"
        cells[name][record["seed"]] = record | {"requests": requests}
    if len(alike) != 1:
        raise SystemExit(f"expected records of one experiment; found {len(alike)}")
    return dict(cells)


def hits(record: dict[str, Any], kind: str) -> tuple[torch.Tensor, list[str]]:
    counts = [letter in MEASURES[kind] for letter in record["outcomes"][kind]]
    return torch.tensor(counts), record["requests"][kind]


def rate(seeds: dict[int, dict[str, Any]], kind: str) -> Estimate:
    parts = [hits(record, kind) for record in seeds.values()]
    names = [name for _, requests in parts for name in requests]
    values = torch.cat([value for value, _ in parts])
    return clustered_rate(values, names, torch.Generator().manual_seed(0))


def contrast(cells: Cells, first: str, second: str, kind: str) -> dict[str, Any]:
    """Return the paired difference over requests, and the one over seeds.

    What was run once, such as the whole pool, is the partner of every seed.
    """
    mine, others = cells[first], cells[second]
    if len(others) == 1:
        others = dict.fromkeys(mine, next(iter(others.values())))
    seeds = sorted(set(mine) & set(others))
    pairs = [(hits(mine[seed], kind), hits(others[seed], kind)) for seed in seeds]
    names = [name for one, _ in pairs for name in one[1]]
    return paired([(one[0], other[0]) for one, other in pairs], names)


def paired(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], names: Sequence[str]
) -> dict[str, Any]:
    """Return the paired difference over requests, and the one over seeds.

    Args:
        pairs: For each seed what counts on the one side and on the other, row by row.
        names: The request of every row, seed after seed.
    """
    a, b = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    by_seed = [float(x.double().mean() - y.double().mean()) for x, y in pairs]
    return {
        "found": paired_rate_difference(a, b, names, torch.Generator().manual_seed(0)),
        "by_seed": by_seed,
        "spread": over_seeds(by_seed),
        "p": sign_flip(a.double(), b.double(), names, torch.Generator().manual_seed(1)),
    }


def over_seeds(values: list[float]) -> tuple[float, float] | None:
    """Return Student's interval of a mean over seeds; None if they do not differ."""
    if len(set(values)) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    middle = sum(values) / len(values)
    return middle - half, middle + half


def shown(found: Estimate) -> str:
    if found.value is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def line(name: str, made: dict[str, Any], p: str) -> str:
    spread = made["spread"]
    seeds = f"[{spread[0]:.3f}, {spread[1]:.3f}]" if spread else "no spread"
    each = ", ".join(f"{value:+.3f}" for value in made["by_seed"])
    return f"| {name} | {shown(made['found'])} | {seeds} | {each} | {p} |"


HEAD = """| contrast | over requests | over seeds | seed by seed | p |
|---|---|---|---|---|"""


def print_contrasts(
    cells: Cells, title: str, pairs: list[tuple[str, str, str]], *, corrected: bool
) -> None:
    """Print contrasts of (first, second, kind), those that have records."""
    pairs = [each for each in pairs if each[0] in cells and each[1] in cells]
    made = [contrast(cells, *each) for each in pairs]
    p_values = [each["p"] for each in made]
    print(f"\n{title}\n\n{HEAD}")
    for (first, second, kind), found, p in zip(
        pairs, made, holm(p_values) if corrected else p_values, strict=True
    ):
        where = "" if kind == TRAINED else f", {kind}"
        print(line(f"{first} − {second}{where}", found, f"{p:.3g}"))


def print_rates(cells: Cells) -> None:
    print("| selector@budget | seeds | " + " | ".join(MEASURES) + " |")
    print("|---" * (len(MEASURES) + 2) + "|")
    for name, seeds in sorted(cells.items()):
        rates = " | ".join(shown(rate(seeds, kind)) for kind in MEASURES)
        print(f"| {name} | {len(seeds)} | {rates} |")


def print_audits(folder: Path) -> None:
    """Print what the audits before and after say."""
    print(
        "\n| audit | attack succeeds | cliff | evidence or reason |\n|---|---|---|---|"
    )
    for path in sorted(folder.glob("audit-*/report.json")):
        verdict = json.loads(path.read_text("utf-8"))["verdict"]
        told = [*verdict["evidence"], *verdict["reasons"].values()]
        about = " ".join(each for each in told if "cliff" in each.lower())
        name = path.parent.name.removeprefix("audit-")
        print(
            f"| {name} | {verdict['attack_succeeds']} | {verdict['cliff']} | {about} |"
        )


def secondary(cells: Cells) -> list[tuple[str, str, str]]:
    """Return cliff against every other selector at each budget."""
    found = []
    for name in sorted(cells):
        selector, _, budget = name.partition("@")
        pair = (f"cliff@{budget}", name)
        if selector != "cliff" and pair[0] in cells and pair not in PRIMARY:
            found.append((*pair, TRAINED))
    return found


def main(name: str) -> None:
    folder = Path(name)
    cells = read(folder)
    print_rates(cells)
    print_contrasts(
        cells,
        "Primary, attack success under the trained wrappers:",
        [(*pair, TRAINED) for pair in PRIMARY],
        corrected=False,
    )
    print_contrasts(
        cells,
        "Against the whole pool:",
        [(f"cliff@{each}", "all@100%", TRAINED) for each in ("1%", "2%")],
        corrected=False,
    )
    print_contrasts(
        cells,
        "What the repair costs (lookalike: refused; benign: complied with):",
        [("cliff@1%", "none@0%", kind) for kind in MEASURES if kind not in ATTACK],
        corrected=False,
    )
    print_contrasts(
        cells, "Others, p-values by Holm's rule:", secondary(cells), corrected=True
    )
    print_audits(folder)
    draw(cells, TRAINED, folder / "repair.svg")


def draw(cells: Cells, kind: str, path: Path) -> None:
    """Draw attack success against the budget, with bands; a rule for all of the pool.

    The bands are over requests; the points are the seeds.
    """
    lines, points = [], []
    for name, seeds in cells.items():
        selector, _, budget = name.partition("@")
        share = float(budget.rstrip("%"))
        if not 0 < share < 100:
            continue
        place = {"selector": selector, "budget": share}
        lines.append(place | rate(seeds, kind)._asdict())
        for record in seeds.values():
            found = hits(record, kind)[0].double().mean()
            points.append(place | {"value": float(found)})
    x = altair.X("budget:Q", title="share of the pool, %").scale(type="log")
    color = altair.Color("selector:N")
    base = altair.Chart(altair.Data(values=lines)).encode(x=x, color=color)
    chart = base.mark_area(opacity=0.15).encode(
        y=altair.Y("low:Q", title="attack success"), y2="high:Q"
    )
    chart += base.mark_line().encode(y="value:Q")
    seeds_drawn = altair.Chart(altair.Data(values=points)).mark_point(size=16)
    chart += seeds_drawn.encode(x=x, y="value:Q", color=color)
    if "all@100%" in cells:
        whole = altair.Data(values=[{"y": rate(cells["all@100%"], kind).value}])
        chart += altair.Chart(whole).mark_rule(strokeDash=[4, 4]).encode(y="y:Q")
    chart.save(str(path))


if __name__ == "__main__":
    main(sys.argv[1])
