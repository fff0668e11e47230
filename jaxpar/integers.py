"""What counts as a whole number, or a number, where an argument must be one; changes with the types that users have."""

import math
import numbers
from typing import Any


def is_integer(number: Any, least: int = 1) -> bool:
    """Returns whether it is a whole number of Python's or NumPy's, `least` or more; True and False are none.

    >>> is_integer(3), is_integer(0), is_integer(0, least=0), is_integer(True), is_integer(2.0)
    (True, False, True, False, False)
    """
    return isinstance(number, numbers.Integral) and not isinstance(number, bool) and int(number) >= least


def is_number(number: Any) -> bool:
    """Returns whether it is a finite real number of Python's or NumPy's; True and False are none, nor is an array.

    >>> is_number(3), is_number(-0.5), is_number(True), is_number(float("nan")), is_number("3"), is_number(10**400)
    (True, True, False, False, False, False)
    """
    try:
        return isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
    except OverflowError:
        # A whole number that no float can hold.
        return False
