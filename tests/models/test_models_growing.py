"""A cache with room to grow holds what the cache of transformers holds."""

import pytest
import torch
from transformers import DynamicCache

from holdfast.models.decoding.kv_cache import ROOM, preallocated_cache, without_padding
from tiny_models import tiny_config


def _fill(cache, generator, rows=3):
    """Add many tokens, and take rows away twice on the way."""
    shown = []
    for step, count in enumerate([5, 1, 1, ROOM, 1, 2 * ROOM, 1, 1]):
        new = torch.randn(2, rows, 2, count, 4, generator=generator)
        for layer in range(len(cache.layers)):
            shown += [each.clone() for each in cache.update(*(new + layer), layer)]
        if step in (2, 4):
            keep = torch.tensor([0, 2])[: rows - 1]
            cache.batch_select_indices(keep)
            rows = len(keep)
    return shown


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_it_shows_the_same_numbers_whatever_is_taken_out(kind):
    config = tiny_config(kind)
    found, expected = (
        _fill(cache, torch.Generator().manual_seed(0))
        for cache in (preallocated_cache(config), DynamicCache(config=config))
    )
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_a_token_is_written_and_not_copied_along():
    cache = preallocated_cache(tiny_config("qwen3"))
    keys, _ = cache.update(*torch.zeros(2, 1, 2, 3, 4), 0)
    after, _ = cache.update(*torch.ones(2, 1, 2, 1, 4), 0)
    assert after.data_ptr() == keys.data_ptr()
    assert keys.shape[-2] == 3
    assert cache.get_seq_length(0) == 4


def test_padding_of_all_rows_is_taken_away_and_of_no_row_alone():
    cache = preallocated_cache(tiny_config("qwen3"))
    keys, values = torch.randn(2, 2, 2, 5, 4, generator=torch.Generator())
    for layer in range(len(cache.layers)):
        cache.update(keys, values, layer)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    left = without_padding(cache, mask)
    assert left.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    for layer in cache.layers:
        assert torch.equal(layer.keys, keys[..., 2:, :])
        assert torch.equal(layer.values, values[..., 2:, :])
    after, _ = cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    assert torch.equal(after[..., :3, :], keys[..., 2:, :])
    assert after.shape[-2] == 4


def test_a_cache_that_counts_places_keeps_its_padding():
    cache = preallocated_cache(tiny_config("mistral"))
    cache.update(*torch.zeros(2, 1, 2, 3, 4), 0)
    mask = torch.tensor([[0, 0, 1, 1]])
    assert without_padding(cache, mask) is mask
