"""Work through the repair experiment in one process; start it twice to share the work.

Usage: repair_cells.py FOLDER

Every step writes a file and is skipped when that file is there. A step that another
process works on is passed over, or waited for where nothing can be done without it.
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import repair_evaluate
import repair_material
from experiment import once
from repair_plan import PRIMARY, Cell, Plan, plan

from holdfast.cli.app import run
from holdfast.study import atomic_write_json

TRAINING = (
    "--method full --learning-rate 3e-4 --loss template --train-batch 8 "
    "--no-gradient-checkpointing --benign-ratio 1"
).split()


def command(*words: object) -> None:
    """Run a verb; stop at an error, which has been said."""
    status = run([str(word) for word in words])
    if status:
        raise SystemExit(status)


class Lane:
    """One process of the experiment."""

    def __init__(self, folder: Path, chosen: Plan) -> None:
        self.folder, self.plan = folder, chosen
        self.base = folder / "audit-base"

    def prepare(self) -> None:
        """Write the material, fit the probe, and score the pool; all wait for it."""
        wanted = asdict(self.plan)
        settings = self.folder / "plan.json"
        once(settings, lambda: atomic_write_json(settings, wanted), wait=True)
        repair_evaluate.require_plan(settings, wanted)
        test = self.folder / "test.jsonl"
        once(
            test,
            lambda: repair_material.write(self.folder, self.plan.rows, self.plan.test),
            wait=True,
        )
        once(
            self.base / "report.json",
            lambda: self.audit(self.plan.model, self.base),
            wait=True,
        )
        # Passes that all selections share. Processes share their shards, so nobody
        # waits for the whole pass of another.
        for cell in (
            Cell("all", "100%", 0),
            Cell("random-flagged", PRIMARY, 0),
            Cell("loss", PRIMARY, 0),
        ):
            if not self.selection(cell).exists():
                self.choose(cell)

    def audit(self, model: object, study: Path) -> None:
        """Audit a model without looking at its heads."""
        limit = ("--no-heads", "--limit", self.plan.audit_limit)
        command("audit", model, *limit, "-o", study)

    def selection(self, cell: Cell) -> Path:
        """Return the record of a selection, which is written last."""
        return self.folder / "chosen" / f"{cell.chosen}.selection.json"

    def choose(self, cell: Cell) -> None:
        """Choose the rows of a cell; every selection shares the scores."""
        flags: list[object] = ["--by", cell.selector, "--similar", "0.8"]
        if cell.selector == "all":
            flags = ["--by", "random", "--similar", "0"]
        if cell.selector != "loss":
            # A loss with a probe would cost a second pass that is there already.
            flags += ["--direction", self.base]
        flags += ["--max-answer", repair_evaluate.SAMPLING.max_answer]
        flags += ["--scores", self.folder / "scores", "--seed", cell.seed]
        flags += ["--pool", self.folder / "pool.jsonl", "--budget", cell.budget]
        output = self.folder / "chosen" / f"{cell.chosen}.jsonl"
        command("select", self.plan.model, *flags, "-o", output)

    def train_and_test(self, cell: Cell, record: Path) -> None:
        """Train the model of a cell, write its record, and let it go."""
        once(self.selection(cell), lambda: self.choose(cell), wait=True)
        chosen = self.folder / "chosen" / f"{cell.chosen}.jsonl"
        model = self.folder / "models" / cell.name
        command(
            *("finetune", self.plan.model, "--data", chosen),
            *("--benign", self.folder / "benign.jsonl", *TRAINING),
            *("--steps", self.plan.steps_of(cell), "--save-every", 1000),
            *("--seed", cell.seed, "-o", model),
        )
        self.test(model, record, f"{cell.selector}@{cell.budget}", cell.seed, chosen)
        if cell not in self.plan.mended():
            shutil.rmtree(model)

    def test(
        self,
        model: object,
        record: Path,
        name: str,
        seed: int,
        chosen: Path | None = None,
    ) -> None:
        """Ask a model every test prompt."""
        repair_evaluate.evaluate(
            str(model), self.folder, record, name, seed, asdict(self.plan), chosen
        )

    def work(self) -> None:
        """Do all that is not done and not in work elsewhere."""
        self.prepare()
        records = self.folder / "records"
        none = records / "none-0-0.json"
        once(none, lambda: self.test(self.plan.model, none, "none@0%", 0))
        for cell in self.plan.cells():
            record = records / f"{cell.name}.json"
            once(record, lambda c=cell, r=record: self.train_and_test(c, r))
        for cell in self.plan.mended():
            study = self.folder / f"audit-{cell.name}"
            model = self.folder / "models" / cell.name
            if (records / f"{cell.name}.json").exists():
                once(study / "report.json", lambda m=model, s=study: self.audit(m, s))


if __name__ == "__main__":
    Lane(Path(sys.argv[1]), plan()).work()
