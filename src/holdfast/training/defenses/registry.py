"""The defenses by name; each is one function."""

from typing import Final

from holdfast.training.defenses.constrained import constrained
from holdfast.training.defenses.contract import Build
from holdfast.training.defenses.kl import kl
from holdfast.training.defenses.ldifs import ldifs
from holdfast.training.defenses.lisa import lisa
from holdfast.training.defenses.plain import none, reference_loss, safeinstr
from holdfast.training.defenses.safegrad import safegrad
from holdfast.training.defenses.surgery import random_sink, surgery

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
