"""The defenses by name; each is one function."""

from typing import Final

from holdfast.finetune.defenses.anchors import kl, ldifs
from holdfast.finetune.defenses.base import Build
from holdfast.finetune.defenses.constrained import constrained
from holdfast.finetune.defenses.lisa import lisa
from holdfast.finetune.defenses.plain import none, reference_loss, safeinstr
from holdfast.finetune.defenses.safegrad import safegrad
from holdfast.finetune.defenses.surgery import random_sink, surgery

DEFENSES: Final[dict[str, Build]] = {
    "none": none,
    "safeinstr": safeinstr,
    "reference-loss": reference_loss,
    "kl": kl,
    "lisa": lisa,
    "constrained": constrained,
    "safegrad": safegrad,
    "ldifs": ldifs,
    "surgery": surgery,
    "random-sink": random_sink,
}
