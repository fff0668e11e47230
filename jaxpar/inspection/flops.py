"""Floating-point operations of a step, counted in its jaxpr: matrix products and convolutions, loops by their trips."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Product(NamedTuple):
    """A matrix product, or a convolution seen as one: (M, K) by (K, N), `batch` of them.

    Attributes:
      shape: `(batch, M, K, N)`, of whole arrays, over all devices.
      dtype: of what is multiplied.
      times: how often it runs in a step.
      recomputed: how often of these to have again what rematerialisation dropped.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    times: int
    recomputed: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations in a step: a multiplication and an addition for each of batch M K N."""
        return 2 * math.prod(self.shape) * self.times

    @property
    def model_flops(self) -> int:
        """Those that the model itself needs, without what is computed again: what MFU counts."""
        return 2 * math.prod(self.shape) * (self.times - self.recomputed)

    @property
    def intensity(self) -> float:
        """Operations for each byte that its inputs and output take: below a chip's own ratio, memory binds it."""
        _, m, k, n = self.shape
        size = np.dtype(self.dtype).itemsize
        return 2 * m * k * n / max((m * k + k * n + m * n) * size, 1)


def count_products(jaxpr: Any) -> tuple[Product, ...]:
    """Returns the matrix products of a jaxpr, each as often as it runs; a `while` loop's are counted once.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)
    >>> count_products(jax.make_jaxpr(step)(jnp.ones((4, 8)), jnp.ones((3, 8, 8))))
    (Product(shape=(1, 4, 8, 8), dtype='float32', times=3, recomputed=0),)
    """
    counts: dict[tuple[tuple[int, int, int, int], str], tuple[int, int]] = {}
    for shape, dtype, times, again in _visit(getattr(jaxpr, "jaxpr", jaxpr), 1):
        before = counts.get((shape, dtype), (0, 0))
        counts[shape, dtype] = before[0] + times, before[1] + times * again
    products = (Product(shape, dtype, *times) for (shape, dtype), times in counts.items())
    return tuple(sorted(products, key=lambda one: -one.flops))


def count_kernels(jaxpr: Any) -> dict[tuple[str, tuple[tuple[int, ...], ...]], int]:
    """Returns the operations of matrix products in one call of each Pallas kernel, by its name and outputs' shapes.

    What a kernel leaves out at run time, as blocks that a mask hides, counts as done.
    """
    found, left = {}, [getattr(jaxpr, "jaxpr", jaxpr)]
    while left:
        for eqn in left.pop().eqns:
            if eqn.primitive.name == "pallas_call":
                grid = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
                inside = sum(
                    2 * math.prod(shape) * times for body in inner_jaxprs(eqn) for shape, _, times, _ in _visit(body, 1)
                )
                shapes = tuple(tuple(atom.aval.shape) for atom in eqn.outvars)
                key = eqn.params.get("name") or "", shapes
                found[key] = max(found.get(key, 0), grid * inside)
            else:
                left += inner_jaxprs(eqn)
    return found


def live_equations(jaxpr: Any, needed: Sequence[bool] | None = None) -> list[tuple[Any, list[bool]]]:
    """Returns the equations whose results are used, each with which of them are; XLA leaves out the others.

    Args:
      jaxpr: open, not closed.
      needed: which of its outputs are used; by default all.
    """
    wanted = [True] * len(jaxpr.outvars) if needed is None else needed
    used = {atom for atom, want in zip(jaxpr.outvars, wanted, strict=True) if want and not hasattr(atom, "val")}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        outs = [atom in used for atom in eqn.outvars]
        if any(outs) or eqn.effects:
            kept.append((eqn, outs))
            used |= {atom for atom in eqn.invars if not hasattr(atom, "val")}
    return kept[::-1]


def needed_inside(eqn: Any, body: Any, outs: list[bool]) -> list[bool] | None:
    """Returns which outputs of an equation's body are used, by those of its own; None for all, where they differ."""
    if len(outs) != len(body.outvars):
        return None
    # What a loop carries is used by its next turn.
    carried = [out.aval.shape == inner.aval.shape for out, inner in zip(eqn.outvars, body.outvars, strict=True)]
    is_loop = eqn.primitive.name in ("scan", "while")
    return [out or (is_loop and same) for out, same in zip(outs, carried, strict=True)]


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """Yields the open jaxprs that an equation holds: a loop's body, a branch, what is jitted."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            body = getattr(one, "jaxpr", one)
            if hasattr(body, "eqns"):
                yield body


def _visit(
    jaxpr: Any, times: int, needed: list[bool] | None = None, again: bool = False, spare: int = 1
) -> Iterator[tuple[tuple[int, int, int, int], str, int, bool]]:
    """The products, times and whether they are again; of `spare` rows of a grouped product one is in use."""
    outside = again
    for eqn, outs in live_equations(jaxpr, needed):
        name = eqn.primitive.name
        # JAX names what the backward pass of a checkpoint computes a second time.
        again = outside or "rematted_computation" in str(eqn.source_info.name_stack)
        shape_of = _SHAPES.get(name)
        if shape_of is not None:
            batch, rows, inner_size, columns = shape_of(eqn)
            rows = rows // spare if name.startswith("ragged") else rows
            yield (batch, rows, inner_size, columns), str(eqn.invars[0].aval.dtype), times, again
        inner = list(inner_jaxprs(eqn))
        if name == "cond":
            # One branch runs: the costliest is what a device may have to do.
            branches = [list(_visit(body, times, None, again, spare)) for body in inner]
            yield from max(
                branches, key=lambda rows: sum(math.prod(shape) * count for shape, _, count, _ in rows), default=[]
            )
            continue
        for body in inner:
            # Over an `expert` axis each device has room for the rows of all: see jaxpar.mixture_of_experts.
            room = eqn.params["mesh"].shape["expert"] if "expert" in eqn.params.get("newly_manual_axes", ()) else spare
            yield from _visit(body, times * _repeats(eqn), needed_inside(eqn, body, outs), again, room)


def _repeats(eqn: Any) -> int:
    """How often an equation runs what it holds: a scan its length; a manual region once on each of its devices."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        sizes = eqn.params["mesh"].shape
        return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    if eqn.primitive.name == "pallas_call":
        return math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _product_shape(eqn: Any) -> tuple[int, int, int, int]:
    (left, _), (left_batch, _) = eqn.params["dimension_numbers"]
    a, b = (atom.aval.shape for atom in eqn.invars)
    batch, k = math.prod(a[dim] for dim in left_batch), math.prod(a[dim] for dim in left)
    return batch, math.prod(a) // (batch * k or 1), k, math.prod(b) // (batch * k or 1)


def _convolution_shape(eqn: Any) -> tuple[int, int, int, int]:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    features = kernel[numbers.rhs_spec[0]]
    # Where the input is spread out, as for the gradient of a strided one, most of what the kernel meets is nothing.
    met = math.prod(kernel) // features // math.prod(eqn.params["lhs_dilation"] or (1,))
    return groups, math.prod(out) // out[numbers.out_spec[1]], met, features // groups


def _ragged_shape(eqn: Any) -> tuple[int, int, int, int]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, right), _ = numbers.dot_dimension_numbers
    a, b = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    k = math.prod(a[dim] for dim in contracted)
    apart = math.prod(b[dim] for dim in (*right, *numbers.rhs_group_dimensions))
    return 1, math.prod(a) // (k or 1), k, math.prod(b) // (apart or 1)


_SHAPES = {
    "dot_general": _product_shape,
    "conv_general_dilated": _convolution_shape,
    "ragged_dot_general": _ragged_shape,
}
