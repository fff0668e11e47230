"""What the outputs of a traced function depend on; changes with jaxprs."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var


def needed_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations that the outputs depend on, in their order; one with a body counts as a whole."""
    return _needed(jaxpr, lambda eqn: False)[0]


def reads(fn: Callable[[Any], Any], tree: Any) -> bool:
    """Returns whether what `fn(tree)` returns, or tells as `jax.debug.print` does, may depend on a leaf of the tree.

    >>> reads(lambda tree: tree["x"] + 1, {"x": 1.0}), reads(lambda tree: 1.0, {"x": 1.0})
    (True, False)
    """
    jaxpr = jax.make_jaxpr(lambda tree: jax.tree.leaves(fn(tree)))(tree).jaxpr
    return not _needed(jaxpr, lambda eqn: bool(eqn.effects))[1].isdisjoint(jaxpr.invars)


def _needed(jaxpr: Jaxpr, counts_too: Callable[[JaxprEqn], bool]) -> tuple[list[JaxprEqn], set[Var]]:
    wanted = {var for var in jaxpr.outvars if isinstance(var, Var)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        if counts_too(eqn) or wanted.intersection(eqn.outvars):
            needed.append(eqn)
            wanted.update(var for var in eqn.invars if isinstance(var, Var))
    return needed[::-1], wanted
