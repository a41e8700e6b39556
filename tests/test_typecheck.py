"""Shapes and types are checked as before, though each signature is read once."""

import jaxtyping
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.report.text import clean
from holdfast.stats.auroc import auroc
from typecheck import jaxtyped, once

checked = jaxtyped(typechecker=once)


@checked
def named(rows: list[str], number: int = 0) -> str:
    return rows[number] if number < 9 else number


@checked
def summed(pairs: list[tuple[str, Float[Tensor, "n"]]], n: Int[Tensor, "n"]) -> None:
    assert len(pairs)


def paired(hint):
    @checked
    def added(a: hint, b: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
        return a.sum() + b if a.dim() else b[:1]

    return added


def test_like_signatures_of_two_functions_are_made_once():
    def first(a: int, *, b: str = "x") -> float: ...
    def second(a: int, *, b: str = "x") -> float: ...

    assert once(first) is once(second)


def test_names_kinds_hints_and_what_may_be_left_out_are_part_of_it():
    def plain(a: int, b: int): ...
    def renamed(a: int, c: int): ...
    def by_name(a: int, *, b: int): ...
    def hinted(a: int, b: str): ...
    def giving(a: int, b: int) -> int: ...
    def optional(a: int, b: int = 1): ...
    def many(a: int, *b: int): ...

    made = {*map(once, (plain, renamed, by_name, hinted, giving, optional, many))}
    assert len(made) == 7


def test_a_function_made_anew_is_held_to_its_own_hints():
    row = torch.zeros(3)
    assert paired(Float[Tensor, "row"])(row, row).shape == (3,)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameters of"):
        paired(Float[Tensor, "row"])(torch.zeros(2), row)
    # The same function of another hint, made after it, takes what the first refused.
    assert paired(Float[Tensor, "col"])(torch.zeros(2), row).shape == (3,)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameters of"):
        paired(Int[Tensor, "row"])(row, row)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        paired(Float[Tensor, ""])(torch.tensor(0.0), row)


def test_a_function_without_axes_is_checked_by_beartype_alone():
    assert named(["a"]) == "a"
    assert issubclass(jaxtyping.TypeCheckError, TypeError)
    with pytest.raises(jaxtyping.TypeCheckError):
        named("a")
    with pytest.raises(jaxtyping.TypeCheckError):
        named(["a"], number=1.0)
    with pytest.raises(jaxtyping.TypeCheckError):
        named(["a"], 9)


def test_axes_inside_of_other_hints_are_seen():
    row = torch.zeros(3)
    assert summed([("a", row)], torch.arange(3)) is None
    with pytest.raises(jaxtyping.TypeCheckError):
        summed([("a", row)], torch.arange(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        summed([("a", 1)], torch.arange(3))


def test_the_package_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        clean(3)
    with pytest.raises(jaxtyping.TypeCheckError):
        auroc(torch.zeros(3), torch.zeros(2, dtype=torch.bool))
