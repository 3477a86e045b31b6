"""What a user gives, checked in one dialect of errors, for the library and the command line:
"NAME: expected ..., got ...".
"""

import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from .errors import GenarmError

LARGEST = 3.4028234663852886e38
"""Of the finite numbers of float32, in which decoding computes."""


def real(
    name: str,
    value: Any,
    low: float = -LARGEST,
    high: float = LARGEST,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """The number; GenarmError unless it lies from `low` to `high`, and above `above` and below `below` where given."""
    # Compared before float(), which overflows on an int of 400 digits.
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    fits = is_number and low <= value <= high
    if not fits or (above is not None and not value > above) or (below is not None and not value < below):
        raise GenarmError(f"{name}: expected {_interval(low, high, above, below)}, got {reprlib.repr(value)}")
    return float(value)


def integer(name: str, value: Any, low: int | None = None, below: int | None = None) -> int:
    """The integer; GenarmError unless it is at least `low` and below `below`, where given."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or (low is not None and value < low) or (below is not None and value >= below):
        bounds = ("" if low is None else f" of at least {low}") + ("" if below is None else f" below {below}")
        raise GenarmError(f"{name}: expected an integer{bounds}, got {reprlib.repr(value)}")
    return int(value)


def number(name: str, text: str) -> float:
    """The number that a text spells; GenarmError unless it is one, and finite in float32.

    >>> number("--weight polite", "0.5")
    0.5
    """
    try:
        value: Any = float(text)
    except ValueError:
        value = text
    return real(name, value)


def arm_name(name: str, arms: Iterable[str], where: str) -> None:
    """GenarmError unless `name` is one of the ARMs."""
    if name not in arms:
        raise GenarmError(f"{where}: no ARM is called {name!r}; there are: {', '.join(arms) or 'none'}")


def _interval(low: float, high: float, above: float | None, below: float | None) -> str:
    if below is not None:
        return f"a number from {low:g} to below {below:g}"
    if above is not None:
        return f"a finite number above {above:g}"
    if high == LARGEST:
        return "a finite number" if low < 0 else f"a finite number of at least {low:g}"
    return f"a number from {low:g} to {high:g}"
