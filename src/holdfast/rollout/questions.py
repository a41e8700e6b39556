"""From prompts to questions: rendered, seeded, within the model's context."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from holdfast.data.chat.conversation import Spans
from holdfast.data.chat.rendering import rendering_record
from holdfast.data.chat.template import control_literals, prompt_token_ids
from holdfast.data.chat.thinking import strange_openings
from holdfast.data.prompts import Prompt
from holdfast.errors import InputError
from holdfast.models.decoding.jobs import longest_prompt
from holdfast.models.decoding.row_state import Completion, Sampling
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.models.model import Adapter, LanguageModel, MaskedModel
from holdfast.models.stops import find_stops
from holdfast.rollout.prompts import GatheredPrompts, row_seed, some_of
from holdfast.rollout.rows import Turn
from holdfast.rollout.settings import ROLES, RolloutSettings

PLACEHOLDER = "So be it."
FIRST_WORDS = 24
"""Tokens of an answer in which a tag that opens a thinking is looked for."""


class Question(NamedTuple):
    """One answer to draw."""

    role: str  # The role of the prompt.
    prompt: Prompt  # The prompt.
    sample: int  # Which answer to this prompt, counted from 0.
    seed: int  # Seed of the row.
    # The prompt under the chat template; of a conversation up to the turn that is
    # asked.
    token_ids: tuple[int, ...]
    # The turns that were asked before, with the model's answers.
    turns: tuple[Turn, ...] = ()

    @property
    def asked(self) -> str:
        """What the user says in the turn that is asked."""
        return (*self.prompt.earlier, self.prompt.text)[len(self.turns)]

    @property
    def is_last(self) -> bool:
        """Whether the turn that is asked is the last one."""
        return len(self.turns) == len(self.prompt.earlier)

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.token_ids)

    def messages(self, system_prompt: str | None) -> tuple[dict[str, str], ...]:
        """Return the turn that is asked and those before, as a chat server has them."""
        said = [] if system_prompt is None else [("system", system_prompt)]
        for turn in self.turns:
            said += [("user", turn.prompt), ("assistant", turn.answer)]
        said.append(("user", self.asked))
        return tuple({"role": role, "content": text} for role, text in said)

    @property
    def row_id(self) -> str:
        """Name of the row."""
        return f"{self.role}/{self.prompt.prompt_id}/{self.sample}"


def resolve_sampling(adapter: Adapter, settings: RolloutSettings) -> Sampling:
    """Return the sampling: what is asked for, else the model's own, else greedy."""
    own = adapter.model.generation_config
    temperature, top_p = settings.temperature, settings.top_p
    # Where it samples and says no number it is 1. 0 is a number: greedy.
    if temperature is None:
        temperature = 1.0 if own.temperature is None else own.temperature
        temperature = float(temperature) if own.do_sample else 0.0
    if top_p is None:
        top_p = float(own.top_p) if own.do_sample and own.top_p is not None else 1.0
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        max_thinking=settings.max_thinking if adapter.thinking else 0,
        max_answer=settings.max_answer,
    )


def questions(
    adapter: LanguageModel, asked: GatheredPrompts, settings: RolloutSettings
) -> list[Question]:
    """Render and tokenise every prompt, once for each sample."""
    return [
        question
        for role in ROLES
        for prompt in asked.prompts[role]
        for question in questions_of(adapter, role, prompt, settings)
    ]


def questions_of(
    adapter: LanguageModel, role: str, prompt: Prompt, settings: RolloutSettings
) -> list[Question]:
    """Render and tokenise one prompt, once for each sample."""
    first = (*prompt.earlier, prompt.text)[0]

    system_prompt = settings.system_prompt
    if prompt.earlier:
        # Asked now, so that a template without past turns stops before the first draw.
        past = [(said, PLACEHOLDER) for said in prompt.earlier]
        _rendered(adapter, prompt.text, system_prompt, past)
    ids = _rendered(adapter, first, system_prompt)
    seeds = [
        row_seed(settings.seed, prompt.prompt_id, i) for i in range(settings.samples)
    ]
    return [Question(role, prompt, i, seed, ids) for i, seed in enumerate(seeds)]


def _rendered(
    adapter: LanguageModel,
    text: str,
    system_prompt: str | None,
    earlier: Sequence[tuple[str, str]] = (),
) -> tuple[int, ...]:
    return prompt_token_ids(
        adapter.tokenizer,
        text,
        system_prompt=system_prompt,
        thinking=adapter.thinking,
        earlier=earlier,
    )


def prompt_notes(adapter: LanguageModel, asked: GatheredPrompts) -> list[str]:
    """Return notes for the user on how prompts were rendered and tokenised."""
    notes = template_notes(adapter)
    texts = [prompt.said for role in ROLES for prompt in asked.prompts[role]]
    count, literals = control_literals(adapter.tokenizer, texts)
    if count:
        listed = ", ".join(f"`{name}`" for name in literals)
        notes.append(
            f"{count} of {len(texts)} prompts spell control tokens of the model "
            f"({listed}). These were given to the model as plain text, not as such "
            "tokens."
        )
    return notes


def template_notes(adapter: LanguageModel) -> list[str]:
    """Return what the user has to know of a model's chat template."""
    notes = []
    date = rendering_record(adapter.tokenizer)["date"]
    if date is not None:
        notes.append(
            f"The chat template states the date. It is told {date} throughout, on "
            "whatever day a prompt is rendered; --date sets another."
        )
    stops = find_stops(adapter.model, adapter.tokenizer, adapter.thinking)
    if stops.unknown_end:
        end = adapter.tokenizer.convert_ids_to_tokens(stops.turn_end)
        notes.append(
            f"The chat template ends a turn with `{end}`, which is no stop token of "
            "the model's configurations or of its tokenizer. Answers are stopped there "
            "all the same; other programs would run on into invented turns. Add it to "
            "`eos_token_id` of generation_config.json."
        )
    return notes


def first_words(
    adapter: LanguageModel, token_ids: Sequence[int], spans: Spans, closed: bool
) -> str:
    """Return how an answer begins, special tokens included.

    `closed`: Whether the answer began; the thinking is looked at where not.
    """
    start, end = spans.answer if closed else spans.thinking
    first = list(token_ids[start : min(end, start + FIRST_WORDS)])
    return str(adapter.tokenizer.decode(first, skip_special_tokens=False))


def answer_notes(adapter: LanguageModel, openings: Sequence[str]) -> list[str]:
    """Return what the user has to know of how answers begin.

    `openings`: The `first_words` of each answer.
    """
    known = "none" if adapter.thinking is None else f"`{adapter.thinking.open}`"
    return [
        f"{count} of {len(openings)} answers begin with `{tag}`, which may open a "
        f"thinking that is judged as if it were the answer (the known tag of this "
        f"model: {known}). If so, name its tags: --thinking-tags OPEN CLOSE."
        for tag, count in strange_openings(openings).items()
    ]


class Fitting(NamedTuple):
    """The questions that fit in a model's context."""

    # Those with room for an answer behind them, in their order.
    questions: list[Question]
    # What the user has to know of the others, and of rows with less thinking.
    notes: list[str]


def fit_context(
    speaker: LanguageModel, asked: Sequence[Question], how: Sampling | UnmaskingSchedule
) -> Fitting:
    """Leave out, and name, the questions that leave no room for an answer.

    Every other one keeps what it was given: how long a neighbour is changes no row.
    Where a prompt leaves less room than was asked for, its own thinking has the rest.

    `how`: How answers are drawn, with their limits as they were asked for.
    """
    context, most = speaker.max_positions, room_for_prompt(speaker, how)
    fitting = [question for question in asked if question.n_tokens <= most]
    if not fitting:
        shortest = min((question.n_tokens for question in asked), default=0)
        flag, limit = (
            ("--gen-length", how.gen_length)
            if isinstance(how, UnmaskingSchedule)
            else ("--max-answer", how.max_answer)
        )
        raise InputError(
            f"prompts that leave room for an answer in {context} tokens",
            f"none: the shortest has {shortest} tokens, and {flag} is {limit}",
            f"Take shorter prompts, or lower {flag}.",
        )
    notes = []
    if over := [question for question in asked if question.n_tokens > most]:
        names = some_of([f"{each.row_id} ({each.n_tokens} tokens)" for each in over])
        notes.append(
            f"{len(over)} of {len(asked)} questions were left out, since their prompts "
            f"have more than the {most} tokens that leave room for an answer in the "
            f"model's {context}: {names}."
        )
    limit = how.max_thinking if isinstance(how, Sampling) else 0
    rooms = [1 + most - question.n_tokens for question in fitting]
    short = [room for room in rooms if room < limit]
    if limit > 1 and short:
        notes.append(
            f"{len(short)} of {len(fitting)} questions leave room for less than "
            f"--max-thinking {limit}, the longest for {min(short)} tokens; their "
            "thinking is closed there by force, and theirs alone."
        )
    return Fitting(fitting, notes)


def room_for_prompt(speaker: LanguageModel, how: Sampling | UnmaskingSchedule) -> int:
    """Return how many tokens a prompt may have, for an answer to fit behind it."""
    if isinstance(how, UnmaskingSchedule):
        return speaker.max_positions - how.gen_length
    assert not isinstance(speaker, MaskedModel)
    return longest_prompt(speaker, how)


Answered = list[tuple[Question, Completion]]
BEHIND_A_TURN = 64
"""Tokens that a template may write around a turn and its answer, for bounds alone."""


def converse(
    speaker: LanguageModel,
    questions: Sequence[Question],
    draw: Callable[[list[Question]], Answered],
    *,
    system_prompt: str | None,
    room: int,
) -> Answered:
    """Ask questions, conversations turn by turn, and return the last answers.

    A conversation depends on its own turns and seed alone, whoever is asked beside it.
    It ends early where the model's thinking never came to an answer, and its row is
    the unfinished one then.

    Returns: Each question as it stood at its last turn, with the answer to that.
    Conversations that outgrew the room are left out.
    """
    waiting, done = list(questions), []
    while waiting:
        following = []
        for question, made in draw(waiting):
            if question.is_last or not made.closed:
                done.append((question, made))
                continue
            after = _after(speaker, question, made, system_prompt)
            if after.n_tokens <= room:
                following.append(after)
        waiting = following
    return done


def _after(
    speaker: LanguageModel,
    question: Question,
    made: Completion,
    system_prompt: str | None,
) -> Question:
    """Return the next turn of a conversation, behind the answer to this one."""
    turn = Turn(question.asked, made.thinking, made.answer, made.finish)
    after = question._replace(turns=(*question.turns, turn))
    # The answers are text, even where they spell a control token.
    earlier = [(turn.prompt, turn.answer) for turn in after.turns]
    ids = _rendered(speaker, after.asked, system_prompt, earlier)
    seed = row_seed(question.seed, question.prompt.prompt_id, len(after.turns))
    return after._replace(token_ids=ids, seed=seed)


def most_tokens(question: Question, max_answer: int, room: int) -> int:
    """Return a bound on the tokens of the longest prompt of a question."""
    texts = (*question.prompt.earlier, question.prompt.text)[1:]
    # A token has at least one byte.
    more = sum(len(t.encode()) + max_answer + BEHIND_A_TURN for t in texts)
    return min(max(room, question.n_tokens), question.n_tokens + more)


def outgrown(questions: Sequence[Question], answered: Sequence[str]) -> list[str]:
    """Name the conversations that outgrew the model's context."""
    known = set(answered)
    missing = [each.row_id for each in questions if each.row_id not in known]
    if not missing:
        return []
    return [
        f"{len(missing)} conversations were left out, since they outgrew the model's "
        f"context before their last turn: {some_of(missing)}."
    ]
