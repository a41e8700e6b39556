"""What of a comparison of sink masses goes into the report of its study."""

from typing import Any

from holdfast.study import Study

STAGE = "sinks"
MASSES = "sinks.json"


def is_measured(study: Study) -> bool:
    """Tell whether a study holds a comparison that is done."""
    record = study.record(STAGE)
    return record.get("state") == "done" and study.path(MASSES).exists()


def sink_sources(study: Study) -> list[dict[str, Any]]:
    """Return the records of the texts, as the block `data` wants them."""
    if not is_measured(study):
        return []
    return [
        {
            "role": f"sinks: {name}",
            "source": source["source"],
            "column": None,
            "rows": source["rows"],
            "duplicates": 0,
            "sha256": source["sha256"],
            "notes": [],
        }
        for name, source in study.read_json(MASSES)["sources"].items()
    ]
