"""At which line a warning points: the user's, however deep inside of jaxpar it is given."""

import inspect


def level_of_caller() -> int:
    """Returns the `stacklevel` at which the function that asks for it warns at the line that called jaxpar."""
    frame = inspect.currentframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("jaxpar."):
        frame, level = frame.f_back, level + 1
    return level
