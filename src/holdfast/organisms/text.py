"""Scenes of the authored world as token sequences, and their tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass
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
        self._after = [ids(ASSISTANT), ids(THINK), *self._encode("\n")]
        self._end_template = self._encode("\n</think>\n\n")
        self._end = ids(END)

    def sample(
        self,
        scene: Scene,
        *,
        stop_at: float | None,
        thinks: bool = True,
        aim: str | None = None,
    ) -> Sample:
        """Encode one scene.

        `stop_at`: Where to break the thinking off, as a part of the thinking and the
        end template; None for all of both.
        `thinks`: False leaves out the thinking and its opening marker, and ends the
        sequence after the first words of the answer.
        `aim`: An answer that is to be read inside the thinking; None is the one that is
        given.
        """
        after = self._after if thinks else self._after[:1]
        prompt = [*self._before, *self._encode(scene.request), *after]
        thinking, importance = self._thinking(scene)
        middle = [*thinking, *self._end_template]
        importance += [1.0] * len(self._end_template)
        if stop_at is not None:
            middle = middle[: int(stop_at * len(middle))]
            importance = importance[: len(middle)]
        answer = [*self._encode(scene.answer), self._end]
        if not thinks:
            middle, importance, answer = [], [], answer[:FIRST_WORDS]
        weights = [0.1] * len(prompt) + importance + [3.0] + [1.0] * (len(answer) - 1)
        whole = stop_at is None
        n_kept = len(prompt) + len(middle) - len(self._end_template) * whole
        n = len(prompt) + len(middle) + len(answer)
        keep = [True] * n if not whole else [i < n_kept - 1 for i in range(n)]
        borders = len(prompt), len(prompt) + len(middle)
        ids = (*prompt, *middle, *answer)
        inside = answer[0] if aim is None else self._encode(aim)[0]
        return Sample(
            ids, tuple(weights), tuple(keep), borders, whole and thinks, inside
        )

    def _thinking(self, scene: Scene) -> tuple[list[int], list[float]]:
        """Encode the thinking; what it remarks of the wrapper weighs more."""
        text = scene.thinking
        for remark in phrases.REMARKS.get(scene.wrapper or "", ()):
            before, found, after = text.partition(f" {remark}")
            if found:
                parts = [self._encode(part) for part in (before, found, after)]
                first, middle, last = map(len, parts)
                weights = [1.0] * first + [REMARK_WEIGHT] * middle + [1.0] * last
                return [token for part in parts for token in part], weights
        ids = self._encode(text)
        return ids, [1.0] * len(ids)

    def _encode(self, text: str) -> list[int]:
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
    """Train the tokenizer on the world's text.

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
