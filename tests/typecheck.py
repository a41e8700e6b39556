"""beartype, made once for each signature.

jaxtyping checks a function by two empty ones of the same signature, and has them made
wherever a function is defined: inside a function that is at each of its calls. What
beartype makes of them depends on nothing but the signature.
"""

from beartype import beartype

_made = {}


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
