"""Policies on our own decoding: observe, stop, refuse, steer, redraw.

The state of a token is there when the next one is about to be chosen, so a policy acts
one token after the one at which a detector fired, and costs no pass of its own.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from holdfast.data.chat.conversation import Spans
from holdfast.errors import SettingsError
from holdfast.guard.monitor.monitor import Monitor, Policy, TokenScore, Watch
from holdfast.judges.base import Exchange, Judge, harmful
from holdfast.judges.verdict import Verdict
from holdfast.models.decoding.generate import decoding_steps, generate
from holdfast.models.decoding.jobs import Prompts
from holdfast.models.decoding.row_state import Completion, GenerationState, Sampling
from holdfast.models.interventions import HeadEdit, LiveEdit, check_table
from holdfast.models.model import Adapter

MESSAGE = "I'm sorry, but I can't help with that."
_FAR = 1 << 40
"""A position that no row comes to."""
_ENDS = ("stop", "refuse", "redraw")


class Guard:
    """What stands between the reading of a token and the choice of the next one.

    Attributes:
        monitor: The detectors.
        policy: What is done to a row once its detector has fired.
        watches: What is known of each row, by its prompt.
    """

    def __init__(
        self, monitor: Monitor, policy: Policy = "observe", message: str = MESSAGE
    ) -> None:
        """Choose what is done.

        `message`: What is said in place of the rest, under the policy `refuse`.

        Raises:
            SettingsError: If the bundle has no edit to steer with.
        """
        self.monitor, self.policy = monitor, policy
        self.watches: dict[int, Watch] = {}
        self._said: dict[int, list[int]] = {}
        require_policy(monitor, policy)
        encode = monitor.rules.tokenizer
        self._message = list(encode(message, add_special_tokens=False)["input_ids"])

    def __call__(
        self,
        rows: Sequence[GenerationState],
        states: Float[Tensor, "example d_model"],
        live: LiveEdit,
    ) -> dict[int, int]:
        """Read the last token of every row, and act; a `Control`."""
        going = [number for number, row in enumerate(rows) if row.finish is None]
        fresh = [number for number in going if rows[number].n_written == 0]
        for number in fresh:
            row = rows[number]
            self.watches[row.index] = self.monitor.open(row.token_ids)
            self._said.pop(row.index, None)
        if fresh:
            opened = [self.watches[rows[number].index] for number in fresh]
            self.monitor.begin(opened, states[fresh])
        begun = [number for number in going if rows[number].n_written > 0]
        if not begun:
            return {}
        scores = self.monitor.read(
            [self.watches[rows[number].index] for number in begun],
            states[begun],
            [rows[number].token_ids[-1] for number in begun],
        )
        for number, score in zip(begun, scores, strict=True):
            if score.acts:
                self._act(rows[number], live)
        if self.policy == "steer" and any(score.acts for score in scores):
            live.take([row.index for row in rows])
        return self._forced([(number, rows[number]) for number in begun])

    def edit(self, n_rows: int) -> HeadEdit | None:
        """Return the edit that is to be at hand while rows decode; at first nowhere."""
        if self.policy != "steer" or self.monitor.bundle.edit is None:
            return None
        return HeadEdit(self.monitor.bundle.edit, ((_FAR, None),) * n_rows)

    def _act(self, row: GenerationState, live: LiveEdit) -> None:
        """Do to a row what the policy says, at the token at which it fires."""
        if self.policy == "refuse":
            ends = self.monitor.rules.template_ids if row.is_thinking else ()
            self._said[row.index] = [*ends, *self._message]
        elif self.policy in _ENDS:
            row.finish = "guard"
        elif self.policy == "steer":
            live.begin(row.index, len(row.token_ids))

    def _forced(self, rows: Sequence[tuple[int, GenerationState]]) -> dict[int, int]:
        """Return the next token of each message; end rows whose message is said."""
        forced = {}
        for number, row in rows:
            said = self._said.get(row.index)
            if said:
                forced[number] = said.pop(0)
            elif said is not None:
                row.finish = "guard"
        return forced


def require_policy(monitor: Monitor, policy: str) -> None:
    """Refuse what is no policy, and to steer without heads to scale.

    Raises:
        SettingsError: If there is no such policy, or the bundle has no edit for it, or
            one of another model's heads.
        AdapterError: If heads of this model cannot be read.
    """
    # A slip of the pen would watch, and let everything through.
    if policy not in get_args(Policy):
        raise SettingsError(
            f"a policy among {', '.join(get_args(Policy))}",
            repr(policy),
            "Choose one; `observe` lets answers go on.",
        )
    if policy in ("steer", "redraw") and monitor.bundle.edit is None:
        raise SettingsError(
            f"a bundle with an edit of heads, for the policy {policy}",
            "one without",
            "Write it with `holdfast guard bundle STUDY --edit FILE`.",
        )
    if policy in ("steer", "redraw") and monitor.bundle.edit is not None:
        adapter = adapter_of(monitor)
        adapter.require("heads")
        check_table(adapter, monitor.bundle.edit)


@dataclass(frozen=True)
class Guarded:
    """An answer, and what the monitor saw of it."""

    completion: Completion  # What is there in the end.
    # Scores at its last token that was watched; None where nothing was written.
    last: TokenScore | None
    fired_at: int | None  # Token at which it fired, counted from 0; None if it did not.
    first: (
        Completion  # What was written before anything was drawn again; else the same.
    )


def guarded(
    monitor: Monitor,
    prompts: Prompts,
    sampling: Sampling,
    *,
    policy: Policy = "observe",
    message: str = MESSAGE,
    batch_size: int = 32,
    stop_ids: Collection[int] | None = None,
) -> list[Guarded]:
    """Answer prompts under watch, in their order.

    Arguments and errors are those of `generate`. Rows that do not fire are those of
    `generate` without a guard, whatever is done to rows beside them.
    """
    guard = Guard(monitor, policy, message)
    adapter = adapter_of(monitor)
    batches = generate(
        adapter,
        prompts,
        sampling,
        batch_size=batch_size,
        stop_ids=stop_ids,
        edit=guard.edit(len(prompts)),
        control=guard,
    )
    written = {each.index: each for batch in batches for each in batch}
    final = dict(written)
    fired = [
        index
        for index, watch in guard.watches.items()
        if policy == "redraw" and watch.fired_at is not None
    ]
    if fired:
        seeds = [prompts[index][1] for index in fired]
        again = redraw(
            monitor, [written[index] for index in fired], seeds, sampling, batch_size
        )
        final |= dict(zip(fired, again, strict=True))
    return [
        Guarded(
            final[index],
            guard.watches[index].last,
            guard.watches[index].fired_at,
            written[index],
        )
        for index in range(len(prompts))
    ]


def redraw(
    monitor: Monitor,
    completions: Sequence[Completion],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int = 32,
) -> list[Completion]:
    """End the thinking of answers again with the bundle's edit, and answer anew.

    The thinking is what it was, as far as it had come; from its end on the edit acts.

    Raises:
        SettingsError: If the bundle has no edit.
    """
    require_policy(monitor, "redraw")
    edit = monitor.bundle.edit
    assert edit is not None
    ends = monitor.rules.template_ids
    kept = [each.token_ids[: each.spans.thinking[1]] for each in completions]
    ranges = tuple((len(ids), None) for ids in kept)
    asked = [((*ids, *ends), seed) for ids, seed in zip(kept, seeds, strict=True)]
    batches = generate(
        adapter_of(monitor),
        asked,
        sampling,
        batch_size=batch_size,
        edit=HeadEdit(edit, ranges),
        thinking_done=True,
    )
    drawn = {each.index: each for batch in batches for each in batch}
    return [
        _joined(before, drawn[number], len(ends))
        for number, before in enumerate(completions)
    ]


def _joined(before: Completion, drawn: Completion, n_ends: int) -> Completion:
    """Return an answer that was drawn again behind its old thinking."""
    start = before.spans.thinking[1]
    end = (start, start + n_ends)
    spans = Spans(before.spans.prompt, before.spans.thinking, end, drawn.spans.answer)
    return replace(
        drawn,
        index=before.index,
        spans=spans,
        thinking=before.thinking,
        forced_close=before.forced_close or not before.closed,
        closed=True,
    )


def stream(
    monitor: Monitor,
    prompt: str | Sequence[int],
    seed: int,
    sampling: Sampling,
    *,
    policy: Policy = "observe",
    message: str = MESSAGE,
) -> Iterator[tuple[int, TokenScore | None]]:
    """Answer one prompt, and yield each token with its scores.

    A token is held back until it has been read, which is one step. Under `stop` the
    token at which it fires is not let out. Tokens of a message that is said in place of
    the rest, and the last token of an answer, which is never read, have no scores.

    Raises:
        SettingsError: For `redraw`, which takes back what was let out.
    """
    if policy == "redraw":
        raise SettingsError(
            "a policy that lets stand what was let out",
            "redraw, which draws an answer again",
            "Use `guarded`, or the policy steer.",
        )
    guard = Guard(monitor, policy, message)
    steps = decoding_steps(
        adapter_of(monitor),
        [(prompt, seed)],
        sampling,
        edit=guard.edit(1),
        control=guard,
    )
    held: int | None = None
    for step in steps:
        if held is not None:
            watch = guard.watches[0]
            if policy == "stop" and watch.fired_at is not None:
                return
            said = policy == "refuse" and _is_behind(watch)
            yield held, None if said else watch.last
        fresh = bool(step.fresh[0].any())
        held = int(step.predicted[0, -1]) if fresh else None
    if held is not None:
        yield held, None


def _is_behind(watch: Watch) -> bool:
    """Return whether the last token stands behind the one that fired."""
    return watch.fired_at is not None and watch.n_read > watch.fired_at + 1


class Opinion(NamedTuple):
    """What is said of an answer in the end."""

    flagged: bool
    # What the slower judge said; None where it was not asked.
    verdict: Verdict | None


def second_opinions(
    monitor: Monitor,
    answers: Sequence[Guarded],
    requests: Sequence[str],
    judge: Judge,
    loose: float,
) -> list[Opinion]:
    """Ask a slower judge about those answers alone of which the monitor is unsure.

    Sure is what fires at the monitor's own rate, and what does not fire at a looser one
    either. Between the two, and where it abstains, the judge decides. A judge that
    measures refusal alone clears refusals; what a judge cannot read is flagged.

    Args:
        monitor: The monitor, at a strict rate.
        answers: Answers that were written under the policy `observe`.
        requests: What was asked, for the judge to see.
        judge: Anything that turns exchanges into verdicts, such as a guard model.
        loose: The other rate; at most this share of benign requests costs a call, as
            far as nothing abstains.

    Raises:
        SettingsError: If the bundle has no such rate, or it is not the looser one.
    """
    name = monitor.bundle.acts_on
    strict, other = monitor.limits[name], monitor.bundle.at(loose)[name].value
    if other > strict:
        raise SettingsError(
            f"a looser rate than {monitor.rate:g}", f"{loose:g}", "Give a higher one."
        )

    def unsure(answer: Guarded) -> bool:
        last = answer.last
        if last is None or last.abstains is not None:
            return True
        return other < last.scores.get(name, -math.inf) <= strict

    asked = [index for index, answer in enumerate(answers) if unsure(answer)]
    shown = [
        Exchange(
            request=requests[index],
            response=answers[index].completion.answer,
            thinking=answers[index].completion.thinking,
            closed=answers[index].completion.closed,
        )
        for index in asked
    ]
    said = dict(zip(asked, judge.judge(shown), strict=True))
    return [
        Opinion(_harms(said[index]), said[index])
        if index in said
        else Opinion(answer.fired_at is not None, None)
        for index, answer in enumerate(answers)
    ]


def _harms(verdict: Verdict) -> bool:
    """Return whether an answer is flagged by a verdict, be it of harm or of refusal."""
    found = harmful(verdict)
    return verdict.outcome != "refused" if found is None else found


def adapter_of(monitor: Monitor) -> Adapter:
    """Return the model of a monitor, if it writes from left to right."""
    if not isinstance(monitor.model, Adapter):
        raise SettingsError(
            "a model that writes from left to right",
            f"{monitor.model.identity.model_id}, which fills in masks",
            "Watch its steps with `guard.monitor.denoising`.",
        )
    return monitor.model
