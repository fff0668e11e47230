"""`split_carries`: what a scan over layers carries, kept split by its rows; changes with how the compiler shards loops.

A scan's carry takes its sharding from what stands in the loop, weights included. Where an axis splits both the rows and
the weights, as `fsdp` does, XLA (jax 0.10 to 0.12) then gathers the rows and splits their features, as if the axis were
for tensor parallelism: every device holds the activations of all. Layers called one after the other, without a scan,
don't show it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import jaxpr_as_fun


def split_carries(fn: Callable[[], Any], rows: int, constrain: Callable[[jax.Array], jax.Array]) -> Callable[[], Any]:
    """Returns `fn` with `constrain` put around each array with that many rows that enters one of its scans whole.

    Looks into what is jitted or rematerialised, and not into a scan's own body: that follows its carry. A constraint
    on a sharding changes no value.

    Args:
      fn: a function of no arguments, of arrays.
      rows: the size of dim 0 that tells rows from other arrays.
      constrain: an array -> the same one, to be kept split.

    >>> import jax.numpy as jnp
    >>> fn = lambda: jax.lax.scan(lambda x, w: (x * w, None), jnp.ones(4), jnp.arange(1.0, 4))[0]
    >>> [eqn.primitive.name for eqn in jax.make_jaxpr(split_carries(fn, 4, jnp.negative))().eqns[-2:]]
    ['neg', 'scan']
    """

    def run() -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)()
        split = closed.replace(jaxpr=_split(closed.jaxpr, rows, constrain))
        return jax.tree.unflatten(jax.tree.structure(shape), jaxpr_as_fun(split)())

    return run


def _split(jaxpr: Any, rows: int, constrain: Callable[[jax.Array], jax.Array]) -> Any:
    eqns = []
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name == "scan":
            # What a scan cuts into slices has a dim less inside: the rest enters whole.
            bodies = getattr(inner, "jaxpr", inner).invars
            inputs = list(eqn.invars)
            for index, (atom, body) in enumerate(zip(inputs, bodies, strict=True)):
                # A literal has a value, and a reference is no array.
                if hasattr(atom, "val") or type(atom.aval) is not ShapedArray:
                    continue
                if atom.aval.shape == body.aval.shape and atom.aval.shape[:1] == (rows,):
                    # A function of its own each time: JAX would give the variables of an equal trace again.
                    (constraint,) = jax.make_jaxpr(lambda x: constrain(x))(atom.aval).jaxpr.eqns
                    eqns.append(constraint.replace(invars=[atom]))
                    (inputs[index],) = constraint.outvars
            eqn = eqn.replace(invars=inputs)
        elif eqn.primitive.name in ("jit", "remat2", "checkpoint"):
            outer = hasattr(inner, "jaxpr")
            body = _split(inner.jaxpr if outer else inner, rows, constrain)
            eqn = eqn.replace(params={**eqn.params, "jaxpr": inner.replace(jaxpr=body) if outer else body})
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns)
