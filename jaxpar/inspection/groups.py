"""Which devices of a mesh take part in a collective together; changes with how XLA spells groups and counts devices."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxpar.inspection.hlo import Instruction

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}")
_NAMED_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_ORDER = re.compile(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?$")


def read_groups(text: str, count: int) -> np.ndarray:
    """Returns which devices take part together, a row for each group; for a permute, the pairs from source to target.

    XLA spells groups in three ways: as lists, as the rows of a transposed range, and by the names of axes, along which
    devices may lie in an order of their own.

    Raises:
      ValueError: they are spelled in another way.

    >>> read_groups("replica_groups={{0,2},{1,3}}", 4).tolist()
    [[0, 2], [1, 3]]
    >>> read_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
    [[0, 2], [1, 3]]
    >>> read_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4).tolist()
    [[0, 2], [1, 3]]
    >>> read_groups("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", 4).tolist()
    [[0, 1], [2, 3]]
    """
    if match := _IOTA.search(text):
        return _read_order(match[3]).reshape(int(match[1]), int(match[2]))
    if match := _NAMED.search(text):
        groups = _read_named(match[1], match[3])
        return _read_order(match[2])[groups] if match[2] else groups
    if match := _LISTED.search(text):
        listed = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
        # Where they differ in size, the largest takes the longest.
        largest = max(map(len, listed))
        return np.array([group for group in listed if len(group) == largest])
    if "source_target_pairs={}" in text:
        return np.zeros((0, 2), int)
    if (place := text.find("replica_groups=")) >= 0 and "replica_groups={}" not in text:
        raise ValueError(
            f"XLA writes which devices take part together as {text[place : place + 60]!r}; read are lists, ranges and "
            "names of axes, as jax 0.10 to 0.12 print them: use one of these."
        )
    return np.arange(count)[None]


def _read_order(text: str) -> np.ndarray:
    """The devices of a transposed range, as `[2,4]T(1,0)`, or of a list."""
    match = _ORDER.match(text)
    if match is None:
        return np.array([int(number) for number in text.split(",")])
    shape = [int(dim) for dim in match[1].split(",")]
    order = [int(dim) for dim in match[2].split(",")] if match[2] else list(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)


def _read_named(sizes: str, names: str) -> np.ndarray:
    """Groups by axes, or parts of them: `'x':(2)4` is the part of size 4 of axis x after an outer one of 2."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    chosen = {name: (int(before or 1), int(size or shape[name])) for name, before, size in _NAMED_PART.findall(names)}
    dims, together = [], []
    for name, size in shape.items():
        before, part = chosen.get(name, (1, 1))
        together += [len(dims) + 1] if name in chosen else []
        dims += [before, part, size // before // part]
    apart = [dim for dim in range(len(dims)) if dim not in together]
    size = math.prod(dims[dim] for dim in together)
    return np.arange(math.prod(dims)).reshape(dims).transpose(apart + together).reshape(-1, size)


def axes_touched(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which devices of a group, or source and target of a permute, differ.

    >>> import jaxpar
    >>> axes_touched(np.array([[0, 1], [2, 3]]), jaxpar.make_mesh(data=2, fsdp=4))
    ('fsdp',)
    """
    places = np.array(np.unravel_index(groups, mesh.devices.shape))
    varying = (places != places[:, :, :1]).any(axis=(1, 2)) if groups.size else np.zeros(len(places), bool)
    return tuple(axis for axis, varies in zip(mesh.axis_names, varying, strict=True) if varies)


def axes_of_groups(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of each group lie; none if they fill no such axes.

    >>> import jaxpar
    >>> axes_of_groups(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), jaxpar.make_mesh(data=2, fsdp=2, model=2))
    ('fsdp', 'model')
    """
    axes = axes_touched(groups, mesh)
    return axes if math.prod(mesh.shape[axis] for axis in axes) == groups.shape[1] else ()


def slices_of(mesh: Mesh, slice_of: Callable[[Any], int] | None = None) -> np.ndarray:
    """Returns the slice that each device is on, in the order in which a program counts them."""
    return np.array([_slice_index(device, slice_of) for device in mesh.devices.flat])


def _slice_index(device: Any, slice_of: Callable[[Any], int] | None) -> int:
    return slice_of(device) if slice_of else getattr(device, "slice_index", 0) or 0


def slice_axes(mesh: Mesh, slices: np.ndarray) -> tuple[str, ...]:
    """Returns the mesh axes along which devices lie on different slices.

    >>> import jaxpar
    >>> slice_axes(jaxpar.make_mesh(data=2, fsdp=4), np.repeat([0, 1], 4))
    ('data',)
    """
    places = np.array(np.unravel_index(np.flatnonzero(slices == slices[0]), mesh.devices.shape))
    held = (len(np.unique(place)) for place in places)
    return tuple(axis for axis, count in zip(mesh.axis_names, held, strict=True) if count < mesh.shape[axis])


def groups_of(one: Instruction, mesh: Mesh, slices: np.ndarray) -> np.ndarray:
    """Returns which devices of a mesh take part in a collective together: see `read_groups`.

    The TPU compiler cuts a program for several slices into one for each, which counts its own devices alone: its groups
    are those of the first slice.
    """
    groups = read_groups(one.text, mesh.size)
    first = np.flatnonzero(slices == slices[0])
    is_own = groups.size and len(first) < mesh.size and groups.max() < len(first)
    return first[groups] if is_own else groups
