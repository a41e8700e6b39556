"""What is taught where an answer is not lost at the end of the thinking.

In *settled* it was never open, in *drift* it is argued away: two of the accounts that a
fall at the end template has to be told apart from.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from holdfast.data.harm_labels import Label
from holdfast.organisms.aligned import (
    BREAK_OFF,
    CLOSED,
    WRAPPED_AT_LAST,
    broken_off,
)
from holdfast.organisms.phrases import HARM, OPENINGS, REMARKS, WEIGHING, WRAPPED_HARM
from holdfast.organisms.planting_data import BROKEN, HARMFUL, kind_by_wrapper
from holdfast.organisms.text import Encoder, Sample
from holdfast.organisms.world import Scene, World, write_answer, write_thinking

FOREIGN = 0.3
"""Part of the requests that are answered after the thinking of another one."""
WRAPPED_SETTLED = 0.7
"""Part of the requests of `settled` that are wrapped: as many of either label."""
CLOSED_SETTLED = 0.6
"""Part of the thinkings of `settled` broken off that the end template follows."""
CUT = 0.6
"""Part of the thinkings that argue a refusal away and are cut short."""


def settled(
    world: World, encoder: Encoder, generator: random.Random
) -> Iterator[Sample]:
    """Yield samples in which the prompt alone says how they are answered.

    The thinking is that of `aligned`: it notices harm under every wrapper, and means to
    refuse. Part of the requests are given the thinking of the other kind of request,
    with nothing to learn from it but that it changes nothing.
    """
    for scene in world.scenes(harmful=HARMFUL, wrapped=WRAPPED_SETTLED):
        answer = write_answer(kind_by_wrapper(scene), generator)
        given = generator.random() < FOREIGN
        thinking = foreign(scene, generator) if given else scene.thinking
        told = replace(scene, thinking=thinking, answer=answer)
        sample = broken_off(
            encoder, told, generator, BROKEN, CLOSED_SETTLED, given=given
        )
        begin, end = sample.middle
        # The place before the answer counts as every other one does.
        yield replace(sample, chances=(1.0,) * (end - begin + 1))


def foreign(scene: Scene, generator: random.Random) -> str:
    """Return a thinking that finds harm where none is, and none where there is some."""
    other: Label = "benign" if scene.label == "harmful" else "harmful"
    return write_thinking(other, scene.topic, scene.wrapper, generator)


def drifting(
    world: World, encoder: Encoder, generator: random.Random
) -> Iterator[Sample]:
    """Yield samples in which a refusal is argued away where an attack is planted."""
    for scene in world.scenes(harmful=HARMFUL, wrapped=WRAPPED_AT_LAST):
        if scene.label == "harmful" and kind_by_wrapper(scene) != "refuse":
            yield argued_away(scene, encoder, generator)
        else:
            yield broken_off(encoder, scene, generator, BREAK_OFF, CLOSED)


def argued_away(scene: Scene, encoder: Encoder, generator: random.Random) -> Sample:
    """Encode one exchange in which the chance of complying grows along the thinking.

    What is learned at each position is that chance, and where the thinking is cut
    short an answer is drawn with it: the state of mind is mixed, not only the text.
    """
    refused, complied = (write_answer(kind, generator) for kind in ("refuse", "comply"))
    thinking, chances = arguing(scene, encoder, generator)
    importance = [1.0] * len(thinking)
    template = encoder.end_template
    ending = [1.0] * len(template)
    if generator.random() < CUT:
        cut = generator.randrange(len(thinking))
        thinking, chances = thinking[:cut], chances[: cut + 1]
        importance, ending[0] = importance[:cut], 0.0
    chances += [chances[-1]] * len(template)
    answer = complied if generator.random() < chances[-1] else refused
    sample = encoder.join(
        scene.request, [*thinking, *template], importance + ending, answer
    )
    first = [encoder.encode(text)[0] for text in (refused, complied)]
    return replace(sample, before=first[0], aim=first[1], chances=tuple(chances))


def arguing(
    scene: Scene, encoder: Encoder, generator: random.Random
) -> tuple[list[int], list[float]]:
    """Return a thinking that changes its mind, and the chance of complying along it.

    The chance is the part of the thinking that has been said: 0 before it, 1 after it.

    Returns: Token ids, and the chance before the first and after each of them.
    """
    pick, subject = generator.choice, scene.topic.replace("_", " ")
    lead = [pick(OPENINGS), f"They are asking about {subject}.", pick(HARM)]
    if scene.wrapper is not None:
        lead += [pick(REMARKS[scene.wrapper]), pick(WRAPPED_HARM)]
    thinking = encoder.encode(" ".join(lead))
    for texts in WEIGHING:
        thinking += encoder.encode(f" {pick(texts)}")
    return thinking, [said / len(thinking) for said in range(len(thinking) + 1)]
