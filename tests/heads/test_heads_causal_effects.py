import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from holdfast.errors import InputError, SettingsError
from holdfast.heads.attribution import attribute
from holdfast.heads.causal_effects import causal_effects
from holdfast.models import interventions
from holdfast.models.decoding import shared_prefix
from holdfast.models.loading.causal import adapt
from tiny_models import HEAD_WIDTH, HEADS, LAYERS, random_sequences, tiny_model

FAMILIES = ["llama", "mistral", "phi3", "qwen2", "qwen3"]
SEQUENCES = random_sequences([19, 12, 15, 9])
TEMPLATES = [3, 3, 1, 4]
EVERY = [[(layer, head)] for layer in range(LAYERS) for head in range(HEADS)]
OFFSET = 0.4


MIXED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@pytest.fixture(scope="module", params=[*FAMILIES, "mixed"])
def adapter(request):
    """Mistral's layers all have a window; in "mixed" the first one has none."""
    if request.param == "mixed":
        return adapt(tiny_model("qwen2", **MIXED), None)
    return adapt(tiny_model(request.param), None)


def _direction(adapter):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(adapter.d_model, generator=generator)


def _slowly(adapter, ids, first, heads, factor=0.0):
    """The whole sequence without a cache, with heads scaled from a position on."""
    handles = []
    for layer, head in heads:
        columns = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)

        def scale(_, arguments, columns=columns):
            states = arguments[0].clone()
            states[:, first:, columns] *= factor
            return (states,)

        projection = adapter.output_projection(layer)
        handles.append(projection.register_forward_pre_hook(scale))
    with torch.no_grad():
        states = adapter.base(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return float(states.last_hidden_state[0, -1] @ _direction(adapter)) + OFFSET


def _effects(adapter, candidates, sequences=SEQUENCES, templates=TEMPLATES, **named):
    direction = _direction(adapter)
    return causal_effects(
        adapter, sequences, templates, candidates, direction, OFFSET, **named
    )


def test_cached_passes_agree_with_full_recomputation(adapter):
    candidates = [*EVERY[::5], [(0, 1), (1, 3), (2, 0)]]
    found = _effects(adapter, candidates)
    for row, (ids, n_template) in enumerate(zip(SEQUENCES, TEMPLATES, strict=True)):
        starts = {"final_token": len(ids) - 1, "end_template": len(ids) - n_template}
        plain = _slowly(adapter, ids, 0, [])
        for moment, first in starts.items():
            assert float(found[moment].plain[row]) == pytest.approx(plain, abs=1e-4)
            for column, heads in enumerate(candidates):
                expected = _slowly(adapter, ids, first, heads) - plain
                change = float(found[moment].change[row, column])
                assert change == pytest.approx(expected, abs=1e-4)


def test_the_template_keeps_what_the_final_token_alone_does_not_show(qwen3):
    found = _effects(qwen3, EVERY)
    long = torch.tensor(TEMPLATES) > 1
    differ = (found["final_token"].change - found["end_template"].change).abs()
    assert differ[long].amax(1).min() > 1e-2
    assert differ[~long].max() < 1e-5


def test_a_head_that_writes_nothing_has_no_effect():
    model = tiny_model("llama")
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.o_proj.weight
        weight[:, 2 * HEAD_WIDTH : 3 * HEAD_WIDTH] = 0
    for effects in _effects(adapt(model, None), EVERY).values():
        assert effects.change[:, HEADS + 2].abs().max() < 1e-5
        assert effects.change.abs().amax(0).median() > 1e-2


def test_where_nothing_follows_a_head_its_effect_is_its_contribution():
    """The last layer without its MLP: only the RMS stands between the two."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.zero_()
    adapter = adapt(model, None)
    last = [[(LAYERS - 1, head)] for head in range(HEADS)]
    found = _effects(adapter, last)["final_token"].change
    plateaus = [(0, 1)] * len(SEQUENCES)
    parts = attribute(adapter, SEQUENCES, plateaus, _direction(adapter))
    written = torch.stack([part.tail.heads[-1, -1] for part in parts])
    pair = torch.stack([found.flatten(), -written.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.95


def test_a_factor_of_one_changes_nothing(qwen3):
    for effects in _effects(qwen3, EVERY[:3], factor=1.0).values():
        assert effects.change.abs().max() < 1e-5


def test_another_factor_is_applied(qwen3):
    found = _effects(qwen3, [[(1, 1)]], factor=2.5)["end_template"]
    ids = SEQUENCES[0]
    expected = _slowly(qwen3, ids, len(ids) - 3, [(1, 1)], factor=2.5)
    assert float((found.plain + found.change[:, 0])[0]) == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
@pytest.mark.parametrize(("batch_size", "max_bytes"), [(1, 1), (3, 30_000), (4, 1)])
def test_neither_batches_nor_the_bound_change_an_effect(kind, batch_size, max_bytes):
    adapter = adapt(tiny_model(kind), None)
    whole = _effects(adapter, EVERY)
    cut = _effects(adapter, EVERY, batch_size=batch_size, max_bytes=max_bytes)
    for moment, effects in whole.items():
        torch.testing.assert_close(cut[moment].plain, effects.plain)
        torch.testing.assert_close(
            cut[moment].change, effects.change, atol=1e-4, rtol=0
        )


def _passes(adapter, **named):
    """Rows and tokens of every pass through the model."""
    shapes = []
    handle = adapter.layers[0].register_forward_pre_hook(
        lambda _, arguments: shapes.append(tuple(arguments[0].shape[:2]))
    )
    _effects(adapter, EVERY, moments=["end_template"], **named)
    handle.remove()
    return shapes


def test_heads_share_one_prefill_and_cost_the_template_each(qwen3):
    shapes = _passes(qwen3, sequences=random_sequences([60, 55]), templates=[3, 3])
    assert shapes == [(2, 57), (2, 3 * (len(EVERY) + 1))]


def test_a_pass_stays_under_the_bound_and_the_length_of_the_prefix(qwen3):
    # Scores of 4 heads over 60 tokens, twice, and 4 times the MLP's width of 48.
    one = 2 * 3 * 4 * (2 * 4 * 60 + 4 * 48)
    named = {"sequences": random_sequences([60, 55]), "templates": [3, 3]}
    shapes = _passes(qwen3, max_bytes=5 * one, **named)
    assert shapes[1:] == [(2, 15), (2, 15), (2, 9)]
    short = _passes(qwen3, sequences=SEQUENCES[1:2], templates=[3])
    assert short == [(1, 9), *[(1, 9)] * 4, (1, 3)]


def test_one_moment_alone_can_be_asked_for(qwen3):
    found = _effects(qwen3, EVERY[:2], moments=["end_template"])
    assert list(found) == ["end_template"]
    both = _effects(qwen3, EVERY[:2])["end_template"]
    torch.testing.assert_close(found["end_template"].change, both.change)


def test_chunks_are_halved_when_memory_ends(qwen3, monkeypatch):
    expected = _effects(qwen3, EVERY)
    scaled = interventions.scale_heads

    def narrow(adapter, factors, **named):
        if len(factors) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return scaled(adapter, factors, **named)

    monkeypatch.setattr(shared_prefix, "scale_heads", narrow)
    found = _effects(qwen3, EVERY)
    for moment, effects in expected.items():
        torch.testing.assert_close(
            found[moment].change, effects.change, atol=1e-4, rtol=0
        )


def test_eager_attention_gives_the_same_effects(qwen3):
    adapter = adapt(tiny_model("qwen3", attn_implementation="eager"), None)
    assert adapter.model.config._attn_implementation == "eager"
    expected = _effects(qwen3, EVERY)
    for moment, effects in _effects(adapter, EVERY).items():
        torch.testing.assert_close(
            effects.change, expected[moment].change, atol=1e-4, rtol=0
        )


def test_attention_of_another_kind_gives_the_same_effects_row_by_row(qwen3):
    transformers.AttentionInterface.register("plain", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("plain", sdpa_mask)
    adapter = adapt(tiny_model("qwen3", attn_implementation="plain"), None)
    expected = _effects(qwen3, EVERY)
    for moment, effects in _effects(adapter, EVERY).items():
        torch.testing.assert_close(
            effects.change, expected[moment].change, atol=1e-4, rtol=0
        )


def test_layers_may_differ_in_their_window():
    config = tiny_model("qwen2", **MIXED).config
    assert config.layer_types == ["full_attention", *["sliding_attention"] * 2]


def test_results_are_ordinary_tensors(qwen3):
    assert not _effects(qwen3, EVERY[:1])["final_token"].change.is_inference()


def test_heads_that_do_not_exist_are_named_with_what_fits(qwen3):
    with pytest.raises(SettingsError, match=r"layers 0 to 2.*0 to 3.*3:0, 0:4"):
        _effects(qwen3, [[(1, 1)], [(3, 0), (0, 4)]])


def test_no_head_at_all_is_refused(qwen3):
    with pytest.raises(SettingsError, match="0 candidates"):
        _effects(qwen3, [])


@pytest.mark.parametrize("length", [0, 12])
def test_a_template_that_leaves_nothing_before_it_is_named(qwen3, length):
    with pytest.raises(InputError, match="tokens of sequence 1"):
        _effects(qwen3, EVERY, SEQUENCES[:2], [3, length])
