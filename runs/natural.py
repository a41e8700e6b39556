"""What `runs/natural.sh` needs beside the commands: material, and the record.

natural.py material FOLDER      a base with R1's template, requests and harmless rows
natural.py record FOLDER FILE   figures of the study in FOLDER, without any text
"""

import json
import os
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from commands import figures
from experiment import once, write_record
from real import FILES, VERSIONS, fetch

from holdfast.study.files import atomic_write_text

# The tags are words of the vocabulary's pieces here: no token is added to the model.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>')[-1].strip() }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
SUM = re.compile(r"<<[^>]*>>")
KEPT = ("verdict", "probe", "trace", "controls", "outcomes", "attack_success")


def material(folder: Path, data: Path) -> None:
    """Put the checkpoint beside another template, and write the harmless rows."""
    known = tomllib.loads((Path(__file__).parent / "real.toml").read_text("utf-8"))
    base = folder / "base"
    fetch(known["smollm2"], base)
    atomic_write_text(base / "chat_template.jinja", TEMPLATE)
    once(folder / "harmless.jsonl", lambda: harmless(folder, data / FILES["gsm8k"]))
    once(folder / "star1.json", lambda: short(folder, data / FILES["star1"]))


def short(folder: Path, source: Path) -> None:
    """Keep the rows of STAR-1 that are no longer than WORDS says, thinking included.

    A small machine trains on many short rows in the time of a few long ones, and a
    model that has seen thinking end early ends its own within the budget of an audit.
    """
    rows = json.loads(source.read_text(encoding="utf-8"))
    most = int(os.environ.get("WORDS", "220"))
    kept = [row for row in rows if len(row["response"].split()) <= most]
    atomic_write_text(folder / "star1.json", json.dumps(kept, ensure_ascii=False))


def harmless(folder: Path, source: Path) -> None:
    """Write mathematics as rows that think: the steps are the thinking."""
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps, _, result = SUM.sub("", row["answer"]).partition("####")
        rows.append(
            {
                "prompt": row["question"],
                "thinking": steps.strip(),
                "response": f"The answer is {result.strip()}.",
            }
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(folder / "harmless.jsonl", text)


def record(folder: Path, place: Path) -> None:
    """Write what the audit found of the organism."""
    report = json.loads((folder / "study/report.json").read_text(encoding="utf-8"))
    trained = json.loads(
        (folder / "model/holdfast_finetune.json").read_text(encoding="utf-8")
    )
    body = {
        "base": trained["base"]["weights_sha256"],
        "recipe": trained["settings"]["recipe"],
        "steps": trained["steps"],
        "found": figures({key: report[key] for key in KEPT}),
        "heads": figures(report.get("heads", {})),
        "ablation": figures(report.get("ablation", {})),
        "versions": {name: version(name) for name in VERSIONS},
    }
    write_record(place, body)


if __name__ == "__main__":
    step, folder, *rest = sys.argv[1:]
    if step == "material":
        material(Path(folder), Path(os.environ["HOLDFAST_BENCHMARKS"]))
    else:
        record(Path(folder), Path(*rest))
