"""How a name in fairseq is mended."""

import functools
import typing

_MARK = "_evomoe"


def wrap(owner: typing.Any, name: str, make: typing.Callable) -> None:
    """Put make(original) in the place of `owner.name`, unless that has been done before."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)
