"""The monitor: scores of each sequence of a batch, at every token, as it is written.

It reads states that the model computed anyway, and holds a few numbers of each sequence
and detector. Fed token by token, chunk by chunk or in one prefill, a sequence has the
same scores, but for the rounding of sums in batches of another shape.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.errors import InputError
from holdfast.guard.monitor.bundle import Bundle, Serving, require_match, scripts_of
from holdfast.guard.monitor.rules import SIGNAL, Channel, Place, Scorer
from holdfast.models.decoding.row_state import (
    Choice,
    GenerationState,
    Sampling,
    StoppingRules,
)
from holdfast.models.hidden_states import read_windows
from holdfast.models.model import Adapter, LanguageModel

Policy = Literal["observe", "stop", "refuse", "steer", "redraw"]
RATE = 0.01
NOT_FINITE = "a state that is not finite"
ENDLESS = 1 << 40
"""A limit on tokens that none comes to."""


class TokenScore(NamedTuple):
    """What the monitor says after a token."""

    # Of the token in the sequence; the prompt is not counted. It hides a method of
    # tuples that nobody calls.
    index: int  # type: ignore[assignment]
    channel: Channel  # What it belongs to; the end of the thinking is thinking.
    # Highest score of each detector so far, and of all together; none where a detector
    # has had nothing to read yet.
    scores: dict[str, float]
    # Detectors that are over their threshold, at this token or before.
    fired: tuple[str, ...]
    # Why nothing is promised of this sequence, and nothing fires any more; None where
    # all is as it was when thresholds were set.
    abstains: str | None
    # Whether the detector that the bundle acts on fires at this token, and none before.
    acts: bool = False


class _Written(GenerationState):
    """Where thinking, its end and the answer are, told from the tokens alone."""

    def __init__(self, prompt: tuple[int, ...], rules: StoppingRules) -> None:
        super().__init__(0, prompt, rules)

    def take(self, token: int) -> Place:
        """Take the next token; return where it stands."""
        self.push(Choice(token, math.inf, math.inf))
        ends = self._template is not None and not self.answering
        begins = None if self._template is None else self._template[0]
        n_thinking = (len(self.token_ids) if begins is None else begins) - self.n_prompt
        channel: Channel = "answer" if self.answering else "thinking"
        return Place(channel, ends, n_thinking)


class Watch:
    """One sequence under watch; cheap, and of no use to any other monitor."""

    def __init__(self, reader: "Reader", prompt: tuple[int, ...]) -> None:
        """Begin behind a prompt; see `Monitor.open`."""
        self.written = _Written(prompt, reader.rules)
        self.scorer = Scorer(reader.bundle.detectors, reader.bundle.scales)
        self.fired: tuple[str, ...] = ()
        # Token at which the detector that the bundle acts on fired.
        self.fired_at: int | None = None
        self.abstains = reader.out_of_range(prompt)
        self.counts = {"thinking": 0, "answer": 0}
        # Whether a score has risen of which nothing was told yet.
        self.risen = False
        # Sum over the answer's states so far, for the step-wise signal.
        self.sum: Tensor | None = None
        self.last: TokenScore | None = None

    def forgive(self) -> None:
        """Let nothing fire any more for what was read so far, but for what follows."""
        self.scorer.forget()
        self.fired, self.fired_at = (), None

    @property
    def n_read(self) -> int:
        """Tokens read behind the prompt."""
        return self.written.n_written


class Reader:
    """Live detectors at one rate of false stops a request, wherever states come from.

    Attributes:
        bundle: The detectors.
        rate: Rate of false stops by request that thresholds are for.
    """

    def __init__(
        self,
        bundle: Bundle,
        rate: float,
        tokenizer: Any,
        thinking: ThinkingFormat | None,
        d_model: int,
        device: torch.device,
    ) -> None:
        """Put the bundle's directions where states will be.

        Raises:
            SettingsError: If it has no thresholds for the rate.
            InputError: If its directions are of states of another width.
        """
        self.bundle, self.rate = bundle, rate
        self.limits = {name: each.value for name, each in bundle.at(rate).items()}
        endless = Sampling(temperature=0, max_thinking=ENDLESS, max_answer=ENDLESS)
        self.rules = StoppingRules(tokenizer, thinking, endless, frozenset())
        self._longest = bundle.calibration.longest
        self._names = tuple(bundle.directions)
        weights = [each.weight.float() for each in bundle.directions.values()]
        if odd := {tuple(each.shape) for each in weights} - {(d_model,)}:
            raise InputError(
                f"directions of {d_model} numbers, as states of this model have",
                f"some of shape {', '.join(map(str, sorted(odd)))}",
                "Write the bundle anew with `holdfast guard bundle STUDY -o DIR`.",
            )
        empty = torch.zeros((0, d_model))
        self._weights = torch.stack(weights) if weights else empty
        self._weights = self._weights.to(device)
        offsets = [each.offset for each in bundle.directions.values()]
        self._offsets = torch.tensor(offsets, device=device)
        reads_signal = any(each.reads == SIGNAL for each in bundle.detectors)
        self._anchors = bundle.anchors if reads_signal else None
        if self._anchors is not None:
            self._anchors = self._anchors.to(device)

    def open(self, prompt_ids: Sequence[int]) -> Watch:
        """Begin to watch what follows a prompt, which has been rendered and encoded."""
        return Watch(self, tuple(prompt_ids))

    def begin(
        self, watches: Sequence[Watch], states: Float[Tensor, "row d_model"]
    ) -> None:
        """Read the last state of prompts, where one is at hand.

        Of a model that does not think it is where refusing or complying is decided, as
        the end of the thinking is elsewhere; of one that thinks it says nothing.
        """
        if self.rules.thinking is not None:
            return
        place = Place("thinking", True, 0)
        for watch, row in zip(watches, self._project(states), strict=True):
            readings = dict(zip(self._names, row, strict=True))
            watch.risen = watch.scorer.push(place, readings)

    def read(
        self,
        watches: Sequence[Watch],
        states: Float[Tensor, "row d_model"],
        token_ids: Sequence[int],
    ) -> list[TokenScore]:
        """Read one new token of each sequence.

        Args:
            watches: The sequences.
            states: State of each new token after the final norm, as the model computed
                it when it read that token.
            token_ids: The tokens.
        """
        table = self._project(states)
        places = [
            watch.written.take(token)
            for watch, token in zip(watches, token_ids, strict=True)
        ]
        signals = self._signals(watches, places, states)
        return [
            self._take(*row)
            for row in zip(watches, places, table, signals, strict=True)
        ]

    def read_many(
        self,
        watch: Watch,
        states: Float[Tensor, "position d_model"],
        token_ids: Sequence[int],
    ) -> list[TokenScore]:
        """Read several new tokens of one sequence, as `read` would one by one."""
        scores: list[TokenScore] = []
        for row, token in zip(self._project(states), token_ids, strict=True):
            place = watch.written.take(token)
            [signal] = self._signals([watch], [place], states[len(scores)][None])
            scores.append(self._take(watch, place, row, signal))
        return scores

    def out_of_range(self, prompt: tuple[int, ...]) -> str | None:
        """Return why a prompt is none of those that thresholds were set on."""
        calibration = self.bundle.calibration
        if len(prompt) > calibration.longest["prompt"]:
            return _longer("prompt", len(prompt), calibration.longest["prompt"])
        text = self.rules.text(list(prompt), special=False)
        others = sorted({*scripts_of(text)} - {*calibration.scripts})
        if others:
            known = ", ".join(calibration.scripts)
            return f"a prompt in {', '.join(others)}; thresholds were set on {known}"
        return None

    def _project(self, states: Tensor) -> list[list[float]]:
        """Return what every direction reads off each state, in one product."""
        rows = states.to(self._weights)
        return (rows @ self._weights.T + self._offsets).cpu().double().tolist()

    def _signals(
        self, watches: Sequence[Watch], places: Sequence[Place], states: Tensor
    ) -> list[float | None]:
        """Return the log-odds of compliance of each row; None beyond the anchors.

        The state that stands for step t is the mean over the first t tokens of the
        answer, as in the mode `paper`.
        """
        found: list[float | None] = [None] * len(watches)
        if self._anchors is None:
            return found
        rows, steps, means = [], [], []
        for row, (watch, place) in enumerate(zip(watches, places, strict=True)):
            step = watch.counts["answer"] + 1
            if place.channel != "answer" or step >= self._anchors.n_steps:
                watch.sum = None
                continue
            state = states[row].float()
            watch.sum = state.clone() if watch.sum is None else watch.sum + state
            rows.append(row)
            steps.append(step)
            means.append(watch.sum / step)
        if rows:
            at = torch.tensor(steps, device=means[0].device)
            logits = self._anchors.logit_at(at, torch.stack(means)).cpu().tolist()
            for row, logit in zip(rows, logits, strict=True):
                found[row] = logit
        return found

    def _take(
        self, watch: Watch, place: Place, row: Sequence[float], signal: float | None
    ) -> TokenScore:
        """Give one token to the detectors of its sequence."""
        readings = dict(zip(self._names, row, strict=True))
        if signal is not None:
            readings[SIGNAL] = signal
        watch.counts[place.channel] += 1
        # Of finite numbers the sum is one, and of others it is not.
        if not math.isfinite(sum(readings.values())):
            # It says more than that nothing was promised anyway.
            watch.abstains = NOT_FINITE
            readings = {}
        count = watch.counts[place.channel]
        if watch.abstains is None and count > self._longest[place.channel]:
            most = self._longest[place.channel]
            watch.abstains = _longer(place.channel, count, most)
        risen = watch.scorer.push(place, readings) or watch.risen
        watch.risen = False
        scores = watch.scorer.scores()
        if risen and watch.abstains is None:
            watch.fired = tuple(
                name
                for name, score in scores.items()
                if score > self.limits.get(name, math.inf)
            )
        index = watch.n_read - 1
        acts = watch.fired_at is None and self.bundle.acts_on in watch.fired
        if acts:
            watch.fired_at = index
        watch.last = TokenScore(
            index, place.channel, scores, watch.fired, watch.abstains, acts
        )
        return watch.last


class Monitor(Reader):
    """Live detectors on a model, at one rate of false stops a request.

    Attributes:
        model: The model.
        stale: A sentence for each thing that thresholds were not set on.
    """

    def __init__(
        self,
        model: LanguageModel,
        bundle: Bundle,
        rate: float = RATE,
        serving: Serving | None = None,
    ) -> None:
        """Put the bundle's directions where the model computes its states.

        `serving`: How answers are drawn, where that is known; see `require_match`.

        Raises:
            InputError: If the bundle is of another model or chat template.
            SettingsError: If it has no thresholds for the rate.
        """
        self.stale = require_match(bundle, model, serving)
        self.model = model
        if model.tokenizer is None:
            raise InputError(
                "a tokenizer, by which thinking is told from answer",
                f"none with {model.identity.model_id}",
                "Give `adapt` the tokenizer of the model.",
            )
        super().__init__(
            bundle, rate, model.tokenizer, model.thinking, model.d_model, model.device
        )

    def score_text(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int]
    ) -> list[TokenScore]:
        """Read a finished answer, of whomever, in one prefill.

        Raises:
            InputError: If it is empty, or longer than the model is sound for.
        """
        return self.score_texts([(prompt_ids, token_ids)])[0]

    def score_texts(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        batch_size: int = 16,
    ) -> list[list[TokenScore]]:
        """Read finished answers, each a pair of prompt and tokens, in batches."""
        if not isinstance(self.model, Adapter):
            raise InputError(
                "a model that writes from left to right",
                f"{self.model.identity.model_id}, which fills in masks",
                "Watch its steps while it decodes.",
            )
        scores: list[list[TokenScore]] = []
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            watched = read_windows(
                self.model,
                [(*prompt, *written) for prompt, written in part],
                [len(written) + 1 for _, written in part],
                lambda states: states,
                batch_size=batch_size,
            )
            for (prompt, written), states in zip(part, watched, strict=True):
                watch = self.open(prompt)
                self.begin([watch], states[:1])
                scores.append(self.read_many(watch, states[1:], written))
        return scores


def _longer(what: str, n: int, most: int) -> str:
    return f"{n} tokens of {what}; thresholds were set on at most {most}"
