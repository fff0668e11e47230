"""What a device puts into a collective, and what made it; changes with how XLA prepares it."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxpar.inspection.hlo import Array, Computation, Instruction, Program

_VIEWS = ("bitcast", "reshape")
_CARRIERS = (*_VIEWS, "copy", "copy-start", "copy-done", "convert")


class Operand(NamedTuple):
    """An array that a device puts in, and the instruction that made it."""

    array: Array
    maker: Instruction


def operands_of(program: Program, computation: Computation, one: Instruction) -> list[Operand]:
    """Returns what a device puts into a collective.

    XLA on GPU lays several arrays flat behind one another to send them at once: each counts by itself. Of a ragged
    exchange it is the smaller of what it takes and gives: the larger has room for the worst case. Its other operands
    tell how much goes where.
    """
    given = [each for name in one.operands if (each := computation.instructions.get(name)) is not None]
    if one.opcode.startswith("ragged"):
        # Its second operand is where its output goes: a start's own arrays begin with what it is given.
        ends = [Operand(array, each) for each in given[:2] for array in each.arrays[:1]]
        return sorted(ends, key=lambda operand: operand.array.bytes)[:1]
    found = []
    for each in given:
        pieces = list(_pieces(program, computation, each)) or [Operand(array, each) for array in each.arrays]
        found += [Operand(array, _seen_through(computation, maker)) for array, maker in pieces]
    return found


def _pieces(program: Program, computation: Computation, one: Instruction) -> Iterator[Operand]:
    """What XLA itself laid behind one another; nothing of what a model did so, which has a name."""
    inner, last, given = computation, one, {}
    if one.opcode == "fusion" and one.called and one.called[0] in program.computations:
        inner = program.computations[one.called[0]]
        last = inner.instructions[inner.root]
        given = dict(zip((each.name for each in inner.parameters), one.operands, strict=False))
    if last.opcode != "concatenate" or "op_name=" in last.text or len(last.arrays[0].dims) != 1:
        return
    for name in last.operands:
        made = _seen_through(inner, inner.instructions[name])
        outside = computation.instructions.get(given.get(made.name, ""))
        yield Operand(inner.instructions[name].arrays[0], made if outside is None else outside)


def _seen_through(computation: Computation, one: Instruction) -> Instruction:
    """What made an array that is but seen in another shape."""
    while one.opcode in _VIEWS and one.operands and one.operands[0] in computation.instructions:
        one = computation.instructions[one.operands[0]]
    return one


def lies_in_zeros(program: Program, computation: Computation, names: tuple[str, ...]) -> bool:
    """Whether all that is summed are arrays of zeros into which each device has written a part.

    So XLA's TPU compiler writes some gathers, on v5p above all. A sum sends twice what a gather does; the chip may do
    either.
    """
    return all(_is_written(program, computation, name, {}) for name in names)


def _is_written(program: Program, computation: Computation, name: str, outer: dict[str, str]) -> bool:
    one = computation.instructions.get(name)
    while one is not None and one.opcode in _CARRIERS:
        one = computation.instructions.get(one.operands[0])
    if one is None:
        return False
    if one.opcode == "fusion" and one.called and one.called[0] in program.computations:
        inner = program.computations[one.called[0]]
        given = [computation.instructions[operand].opcode for operand in one.operands]
        named = dict(zip((each.name for each in inner.parameters), given, strict=False))
        return _is_written(program, inner, inner.root, named)
    target = computation.instructions.get(one.operands[0]) if one.opcode == "dynamic-update-slice" else None
    return target is not None and "broadcast" in (target.opcode, outer.get(target.name))


def operation_of(one: Instruction) -> str:
    """Returns the path of an operation's name in the program, as `up/dot_general`."""
    # A leaf's name, as state.params['up'], comes with its quotes escaped.
    match = re.search(r'op_name="([^"]*)"', one.text.replace("\\'", "'"))
    wrappers = re.compile(
        r"(jit|jvp|transpose|vmap|rematted_computation|checkpoint)\(.*\)$|^(while|body|closed_call|cond)$"
    )
    return "/".join(part for part in (match[1] if match else "").split("/") if part and not wrappers.match(part))
