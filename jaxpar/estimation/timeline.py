"""The walk over a compiled program's schedule that tells how long a step takes, and what it waits for.

Instructions run one after the other, as XLA scheduled them; each for as long as its operations or its bytes take,
whichever is longer (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785). A collective keeps the links of its
own axis. One that starts and ends apart goes on beside what stands between, after those that wait for the same links;
so do copies to and from the chip, with the memory's bandwidth that others leave. A loop runs its body as often as it
says; of a conditional the longest branch counts.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxpar.estimation.chips import Rates
from jaxpar.estimation.costs import work_of
from jaxpar.estimation.links import DCN, ICI, Torus, Use, time_collective, time_network
from jaxpar.inspection.collectives import KINDS, read_move, read_transfer, starts_apart
from jaxpar.inspection.groups import slice_axes, slices_of
from jaxpar.inspection.hlo import Computation, Instruction, Program, loop_trips

MATH, MEMORY, KERNEL = "math", "HBM", "kernels"
PACE = "pace"


class Wait(NamedTuple):
    """What a step waits for: over which mesh axes, on which kind of link: `ICI`, `DCN`, or `pace` of other slices."""

    axes: tuple[str, ...]
    link: str


@dataclasses.dataclass
class Spent:
    """What a program, or a part of it, takes.

    Attributes:
      seconds: in all.
      busy: those bound by math, memory and kernels.
      waits: those in which it waits for others.
      sent: those in which links carry something, hidden behind work or not.
      unknown_loops: how many loops' trips the compiler doesn't tell.
      windows: those in which loops that XLA makes of a product and its collective wait for their permutes.
      unknown_kernels: how many calls of kernels whose operations nobody tells.
      held: those in which each link is kept.
    """

    seconds: float = 0.0
    busy: dict[str, float] = dataclasses.field(default_factory=dict)
    waits: dict[Wait, float] = dataclasses.field(default_factory=dict)
    sent: dict[Wait, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    windows: float = 0.0
    unknown_kernels: float = 0.0
    held: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Spent", times: float = 1.0) -> None:
        """Adds what another took, so many times."""
        self.seconds += other.seconds * times
        self.unknown_loops += other.unknown_loops
        self.windows += other.windows * times
        self.unknown_kernels += other.unknown_kernels * times
        for name in ("busy", "waits", "sent", "held"):
            for key, seconds in getattr(other, name).items():
                _add(getattr(self, name), key, seconds * times)


def _add(table: dict[Any, float], key: Any, seconds: float) -> None:
    table[key] = table.get(key, 0.0) + seconds


def as_written(use: Use) -> Use:
    """Returns what a sum of parts in zeros takes, by what a sum takes: just that."""
    return use


def as_gathered(use: Use) -> Use:
    """Returns what a sum of parts in zeros takes if the chip gathers: half."""
    return use._replace(seconds=use.seconds / 2)


class Machine(NamedTuple):
    """What a program runs on.

    Attributes:
      mesh: its devices.
      torus: where they are, and what their links carry.
      kernels: the operations in one call of each Pallas kernel, by its name and its outputs' shapes.
      of_parts: what a sum of parts in zeros takes, as XLA writes some gathers: `as_written` or `as_gathered`.
    """

    mesh: Mesh
    torus: Torus
    kernels: Mapping[tuple[str, tuple[tuple[int, ...], ...]], int]
    of_parts: Callable[[Use], Use] = as_written


def walk(program: Program, machine: Machine) -> Spent:
    """Returns what a step of the program takes on a machine."""
    spent, torus = Spent(), machine.torus
    spent.add(_Walk(program, machine).run(program.entry))
    slices = np.unique(torus.slices)
    if len(slices) > 1:
        axes = slice_axes(machine.mesh, torus.slices)
        late = spent.seconds * (torus.rates.doubling ** -math.log2(len(slices)) - 1)
        spent.add(Spent(late, waits={Wait(axes, PACE): late}))
    return spent


class _Walk:
    def __init__(self, program: Program, machine: Machine):
        self.program, self.machine = program, machine
        self.done: dict[str, Spent] = {}
        # What starts before a loop may go on inside of it, and end after it.
        self.apart = {
            _channel(one)
            for computation in program.computations.values()
            if starts_apart(computation)
            for one in computation
            if one.opcode in KINDS
        }

    def run(self, name: str) -> Spent:
        if name not in self.done:
            self.done[name] = _Track(self, self.program.computations[name]).run()
        return self.done[name]

    def collective_in(self, name: str) -> Instruction | None:
        """The collective that a called computation holds; None without one."""
        inner = self.program.computations.get(name)
        return next((one for one in inner or () if one.opcode.removesuffix("-start") in KINDS), None)

    def kernel_seconds(self, computation: Computation, one: Instruction) -> float | None:
        """How long a Pallas kernel multiplies; None where nobody tells what it does."""
        if one.name.startswith("ragged-dot"):
            return self._grouped_flops(computation, one) / self.machine.torus.rates.kernel
        shapes, called = tuple(array.dims for array in one.arrays), _plain(one.name)
        named = [
            (len(name), count)
            for (name, out), count in self.machine.kernels.items()
            if name and called.startswith(_plain(name)) and out == shapes
        ]
        return max(named)[1] / self.machine.torus.rates.kernel if named else None

    def _grouped_flops(self, computation: Computation, one: Instruction) -> float:
        """Those of a grouped product: over an `expert` axis, of as many rows as a device gets if all get alike.

        Its buffers have room for the worst case, of whose empty rows the kernel computes nothing.
        """
        operands = [computation.instructions.get(name) for name in one.operands]
        arrays = [each.arrays[0] for each in operands if each is not None and len(each.arrays) == 1]
        left = next((array for array in arrays if len(array.dims) == 2), None)
        if left is None:
            return 0.0
        out = one.arrays[0].dims
        return 2.0 * math.prod(left.dims) * out[-1] / self.machine.mesh.shape.get("expert", 1)

    def use_of(self, computation: Computation, one: Instruction) -> tuple[Use, Wait]:
        torus, mesh = self.machine.torus, self.machine.mesh
        move = read_move(self.program, computation, one, mesh, torus.slices)
        use = time_collective(torus, move.kind, move.groups, move.bytes)
        return self.machine.of_parts(use) if move.lies_in_zeros else use, Wait(move.axes, ICI)


class _Flight(NamedTuple):
    """A collective under way: from when, until when, what it is, and which one kept its links before."""

    begin: float
    end: float
    wait: Wait
    holder: Wait


class _Track:
    """One computation as it runs: the time now, until when links are kept, what is under way."""

    def __init__(self, walk: _Walk, computation: Computation):
        self.walk, self.computation, self.spent = walk, computation, Spent()
        self.now = 0.0
        self.free: dict[str, float] = {}
        self.holders: dict[str, Wait] = {}
        self.ends: dict[str, _Flight] = {}
        self.copies: dict[str, float] = {}

    def run(self) -> Spent:
        for one in self.computation:
            self._step(one)
        self.spent.seconds = self.now
        return self.spent

    def _step(self, one: Instruction) -> None:
        opcode = one.opcode
        inner = next((found for name in one.called if (found := self.walk.collective_in(name))), None)
        if opcode == "while":
            trips = loop_trips(self.walk.program, self.computation, one)
            self.spent.unknown_loops += trips is None
            self._join(self.walk.run(one.attribute("body")), 1 if trips is None else trips)
        elif opcode == "conditional":
            branches = [self.walk.run(name) for name in one.called if name in self.walk.program.computations]
            self._join(max(branches, key=lambda spent: spent.seconds))
        elif opcode == "call":
            self._join(self.walk.run(one.called[0]))
        elif opcode in KINDS:
            self._wait(self._start(one.name, *self.walk.use_of(self.computation, one)))
        elif opcode.removesuffix("-start") in KINDS:
            self._start(one.name, *self.walk.use_of(self.computation, one))
        elif opcode.removesuffix("-done") in KINDS:
            self._wait(one.operands[0])
        elif opcode in ("send", "recv", "recv-done"):
            self._transfer(one)
        elif inner is not None:
            self._fused_collective(one, inner)
        elif opcode in ("copy-start", "async-start"):
            self.copies[one.name] = self._copy_seconds(one)
        elif opcode in ("copy-done", "async-done"):
            self._finish_copy(one.operands[0])
        else:
            self._compute(one)

    def _join(self, spent: Spent, times: float = 1.0) -> None:
        """Goes through a computation that is called: what is under way here goes on meanwhile, and keeps its links."""
        before, seconds = self.spent.seconds, spent.seconds * times
        self.spent.add(spent, times)
        self.spent.seconds = before
        held = {link: kept * times for link, kept in spent.held.items()}
        taken = {link: self.free.get(link, 0.0) - self.now for link in held if self.free.get(link, 0.0) > self.now}
        self._pass(seconds, 0.0)
        for link in taken:
            late = held[link] + taken[link] - seconds
            if late > 0:
                seconds += late
                self._charge(self.holders[link], late)
        for link, left in taken.items():
            self.free[link] = self.now - seconds + left + held[link]

    def _charge(self, wait: Wait, seconds: float) -> None:
        _add(self.spent.waits, wait, seconds)
        self._pass(seconds, 0.0)

    def _start(self, name: str, use: Use, wait: Wait) -> str:
        taken = max(use.links, key=lambda link: self.free.get(link, 0.0), default="")
        begin = max(self.now, self.free.get(taken, 0.0))
        holder = self.holders.get(taken, wait) if begin > self.now else wait
        for link in use.links:
            self.free[link], self.holders[link] = begin + use.seconds, wait
            _add(self.spent.held, link, use.seconds)
        self.ends[name] = _Flight(begin, begin + use.seconds + use.latency, wait, holder)
        _add(self.spent.sent, wait, use.seconds + use.latency)
        return name

    def _wait(self, name: str) -> None:
        flight = self.ends.pop(name, None)
        if flight is None or flight.end <= self.now:
            return
        if "windowed_dot_general" in self.computation.name:
            self.spent.windows += flight.end - self.now
        if flight.begin > self.now:
            # Another one keeps the link.
            self._charge(flight.holder, flight.begin - self.now)
        self._charge(flight.wait, flight.end - self.now)

    def _fused_collective(self, one: Instruction, inner: Instruction) -> None:
        """A fusion that holds a collective: its start, its end, work beside it, or the whole of it."""
        holder = next(name for name in one.called if self.walk.collective_in(name) is not None)
        within = self.walk.program.computations[holder]
        targets = {each.attribute("custom_call_target") for each in within}
        channel = _channel(inner)
        if "AsyncCollectiveStart" in targets:
            self._start(channel, *self.walk.use_of(within, inner))
        elif "AsyncCollectiveDone" in targets:
            self._wait(channel)
        elif channel in self.walk.apart:
            self._compute(one)
        else:
            self._start(channel, *self.walk.use_of(within, inner))
            self._compute(one)
            self._wait(channel)

    def _transfer(self, one: Instruction) -> None:
        """What goes to another slice and comes from there: a pair of `send` and `recv` is one collective."""
        machine = self.walk.machine
        transfer = read_transfer(self.computation, one, machine.mesh, machine.torus.slices)
        if transfer is None:
            return
        if one.opcode == "send":
            use = time_network(machine.torus.rates, transfer.kind, transfer.slices, transfer.bytes)
            self._start(transfer.name, use, Wait(transfer.axes, DCN))
        elif one.opcode == "recv-done":
            self._wait(transfer.name)

    def _copy_seconds(self, one: Instruction) -> float:
        source = self.computation.instructions.get(one.operands[0]) if one.operands else None
        if source is None or not one.arrays:
            return 0.0
        moved = min((array.bytes for array in one.arrays[:2] if array.bytes), default=0)
        return moved / self.walk.machine.torus.rates.hbm

    def _finish_copy(self, name: str) -> None:
        if name not in self.copies:
            return
        left = 0.0
        for each in list(self.copies):
            left += self.copies.pop(each)
            if each == name:
                break
        if left:
            self._keep_busy(MEMORY, left, left)

    def _compute(self, one: Instruction) -> None:
        rates = self.walk.machine.torus.rates
        work = work_of(self.walk.program, self.computation, one, rates.array)
        products, memory = work.flops / rates.math, work.bytes / rates.hbm
        kernel = 0.0
        if one.opcode == "custom-call" and "tpu_custom_call" in one.text:
            found = self.walk.kernel_seconds(self.computation, one)
            self.spent.unknown_kernels += found is None
            kernel = found or 0.0
        seconds = max(products, memory, kernel)
        bound = KERNEL if kernel == seconds else MATH if products == seconds else MEMORY
        if seconds:
            self._keep_busy(bound, seconds, memory)

    def _keep_busy(self, bound: str, seconds: float, memory: float) -> None:
        _add(self.spent.busy, bound, seconds)
        self._pass(seconds, memory)

    def _pass(self, seconds: float, memory: float) -> None:
        """Time goes by, of which the memory was in use for so long: copies under way get the rest of it."""
        self.now += seconds
        left = seconds - memory
        for name in list(self.copies):
            if left <= 0:
                break
            part = min(left, self.copies[name])
            self.copies[name] -= part
            left -= part


def _plain(name: str) -> str:
    """A name as XLA writes it in a program."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _channel(one: Instruction) -> str:
    return f"channel {one.attribute('channel_id')}"


def torus_of(mesh: Mesh, shape: tuple[int, ...], rates: Rates) -> Torus:
    """Returns where the devices of a target's mesh are, in the order in which a program counts them."""
    devices = list(mesh.devices.flat)
    places = np.array([list(device.coords)[: len(shape)] for device in devices])
    return Torus(shape, places, slices_of(mesh), rates)
