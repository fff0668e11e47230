"""What a compiled program's text says: computations, instructions, loops and sources; changes with how XLA prints HLO.

Reads the optimized HLO of XLA's CPU, GPU and TPU compilers, jax 0.10 to 0.12.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TABLE_ROW = re.compile(r"^(\d+) (.*)$")
_FIELD = re.compile(r"(\w+)=(\d+)")
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_MOVES = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


class Array(NamedTuple):
    """The dtype and dims of one array, as HLO spells them: `bf16`, `(4, 512)`."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes it takes without padding; 0 for a token.

        >>> Array("bf16", (4, 3)).bytes, Array("pred", (8,)).bytes, Array("s4", (8,)).bytes
        (24, 8, 4)
        """
        return math.ceil(math.prod(self.dims) * _bits(self.dtype) / 8)

    @property
    def width(self) -> int:
        """The bytes of an element, 1 at least."""
        return max(_bits(self.dtype) // 8, 1)


class Place(NamedTuple):
    """How an array lies in memory.

    Attributes:
      order: its dims, the one that lies closest together first; empty where the text doesn't say.
      tile: the sizes that its last dims in that order are rounded up to, outermost first.
      space: which memory: 0 is the large one, HBM, others are on the chip.
    """

    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    def bytes(self, array: Array) -> int:
        """Returns how many bytes an array takes here, with what rounding up to tiles adds.

        >>> Place((1, 0), (8, 128)).bytes(Array("f32", (9, 20))) == 16 * 128 * 4
        True
        """
        dims = [array.dims[dim] for dim in self.order]
        for number, size in enumerate(reversed(self.tile)):
            if number < len(dims):
                dims[number] = -(-dims[number] // size) * size
        return Array(array.dtype, tuple(dims)).bytes if self.order else array.bytes


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: its own.
      opcode: what it does, as `all-gather-start`.
      arrays: what it gives, a tuple's leaves in order.
      operands: the names of its inputs.
      text: all that stands after the opcode: operands, attributes, metadata.
      places: where each array of `arrays` lies.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    places: tuple[Place, ...] = ()

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it runs: a loop's condition and body, a fusion's, a branch's."""
        branches = [name.strip().lstrip("%") for listed in _BRANCHES.findall(self.text) for name in listed.split(",")]
        return (*_CALLED.findall(self.text), *branches)

    def attribute(self, name: str) -> str:
        """The text of an attribute up to its end, or nothing where it has none."""
        match = re.search(rf"\b{name}=([\w.%\-\"]+)", self.text)
        return match[1].strip('%"') if match else ""


class Frame(NamedTuple):
    """A line of Python on the way to an operation: `Attention.__call__`, its file and line."""

    function: str
    file: str
    line: int


@dataclasses.dataclass
class Computation:
    """A name, its instructions by theirs, in the order in which they run, and the name of the one that it returns."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def parameters(self) -> list[Instruction]:
        """Its inputs, in their order."""
        found = [one for one in self if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.text.split(")", 1)[0]))


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the one that runs first.
      frames: the source table: id -> the innermost frame, and the id of its caller or 0.
    """

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[Frame, int]]

    def trace(self, instruction: Instruction) -> list[Frame]:
        """Returns the lines of Python that an instruction comes from, the innermost first; none where it isn't said."""
        match = re.search(r"stack_frame_id=(\d+)", instruction.text)
        if not match:
            file, line = instruction.attribute("source_file"), instruction.attribute("source_line")
            return [Frame("", file, int(line))] if file and line else []
        found, number = [], int(match[1])
        while number in self.frames:
            frame, caller = self.frames[number]
            found.append(frame)
            number = caller
        return found

    def runs(self) -> dict[str, int | None]:
        """Returns how often each computation runs a step: 1, the product of loops' trips, or None where unknown.

        A computation called from several places runs as often as all of them together.
        """
        counts: dict[str, int | None] = {}

        def visit(name: str, times: int | None) -> None:
            before = counts.get(name, 0)
            counts[name] = None if before is None or times is None else before + times
            for instruction in self.computations[name]:
                if instruction.opcode.endswith(("-update", "-done")):
                    # It names what its start has run.
                    continue
                trips = loop_trips(self, self.computations[name], instruction) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    if called in self.computations:
                        visit(called, None if times is None or trips is None else times * trips)

        visit(self.entry, 1)
        return counts


def read_program(text: str) -> Program:
    """Returns what the text of a compiled program says.

    Raises:
      ValueError: it isn't the text of an HLO module.

    >>> program = read_program('''HloModule m
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
    ... }''')
    >>> [(one.opcode, one.arrays[0].bytes) for one in program.computations[program.entry]]
    [('parameter', 32), ('all-reduce', 32)]
    """
    computations: dict[str, Computation] = {}
    entry, current, tables, table = "", None, {}, ""
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and "->" in line:
                current = Computation(header[2])
                entry = current.name if header[1] else entry
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = line
            elif table and (row := _TABLE_ROW.match(line)):
                tables.setdefault(table, {})[int(row[1])] = row[2]
        elif line.rstrip() == "}":
            # A Pallas kernel's text may hold lines that begin with a brace: only a bare one ends a computation.
            computations[current.name], current = current, None
        elif parsed := _INSTRUCTION.match(line):
            instruction = _read_instruction(parsed)
            current.instructions[instruction.name] = instruction
            if parsed[1]:
                current.root = instruction.name
    if not entry:
        raise ValueError(f"The text begins {text[:60]!r}: no HLO module; give what compiled.as_text() returns.")
    return Program(computations, entry, _read_frames(tables))


def _read_instruction(parsed: re.Match[str]) -> Instruction:
    _, name, shape, opcode, rest = parsed.groups()
    found = _ARRAY.findall(shape)
    arrays = tuple(
        Array(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)) for dtype, dims, *_ in found
    )
    inside = rest.split(")", 1)[0] if opcode in ("constant", "parameter") else rest.split("), ", 1)[0]
    places = tuple(_read_place(order, layout) for _, _, order, layout in found)
    return Instruction(name, opcode, arrays, tuple(re.findall(r"%([\w.\-]+)", inside)), rest, places)


@functools.cache
def _read_place(order: str, layout: str) -> Place:
    tile, space = re.match(r"T\(([\d,]+)\)", layout), re.search(r"S\((\d+)\)", layout)
    numbers = lambda text: tuple(int(number) for number in text.split(",") if number)
    return Place(numbers(order), numbers(tile[1]) if tile else (), int(space[1]) if space else 0)


def _read_frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[Frame, int]]:
    fields = lambda text: {key: int(value) for key, value in _FIELD.findall(text)}
    files = {number: text.strip('"') for number, text in tables.get("FileNames", {}).items()}
    functions = {number: text.strip('"') for number, text in tables.get("FunctionNames", {}).items()}
    locations = {number: fields(text) for number, text in tables.get("FileLocations", {}).items()}
    frames = {}
    for number, text in tables.get("StackFrames", {}).items():
        row = fields(text)
        place = locations.get(row.get("file_location_id", 0), {})
        frame = Frame(
            functions.get(place.get("function_name_id", 0), ""),
            files.get(place.get("file_name_id", 0), ""),
            place.get("line", 0),
        )
        # XLA prints the caller's number plus one, so that none is 1.
        frames[number] = (frame, max(row.get("parent_frame_id", 1) - 1, 0))
    return frames


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def loop_trips(program: Program, caller: Computation, loop: Instruction) -> int | None:
    """Returns how often a loop's body runs: what XLA says, or what its counter does; None where neither tells.

    XLA on TPU says nothing. Its windowed products count by two and more: the step is read, not only the bound.
    """
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    condition = program.computations.get(loop.attribute("condition"))
    body = program.computations.get(loop.attribute("body"))
    if condition is None or body is None:
        return None
    element = _counter_of(program, condition)
    root = body.instructions[body.root]
    initial = caller.instructions.get(loop.operands[0]) if loop.operands else None
    if element is None or root.opcode != "tuple" or initial is None or initial.opcode != "tuple":
        return None
    index, bound = element
    start = _evaluate(program, caller, initial.operands[index], lambda _: None)
    if start is None:
        return None
    # From two values, for a counter may be multiplied.
    steps = []
    for value in (start, start + 1):
        known = lambda one, value=value: value if _element_of(one) == index else None
        after = _evaluate(program, body, root.operands[index], known)
        steps.append(None if after is None else after - value)
    if steps[0] is None or steps[0] <= 0 or steps[0] != steps[1]:
        return None
    return max(0, math.ceil((bound - start) / steps[0]))


def _counter_of(program: Program, condition: Computation) -> tuple[int, int] | None:
    """Which element of a loop's state is compared, and with which number, where it runs while it is less."""
    test, inner = condition.instructions[condition.root], condition
    outer = lambda one: condition.instructions.get(one.name)
    if test.opcode == "fusion" and test.called and test.called[0] in program.computations:
        inner = program.computations[test.called[0]]
        inputs = {one.name: name for one, name in zip(inner.parameters, test.operands, strict=False)}
        test, outer = inner.instructions[inner.root], lambda one: condition.instructions.get(inputs.get(one.name, ""))
    if test.opcode != "compare" or len(test.operands) != 2 or "direction=LT" not in test.text:
        return None
    counter, limit = (inner.instructions.get(name) for name in test.operands)
    while counter is not None and counter.opcode in _MOVES:
        counter = inner.instructions.get(counter.operands[0])
    counter = counter if counter is None or _element_of(counter) is not None else outer(counter)

    def value(one: Instruction) -> int | None:
        given = outer(one)
        return None if given is None else _evaluate(program, condition, given.name, lambda _: None)

    bound = None if limit is None else _evaluate(program, inner, limit.name, value)
    index = None if counter is None else _element_of(counter)
    return None if index is None or bound is None else (index, bound)


def _element_of(instruction: Instruction) -> int | None:
    """Which element of a tuple an instruction takes; None where it takes none."""
    return int(instruction.attribute("index")) if instruction.opcode == "get-tuple-element" else None


def _evaluate(
    program: Program, computation: Computation, name: str, known: Callable[[Instruction], int | None]
) -> int | None:
    """The whole number that a scalar is, by those of the inputs and their elements that are known; None if it isn't."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    if (number := known(instruction)) is not None:
        return number
    value = lambda operand: _evaluate(program, computation, operand, known)
    if instruction.opcode == "constant":
        match = re.match(r"(-?\d+)\)", instruction.text)
        return int(match[1]) if match else None
    if instruction.opcode in _MOVES:
        return value(instruction.operands[0])
    if instruction.opcode == "get-tuple-element":
        source = computation.instructions.get(instruction.operands[0])
        index = int(instruction.attribute("index"))
        return value(source.operands[index]) if source is not None and source.opcode == "tuple" else None
    if instruction.opcode in _ARITHMETIC and len(instruction.operands) == 2:
        left, right = map(value, instruction.operands)
        return None if left is None or right is None else _ARITHMETIC[instruction.opcode](left, right)
    if instruction.opcode == "fusion" and instruction.called[:1] and instruction.called[0] in program.computations:
        inner = program.computations[instruction.called[0]]
        inputs = {one.name: operand for one, operand in zip(inner.parameters, instruction.operands, strict=False)}
        return _evaluate(
            program, inner, inner.root, lambda one: value(inputs[one.name]) if one.name in inputs else None
        )
    return None
