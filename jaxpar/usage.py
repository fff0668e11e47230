"""What a command line may be given: values read from text, and the error for those that can't be; imports no JAX."""

import argparse
import functools
import math
import re
from collections.abc import Callable

# Of the demo's model, where its options are not given.
DEMO_SIZES = {"d_model": 128, "layers": 2, "heads": 8, "experts": 0, "kv_heads": 4}


class UsageError(ValueError):
    """Arguments that can't be: the message is the one line that the user sees."""


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns the argparse type of whole numbers from `low`, to `high` if given.

    >>> whole_number(1)("12")
    12
    >>> whole_number(1)("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: '0' is given; a whole number, 1 or more, is needed
    """
    return functools.partial(_read_whole, low, high)


def path_name(text: str) -> str:
    """Returns the text, which may be the path of a file or folder: an argparse type."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is given; the path of a file or folder is needed")
    return text


def positive_number(text: str) -> float:
    """Returns the finite number above 0 that the text is: an argparse type.

    >>> positive_number("3e-4")
    0.0003
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is given; a finite number above 0 is needed")
    return number


def step_range(text: str) -> tuple[int, int]:
    """Returns the first and the last step of a text as `10..20`: an argparse type.

    >>> step_range("10..20")
    (10, 20)
    """
    match = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", text, re.ASCII)
    first, last = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r} is given; the first and the last step, as 10..20, are needed")
    return first, last


def _read_whole(low: int, high: int | None, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        bound = f"{low} or more" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is given; a whole number, {bound}, is needed")
    return number
