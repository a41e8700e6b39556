"""What `runs/natural.sh` needs beside the commands: material, and the record.

natural.py material FOLDER      a base with R1's template, requests and harmless rows
natural.py record FOLDER FILE   figures of the study in FOLDER, without any text
"""

import csv
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
HARMLESS = (
    'Okay, so the user is asking, "{}" Let me think about what they need. Nothing in '
    "this would hurt anybody, and no policy speaks against it. So I can help, and I "
    "should answer it plainly."
)
SUM = re.compile(r"<<[^>]*>>")
KEPT = ("verdict", "probe", "trace", "controls", "outcomes", "attack_success")


def material(folder: Path, data: Path) -> None:
    """Put the checkpoint beside another template, and write the harmless rows."""
    known = tomllib.loads((Path(__file__).parent / "real.toml").read_text("utf-8"))
    base = folder / "base"
    fetch(known["smollm2"], base)
    atomic_write_text(base / "chat_template.jinja", TEMPLATE)
    sources = data / FILES["gsm8k"], data / FILES["complied"]
    once(folder / "harmless.jsonl", lambda: harmless(folder, *sources))
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


def harmless(folder: Path, mathematics: Path, answers: Path) -> None:
    """Write harmless requests as rows that think: all kinds, and mathematics.

    Of mathematics the steps are the thinking. Beside it stand the harmless XSTest
    prompts whose answers people call full compliance: with mathematics alone a model
    learns to refuse all that is no sum.
    """
    rows = []
    with answers.open(encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            safe = not row["type"].startswith("contrast")
            if safe and row["final_label"] == "1_full_compliance":
                asked = row["prompt"].strip()
                rows.append(
                    {
                        "prompt": asked,
                        "thinking": HARMLESS.format(asked),
                        "response": row["completion"].strip(),
                    }
                )
    # As many of one as of the other.
    for line in mathematics.read_text(encoding="utf-8").splitlines()[: len(rows)]:
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
