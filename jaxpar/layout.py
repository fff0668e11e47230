"""`Layout`: where every leaf of a state will lie, before any compile; changes with what a user must see."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.partition import Leaf, Match, PartitionError, Rules, axes_of, match_leaf, match_optimizer_leaf, open_spec
from jaxpar.state import TrainState, is_key, named_leaves

_MUST_SPLIT = {
    "model": ("would all do the same work", "jaxpar.MEGATRON"),
    "fsdp": ("would each hold the same whole state", "jaxpar.FSDP"),
    "stage": ("would all do the same work", "jaxpar.PIPELINE"),
}


class LayoutRow(NamedTuple):
    """One leaf: canonical path, global shape, dtype, spec, the rule that gave it, bytes on a device, and a remark.

    >>> import jax, jaxpar
    >>> layout = layout_state({"w": jax.ShapeDtypeStruct((8, 4), "float32")}, [], jaxpar.make_mesh(data=8))
    >>> [(row.path, row.shape, row.bytes_per_device) for row in layout.rows]
    [('w', (8, 4), 128)]
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    spec: PartitionSpec
    rule: str
    bytes_per_device: int
    note: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every leaf of a state lies: `print` it, or read its rows.

    Attributes:
      mesh: the mesh.
      rows: a `LayoutRow` for each leaf, in the order of `jax.tree.leaves`.
      unused: the patterns of rules that matched no leaf.

    >>> import jax, jaxpar
    >>> layout = layout_state({"w": jax.ShapeDtypeStruct((8, 4), "float32")}, [[("w$", PartitionSpec("model"))]],
    ...                       jaxpar.make_mesh(model=8))
    >>> print(layout)
    path  shape   dtype    spec                   rule  bytes/device
    w     (8, 4)  float32  P('model', None)       w$            16 B
    total 16 B a device, 128 B whole; mesh {'model': 8}
    """

    mesh: Mesh
    rows: tuple[LayoutRow, ...]
    unused: tuple[str, ...] = ()

    @property
    def bytes_per_device(self) -> int:
        """The bytes of state on each device."""
        return sum(row.bytes_per_device for row in self.rows)

    @property
    def shardings(self) -> list[NamedSharding]:
        """A `NamedSharding` for each row."""
        return [NamedSharding(self.mesh, row.spec) for row in self.rows]

    @property
    def left_whole(self) -> tuple[LayoutRow, ...]:
        """The rows that a heuristic left whole over its axis, largest first, each with its reason in `note`."""
        whole = [row for row in self.rows if row.note]
        return tuple(sorted(whole, key=lambda row: -row.bytes_per_device))

    def __str__(self) -> str:
        cells = [("path", "shape", "dtype", "spec", "rule", "bytes/device", "")]
        cells += [
            (
                row.path,
                str(row.shape),
                str(row.dtype),
                _short(row.spec),
                row.rule or "-",
                format_bytes(row.bytes_per_device),
                row.note,
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(6)]
        lines = []
        for line in cells:
            padded = [text.ljust(width) for text, width in zip(line[:5], widths, strict=False)]
            lines.append("  ".join([*padded, line[5].rjust(widths[5]), line[6]]).rstrip())
        whole = sum(math.prod(row.shape) * row.dtype.itemsize for row in self.rows)
        lines.append(
            f"total {format_bytes(self.bytes_per_device)} a device, {format_bytes(whole)} whole; mesh "
            f"{dict(self.mesh.shape)}"
        )
        if self.unused:
            lines.append(f"rules that matched no leaf: {', '.join(map(repr, self.unused))}")
        return "\n".join(lines)

    __repr__ = __str__


def layout_state(
    state: Any, lists: Sequence[Rules], mesh: Mesh, *, made_whole: Sequence[str | None] | None = None
) -> Layout:
    """Returns the layout of a state (arrays or shapes) by annotations and rules.

    Args:
      state: the state.
      lists: the lists of rules.
      mesh: the mesh.
      made_whole: for each leaf the primitive, if any, that makes it whole on every device before it is split.

    Raises:
      PartitionError: a rule can't apply, no rule matches a leaf, or a `model`, `fsdp` or `stage` axis splits nothing.
    """
    named = named_leaves(state)
    annotations = dict(state.static.annotations) if isinstance(state, TrainState) else {}
    shapes = {path: tuple(leaf.shape) for path, leaf in named}
    params: dict[str, tuple[Leaf, Match]] = {}
    rows, used = [], set()
    # Optimizer state comes after the parameters it derives from, whatever the order of the leaves.
    for path, array in sorted(named, key=lambda item: item[0].startswith("opt_state/")):
        leaf = Leaf(path, shapes[path], array.dtype, shapes)
        if not leaf.shape or is_key(array):
            match = Match(open_spec(len(leaf.shape)), "", "", (None,) * (len(lists) + 1), frozenset())
        elif path.startswith("opt_state/"):
            match = match_optimizer_leaf(leaf, lists, mesh, params)
        else:
            match = match_leaf(leaf, lists, mesh, annotations.get(path))
        if path.startswith("params/"):
            params[path.removeprefix("params/")] = (leaf, match)
        used |= match.used
        rows.append(_row(leaf, match, mesh))
    _check_axes_split(rows, mesh)
    patterns = [pattern for rules in lists for pattern, spec in rules if isinstance(spec, PartitionSpec)]
    order = {path: index for index, (path, _) in enumerate(named)}
    rows = sorted(rows, key=lambda row: order[row.path])
    if made_whole is not None:
        rows = [_note_maker(row, maker) for row, maker in zip(rows, made_whole, strict=True)]
    return Layout(mesh, tuple(rows), tuple(pattern for pattern in dict.fromkeys(patterns) if pattern not in used))


def format_bytes(count: float) -> str:
    """Returns a count of bytes as text, in powers of 1024.

    >>> format_bytes(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return f"{count:.1f} TiB"


def _row(leaf: Leaf, match: Match, mesh: Mesh) -> LayoutRow:
    shard = NamedSharding(mesh, match.spec).shard_shape(leaf.shape)
    return LayoutRow(
        leaf.path, leaf.shape, leaf.dtype, match.spec, match.rule, math.prod(shard) * leaf.dtype.itemsize, match.note
    )


def _note_maker(row: LayoutRow, maker: str | None) -> LayoutRow:
    if maker is None or not axes_of(row.spec):
        return row
    made = f"made whole on every device at init, by {maker!r}, then split"
    return row._replace(note="; ".join(filter(None, (row.note, made))))


def _check_axes_split(rows: Sequence[LayoutRow], mesh: Mesh) -> None:
    split = {axis for row in rows for axis in axes_of(row.spec)}
    for axis, (consequence, rules) in _MUST_SPLIT.items():
        size = mesh.shape.get(axis, 1)
        if size > 1 and axis not in split:
            # Where rules for it are given, to add them is no advice.
            left = [row for row in rows if row.path.startswith("params/") and f"over {axis!r}" in row.note]
            next_step = f". The rules leave {left[0].path!r} {left[0].note}. Give" if left else f"; add {rules}, or"
            raise PartitionError(
                f"Mesh axis {axis!r} of size {size} splits no leaf: {size} devices {consequence}{next_step} rules that "
                f"name {axis!r}, or give its devices to another axis, as make_mesh(data={mesh.size})."
            )


def _short(spec: PartitionSpec) -> str:
    return f"P({', '.join(repr(entry) for entry in spec)})"
