"""Warnings point at the line that called jaxpar."""

import contextlib
import warnings

import pytest

from jaxpar.stacklevel import warn_caller


def test_a_warning_points_at_the_line_that_called_jaxpar():
    namespace = {"__name__": "jaxpar.somewhere", "warn_caller": warn_caller, "contextlib": contextlib}
    exec(INSIDE, namespace)
    for call in ("plain", "deep", "by_context"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            namespace[call]()
        assert told[0].filename == __file__, call


INSIDE = """
def plain():
    warn_caller("text")

def deep():
    plain()

@contextlib.contextmanager
def warned():
    try:
        yield
    except ValueError:
        plain()

def by_context():
    with warned():
        raise ValueError
"""


def test_a_warning_has_the_category_that_is_given():
    with pytest.warns(DeprecationWarning, match="text"):
        warn_caller("text", DeprecationWarning)
