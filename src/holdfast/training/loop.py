"""What is done at each step of a run beyond what TRL's trainer does."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from holdfast.training.defenses.contract import Hooks, Pass
from holdfast.training.defenses.passing import Parts, carries_loss, watching
from holdfast.training.targets import Example
from holdfast.training.watch import Watch


class Defended:
    """Goes before TRL's SFTTrainer: the places where a defense acts.

    Attributes:
        hooks: Where the defense acts.
        parts: The model that is trained, as `passing` reads it.
        watch: Stops a run that diverges.
    """

    hooks: Hooks
    parts: Parts
    watch: Watch

    def prepare(self, hooks: Hooks, parts: Parts, watch: Watch) -> None:
        """Take the defense; called once, before training.

        Args:
            hooks: Where the defense acts.
            parts: The model that is trained.
            watch: Stops a run that diverges.
        """
        self.hooks, self.parts, self.watch = hooks, parts, watch
        self._part = 0
        self._spent = {"task_loss": 0.0, "defense_term": 0.0}
        self._clock = (0.0, 0.0)

    def get_batch_samples(self: Any, iterator: Any, n: int, device: Any) -> Any:
        """Return the rows of a step, or those the defense puts in their place."""
        self._clock = (time.perf_counter(), time.process_time())
        self._part = 0
        self._spent = dict.fromkeys(self._spent, 0.0)
        samples, n_items = super().get_batch_samples(iterator, n, device)  # type: ignore[misc]
        if self.hooks.swap is None:
            return samples, n_items
        numbers = [self._number(part) for part in range(len(samples))]
        swapped = [self.hooks.swap(self._step, number) for number in numbers]
        samples = [
            given if rows is None else self._collated(rows)
            for given, rows in zip(samples, swapped, strict=True)
        ]
        return samples, self._get_num_items_in_batch(samples, device)

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a pass, the defense's term included."""
        with watching(self.parts, self.hooks.reads) as states:
            task = super().compute_loss(  # type: ignore[misc]
                model, inputs, num_items_in_batch=num_items_in_batch
            )
        # Whether the trainer leaves the mean over passes to us.
        ours = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps
        self._count("task_loss", task, 1.0 if ours else 1.0 / parts)
        if self.hooks.term is None:
            return task
        batch = {name: inputs[name] for name in _READ}
        number = self._number(self._part)
        with self.accelerator.autocast():
            term = self.hooks.term(
                Pass(self._step, self.state.max_steps, number, batch, states)
            )
        share = 1.0 / parts
        if self.hooks.reads != "nothing" and num_items_in_batch is not None:
            # A mean over tokens of the task's rows weighs as their loss does.
            share = float(carries_loss(batch).sum() / num_items_in_batch)
        self._count("defense_term", term, share)
        return task + term.to(task.device) * (share if ours else 1.0)

    def training_step(self: Any, *arguments: Any, **options: Any) -> Tensor:
        """Run one pass forward and back, and at the last of a step the defense."""
        loss: Tensor = super().training_step(*arguments, **options)  # type: ignore[misc]
        self._part += 1
        if not self.accelerator.sync_gradients:
            return loss
        if self.hooks.gradient is not None:
            with self.accelerator.autocast():
                found = self.hooks.gradient(self._step, self.state.max_steps)
            self._count("defense_term", found, 1.0)
        self.watch.step(self._spent["task_loss"], self._step)
        return loss

    def log(self: Any, logs: dict[str, float], start_time: Any = None) -> None:
        """Write what a step cost beside its loss."""
        if "loss" in logs:
            now = (time.perf_counter(), time.process_time())
            spent = [end - start for end, start in zip(now, self._clock, strict=True)]
            logs |= self._spent | self.hooks.logged
            if self.hooks.term is None and self.hooks.gradient is None:
                del logs["defense_term"]
            logs |= {"seconds": spent[0], "cpu_seconds": spent[1]}
        super().log(logs, start_time)  # type: ignore[misc]

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write no card into checkpoints; the output has one of its own."""

    @property
    def _step(self: Any) -> int:
        return int(self.state.global_step)

    def _number(self: Any, part: int) -> int:
        return int(self._step * self.args.gradient_accumulation_steps + part)

    def _collated(self: Any, rows: Sequence[Example]) -> Any:
        return self.data_collator([row.record() for row in rows])

    def _count(self: Any, name: str, value: Tensor, share: float) -> None:
        found = float(value.detach())
        said = "task" if name == "task_loss" else "the defense's term"
        self.watch.require_number(found, said, self._step)
        self._spent[name] += share * found


_READ = ("input_ids", "attention_mask", "labels")
