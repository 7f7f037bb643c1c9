"""Which implementation serves an op.

``reference`` is the plain statement of the maths, ``torch`` the fast path built from library
GEMMs; it runs on every device. ``EVOMOE_BACKEND`` forces one of them; unset means the fastest
that can serve the call.
"""

import os
from collections.abc import Callable

BACKENDS = ("torch", "reference")


def choose(**implementations: Callable) -> Callable:
    """Pick the implementation to call, fastest first.

    Args:
        implementations: backend name -> function; all share one signature.

    Raises:
        ValueError: ``EVOMOE_BACKEND`` names something unknown, or something that this op lacks.
    """
    forced = os.environ.get("EVOMOE_BACKEND", "")
    if not forced:
        return next(implementations[b] for b in BACKENDS if b in implementations)
    if forced not in implementations:
        raise ValueError(
            f"EVOMOE_BACKEND={forced!r} cannot serve this op; it has {sorted(implementations)}. "
            "Unset EVOMOE_BACKEND to let the package choose."
        )
    return implementations[forced]
