"""Attention by JAX's own TPU kernel, on a mesh; changes with that kernel.

B rows, T tokens, H query heads, K key/value heads, D head size.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxpar.integers import is_integer
from jaxpar.island import current_mesh, jit_island, takes_rows_alone
from jaxpar.mesh import AXES, BATCH_AXES, MeshError

_MODEL = "model"


class SplashError(ValueError):
    """Arrays that the kernel can't take: the message gives the sizes that it can."""


def splash_attention(
    q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, *, is_causal: bool = False, block_size: int = 512
) -> jax.Array:
    """Returns what `jax.nn.dot_product_attention` does, on TPU by JAX's Pallas kernel, without a T x T matrix.

    The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`, which takes blocks that a causal mask hides whole
    for nothing. XLA can't split a kernel: each device runs it on its own rows and heads. Elsewhere than on TPU this is
    `jax.nn.dot_product_attention` itself.

    Args:
      q_BTHD: the queries, T a multiple of 128.
      k_BTKD: the keys; query head h uses head `h // (H // K)`.
      v_BTKD: the values.
      is_causal: whether a query sees only keys that don't come after it.
      block_size: how many tokens the kernel takes at once, at most.

    Raises:
      SplashError: shapes or dtypes that it can't take, or rows or heads that don't divide over the mesh.
      MeshError: it stands in an island beside batch axes that are left to the compiler.

    >>> q_BTHD, kv_BTKD = jnp.ones((2, 128, 4, 8)), jnp.ones((2, 128, 2, 8))
    >>> splash_attention(q_BTHD, kv_BTKD, kv_BTKD, is_causal=True).shape
    (2, 128, 4, 8)
    """
    _check_shapes(q_BTHD, k_BTKD, v_BTKD, block_size)
    attend = functools.partial(_attend, is_causal, block_size)
    mesh = current_mesh()
    open_axes = [axis for axis in AXES if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes]
    rows = tuple(axis for axis in open_axes if axis in BATCH_AXES)
    if others := [axis for axis in open_axes if axis not in (*BATCH_AXES, _MODEL)]:
        raise MeshError(
            f"The mesh has the axis {others[0]!r}, over which XLA can't split the kernel: use jaxpar.ring_attention "
            "for 'context', and jax.nn.dot_product_attention in stages."
        )
    heads = _MODEL if _MODEL in open_axes else None
    if not rows and heads is None:
        return attend(q_BTHD, k_BTKD, v_BTKD)
    if takes_rows_alone():
        # One row can't be split, and a kernel in a vmap would be gathered whole.
        return jax.nn.dot_product_attention(q_BTHD, k_BTKD, v_BTKD, is_causal=is_causal)
    _check_mesh(q_BTHD, k_BTKD, mesh, rows, heads)
    axes = {*rows, heads} - {None}
    spec = PartitionSpec(rows, None, heads)
    island = jax.shard_map(attend, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False)
    return jit_island(island)(q_BTHD, k_BTKD, v_BTKD)


def _check_shapes(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, block_size: int) -> None:
    arrays = {"q": q_BTHD, "k": k_BTKD, "v": v_BTKD}
    dtypes = {name: str(getattr(x, "dtype", type(x).__name__)) for name, x in arrays.items()}
    if len(set(dtypes.values())) > 1 or not all(_is_float(x) for x in arrays.values()):
        raise SplashError(f"q, k and v are of {dtypes}; give arrays of one floating-point dtype, as by x.astype.")
    shapes = q_BTHD.shape, k_BTKD.shape, v_BTKD.shape
    if {len(shape) for shape in shapes} != {4} or shapes[1] != shapes[2] or shapes[0][::3] != shapes[1][::3]:
        raise SplashError(
            f"q, k and v have shapes {shapes}; give (B, T, H, D), and (B, S, K, D) twice, with the same B and D."
        )
    if not all(shapes[1]) or shapes[0][2] % shapes[1][2]:
        raise SplashError(
            f"q has {shapes[0][2]} heads, which do not divide by the {shapes[1][2]} of k and v; give a multiple."
        )
    if shapes[0][1] % 128 or shapes[1][1] % 128:
        raise SplashError(
            f"q has {shapes[0][1]} tokens and k {shapes[1][1]}; the kernel takes multiples of 128: pad, or use "
            "jax.nn.dot_product_attention."
        )
    if not is_integer(block_size, least=128) or block_size % 128:
        raise SplashError(f"block_size is {block_size!r}; the kernel takes multiples of 128: give one, as 512.")


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _check_mesh(
    q_BTHD: jax.Array, k_BTKD: jax.Array, mesh: jax.sharding.AbstractMesh, rows: tuple[str, ...], heads: str | None
) -> None:
    inside = [axis for axis in mesh.manual_axes if axis in AXES]
    later = [
        axis for axis in inside for other in (*rows, *filter(None, [heads])) if AXES.index(other) < AXES.index(axis)
    ]
    if later:
        raise MeshError(
            f"splash_attention stands in an island over {later[0]!r}, beside {rows or heads}, which are left to the "
            "compiler: it can't split the kernel. Use jax.nn.dot_product_attention there."
        )
    count = math.prod(mesh.shape[axis] for axis in rows)
    if q_BTHD.shape[0] % count:
        raise SplashError(
            f"q has {q_BTHD.shape[0]} rows, which do not divide by {count}, the size of {rows}; give a multiple."
        )
    for name, array in (("q", q_BTHD), ("k", k_BTKD)):
        if heads and array.shape[2] % mesh.shape[heads]:
            raise SplashError(
                f"{name} has {array.shape[2]} heads, which do not divide by {mesh.shape[heads]}, the size of "
                f"{heads!r}; use jax.nn.dot_product_attention."
            )


def _attend(is_causal: bool, block_size: int, q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
    kernel = functools.partial(_run_kernel, is_causal, block_size)
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    return lax.platform_dependent(q_BTHD, k_BTKD, v_BTKD, tpu=kernel, default=plain)


def _run_kernel(is_causal: bool, block_size: int, q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
    # It takes a second to import, and only a TPU's program needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, size = q_BTHD.shape[1:]
    mask = splash.CausalMask((length, k_BTKD.shape[1])) if is_causal else splash.FullMask((length, k_BTKD.shape[1]))
    q, kv = _block(length, block_size), _block(k_BTKD.shape[1], block_size)
    blocks = splash.BlockSizes(q, kv, kv, q, kv, kv, q, kv)
    attend: Any = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1
    )
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q_BTHD * size**-0.5, k_BTKD, v_BTKD)]
    return jnp.swapaxes(jax.vmap(attend)(*heads_first), 1, 2)


def _block(length: int, most: int) -> int:
    """The largest multiple of 128 that divides the length, of those up to `most`."""
    return next(size for size in range(min(most, length), 0, -128) if length % size == 0)
