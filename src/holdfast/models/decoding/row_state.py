"""One row while it decodes: sampling, what it has written, when it ends.

The state of a row depends on its own tokens alone, so the plan of batches cannot
change it. Token ids in, a frozen completion out.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import isnan
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.data.chat.conversation import (
    Spans,
    answer_stop,
    completion_spans,
    end_is_open,
    one_thought,
    token_texts,
)
from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.models.decoding.steps import Trace
from holdfast.models.finite import not_finite
from holdfast.ranges import require_all, require_finite

Finish = Literal["stop", "length"]
Tokens = Literal["drawn", "text", "lost"]
"""Tokens as drawn, their text tokenised again, or lost: they give another text back."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and how many."""

    temperature: int | float  # 0 takes the likeliest token.
    top_p: int | float = 1.0  # Smallest probability mass that is drawn from.
    max_thinking: int  # Tokens of thinking after which it is closed by force.
    max_answer: int  # Tokens of answer after which the row ends.

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_finite("temperature", (self.temperature,))
        rules = (
            ("a temperature of 0 or more", self.temperature, self.temperature >= 0),
            ("a top-p above 0 and up to 1", self.top_p, 0 < self.top_p <= 1),
            ("0 or more thinking tokens", self.max_thinking, self.max_thinking >= 0),
            ("1 or more answer tokens", self.max_answer, self.max_answer >= 1),
        )
        require_all(rules)


class Drafting(NamedTuple):
    """How the response of a masked-diffusion model came about."""

    response: tuple[int, ...]  # All of its tokens; it goes on after the stop token.
    committed_at: tuple[int, ...]  # The step at which each of them was committed to.
    # The whole response as it was predicted at every step.
    drafts: tuple[tuple[int, ...], ...]

    @property
    def n_steps(self) -> int:
        """Steps that the row took."""
        return len(self.drafts)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt."""

    index: int  # Place of the prompt in the order given.
    # Prompt, and all that follows it, forced tokens and the stop token included.
    token_ids: tuple[int, ...]
    # Regions of `token_ids`, as `data.conversation.completion_spans` draws them; a stop
    # token or marks that end the answer belong to none. A model without a thinking
    # format has empty thinking. Thinking that never ended reaches to the end, and end
    # template and answer are empty.
    spans: Spans
    thinking: str  # Text of the thinking, without tags.
    answer: str  # Text of the answer.
    # "stop" if the model stopped by itself, "length" at a limit, "guard" by a control.
    finish: Finish | Literal["guard"]
    forced_close: bool  # Whether the thinking passed its limit and was closed by force.
    closed: bool  # Whether the answer began; True for a model without thinking.
    # Smallest difference of the two largest logits over the steps where a token was
    # chosen. Under greedy decoding rows below 1e-4 may differ between batch plans or
    # machines.
    min_top2_gap: float
    # Smallest distance, in probability, of the random number to the next token's share;
    # infinite under greedy decoding. It says for drawn tokens what the gap says for
    # greedy ones; in float32, where the CDF is good to about 1e-7, rows below 1e-6 may
    # differ between batch plans.
    min_margin: float
    # How a diffusion row came about; None for a row written left to right, or where
    # nobody asked.
    drafting: Drafting | None = None
    # Whose the tokens are; those that are lost say nothing of states.
    tokens: Tokens = "drawn"
    # How each token came about, where an observer looked on; None elsewhere.
    trace: Trace | None = field(default=None, compare=False, repr=False)

    @property
    def told_gap(self) -> float | None:
        """The smallest gap of the logits; None where the engine did not tell it."""
        return None if isnan(self.min_top2_gap) else self.min_top2_gap


class Choice(NamedTuple):
    """A token that was chosen, and how close the choice was."""

    token: int
    gap: float
    margin: float


@dataclass(frozen=True)
class StoppingRules:
    """When thinking closes and a row ends; each row has them within its own room."""

    tokenizer: Any  # Tokenizer of the model.
    thinking: ThinkingFormat | None  # Its thinking format, or None.
    sampling: Sampling  # Limits on tokens.
    stop_ids: frozenset[int]  # Tokens that end a row.
    answer_end: str = ""  # Marks that end an answer, and with it a row; "" for none.
    _ends_mark: dict[tuple[int, str], bool] = field(default_factory=dict)
    # Rows with one draft end their thinking in the same tokens.
    _spans: dict[tuple[int, ...], tuple[Spans, bool]] = field(default_factory=dict)

    @cached_property
    def template_ids(self) -> tuple[int, ...]:
        """Tokens of the end template."""
        if self.thinking is None:
            return ()
        encoded = self.tokenizer(self.thinking.end_template, add_special_tokens=False)
        return tuple(encoded["input_ids"])

    @property
    def budget(self) -> int:
        """Most tokens that a row may have after its prompt."""
        if self.thinking is None:
            return self.sampling.max_answer
        limits = self.sampling.max_thinking + self.sampling.max_answer
        return limits + len(self.template_ids)

    @property
    def least(self) -> int:
        """Fewest tokens that a row needs room for: an answer, and a thought before."""
        if self.thinking is None:
            return self.budget
        spare = max(0, self.sampling.max_thinking - 1)
        return self.budget - spare

    def within(self, room: int) -> "StoppingRules":
        """Return the rules of a row that has so much room, at least `least` tokens.

        What is missing is taken from its thinking; the answer keeps its limit.
        """
        missing = self.budget - room
        if missing <= 0:
            return self
        left = self.sampling.max_thinking - missing
        return replace(self, sampling=replace(self.sampling, max_thinking=left))

    @property
    def window(self) -> int:
        """Tokens from the end that hold the closing tag and what leads to it."""
        # A token has at least one byte.
        return 0 if self.thinking is None else _bytes(self.thinking.end_template) + 1

    def closes(self, tail: list[int]) -> bool:
        """Return whether the last of these tokens completes the closing tag."""
        return self.thinking is not None and self._completes(tail, self.thinking.close)

    def ends_answer(self, tail: list[int]) -> bool:
        """Return whether the last of these tokens completes what ends the answer."""
        mark = self.answer_end.strip()
        return bool(mark) and self._completes(tail[-_bytes(mark) - 1 :], mark)

    def _completes(self, tail: list[int], mark: str) -> bool:
        key = tail[-1], mark[-1]
        if key not in self._ends_mark:
            self._ends_mark[key] = mark[-1] in self.text([tail[-1]])
        return self._ends_mark[key] and mark in self.text(tail)

    def spans(self, tail: tuple[int, ...]) -> tuple[Spans, bool]:
        """Return the regions of tokens around the end of the thinking.

        Returns: The regions, and whether what comes next can no longer change them.
        """
        if self.thinking is not None and tail not in self._spans:
            spans = completion_spans(self.tokenizer, tail, 0, self.thinking)
            goes_on = end_is_open(self.text(list(tail)), self.thinking)
            begun = spans.end_template[1] < len(tail)
            self._spans[tail] = spans, begun and not goes_on
        return self._spans[tail]

    def thought(self, token_ids: list[int]) -> str:
        """Return the text of a thinking, without special tokens or tags inside it."""
        written = self.text(token_ids)
        if self.thinking is not None:
            joined = one_thought(written, self.thinking)
            if joined != written:
                return joined
        return self.text(token_ids, special=False)

    def text(self, token_ids: list[int], *, special: bool = True) -> str:
        """Return the text of tokens, with or without special ones."""
        return str(
            self.tokenizer.decode(
                token_ids,
                skip_special_tokens=not special,
                clean_up_tokenization_spaces=False,
            )
        )


def _bytes(text: str) -> int:
    return len(text.encode())


class GenerationState:
    """A prompt and what has been written after it so far."""

    def __init__(
        self, index: int, prompt: tuple[int, ...], rules: StoppingRules
    ) -> None:
        """Start with a prompt; a thinking limit of 0 closes the thinking at once."""
        self.index = index
        self.n_prompt = len(prompt)
        self.token_ids = list(prompt)
        self.finish: Finish | Literal["guard"] | None = None
        self.forced_close = False
        self._rules = rules
        self._queue: deque[int] = deque()
        self._template: tuple[int, int] | None = None
        self._tail_start = 0
        self._settled = self._ended = False
        self._gap = self._margin = float("inf")
        if rules.thinking is None:
            self._template, self._settled = (self.n_prompt, self.n_prompt), True
        elif rules.sampling.max_thinking == 0:
            self._force()

    def push(self, choice: Choice) -> int:
        """Take the next token: the choice, or a forced one in its place.

        Returns:
            The token that was taken.

        Raises:
            ModelError: If the logits were not finite, so that nothing was chosen.
        """
        if isnan(choice.gap):
            raise not_finite(f"the row of prompt {self.index}, counted from 0")
        if self._queue:
            token = self._queue.popleft()
            self.token_ids.append(token)
            return token
        self.token_ids.append(choice.token)
        self._gap = min(self._gap, choice.gap)
        self._margin = min(self._margin, choice.margin)
        if choice.token in self._rules.stop_ids:
            self.finish = "stop"
        elif self._template is None:
            self._think()
        else:
            self._answer()
        if self.finish is None and self.n_written >= self._rules.budget:
            self.finish = "length"
        return choice.token

    @property
    def answering(self) -> bool:
        """Whether the last token that was taken belongs to the answer."""
        return self._template is not None and len(self.token_ids) > self._template[1]

    def complete(self) -> Completion:
        """Return the row as a frozen completion."""
        rules, n_prompt = self._rules, self.n_prompt
        stop = len(self.token_ids) - (self.finish == "stop" and not self._ended)
        start, end = self._template or (stop, stop)
        answer = rules.text(self.token_ids[end:stop], special=False)
        if self._ended:
            stop, answer = self._without_end(end, answer)
        spans = Spans((0, n_prompt), (n_prompt, start), (start, end), (end, stop))
        return Completion(
            index=self.index,
            token_ids=tuple(self.token_ids),
            spans=spans,
            thinking=rules.thought(self.token_ids[n_prompt:start]),
            answer=answer,
            finish=self.finish or "length",
            forced_close=self.forced_close,
            closed=self._template is not None,
            min_top2_gap=self._gap,
            min_margin=self._margin,
        )

    @property
    def n_written(self) -> int:
        """Tokens after the prompt so far."""
        return len(self.token_ids) - self.n_prompt

    @property
    def longest(self) -> int:
        """Most tokens that the row can come to, its prompt included."""
        return self.n_prompt + self._rules.budget

    @property
    def is_thinking(self) -> bool:
        """Whether the closing tag of the thinking has not been written yet."""
        return self._template is None

    @property
    def left(self) -> int:
        """Most tokens to choose before a limit of the row is met."""
        sampling, n_written = self._rules.sampling, self.n_written
        if self._template is None:
            return sampling.max_thinking - n_written
        begun = len(self.token_ids) - self._template[1]
        # White space after the tag may still turn out to be template.
        more = 0 if self._settled else len(self._rules.template_ids)
        most = sampling.max_answer - begun + more
        return min(most, self._rules.budget - n_written)

    def take_forced(self) -> bool:
        """Take all tokens that are forced now; return whether there were any."""
        forced = list(self._queue)
        self.token_ids += forced
        self._queue.clear()
        return bool(forced)

    def _think(self) -> None:
        start = max(self.n_prompt, len(self.token_ids) - self._rules.window)
        if self._rules.closes(self.token_ids[start:]):
            self._tail_start = start
            self._answer()
        elif self.n_written >= self._rules.sampling.max_thinking:
            self._force()

    def _force(self) -> None:
        template = self._rules.template_ids
        # A closing tag of several tokens may have been begun, and is then finished.
        written = tuple(self.token_ids[self.n_prompt :])
        begun = range(min(len(template), len(written)), 0, -1)
        n = next((n for n in begun if written[-n:] == template[:n]), 0)
        n = n if self._rules.text(list(template[:n])).strip() else 0
        start = len(self.token_ids) - n
        self._queue.extend(template[n:])
        self._template = (start, start + len(template))
        self.forced_close = self._settled = True

    def _answer(self) -> None:
        if not self._settled:
            self._draw_template()
        _, end = self._template or (0, 0)
        if self._settled and self._rules.ends_answer(self.token_ids[end:]):
            self.finish, self._ended = "stop", True
        elif len(self.token_ids) - end >= self._rules.sampling.max_answer:
            self.finish = "length"

    def _without_end(self, end: int, answer: str) -> tuple[int, str]:
        """Return where the marks that end the answer begin, and the text before them.

        `answer`: Text of the answer with those marks, where they are no special tokens.
        """
        mark, tail = self._rules.answer_end, self.token_ids[end:]
        texts = token_texts(self._rules.tokenizer, tail)
        starts = [0, *accumulate(map(len, texts))]
        at = answer_stop("".join(texts), mark) or 0
        # A token that holds the last of the answer is answer.
        n = next(i for i, start in enumerate(starts) if start >= at)
        shown = answer_stop(answer, mark)
        if shown is None:
            return end + n, self._rules.text(tail[:n], special=False)
        return end + n, answer[:shown]

    def _draw_template(self) -> None:
        # White space after the tag may still belong to the template, until a token
        # has come that does not.
        offset = self._tail_start
        spans, self._settled = self._rules.spans(tuple(self.token_ids[offset:]))
        start, end = spans.end_template
        self._template = (offset + start, offset + end)


class Chosen(NamedTuple):
    """One token a row, and how close each choice was (see `Completion`)."""

    tokens: Int[Tensor, "example"]
    gaps: Float[Tensor, "example"]
    margins: Float[Tensor, "example"]


def sample_token(
    logits: Float[Tensor, "example vocab"],
    uniforms: Float[Tensor, "example"],
    sampling: Sampling,
) -> Chosen:
    """Choose one token a row: the likeliest, or by inverse CDF.

    The CDF runs in the order of the vocabulary, not of the probabilities: two
    tokens that are almost equally likely would swap places in a sorted CDF, and a
    difference of rounding would change the token. Sums are in float64.

    Returns:
        Tokens, gaps of the two largest logits, and margins of the random numbers. The
        gap is not a number where a logit is not finite; `push` stops there.
    """
    top = logits.topk(2, dim=-1)
    gaps = (top.values[:, 0] - top.values[:, 1]).double()
    # One sum a row: of finite logits it is finite, and of others it is not.
    gaps = gaps.where(logits.sum(-1).isfinite(), torch.nan)
    if sampling.temperature == 0:
        return Chosen(top.indices[:, 0], gaps, torch.full_like(gaps, torch.inf))
    shares = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        shares = _nucleus(shares, sampling.top_p)
    cdf = shares.cumsum(-1)
    total = cdf[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    point = torch.minimum(uniforms[:, None] * total, below_total)
    # Where a logit is not finite, the place would be beyond the vocabulary.
    tokens = torch.searchsorted(cdf, point, right=True).clamp(max=cdf.shape[1] - 1)
    upper = cdf.gather(-1, tokens)
    lower = upper - shares.gather(-1, tokens)
    # The outer ends of the CDF are no border to another token.
    to_next = torch.where(upper >= below_total, torch.inf, upper - point)
    to_previous = torch.where(lower <= 0, torch.inf, point - lower)
    margins = torch.minimum(to_next, to_previous).clamp(min=0)
    return Chosen(tokens[:, 0], gaps, margins[:, 0])


def _nucleus(
    shares: Float[Tensor, "example vocab"], top_p: float
) -> Float[Tensor, "example vocab"]:
    ordered, tokens = shares.sort(stable=True, dim=-1, descending=True)
    # A token stays if those before it do not yet hold the mass.
    outside = ordered.cumsum(-1) - ordered >= top_p
    return shares.masked_fill(outside.scatter(-1, tokens, outside), 0.0)


def uniforms_of(seed: int, n_steps: int) -> Float[Tensor, "step"]:
    """Return the random numbers of a row, one per step, whatever stands beside it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_steps, generator=generator, dtype=torch.float64)
