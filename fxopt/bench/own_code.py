"""Functions that Dynamo compiles as if there were no others."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

_NUMBERS = itertools.count()


def with_own_code(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` in a function of its own.

    Dynamo keeps compiled code with the code object, and the sizes that it has seen under its name. Two models of one
    class share both: the second cache would be compiled for any length, the third not at all.
    """

    def own(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    own.__code__ = own.__code__.replace(co_name=f"own_{next(_NUMBERS)}")
    return functools.wraps(call)(own)  # ``generate`` reads the signature
