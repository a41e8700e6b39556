"""Overlap: symmetric, full with itself, and the same as comparing every pair."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data.prompts import normalise
from holdfast.data.splits import overlap, shingles
from holdfast.errors import SettingsError

WORDS = st.sampled_from(["write", "a", "song", "about", "the", "sea", "now", "!"])
TEXTS = st.lists(st.lists(WORDS, max_size=8).map(" ".join), max_size=12)
THRESHOLDS = st.sampled_from([0.2, 0.5, 0.6, 2 / 3, 1.0])


@settings(deadline=None)
@given(TEXTS, TEXTS, THRESHOLDS)
def test_overlap_is_symmetric(a, b, threshold):
    there, back = overlap(a, b, threshold=threshold), overlap(b, a, threshold=threshold)
    assert there[:2] == back[:2]
    assert set(there.pairs) == {(i, j, value) for j, i, value in back.pairs}


@settings(deadline=None)
@given(TEXTS)
def test_overlap_with_itself_is_full(texts):
    found = overlap(texts, texts)
    distinct = {normalise(text) for text in texts}
    assert found.exact == len(distinct)
    assert {normalise(texts[i]) for i, j, v in found.pairs if i == j and v == 1} == (
        distinct
    )
    assert len(found.pairs) == found.exact + found.similar


@settings(deadline=None)
@given(TEXTS, TEXTS, THRESHOLDS, st.integers(1, 3))
def test_the_index_loses_no_pair_that_comparing_all_would_find(a, b, threshold, words):
    expected = set()
    firsts = [
        {normalise(t): i for i, t in reversed(list(enumerate(side)))} for side in (a, b)
    ]
    for left, i in firsts[0].items():
        for right, j in firsts[1].items():
            x, y = shingles(left, words), shingles(right, words)
            value = len(x & y) / len(x | y)
            if left == right or value >= threshold:
                expected.add((i, j, value))
    found = overlap(a, b, threshold=threshold, shingle=words)
    assert set(found.pairs) == expected


def test_copies_and_near_copies_are_told_apart():
    a = ["Write a song about the sea.", "Name the capital of France."]
    b = ["write a  SONG about the sea.", "Please write a song about the sea now.", "Hm"]
    found = overlap(a, b)
    # 4 of the 6 three-word runs of the longer text are those of the shorter one.
    assert found == (1, 1, ((0, 0, 1.0), (0, 1, pytest.approx(4 / 6))))
    assert overlap(a, b, threshold=0.7).similar == 0
    assert overlap(a, ["Count to ten.", ""]) == (0, 0, ())


def test_repeated_texts_count_once():
    assert overlap(["Wave.", "wave.", "WAVE."], ["Wave."] * 5).exact == 1


def test_texts_without_spaces_or_words_are_compared_too():
    assert overlap(["请写一首关于大海的歌"], ["请写一首关于大海的诗"]).similar == 1
    assert overlap(["?!"], ["?!", "!!"]) == (1, 0, ((0, 0, 1.0),))


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"shingle": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SettingsError, match="threshold"):
        overlap(["a"], ["b"], **options)


def test_thousands_of_texts_with_one_common_opening_are_fast():
    # Indexed by its common opening, each of the texts would meet each other one.
    draw = random.Random(0)
    texts = [
        "how do i " + " ".join(f"w{draw.randrange(5000)}" for _ in range(8))
        for _ in range(4000)
    ]
    found = overlap(texts, texts)
    assert (found.exact, found.similar) == (4000, 0)
