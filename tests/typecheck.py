"""Types and shapes checked while tests run, without what the checks need not cost.

jaxtyping has two empty functions made and checked by beartype wherever a function is
defined: inside a function that is at each of its calls, though what beartype makes of
them depends on nothing but the signature. And it binds the arguments of each call: that
tells axes apart where hints have axes, and nothing where they have none.
"""

import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

_made = {}
_jaxtyped = jaxtyping.jaxtyped
# The type of jaxtyping's own complaint: it is a TypeError, which some code expects.
_alone = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def once(empty):
    """Return what beartype makes of an empty function, the same for like ones."""
    code = empty.__code__
    key = (
        *(code.co_code, code.co_varnames, code.co_flags),
        *(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        *empty.__annotations__.items(),
        # Defaults are not checked; which there are says what may be left out.
        *(len(empty.__defaults__ or ()), *(empty.__kwdefaults__ or ())),
    )
    if key not in _made:
        _made[key] = beartype(empty)
    return _made[key]


def has_axes(hint):
    """Return whether a hint, or a part of it, has axes that other hints may share."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list | tuple) else typing.get_args(hint)
    return any(map(has_axes, parts))


def jaxtyped(checked=None, *, typechecker):
    """Do what `jaxtyping.jaxtyped` does, by beartype alone where no hint has axes."""
    if checked is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    # A function inside another is defined again and again, and made once by `once`.
    if (
        inspect.isfunction(checked)
        and "<locals>" not in checked.__qualname__
        and not inspect.isgeneratorfunction(checked)
    ):
        try:
            hints = typing.get_type_hints(checked, include_extras=True)
        except NameError:
            # A class that is being defined, or one that is imported for types alone.
            return _jaxtyped(checked, typechecker=typechecker)
        if not any(map(has_axes, hints.values())):
            return _alone(checked)
    return _jaxtyped(checked, typechecker=typechecker)


def install():
    """Have modules that are imported from now on checked by `jaxtyped` of this one."""
    jaxtyping.jaxtyped = jaxtyped
