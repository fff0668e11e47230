"""What an island finds where it is traced: the mesh, its axis, those left to the compiler; changes with shard_map."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxpar.mesh import AXES, ROW_AXIS, MeshError, check_no_axis_is


def current_mesh() -> AbstractMesh:
    """Returns the mesh under which an island is traced, perhaps one without axes.

    Raises:
      MeshError: it has Explicit axes, as `jax.make_mesh` makes them by default.
    """
    mesh = jax.sharding.get_abstract_mesh()
    check_no_axis_is(mesh, AxisType.Explicit)
    return mesh


def island_size(axis: str) -> int:
    """Returns the size of `axis` on the mesh under which an island is traced: 1 where there is none.

    An island is a `shard_map` in a model's forward, manual over its own axis and automatic over the others; at size 1
    it is its plain function. The mesh is JAX's own, which every step sets; under `data_parallel`, or outside a step, it
    has no such axis.

    Raises:
      MeshError: the mesh has Explicit axes. Or the island stands in one over the same axis, or over an axis that comes
        later in `jaxpar.AXES`: JAX 0.12 would abort the process.

    >>> import jaxpar
    >>> island_size("stage")
    1
    >>> with jax.set_mesh(jaxpar.make_mesh(data=2, stage=4)):
    ...     island_size("stage")
    4
    """
    mesh = current_mesh()
    size = mesh.shape.get(axis, 1)
    if size == 1:
        return 1
    if axis in mesh.manual_axes:
        raise MeshError(f"An island over {axis!r} stands inside another one over {axis!r}; one of them is enough.")
    later = [outer for outer in mesh.manual_axes if outer in AXES and AXES.index(outer) > AXES.index(axis)]
    if later:
        raise MeshError(
            f"An island over {axis!r} stands inside one over {later[0]!r}; islands nest from the outer axis to the "
            f"inner one, in the order {', '.join(AXES)}: call the one over {axis!r} outside."
        )
    return size


def automatic_axes() -> tuple[str, ...]:
    """Returns the mesh axes, of size 2 or more, over which an island could be manual where it is traced.

    Those of the mesh that are the compiler's, come after every axis that is manual already, and whose names `jax.vmap`
    hasn't taken, as the builder does for a model that reduces over `data`.

    >>> import jaxpar
    >>> with jax.set_mesh(jaxpar.make_mesh(data=2, model=4)):
    ...     automatic_axes(), jax.vmap(lambda x: len(automatic_axes()), axis_name="data")(jax.numpy.ones(3))
    (('data', 'model'), Array([1, 1, 1], dtype=int32...))
    """
    mesh = current_mesh()
    first = 1 + max((AXES.index(axis) for axis in mesh.manual_axes if axis in AXES), default=-1)
    return tuple(axis for axis in AXES[first:] if mesh.shape.get(axis, 1) > 1 and not _is_bound(axis))


def jit_island(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` jitted, for an island to run outside a jit too: op by op, JAX leaves no axis to the compiler.

    >>> jit_island(lambda x: x + 1)(1)
    Array(2, dtype=int32, weak_type=True)
    """
    return jax.jit(fn)


def takes_rows_alone() -> bool:
    """Returns whether the builder calls the model on one row after the other, as it does with a padded batch.

    There is nothing to split then, and an island is its plain function.
    """
    return _is_bound(ROW_AXIS)


def _is_bound(axis: str) -> bool:
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True
