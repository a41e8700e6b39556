"""Proofs on a dummy batch, for causal and for masked models."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from holdfast.errors import AdapterError
from holdfast.models.batching import Side, pad
from holdfast.models.hidden_states import head_contributions
from holdfast.models.interventions import scale_heads
from holdfast.models.model import Adapter, LanguageModel, Proof

DUMMY_LENGTHS = (11, 7)
DUMMY_SEED = 0


class Limit(NamedTuple):
    """Largest relative deviation that passes, for one kind of arithmetic."""

    one_step: float
    whole_pass: float


# One step rounds once: 2^-8 in bfloat16 and 2^-11 in float16, of the value itself.
# Through all blocks those roundings add up, and padding takes another kernel, which
# rounds elsewhere. A padding token that is attended to moves states by far more.
LIMITS = {
    torch.float32: Limit(1e-4, 1e-4),
    torch.float16: Limit(5e-3, 2e-2),
    torch.bfloat16: Limit(2e-2, 1e-1),
}


def prove(model: LanguageModel) -> tuple[Proof, ...]:
    """Check the contract of a model on two short rows of random tokens.

    Nothing of the model is changed when this returns. There is one proof for each part
    of the contract, passed or not.
    """
    rows = dummy_rows(model.embedding.num_embeddings)
    with torch.no_grad():
        return (
            *(_heads(model, rows) if isinstance(model, Adapter) else ()),
            *([_two_way(model, rows[0])] if model.two_way else ()),
            *(_padding(model, rows, side) for side in ("left", "right")),
            _final_norm(model, rows),
            _logits(model, rows),
        )


def require(proofs: Sequence[Proof], model_id: str) -> None:
    """Raise if any proof failed.

    Raises:
        AdapterError: Names every proof that failed and what was measured; it
            carries all proofs.
    """
    failed = [proof for proof in proofs if not proof.passed]
    if failed:
        found = "; ".join(
            f"“{proof.name}” does not hold (measured {proof.value:.3g}, "
            f"limit {proof.limit:.3g})"
            for proof in failed
        )
        raise AdapterError(
            f"a model that keeps the contract of its family ({model_id})",
            found,
            "The model differs from its family, or its arithmetic is not exact "
            "enough: load it in float32, and without edits by other libraries.",
            proofs,
        )


def dummy_rows(vocab: int) -> list[list[int]]:
    """Return the two short rows of random tokens, below `vocab`."""
    generator = torch.Generator().manual_seed(DUMMY_SEED)
    return [
        torch.randint(vocab, (length,), generator=generator).tolist()
        for length in DUMMY_LENGTHS
    ]


def _states(
    model: LanguageModel, rows: Sequence[Sequence[int]], side: Side = "right"
) -> list[Float[Tensor, "position d_model"]]:
    batch = pad(rows, side, model.device)
    states = model.states(batch)
    return [states[row][batch.mask[row]] for row in range(len(rows))]


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry that was expected."""
    difference = (found.float() - expected.float()).abs().max()
    scale = expected.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(difference / scale)


def _proof(name: str, value: float, limit: float, detail: str) -> Proof:
    # A comparison with NaN is false, so a model that returns NaN never passes.
    return Proof(name, value <= limit, value, limit, detail)


@contextmanager
def _recorded(*points: tuple[nn.Module, str]) -> Iterator[list[Tensor]]:
    """Yield the list into which the named input or output of each module goes."""
    found: list[Tensor] = [torch.empty(0)] * len(points)

    def before(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: Any) -> None:
            found[index] = arguments[0] if arguments else named["hidden_states"]

        return hook

    def after(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for index, (module, end) in enumerate(points):
            handle = (
                module.register_forward_pre_hook(before(index), with_kwargs=True)
                if end == "input"
                else module.register_forward_hook(after(index))
            )
            stack.enter_context(handle)
        yield found


def _sums(adapter: Adapter, rows: Sequence[Sequence[int]]) -> tuple[Proof, Proof]:
    points: list[tuple[nn.Module, str]] = []
    for layer in range(adapter.n_layers):
        points += [
            (adapter.output_projection(layer), "input"),
            (adapter.attentions[layer], "output"),
            (adapter.layers[layer], "input"),
            (adapter.mlp_norms[layer], "input"),
        ]
    with _recorded(*points) as found:
        _states(adapter, rows)
    heads_off = residual_off = 0.0
    for layer in range(adapter.n_layers):
        heads, written, entering, after = found[4 * layer : 4 * layer + 4]
        total = head_contributions(adapter, layer, heads).sum(-2)
        bias = adapter.output_projection(layer).bias
        if bias is not None:
            total = total + bias.float()
        heads_off = _worst(heads_off, relative(total, written))
        moved = entering.float() + written.float()
        residual_off = _worst(residual_off, relative(after, moved))
    limit = LIMITS[adapter.dtype].one_step
    return (
        _proof(
            "the contributions of the heads sum to the attention output",
            heads_off,
            limit,
            "inputs of the output projection times its columns, added in float32; "
            "a bias of the projection is counted apart; worst layer, relative to "
            "the largest entry",
        ),
        _proof(
            "the attention output is added to the residual stream as it is",
            residual_off,
            limit,
            "what enters the MLP's norm minus what entered the block; worst layer, "
            "relative to the largest entry",
        ),
    )


def _worst(one: float, other: float) -> float:
    # `max` would drop a NaN in second place.
    return other if other != other or other > one else one


def _heads(model: Adapter, rows: Sequence[Sequence[int]]) -> tuple[Proof, ...]:
    return (*_sums(model, rows), _empty_edit(model, rows), _ablation(model, rows))


def _empty_edit(adapter: Adapter, rows: Sequence[Sequence[int]]) -> Proof:
    plain = _states(adapter, rows)
    factors = torch.ones((adapter.n_layers, adapter.n_heads))
    with scale_heads(adapter, factors, layers=range(adapter.n_layers)):
        edited = _states(adapter, rows)
    return _proof(
        "an edit of no head changes nothing",
        _difference(edited, plain),
        0.0,
        "every hook in place, every factor 1; bit for bit",
    )


def _ablation(adapter: Adapter, rows: Sequence[Sequence[int]]) -> Proof:
    plain = _states(adapter, rows)
    factors = torch.ones((adapter.n_layers, adapter.n_heads))
    for layer in range(adapter.n_layers):
        factors[layer, layer % adapter.n_heads] = 0
    with scale_heads(adapter, factors, layers=range(adapter.n_layers)):
        hooked = _states(adapter, rows)
    with _zeroed_columns(adapter, factors):
        zeroed = _states(adapter, rows)
    if _difference(hooked, plain) == 0:
        value = float("inf")
    else:
        value = _difference(hooked, zeroed)
    return _proof(
        "scaling a head by 0 equals zeroing its columns of the output projection",
        value,
        0.0,
        "one head in each layer; bit for bit in any arithmetic, since both ways the "
        "same kernel adds the same zeros; infinite if the states do not move at all; "
        "the columns are put back",
    )


@contextmanager
def _zeroed_columns(
    adapter: Adapter, factors: Float[Tensor, "layer head"]
) -> Iterator[None]:
    saved: list[tuple[Tensor, Tensor]] = []
    width = adapter.head_width
    try:
        for layer, head in torch.argwhere(factors == 0).tolist():
            weight = adapter.output_projection(layer).weight.data
            columns = weight[:, head * width : (head + 1) * width]
            saved.append((columns, columns.clone()))
            columns.zero_()
        yield
    finally:
        for columns, before in saved:
            columns.copy_(before)


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def _two_way(model: LanguageModel, row: Sequence[int]) -> Proof:
    other = [*row[:-1], (row[-1] + 1) % model.embedding.num_embeddings]
    [states], [changed] = _states(model, [row]), _states(model, [other])
    # Position by position, since one of a large norm may hardly move.
    moves = (changed - states).float().norm(dim=-1) / states.float().norm(dim=-1)
    moved = float(moves[:-1].max())
    limit = LIMITS[model.dtype].one_step
    return _proof(
        "attention goes both ways",
        0.0 if moved > limit else float("inf"),
        0.0,
        "the state of a token moves with one that comes after it; infinite if none "
        "does",
    )


def _padding(model: LanguageModel, rows: Sequence[Sequence[int]], side: Side) -> Proof:
    alone = torch.cat([_states(model, [row])[0] for row in rows]).float()
    padded = torch.cat(_states(model, rows, side)).float()
    return _proof(
        f"{side}-padded and unpadded rows give the same states",
        float((padded - alone).norm() / alone.norm()),
        LIMITS[model.dtype].whole_pass,
        "norm of the difference over all positions, relative to that of the states",
    )


def _final_norm(model: LanguageModel, rows: Sequence[Sequence[int]]) -> Proof:
    calls: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        calls.append((arguments[0], output))

    last_block = [(model.layers[-1], "output")] if isinstance(model, Adapter) else []
    with model.final_norm.register_forward_hook(hook), _recorded(*last_block) as blocks:
        states = model.states(pad(rows[:1], "right", model.device))
    [(entering, leaving)] = calls
    same = all(
        torch.equal(one, other)
        for one, other in [(leaving, states), *((entering, block) for block in blocks)]
    )
    takes = "takes what the last block returns, changes it"
    return _proof(
        "states are read after the final norm",
        0.0 if same and not torch.equal(entering, leaving) else float("inf"),
        0.0,
        f"the norm {takes if last_block else 'runs once, changes what it takes'}, and "
        "what it returns is the base model's last state; bit for bit",
    )


def _logits(model: LanguageModel, rows: Sequence[Sequence[int]]) -> Proof:
    batch = pad(rows[:1], "right", model.device)
    states = model.states(batch)
    if isinstance(model, Adapter):
        inputs = {**batch.inputs(), "use_cache": False, "logits_to_keep": 1}
        value = relative(model.model(**inputs).logits, model.lm_head(states[:, -1:]))
        how = "last position, relative to the largest logit"
    else:
        logits = model.model(**batch.inputs()).logits.float()
        off = model.lm_head(states).float() - logits
        value = float(off.norm() / logits.norm())
        how = "all positions, norm of the difference relative to that of the logits"
    return _proof(
        "logits are the head of the state after the final norm",
        value,
        LIMITS[model.dtype].one_step,
        how,
    )
