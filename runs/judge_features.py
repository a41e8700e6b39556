"""Whether a small model of features beats the written rules on a family it never saw.

Usage: judge_features.py [RECORD]

XSTest's human labels on the files `gpt4` and `llama2new` alone: the model is fitted to
the answers of one family and judges those of the other. `requests` leaves out of the
fit what is asked in the fold that is judged; without it both families answer the same
requests. The strength of the penalty is chosen inside the fitted family, by folds of
requests. HOLDFAST_BENCHMARKS names the folder of the files.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler

from holdfast.data.prompts import content_hash
from holdfast.evaluate.calibrate import Labelled, read_labels
from holdfast.judges.rules import rules
from holdfast.judges.rules.phrases import KINDS
from holdfast.stats.agreement import kappa
from holdfast.stats.bootstrap import Estimate, bootstrap
from holdfast.study.figures import generator

FAMILIES = ("gpt4", "llama2new")
OPENING = 400
STRENGTHS = {"logisticregression__C": [0.01, 0.1, 1.0, 10.0, 100.0]}
FOLDS = 5
PATTERNS = {
    **{kind.name: kind.pattern for kind in KINDS},
    "hands over": rules._HAND_OVER,
    "offers": rules._OFFER,
    "elsewhere": rules._ELSEWHERE,
    "late": rules._LATE,
    "fiction": rules._NO_SUCH_THING,
    "tips": rules._TIPS,
    "away": rules._AWAY,
}


PARTS: dict[str, Callable[[Labelled, dict[str, list[Labelled]]], bool]] = {
    "gpt4": lambda row, families: row in families["gpt4"],
    "llama2new": lambda row, families: row in families["llama2new"],
    "both": lambda row, families: True,
    # No rule was chosen on the prompts with an odd hash.
    "both, odd half": lambda row, families: int(content_hash(row.request), 16) % 2 == 1,
}


class Compared(NamedTuple):
    """One kind of features beside the rules, on the same rows."""

    features: Estimate
    rules: Estimate
    difference: Estimate


def openings(rows: list[Labelled]) -> list[str]:
    return [row.response.strip()[:OPENING].replace("’", "'") for row in rows]


@cache
def signs_of(row: Labelled) -> dict[str, float]:
    """What the rules see and count, and the plainest lengths: some thirty numbers."""
    verdict = rules.judge(row.request, row.response)
    words = row.response.casefold().replace("’", "'").split()
    text = " ".join(words)
    found = {
        f"outcome={verdict.outcome}": 1.0,
        f"reason={verdict.reason.split('(')[0][:20]}": 1.0,
        "log words": float(np.log1p(len(words))),
        "lines": float(np.log1p(row.response.count("\n"))),
        "list items": float(np.log1p(len(rules._LIST_ITEM.findall(row.response)))),
    }
    for name, pattern in PATTERNS.items():
        first = pattern.search(text)
        found[f"{name}: count"] = float(np.log1p(len(pattern.findall(text))))
        found[f"{name}: early"] = float(first is not None and first.start() < 100)
    return found


def signs(rows: list[Labelled]) -> list[dict[str, float]]:
    return [signs_of(row) for row in rows]


def text_features(analyzer: str, n: tuple[int, int]) -> Pipeline:
    return make_pipeline(
        FunctionTransformer(openings),
        TfidfVectorizer(analyzer=analyzer, ngram_range=n, min_df=2, sublinear_tf=True),
    )


def sign_features() -> Pipeline:
    return make_pipeline(FunctionTransformer(signs), DictVectorizer(), MaxAbsScaler())


def kinds() -> dict[str, Any]:
    words, letters = text_features("word", (1, 2)), text_features("char_wb", (2, 5))
    return {
        "words": words,
        "letters": letters,
        "signs of the rules": sign_features(),
        "signs and words": FeatureUnion(
            [("signs", sign_features()), ("words", text_features("word", (1, 2)))]
        ),
    }


def refused(rows: list[Labelled]) -> np.ndarray:
    return np.array([row.label == "refused" for row in rows])


def predict(kind: Any, fit: list[Labelled], on: list[Labelled]) -> np.ndarray:
    search = GridSearchCV(
        make_pipeline(kind, LogisticRegression(max_iter=2000)),
        STRENGTHS,
        scoring=lambda model, x, y: cohen_kappa_score(y, model.predict(x)),
        cv=GroupKFold(FOLDS),
    )
    search.fit(fit, refused(fit), groups=[row.request for row in fit])
    return np.asarray(search.predict(on))


def across(
    name: str, families: dict[str, list[Labelled]], requests: bool
) -> tuple[list[Labelled], np.ndarray]:
    """Judge each family by a model of the other, with or without shared requests."""
    rows: list[Labelled] = []
    said: list[np.ndarray] = []
    asked = sorted({row.request for each in families.values() for row in each})
    fold = {request: place % FOLDS for place, request in enumerate(asked)}
    for one, other in (FAMILIES, FAMILIES[::-1]):
        for number in range(FOLDS if requests else 1):
            fit = families[one]
            on = families[other]
            if requests:
                fit = [row for row in fit if fold[row.request] != number]
                on = [row for row in on if fold[row.request] == number]
            rows += on
            said.append(predict(kinds()[name], fit, on))
    return rows, np.concatenate(said)


def compare(rows: list[Labelled], said: np.ndarray, name: str) -> Compared:
    people = [str(each) for each in refused(rows)]
    model = [str(bool(each)) for each in said]
    ruled = [str(rules.judge(r.request, r.response).outcome == "refused") for r in rows]
    clusters = [row.request for row in rows]
    table = torch.tensor(
        [[p == "True" for p in each] for each in (people, model, ruled)]
    ).double()

    def gain(weights: torch.Tensor) -> torch.Tensor:
        total = weights.sum(1)

        def one(column: torch.Tensor) -> torch.Tensor:
            seen = weights @ (column == table[0]).double() / total
            a, b = weights @ column / total, weights @ table[0] / total
            chance = a * b + (1 - a) * (1 - b)
            return (seen - chance) / (1 - chance)

        return one(table[1]) - one(table[2])

    return Compared(
        kappa(people, model, clusters, generator(0, f"{name}/features")),
        kappa(people, ruled, clusters, generator(0, f"{name}/rules")),
        bootstrap(gain, clusters, generator(0, f"{name}/difference")),
    )


def main(record: str | None = None) -> None:
    folder = Path(os.environ["HOLDFAST_BENCHMARKS"], "xstest_human_labels")
    families = {
        name: list(read_labels(str(folder / f"xstest_v2_completions_{name}.csv")).rows)
        for name in FAMILIES
    }
    found: dict[str, Any] = {}
    # Letters take five times as long on new requests, and find nothing on known ones.
    tried = [(False, name) for name in kinds()]
    tried += [(True, name) for name in kinds() if name != "letters"]
    for requests, name in tried:
        judged, said = across(name, families, requests)
        for part, belongs in PARTS.items():
            kept = [i for i, row in enumerate(judged) if belongs(row, families)]
            title = f"{name}, {'new' if requests else 'same'} requests, {part}"
            result = compare([judged[i] for i in kept], said[kept], title)
            found[title] = result._asdict()
            print(
                f"{title}: "
                + "; ".join(
                    f"{key} {each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"
                    for key, each in result._asdict().items()
                ),
                flush=True,
            )
    if record:
        Path(record).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
