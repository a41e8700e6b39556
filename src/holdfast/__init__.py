"""Holdfast finds where a language model's refusal lets go.

The names below are loaded when they are first used, so that `import holdfast` costs
nothing. The steps are those of the command line: each takes a study, its settings, and
a session that holds the model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.data.prompts import Prompt
    from holdfast.errors import HoldfastError
    from holdfast.models.adapter import adapt, load
    from holdfast.models.parts import Adapter
    from holdfast.session.context import Session
    from holdfast.session.evaluating import EvaluateSettings, JudgeFlags
    from holdfast.session.finetune_settings import FinetuneSettings
    from holdfast.session.head_settings import (
        AblateSettings,
        BakeSettings,
        HeadsSettings,
    )
    from holdfast.session.select_settings import SelectSettings
    from holdfast.session.settings import (
        AuditSettings,
        ModelSettings,
        ProbeSettings,
        RolloutSettings,
        TraceSettings,
    )
    from holdfast.session.signal_settings import (
        GuardEvaluateSettings,
        GuardFitSettings,
        SignalSettings,
    )
    from holdfast.session.sink_settings import SinksSettings
    from holdfast.stages.ablate import run as ablate
    from holdfast.stages.audit import run as audit
    from holdfast.stages.bake import run as bake
    from holdfast.stages.compare import run as compare
    from holdfast.stages.evaluate import run as evaluate
    from holdfast.stages.finetune import run as finetune
    from holdfast.stages.guard import evaluate as evaluate_guard
    from holdfast.stages.guard import fit as fit_guard
    from holdfast.stages.heads import run as heads
    from holdfast.stages.probe import run as probe
    from holdfast.stages.report import run as write_report
    from holdfast.stages.rollout import run as rollout
    from holdfast.stages.select import run as select
    from holdfast.stages.signal import run as signal
    from holdfast.stages.sinks import run as sinks
    from holdfast.stages.trace import run as trace
    from holdfast.study import Study
    from holdfast.training.recipe import Recipe

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
    "JudgeFlags",
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
    "AblateSettings": ("holdfast.session.head_settings", "AblateSettings"),
    "BakeSettings": ("holdfast.session.head_settings", "BakeSettings"),
    "HeadsSettings": ("holdfast.session.head_settings", "HeadsSettings"),
    "ablate": ("holdfast.stages.ablate", "run"),
    "bake": ("holdfast.stages.bake", "run"),
    "heads": ("holdfast.stages.heads", "run"),
    "Adapter": ("holdfast.models.parts", "Adapter"),
    "AuditSettings": ("holdfast.session.settings", "AuditSettings"),
    "HoldfastError": ("holdfast.errors", "HoldfastError"),
    "ModelSettings": ("holdfast.session.settings", "ModelSettings"),
    "ProbeSettings": ("holdfast.session.settings", "ProbeSettings"),
    "Prompt": ("holdfast.data.prompts", "Prompt"),
    "RolloutSettings": ("holdfast.session.settings", "RolloutSettings"),
    "Session": ("holdfast.session.context", "Session"),
    "Study": ("holdfast.study", "Study"),
    "TraceSettings": ("holdfast.session.settings", "TraceSettings"),
    "adapt": ("holdfast.models.adapter", "adapt"),
    "audit": ("holdfast.stages.audit", "run"),
    "evaluate": ("holdfast.stages.evaluate", "run"),
    "EvaluateSettings": ("holdfast.session.evaluating", "EvaluateSettings"),
    "JudgeFlags": ("holdfast.session.evaluating", "JudgeFlags"),
    "compare": ("holdfast.stages.compare", "run"),
    "load": ("holdfast.models.adapter", "load"),
    "probe": ("holdfast.stages.probe", "run"),
    "rollout": ("holdfast.stages.rollout", "run"),
    "trace": ("holdfast.stages.trace", "run"),
    "FinetuneSettings": ("holdfast.session.finetune_settings", "FinetuneSettings"),
    "SelectSettings": ("holdfast.session.select_settings", "SelectSettings"),
    "Recipe": ("holdfast.training.recipe", "Recipe"),
    "finetune": ("holdfast.stages.finetune", "run"),
    "select": ("holdfast.stages.select", "run"),
    "SinksSettings": ("holdfast.session.sink_settings", "SinksSettings"),
    "sinks": ("holdfast.stages.sinks", "run"),
    "write_report": ("holdfast.stages.report", "run"),
    "GuardEvaluateSettings": (
        "holdfast.session.signal_settings",
        "GuardEvaluateSettings",
    ),
    "GuardFitSettings": ("holdfast.session.signal_settings", "GuardFitSettings"),
    "SignalSettings": ("holdfast.session.signal_settings", "SignalSettings"),
    "evaluate_guard": ("holdfast.stages.guard", "evaluate"),
    "fit_guard": ("holdfast.stages.guard", "fit"),
    "signal": ("holdfast.stages.signal", "run"),
}


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
