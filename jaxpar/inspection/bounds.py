"""The fewest bytes that a state's layout lets a step send, and which collectives move weights, gradients or else.

Over an axis of n devices that splits a leaf of B bytes, n-1 of n parts come from elsewhere: each gather of it, and the
reduction of its gradient, sends B (n-1)/n (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054). Over one that
does not split it, its gradient is all-reduced: 2 B (n-1)/n. B is what the other axes leave of it.

A leaf must be gathered once, or again for the way back if what was gathered isn't kept; in the step, or in each of its
microbatches. An eval step has no way back. Leaf by leaf, the most of these counts that a program sends enough for is
what is needed; what it gathers beyond them shows as a ratio above 1.
"""

import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxpar.inspection.collectives import Collective
from jaxpar.layout import LayoutRow
from jaxpar.mesh import BATCH_AXES
from jaxpar.partition import axes_of

# An expert's weights stay where they are, and its tokens come to them.
_STAYS = ("expert",)


class Traffic(NamedTuple):
    """What a device sends in a step over some axes, for one purpose.

    Attributes:
      axes: the mesh axes.
      purpose: `weights and gradients`, `activations` or `scalars`.
      bytes: as the program sends them.
      logical_bytes: as a program would that gathers in the dtype it computes in, and keeps of a sum its own part alone:
        XLA on CPU does neither.
      bound: the fewest that the layout allows; None where nothing declares it.
      if_gathered: the same as `bytes`, if what XLA writes as a sum of parts in zeros runs as the gather that it is.
    """

    axes: tuple[str, ...]
    purpose: str
    bytes: int
    logical_bytes: int
    bound: int | None
    if_gathered: int


class Terms(NamedTuple):
    """What of a step the bounds depend on, beside the layout.

    Attributes:
      frozen: the paths of the parameters that get no gradient.
      has_way_back: whether the step differentiates.
      compute_dtype: what the step casts floating-point parameters to, and so gathers and reduces; None for their own.
      num_microbatches: how often it gathers and reduces what batch axes split.
      summed_axes: the axes over which the builder itself sums gradients, once, in the dtype of their parameters.
      partial_sums: the fewest bytes of activations over each axis: parts of sums, as `count_partial_sums` gives them,
        or what an island sends, as `count_declared` does.
    """

    frozen: frozenset[str] = frozenset()
    has_way_back: bool = True
    compute_dtype: Any = None
    num_microbatches: int = 1
    summed_axes: tuple[str, ...] = ()
    partial_sums: Mapping[str, int] = types.MappingProxyType({})

    @property
    def gathers(self) -> set[int]:
        """How often a leaf may have to be gathered."""
        ways = 2 if self.has_way_back else 1
        return {1, ways, self.num_microbatches, ways * self.num_microbatches}

    def width(self, row: LayoutRow) -> int:
        """The bytes of a leaf's element as it is gathered."""
        size = np.dtype(row.dtype).itemsize
        return size if self.compute_dtype is None else min(np.dtype(self.compute_dtype).itemsize, size)

    def gradient_width(self, row: LayoutRow, axes: tuple[str, ...]) -> int:
        """The bytes of an element of a leaf's gradient as it is summed over the axes."""
        return np.dtype(row.dtype).itemsize if set(axes) & set(self.summed_axes) else self.width(row)


class Purposes(NamedTuple):
    """A program's traffic, and the collectives that no rule or island explains, largest first."""

    traffic: tuple[Traffic, ...]
    unexplained: tuple[Collective, ...]


def sort_traffic(collectives: Iterable[Collective], rows: Iterable[LayoutRow], mesh: Mesh, terms: Terms) -> Purposes:
    """Returns the traffic of a step by axes and purpose, each beside its bound.

    A collective belongs to a leaf if what it moves has the leaf's dims, whole or as the mesh splits them, with or
    without the leading dim of a stack of layers; or as many elements, where XLA has laid it flat.
    """
    params = [row for row in rows if row.path.startswith("params/") and math.prod(row.shape) > 1]
    found: dict[tuple[tuple[str, ...], str], list[Collective]] = {}
    for one in collectives:
        if one.group_size > 1:
            found.setdefault((one.axes, _purpose_of(one, params, mesh)), []).append(one)
    traffic, unexplained = [], []
    for (axes, purpose), ones in found.items():
        sent = sum(one.bytes_a_step for one in ones)
        logical, bound = sent, None
        if purpose == "weights and gradients":
            logical, bound = _weigh(ones, params, mesh, terms)
        elif purpose == "activations" and len(axes) == 1:
            bound = terms.partial_sums.get(axes[0])
        if purpose == "activations" and set(axes) <= set(BATCH_AXES) - set(_STAYS):
            unexplained += ones
        traffic.append(Traffic(axes, purpose, sent, logical, bound, sum(one.bytes_if_gathered for one in ones)))
    return Purposes(
        tuple(sorted(traffic, key=lambda one: -one.bytes)),
        tuple(sorted(unexplained, key=lambda one: -one.bytes_a_step)),
    )


def _purpose_of(one: Collective, params: list[LayoutRow], mesh: Mesh) -> str:
    if math.prod(one.array.dims) <= 1:
        return "scalars"
    return "weights and gradients" if _leaf_of(one, params, mesh) is not None else "activations"


def _leaf_of(one: Collective, params: list[LayoutRow], mesh: Mesh) -> LayoutRow | None:
    """A parameter whose dims are those that a collective over batch axes moves; None if there is none."""
    # Gradients of what islands leave whole are summed over their axes too.
    islands = {"context", *_STAYS} if one.kind in ("all-reduce", "reduce-scatter") and len(one.axes) > 1 else set()
    if not one.axes or not set(one.axes) <= set(BATCH_AXES) - set(_STAYS) | islands:
        return None
    dims = _key(one.array.dims)
    found = next((row for row in params if dims in _keys(row, mesh, one.axes)), None)
    if found is None and len(dims) == 1:
        sizes = lambda row: map(math.prod, _keys(row, mesh, one.axes))
        found = next((row for row in params if dims[0] in sizes(row)), None)
    return found


def _keys(row: LayoutRow, mesh: Mesh, axes: tuple[str, ...]) -> set[tuple[int, ...]]:
    shapes = [_shard(row, mesh, ()), _shard(row, mesh, axes)]
    return {_key(dims) for shape in shapes for dims in (shape, shape[1:]) if math.prod(dims) > 1}


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(dim for dim in dims if dim != 1))


def _shard(row: LayoutRow, mesh: Mesh, gathered: tuple[str, ...]) -> tuple[int, ...]:
    """What a device has of a leaf that is whole over the `gathered` axes."""
    return tuple(
        size // math.prod(mesh.shape[axis] for axis in axes_of(row.spec[dim : dim + 1]) if axis not in gathered)
        for dim, size in enumerate(row.shape)
    )


def _split_over(row: LayoutRow, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in axes_of(row.spec))


def _weigh(ones: list[Collective], params: list[LayoutRow], mesh: Mesh, terms: Terms) -> tuple[int, int]:
    """The logical bytes of what moves leaves over one choice of axes, and the fewest that they could be."""
    axes = ones[0].axes
    owners = [_leaf_of(one, params, mesh) for one in ones]
    sizes = [_logical_bytes(one, row, terms) for one, row in zip(ones, owners, strict=True)]
    bound = 0.0
    for rows in _alike(params, mesh, axes):
        sent = sum(size for size, row in zip(sizes, owners, strict=True) if row in rows)
        bound += _bound(axes, rows, mesh, terms, sent)
    return sum(sizes), round(bound)


def _alike(params: list[LayoutRow], mesh: Mesh, axes: tuple[str, ...]) -> list[list[LayoutRow]]:
    """The leaves in groups: those whose collectives can't be told apart are in one."""
    groups: list[tuple[set[tuple[int, ...]], list[LayoutRow]]] = []
    for row in params:
        keys = _keys(row, mesh, axes)
        rows, others = [], []
        for group in groups:
            if group[0].isdisjoint(keys):
                others.append(group)
            else:
                keys, rows = keys | group[0], rows + group[1]
        groups = [*others, (keys, [*rows, row])]
    return [rows for _, rows in groups]


def _logical_bytes(one: Collective, row: LayoutRow | None, terms: Terms) -> int:
    count = one.bytes_a_step
    if row is None:
        return count
    if one.kind == "all-reduce" and _split_over(row, one.axes) == one.axes:
        count //= 2
    is_sum = one.kind in ("all-reduce", "reduce-scatter")
    width = terms.gradient_width(row, one.axes) if is_sum else terms.width(row)
    return count * min(width, one.array.width) // one.array.width


def _bound(axes: tuple[str, ...], rows: list[LayoutRow], mesh: Mesh, terms: Terms, sent: int) -> float:
    """The fewest bytes over these axes: as many gathers as are needed and the program sends, and the reductions."""
    gather = reduce = 0.0
    count = math.prod(mesh.shape[axis] for axis in axes)
    for row in rows:
        split, trained = _split_over(row, axes), row.path not in terms.frozen
        part = math.prod(_shard(row, mesh, axes if split == axes else ())) * (count - 1) / count
        if split == axes:
            gather += part * terms.width(row)
            reduce += part * terms.gradient_width(row, axes) * terms.num_microbatches * trained
        elif not split:
            reduce += 2 * part * terms.gradient_width(row, axes) * trained
    gathers = round((sent - reduce) / gather) if gather else 0
    return reduce + gather * max(need for need in terms.gathers if need <= max(gathers, 1))
