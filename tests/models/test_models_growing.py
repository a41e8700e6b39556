"""A cache with room to grow holds what the cache of transformers holds."""

import pytest
import torch
from transformers import DynamicCache

from holdfast.models.decoding.kv_cache import (
    LEAD,
    ROOM,
    expect,
    preallocated_cache,
    without_padding,
)
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


def _filled(generator, rows, columns):
    """Return a cache with numbers in it, and these numbers by layer."""
    cache = preallocated_cache(tiny_config("qwen3"))
    held = torch.randn(len(cache.layers), 2, rows, 2, columns, 4, generator=generator)
    for place, pair in enumerate(held):
        cache.update(*pair, place)
    return cache, held


def _joined(held, added):
    """Return the rows of both, all ending at one column, zeros in front."""
    columns = max(held.shape[-2], added.shape[-2])
    parts = [
        torch.nn.functional.pad(each, (0, 0, columns - each.shape[-2], 0))
        for each in (held, added)
    ]
    return torch.cat(parts, 2)


@pytest.mark.parametrize("columns", [3, 5, 9])
@pytest.mark.parametrize("n_rows", [0, 3, 6])
def test_rows_that_join_stand_behind_the_others_as_if_they_were_padded(columns, n_rows):
    generator = torch.Generator().manual_seed(1)
    cache, held = _filled(generator, 2, 5)
    other, added = _filled(generator, 3, columns)
    expect(cache, 20, n_rows)
    for layer, more in zip(cache.layers, other.layers, strict=True):
        layer.join(more)
    expected = _joined(held, added)
    for layer, pair in zip(cache.layers, expected, strict=True):
        assert torch.equal(torch.stack([layer.keys, layer.values]), pair)
    new = torch.randn(2, 5, 2, 1, 4, generator=generator)
    keys, values = cache.update(*new, 0)
    assert torch.equal(keys, torch.cat([expected[0][0], new[0]], -2))
    assert torch.equal(values, torch.cat([expected[0][1], new[1]], -2))


def test_rows_for_which_there_is_room_are_the_only_ones_that_are_copied():
    generator = torch.Generator().manual_seed(2)
    cache, _ = _filled(generator, 2, 5)
    expect(cache, 20, 5)
    places = []
    for _ in range(3):
        other, _ = _filled(generator, 1, 4)
        layer = cache.layers[0]
        layer.join(other.layers[0])
        places.append(layer.keys.data_ptr())
    assert len(set(places)) == 1
    other, _ = _filled(generator, 1, 4)
    cache.layers[0].join(other.layers[0])
    assert cache.layers[0].keys.data_ptr() != places[0]
    assert len(cache.layers[0].keys) == 6


def test_no_more_room_is_made_than_will_be_written():
    cache = preallocated_cache(tiny_config("qwen3"))
    cache.update(*torch.zeros(2, 1, 2, 8, 4), 0)
    expect(cache, 12)
    assert cache.layers[0].make_room(5) == 8 + ROOM // 4
    cache, _ = _filled(torch.Generator(), 1, 8)
    expect(cache, 12)
    cache.layers[0].drop_room()
    assert cache.layers[0].make_room(1) == 12


def test_a_little_padding_is_kept_since_all_else_is_copied_for_it():
    cache, _ = _filled(torch.Generator(), 1, 2 * LEAD)
    mask = torch.tensor([[0] + [1] * 2 * LEAD])
    assert without_padding(cache, mask) is mask
