"""The model of a run, loaded once and only when a stage asks for it."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from holdfast.data.chat.rendering import (
    AS_IT_IS,
    rendering_of,
    rendering_record,
    set_rendering,
)
from holdfast.engines.choose import open_engine
from holdfast.engines.port import Engine
from holdfast.engines.settings import HERE, EngineSettings
from holdfast.errors import InputError, SettingsError, UnsupportedFamilyError
from holdfast.judges.base import Judge
from holdfast.judges.choose import check_guard, open_judge
from holdfast.judges.settings import JudgeSettings
from holdfast.models.loading.load import (
    fingerprint_source,
    fingerprints,
    load_language_model,
)
from holdfast.models.model import Adapter, LanguageModel
from holdfast.report.progress import Progress, Silent
from holdfast.rollout.cost import cache_bytes
from holdfast.rollout.prompts import Given
from holdfast.rollout.settings import ModelSettings
from holdfast.study import Study

ORGANISM = "organism:"
SMALL = 20_000_000
"""Parameters below which one thread is the fastest."""
DENOISED, DENOISED_SMALL = 16, 64
"""Rows at once of a masked-diffusion model, which has no cache; of a small one."""
MEMORY, LENGTH = 1 << 30, 1024
"""What the cache of a first batch may take, if its rows have so many tokens."""


class Session:
    """What a stage is handed beside study and settings.

    Attributes:
        name: The model as the user named it.
        settings: How it is loaded.
        progress: Where a stage says what it does.
        given: Prompts in memory, by role; None where they come from files.
        directory: Absolute path of the model; None for an organism, a model of the
            Hub or one in memory.
    """

    def __init__(
        self,
        model: str | LanguageModel,
        settings: ModelSettings | None = None,
        progress: Progress | None = None,
        given: Given | None = None,
        directory: str | None = None,
        engine: EngineSettings = HERE,
    ) -> None:
        """Remember the model and where it lies; nothing is loaded yet.

        Args:
            model: `organism:NAME`, a directory, a Hub id, or a model that
                `holdfast.adapt` or `adapt_masked` has proved.
            settings: How to load it.
            progress: Where a stage says what it does; silent by default.
            given: Prompts in memory, by role.
            directory: Where a model lies that was named from another place.
            engine: Who draws answers.
        """
        self.settings = settings or ModelSettings()
        self.progress = progress or Silent()
        self.given = given
        self._speaker = None if isinstance(model, str) else model
        if self._speaker is not None and self.settings.rendering() != AS_IT_IS:
            raise SettingsError(
                "the way that prompts are rendered to be said of the tokenizer, for a "
                "model in memory",
                "ModelSettings that say it",
                "Call holdfast.data.chat.thinking.configure(tokenizer, Rendering(...)) "
                "before holdfast.adapt.",
            )
        # Whether a model without a chat template is refused, as all but `doctor` must.
        self.needs_template = True
        self._is_given = self._speaker is not None
        self.engine_settings = engine
        self._engine: Engine | None = None
        self._judge: tuple[JudgeSettings, Judge] | None = None
        self.name = model if isinstance(model, str) else model.identity.model_id
        self.directory = directory or (None if self._is_given else _lies(self.name))

    @classmethod
    def of(
        cls,
        study: Study,
        settings: ModelSettings,
        progress: Progress | None = None,
        engine: EngineSettings = HERE,
    ) -> "Session":
        """Return a session with the model that a study was made with.

        Raises:
            InputError: If the study has no rollouts yet, or its model lies no longer
                where it lay.
            SettingsError: If the study's model was in memory, so that no name leads
                back to it.
        """
        known = study.manifest.get("model")
        if known is None:
            raise InputError(
                f"a study with rollouts at {study.directory}",
                "one without a model",
                "Run `holdfast rollout MODEL -o STUDY` first.",
            )
        if known["id"] == "in-memory":
            raise SettingsError(
                "a model that can be loaded again",
                "a study of a model in memory",
                "Run this stage from Python, with the model at hand.",
            )
        loading = dict(study.manifest.get("loading", {}))
        loading.pop("directory", None)
        directory = _lay(study)
        session = cls(
            known["id"],
            settings.over(loading),
            progress,
            directory=directory,
            engine=engine,
        )
        session.remember(study)
        return session

    def remember(self, study: Study) -> None:
        """Take from a study what its first command settled, unless it is said anew.

        That is the day that its prompts were told, and the place of its model where a
        path of the same name leads nowhere from here.
        """
        model = study.manifest.get("model", {})
        if self._speaker is None and self.directory is None:
            if model.get("id") == self.name:
                self.directory = _lay(study)
        known = model.get("rendering", {}).get("date")
        if known is None or self.settings.date is not None:
            return
        self.settings = replace(self.settings, date=known)
        if self._speaker is not None:
            tokenizer = self._speaker.tokenizer
            set_rendering(tokenizer, replace(rendering_of(tokenizer), date=known))

    @property
    def speaker(self) -> LanguageModel:
        """The model, proved on loading, whichever way it decodes."""
        if self._speaker is None:
            if self._judge is not None and self._judge[0].guard:
                self._judge = None
            self.progress.say(f"Loading {self.name} and proving that it fits.")
            self._speaker = load_language_model(
                self.directory or _locate(self.name),
                revision=self.settings.revision,
                device=self.settings.device,
                dtype=self.settings.dtype,
                rendering=self.settings.rendering(),
                needs_template=self.needs_template,
            )
            _choose_threads(self._speaker)
        return self._speaker

    @property
    def adapter(self) -> Adapter:
        """The model, if it writes from left to right."""
        speaker = self.speaker
        if not isinstance(speaker, Adapter):
            raise UnsupportedFamilyError(
                "a model that writes from left to right, whose heads can be measured "
                "one by one",
                f"{self.name}, a masked-diffusion model, which attends both ways",
                "Use `holdfast rollout`, `evaluate`, `signal`, `guard fit` and `guard "
                "evaluate` with it.",
            )
        return speaker

    @property
    def engine(self) -> Engine:
        """Who draws answers, opened once."""
        if self._engine is None:
            self._engine = open_engine(self.engine_settings, self.adapter)
        return self._engine

    @property
    def batch_size(self) -> int:
        """Rows at once: as many as the user said, else what suits the model."""
        return self.settings.batch_size or suitable_batch(self.speaker)

    def fingerprints(self) -> dict[str, str]:
        """Return what tells this model from others, without loading its weights."""
        if self._speaker is not None:
            known = fingerprints(self._speaker.identity, self._speaker.tokenizer)
        else:
            known = fingerprint_source(
                self.directory or _locate(self.name),
                self.settings.revision,
                self.settings.rendering(),
            )
        return known | {"dtype": self.settings.dtype}

    def release(self) -> None:
        """Let go of the model, so that another fits; it is loaded again if asked for.

        A model that the caller holds in memory stays.
        """
        if not self._is_given:
            self._speaker = self._engine = None

    def check_judge(self, settings: JudgeSettings) -> None:
        """Refuse a judge that cannot work, before answers are drawn for it.

        A guard model would take the memory of the model that answers: it is looked
        for, and opened later.

        Raises:
            HoldfastError: If it is unknown, or is not there.
        """
        if settings.guard:
            check_guard(settings)
        else:
            self.open_judge(settings)

    def open_judge(self, settings: JudgeSettings) -> Judge:
        """Return the judge, opened once; a guard takes the place of the model.

        Raises:
            HoldfastError: If it cannot be opened.
        """
        if self._judge is None or self._judge[0] != settings:
            if settings.guard:
                self.release()
            self._judge = settings, open_judge(settings)
        return self._judge[1]

    def model_record(self) -> dict[str, Any]:
        """Return the block `model` of the study and of the report."""
        speaker = self.speaker
        identity, thinking = speaker.identity, speaker.thinking
        packed = {"gguf_sha256": identity.gguf_sha256} if identity.gguf_sha256 else {}
        return packed | {
            "id": self.name,
            "revision": identity.revision,
            "type": identity.model_type,
            "dtype": identity.dtype,
            "template_sha256": identity.template_sha256,
            "weights_sha256": identity.weights_sha256,
            "tokenizer": {
                "class": identity.tokenizer_class,
                "source": identity.tokenizer_source,
                "sha256": identity.tokenizer_sha256,
            },
            "rendering": speaker.tokenizer and rendering_record(speaker.tokenizer),
            "thinking": thinking and thinking.record(),
        }

    def claim(self, study: Study) -> None:
        """Write the model into a study that has none, or check that it is the same.

        A model that was moved, or is named from another place, keeps its name.
        """
        self.remember(study)
        self.check_owner(study)
        record = self.model_record()
        known = study.manifest.get("model")
        if known is not None:
            self.name = record["id"] = known["id"]
        if known is not None and known != record:
            self.progress.say("The model has changed since: everything is done anew.")
        study.manifest["model"] = record
        study.manifest["loading"] = self.settings.kept() | {"directory": self.directory}
        study.save()

    def check_owner(self, study: Study) -> None:
        """Refuse a study of a model of another name or place, unless that was moved.

        Moved is a model that lies no longer where it lay, and has the same weights.
        """
        known = study.manifest.get("model")
        if known is None:
            return
        place = study.manifest.get("loading", {}).get("directory")
        apart = known["id"] != self.name
        if place is not None and self.directory is not None:
            apart = place != self.directory
        gone = place is not None and not Path(place).is_dir()
        moved = gone and _weights(known) == _weights(self.fingerprints())
        if apart and not moved:
            told = f" in {place}" if place else ""
            raise InputError(
                f"a study of {self.directory or self.name} at {study.directory}",
                f"one of {known['id']}{told}",
                "Name another study with -o.",
            )

    def check_same(self, study: Study) -> None:
        """Refuse to go on with other weights than those that gave the answers."""
        known, record = study.manifest["model"], self.model_record()
        different = [key for key in record if known.get(key) != record[key]]
        if different:
            raise InputError(
                f"the model that gave the rollouts of {study.directory}",
                f"one that differs in {', '.join(different)}",
                "Run `holdfast rollout` again, or load the model as it was.",
            )


def suitable_batch(speaker: LanguageModel) -> int:
    """Return how many rows to begin with where the user has not said.

    As many, in powers of two from 32 to 128, as have their keys and values in a
    gibibyte. The rule depends on the model alone and not on what is free, so that a
    stage that goes on runs the batches that it would have run; where the memory does
    not suffice, batches are halved.
    """
    if not isinstance(speaker, Adapter):
        return DENOISED_SMALL if _n_parameters(speaker) < SMALL else DENOISED
    room = MEMORY // (cache_bytes(speaker) * LENGTH)
    return next((size for size in (128, 64) if size <= room), 32)


def _n_parameters(speaker: LanguageModel) -> int:
    return sum(each.numel() for each in speaker.model.parameters())


def _choose_threads(speaker: LanguageModel) -> None:
    """Use one thread for a small model on the CPU, unless the user has chosen.

    Its steps are so short that threads spend them waiting for each other, above all
    where something else is running. The rule depends on the model alone, since another
    number of threads may change the last digit of a result.
    """
    chosen = "OMP_NUM_THREADS" in os.environ
    small = _n_parameters(speaker) < SMALL
    if speaker.device.type == "cpu" and small and not chosen:
        torch.set_num_threads(1)


def _lay(study: Study) -> str | None:
    """Return where the model of a study lay; None for one that no path names."""
    directory = study.manifest.get("loading", {}).get("directory")
    if directory is not None and not Path(directory).exists():
        raise InputError(
            f"the model of {study.directory} in {directory}, where it lay",
            "no such directory or file",
            "Put it back; or name its new place in the command that made the "
            "study, which goes on with it.",
        )
    return None if directory is None else str(directory)


def _lies(name: str) -> str | None:
    """Return the absolute path of a model that is named by a path."""
    path = Path(name).expanduser()
    # As it is written, links and all: where they lead may change with the model.
    is_path = not name.startswith(ORGANISM) and path.exists()
    return os.path.abspath(path) if is_path else None


def _weights(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("weights_sha256", "template_sha256"))


def _locate(name: str) -> str:
    """Return a directory or Hub id for a model as the user named it."""
    if not name.startswith(ORGANISM):
        return name
    from holdfast.organisms.catalogue import resolve

    return str(resolve(name))
