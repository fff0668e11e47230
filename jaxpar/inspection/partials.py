"""Sums that a layout leaves in parts: what tensor parallelism must all-reduce, read from a step's jaxpr.

A product that contracts a weight's dim which the axis splits gives each device a part of every sum, and so does a
look-up in a table split by its rows (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). Parts may be added up
first: the gradients of query, key and value meet in one all-reduce.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxpar.inspection.flops import inner_jaxprs, live_equations, needed_inside

_SAME_DIMS = ("convert_element_type", "copy", "sharding_constraint", "optimization_barrier", "neg", "reduce_precision")
_LINEAR = (*_SAME_DIMS, "reshape", "transpose", "squeeze", "broadcast_in_dim")
_SUMS = ("add", "add_any", "sub")


class _Value(NamedTuple):
    """What is known of a variable.

    Attributes:
      split: the dims of a weight that the axis splits.
      sends: how often each of its bytes must travel, times (n-1)/n: 0 for what is whole, 2 for a part of a sum, 1 for
        rows of a table, of which each is on one device.
      width: the bytes of its element where it was narrowest, since it may travel there.
    """

    split: frozenset[int] = frozenset()
    sends: int = 0
    width: int = 8


def count_partial_sums(jaxpr: Any, split_dims: Sequence[frozenset[int]], shards: dict[str, int], size: int) -> int:
    """Returns the fewest bytes that a device sends to sum, by a ring of `size` devices, what an axis leaves in parts.

    Args:
      jaxpr: of the step.
      split_dims: for each of its inputs, the dims that the axis splits; only weights have any.
      shards: the sizes of the axes that split what is summed, as `data` its rows: each device sums its own.
      size: of the axis.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda x, up, down: jnp.tanh(x @ up) @ down + x
    >>> jaxpr = jax.make_jaxpr(step)(jnp.ones((4, 8)), jnp.ones((8, 32)), jnp.ones((32, 8)))
    >>> count_partial_sums(jaxpr, [frozenset(), frozenset({1}), frozenset({0})], {}, 4)
    192
    """
    closed = getattr(jaxpr, "jaxpr", jaxpr)
    found: list[tuple[int, int]] = []
    outs = _visit(closed, [_Value(split) for split in split_dims], 1, dict(shards), found)
    for atom, value in zip(closed.outvars, outs, strict=True):
        _settle(atom, value, 1, shards, found)
    return round(sum(count * times for count, times in found) * (size - 1) / size)


def _settle(atom: Any, value: _Value, times: int, shards: dict[str, int], found: list[tuple[int, int]]) -> None:
    """Counts what must be summed now."""
    if value.sends:
        width = min(value.width, atom.aval.dtype.itemsize)
        count = math.prod(atom.aval.shape) * width // math.prod(shards.values())
        found.append((value.sends * count, times))


def _visit(
    jaxpr: Any,
    values: list[_Value],
    times: int,
    shards: dict[str, int],
    found: list[tuple[int, int]],
    needed: list[bool] | None = None,
) -> list[_Value]:
    known = dict(zip(jaxpr.invars, values, strict=True))
    of = lambda atom: _Value() if hasattr(atom, "val") else known.get(atom, _Value())
    for eqn, outs_needed in live_equations(jaxpr, needed):
        name, inputs = eqn.primitive.name, [of(atom) for atom in eqn.invars]
        if name in _SUMS and all(value.sends for value in inputs):
            known[eqn.outvars[0]] = _Value(sends=2, width=min(value.width for value in inputs))
            continue
        if name in _LINEAR and len(eqn.invars) == 1:
            width = min(inputs[0].width, eqn.outvars[0].aval.dtype.itemsize)
            known[eqn.outvars[0]] = _Value(_moved(eqn, inputs[0].split), inputs[0].sends, width)
            continue
        for atom, value in zip(eqn.invars, inputs, strict=True):
            _settle(atom, value, times, shards, found)
            if not hasattr(atom, "val"):
                # Summed once, for all who use it.
                known[atom] = value._replace(sends=0)
        inputs = [value._replace(sends=0) for value in inputs]
        bodies = list(inner_jaxprs(eqn))
        if len(bodies) == 1 and len(bodies[0].invars) == len(inputs):
            outs = _visit_body(eqn, bodies[0], inputs, times, shards, found, outs_needed)
            known |= zip(eqn.outvars, outs, strict=False)
        elif sends := _sends(eqn, inputs):
            known[eqn.outvars[0]] = _Value(sends=sends, width=eqn.outvars[0].aval.dtype.itemsize)
    return [of(atom) for atom in jaxpr.outvars]


def _visit_body(
    eqn: Any,
    body: Any,
    inputs: list[_Value],
    times: int,
    shards: dict[str, int],
    found: list[tuple[int, int]],
    outs_needed: list[bool],
) -> list[_Value]:
    name = eqn.primitive.name
    if name == "shard_map":
        # Inside, what is manual has been split already.
        manual = eqn.params["newly_manual_axes"]
        shards = {axis: size for axis, size in shards.items() if axis not in manual}
    if name == "scan":
        times *= eqn.params["length"]
        pairs = zip(inputs, eqn.invars, body.invars, strict=True)
        inputs = [
            value if atom.aval.shape == inner.aval.shape else _Value(frozenset(dim - 1 for dim in value.split if dim))
            for value, atom, inner in pairs
        ]
    outs = _visit(body, inputs, times, shards, found, needed_inside(eqn, body, outs_needed))
    if name in ("scan", "while", "cond"):
        for atom, value in zip(body.outvars, outs, strict=True):
            _settle(atom, value, times, shards, found)
        return [_Value() for _ in outs]
    return outs


def _sends(eqn: Any, inputs: list[_Value]) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"]
        return 2 * any(value.split & set(dims) for value, dims in zip(inputs, contracted, strict=True))
    if name == "gather":
        return int(bool(inputs[0].split & set(eqn.params["dimension_numbers"].start_index_map)))
    return 0


def _moved(eqn: Any, split: frozenset[int]) -> frozenset[int]:
    """Which dims the axis splits after an equation that only moves them; of a reshape, those it leaves as they are."""
    if not split or eqn.primitive.name in _SAME_DIMS:
        return split
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == "transpose":
        return frozenset(to for to, dim in enumerate(eqn.params["permutation"]) if dim in split)
    if eqn.primitive.name == "broadcast_in_dim":
        return frozenset(to for dim, to in enumerate(eqn.params["broadcast_dimensions"]) if dim in split)
    # A dim that is merged with those after it leads what they become.
    starts = {math.prod(after[:dim]): dim for dim in reversed(range(len(after)))}
    return frozenset(starts[place] for dim in split if (place := math.prod(before[:dim])) in starts)
