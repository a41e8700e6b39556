"""Holdfast finds where a language model's refusal lets go.

The names below are loaded when they are first used, so that `import holdfast` costs
nothing. The steps are those of the command line: each takes a study, its settings, and
a session that holds the model.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.audit.settings import AuditSettings
    from holdfast.audit.stage import compare_studies as compare
    from holdfast.audit.stage import run as audit
    from holdfast.audit.stage import write_report
    from holdfast.cliff.fit import run as probe
    from holdfast.cliff.trace import run as trace
    from holdfast.data.prompts import Prompt
    from holdfast.dynamics.settings import SignalSettings
    from holdfast.dynamics.stage import run as signal
    from holdfast.errors import HoldfastError
    from holdfast.evaluate.settings import EvaluateSettings
    from holdfast.evaluate.stage import run as evaluate
    from holdfast.finetune.settings import FinetuneSettings, Recipe
    from holdfast.finetune.stage import run as finetune
    from holdfast.guard.settings import GuardEvaluateSettings, GuardFitSettings
    from holdfast.guard.stage import evaluate as evaluate_guard
    from holdfast.guard.stage import fit as fit_guard
    from holdfast.heads.ablate import run as ablate
    from holdfast.heads.bake import run as bake
    from holdfast.heads.rank import run as heads
    from holdfast.heads.settings import AblateSettings, BakeSettings, HeadsSettings
    from holdfast.judges.settings import JudgeSettings
    from holdfast.models.loading.causal import adapt, load
    from holdfast.models.model import Adapter
    from holdfast.rollout.session import Session
    from holdfast.rollout.settings import (
        ModelSettings,
        ProbeSettings,
        RolloutSettings,
        TraceSettings,
    )
    from holdfast.rollout.stage import run as rollout
    from holdfast.select.settings import SelectSettings
    from holdfast.select.stage import run as select
    from holdfast.sinks.settings import SinksSettings
    from holdfast.sinks.stage import run as sinks
    from holdfast.study import Study

__version__ = "0.1.0"

__all__ = [
    "AblateSettings",
    "Adapter",
    "AuditSettings",
    "BakeSettings",
    "EvaluateSettings",
    "FinetuneSettings",
    "GuardEvaluateSettings",
    "GuardFitSettings",
    "HeadsSettings",
    "HoldfastError",
    "JudgeSettings",
    "ModelSettings",
    "ProbeSettings",
    "Prompt",
    "Recipe",
    "RolloutSettings",
    "SelectSettings",
    "Session",
    "SignalSettings",
    "SinksSettings",
    "Study",
    "TraceSettings",
    "__version__",
    "ablate",
    "adapt",
    "audit",
    "bake",
    "compare",
    "evaluate",
    "evaluate_guard",
    "finetune",
    "fit_guard",
    "heads",
    "load",
    "probe",
    "rollout",
    "select",
    "signal",
    "sinks",
    "trace",
    "write_report",
]

_HOMES = {
    "AblateSettings": ("holdfast.heads.settings", "AblateSettings"),
    "BakeSettings": ("holdfast.heads.settings", "BakeSettings"),
    "HeadsSettings": ("holdfast.heads.settings", "HeadsSettings"),
    "ablate": ("holdfast.heads.ablate", "run"),
    "bake": ("holdfast.heads.bake", "run"),
    "heads": ("holdfast.heads.rank", "run"),
    "Adapter": ("holdfast.models.model", "Adapter"),
    "AuditSettings": ("holdfast.audit.settings", "AuditSettings"),
    "HoldfastError": ("holdfast.errors", "HoldfastError"),
    "ModelSettings": ("holdfast.rollout.settings", "ModelSettings"),
    "ProbeSettings": ("holdfast.rollout.settings", "ProbeSettings"),
    "Prompt": ("holdfast.data.prompts", "Prompt"),
    "RolloutSettings": ("holdfast.rollout.settings", "RolloutSettings"),
    "Session": ("holdfast.rollout.session", "Session"),
    "Study": ("holdfast.study", "Study"),
    "TraceSettings": ("holdfast.rollout.settings", "TraceSettings"),
    "adapt": ("holdfast.models.loading.causal", "adapt"),
    "audit": ("holdfast.audit.stage", "run"),
    "evaluate": ("holdfast.evaluate.stage", "run"),
    "EvaluateSettings": ("holdfast.evaluate.settings", "EvaluateSettings"),
    "JudgeSettings": ("holdfast.judges.settings", "JudgeSettings"),
    "compare": ("holdfast.audit.stage", "compare_studies"),
    "load": ("holdfast.models.loading.causal", "load"),
    "probe": ("holdfast.cliff.fit", "run"),
    "rollout": ("holdfast.rollout.stage", "run"),
    "trace": ("holdfast.cliff.trace", "run"),
    "FinetuneSettings": ("holdfast.finetune.settings", "FinetuneSettings"),
    "SelectSettings": ("holdfast.select.settings", "SelectSettings"),
    "Recipe": ("holdfast.finetune.settings", "Recipe"),
    "finetune": ("holdfast.finetune.stage", "run"),
    "select": ("holdfast.select.stage", "run"),
    "SinksSettings": ("holdfast.sinks.settings", "SinksSettings"),
    "sinks": ("holdfast.sinks.stage", "run"),
    "write_report": ("holdfast.audit.stage", "write_report"),
    "GuardEvaluateSettings": ("holdfast.guard.settings", "GuardEvaluateSettings"),
    "GuardFitSettings": ("holdfast.guard.settings", "GuardFitSettings"),
    "SignalSettings": ("holdfast.dynamics.settings", "SignalSettings"),
    "evaluate_guard": ("holdfast.guard.stage", "evaluate"),
    "fit_guard": ("holdfast.guard.stage", "fit"),
    "signal": ("holdfast.dynamics.stage", "run"),
}


class _Package(ModuleType):
    """The package: `holdfast.audit` is the verb, also once its folder is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a verb's name for its function; the import system binds folders here."""
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
