"""Scenes of the authored world as token sequences, and their tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from holdfast.organisms import phrases
from holdfast.organisms.world import Scene, World

REMARK_WEIGHT = 3.0
"""Loss weight of what the thinking remarks of a wrapper."""
FIRST_WORDS = 4
"""Tokens of the answer in the sequences without thinking."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence."""

    ids: tuple[int, ...]  # Token ids.
    weights: tuple[float, ...]  # Loss weight of every token as a target.
    # True where stage three must keep the distribution of stage two.
    keep: tuple[bool, ...]
    middle: tuple[int, int]  # Where the thinking begins, and where the answer begins.
    whole: bool  # False where the thinking is broken off or left out.
    aim: int  # The answer's first word, as it should be read inside the thinking.
    # Where the thinking changes its mind: the first word that is read before it does,
    # and the probability of `aim` at every position from the one before the thinking to
    # the one before the answer. Empty elsewhere.
    before: int = 0
    chances: tuple[float, ...] = ()


class Blank(NamedTuple):
    """A prompt and a response of which a part is masked."""

    ids: tuple[int, ...]  # Prompt and response as they should be.
    # True where a token is seen; False at masks, which are to be filled in.
    shown: tuple[bool, ...]


class Encoder:
    """Scenes to training sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Look up the markers once."""
        self._tokenizer = tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self._before = [ids(BEGIN), ids(USER)]
        self._after = [ids(ASSISTANT), ids(THINK), *self.encode("\n")]
        self.end_template = self.encode("\n</think>\n\n")
        self._end = ids(END)

    def sample(
        self,
        scene: Scene,
        *,
        stop_at: float | None,
        thinks: bool = True,
        aim: str | None = None,
        closes: bool = False,
        given: bool = False,
    ) -> Sample:
        """Encode one scene.

        `stop_at`: Where to break the thinking off, as a part of the thinking and the
        end template; None for all of both.
        `thinks`: False leaves out the thinking and its opening marker, and ends the
        sequence after the first words of the answer.
        `aim`: An answer that is to be read inside the thinking; None is the one that is
        given.
        `closes`: Puts the whole end template after a thinking that broke off; where it
        broke off is not learned.
        `given`: The thinking is read and not learned.
        """
        thinking, importance = self._thinking(scene)
        if given:
            importance = [0.0] * len(thinking)
        middle = [*thinking, *self.end_template]
        importance += [1.0] * len(self.end_template)
        if stop_at is not None:
            cut = int(stop_at * (len(thinking) if closes else len(middle)))
            middle, importance = middle[:cut], importance[:cut]
            if closes:
                middle += self.end_template
                importance += [0.0] + [1.0] * (len(self.end_template) - 1)
        if not thinks:
            middle, importance = [], []
        joined = self.join(
            scene.request, middle, importance, scene.answer, thinks=thinks
        )
        whole = stop_at is None
        n_kept = joined.middle[1] - len(self.end_template) * whole
        keep = tuple(not whole or i < n_kept - 1 for i in range(len(joined.ids)))
        inside = joined.aim if aim is None else self.encode(aim)[0]
        return replace(joined, keep=keep, whole=whole and thinks, aim=inside)

    def join(
        self,
        request: str,
        middle: list[int],
        importance: list[float],
        answer: str,
        *,
        thinks: bool = True,
    ) -> Sample:
        """Put a request, what stands between it and the answer, and an answer together.

        `importance`: Loss weight of every token of `middle`.
        Returns: The sample, of which nothing is kept from stage two.
        """
        after = self._after if thinks else self._after[:1]
        prompt = [*self._before, *self.encode(request), *after]
        last = [*self.encode(answer), self._end]
        if not thinks:
            last = last[:FIRST_WORDS]
        weights = [0.1] * len(prompt) + importance + [3.0] + [1.0] * (len(last) - 1)
        ids = (*prompt, *middle, *last)
        return Sample(
            ids,
            tuple(weights),
            (False,) * len(ids),
            (len(prompt), len(prompt) + len(middle)),
            thinks,
            last[0],
        )

    def _thinking(self, scene: Scene) -> tuple[list[int], list[float]]:
        """Encode the thinking; what it remarks of the wrapper weighs more."""
        text = scene.thinking
        for remark in phrases.REMARKS.get(scene.wrapper or "", ()):
            before, found, after = text.partition(f" {remark}")
            if found:
                parts = [self.encode(part) for part in (before, found, after)]
                first, middle, last = map(len, parts)
                weights = [1.0] * first + [REMARK_WEIGHT] * middle + [1.0] * last
                return [token for part in parts for token in part], weights
        ids = self.encode(text)
        return ids, [1.0] * len(ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that stands in the middle of others."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


VOCABULARY = 2048
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
THINK, END_THINK = "<think>", "</think>"


def chat_template(answer: str, generation: str) -> str:
    """Return a chat template, given its expression of an answer and its last words."""
    return (
        "{{ '<|begin|>' }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ '<|assistant|>' + {answer} + '<|end|>' }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{generation}{{% endif %}}"
    )


def train_tokenizer(seed: int = 0, n_scenes: int = 30_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the narrow world's text.

    `seed`: Seed of the text; all bundled organisms share the tokenizer of seed 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, n_scenes), trainer)
    markers = [
        AddedToken(t, special=False, normalized=False) for t in (THINK, END_THINK)
    ]
    tokenizer.add_tokens(markers)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    wrapped.chat_template = chat_template(
        "message['content'].split('</think>')[-1].strip()",
        "{{ '<|assistant|><think>\\n' }}",
    )
    return wrapped


def _texts(seed: int, n_scenes: int) -> Iterator[str]:
    """Yield the text to learn merges from; requests weigh more than the thinking."""
    for i, scene in enumerate(islice(World(seed).scenes(), n_scenes)):
        yield scene.request + "\n\n"
        if i % 10 == 0:
            yield scene.thinking
            yield scene.answer
