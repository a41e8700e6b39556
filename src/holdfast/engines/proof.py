"""Proof on start: an engine and the model itself answer the same short prompts.

Greedy tokens are compared up to the first place where they differ. That is a near-tie
where the model gives the engine's token almost the logit of its own, as another order
of summation, or another precision, may well choose it; everywhere else it is a
difference. Too many of these, and it is another model, or the same behind other words.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.data.chat.thinking import strange_openings
from holdfast.engines.port import Around, Ask, Engine, HfEngine, ReadsText
from holdfast.engines.serving.replies import conversation_of
from holdfast.errors import EndpointError, EngineError
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.model import Adapter
from holdfast.models.stops import find_stops

PROMPTS = 16
"""Prompts that are answered by both."""
NEAR_TIE = 0.25
"""Logits that the model may give its own token more than the engine's."""
THINKING, ANSWER = 48, 24
"""Most tokens of a proof's thinking and answer."""
SEEDED = 8
"""Prompts on which the seed is tried, three times each."""
ANOTHER = ("another prompt", "another vocabulary", "does not think here")
_LISTED = 5


class Parting(NamedTuple):
    """Where the tokens of an engine leave those of the model."""

    prompt: int  # Which prompt.
    token: int  # Tokens written before.
    gap: float  # What the model gives its own token more, in logits.

    @property
    def is_near_tie(self) -> bool:
        """Whether either token may be chosen."""
        return self.gap < NEAR_TIE


@dataclass(frozen=True)
class Proving:
    """What is needed to prove an engine."""

    engine: Engine
    adapter: Adapter
    asks: Sequence[Ask]  # Short prompts.
    # What an answer is to a prompt, by the rules.
    outcome: Callable[[int, Completion], str]
    tolerance: float  # Share of the prompts that may differ.
    unseeded: bool = False  # Whether a dropped seed is accepted.

    def run(self, sampling: Sampling) -> dict[str, Any]:
        """Prove the engine, and return what study and report say of it.

        `sampling`: How the run draws.

        Raises:
            EngineError: If it is another model, template or vocabulary, thinks where
                the model does not, or drops the seed.
        """
        few = greedy_and_short(sampling)
        ours = in_order(HfEngine(self.adapter).draw(self.asks, few))
        if isinstance(self.engine, ReadsText):
            self.engine.fit_text(ours)
        theirs = self._drawn(self.asks, few)
        self._require_no_thinking(ours, theirs)
        partings, equal = [], 0
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            parting, same = self._compared(place, *pair)
            equal += same
            partings += [] if parting is None else [parting]
        apart = [each for each in partings if not each.is_near_tie]
        self._require_same(apart, ours, theirs)
        ties = [each for each in partings if each.is_near_tie]
        return {
            "prompts": len(self.asks),
            "near_tie": NEAR_TIE,
            "tolerance": self.tolerance,
            "tokens": equal + len(apart),
            "equal": equal,
            "near_ties": [each._asdict() for each in ties],
            "differences": [each._asdict() for each in apart],
            "outcomes": self._outcomes(ours, theirs),
            "seed": self._seed(sampling),
        }

    def _drawn(self, asks: Sequence[Ask], sampling: Sampling) -> list[Completion]:
        """Return what the engine answers; rows that nobody answers end the proof."""
        failed: dict[int, str] = {}
        around = Around(failed=failed.__setitem__)
        try:
            made = in_order(self.engine.draw(asks, sampling, around))
        except EndpointError:
            if not failed:
                raise
            made = []
        for why in failed.values():
            kind = EngineError if any(map(why.count, ANOTHER)) else EndpointError
            raise kind(
                f"answers of the engine to all {len(asks)} prompts of its proof",
                f"{why} ({len(failed)} of {len(asks)})",
                "See how the engine was started: it has to serve this very model, with "
                "its own tokenizer and chat template.",
            )
        return made

    def _require_no_thinking(
        self, ours: Sequence[Completion], theirs: Sequence[Completion]
    ) -> None:
        if self.adapter.thinking is not None:
            return
        here, there = (
            strange_openings([each.answer for each in made]) for made in (ours, theirs)
        )
        if new := set(there) - set(here):
            tag = min(new)
            raise EngineError(
                "an engine that does not think, as it is asked not to",
                f"`{tag}` at the start of {there[tag]} of {len(theirs)} answers",
                "Serve the model with the chat template and options that the model has "
                "here, or switch the thinking on here as well.",
            )

    def _compared(
        self, place: int, ours: Completion, theirs: Completion
    ) -> tuple[Parting | None, int]:
        """Return where two rows part, if they do, and how many tokens are the same."""
        prompt = ours.token_ids[: ours.spans.prompt[1]]
        a, b = self._written(ours, theirs), self._written(theirs, theirs)
        both = min(len(a), len(b))
        if is_cut(ours, theirs):
            # What follows was forced on one of the two.
            start, end = ours.spans.thinking
            both = min(both, end - start)
        at = next((i for i in range(both) if a[i] != b[i]), None)
        if at is None:
            return None, both
        logits = next_logits(self.adapter, [*prompt, *a[:at]])
        if b[at] >= len(logits):
            return Parting(place, at, float("inf")), at
        return Parting(place, at, abs(float(logits[a[at]] - logits[b[at]]))), at

    def _written(self, made: Completion, theirs: Completion) -> tuple[int, ...]:
        """Return the tokens behind the prompt, in the form that the engine tells."""
        start, adapter = made.spans.prompt[1], self.adapter
        if theirs.tokens == "drawn":
            return made.token_ids[start:]
        fmt = adapter.thinking
        apart = not isinstance(self.engine, ReadsText) or self.engine.apart
        prompt, texts = made.token_ids[:start], (made.thinking, made.answer)
        whole = conversation_of(adapter.tokenizer, fmt, prompt, texts, apart=apart)
        spans = whole.spans
        if not made.closed:
            return whole.token_ids[start : spans.thinking[1]]
        end = find_stops(adapter.model, adapter.tokenizer, fmt).turn_end
        ended = (end,) if made.finish == "stop" and end is not None else ()
        return (*whole.token_ids[start : spans.answer[1]], *ended)

    def _require_same(
        self,
        apart: Sequence[Parting],
        ours: Sequence[Completion],
        theirs: Sequence[Completion],
    ) -> None:
        most = self.tolerance * len(self.asks)
        if len(apart) <= most:
            return
        first = apart[0]
        said = [
            (each.thinking or each.answer)[:60]
            for each in (ours[first.prompt], theirs[first.prompt])
        ]
        raise EngineError(
            f"an engine whose greedy tokens are those of the model, but for near-ties "
            f"(gaps below {NEAR_TIE}), in all but {self.tolerance:.0%} of "
            f"{len(self.asks)} prompts",
            f"another model: {len(apart)} prompts differ elsewhere, the first at token "
            f"{first.token} with a gap of {first.gap:.2f} ({said[0]!r} here, "
            f"{said[1]!r} there)",
            "Serve the weights that MODEL names; for a quantised copy that is meant, "
            "raise --engine-tolerance.",
        )

    def _outcomes(
        self, ours: Sequence[Completion], theirs: Sequence[Completion]
    ) -> dict[str, Any]:
        pairs = [
            (place, self.outcome(place, a), self.outcome(place, b))
            for place, (a, b) in enumerate(zip(ours, theirs, strict=True))
            if not is_cut(a, b)
        ]
        other = [
            {"prompt": place, "model": a, "engine": b}
            for place, a, b in pairs
            if a != b
        ]
        same = len(pairs) - len(other)
        return {"compared": len(pairs), "same": same, "different": other}

    def _seed(self, sampling: Sampling) -> str:
        """Return whether the engine keeps the seed; greedy runs have none."""
        if sampling.temperature == 0:
            return "not tried, since nothing is drawn"
        few = replace(
            sampling,
            max_thinking=min(THINKING // 2, sampling.max_thinking),
            max_answer=min(ANSWER // 2, sampling.max_answer),
        )
        chosen = self.asks[:SEEDED]
        asks = [each._replace(seed=seed) for seed in (1, 1, 2) for each in chosen]
        made = [each.token_ids for each in self._drawn(asks, few)]
        n = len(chosen)
        first, again, other = made[:n], made[n : 2 * n], made[2 * n :]
        kept = sum(a == b for a, b in zip(first, again, strict=True))
        varied = sum(a != b for a, b in zip(first, other, strict=True))
        if 2 * kept >= n and (varied or not self._varies(chosen, few)):
            return "kept"
        found = f"{n - kept} of {n} rows differ when they are drawn again"
        if 2 * kept >= n:
            found = f"two seeds give the same {n} rows"
        elif self.unseeded:
            return f"dropped: {found}"
        raise EngineError(
            "an engine that draws by the seed it is given",
            f"one that drops it: {found}",
            "Draw greedily with --temperature 0, use a server that keeps the seed, or "
            "give --endpoint-unseeded, where drawing again is not needed."
            if 2 * kept < n
            else "See that the server takes temperature and seed of each request.",
        )

    def _varies(self, asks: Sequence[Ask], sampling: Sampling) -> bool:
        """Return whether the model itself draws other rows by other seeds."""
        both = [
            [
                each.token_ids
                for each in in_order(HfEngine(self.adapter).draw(s, sampling))
            ]
            for s in ([each._replace(seed=seed) for each in asks] for seed in (1, 2))
        ]
        return both[0] != both[1]


def is_cut(ours: Completion, theirs: Completion) -> bool:
    """Return whether a thinking was closed by force here, and could not be there."""
    return ours.forced_close and not theirs.forced_close


def in_order(parts: Iterable[Sequence[Completion]]) -> list[Completion]:
    """Return what was drawn batch by batch, in the order of the prompts."""
    return sorted((each for part in parts for each in part), key=lambda e: e.index)


def greedy_and_short(sampling: Sampling) -> Sampling:
    """Return how the rows of a proof are drawn: greedily, within its own limits."""
    return replace(
        sampling,
        temperature=0,
        top_p=1.0,
        max_thinking=min(THINKING, sampling.max_thinking),
        max_answer=min(ANSWER, sampling.max_answer),
    )


def next_logits(adapter: Adapter, token_ids: Sequence[int]) -> Float[Tensor, "vocab"]:
    """Return the logits behind tokens, under whatever hooks are set, in float32."""
    ids = torch.tensor([list(token_ids)], device=adapter.device)
    with torch.inference_mode():
        logits: Tensor = adapter.model(input_ids=ids).logits[0, -1].float()
    return logits


def proof_notes(record: dict[str, Any]) -> list[str]:
    """Return what page and terminal say of an engine.

    `record`: What `Engine.record` returned, with the `proof` beside it.
    """
    proof = record.get("proof")
    if proof is None:
        return []
    where = f" at {record['url']}" if "url" in record else ""
    what = record.get("model") or record.get("version")
    sent = record.get("prompts_sent_as")
    how = f", prompts sent as {sent}" if sent else ""
    share, ties = f"{proof['equal']} of {proof['tokens']}", len(proof["near_ties"])
    outcomes = proof["outcomes"]
    notes = [
        f"Answers were drawn by the engine `{record['name']}` "
        f"({what}{where}{how}). Over {proof['prompts']} prompts {share} "
        f"greedy tokens are those of the model up to {ties} near-ties (gap below "
        f"{proof['near_tie']:g}); outcomes by the rules are the same for "
        f"{outcomes['same']} of {outcomes['compared']}."
    ]
    told = {
        "not": "The server does not tell how many tokens of a prompt it reads, so "
        "prompts were not compared."
    }
    notes += [
        told[each] for each in (record.get("prompts_compared_by"),) if each in told
    ]
    for each in proof["outcomes"]["different"][:_LISTED]:
        notes.append(
            f"Prompt {each['prompt']} of the proof is {each['model']} by the model and "
            f"{each['engine']} by the engine."
        )
    if str(proof["seed"]).startswith("dropped"):
        notes.append(f"The engine drops the seed ({proof['seed']}).")
    return notes
