"""The monitor inside vLLM: one small product a token, and rows that end as it fires.

    HOLDFAST_GUARD=DIR vllm serve MODEL \
        --logits-processors holdfast.guard.vllm_plugin:GuardProcessor

vLLM makes logits in one layer, behind the final norm and outside of what it compiles,
from the very state that a token is drawn from. Its own way of replacing layers puts
one there that keeps that state. The processor, which vLLM loads because it is named,
knows which row is whose: it gives each request's states to a `Reader`, and where the
bundle's detector fires it leaves the request nothing but a token that ends it.

Nothing is loaded where nobody names it. Importing this module needs vLLM.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.logits_processor import LogitsProcessor as Head
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)

from holdfast.data.chat.rendering import AS_IT_IS
from holdfast.data.chat.thinking import thinking_format
from holdfast.errors import SettingsError
from holdfast.guard.monitor.bundle import read_bundle, require_identity
from holdfast.guard.monitor.monitor import RATE, Reader, TokenScore, Watch
from holdfast.models.loading.checkpoint import find_checkpoint
from holdfast.models.loading.parts import templated_tokenizer
from holdfast.models.loading.weights import identify

BUNDLE, LOG, POLICY = "HOLDFAST_GUARD", "HOLDFAST_GUARD_LOG", "HOLDFAST_GUARD_POLICY"
AT_RATE, STALE = "HOLDFAST_GUARD_RATE", "HOLDFAST_GUARD_ACCEPT_STALE"
NAME, OWN_POLICY = "holdfast_id", "holdfast_policy"
"""What of a request's `vllm_xargs` is for the guard: how the log names it, and
`observe` or `stop`."""

_POLICIES = ("stop", "observe")


@Head.register_oot(name="LogitsProcessor")
class WatchedHead(Head):  # type: ignore[misc]
    """The layer that makes logits, and keeps what it made them from."""

    states: Tensor | None = None

    def forward(self, lm_head: Any, hidden_states: Tensor, *rest: Any) -> Any:
        """Keep the states, and make logits as ever."""
        WatchedHead.states = hidden_states
        return super().forward(lm_head, hidden_states, *rest)


class _Request:
    """A request of the batch."""

    def __init__(
        self, reader: Reader, params: Any, prompt: list[int] | None, written: list[int]
    ) -> None:
        own = params.extra_args or {}
        self.name: str | None = own.get(NAME)
        policy = own.get(OWN_POLICY) or os.environ.get(POLICY, "stop")
        # A policy that is none stops, since whoever names one wants a guard.
        self.stops = policy != "observe"
        self.ends = [*(params.stop_token_ids or ()), *params.all_stop_token_ids]
        self.written = written  # The list that vLLM adds to.
        self.watch: Watch | None = None
        self.why: str | None = None
        if prompt is None:
            self.why = "a prompt that is no tokens"
        elif written:
            # Its earlier states are gone: it was put aside and is taken up again.
            self.why = "a request that was taken up again"
        elif not self.ends:
            self.why = "a request that no token ends"
        else:
            self.watch = reader.open(prompt)
        self.first: Tensor | None = None  # State of the prompt's last token so far.
        self.last: TokenScore | None = None


class GuardProcessor(LogitsProcessor):  # type: ignore[misc]
    """A logits processor of vLLM that scores every token and ends requests."""

    def __init__(self, vllm_config: Any, device: torch.device, _: bool) -> None:
        """Read the bundle, and refuse one of another model.

        Raises:
            SettingsError: If no bundle is named, or it is stale and that is not taken.
            InputError: If the bundle is of other weights or another template.
        """
        directory = os.environ.get(BUNDLE)
        if not directory:
            raise SettingsError(
                f"the directory of a bundle in {BUNDLE}", "nothing", "Set it."
            )
        policy = os.environ.get(POLICY, "stop")
        if policy not in _POLICIES:
            raise SettingsError(
                f"{POLICY} as stop or observe",
                repr(policy),
                "Any other policy stands in front: `holdfast guard serve --upstream`.",
            )
        bundle, settings = read_bundle(Path(directory)), vllm_config.model_config
        checkpoint = find_checkpoint(str(settings.model), settings.revision)
        tokenizer = templated_tokenizer(checkpoint, AS_IT_IS)
        dtype = str(settings.dtype).removeprefix("torch.")
        # At what temperature answers are drawn is said by each request.
        serving = bundle.serving._replace(
            engine="vllm", dtype=dtype, quantisation=settings.quantization or ""
        )
        known = identify(checkpoint, tokenizer, settings.dtype)
        stale = require_identity(bundle, known, serving)
        if stale and not os.environ.get(STALE):
            raise SettingsError(
                "thresholds that were set as vLLM serves here",
                " ".join(stale).removesuffix("."),
                f"Measure false stops here, then set {STALE}=1.",
            )
        self.reader = Reader(
            bundle,
            float(os.environ.get(AT_RATE, RATE)),
            tokenizer,
            thinking_format(tokenizer),
            settings.get_hidden_size(),
            device,
        )
        self.requests: dict[int, _Request] = {}
        self._log = Path(os.environ[LOG]) if os.environ.get(LOG) else None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request with a policy that is none here.

        Raises:
            ValueError: Which vLLM tells whoever asked.
        """
        own = (sampling_params.extra_args or {}).get(OWN_POLICY)
        if own not in (None, *_POLICIES):
            raise ValueError(f"expected {OWN_POLICY} as stop or observe; found {own!r}")

    def is_argmax_invariant(self) -> bool:
        """Return that the likeliest token may change."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, go and move; their last scores are logged."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._close(place)
        for place, params, prompt, written in batch_update.added:
            self._close(place)
            self.requests[place] = _Request(self.reader, params, prompt, written)
        for one, other, way in batch_update.moved:
            mine = self.requests.pop(one, None)
            if way == MoveDirectionality.SWAP:
                theirs = self.requests.pop(other, None)
                if theirs is not None:
                    self.requests[one] = theirs
            else:
                self._close(other)
            if mine is not None:
                self.requests[other] = mine

    def apply(self, logits: Tensor) -> Tensor:
        """Read the states of this step, and leave requests that fired their end alone.

        `logits`: Of each request of the batch, in its order.
        """
        states = WatchedHead.states
        if states is None or len(states) != len(logits):
            raise SettingsError(
                "one state for each row of logits",
                "another number",
                "Serve without speculative decoding and prompt logprobs.",
            )
        due = []
        for place, request in self.requests.items():
            if request.watch is None or request.why is not None:
                continue
            n_written, n_read = len(request.written), request.watch.n_read
            if n_written == 0:
                # Of a prompt that is read in parts only the last of them counts.
                request.first = states[place]
            elif n_written == n_read + 1:
                due.append((place, request))
            else:
                request.why = "tokens that were not seen"
        self._read(due, states)
        for place, request in due:
            watch = request.watch
            if request.stops and watch is not None and watch.fired_at is not None:
                logits[place, :] = -torch.inf
                logits[place, request.ends[0]] = 0.0
        return logits

    def _read(self, due: list[tuple[int, _Request]], states: Tensor) -> None:
        """Give each request the token that it read last, all in one product."""
        for _, request in due:
            if request.first is not None and request.watch is not None:
                self.reader.begin([request.watch], request.first[None])
                request.first = None
        watches = [each.watch for _, each in due if each.watch is not None]
        if not due:
            return
        rows = torch.tensor([place for place, _ in due], device=states.device)
        tokens = [each.written[-1] for _, each in due]
        scores = self.reader.read(watches, states[rows], tokens)
        for (_, request), score in zip(due, scores, strict=True):
            request.last = score

    def _close(self, place: int) -> None:
        """Forget a request; its verdict goes to the log, a line of JSON."""
        request = self.requests.pop(place, None)
        if request is None or self._log is None:
            return
        last = request.last
        line = {
            "id": request.name,
            "tokens": len(request.written),
            "fired_at": None if request.watch is None else request.watch.fired_at,
            "fired": () if last is None else last.fired,
            "scores": {} if last is None else last.scores,
            "abstains": request.why or (None if last is None else last.abstains),
        }
        with self._log.open("a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")
