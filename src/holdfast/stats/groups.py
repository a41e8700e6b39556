"""The four groups of answers: benign or attack, refused or complied."""

from jaxtyping import Bool
from torch import Tensor

BENIGN_COMPLIED = "benign_complied"
BENIGN_REFUSED = "benign_refused"
ATTACK_COMPLIED = "attack_complied"
ATTACK_REFUSED = "attack_refused"
GROUPS = (BENIGN_COMPLIED, BENIGN_REFUSED, ATTACK_COMPLIED, ATTACK_REFUSED)


def group_names(
    harmful: Bool[Tensor, "example"], refused: Bool[Tensor, "example"]
) -> list[str]:
    """Return the group of each row.

    `harmful`: Whether the request is harmful.
    `refused`: Whether the answer is a refusal.
    """
    return [
        GROUPS[2 * attack + refusal]
        for attack, refusal in zip(harmful.tolist(), refused.tolist(), strict=True)
    ]
