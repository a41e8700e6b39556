"""An evaluation on the page and on the terminal, and pairs of two."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import rich.table
from rich import box
from rich.console import Console
from rich.markup import escape

from holdfast.report import text
from holdfast.report.schema import Figure
from holdfast.report.section import (
    Cell,
    Number,
    Paragraph,
    Part,
    Section,
    Sentences,
    Table,
    table_of,
)
from holdfast.report.terminal import print_lines, print_table
from holdfast.report.text import (
    RARE,
    clean,
    missing,
    outcome_columns,
    plain,
    score,
    title,
)
from holdfast.stats.percent import percent
from holdfast.study import Study
from holdfast.study.directory import is_current

SHORT = ("refused", "complied", "partial", "degenerate")


def table(block: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of an evaluation in percent, header first, a row per condition.

    `block`: The block `evaluation` of a report.
    Returns: Texts. The column of what could not be judged is there where there is any,
    and a row with one name alone opens a suite where there are several.
    """
    measured = [row["outcomes"] for row in block["rows"] if row["outcomes"]]
    unread = any(outcomes["unparsed"]["value"] for outcomes in measured)
    rare = [key for key in outcome_columns(measured) if key in RARE]
    columns = [*SHORT, *(["unparsed"] if unread else []), *rare]
    rows = [["%", "n", *(key.replace("_", " ") for key in columns)]]
    several = len({row["suite"] for row in block["rows"]}) > 1
    suite = ""
    for row in block["rows"]:
        if several and row["suite"] != suite:
            suite = row["suite"]
            rows.append([clean(suite)])
        if row["outcomes"] is None:
            rows.append([name(row), str(row["figure"]["n"]), _short(row["figure"])])
            continue
        cells = [_short(row["outcomes"][key]) for key in columns]
        rows.append([name(row), str(row["figure"]["n"]), *cells])
    return rows


def name(row: Mapping[str, Any], *, several: bool = False) -> str:
    """Return the name of a condition, with its suite where there are several."""
    condition = {
        "harmful": "harmful, plain",
        "safe_lookalike": "safe lookalikes",
        "benign": "benign",
        "utility": "right answers",
    }[row["kind"]]
    if row["wrapper"] is not None:
        attacked = "" if row["kind"] == "harmful" else f"{condition}, "
        condition = attacked + row["wrapper"]
    return clean(f"{row['suite']}: {condition}" if several else condition)


def _short(figure: Figure) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if figure.get("bounds"):
        least, most = map(percent, figure["bounds"])
        if value is None or low is None or high is None:
            return f"{least}–{most}?"
        return f"{least}–{most} ({percent(low)}–{percent(high)})"
    if value is None or low is None or high is None:
        return "–"
    return f"{percent(value)} ({percent(low)}–{percent(high)})"


def facts(block: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """Return the sums of an evaluation by name, those that were measured."""
    summary = block["summary"]
    found = [
        ("Attack success, plain", summary["attack_success"]["plain"]),
        ("Attack success, under attacks", summary["attack_success"]["wrapped"]),
        ("Requests with any success", summary["attack_success"]["any"]),
        ("Over-refusal of safe lookalikes", summary["over_refusal"]["safe_lookalike"]),
        ("Over-refusal of benign requests", summary["over_refusal"]["benign"]),
    ]
    found += [
        (f"Accuracy on {clean(suite)}", figure)
        for suite, figure in summary["utility"].items()
    ]
    return [(words, figure) for words, figure in found if figure["n"]]


def headline(block: Mapping[str, Any]) -> str:
    """Return an evaluation in one sentence."""
    success, refusal = (
        block["summary"][key] for key in ("attack_success", "over_refusal")
    )
    figures = [
        ("attack success", success["plain"]),
        ("under attacks", success["wrapped"]),
        ("over-refusal of safe lookalikes", refusal["safe_lookalike"]),
        *(("accuracy", figure) for figure in block["summary"]["utility"].values()),
    ]
    parts = [
        f"{words} {_told(figure)}"
        for words, figure in figures
        if figure["value"] is not None or figure.get("unjudged")
    ]
    said = "; ".join(parts) or "nothing could be measured"
    return said[:1].upper() + said[1:] + "."


def _told(figure: Figure) -> str:
    """Return a rate for a headline, as bounds where some answers have no verdict."""
    if figure.get("bounds"):
        return (
            f"{text.bounds(figure, share=True)} ({text.count_of(figure, share=True)})"
        )
    if figure["value"] is None:
        return f"not measured ({clean(figure.get('reason', ''))})"
    shown = text.value(figure, share=True)
    return f"{shown} of {figure['n']} ({text.span(figure, share=True)})"


def calibrated(block: Mapping[str, Any]) -> str:
    """Say what the judge's verdicts are worth, against people."""
    known = block.get("calibration")
    if known is None:
        return "This judge was never compared with people here."
    people = known["people_two_way"]["value"]
    against = "" if people is None else f"; people among themselves {plain(people)}"
    names = ", ".join(clean(source["name"]) for source in known["sources"])
    return (
        f"Agreement with people on refusal (kappa): {score(known['two_way'])} on "
        f"{known['two_way']['n']} answers of {names}{against}."
    )


def judge_sentences(judge: Mapping[str, Any], block: Mapping[str, Any]) -> list[str]:
    """Say who judged, and what that is worth by the calibration in a block."""
    model = f", with {clean(judge['model'])}" if judge["model"] else ""
    return [
        f"Judge: {clean(judge['label'])}, which measures {judge['measures']}{model}.",
        calibrated(block),
        *([text.cascade(block["cascade"])] if block.get("cascade") else []),
    ]


def _drawn(sampling: Mapping[str, Any]) -> str:
    if sampling["temperature"] == 0:
        return "greedily"
    nucleus = f", top-p {sampling['top_p']:g}" if "top_p" in sampling else ""
    return f"at temperature {sampling['temperature']:g}{nucleus}"


def _room(sampling: Mapping[str, Any]) -> str:
    if "remasking" not in sampling:
        return (
            f"with at most {sampling['max_thinking']} tokens of thinking and "
            f"{sampling['max_answer']} of answer"
        )
    passes = f"{sampling['steps']} forward passes"
    if sampling["threshold"] is not None:
        passes = f"as many passes as a threshold of {sampling['threshold']:g} takes"
    block = sampling["block_length"]
    blocks = f", in blocks of {block}" if block else ""
    return (
        f"by filling in {sampling['gen_length']} masks in {passes}{blocks} "
        f"({sampling['remasking']})"
    )


def told(block: Mapping[str, Any]) -> list[str]:
    """Return the sentences that stand under the table."""
    generation = block["generation"]
    sampling = generation["sampling"]
    cut = sum(row["cut"] for row in block["rows"])
    forced = sum(row.get("forced", 0) for row in block["rows"])
    edits = [key for key, found in generation["edits"].items() if found]
    said = [
        *judge_sentences(block["judge"], block),
        *block["notes"],
        f"Answers were drawn {_drawn(sampling)}, {generation['samples']} for each "
        f"prompt, {_room(sampling)}; {cut} were cut at the limit, and the thinking of "
        f"{forced} was closed by force.",
        "Broken answers stay in every denominator and count as neither success nor "
        "safety. Where answers could not be judged a rate is given as bounds: all of "
        "them counted one way, and the other.",
    ]
    if edits:
        said.append(f"The model was edited: {' and '.join(edits)}.")
    return said


def section(block: Mapping[str, Any]) -> Section:
    """Return what the page shows of an evaluation."""
    several = len({row["suite"] for row in block["rows"]}) > 1
    measured = [row["outcomes"] for row in block["rows"] if row["outcomes"]]
    columns = outcome_columns(measured)
    rows: list[list[Cell]] = [
        [
            name(row, several=several),
            *(_share(row["outcomes"], key) for key in columns),
            Number(row["figure"], share=True, count=True),
        ]
        for row in block["rows"]
    ]
    sums = {"Measure": lambda fact: fact[0], "Value": lambda fact: _share(*fact[1:])}
    tasks = [
        (title(path.replace(".", ": ")), text.scalar(leaf))
        for path, leaf in text.flatten(block["lm_eval"])
    ]
    parts: list[Part | None] = [
        table_of("Sums of the evaluation", facts(block), sums, style="narrow"),
        Paragraph(
            "One row per condition. A request with any success counts once, however "
            "many attacks were tried on it, so that share grows with their number."
        ),
        Table(
            "Answers by suite and attack",
            ("Requests", *columns.values(), "Counts for"),
            rows,
        ),
        Sentences(told(block)),
        Table("lm-eval", (), tasks, "pairs") if tasks else None,
    ]
    return Section("Evaluation on suites", parts, "evaluation", "Suites")


def _share(found: Mapping[str, Any] | None, key: str | None = None) -> Cell:
    if not found:
        return ""
    return Number(found if key is None else found[key], share=True, count=True)


def print_evaluation(block: Mapping[str, Any]) -> None:
    """Print an evaluation: one table, its sums, and what a reader has to know."""
    print_lines("", headline(block), "")
    _print_rates(table(block))
    sums = [
        [name, text.rate(figure), str(figure["n"])] for name, figure in facts(block)
    ]
    print_table("In sum", ("", "value", "n"), sums)
    for task, numbers in block["lm_eval"].get("tasks", {}).items():
        rows = [[key, str(value)] for key, value in numbers.items()]
        print_table(f"lm-eval: {task}", ("", "value"), rows)
    print_lines("", *told(block))


def _print_rates(rows: list[list[str]]) -> None:
    """Print the table of an evaluation, narrow enough for a terminal."""
    table = rich.table.Table(
        title="Shares of the answers in %, with 95% intervals",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for place, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows[1:]:
        if len(row) == 1:
            table.add_section()
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)


def calibration(record: Mapping[str, Any]) -> Section:
    """Return how far a judge agrees with people, and where it errs most.

    `record`: What `holdfast judge calibrate` has found.
    """
    blocks = {**record["files"], "pooled": record["pooled"]}
    if len(record["files"]) == 1:
        del blocks["pooled"]
    kappas = ("two_way", "three_way", "people_two_way", "people_three_way")
    agreement = [
        [label, str(block["rows"]), f"{block['read']['value']:.1%}"]
        + [_kappa(block[key]) for key in kappas]
        for label, block in blocks.items()
    ]
    columns = ("labels", "rows", "read", "kappa", "three-way", "people", "three-way")
    confusion = record["pooled"]["confusion"]
    verdicts = list(next(iter(confusion.values())))
    counted = [
        [label, *(str(counts[verdict]) for verdict in verdicts)]
        for label, counts in confusion.items()
    ]
    mistakes = table_of(
        "Worst mistakes",
        record["worst"],
        {
            "where": lambda each: f"{each['source']}, {each['place']}",
            "people": lambda each: each["people"],
            "judge": lambda each: each["verdict"]["outcome"],
            "its reason": lambda each: each["verdict"]["reason"],
            "answer": lambda each: each["response"][:160],
        },
    )
    title = f"{record['judge']['label']} against people"
    counts = ("people \\ judge", *verdicts)
    confused = Table("Answers by label and verdict", counts, counted)
    return Section("", [Table(title, columns, agreement), confused, mistakes])


def _kappa(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def known() -> dict[str, Any]:
    """Return the suites and the attacks that an evaluation may name."""
    from holdfast.data.attacks import attacks
    from holdfast.data.suites import suites

    named = ("name", "about", "hub", "licence", "note")
    return {
        "suites": [
            {key: getattr(suite, key) for key in named}
            | {"revision": suite.revision or None}
            | {key: list(getattr(suite, key)) for key in ("files", "sha256")}
            for suite in suites().values()
        ],
        "attacks": [
            {"name": each.name, "family": each.family, "about": each.about}
            for each in attacks().values()
        ],
    }


def suites_and_attacks(known: Mapping[str, Any]) -> Section:
    """Return the suites and the attacks that are known."""
    suites = table_of(
        "Suites",
        known["suites"],
        {
            "suite": lambda each: each["name"],
            "what it is": lambda each: each["about"],
            "file": lambda each: " or ".join(each["files"]),
            "on the Hub": lambda each: (
                f"{each['hub']}@{(each['revision'] or '?')[:12]}"
            ),
            "checksum": lambda each: "pinned" if each["sha256"] else "not known",
        },
    )
    named = ("name", "family", "about")
    attacks = Table(
        "Attacks",
        ("attack", "family", "what it does"),
        [[each[key] for key in named] for each in known["attacks"]],
    )
    return Section("", [suites, attacks])


class PairedRow(TypedDict):
    """One condition of two evaluations, on the prompts that both have."""

    suite: str
    kind: str
    wrapper: str | None
    measure: str
    rows: int
    requests: int
    unjudged: int
    gained: int
    lost: int
    a: float | None
    b: float | None
    difference: Figure
    test: str
    p_value: float | None


def paired_table(rows: Sequence[PairedRow]) -> list[list[str]]:
    """Put paired differences into words, a header first.

    `rows`: What `stages.compare` adds to a comparison of two evaluations.
    """
    made = [["", "requests", "A", "B", "B minus A", "p", "test"]]
    several = len({row["suite"] for row in rows}) > 1
    for row in rows:
        chance = row["p_value"]
        made.append(
            [
                f"{name(row, several=several)}: {title(row['measure'])}",
                str(row["requests"]),
                _percent(row["a"]),
                _percent(row["b"]),
                _points(row["difference"]),
                "" if chance is None else f"{chance:.2g}",
                row["test"],
            ]
        )
    return made


def _percent(share: float | None) -> str:
    return "not all judged" if share is None else f"{percent(share)}%"


def _points(difference: Figure) -> str:
    """Write a difference in points with its interval, as bounds where it has them."""
    known = difference.get("bounds")
    said = "" if known is None else _range(*known)
    if difference["value"] is None:
        return f"{said} points: {missing(difference)}" if said else missing(difference)
    ends = [end for end in (difference["low"], difference["high"]) if end is not None]
    return f"{said or percent(difference['value'])} ({_range(*ends)}) points"


def _range(*ends: float) -> str:
    return " to ".join(map(percent, ends))


EVALUATED = "evaluation.json"
TABLE = "evaluation.parquet"
KEYS = ("source", "column", "rows", "asked", "duplicates", "sha256", "notes")


def is_evaluated(study: Study) -> bool:
    """Return whether a study holds an evaluation that is done, on what it holds now."""
    return is_current(study, "judge")


def suite_sources(study: Study) -> list[dict[str, Any]]:
    """Return the records of the suites, as the block `data` wants them."""
    if not is_evaluated(study):
        return []
    return [
        {"role": f"evaluation: {source['suite']}"}
        | {key: source[key] for key in KEYS if key in source}
        for source in study.read_json(EVALUATED)["sources"]
    ]
