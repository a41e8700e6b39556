"""Shares as text: the one rounding that page, terminal and verdicts share."""


def percent(share: int | float) -> str:
    """Write a share in percent, without the sign; only 0 and 1 become 0 and 100.

    `share`: A share from 0 to 1, or a difference of two from -1 to 1.
    Returns: A whole number, with halves away from zero; a tenth below 1 and above 99,
    and `<0.1` or `>99.9` where that would read as none or all.
    """
    if share < 0:
        return f"−{percent(-share)}".replace("−<", ">−").replace("−>", "<−")
    if 0 < share < 0.0005:
        return "<0.1"
    if 0.9995 <= share < 1:
        return ">99.9"
    digits = 1 if 0 < share < 0.01 or 0.99 < share < 1 else 0
    # Halves go up, as readers expect, where Python would go to the even neighbour.
    return f"{100 * share + 1e-9:.{digits}f}"
