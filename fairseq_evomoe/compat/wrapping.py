"""How a name in fairseq is mended."""

import functools
import typing

_MARK = "_evomoe"


def wrap(owner: typing.Any, name: str, make: typing.Callable) -> None:
    """Put make(original) in the place of `owner.name`, unless that has been done before."""
    original = getattr(owner, name)
    mend = f"{make.__module__}.{make.__qualname__}"
    done: frozenset[str] = getattr(original, _MARK, frozenset())
    if mend in done:
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, done | {mend})
    setattr(owner, name, replacement)
