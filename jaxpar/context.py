"""Sequences split over devices: attention over the `context` axis, activations over `model`.

B rows, T tokens, H query heads, K key/value heads, G query heads to a key/value head, D head size; N blocks of C tokens
of queries, S of keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxpar.integers import is_integer, is_number
from jaxpar.island import current_mesh, island_size, jit_island
from jaxpar.mesh import check_axis_name
from jaxpar.sequence import CONTEXT_SIZE, ContextError, check_divides

_AXIS = "context"


def ring_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    *,
    is_causal: bool = False,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    block_size: int = 512,
) -> jax.Array:
    """Returns what `jax.nn.dot_product_attention` does, its sequence split over the mesh axis `context`.

    Keys and values travel round the devices of the axis (Liu et al. 2023, https://arxiv.org/abs/2310.01889). No matrix
    of T x T is ever held, on one device neither: memory grows with T alone. Masks go by `positions`, so tokens may lie
    in any order; that of `zigzag` shares out the work under a causal mask. Every token sees itself.

    Args:
      q_BTHD: the queries.
      k_BTKD: the keys; query head h uses head `h // (H // K)`.
      v_BTKD: the values.
      is_causal: whether a query sees only keys whose position is not after its own.
      positions: each token's place, whole numbers of shape (T,) or (B, T); by default 0 to T - 1.
      segment_ids: whole numbers of shape (B, T): a token sees only those with its own, as in packed sequences.
      scale: what products of queries and keys are multiplied by; by default `D ** -0.5`.
      block_size: how many tokens, at most, to take at once; blocks that the masks hide whole are skipped.

    Raises:
      ContextError: arrays that don't fit, or a sequence that doesn't divide by the size of `context`.
      MeshError: it stands in an island over `context`, or over an axis that comes later.

    >>> import jaxpar
    >>> q_BTHD, kv_BTKD = jnp.ones((2, 16, 4, 8)), jnp.ones((2, 16, 2, 8))
    >>> with jax.set_mesh(jaxpar.make_mesh(data=2, context=4)):
    ...     jax.jit(ring_attention)(q_BTHD, kv_BTKD, kv_BTKD).sharding.spec[1]
    'context'
    """
    size = island_size(_AXIS)
    masks = _check_arrays((q_BTHD, k_BTKD, v_BTKD), is_causal, positions, segment_ids, size)
    heads, model = q_BTHD.shape[2], _automatic_size("model")
    # Tokens split over `model` too would have to be moved inside of what some devices skip, and wait for.
    spec = (None, None if heads % model else "model") if size > 1 and model > 1 else ()
    kernel = _make_kernel(q_BTHD, scale, block_size, size, spec)
    k_BTKD, v_BTKD = (_repeat_heads(x, heads, model) for x in (k_BTKD, v_BTKD))
    attend, split = functools.partial(_attend, kernel), PartitionSpec(None, _AXIS)
    if size > 1:
        island = jax.shard_map(attend, in_specs=split, out_specs=split, axis_names={_AXIS}, check_vma=False)
        attend = jit_island(island)
    return attend(q_BTHD, k_BTKD, v_BTKD, masks)


def ulysses_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    *,
    is_causal: bool = False,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    block_size: int = 512,
) -> jax.Array:
    """Returns what `ring_attention` does, with its arguments, each device taking whole sequences of some heads.

    Tokens are exchanged for heads and back (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509): one all-to-all each
    for queries, keys, values and output, balanced in any order of the tokens. The size of `context` must divide the
    query heads; key/value heads that it doesn't divide are repeated.

    >>> import jaxpar
    >>> q_BTHD, kv_BTKD = jnp.ones((2, 16, 8, 4)), jnp.ones((2, 16, 2, 4))
    >>> with jax.set_mesh(jaxpar.make_mesh(context=4, model=2)):
    ...     jax.jit(ulysses_attention)(q_BTHD, kv_BTKD, kv_BTKD).sharding.spec[1]
    'context'
    """
    size, model = island_size(_AXIS), _automatic_size("model")
    masks = _check_arrays((q_BTHD, k_BTKD, v_BTKD), is_causal, positions, segment_ids, size)
    heads = q_BTHD.shape[2]
    check_divides(f"q has {heads} heads", heads, size, CONTEXT_SIZE, "use ring_attention, which splits no heads")
    # `model` is the outer of the two on the heads, so that none leaves its shard.
    axes = (_AXIS,) if model == 1 or heads % (size * model) else ("model", _AXIS)
    by_head, by_token = ((None, axes), (_AXIS,)) if size > 1 else ((), ())
    k_BTKD, v_BTKD = (_repeat_heads(x, heads, math.prod(map(_automatic_size, axes))) for x in (k_BTKD, v_BTKD))
    kernel = _make_kernel(q_BTHD, scale, block_size, 1, by_head)
    # The compiler makes the all-to-alls: those of a shard_map gather what it splits over other axes (jax 0.10.2).
    arrays = [_constrain(x, by_token, by_head) for x in (q_BTHD, k_BTKD, v_BTKD)]
    masks = tuple(_constrain(mask, by_head[:1]) for mask in masks)
    return _constrain(_attend(kernel, *arrays, masks), by_head, by_token)


def split_sequence(x: jax.Array, *, axis: str = "model") -> jax.Array:
    """Returns `x`, B T and any more dims, with its tokens split over `axis`: Megatron's sequence parallelism.

    Call it on what is whole between the layers that `axis` splits, the residual stream and the norms' outputs
    (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198): the compiler gathers the tokens before such a layer and
    scatters its sums after. Tokens that `context` splits are split further; they must divide by the devices. Where the
    mesh has no such axis, or an island is over it, it is the identity.

    >>> import jaxpar
    >>> with jax.set_mesh(jaxpar.make_mesh(data=2, model=4)):
    ...     jax.jit(split_sequence)(jnp.ones((2, 8, 16))).sharding.spec[1]
    'model'
    """
    check_axis_name(axis)
    if not hasattr(x, "dtype") or np.ndim(x) < 2:
        raise ContextError(
            f"x is a {type(x).__name__} of shape {np.shape(x)}; give an array of rows, tokens, and more."
        )
    if _automatic_size(axis) == 1:
        return x
    axes = tuple(name for name in dict.fromkeys((_AXIS, axis)) if _automatic_size(name) > 1)
    parts, tokens = math.prod(map(_automatic_size, axes)), x.shape[1]
    check_divides(f"x has {tokens} tokens", tokens, parts, f"the size of mesh axes {axes}")
    return _constrain(x, (axes,))


class _Kernel(NamedTuple):
    """What is fixed when it is traced: how many devices the ring has, and how the output is split."""

    scale: float
    block_size: int
    size: int
    spec: tuple[Any, ...]


class _Mask(NamedTuple):
    """Numbers, N B C or N 1 C: a query sees the keys whose number is no larger than its own. Each block's extremes."""

    numbers: jax.Array
    lowest: jax.Array
    highest: jax.Array


def _attend_forward(kernel: _Kernel, q_BTHD: Any, k_BTKD: Any, v_BTKD: Any, masks: Any) -> tuple[Any, Any]:
    """This device's queries over the keys of the whole ring, and what their gradients need."""
    q_BTHD, k_BTKD, v_BTKD = (_constrain(x, kernel.spec) for x in (q_BTHD, k_BTKD, v_BTKD))
    blocks, add = functools.partial(_to_blocks, kernel), functools.partial(_add_values, kernel)
    block_masks = _mask_blocks(kernel, q_BTHD.shape[1], masks)
    rows, keys = (block_masks, blocks(q_BTHD, k_BTKD.shape[2])), (block_masks, blocks(k_BTKD), blocks(v_BTKD))
    zeros_NBKGCD = jnp.zeros_like(jnp.moveaxis(rows[1], 2, 4), jnp.promote_types(q_BTHD.dtype, jnp.float32))
    sums = (zeros_NBKGCD, zeros_NBKGCD[..., 0], jnp.full_like(zeros_NBKGCD[..., 0], -jnp.inf))

    def step(_: Any, carry: Any) -> Any:
        sums, keys = carry
        # The next keys are on their way while these are summed.
        following = _hop(kernel, keys)
        return _over_pairs(add, rows, keys, sums, ())[0], following

    if kernel.size > 1:
        # A loop, so that the program is as long for 64 devices as for 2.
        sums, keys = lax.fori_loop(0, kernel.size - 1, step, (sums, keys))
    (out_NBKGCD, total_NBKGC, highest_NBKGC), _ = _over_pairs(add, rows, keys, sums, ())
    # Each query has seen a key, its own at least: no sum is 0.
    out_NBCKGD = jnp.moveaxis(out_NBKGCD / total_NBKGC[..., None], 4, 2)
    # Saved as it is split here: the compiler would take it as the next layer does, and move it again.
    out_BTHD = _constrain(_from_blocks(out_NBCKGD, q_BTHD), kernel.spec)
    return out_BTHD, (q_BTHD, k_BTKD, v_BTKD, masks, out_BTHD, highest_NBKGC + jnp.log(total_NBKGC))


def _attend_backward(kernel: _Kernel, saved: Any, grad_BTHD: jax.Array) -> tuple[Any, ...]:
    q_BTHD, k_BTKD, v_BTKD, masks, out_BTHD, logsum_NBKGC = saved
    grad_BTHD = _constrain(grad_BTHD, kernel.spec)
    blocks, add = functools.partial(_to_blocks, kernel), functools.partial(_add_gradients, kernel)
    kv_heads, dtype = k_BTKD.shape[2], logsum_NBKGC.dtype
    block_masks = _mask_blocks(kernel, q_BTHD.shape[1], masks)
    # A softmax takes from each score's pull the mean pull of its row.
    mean_BTH = (grad_BTHD.astype(dtype) * out_BTHD.astype(dtype)).sum(-1)
    mean_NBKGC = jnp.moveaxis(blocks(mean_BTH, kv_heads), 2, 4)
    rows = (block_masks, blocks(q_BTHD, kv_heads), blocks(grad_BTHD, kv_heads), logsum_NBKGC, mean_NBKGC)
    keys = (block_masks, blocks(k_BTKD), blocks(v_BTKD))
    zeros_q, zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), (rows[1], keys[1:]))

    def step(_: Any, carry: Any) -> Any:
        grads_q, grads, keys = carry
        following = _hop(kernel, keys)
        grads_q, grads = _over_pairs(add, rows, keys, grads_q, grads)
        return grads_q, _hop(kernel, grads), following

    # What these queries give this device's own keys stays here; what they give others' goes on with those, and home.
    grads_q, grads = _over_pairs(add, rows, keys, zeros_q, zeros)
    if kernel.size > 1:
        grads_q, others, keys = lax.fori_loop(0, kernel.size - 2, step, (grads_q, zeros, _hop(kernel, keys)))
        grads_q, others = _over_pairs(add, rows, keys, grads_q, others)
        grads = jax.tree.map(jnp.add, grads, _hop(kernel, others))
    moved = map(_from_blocks, (grads_q, *grads), (q_BTHD, k_BTKD, v_BTKD))
    return *(_constrain(x, kernel.spec) for x in moved), None


_attend: Any = jax.custom_vjp(lambda *args: _attend_forward(*args)[0], nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _attend_backward)


def _hop(kernel: _Kernel, tree: Any) -> Any:
    """What the device before this one in the ring has."""
    return lax.ppermute(tree, _AXIS, [(i, (i + 1) % kernel.size) for i in range(kernel.size)])


def _over_pairs(add: Callable[..., Any], rows: Any, keys: Any, row_sums: Any, key_sums: Any) -> tuple[Any, Any]:
    """The sums with each pair of a block of queries and one of keys in, but for those that a mask hides whole."""

    def take_row(key_sums: Any, row_and_sums: Any) -> tuple[Any, Any]:
        row, row_sums = row_and_sums

        def take_pair(row_sums: Any, key_and_sums: Any) -> tuple[Any, Any]:
            key, key_sums = key_and_sums
            seen = [theirs.lowest <= ours.highest for theirs, ours in zip(key[0], row[0], strict=True)]
            if not seen:
                return add(row, key, row_sums, key_sums)
            return lax.cond(jnp.stack(seen).all(), add, lambda row, key, *sums: sums, row, key, row_sums, key_sums)

        return lax.scan(take_pair, row_sums, (keys, key_sums))[::-1]

    return lax.scan(take_row, key_sums, (rows, row_sums))[::-1]


def _add_values(kernel: _Kernel, row: Any, key: Any, sums: Any, key_sums: Any) -> tuple[Any, Any]:
    """A softmax under way: for each query, sums relative to the highest score so far."""
    (_, _, v_BSKD), (out_BKGCD, total_BKGC, before_BKGC) = key, sums
    scores_BKGCS = _score(kernel, row, key)
    highest_BKGC = jnp.maximum(before_BKGC, scores_BKGCS.max(-1))
    # Before a query's first key this is -inf, and -inf - -inf is no number.
    base_BKGC = jnp.where(highest_BKGC == -jnp.inf, 0, highest_BKGC)
    weights_BKGCS, shrink_BKGC = jnp.exp(scores_BKGCS - base_BKGC[..., None]), jnp.exp(before_BKGC - base_BKGC)
    total_BKGC = total_BKGC * shrink_BKGC + weights_BKGCS.sum(-1)
    added_BKGCD = _einsum("bkgcs,bskd->bkgcd", weights_BKGCS.astype(v_BSKD.dtype), v_BSKD)
    return (out_BKGCD * shrink_BKGC[..., None] + added_BKGCD, total_BKGC, highest_BKGC), key_sums


def _add_gradients(kernel: _Kernel, row: Any, key: Any, grad_q_BCKGD: jax.Array, grads: Any) -> tuple[Any, Any]:
    """The gradients of queries, and those of keys and values, from scores that are computed again."""
    (_, q_BCKGD, grad_BCKGD, logsum_BKGC, mean_BKGC), (_, k_BSKD, v_BSKD) = row, key
    weights_BKGCS = jnp.exp(_score(kernel, row, key) - logsum_BKGC[..., None])
    pulls_BKGCS = _einsum("bckgd,bskd->bkgcs", grad_BCKGD, v_BSKD) - mean_BKGC[..., None]
    slopes_BKGCS = (weights_BKGCS * pulls_BKGCS * kernel.scale).astype(k_BSKD.dtype)
    grad_q_BCKGD += _einsum("bkgcs,bskd->bckgd", slopes_BKGCS, k_BSKD)
    grad_k_BSKD = grads[0] + _einsum("bkgcs,bckgd->bskd", slopes_BKGCS, q_BCKGD)
    grad_v_BSKD = grads[1] + _einsum("bkgcs,bckgd->bskd", weights_BKGCS.astype(v_BSKD.dtype), grad_BCKGD)
    return grad_q_BCKGD, (grad_k_BSKD, grad_v_BSKD)


def _score(kernel: _Kernel, row: Any, key: Any) -> jax.Array:
    """How much each query is drawn to each key: -inf to one that it doesn't see."""
    scores_BKGCS = _einsum("bckgd,bskd->bkgcs", row[1], key[1]) * kernel.scale
    for theirs, ours in zip(key[0], row[0], strict=True):
        seen_BCS = theirs.numbers[:, None] <= ours.numbers[..., None]
        scores_BKGCS = jnp.where(seen_BCS[:, None, None], scores_BKGCS, -jnp.inf)
    return scores_BKGCS


def _mask_blocks(kernel: _Kernel, length: int, masks: tuple[jax.Array, ...]) -> tuple[_Mask, ...]:
    numbers = [_to_blocks(kernel, mask, mode="edge") for mask in masks]
    if length % kernel.block_size:
        # No query sees what fills up the last block.
        places = np.arange(length + -length % kernel.block_size).reshape(-1, 1, kernel.block_size)
        numbers.append(jnp.asarray(places >= length, "int32"))
    # Extremes are found here, over all rows: in the loops, devices that share the rows would have to agree each time.
    return tuple(_Mask(x_NBC, x_NBC.min((1, 2)), x_NBC.max((1, 2))) for x_NBC in numbers)


def _to_blocks(kernel: _Kernel, x: jax.Array, kv_heads: int | None = None, *, mode: str = "constant") -> jax.Array:
    """B T ... as N B C ..., filled up by NumPy's `mode`, and H as K G if K is given."""
    (b, t, *rest), filling = x.shape, -x.shape[1] % kernel.block_size
    if filling:
        x = jnp.pad(x, [(0, 0), (0, filling)] + [(0, 0)] * len(rest), mode=mode)
    grouped = rest if kv_heads is None else [kv_heads, rest[0] // kv_heads, *rest[1:]]
    return jnp.moveaxis(x.reshape(b, (t + filling) // kernel.block_size, kernel.block_size, *grouped), 1, 0)


def _from_blocks(x: jax.Array, like: jax.Array) -> jax.Array:
    """N B C ... as B T ..., and K G as H, with the shape and dtype of `like`."""
    x = jnp.moveaxis(x, 0, 1).reshape(like.shape[0], -1, *like.shape[2:])
    return x[:, : like.shape[1]].astype(like.dtype)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _repeat_heads(x_BTKD: jax.Array, heads: int, parts: int) -> jax.Array:
    """Keys or values, heads repeated until `parts` divides them, if it does the queries' heads."""
    # Whole on each part, they would travel whole, and their gradients be summed over the parts in every block.
    copies = 1 if heads % parts else math.lcm(x_BTKD.shape[2], parts) // x_BTKD.shape[2]
    return jnp.repeat(x_BTKD, copies, axis=2) if copies > 1 else x_BTKD


def _constrain(x: jax.Array, *specs: tuple[Any, ...]) -> jax.Array:
    """`x` with dims 1 and on split by one spec after the other, all others as the compiler likes; as it is for none."""
    free = [PartitionSpec.UNCONSTRAINED] * x.ndim
    full = [PartitionSpec(*[free[0], *spec, *free][: x.ndim]) for spec in specs if spec]
    return jit_island(lambda x: functools.reduce(lax.with_sharding_constraint, full, x))(x) if full else x


def _automatic_size(axis: str) -> int:
    """The size of an axis that is left to the compiler here; 1 for any other."""
    mesh = current_mesh()
    return 1 if axis in mesh.manual_axes else mesh.shape.get(axis, 1)


def _make_kernel(q_BTHD: jax.Array, scale: Any, block_size: Any, size: int, spec: tuple[Any, ...] = ()) -> _Kernel:
    if not is_integer(block_size):
        raise ContextError(f"block_size is {block_size!r}; give a whole number of tokens, 1 or more.")
    if scale is not None and not is_number(scale):
        raise ContextError(f"scale is {scale!r}; give a plain, finite number, or multiply q by it instead.")
    length, scale = q_BTHD.shape[1] // size, q_BTHD.shape[3] ** -0.5 if scale is None else scale
    # Blocks as alike as can be, so that little fills up the last.
    return _Kernel(float(scale), -(-length // -(-length // int(block_size))), size, spec)


def _check_arrays(arrays: Any, is_causal: bool, positions: Any, segment_ids: Any, size: int) -> tuple[jax.Array, ...]:
    """For each mask the numbers that it goes by, B T or 1 T; raises ContextError."""
    for name, x in zip("qkv", arrays, strict=True):
        if not hasattr(x, "dtype"):
            raise ContextError(f"{name} is a {type(x).__name__}; give an array.")
        is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype == arrays[0].dtype
        if np.ndim(x) != 4 or 0 in np.shape(x) or not is_float:
            expected = "rows, tokens, heads and head size, none of them 0, in one floating-point dtype for q, k and v"
            raise ContextError(f"{name} is {x.dtype} of shape {np.shape(x)}; give 4 dims: {expected}.")
    (b, t, h, d), k = arrays[0].shape, arrays[1].shape[2]
    if any(x.shape != (b, t, k, d) for x in arrays[1:]):
        q, k, v = (x.shape for x in arrays)
        raise ContextError(f"q has shape {q}, k {k} and v {v}; k and v must be alike, and like q but for heads.")
    check_divides(f"q has {h} heads", h, k, "those of k and v", "repeat heads of k and v")
    check_divides(f"q has {t} tokens", t, size, CONTEXT_SIZE)
    for name, x, shapes in (("positions", positions, [(t,), (b, t)]), ("segment_ids", segment_ids, [(b, t)])):
        dtype = getattr(x, "dtype", None)
        if x is not None and (dtype is None or np.shape(x) not in shapes or not jnp.issubdtype(dtype, jnp.integer)):
            choices = f"whole numbers, as int32, of shape {' or '.join(map(str, shapes))}"
            given = f"{dtype or type(x).__name__} of shape {np.shape(x)}"
            raise ContextError(f"{name} is {given}; give {choices}, as q has rows and tokens.")
    masks = (jnp.atleast_2d(jnp.arange(t) if positions is None else jnp.asarray(positions)),) if is_causal else ()
    # Equal is no larger and no smaller; ~ turns the order of whole numbers round.
    return masks if segment_ids is None else (*masks, jnp.asarray(segment_ids), ~jnp.asarray(segment_ids))
