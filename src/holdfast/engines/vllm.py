"""vLLM in this process: the same checkpoint, and adapters side by side in one batch."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from holdfast.engines.port import PLAINLY, Around, Ask, no_adapters
from holdfast.engines.rounds import Round, Said, rounds, rows_of
from holdfast.engines.settings import EngineSettings
from holdfast.errors import EngineError, EnvironmentProblem, SettingsError
from holdfast.models.decoding.jobs import row_states
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.export import VLLM_RANKS
from holdfast.models.library import library_errors
from holdfast.models.loading.files import ADAPTER_CONFIG
from holdfast.models.model import Adapter
from holdfast.report.progress import Tick

ROWS = 256
"""Rows that are handed over at once; vLLM decides which of them run together."""
QUIETLY = {
    # Rows do not depend on when another process came to them.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Other work of this process goes on beside it.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ON_CPU: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 30,
    # vLLM 0.32 is not steady there with prompts that are read in parts.
    "enable_chunked_prefill": False,
}
READ_AT_ONCE = 512
"""Tokens of prompts that are read at once on a CPU: its kernels copy the adapter of
every one of them."""


class VllmEngine:
    """vLLM, started when the first row is asked for."""

    name = "vllm"

    def __init__(self, settings: EngineSettings, adapter: Adapter) -> None:
        """Look whether vLLM is here and can read the model; nothing is started.

        Raises:
            EnvironmentProblem: If vLLM is not installed.
            SettingsError: If the model is no directory that vLLM could read.
        """
        self.adapter = adapter
        self.rows_at_once: int | None = ROWS
        self._version = _version()
        self._given = _arguments(settings.vllm_arguments)
        source = adapter.source
        if source is None or source.adapter is not None:
            raise SettingsError(
                "a whole checkpoint in a directory, for --engine vllm",
                "a model in memory" if source is None else "an adapter over a base",
                "Save it, or merge the adapter (`holdfast bake`), and name that; or "
                "use --engine hf.",
            )
        self._directory, self._config = source.directory, source.config
        self._model: Any = None
        self._length = 0  # Tokens of the longest row that it was started for.
        # By name: name, number and path, by which vLLM knows an adapter.
        self._held: dict[str, tuple[str, int, str]] = {}
        self._loras: dict[str, Any] = {}

    def hold(self, adapters: Mapping[str, Path]) -> None:
        """Take adapters; vLLM is started anew where they do not fit beside its own.

        Raises:
            SettingsError: If an adapter has a larger rank than vLLM takes.
        """
        settings = [
            json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            for path in adapters.values()
        ]
        rank = max((int(each["r"]) for each in settings), default=0)
        if rank > VLLM_RANKS[-1]:
            raise SettingsError(
                f"adapters of a rank up to {VLLM_RANKS[-1]}, which is all vLLM takes",
                f"one of rank {rank}",
                "Take fewer heads of one layer, or --engine hf.",
            )
        targets = [name for each in settings for name in each["target_modules"]]
        places = enumerate(adapters.items(), start=1)
        self._held = {name: (name, i, str(path)) for i, (name, path) in places}
        self._model = None
        self._loras = {
            "enable_lora": True,
            # One place more than adapters. On a CPU a row without an adapter is
            # multiplied with what lies in the last place.
            "max_loras": len(adapters) + 1,
            "max_lora_rank": next(each for each in VLLM_RANKS if each >= rank),
            "lora_target_modules": sorted({name.split(".")[-1] for name in targets}),
        }

    def draw(
        self, asks: Sequence[Ask], sampling: Sampling, around: Around = PLAINLY
    ) -> Iterator[list[Completion]]:
        """Complete prompts in rounds, rows of all adapters together.

        Raises:
            SettingsError: If an adapter is asked for that is not held.
            EngineError: If vLLM does not read the model, or stops.
        """
        for each in asks:
            if each.condition is not None and each.condition not in self._held:
                raise no_adapters(self.name, each.condition)
        done = around.thinking_done
        prompts = [(each.token_ids, each.seed) for each in asks]
        states = row_states(self.adapter, prompts, sampling, thinking_done=done)
        longest = max((each.longest for each in states), default=0)
        if longest > self._length:
            # Batches come longest first, so that this is rare.
            self._model, self._length = None, longest
        thinking = None if done else self.adapter.thinking
        seeds = [each.seed for each in asks]
        close = "" if thinking is None else thinking.close
        rows = rows_of(states, seeds, close, min(self.adapter.stop_ids))

        def ask(asked: list[Round]) -> list[Said]:
            conditions = [asks[each.place].condition for each in asked]
            return self._answer(asked, conditions, sampling)

        def drawn() -> Iterator[list[Completion]]:
            for part in rounds(rows, ask):
                if around.told is not None:
                    n = sum(len(row.token_ids) - row.spans.prompt[1] for row in part)
                    around.told(Tick(len(part), n, 0, is_prompt=False))
                yield part

        return drawn()

    def identity(self) -> dict[str, Any]:
        """Return its version and arguments: another one may round otherwise."""
        return {"engine": self.name, "version": self._version, **self._given}

    def record(self) -> dict[str, Any]:
        """Return name, version and arguments."""
        return {"name": self.name, "version": self._version, "arguments": self._given}

    def _answer(
        self,
        asked: list[Round],
        conditions: Sequence[str | None],
        sampling: Sampling,
    ) -> list[Said]:
        """Return what vLLM says in one round."""
        with library_errors(
            EngineError,
            f"vLLM {self._version} to answer in place of {self._directory.name}",
            "See its own log (VLLM_LOGGING_LEVEL=INFO), mend --vllm-arguments, or use "
            "--engine hf.",
        ):
            model = self._model = self._model or self._started()
            from vllm import SamplingParams
            from vllm.lora.request import LoRARequest

            greedy = sampling.temperature == 0
            ways = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=None if greedy else each.seed,
                    max_tokens=each.limit,
                    stop=[each.stop] if each.stop else None,
                    include_stop_str_in_output=True,
                    # A closing tag may be a special token.
                    skip_special_tokens=False,
                    stop_token_ids=sorted(self.adapter.stop_ids),
                    ignore_eos=True,
                    logprobs=2 if greedy else None,
                )
                for each in asked
            ]
            answered = model.generate(
                [{"prompt_token_ids": list(each.token_ids)} for each in asked],
                ways,
                lora_request=[
                    None if name is None else LoRARequest(*self._held[name])
                    for name in conditions
                ],
                use_tqdm=False,
            )
            return [_said(each.outputs[0]) for each in answered]

    def _started(self) -> Any:
        for name, value in QUIETLY.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.platforms import current_platform

        arguments: dict[str, Any] = {
            "model": str(self._directory),
            "dtype": str(self.adapter.dtype).removeprefix("torch."),
            "runner": "generate",
            "use_tqdm_on_load": False,
            # Nothing of its own: temperature and end tokens are sent.
            "generation_config": "vllm",
            "max_model_len": self._length,
        }
        if current_platform.is_cpu():
            tokens = max(READ_AT_ONCE, self._length)
            arguments |= ON_CPU | {"max_num_batched_tokens": tokens}
        if not any(name.endswith("_parallel_size") for name in self._given):
            arguments["distributed_executor_backend"] = "uni"
        if not self._config.get("architectures"):
            own = type(self.adapter.model).__name__
            arguments["hf_overrides"] = {"architectures": [own]}
        return LLM(**arguments | self._loras | self._given)


def _said(output: Any) -> Said:
    """Return what vLLM sent for a row, its gaps where it told them."""
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(
            "rows that end by themselves or at a limit",
            f"one that vLLM ended for {output.finish_reason}",
            "See its own log (VLLM_LOGGING_LEVEL=INFO).",
        )
    gaps = None
    if output.logprobs is not None:
        gaps = tuple(_gap(each) for each in output.logprobs)
    return Said(tuple(output.token_ids), output.finish_reason, gaps)


def _gap(told: Mapping[int, Any]) -> float:
    first, second = sorted((each.logprob for each in told.values()), reverse=True)[:2]
    return float(first - second)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise EnvironmentProblem(
        "the package vllm, for --engine vllm",
        "that it is not installed here",
        "Install it beside Holdfast as docs/scale.md says, or start `vllm serve` "
        "anywhere and name it with --engine server.",
    )


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        given = json.loads(text or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise SettingsError(
            "a JSON object of arguments of vllm.LLM for --vllm-arguments",
            str(text)[:80],
            """Write it like '{"tensor_parallel_size": 8}'.""",
        )
    return given
