"""What one instruction does: matrix operations and bytes of memory; changes with how XLA fuses and lays out.

Bytes are those of the large memory alone, with what rounding up to tiles adds; of a slice, a gather or an update in
place, only the part that moves. Operations count the idle part of the matrix units where a product is smaller than
they are.
"""

import math
import re
from typing import NamedTuple

from jaxpar.inspection.hlo import Array, Computation, Instruction, Program

_PARTIAL = ("dynamic-slice", "gather", "slice")
_THROUGH = ("bitcast", "get-tuple-element", "reshape")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_FREE += ("opt-barrier", "add-dependency", "domain")
_PRECISION = {"highest": 6, "high": 3}


class Work(NamedTuple):
    """What an instruction takes.

    Attributes:
      flops: operations of matrix products, those of idle parts of the matrix units included.
      bytes: what is read from and written to the large memory.
    """

    flops: float = 0.0
    bytes: float = 0.0


class Product(NamedTuple):
    """`batch` products of (rows, inner) by (inner, columns)."""

    batch: int
    rows: int
    inner: int
    columns: int

    def flops(self, side: int) -> float:
        """Operations where matrix units take `side` by `side` at once, one of the two a multiple of 8 alone."""
        up = lambda size, unit: -(-size // unit) * unit
        outer = min(up(self.rows, 8) * up(self.columns, side), up(self.rows, side) * up(self.columns, 8))
        return 2.0 * self.batch * outer * up(self.inner, side)


def work_of(program: Program, computation: Computation, one: Instruction, side: int) -> Work:
    """Returns what an instruction of a computation takes, those that it calls included.

    Args:
      program: the program.
      computation: where the instruction stands.
      one: it; no loop, branch or collective.
      side: that of the matrix units.
    """
    if one.opcode in _FREE or (one.opcode == "custom-call" and "tpu_custom_call" not in one.text):
        return Work()
    flops = sum(product.flops(side) * passes for product, passes in _products(program, computation, one))
    return Work(flops, _bytes_of(program, computation, one))


def _products(program: Program, computation: Computation, one: Instruction) -> list[tuple[Product, int]]:
    if one.opcode in ("dot", "convolution"):
        inputs = [computation.instructions[name].arrays[0] for name in one.operands[:2]]
        read = read_dot if one.opcode == "dot" else read_convolution
        precision = re.search(r"operand_precision=\{(\w+)", one.text)
        return [
            (read(one.text, inputs[0], inputs[1], one.arrays[0]), _PRECISION.get(precision[1] if precision else "", 1))
        ]
    if one.opcode != "fusion":
        return []
    found = []
    for name in one.called:
        inner = program.computations.get(name)
        found += [pair for each in inner or () for pair in _products(program, inner, each)]  # pyright: ignore
    return found


def read_dot(text: str, left: Array, right: Array, out: Array) -> Product:
    """Returns the product that a `dot` is, by its text and the arrays it takes and gives."""
    dims = lambda name: [
        int(dim) for dim in (re.search(rf"{name}=\{{([\d,]*)\}}", text) or ["", ""])[1].split(",") if dim
    ]
    batch = math.prod(left.dims[dim] for dim in dims("lhs_batch_dims"))
    inner = math.prod(left.dims[dim] for dim in dims("lhs_contracting_dims"))
    rows, columns = (math.prod(side.dims) // (batch * inner or 1) for side in (left, right))
    return Product(batch, rows, inner, columns)


def read_convolution(text: str, left: Array, right: Array, out: Array) -> Product:
    """Returns the product that a `convolution` is; on TPU every matrix product is written as one.

    A spatial dim may be one of rows (the kernel has size 1), of columns (the input has size 1, padded), an inner one
    (the output has size 1), or one of the batch (each place of the output meets one of the kernel).

    >>> text = "window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"
    >>> read_convolution(text, Array("bf16", (6, 2048, 5120, 1)), Array("bf16", (5120, 32, 256, 1)),
    ...                  Array("bf16", (6, 2048, 32, 256)))
    Product(batch=1, rows=12288, inner=5120, columns=8192)
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if labels is None:
        return Product(0, 0, 0, 0)
    ins, kernels, outs = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", text)
    spatial = sorted(label for label in ins if label.isdigit())
    options = _read_window(window[1] if window else "", len(spatial))
    batch, rows, inner, columns = (
        1,
        out.dims[outs.index("b")],
        right.dims[kernels.index("i")],
        out.dims[outs.index("f")],
    )
    groups = re.search(r"batch_group_count=(\d+)", text)
    features = re.search(r"feature_group_count=(\d+)", text)
    for label, option in zip(spatial, options, strict=True):
        given, size, made = left.dims[ins.index(label)], right.dims[kernels.index(label)], out.dims[outs.index(label)]
        met = _count_pairs(given, size, made, option)
        if size == 1:
            rows *= made
        elif given == 1:
            columns *= met
        elif made == 1:
            inner *= met
        elif met <= max(made, size):
            batch *= met
        else:
            # Padding meets nothing, but the units go through it.
            rows, inner = rows * made, inner * math.ceil(met / made)
    if features and int(features[1]) > 1:
        batch, columns = batch * int(features[1]), columns // int(features[1])
    if groups and int(groups[1]) > 1:
        batch, columns = batch * int(groups[1]), columns // int(groups[1])
    return Product(batch, rows, inner, columns)


def _read_window(text: str, count: int) -> list[dict[str, int]]:
    fields = dict(part.split("=") for part in text.split())
    split = lambda name, default: fields[name].split("x") if name in fields else [default] * count
    pads = [pad.split("_") for pad in split("pad", "0_0")]
    return [
        {"low": int(pad[0]), "stride": int(stride), "spread": int(spread), "gap": int(gap)}
        for pad, stride, spread, gap in zip(
            pads, split("stride", "1"), split("lhs_dilate", "1"), split("rhs_dilate", "1"), strict=True
        )
    ]


def _count_pairs(given: int, size: int, made: int, option: dict[str, int]) -> int:
    """How many pairs of an output's and a kernel's place meet an element of the input, and no padding."""
    low, stride, spread, gap = option["low"], option["stride"], option["spread"], option["gap"]
    if size * made > 2**20:
        return min(size * made, given * max(size, made))
    count, last = 0, (given - 1) * spread
    for place in range(size):
        first = place * gap - low
        count += sum(
            1 for out in range(made) if 0 <= first + out * stride <= last and (first + out * stride) % spread == 0
        )
    return count


def _bytes_of(program: Program, computation: Computation, one: Instruction) -> float:
    if one.opcode == "fusion" and one.called and one.called[0] in program.computations:
        inner = program.computations[one.called[0]]
        total = _written(program, inner, one)
        needed = _needed(program, inner, math.inf)
        for parameter, name in zip(inner.parameters, one.operands, strict=False):
            operand = computation.instructions.get(name)
            if operand is not None:
                total += _bytes_in_hbm(operand) * min(needed.get(parameter.name, 0.0) / _count(parameter), 1.0)
        return total
    if one.opcode in ("dynamic-update-slice", "scatter"):
        moved = computation.instructions[one.operands[1 if one.opcode.startswith("d") else -1]]
        return 2 * _bytes_in_hbm(moved)
    written = sum(place.bytes(array) for place, array in zip(one.places, one.arrays, strict=False) if place.space == 0)
    if one.opcode in _PARTIAL:
        return 2 * written
    operands = (computation.instructions.get(name) for name in one.operands)
    return written + sum(_bytes_in_hbm(operand) for operand in operands if operand is not None)


def _bytes_in_hbm(one: Instruction) -> float:
    if len(one.arrays) != 1 or not one.places or one.places[0].space:
        return 0.0
    return one.places[0].bytes(one.arrays[0])


def _count(one: Instruction) -> int:
    return max(sum(math.prod(array.dims) for array in one.arrays), 1)


def _moves(one: Instruction) -> bool:
    """Whether an instruction inside a fusion is a collective, which reads and writes for itself."""
    return one.opcode.startswith(("all-", "reduce-scatter", "collective"))


def _written(program: Program, inner: Computation, outer: Instruction) -> float:
    """What a fusion writes to the large memory: of an update in place its update, of what it passes on nothing."""
    root = inner.instructions[inner.root]
    made = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(
        place.bytes(array) * _made(program, inner, one)
        for one, place, array in zip(made, outer.places, outer.arrays, strict=False)
        if place.space == 0
    )


def _made(program: Program, inner: Computation, one: Instruction) -> float:
    """Which part of an output a fusion makes anew."""
    whole = _count(one)
    while one.opcode in _THROUGH and one.operands and one.operands[0] in inner.instructions:
        one = inner.instructions[one.operands[0]]
    if one.opcode == "dynamic-update-slice":
        return _count(inner.instructions[one.operands[1]]) / whole
    if one.opcode == "parameter" or _moves(one):
        return 0.0
    if one.opcode == "fusion" and one.called and one.called[0] in program.computations:
        nested = program.computations[one.called[0]]
        root = nested.instructions[nested.root]
        return 1.0 if root.opcode == "tuple" else _made(program, nested, root)
    return 1.0


def _needed(program: Program, inner: Computation, wanted: float) -> dict[str, float]:
    """How many elements of each input a fusion reads to make so many of its output: of a slice, those in it alone."""
    needed = {inner.root: min(wanted, _count(inner.instructions[inner.root]))}
    for one in reversed(list(inner)):
        count = needed.get(one.name, 0.0)
        if not count or _moves(one) or "Async" in one.attribute("custom_call_target"):
            continue
        operands = [inner.instructions[name] for name in one.operands if name in inner.instructions]
        if one.opcode == "fusion" and one.called and one.called[0] in program.computations:
            nested = program.computations[one.called[0]]
            parts = _needed(program, nested, count)
            counts = [parts.get(parameter.name, 0.0) for parameter in nested.parameters]
        else:
            counts = [_needed_of(one, place, operand, count) for place, operand in enumerate(operands)]
        for operand, part in zip(operands, counts, strict=False):
            needed[operand.name] = needed.get(operand.name, 0.0) + part
    return needed


def _needed_of(one: Instruction, place: int, operand: Instruction, count: float) -> float:
    """How many elements of an operand an instruction reads to make so many of its own."""
    whole, own = _count(operand), _count(one)
    if one.opcode == "tuple":
        return 0.0 if operand.opcode == "parameter" or _moves(operand) else whole
    if place == 0 and one.opcode in _PARTIAL:
        return min(count, own)
    if place == 0 and one.opcode == "dynamic-update-slice":
        return 0.0
    if place == 0 and one.opcode == "pad":
        return count * whole / own
    if own == whole or one.opcode == "broadcast":
        return min(count, whole)
    return whole
