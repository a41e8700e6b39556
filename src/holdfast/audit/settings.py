"""The settings of `holdfast audit`; this module loads no tensors."""

from dataclasses import dataclass, field

from holdfast.errors import SettingsError
from holdfast.heads.settings import AblateSettings, HeadsSettings
from holdfast.judges.settings import BY_RULES, JudgeSettings
from holdfast.rollout.settings import (
    ProbeSettings,
    RolloutSettings,
    TraceSettings,
)


@dataclass(frozen=True)
class AuditSettings:
    """The settings of every stage of an audit."""

    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    trace: TraceSettings = field(default_factory=TraceSettings)
    heads: HeadsSettings = field(default_factory=HeadsSettings)
    ablate: AblateSettings = field(default_factory=AblateSettings)
    with_heads: bool = True
    judge: JudgeSettings = BY_RULES

    def __post_init__(self) -> None:
        """Refuse so few prompts that no answer could suffice for the probe."""
        from holdfast.data.splits import MINIMUM_TEST_ROWS

        asked, folds = self.rollout, self.probe.folds
        if asked.write_batch is not None:
            raise SettingsError(
                "--write-batch of `holdfast rollout`, which ends there",
                "one of an audit",
                "Write it with `holdfast rollout`, then give its results to the audit "
                "with --import.",
            )
        least = -(-MINIMUM_TEST_ROWS // asked.samples) + folds
        if asked.imported is None and asked.limit is not None and asked.limit < least:
            raise SettingsError(
                f"--limit of {least} or more for an audit, and better twice as many: "
                f"the probe is tested on {MINIMUM_TEST_ROWS} answers of each kind, "
                f"and fitted on {folds} other requests or more (--folds)",
                str(asked.limit),
                "Raise --limit, or for outcomes alone run `holdfast rollout` and then "
                "`holdfast report`.",
            )
