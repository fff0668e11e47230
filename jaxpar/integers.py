"""What counts as a whole number where an argument must be one; changes with the number types that users have."""

import numbers
from typing import Any


def is_integer(number: Any, least: float = 1) -> bool:
    """Returns whether it is a whole number of Python's or NumPy's, `least` or more; True and False are none.

    >>> is_integer(3), is_integer(0), is_integer(0, least=0), is_integer(True), is_integer(2.0)
    (True, False, True, False, False)
    """
    return isinstance(number, numbers.Integral) and not isinstance(number, bool) and int(number) >= least
