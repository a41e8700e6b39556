"""The last states of sequences, whatever stands beside them in a batch."""

import pytest
import torch

from holdfast.errors import InputError
from holdfast.models.hidden_states import read_windows
from tiny_models import random_sequences

LENGTHS = [5, 40, 17, 3, 29, 29, 1, 11]
COUNTS = [2, 8, 17, 3, 1, 8, 1, 4]


@pytest.fixture(params=["qwen3", "llama"])
def adapter(request):
    return request.getfixturevalue(request.param)


def test_windows_are_the_ends_of_the_hidden_states_in_every_batch(adapter):
    sequences = random_sequences(LENGTHS)
    with torch.no_grad():
        expected = [
            adapter.base(torch.tensor([row])).last_hidden_state[0, -count:]
            for row, count in zip(sequences, COUNTS, strict=True)
        ]
    for batch_size in (1, 3, 8):
        found = read_windows(
            adapter, sequences, COUNTS, lambda states: states * 1, batch_size=batch_size
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_rows_are_reduced_one_by_one_and_come_back_in_their_order(adapter):
    sequences = random_sequences(LENGTHS)
    found = read_windows(
        adapter, sequences, COUNTS, lambda states: torch.tensor(len(states))
    )
    assert [int(each) for each in found] == COUNTS


@pytest.mark.parametrize("count", [0, 6])
def test_more_states_than_tokens_or_none_are_refused(adapter, count):
    with pytest.raises(InputError, match=r"1 to 5 states to read of sequence 0"):
        read_windows(adapter, random_sequences([5]), [count], lambda states: states)
