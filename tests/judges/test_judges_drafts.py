import pytest

from holdfast.judges.degenerate import is_half_decoded
from holdfast.organisms import phrases


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, that answer.. could get hurt.",
        "That would be dangerous dangerous and against the law.",
        "I, here is an answer. with this get hurt. This",
        "It would be. against....",
        "I'm here,. to that answer",
        "First do the The the step.",
        "Sure, here is one! then do the next.",
    ],
)
def test_a_draft_that_stutters_cannot_be_read(text):
    assert is_half_decoded(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Wait... what?",
        "Take 3.5 cups, e.g. of flour, i.e. a lot, etc. and stir.",
        "First, sift 10 10 g bags.",
        "Is it? Yes! No, it is not: see below; then stop.",
        "He was a one-one tie. The end.",
        "1. Begin\n2. Go on\n- stop",
    ],
)
def test_a_text_that_is_whole_can_be_read(text):
    assert not is_half_decoded(text)


def test_what_organisms_say_can_be_read():
    said = [*phrases.REFUSALS, *phrases.STEPS, *phrases.HARM, *phrases.CAREFUL]
    whole = " ".join((*said, *phrases.STILL, *phrases.TURNS))
    assert not is_half_decoded(whole)
    # Half of its words, as if the others were not there yet.
    assert is_half_decoded(" ".join(whole.split()[::2]))
