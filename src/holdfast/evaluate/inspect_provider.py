"""Our models, edited or not, for inspect_ai: `inspect eval TASK --model holdfast/…`.

inspect_ai finds this module by its entry point. Samples that wait at the same time are
decoded in one batch by one thread; tools and several choices are not supported.
"""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

from holdfast.data.chat.template import prompt_token_ids
from holdfast.errors import SettingsError
from holdfast.models.decoding.generate import generate
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.interventions import HeadEdit
from holdfast.rollout.edits import read_edit
from holdfast.rollout.prompts import row_seed
from holdfast.rollout.session import Session
from holdfast.rollout.settings import ModelSettings

WAIT = 0.05
MAX_THINKING = 2048
MAX_ANSWER = 512


class _Asked(NamedTuple):
    token_ids: tuple[int, ...]
    seed: int
    sampling: Sampling
    future: "Future[Completion]"


class Batcher:
    """One model and one thread that decodes what waits, in batches."""

    def __init__(
        self, session: Session, edit: str | None = None, batch_size: int = 32
    ) -> None:
        """Start the thread; the model is loaded by the first question."""
        self.session, self._edit_file, self.batch_size = session, edit, batch_size
        self._edit: HeadEdit | None = None
        self._waiting: queue.Queue[_Asked | None] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.batches: list[int] = []

    def ask(
        self, prompt: str, system_prompt: str | None, sampling: Sampling, seed: int
    ) -> "Future[Completion]":
        """Put a prompt into the next batch."""
        with self._lock:
            adapter = self.session.adapter
            if self._thread is None:
                if self._edit_file is not None:
                    self._edit = read_edit(self._edit_file, adapter).edit
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        ids = prompt_token_ids(
            adapter.tokenizer,
            prompt,
            system_prompt=system_prompt,
            thinking=adapter.thinking,
        )
        future: Future[Completion] = Future()
        row = row_seed(seed, str(ids), 0)
        self._waiting.put(_Asked(tuple(ids), row, sampling, future))
        return future

    def close(self) -> None:
        """Stop the thread, once what waits is done."""
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        left: list[_Asked] = []
        while True:
            first = left.pop(0) if left else self._waiting.get()
            if first is None:
                return
            batch, left, ended = self._gather(first, left)
            self._decode(batch)
            if ended:
                for each in left:
                    self._decode([each])
                return

    def _gather(
        self, first: _Asked, left: list[_Asked]
    ) -> tuple[list[_Asked], list[_Asked], bool]:
        """Take what waits and is sampled alike; the rest stays for later batches."""
        batch = [first, *(each for each in left if each.sampling == first.sampling)]
        others = [each for each in left if each.sampling != first.sampling]
        deadline = time.monotonic() + WAIT
        while len(batch) < self.batch_size:
            try:
                found = self._waiting.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                return batch, others, False
            if found is None:
                return batch, others, True
            (batch if found.sampling == first.sampling else others).append(found)
        return batch, others, False

    def _decode(self, batch: Sequence[_Asked]) -> None:
        self.batches.append(len(batch))
        try:
            prompts = [(each.token_ids, each.seed) for each in batch]
            parts = generate(
                self.session.adapter,
                prompts,
                batch[0].sampling,
                batch_size=self.batch_size,
                edit=self._edit,
            )
            for part in parts:
                for made in part:
                    batch[made.index].future.set_result(made)
        except Exception as error:
            # The thread lives on; whoever asked gets the error.
            for each in batch:
                if not each.future.done():
                    each.future.set_exception(error)


def provider() -> type:
    """Return the class that inspect_ai makes models of; used by its registry."""
    model = importlib.import_module("inspect_ai.model")
    base: Any = model.ModelAPI

    class HoldfastAPI(base):  # type: ignore[misc]
        """Models of Holdfast: a directory, a Hub id or `organism:NAME`."""

        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: Any = None,
            **arguments: Any,
        ) -> None:
            """Remember the model; it is loaded by the first sample."""
            super().__init__(
                model_name, base_url, api_key, [], config or model.GenerateConfig()
            )
            edit = arguments.pop("edit", None)
            self.max_thinking = int(arguments.pop("max_thinking", MAX_THINKING))
            batch_size = int(arguments.pop("batch_size", 32))
            settings = ModelSettings(batch_size=batch_size, **arguments)
            session = Session(model_name, settings)
            self.batcher = Batcher(session, edit, batch_size)

        def max_connections(self) -> int:
            """Return how many samples may wait at once."""
            return 2 * self.batcher.batch_size

        async def generate(
            self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any
        ) -> Any:
            """Answer one conversation of a system and a user turn."""
            system, prompt = _turns(input, tools)
            sampling = Sampling(
                temperature=config.temperature or 0,
                top_p=config.top_p or 1.0,
                max_thinking=self.max_thinking,
                max_answer=config.max_tokens or MAX_ANSWER,
            )
            ask = partial(self.batcher.ask, prompt, system, sampling, config.seed or 0)
            made = await _in_thread(ask)
            return _output(model, self.model_name, made)

    registered: type = model.modelapi(name="holdfast")(HoldfastAPI)
    return registered


async def _in_thread(ask: Callable[[], "Future[Completion]"]) -> Completion:
    anyio = importlib.import_module("anyio")
    limiter = anyio.CapacityLimiter(1)
    made: Completion = await anyio.to_thread.run_sync(
        lambda: ask().result(), limiter=limiter
    )
    return made


def _turns(messages: Sequence[Any], tools: Sequence[Any]) -> tuple[str | None, str]:
    roles = [message.role for message in messages]
    if tools or roles not in (["user"], ["system", "user"]):
        raise SettingsError(
            "one user turn, with or without a system prompt, and no tools",
            f"turns {', '.join(roles)}{' with tools' if tools else ''}",
            "Use another provider for conversations of several turns.",
        )
    system = messages[0].text if len(messages) == 2 else None
    return system, messages[-1].text


def _output(model: Any, name: str, made: Completion) -> Any:
    content = [model.ContentText(text=made.answer)]
    if made.thinking:
        content.insert(0, model.ContentReasoning(reasoning=made.thinking))
    message = model.ChatMessageAssistant(content=content, model=name, source="generate")
    stopped = "stop" if made.finish == "stop" else "max_tokens"
    n_prompt, n_all = made.spans.prompt[1], len(made.token_ids)
    return model.ModelOutput(
        model=name,
        choices=[model.ChatCompletionChoice(message=message, stop_reason=stopped)],
        metadata={"closed": made.closed, "forced_close": made.forced_close},
        usage=model.ModelUsage(
            input_tokens=n_prompt,
            output_tokens=n_all - n_prompt,
            total_tokens=n_all,
        ),
    )


if find_spec("inspect_ai") is not None:
    # Importing this module makes `--model holdfast/…` known.
    HoldfastAPI = provider()
