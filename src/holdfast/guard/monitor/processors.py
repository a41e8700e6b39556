"""The monitor in the `generate` of transformers: a logits processor and a criterion.

A hook keeps the state of each row's last token, which the pass has computed anyway. The
processor reads it before the next token is drawn, and forces that where a policy says
so; the criterion ends rows for which a model has no token that would.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.errors import InputError, SettingsError
from holdfast.guard.monitor.control import MESSAGE, adapter_of, require_policy
from holdfast.guard.monitor.monitor import Monitor, Policy, Watch
from holdfast.models.hidden_states import watched
from holdfast.models.interventions import HeadEdit, LiveEdit, scale_heads

_NOT_WATCHED = ("generate_batch", "init_continuous_batching")
_PLAIN = "Call `generate` with the cache, without beams, chunks or an assistant."


class Generation:
    """One `generate` after another under watch; each begins with nothing.

    Attributes:
        watches: What is known of each row of the last call.
        arguments: What to give to `generate`, beside its inputs.
    """

    def __init__(self, monitor: Monitor, policy: Policy, message: str) -> None:
        """Begin before the first call; see `watch_generate`."""
        self._monitor, self._policy = monitor, policy
        encode = monitor.rules.tokenizer
        self._message = list(encode(message, add_special_tokens=False)["input_ids"])
        adapter = adapter_of(monitor)
        self._stops = adapter.stop_ids
        self.watches: list[Watch] = []
        self.arguments: dict[str, Any] = {
            "logits_processor": [self._process],
            "stopping_criteria": [self._is_done],
        }
        self._said: dict[int, list[int]] = {}
        self._ended: set[int] = set()
        self._states = torch.empty(0)
        self._mask: Tensor | None = None
        self._fresh = True
        self.live: LiveEdit | None = None

    @property
    def fired_at(self) -> dict[int, int]:
        """At which token, counted from 0, each row of the last call fired that did."""
        return {
            row: watch.fired_at
            for row, watch in enumerate(self.watches)
            if watch.fired_at is not None
        }

    def see(self, states: Float[Tensor, "row position d_model"]) -> None:
        """Keep the states of the last tokens; a hook on the final norm."""
        self._states = states[:, -1]

    def enter(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Look at what a pass is given; a hook before the model."""
        cache = named.get("past_key_values")
        if cache is None:
            raise SettingsError("a pass with a cache", "one without", _PLAIN)
        n_read = int(cache.get_seq_length())
        self._fresh = self._fresh or n_read == 0
        ids = named.get("input_ids")
        n_seen = None if ids is None else n_read + ids.shape[1]
        self._mask = _kept(named.get("attention_mask"), n_seen)
        if self._mask is not None and not bool(self._mask[:, -1].all()):
            raise InputError(
                "rows padded on the left, as whoever writes on has to",
                "padding on the right",
                "Set `tokenizer.padding_side = 'left'`, and read prompts in one pass.",
            )
        if self.live is not None:
            self._steer(len(named["input_ids"]))

    def _steer(self, n_rows: int) -> None:
        """Let the edit act on the next tokens of the rows that have fired."""
        fired = () if self._fresh else self.fired_at
        mask = torch.zeros((n_rows, 1), dtype=torch.bool)
        mask[list(fired)] = True
        assert self.live is not None
        self.live.mask = mask

    def _process(
        self,
        input_ids: Int[Tensor, "row position"],
        scores: Float[Tensor, "row vocab"],
    ) -> Float[Tensor, "row vocab"]:
        if self._fresh:
            self._begin(input_ids)
            return scores
        table = input_ids.tolist()
        going = [row for row in range(len(table)) if self._goes_on(row, table[row])]
        read = self._monitor.read(
            [self.watches[row] for row in going],
            self._states[going],
            [table[row][-1] for row in going],
        )
        for row, score in zip(going, read, strict=True):
            if score.acts and self._policy == "stop":
                self._ended.add(row)
            elif score.acts and self._policy == "refuse":
                thinks = self.watches[row].written.is_thinking
                ends = self._monitor.rules.template_ids if thinks else ()
                self._said[row] = [*ends, *self._message]
        for row in going:
            self._force(row, scores)
        return scores

    def _begin(self, input_ids: Tensor) -> None:
        """Open a watch on every row of a new call."""
        mask = torch.ones_like(input_ids) if self._mask is None else self._mask
        if mask.shape != input_ids.shape or len(self._states) != len(input_ids):
            raise SettingsError(
                "one pass over all prompts before the first token",
                f"tokens {tuple(input_ids.shape)} beside a mask {tuple(mask.shape)}",
                _PLAIN,
            )
        prompts = [
            row[kept.bool().to(row.device)].tolist()
            for row, kept in zip(input_ids, mask, strict=True)
        ]
        self.watches = [self._monitor.open(prompt) for prompt in prompts]
        self._monitor.begin(self.watches, self._states)
        self._said, self._ended = {}, set()
        self._width, self._fresh = input_ids.shape[1], False

    def _goes_on(self, row: int, token_ids: Sequence[int]) -> bool:
        """Return whether a row is still written; refuse one that is another row now."""
        known = self.watches[row].written.token_ids
        n_written = len(token_ids) - self._width
        if row in self._ended:
            return False
        written = self.watches[row].n_read
        before = token_ids[self._width : -1]
        if n_written != written + 1 or before != known[len(known) - written :]:
            raise SettingsError(
                "rows that grow by one token at a pass, each behind its own",
                f"row {row} with tokens that were not read",
                _PLAIN,
            )
        if token_ids[-1] in self._stops:
            self._ended.add(row)
            return False
        return True

    def _force(self, row: int, scores: Tensor) -> None:
        """Leave one token to a row that a policy speaks for."""
        said = self._said.get(row)
        if said:
            token = said.pop(0)
        elif said is not None or row in self._ended:
            self._ended.add(row)
            # Whatever ends a row; the criterion ends it where there is nothing.
            token = min(self._stops)
        else:
            return
        scores[row] = -torch.inf
        scores[row, token] = 0.0

    def _is_done(
        self, input_ids: Int[Tensor, "row position"], scores: Any
    ) -> Bool[Tensor, "row"]:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done[list(self._ended)] = True
        return done


def _kept(mask: Any, n_seen: int | None) -> Bool[Tensor, "row position"] | None:
    """Return which tokens of each row are seen; None where nothing is masked.

    A cache of one size is given a mask of queries and keys instead of one of tokens,
    with places for what is not written yet, and where layers differ one for each kind.

    `n_seen`: Tokens of each row so far; None where they are not given as tokens.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
        if mask is None:
            raise SettingsError("a layer that attends to all", "none", _PLAIN)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask.bool()
    last = mask[:, 0, -1, :n_seen]
    return last if last.dtype == torch.bool else last == 0


@contextmanager
def watch_generate(
    monitor: Monitor, policy: Policy = "observe", message: str = MESSAGE
) -> Iterator[Generation]:
    """Watch every `generate` of the monitor's model, for as long as the context lasts.

    ```python
    with watch_generate(monitor, "stop") as watched:
        model.generate(**inputs, **watched.arguments)
    ```

    Rows are padded on the left and have one beam each. `generate_batch` would ignore
    the criterion without a word, so it is refused meanwhile.

    Raises:
        SettingsError: For `redraw`, which draws an answer again (see `guarded`), if the
            bundle has no edit to steer with, or, in `generate`, for beams, an assistant
            and passes without a cache.
    """
    require_policy(monitor, policy)
    if policy == "redraw":
        raise SettingsError(
            "a policy that acts within one call",
            "redraw, which draws an answer again",
            "Use `holdfast.guard.monitor.control.guarded`, or steer.",
        )
    adapter = adapter_of(monitor)
    generation = Generation(monitor, policy, message)
    model = adapter.model
    with ExitStack() as stack:
        stack.enter_context(watched(adapter, "final_norm", generation.see))
        hook = model.register_forward_pre_hook(generation.enter, with_kwargs=True)
        stack.enter_context(hook)
        if policy == "steer" and monitor.bundle.edit is not None:
            edit = HeadEdit(monitor.bundle.edit, ((0, 0),))
            generation.live = stack.enter_context(scale_heads(adapter, edit))
        own = {name: vars(model).get(name) for name in _NOT_WATCHED}
        for name in _NOT_WATCHED:
            setattr(model, name, _refuse_batches)
        own["generate"] = vars(model).get("generate")
        model.generate = _without_beams(model, model.generate)
        try:
            yield generation
        finally:
            for name, before in own.items():
                if before is None:
                    delattr(model, name)
                else:
                    setattr(model, name, before)


def _without_beams(model: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return `generate` that refuses beams.

    Tokens alone do not tell beams from rows as long as none is left for another.
    """

    def checked(*given: Any, **named: Any) -> Any:
        config = named.get("generation_config") or (given[1:2] or (None,))[0]
        said = getattr(config or model.generation_config, "num_beams", None)
        n_beams = named.get("num_beams", said)
        if n_beams not in (None, 1):
            raise SettingsError("rows of one beam each", f"{n_beams} beams", _PLAIN)
        return generate(*given, **named)

    return checked


def _refuse_batches(*_: Any, **__: Any) -> NoReturn:
    raise SettingsError(
        "`generate`, which asks processors and criteria at every token",
        "`generate_batch`, which ignores criteria without a word",
        "Use `generate`, or our own decoding (`guarded`), which batches as well.",
    )
