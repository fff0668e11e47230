"""The ready-made rules, one for each kind of parallelism; changes with the models and layers that people split."""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from jaxpar.integers import is_integer
from jaxpar.partition import Leaf, PartitionError, Rule, SpecFn, axes_of

_DENSE_RANK = {"kernel": 2, "embedding": 2, "bias": 1, "scale": 1, "mean": 1, "var": 1}
_HEADS = ("query", "key", "value")


def fsdp(*, axis: str = "fsdp", min_size: int = 128) -> list[Rule]:
    """Returns the rules of fully sharded data parallelism: each leaf split along its largest open dim that divides.

    Parameters and optimizer state both; weights are gathered where a layer needs them (ZeRO stage 3, Rajbhandari et al.
    2020, https://arxiv.org/abs/1910.02054). A stack of scanned layers is never split along its layers.

    Args:
      axis: the mesh axis to split over; the batch is split over `fsdp` too.
      min_size: a leaf with fewer elements stays whole, and the layout says so.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=-1), jaxpar.rules.fsdp(min_size=2**14))
    """
    return [(".*", _split_largest("FSDP", axis, _check_min_size(min_size)))]


def zero1(*, axis: str = "data", min_size: int = 128) -> list[Rule]:
    """Returns the rules that split the optimizer state over the data-parallel devices, and nothing else.

    ZeRO stage 1 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).

    Args:
      axis: the mesh axis to split over.
      min_size: a leaf with fewer elements stays whole, and the layout says so.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=-1), jaxpar.rules.zero1(min_size=2**14))
    """
    return [("^opt_state", _split_largest("ZERO1", axis, _check_min_size(min_size))), (".*", None)]


def megatron(*, column: Sequence[str] = (), row: Sequence[str] = (), axis: str = "model") -> list[Rule]:
    """Returns the rules of tensor parallelism: attention by heads, the MLP by its hidden features, Embed by vocabulary.

    A pair of layers is split so that one all-reduce follows the second (Shoeybi et al. 2019,
    https://arxiv.org/abs/1909.08053). Dims are counted from the right, so a scanned stack of layers is split alike.
    Attention is known by Flax's `query`, `key`, `value`, `out`; an MLP by `up`, `gate`, `fc1`, `wi` (column) and
    `down`, `fc2`, `wo` (row). Any other kernel stays whole, as do heads that don't divide, and the layout says so.

    Args:
      column: more layers' names whose output features are split.
      row: more layers' names whose input features are split: the layer that follows a column one.
      axis: the mesh axis to split over.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(model=-1), jaxpar.rules.megatron(column=["c_fc"], row=["c_proj"]))
    """
    _check_names("column", column, "as ['up']", least=0)
    _check_names("row", row, "as ['down']", least=0)
    columns, rows = ("up", "gate", "fc1", r"wi(_\d+)?", *column), ("down", "fc2", "wo", *row)

    def split(dim: int) -> SpecFn:
        return lambda leaf, mesh, so_far: _split(leaf, mesh, so_far, dim, axis)

    def split_heads(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> PartitionSpec | str | None:
        return _split(leaf, mesh, so_far, -2 if _has_head_dims(leaf) else -1, axis)

    def split_attention_out(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> PartitionSpec | str | None:
        if f"{_layer_path(leaf, 2)}/query/kernel" not in leaf.shapes:
            return leave(leaf, mesh, so_far)
        return _split(leaf, mesh, so_far, -3 if _has_head_dims(leaf) else -2, axis)

    def leave(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> str | None:
        _need_axis("MEGATRON", axis, mesh)
        if leaf.path.endswith("kernel") and len(leaf.shape) > 1 and axis not in axes_of(so_far):
            return (
                f"whole over {axis!r}: MEGATRON doesn't know this layer; megatron(column=[...], row=[...]) names more"
            )
        return None

    return [
        (_layer(_HEADS, "kernel|bias"), split_heads),
        (_layer(["out"], "kernel"), split_attention_out),
        (_layer(columns, "kernel|bias"), split(-1)),
        (_layer(rows, "kernel"), split(-2)),
        (r"(^|/)embedding$", split(-2)),
        (".*", leave),
    ]


def stages(*, stacks: Sequence[str] = ("blocks", "layers"), axis: str = "stage") -> list[Rule]:
    """Returns the rules of pipeline parallelism: each stack of layers split along its layers, and nothing else.

    A stack is what `nnx.vmap`, `nnx.scan` or `linen.scan` make of equal layers: every leaf has a leading dim of layers.

    Args:
      stacks: the names of the modules that are stacks.
      axis: the mesh axis to split over.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(stage=-1), jaxpar.rules.stages(stacks=["decoder"]))
    """
    _check_names("stacks", stacks, "as ['blocks']")

    def split(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> PartitionSpec | None:
        _need_axis("PIPELINE", axis, mesh)
        return _split_exactly(leaf, mesh, so_far, 0, axis, "layers")

    # In a list, not a stack, a number follows the name.
    return [(rf"(^|/)({'|'.join(stacks)})/(?!\d+/)", split), (".*", _whole_unless_split("PIPELINE", axis))]


def experts(*, names: Sequence[str] = ("experts",), axis: str = "expert") -> list[Rule]:
    """Returns the rules of expert parallelism: each mixture of experts split along its experts, and nothing else.

    Dims are counted from the right, so a scanned stack of layers is split alike: kernels are (experts, in, out), biases
    (experts, out).

    Args:
      names: the names of the modules whose leaves have a dim of experts.
      axis: the mesh axis to split over.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(expert=-1), jaxpar.rules.experts(names=["moe"]))
    """
    _check_names("names", names, "as ['experts']")

    def split(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> PartitionSpec | str | None:
        _need_axis("EXPERT", axis, mesh)
        dim = len(leaf.shape) - 1 - _DENSE_RANK.get(leaf.path.rsplit("/", 1)[-1], len(leaf.shape))
        if dim < 0:
            return (
                f"whole over {axis!r}: the shape {leaf.shape} of a {leaf.path.rsplit('/', 1)[-1]} has no dim of experts"
            )
        return _split_exactly(leaf, mesh, so_far, dim, axis, "experts")

    return [(rf"(^|/)({'|'.join(names)})/", split), (".*", _whole_unless_split("EXPERT", axis))]


def _check_names(argument: str, names: Any, example: str, least: int = 1) -> None:
    is_list = isinstance(names, Collection) and not isinstance(names, str)
    if not is_list or len(names) < least or not all(isinstance(name, str) for name in names):
        raise PartitionError(f"{argument} is {names!r}; give a list of modules' names, {example}.")


def _whole_unless_split(rules: str, axis: str) -> SpecFn:
    def leave(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> None:
        _need_axis(rules, axis, mesh)

    return leave


def _split_exactly(
    leaf: Leaf, mesh: Mesh, so_far: PartitionSpec, dim: int, axis: str, what: str
) -> PartitionSpec | None:
    """`axis` on dim `dim`, which must divide: each device along it holds as many layers, or experts."""
    if axis in axes_of(so_far):
        return None
    if leaf.shape[dim] % mesh.shape[axis]:
        raise PartitionError(
            f"{leaf.path!r} has shape {leaf.shape}: its {leaf.shape[dim]} {what} do not divide by {mesh.shape[axis]}, "
            f"the size of mesh axis {axis!r}; give a multiple of it, or a smaller axis."
        )
    return PartitionSpec(*(axis if index == dim else None for index in range(len(leaf.shape))))


def _check_min_size(min_size: int) -> int:
    if not is_integer(min_size, least=0):
        raise PartitionError(f"min_size is {min_size!r}; give a whole number of elements, 0 or more.")
    return min_size


def _layer(names: Sequence[str], leaves: str) -> str:
    # A list of layers puts a number between: up/0/kernel.
    return rf"(^|/)({'|'.join(names)})(/\d+)?/({leaves})$"


def _need_axis(rules: str, axis: str, mesh: Mesh) -> None:
    if axis not in mesh.shape:
        raise PartitionError(
            f"{rules} splits over mesh axis {axis!r}, which the mesh {dict(mesh.shape)} does not have; "
            f"give it one, as make_mesh({axis}=-1), or leave {rules} out."
        )


def _split(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec, dim: int, axis: str) -> PartitionSpec | str | None:
    """`axis` on dim `dim`, counted from the right; or why not."""
    _need_axis("MEGATRON", axis, mesh)
    if axis in axes_of(so_far):
        return None
    if len(leaf.shape) < -dim or so_far[dim] is not None:
        return f"whole over {axis!r}: the shape {leaf.shape} has no open dim {dim}"
    if leaf.shape[dim] % mesh.shape[axis]:
        return f"whole over {axis!r}: dim {dim} of {leaf.shape} does not divide by {mesh.shape[axis]}"
    entries: list[str | None] = [None] * len(leaf.shape)
    entries[dim] = axis
    return PartitionSpec(*entries)


def _split_largest(rules: str, axis: str, min_size: int) -> SpecFn:
    def split(leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> PartitionSpec | str | None:
        _need_axis(rules, axis, mesh)
        size = math.prod(leaf.shape)
        if axis in axes_of(so_far) or size <= 1:
            return None
        if size < min_size:
            return f"whole over {axis!r}: {size} elements are fewer than min_size={min_size}"
        first = _count_stacked(leaf)
        candidates = [
            dim
            for dim in range(first, len(leaf.shape))
            if so_far[dim] is None and leaf.shape[dim] and leaf.shape[dim] % mesh.shape[axis] == 0
        ]
        if not candidates:
            return f"whole over {axis!r}: no open dim of {leaf.shape} divides by {mesh.shape[axis]}"
        largest = max(candidates, key=lambda dim: leaf.shape[dim])
        return PartitionSpec(*(axis if dim == largest else None for dim in range(len(leaf.shape))))

    return split


def _count_stacked(leaf: Leaf) -> int:
    """How many leading dims of a leaf are its scanned layers, or experts: never to be split with its features.

    The names of Flax's own leaves tell; another leaf is stacked as those that lie nearest to it are.
    """
    if leaf.path.rsplit("/", 1)[-1] in _DENSE_RANK:
        return max(0, len(leaf.shape) - _rank_of_one_layer(leaf))
    parents = leaf.path.split("/")[:-1]
    for prefix in ("/".join(parents[:depth]) + "/" for depth in range(len(parents), 0, -1)):
        near = [
            Leaf(path, shape, None, leaf.shapes)
            for path, shape in leaf.shapes.items()
            if path.startswith(prefix) and path.rsplit("/", 1)[-1] in _DENSE_RANK
        ]
        if near:
            stacks = {other.shape[: len(other.shape) - _rank_of_one_layer(other)] for other in near}
            (stack,) = stacks if len(stacks) == 1 else [()]
            return len(stack) if leaf.shape[: len(stack)] == stack else 0
    return 0


def _rank_of_one_layer(leaf: Leaf) -> int:
    """The rank that one of Flax's own leaves has where no scanned dim of layers stands before it."""
    name = leaf.path.rsplit("/", 1)[-1]
    rank = _DENSE_RANK.get(name, len(leaf.shape))
    if re.search(_layer((*_HEADS, "out"), "kernel|bias"), leaf.path) and _has_head_dims(leaf):
        rank += 1 if not leaf.path.endswith("out/bias") else 0
    return rank


def _layer_path(leaf: Leaf, up: int) -> str:
    return "/".join(leaf.path.split("/")[:-up])


def _has_head_dims(leaf: Leaf) -> bool:
    """Whether an attention layer keeps heads and their size as two dims, as Flax's does.

    A stack of plain projections (layers, in, out) has the rank of one such kernel (in, heads, head_dim): what tells
    them apart is whether `out` begins with the two dims with which `query` ends, or the bias has both.
    """
    attention, layer = _layer_path(leaf, 2), _layer_path(leaf, 1)
    query, out = (leaf.shapes.get(f"{attention}/{name}/kernel") for name in ("query", "out"))
    if query is not None and out is not None:
        return len(query) >= 3 and out[-3:-1] == query[-2:]
    kernel, bias = leaf.shapes.get(f"{layer}/kernel"), leaf.shapes.get(f"{layer}/bias")
    if kernel is None:
        return False
    return len(kernel) >= 3 and (bias is None or bias[-2:] == kernel[-2:])


FSDP: list[Rule] = fsdp()
ZERO1: list[Rule] = zero1()
MEGATRON: list[Rule] = megatron()
PIPELINE: list[Rule] = stages()
EXPERT: list[Rule] = experts()
