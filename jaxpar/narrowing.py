"""Where a float64 computation falls back to fewer bits: what explains a difference that is no error in logic."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

from jaxpar.dependence import needed_equations


def find_narrowings(fn: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """Returns the operations on the way to what `fn(*args)` returns that turn float64 into fewer bits, and their lines.

    Args:
      fn: the function; it is traced, not run.
      *args: its arguments, as arrays or shapes.

    >>> with jax.enable_x64(True):
    ...     found = find_narrowings(lambda x: jnp.sin(x.astype("float32")) + 1, jnp.ones(3))
    >>> [line.split(" at ")[0] for line in found]
    ['convert_element_type float64 -> float32']
    """
    jaxpr = jax.make_jaxpr(fn)(*args)
    return tuple(dict.fromkeys(_walk(jaxpr.jaxpr, needed_equations(jaxpr.jaxpr))))


def _walk(jaxpr: Jaxpr, eqns: list[JaxprEqn]) -> Iterator[str]:
    for eqn in eqns:
        inner = list(jaxprs_in_params(eqn.params))
        for body in inner:
            body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
            yield from _walk(body, body.eqns)
        given, made = ([_float_dtype(var) for var in variables] for variables in (eqn.invars, eqn.outvars))
        narrow = [dtype for dtype in made if dtype is not None and dtype.itemsize < 8]
        if not inner and narrow and any(dtype is not None and dtype.itemsize == 8 for dtype in given):
            yield f"{eqn.primitive.name} float64 -> {narrow[0].name} at {source_info_util.summarize(eqn.source_info)}"


def _float_dtype(var: Any) -> Any:
    dtype = getattr(var.aval, "dtype", None)
    return dtype if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else None
