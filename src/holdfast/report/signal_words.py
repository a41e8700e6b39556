"""What the step-wise signal and its detectors are called, in words."""

from typing import Any

from holdfast.report import text

GROUPS = {
    "benign_complied": "harmless, complied",
    "benign_refused": "harmless, refused",
    "attack_complied": "harmful, complied",
    "attack_refused": "harmful, refused",
}

FIGURES = {
    "last_step_auroc": "Last step: harmless compliance against refusal (AUROC)",
    "matched_last_step_auroc": "The same with matched anchors",
    "matched_last_step_difference": "Matched less published",
    "lookalike_auroc": "Harmless that sounds dangerous against refusal (AUROC)",
    "matched_lookalike_auroc": "That with matched anchors",
    "matched_lookalike_difference": "There, matched less published",
}

FEATURES = {
    "recovered_below_0.5": "ends below 0.5, of those that complied",
    "recovered_below_0.3": "ends below 0.3, likewise",
    "recovered_below_0.1": "ends below 0.1, likewise",
    "incomplete_recovery": "falls below 0.5 and comes back",
    "dip": "dip below 0.5",
    "rebound": "rebound from the least",
    "variation": "sum of changes",
    "crossings": "crossings of 0.5",
    "below": "share of steps below 0.5",
    "matched_minus_published": "matched less published anchors",
}

DETECTORS = {
    "autoencoder": "autoencoder (published)",
    "autoencoder_streaming": "autoencoder, trained on prefixes",
    "residual": "distance from the benign plane (PCA)",
    "mahalanobis": "Mahalanobis distance",
    "mahalanobis_logit": "Mahalanobis distance, log-odds",
    "features": "dip and rebound features",
    "dip": "deepest dip",
    "rebound": "rebound",
    "probe_mean": "refusal probe, mean over steps",
    "logit_difference": "first word: refusal less compliance",
    "perplexity": "perplexity of the prompt",
    "text": "refusal in the text so far",
}


def recommendation(found: dict[str, Any] | Any) -> str:
    """Return the sentence that says which detector to use, and how it did elsewhere.

    Args:
        found: What `guard/evaluation.json` holds.
    """
    best = found["recommended"]
    if best["detector"] is None:
        return f"No detector can be recommended: {best['reason']}."
    name = DETECTORS.get(best["detector"], best["detector"])
    chosen = ", ".join(found["chosen_on"])
    elsewhere = next(
        (row for row in found["reported"] if row["detector"] == best["detector"]), None
    )
    said = f"Chosen on {chosen}: {name} (AUROC {text.score(best['auroc'])}"
    if elsewhere is None or elsewhere["auroc"]["value"] is None:
        return f"{said}). There is no other family to report it on."
    return f"{said}; on other families {text.score(elsewhere['auroc'])})."


def limits(block: dict[str, Any] | Any) -> list[str]:
    """Return what a reader of the signal has to know.

    Args:
        block: The block `signal` of a report.
    """
    said = [
        "The signal says which anchor a state is nearer to, not that it is near: a "
        "state far from both can read 0 or 1.",
        f"It covers the first {block['identity']['steps']} steps of the "
        f"{block['identity']['region']}; what comes later is out of view."
        if block["identity"]["time"] == "step"
        else "A step is a share of the response; responses of other lengths are "
        "other numbers of tokens.",
    ]
    if block["matched_reason"]:
        said.append(
            "There are no anchors of the same topics and lengths, so that the signal "
            f"may read topics ({block['matched_reason']})."
        )
    if block["not_read"]:
        said.append(
            f"{block['not_read']} answers are in no group, since the judge could read "
            "neither a refusal nor help in them."
        )
    return [*said, *block["missing_channels"]]
