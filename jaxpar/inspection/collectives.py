"""The collectives of a compiled program: what they move over which mesh axes, how often, and where they come from."""

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxpar.inspection.groups import axes_of_groups, axes_touched, groups_of, slice_axes, slices_of
from jaxpar.inspection.hlo import Array, Computation, Frame, Instruction, Program
from jaxpar.inspection.operands import Operand, lies_in_zeros, operands_of, operation_of

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
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
      lies_in_zeros: whether it is a sum of parts in zeros, as XLA writes some gathers: run as one, it sends half.
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
    lies_in_zeros: bool
    crosses_slices: bool
    source: str
    operation: str

    @property
    def bytes_a_step(self) -> int:
        """What a device sends in a step; counted once where the times are not known."""
        return self.bytes * (1 if self.times is None else self.times)

    @property
    def bytes_if_gathered(self) -> int:
        """The same, if what lies in zeros is gathered."""
        return self.bytes_a_step // 2 if self.lies_in_zeros else self.bytes_a_step


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
    fused = _called_by(program, "fusion")
    apart = _called_by(program, "call-start", "async-start")
    found, seen = [], set()
    for computation in program.computations.values():
        if computation.name not in runs:
            continue
        times, is_apart = runs[computation.name], computation.name in apart or starts_apart(computation)
        for one in computation:
            transfer = read_transfer(computation, one, mesh, slices) if one.opcode == "send" else None
            if transfer is not None:
                found.append(_describe_transfer(program, one, transfer, times))
            if (kind := one.opcode.removesuffix("-start")) not in KINDS:
                continue
            channel = (kind, one.attribute("channel_id"))
            if computation.name in fused and channel[1]:
                # The parts of an asynchronous collective that is fused with other work name one channel.
                if channel in seen:
                    continue
                seen.add(channel)
            move = read_move(program, computation, one, mesh, slices)
            found += _describe_move(program, one, move, mesh, times=times, is_asynchronous=is_apart or goes_on(one))
    return tuple(found)


def _called_by(program: Program, *opcodes: str) -> set[str]:
    """The names of the computations that instructions of some kinds call."""
    ones = (one for computation in program.computations.values() for one in computation)
    return {called for one in ones if one.opcode in opcodes for called in one.called}


def starts_apart(computation: Computation) -> bool:
    """Whether a fused computation only starts its collective, as XLA's TPU compiler splits one over several fusions."""
    return any(one.attribute("custom_call_target") == "AsyncCollectiveStart" for one in computation)


def goes_on(one: Instruction) -> bool:
    """Whether a program goes on after it has started a collective; on GPU, XLA writes a start for every one."""
    return one.opcode.endswith("-start") and '"is_sync":true' not in one.text


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


def _describe_transfer(program: Program, one: Instruction, transfer: Transfer, times: int | None) -> Collective:
    return Collective(
        kind=transfer.kind,
        axes=transfer.axes,
        group_size=transfer.slices,
        array=one.arrays[0],
        bytes=wire_bytes(transfer.kind, transfer.bytes, transfer.slices),
        times=times,
        is_asynchronous=True,
        lies_in_zeros=False,
        crosses_slices=True,
        source=describe_source(program.trace(one)),
        operation=operation_of(one),
    )


class Move(NamedTuple):
    """What one collective does in one run, as its text says: what `inspect` counts and `estimate` times.

    Attributes:
      kind: as XLA calls it, or what it is in truth.
      groups: the devices that take part together, a row for each group; of a permute, pairs of source and target.
      axes: the mesh axes along which those of a group differ, though they may fill but a part of one.
      operands: what a device puts in.
      lies_in_zeros: whether it is a sum of parts in zeros.
      crosses_slices: whether devices on different slices take part together.
    """

    kind: str
    groups: np.ndarray
    axes: tuple[str, ...]
    operands: list[Operand]
    lies_in_zeros: bool
    crosses_slices: bool

    @property
    def bytes(self) -> int:
        """All that a device puts in."""
        return sum(operand.array.bytes for operand in self.operands)


def read_move(program: Program, computation: Computation, one: Instruction, mesh: Mesh, slices: np.ndarray) -> Move:
    """Returns what a collective of a computation does."""
    kind = one.opcode.removesuffix("-start")
    if kind == "all-reduce" and "reduce-scatter" in computation.name.replace("_", "-"):
        kind = "reduce-scatter"
    groups = groups_of(one, mesh, slices)
    operands = operands_of(program, computation, one)
    in_zeros = kind == "all-reduce" and lies_in_zeros(program, computation, one.operands)
    crosses = bool((slices[groups] != slices[groups[:, :1]]).any())
    return Move(kind, groups, axes_touched(groups, mesh), operands, in_zeros, crosses)


def _describe_move(
    program: Program, one: Instruction, move: Move, mesh: Mesh, *, times: int | None, is_asynchronous: bool
) -> Iterator[Collective]:
    size, axes = move.groups.shape[1], axes_of_groups(move.groups, mesh)
    if move.kind == "collective-permute":
        size, axes = math.prod(mesh.shape[axis] for axis in move.axes), move.axes
    frames, operation = program.trace(one), operation_of(one)
    for array, maker in move.operands:
        yield Collective(
            kind=move.kind,
            axes=axes,
            group_size=size,
            array=array,
            bytes=wire_bytes(move.kind, array.bytes, size),
            times=times,
            is_asynchronous=is_asynchronous,
            lies_in_zeros=move.lies_in_zeros,
            crosses_slices=move.crosses_slices,
            # What XLA joins has no name of its own.
            source=describe_source(frames or program.trace(maker)),
            operation=operation or operation_of(maker),
        )


def wire_bytes(kind: str, count: int, size: int) -> int:
    """Returns what a device sends when `size` devices each put in `count` bytes, by a ring.

    >>> wire_bytes("all-reduce", 800, 8), wire_bytes("all-gather", 100, 8), wire_bytes("reduce-scatter", 800, 8)
    (1400, 700, 700)
    """
    return round(parts_sent(kind, size) * count)


def parts_sent(kind: str, size: int) -> float:
    """Returns what a device sends of a collective of `size` devices, for each byte that it puts in: by a ring.

    >>> parts_sent("all-reduce", 8), parts_sent("collective-permute", 8), parts_sent("all-reduce", 1)
    (1.75, 1.0, 0.0)
    """
    if size == 1:
        return 0.0
    whole = {
        "all-reduce": 2 * (size - 1) / size,
        "all-gather": size - 1.0,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }
    return whole.get(kind, (size - 1) / size)


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
