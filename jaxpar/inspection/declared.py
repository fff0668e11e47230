"""What islands send over their own axes, counted in the jaxpr: by collectives, or by two constraints in a row."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpar.inspection.collectives import parts_sent
from jaxpar.inspection.flops import inner_jaxprs, live_equations, needed_inside

# Those of jaxpar.mesh, which a reader of programs doesn't import.
_BATCH_AXES = ("data", "fsdp", "expert")
# What XLA calls what a jaxpr calls so.
_KINDS = {
    "ppermute": "collective-permute",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
}


def count_declared(jaxpr: Any, sizes: Mapping[str, int], axis: str) -> int:
    """Returns the bytes that a device sends in a step by the collectives that a jaxpr itself has over an axis.

    Inside of a manual region arrays are those of a device but for the axes that are the compiler's: their rows are
    split over the batch axes, and the heads of a ring's over `model`. Of branches for one platform each the one that
    sends least counts. An array that is constrained to have one dim split over the axis, and then another, is exchanged
    all to all: so Ulysses' attention sends.

    >>> import jax, jax.numpy as jnp, jaxpar
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jaxpar.make_mesh(context=8)
    >>> hop = lambda x: jax.lax.ppermute(x, "context", [(i, (i + 1) % 8) for i in range(8)])
    >>> ring = jax.shard_map(hop, mesh=mesh, in_specs=P("context"), out_specs=P("context"))
    >>> count_declared(jax.make_jaxpr(ring)(jnp.ones(64, jnp.float32)), mesh.shape, "context")
    32
    """
    return round(_visit(getattr(jaxpr, "jaxpr", jaxpr), sizes, axis, frozenset(), None))


def _visit(jaxpr: Any, sizes: Mapping[str, int], axis: str, manual: frozenset[str], needed: list[bool] | None) -> float:
    total, constrained = 0.0, {}
    for eqn, outs in live_equations(jaxpr, needed):
        name = eqn.primitive.name
        total += _sent(eqn, sizes, axis, manual)
        if name == "sharding_constraint":
            spec = getattr(eqn.params["sharding"], "spec", ())
            if spec_before := constrained.get(eqn.invars[0]):
                total += _exchanged(eqn.outvars[0].aval, (spec_before, spec), sizes, axis, manual)
            constrained[eqn.outvars[0]] = spec
        if name == "cond":
            branches = [_visit(body, sizes, axis, manual, None) for body in inner_jaxprs(eqn)]
            total += min((count for count in branches if count), default=0.0)
            continue
        inside = manual | set(eqn.params.get("newly_manual_axes", ()) if name == "shard_map" else ())
        times = eqn.params["length"] if name == "scan" else 1
        for body in inner_jaxprs(eqn):
            total += times * _visit(body, sizes, axis, inside, needed_inside(eqn, body, outs))
    return total


def _exchanged(aval: Any, specs: tuple[Any, Any], sizes: Mapping[str, int], axis: str, manual: frozenset[str]) -> float:
    """What a device sends of an array whose dims were split by one spec and are by another."""
    before, after = ({dim for dim, entry in enumerate(spec) if axis in _axes_of(entry)} for spec in specs)
    if not before or not after or before == after:
        return 0.0
    named = {name for spec in specs for entry in spec for name in _axes_of(entry)} | {*_BATCH_AXES, axis}
    split = math.prod(size for name, size in sizes.items() if name in named and name not in manual)
    return parts_sent("all-to-all", sizes[axis]) * math.prod(aval.shape) * aval.dtype.itemsize / split


def _axes_of(entry: Any) -> tuple[str, ...]:
    """The axes that an entry of a spec names; none where the compiler chooses."""
    if isinstance(entry, str):
        return (entry,)
    return entry if isinstance(entry, tuple) else ()


def _sent(eqn: Any, sizes: Mapping[str, int], axis: str, manual: frozenset[str]) -> float:
    """What a device sends by one equation over the axis, masks and counts left out."""
    kind = _KINDS.get(eqn.primitive.name.removesuffix("_invariant"))
    named = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    if kind is None or axis not in (named if isinstance(named, tuple) else (named,)):
        return 0.0
    split_over = (*_BATCH_AXES, *(["model"] if axis == "context" else []))
    split = math.prod(size for other, size in sizes.items() if other in split_over and other not in manual)
    avals = [atom.aval for atom in eqn.invars]
    if eqn.primitive.name.startswith("ragged"):
        # One of the two has room for the worst case; the others tell how much goes where.
        avals = [min(avals[:2], key=lambda aval: math.prod(aval.shape))]
    floats = [aval for aval in avals if np.issubdtype(aval.dtype, np.inexact) or str(aval.dtype) == "bfloat16"]
    count = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in floats if math.prod(aval.shape) > 1)
    return parts_sent(kind, sizes[axis]) * count / split
