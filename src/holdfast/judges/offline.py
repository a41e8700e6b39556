"""The rules judge under the contract of all judges."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from holdfast.judges import degenerate, language, phrases, reading, rules, tone
from holdfast.judges.contract import Exchange, JudgeIdentity
from holdfast.judges.verdict import Verdict


class RulesJudge:
    """Written rules that tell refusal from help; offline, and no judge of harm."""

    @cached_property
    def identity(self) -> JudgeIdentity:
        """The rules, by the hash of the code that states them."""
        digest = hashlib.sha256()
        for module in (rules, degenerate, language, phrases, reading, tone):
            digest.update(Path(str(module.__file__)).read_bytes())
        name, _, version = rules.JUDGE_ID.partition("-")
        return JudgeIdentity(name, version, "refusal", digest.hexdigest())

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict for each exchange, in order."""
        return [
            rules.judge(
                each.request,
                each.response,
                thinking=each.thinking,
                closed=each.closed,
                finish=each.finish,
            )
            for each in exchanges
        ]
