"""How names in fairseq are replaced, and the list of all replacements."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARK = "_evomoe_patches"


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One name of fairseq that this package replaces.

    Attributes:
        owner, name: the module or class, and the attribute of it.
        make: maps the original to its replacement; its docstring gives the reason.
        test: the test file that shows the patch at work.
        seen_in: the version of fairseq in which the reason was seen.
        needed: whether this environment needs the patch.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    test: str
    seen_in: str
    needed: Callable[[], bool]

    @property
    def target(self) -> str:
        """Full name of what is replaced."""
        prefix = getattr(self.owner, "__qualname__", "")
        module = self.owner.__module__ if prefix else self.owner.__name__
        return ".".join(part for part in (module, prefix, self.name) if part)

    @property
    def reason(self) -> str:
        """The first sentence of the maker's docstring."""
        return (self.make.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")

    def apply(self) -> None:
        """Replace the name, unless this patch has replaced it before or is not needed."""
        original = getattr(self.owner, self.name)
        applied: frozenset[str] = getattr(original, _MARK, frozenset())
        identity = f"{self.make.__module__}.{self.make.__qualname__}"
        if identity in applied or not self.needed():
            return
        replacement = self.make(original)
        if callable(original):
            replacement = functools.wraps(original)(replacement)
        setattr(replacement, _MARK, applied | {identity})
        setattr(self.owner, self.name, replacement)


PATCHES: list[Patch] = []
"""All patches, in the order in which they are applied."""


def patch(
    owner: Any,
    name: str,
    *,
    test: str,
    seen_in: str = "0.12.3.1",
    needed: Callable[[], bool] = lambda: True,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register the decorated function, original -> replacement, as the patch of `owner.name`.

    The arguments are the attributes of `Patch`.
    """

    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        PATCHES.append(
            Patch(owner=owner, name=name, make=make, test=test, seen_in=seen_in, needed=needed)
        )
        return make

    return register
