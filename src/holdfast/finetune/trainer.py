"""The training run itself: TRL's SFTTrainer with our targets, stops and checkpoints."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, TaskType
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback

from holdfast.errors import EnvironmentProblem, SettingsError
from holdfast.finetune.checkpoints import (
    Keeper,
    Watch,
    blind_loss,
    last_checkpoint,
    restore,
)
from holdfast.finetune.defenses.base import (
    DefenseContext,
    DefenseData,
    Hooks,
    TrainingPass,
)
from holdfast.finetune.defenses.forward import (
    AlignedModel,
    Batch,
    carries_loss,
    watching,
)
from holdfast.finetune.defenses.options import needs_of
from holdfast.finetune.defenses.registry import DEFENSES
from holdfast.finetune.settings import Recipe
from holdfast.finetune.targets import IGNORED, Example, lead
from holdfast.models.containers.quantised import require_savable
from holdfast.models.library import quietly
from holdfast.models.loading.checkpoint import name_base
from holdfast.models.loading.files import ADAPTER_CONFIG
from holdfast.models.model import Adapter

Told = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the loss."""


class Trained(NamedTuple):
    """A finished run."""

    # Of every step, those before an interruption included: loss, its part of the task
    # and of the defense, learning rate, gradient norm, time, and what the defense says
    # of itself.
    losses: tuple[dict[str, float], ...]
    steps: int  # Optimiser steps.
    resumed_at: int | None  # Step at which an interrupted run was taken up, or None.
    # Writes model or adapter and tokenizer into a folder; every process of a
    # distributed run has to call it.
    save: Callable[[Path], None]
    is_main: bool  # Whether this process writes files.


def train(
    adapter: Adapter,
    examples: Sequence[Example],
    recipe: Recipe,
    folder: Path,
    *,
    fingerprint: str,
    told: Told,
    data: DefenseData | None = None,
    kept: int | None = 2,
    whole: bool = False,
) -> Trained:
    """Train a model; the one in memory is changed.

    A run whose checkpoints lie in the folder is taken up at the last good one, with
    the same order of rows and the same random numbers, so that its losses are those
    of an undisturbed run.

    `kept`: Checkpoints that are kept, the last ones; None for all.
    `whole`: Whether `save` writes a whole model in any case: the base lies where nobody
    else will find it.
    """
    _require_one_process(recipe)
    source = adapter.source
    adapted = source is not None and source.adapter is not None
    if recipe.method == "full" or whole or source is None or adapted:
        method = source and source.quantised
        require_savable(adapter.model, method, adapted=adapted)
    trl = require_trl()
    main = int(os.environ.get("RANK", "0")) == 0
    last = last_checkpoint(folder, fingerprint, clear=main)
    options = recipe.options()
    aligned = AlignedModel(
        adapter, whole="aligned" in needs_of(options) and recipe.method == "full"
    )
    with warnings.catch_warnings():
        # PEFT still asks transformers by the old name of activation checkpointing.
        warnings.filterwarnings("ignore", message=".*will be removed in v6.*")
        trainer = _trainer(trl, adapter, examples, recipe, folder, kept)
        collate = _collator(adapter)
        context = DefenseContext(
            adapter,
            trainer.model,
            aligned.over(trainer.model),
            data or DefenseData(),
            lambda rows: {
                name: tensor.to(adapter.device)
                for name, tensor in collate([row.record() for row in rows]).items()
            },
            recipe.seed,
            lead(examples, recipe.loss),
        )
        hooks = DEFENSES[recipe.defense](context, options)
        if last is not None:
            restore(last, hooks.state)
        defended = recipe.defense != "none"
        watch = Watch(blind_loss(examples), folder, defended=defended)
        trainer.add_callback(watch)
        trainer.prepare(hooks, adapter, watch, told)
        # It would print to stdout, where results are.
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Keeper(fingerprint, hooks.state, adapter))
        with hooks.around:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    losses = tuple(
        {key: float(value) for key, value in entry.items() if key not in _DROPPED}
        for entry in trainer.state.log_history
        if "loss" in entry
    )
    return Trained(
        losses,
        int(trainer.state.global_step),
        None if last is None else int(last.name.rpartition("-")[2]),
        lambda place: _save(trainer, place, adapter, recipe, whole=whole),
        bool(trainer.is_world_process_zero()),
    )


_DROPPED = ("epoch", "entropy", "num_tokens", "mean_token_accuracy", "aux_loss")
"""What TRL logs of its own accord."""


def _require_one_process(recipe: Recipe) -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if int(world) > 1 and recipe.defense not in ("none", "safeinstr"):
        raise SettingsError(
            f"one process for --defense {recipe.defense}",
            world,
            "Its passes and draws have not been proved across several; start it "
            "without accelerate launch, or take --defense none or safeinstr.",
        )


def require_trl() -> Any:
    """Return the package TRL, which trains."""
    try:
        import trl
    except ImportError as error:
        raise EnvironmentProblem(
            "the package trl, which trains",
            "it is not installed",
            "Install it in the folder of Holdfast: `pip install '.[train]'`.",
        ) from error
    return trl


def _not_called(model: Any) -> list[str]:
    """Return the linear parts whose weights a state-space layer takes by itself.

    An adapter on them would be passed by, or have its bias added twice; PEFT refuses
    the one of them in some families and takes all in others.
    """
    return [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if hasattr(module, "A_log") and hasattr(module, "D")
        for part in ("out_proj", "dt_proj")
        if hasattr(module, part)
    ]


def _trainer(
    trl: Any,
    adapter: Adapter,
    examples: Sequence[Example],
    recipe: Recipe,
    folder: Path,
    kept: int | None,
) -> Any:
    from datasets import Dataset

    class Trainer(Defended, trl.SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with the places where a defense acts, and our learning rates."""

        def create_scheduler(
            self: Any, num_training_steps: int, optimizer: Any = None
        ) -> Any:
            """Return the learning rates; that of transformers starts at 0."""
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: recipe.share_of_rate(step, num_training_steps),
            )
            return self.lr_scheduler

    lora = None
    if recipe.method == "lora":
        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            exclude_modules=_not_called(adapter.model) or None,
        )
    adapter.model.train()
    config = _config(trl, adapter, recipe, folder, kept)
    # One process trains on one device; several are started by accelerate.
    if config.n_gpu > 1:
        config._n_gpu = 1
    return Trainer(
        model=adapter.model,
        args=config,
        data_collator=_collator(adapter),
        train_dataset=Dataset.from_list([each.record() for each in examples]),
        processing_class=adapter.tokenizer,
        peft_config=lora,
    )


def _config(
    trl: Any, adapter: Adapter, recipe: Recipe, folder: Path, kept: int | None
) -> Any:
    on_cpu = adapter.device.type == "cpu" and not torch.cuda.is_available()
    return trl.SFTConfig(
        output_dir=str(folder),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.train_batch,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        activation_checkpointing=recipe.gradient_checkpointing,
        bf16=not on_cpu and torch.cuda.is_bf16_supported(),
        use_cpu=on_cpu,
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=kept,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _collator(adapter: Adapter) -> Callable[[list[dict[str, list[int]]]], Batch]:
    own = adapter.tokenizer.pad_token_id
    # Padding is masked and carries no loss, so any token will do.
    pad = 0 if own is None else int(own)
    fill = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}

    def collate(rows: list[dict[str, list[int]]]) -> Batch:
        whole = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: pad_sequence([torch.tensor(row[name]) for row in whole], True, filler)
            for name, filler in fill.items()
        }

    return collate


def _save(
    trainer: Any, folder: Path, base: Adapter, recipe: Recipe, *, whole: bool
) -> None:
    """Write what was trained: an adapter only over a base that can be found again."""
    alone = whole or base.source is None or base.source.adapter is not None
    if recipe.method == "lora" and alone:
        # Its base is another adapter merged, or in memory, and lies nowhere by itself.
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            with quietly():
                model.merge_and_unload().save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
        return
    trainer.save_model(str(folder))
    # A pickle of the arguments; everything in it is in the record.
    (folder / "training_args.bin").unlink(missing_ok=True)
    (folder / "README.md").unlink(missing_ok=True)
    if (folder / ADAPTER_CONFIG).is_file():
        name_base(folder, base.source)


class Defended:
    """Goes before TRL's SFTTrainer: the places where a defense acts."""

    hooks: Hooks  # Where the defense acts.
    adapter: Adapter  # The model that is trained.
    watch: Watch  # Stops a run that diverges.
    told: Told  # Told of every step.

    def prepare(self, hooks: Hooks, adapter: Adapter, watch: Watch, told: Told) -> None:
        """Take the defense; called once, before training."""
        self.hooks, self.adapter, self.watch, self.told = hooks, adapter, watch, told
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
            given
            if rows is None
            else self.data_collator([row.record() for row in rows])
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
        with watching(self.adapter, self.hooks.reads) as states:
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
                TrainingPass(self._step, self.state.max_steps, number, batch, states)
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
                loss_of_defense = self.hooks.gradient(self._step, self.state.max_steps)
            self._count("defense_term", loss_of_defense, 1.0)
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
            self.told(self._step, self.state.max_steps, float(logs["loss"]))
        super().log(logs, start_time)  # type: ignore[misc]

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write no card into checkpoints; the output has one of its own."""

    @property
    def _step(self: Any) -> int:
        return int(self.state.global_step)

    def _number(self: Any, part: int) -> int:
        return int(self._step * self.args.gradient_accumulation_steps + part)

    def _count(self: Any, name: str, value: Tensor, share: float) -> None:
        number = float(value.detach())
        part = "task" if name == "task_loss" else "the defense's term"
        self.watch.require_number(number, part, self._step)
        self._spent[name] += share * number


_READ = ("input_ids", "attention_mask", "labels")
