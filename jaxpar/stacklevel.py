"""Warnings that point at the user's line, however deep inside of jaxpar they are given."""

import inspect
import warnings


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that called jaxpar."""
    frame, level = inspect.currentframe(), 0
    # Where a context manager of jaxpar's warns, contextlib's frames lie between.
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("jaxpar.", "contextlib")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)
