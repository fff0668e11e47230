"""The collectives of a compiled program: what they move over which mesh axes, how often, and where they come from."""

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxpar.inspection.hlo import Array, Computation, Frame, Instruction, Program

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?(?:\([^)]*\) ?)?\{([^}]*)\}")
_NAMED_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_LIBRARY = re.compile(r"[/\\]site-packages[/\\](jax|flax|optax|chex)[/\\]")
# The demo's transformer is a model as a user's is; an island stands in one.
_OWN = re.compile(r"[/\\]jaxpar[/\\](?!transformer\.py)[\w/\\]+\.py$")
_BUILDER = re.compile(r"[/\\]jaxpar[/\\](train|step|sharded|data_parallel|evaluation|loss|strategy)\.py$")


class Collective(NamedTuple):
    """What one collective does with one array.

    Attributes:
      kind: as XLA calls it: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute`.
      axes: the mesh axes whose devices take part together; empty where the groups follow no axes of the mesh.
      group_size: how many devices take part together.
      array: what a device puts in.
      bytes: what a device sends in one run: by a ring, n devices each send (n-1)/n of the whole to reduce-scatter or
        gather it, twice that to all-reduce it (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002).
      times: how often it runs a step; None where a loop's trips are not known.
      is_asynchronous: whether the program goes on while it runs.
      crosses_slices: whether devices on different slices take part together.
      source: the model's own line that it comes from, as `Attention.__call__ (model.py:91)`.
      operation: the path of the operation's name in the program, as `up/dot_general`.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    array: Array
    bytes: int
    times: int | None
    is_asynchronous: bool
    crosses_slices: bool
    source: str
    operation: str

    @property
    def bytes_a_step(self) -> int:
        """What a device sends in a step; counted once where the times are not known."""
        return self.bytes * (1 if self.times is None else self.times)


def find_collectives(
    program: Program, mesh: Mesh, *, slice_of: Callable[[Any], int] | None = None
) -> tuple[Collective, ...]:
    """Returns each collective of a program that runs on a mesh, one for each array that it moves.

    An all-reduce of which each device keeps its part alone, as XLA's TPU compiler fuses it, counts as the
    reduce-scatter that it is. An asynchronous one that is split over several fusions counts once, as do the `send` and
    `recv` by which hosts do a part of one between slices. Of a conditional every branch's count, though one runs.

    >>> from jaxpar.inspection.hlo import read_program
    >>> import jaxpar
    >>> program = read_program('''HloModule m
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
    ... }''')
    >>> [(one.kind, one.axes, one.bytes) for one in find_collectives(program, jaxpar.make_mesh(data=4, model=2))]
    [('all-reduce', ('model',), 32)]
    """
    runs = program.runs()
    slices = slices_of(mesh, slice_of)
    fused = {name for computation in program.computations.values() for name in _fused_by(computation)}
    found, seen = [], set()
    for computation in program.computations.values():
        if computation.name not in runs:
            continue
        for one in computation:
            kind = one.opcode.removesuffix("-start")
            transfer = read_transfer(computation, one, mesh, slices) if one.opcode == "send" else None
            if transfer is not None:
                found.append(_read_transfer(program, one, transfer, runs[computation.name]))
            if kind not in KINDS:
                continue
            channel = (kind, one.attribute("channel_id"))
            if computation.name in fused and channel[1]:
                # The parts of an asynchronous collective that is fused with other work name one channel.
                if channel in seen:
                    continue
                seen.add(channel)
            groups = groups_of(one, mesh, slices)
            found += _read_one(program, computation, one, kind, groups, mesh, slices, runs[computation.name])
    return tuple(found)


def read_groups(text: str, count: int) -> np.ndarray:
    """Returns which devices take part together, a row for each group; for a permute, the pairs from source to target.

    XLA spells groups in three ways: as lists, as the rows of a transposed range, and by the names of axes.

    >>> read_groups("replica_groups={{0,2},{1,3}}", 4).tolist()
    [[0, 2], [1, 3]]
    >>> read_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
    [[0, 2], [1, 3]]
    >>> read_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4).tolist()
    [[0, 2], [1, 3]]
    """
    if match := _IOTA.search(text):
        shape = [int(dim) for dim in match[3].split(",")]
        order = [int(dim) for dim in match[4].split(",")] if match[4] else list(range(len(shape)))
        return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(int(match[1]), int(match[2]))
    if match := _NAMED.search(text):
        return _read_named(match[1], match[2])
    if match := _LISTED.search(text):
        listed = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
        # Where they differ in size, the largest takes the longest.
        largest = max(map(len, listed))
        return np.array([group for group in listed if len(group) == largest])
    return np.zeros((0, 2), int) if "source_target_pairs={}" in text else np.arange(count)[None]


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


def axes_of_groups(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of each group lie; none if they fill no such axes.

    >>> import jaxpar
    >>> axes_of_groups(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), jaxpar.make_mesh(data=2, fsdp=2, model=2))
    ('fsdp', 'model')
    """
    places = np.array(np.unravel_index(groups, mesh.devices.shape))
    varying = (places != places[:, :, :1]).any(axis=(1, 2)) if groups.size else np.zeros(len(places), bool)
    axes = tuple(axis for axis, varies in zip(mesh.axis_names, varying, strict=True) if varies)
    return axes if math.prod(mesh.shape[axis] for axis in axes) == groups.shape[1] else ()


def axes_touched(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which devices of a group differ, though they fill but a part of one.

    >>> import jaxpar
    >>> axes_touched(np.array([[0, 1], [2, 3]]), jaxpar.make_mesh(data=2, fsdp=4))
    ('fsdp',)
    """
    places = np.array(np.unravel_index(groups, mesh.devices.shape))
    varying = (places != places[:, :, :1]).any(axis=(1, 2)) if groups.size else np.zeros(len(places), bool)
    return tuple(axis for axis, varies in zip(mesh.axis_names, varying, strict=True) if varies)


def slices_of(mesh: Mesh, slice_of: Callable[[Any], int] | None = None) -> np.ndarray:
    """Returns the slice that each device is on, in the order in which a program counts them."""
    return np.array([_slice_index(device, slice_of) for device in mesh.devices.flat])


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


class Transfer(NamedTuple):
    """A part of a collective between slices, which the hosts do: a `send` and a `recv` of one name.

    Attributes:
      name: what the two have in common.
      kind: as XLA calls the collective.
      slices: how many take part together.
      axes: the mesh axes along which the slices lie.
      bytes: what a device puts in.
    """

    name: str
    kind: str
    slices: int
    axes: tuple[str, ...]
    bytes: int


def read_transfer(computation: Computation, one: Instruction, mesh: Mesh, slices: np.ndarray) -> Transfer | None:
    """Returns what a `send` or `recv`, or its end, is a part of; None if hosts do nothing for it.

    Who takes part is told as `{1,2}x{0:63}`, slices and devices in each, or as pairs or groups of single devices, as
    `{100000->200000}`: a slice's number, from 1, times 100,000 and the device's own.
    """
    name = re.search(r'host_transfer_rendezvous="([^"]*)"', one.text)
    kind = re.search(r'megascale_transfer_type="?([A-Z_]+)', one.text)
    target = re.search(r'megascale_target=(?:"([^"]*)"|(\{\{.*?\}\}))', one.text)
    if not name or not kind or not target:
        return None
    if target[1]:
        listed = re.search(r"\{([\d,]+)\}", target[1])
        count = len(set(listed[1].split(","))) if listed else 1
    else:
        groups = re.findall(r"\{([\d,\->]+)\}", target[2])
        count = max(len({int(number) // 100_000 for number in re.findall(r"\d+", group)}) for group in groups)
    named = {"ONE_TO_ONE": "collective-permute"}.get(kind[1], kind[1].lower().replace("_", "-"))
    # What comes and what goes differ where one of them has room for the worst case.
    pair = [each for each in computation if each.opcode in ("send", "recv") and f'"{name[1]}"' in each.text]
    sizes = [each.arrays[0].bytes for each in pair if each.arrays]
    count_bytes = min(sizes, default=0) if named.startswith("ragged") else max(sizes[:1], default=0)
    if one.opcode == "send" and not named.startswith("ragged"):
        count_bytes = one.arrays[0].bytes
    return Transfer(name[1], named, count, slice_axes(mesh, slices), count_bytes)


def _read_transfer(program: Program, one: Instruction, transfer: Transfer, times: int | None) -> Collective:
    size = transfer.slices
    sent = wire_bytes(transfer.kind, transfer.bytes, size)
    source = describe_source(program.trace(one))
    return Collective(
        transfer.kind, transfer.axes, size, one.arrays[0], sent, times, True, True, source, _operation(one)
    )


def axes_of_moves(pairs: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which a permute moves what devices have, by its pairs of source and target."""
    places = np.array(np.unravel_index(pairs, mesh.devices.shape))
    moves = (places[:, :, 0] != places[:, :, 1]).any(axis=1)
    return tuple(axis for axis, moved in zip(mesh.axis_names, moves, strict=True) if moved)


def _read_one(
    program: Program,
    computation: Computation,
    one: Instruction,
    kind: str,
    groups: np.ndarray,
    mesh: Mesh,
    slices: np.ndarray,
    times: int | None,
) -> Iterator[Collective]:
    size, axes = groups.shape[1], axes_of_groups(groups, mesh)
    if kind == "collective-permute":
        axes = axes_of_moves(groups, mesh)
        size = math.prod(mesh.shape[axis] for axis in axes)
    if kind == "all-reduce" and "reduce-scatter" in computation.name.replace("_", "-"):
        kind = "reduce-scatter"
    is_asynchronous = one.opcode.endswith("-start") or any(
        other.attribute("custom_call_target") == "AsyncCollectiveStart" for other in computation
    )
    frames = program.trace(one)
    for array in arrays_sent(computation, one):
        yield Collective(
            kind,
            axes,
            size,
            array,
            wire_bytes(kind, array.bytes, size),
            times,
            is_asynchronous,
            bool((slices[groups] != slices[groups[:, :1]]).any()),
            describe_source(frames),
            _operation(one),
        )


def arrays_sent(computation: Computation, one: Instruction) -> list[Array]:
    """Returns what a device puts into a collective.

    Of a ragged exchange it is the smaller of what it takes and gives: the larger has room for the worst case. Its other
    operands tell how much goes where.
    """
    operands = [computation.instructions.get(name) for name in one.operands]
    if one.opcode.startswith("ragged"):
        return sorted((array for each in (operands[0], one) if each for array in each.arrays[:1]), key=_bytes_of)[:1]
    return [array for operand in operands if operand for array in operand.arrays]


def _bytes_of(array: Array) -> int:
    return array.bytes


def wire_bytes(kind: str, count: int, size: int) -> int:
    """Returns what a device sends when `size` devices each put in `count` bytes, by a ring.

    >>> wire_bytes("all-reduce", 800, 8), wire_bytes("all-gather", 100, 8), wire_bytes("reduce-scatter", 800, 8)
    (1400, 700, 700)
    """
    if size == 1:
        return 0
    factor = {
        "all-reduce": 2 * (size - 1) / size,
        "all-gather": size - 1,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }.get(kind, (size - 1) / size)
    return round(factor * count)


def describe_source(frames: list[Frame]) -> str:
    """Returns the model's own line among the lines of Python that an operation comes from, the innermost first.

    What the builder does itself, as to sum gradients, has a line of the builder.
    """
    chosen = next(iter(frames), None)
    for frame in frames:
        if not _LIBRARY.search(frame.file) and (_BUILDER.search(frame.file) or not _OWN.search(frame.file)):
            chosen = frame
            break
    if chosen is None:
        return ""
    place = f"{os.path.basename(chosen.file)}:{chosen.line}"
    return f"{chosen.function.replace('.<locals>', '')} ({place})" if chosen.function else place


def _operation(one: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', one.text)
    wrappers = re.compile(
        r"(jit|jvp|transpose|vmap|rematted_computation|checkpoint)\(.*\)$|^(while|body|closed_call|cond)$"
    )
    return "/".join(part for part in (match[1] if match else "").split("/") if part and not wrappers.match(part))


def _fused_by(computation: Computation) -> Iterator[str]:
    for one in computation:
        if one.opcode == "fusion":
            yield from one.called


def _slice_index(device: Any, slice_of: Callable[[Any], int] | None) -> int:
    return slice_of(device) if slice_of else getattr(device, "slice_index", 0) or 0
