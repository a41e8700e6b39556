"""The commitment curve: what is answered where a thinking is cut short."""

from typing import Any

from holdfast.cliff.commitment.opened import Opened, file_of

KEY = "curve"


def run(opened: Opened) -> dict[str, Any]:
    """Draw answers from every cut of every answer; writes `decide_curve.json`."""
    settings = opened.settings
    with opened.stage(KEY, {"draws": settings.draws}) as stage:
        if stage.is_done:
            return stage.read_json(file_of(KEY))
        return stage.write_json(file_of(KEY), {})
