"""Mixtures of experts split over the `expert` axis: tokens travel to their experts and back; changes with the dispatch.

B rows, T tokens, C features, E experts, F hidden features of one, K choices of a token. On one device: N tokens,
M = N K pairs of a token and its choice, D devices on the axis, L experts on each, R pairs at most from one, S = D R.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from jaxpar.integers import is_integer
from jaxpar.island import automatic_axes, island_size, jit_island, takes_rows_alone
from jaxpar.mesh import BATCH_AXES

_AXIS = "expert"


class ExpertError(ValueError):
    """Arrays that don't fit, or can't be split over the axis `expert`: the message gives both numbers."""


class ExpertKernels(NamedTuple):
    """The kernels of experts that are gated MLPs (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Attributes:
      up: of shape (experts, features, hidden).
      gate: of the same shape.
      down: of shape (experts, hidden, features).
    """

    up: jax.Array
    gate: jax.Array
    down: jax.Array


class MoELosses(NamedTuple):
    """What a mixture of experts tells besides its output, over all the tokens that the call sees.

    Under the global view these are the tokens of the whole batch, whatever the mesh; with `num_microbatches`, or under
    `data_parallel`, those of one microbatch or one shard: as with BatchNorm, the balance is then another.

    Attributes:
      balance: `E * sum(fractions * mean probabilities)`, 1 where experts are chosen alike; add about 0.01 of it to the
        loss (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).
      router_z: the mean square of the logits' logsumexp, which keeps them small; add about 0.001 of it (Zoph et al.
        2022, https://arxiv.org/abs/2202.08906).
      fractions: the part of all choices that falls to each expert, of sum 1; no gradient. Metrics are single numbers:
        `fractions.max()`.
    """

    balance: jax.Array
    router_z: jax.Array
    fractions: jax.Array


def mixture_of_experts(
    x: jax.Array,
    router: jax.Array,
    experts: ExpertKernels,
    *,
    top_k: int = 2,
    normalize: bool = True,
) -> tuple[jax.Array, MoELosses]:
    """Returns each token's mix of the `top_k` experts that its router likes best, and `MoELosses`.

    No token is dropped, however uneven the choices: the result is one device's, whatever the mesh. Where the mesh has
    an axis `expert`, each device runs its share of the experts, and tokens travel there and back in two all-to-alls,
    which on TPU and GPU move the chosen tokens alone. Hidden features are split over `model`, if it divides them.

    Memory is for the worst case, all tokens at one device: `D * min(top_k, L)` times a device's own, for D devices on
    the axis with L experts each.

    Args:
      x: of shape (B, C), (B, T, C) or more dims; rows lie as the batch does, tokens over `context`.
      router: the router's kernel, of shape (C, E); logits are computed in float32 or wider.
      experts: the experts' kernels; they compute in the dtype of `x`.
      top_k: how many experts each token goes to; among equals the first is chosen.
      normalize: whether a token's gates sum to 1; else they are its probabilities among all experts. With `top_k=1` the
        gates that sum to 1 teach the router nothing: Switch takes `False`.

    Returns:
      The mix, like `x` in shape and dtype, and the losses.

    Raises:
      ExpertError: arrays that don't fit, `top_k` out of range, experts or tokens that don't divide by their axes.
      MeshError: it stands in an island over `expert`, or over an axis that comes later.

    >>> import jaxpar
    >>> up, down = jnp.ones((8, 16, 32)), jnp.ones((8, 32, 16))
    >>> with jax.set_mesh(jaxpar.make_mesh(data=2, expert=4)):
    ...     y, losses = mixture_of_experts(jnp.ones((8, 4, 16)), jnp.ones((16, 8)), ExpertKernels(up, up, down))
    >>> y.shape, losses.fractions.tolist()
    ((8, 4, 16), [0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """
    _check_arrays(x, router, experts, top_k)
    size, rows, tokens, hidden = 1, (), (), ()
    if not takes_rows_alone():
        size, (rows, tokens, hidden) = island_size(_AXIS), _manual_axes(np.ndim(x), experts.up.shape[-1])
    _check_split(x, router.shape[-1], size, (rows, tokens))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # A TPU would else multiply float32 as bfloat16: near ties would be broken by rounding.
    logits = jnp.matmul(x.astype(wide), router.astype(wide), precision=lax.Precision.HIGHEST)
    kernels = ExpertKernels(*(kernel.astype(x.dtype) for kernel in experts))
    mix = functools.partial(_mix_shard, size, top_k, normalize)
    axes = (*rows, *tokens, *hidden)
    if axes:
        dims = (rows or None, *((tokens or None,) if np.ndim(x) > 2 else ()))
        owners = _AXIS if size > 1 else None
        column, row = PartitionSpec(owners, None, hidden or None), PartitionSpec(owners, hidden or None)
        kernel_specs: Any = (column, column, row)
        island = jax.shard_map(
            mix,
            in_specs=(PartitionSpec(*dims), PartitionSpec(*dims), ExpertKernels(*kernel_specs)),
            out_specs=(PartitionSpec(hidden or None, *dims), PartitionSpec((*rows, *tokens) or None)),
            axis_names=set(axes),
            check_vma=False,
        )
        mix = jit_island(island)
    parts, counts = mix(x, logits, kernels)
    # Summed out here, the parts that `model` has cost one all-reduce, or a reduce-scatter where tokens are split next.
    return lax.reduce_sum(parts, (0,)), _measure(logits, counts.sum(0), top_k)


class MoE(nnx.Module):
    """A mixture of experts in place of an MLP; `MEGATRON` and `EXPERT` know the names of its parameters.

    They are `router/kernel`, `experts/up/kernel`, `experts/gate/kernel` and `experts/down/kernel`. A linen module calls
    `mixture_of_experts` on parameters of the same names.

    Args:
      d_model: the features of a token.
      hidden: the hidden features of each expert.
      num_experts: how many experts.
      top_k: how many of them each token goes to.
      normalize: as for `mixture_of_experts`.
      rngs: for the parameters.

    >>> y, losses = jax.jit(MoE(16, 32, num_experts=8, rngs=nnx.Rngs(0)))(jnp.ones((2, 5, 16)))
    >>> y.shape, losses.balance.shape
    ((2, 5, 16), ())
    """

    def __init__(
        self, d_model: int, hidden: int, *, num_experts: int, top_k: int = 2, normalize: bool = True, rngs: nnx.Rngs
    ):
        self.router = nnx.Linear(d_model, num_experts, use_bias=False, rngs=rngs)
        column, row = (num_experts, d_model, hidden), (num_experts, hidden, d_model)
        self.experts = nnx.Dict(up=_stack(column, rngs), gate=_stack(column, rngs), down=_stack(row, rngs))
        self.top_k = top_k
        self.normalize = normalize

    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoELosses]:
        """Returns the mix of each token's experts, and the losses, for the loss function to add to its own."""
        kernels = ExpertKernels(*(self.experts[name]["kernel"][...] for name in ExpertKernels._fields))
        return mixture_of_experts(x, self.router.kernel[...], kernels, top_k=self.top_k, normalize=self.normalize)


def _stack(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Dict:
    """The kernels of one layer of all experts, each drawn as nnx.Linear's."""
    return nnx.Dict(kernel=nnx.Param(nnx.initializers.lecun_normal(batch_axis=0)(rngs.params(), shape)))


def _manual_axes(rank: int, hidden: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The axes over which the island is manual: those that split rows, tokens and hidden features.

    Left to the compiler, an axis that splits the tokens would have them gathered to be sorted. Where an island is over
    `stage`, that can't be helped for `data` and `fsdp`, which come before it; nor where `data` is a name that the model
    reduces over by itself.
    """
    mesh, free = jax.sharding.get_abstract_mesh(), automatic_axes()
    rows = tuple(axis for axis in free if axis in BATCH_AXES)
    tokens = tuple(axis for axis in free if axis == "context" and rank > 2)
    return rows, tokens, tuple(axis for axis in free if axis == "model" and hidden % mesh.shape[axis] == 0)


def _mix_shard(
    size: int, top_k: int, normalize: bool, x: jax.Array, logits: jax.Array, kernels: ExpertKernels
) -> tuple[jax.Array, jax.Array]:
    """The mix of this device's tokens, or this device's part of it, and how many of their pairs each expert gets."""
    x_NC, logits_NE = (array.reshape(-1, array.shape[-1]) for array in (x, logits))
    chosen_NK, experts_NK = lax.top_k(logits_NE, top_k)
    if normalize:
        gates_NK = jax.nn.softmax(chosen_NK)
    else:
        gates_NK = jnp.exp(chosen_NK - jax.nn.logsumexp(logits_NE, axis=-1, keepdims=True))
    experts_M, num_experts = experts_NK.ravel(), logits_NE.shape[-1]
    order_M = jnp.argsort(experts_M)
    place_M = jnp.argsort(order_M)
    counts_E = _count(experts_M, num_experts)
    rows_MC = _take(x_NC, order_M // top_k, place_M)
    if size == 1:
        rows_MC = _run_experts(rows_MC, kernels, counts_E)
    else:
        # A token's choices differ, so no more of them than L are for one owner.
        fit = _Fit(size, x_NC.shape[0] * min(top_k, num_experts // size), rows_MC.shape[0])
        routes = _plan_routes(counts_E, size)
        rows_MC = _fetch(fit, _run_sorted(fit, _send(fit, rows_MC, routes), kernels, routes), routes)
    mixed_NKC = _take(rows_MC, place_M, order_M).reshape(*gates_NK.shape, -1)
    mix_NC = (mixed_NKC.astype(gates_NK.dtype) * gates_NK[..., None]).sum(1)
    return mix_NC.astype(x.dtype).reshape(1, *x.shape), counts_E[None]


class _Fit(NamedTuple):
    """What of an exchange is fixed when it is traced: D devices, R places for each source, M rows to send."""

    size: int
    room: int
    count: int


class _Routes(NamedTuple):
    """Who sends how many rows to whom: `sizes` and `starts` by source and owner, `counts` by source and expert here.

    A source's rows lie in the order of their owners, each owner's from its start on.
    """

    sizes_DD: jax.Array
    starts_DD: jax.Array
    counts_DL: jax.Array
    index: jax.Array


def _plan_routes(counts_E: jax.Array, size: int) -> _Routes:
    index = lax.axis_index(_AXIS)
    counts_DDL = lax.all_gather(counts_E, _AXIS).reshape(size, size, -1)
    sizes_DD = counts_DDL.sum(-1, dtype=jnp.int32)
    starts_DD = jnp.cumsum(sizes_DD, 1, dtype=jnp.int32) - sizes_DD
    return _Routes(sizes_DD, starts_DD, counts_DDL[:, index], index)


def _exchange(*arrays: jax.Array) -> jax.Array:
    # JAX has no batch of it: one after the other.
    return jax.custom_batching.sequential_vmap(lambda *each: lax.ragged_all_to_all(*each, axis_name=_AXIS))(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(fit: _Fit, rows_MC: jax.Array, routes: _Routes) -> jax.Array:
    """The rows that all sources have for this owner, S C: R places for each source, zeros where there is no row."""
    sizes_DD, starts_DD, _, index = routes

    def ragged(rows_MC: jax.Array) -> jax.Array:
        places_SC = jnp.zeros((fit.size * fit.room, rows_MC.shape[1]), rows_MC.dtype)
        first_D = jnp.full(fit.size, index * fit.room, jnp.int32)
        return _exchange(rows_MC, places_SC, starts_DD[index], sizes_DD[index], first_D, sizes_DD[:, index])

    def dense(rows_MC: jax.Array) -> jax.Array:
        offsets_R, sizes_D1, starts_D1 = jnp.arange(fit.room), sizes_DD[index, :, None], starts_DD[index, :, None]
        sent_DR = jnp.where(offsets_R < sizes_D1, starts_D1 + offsets_R, fit.count)
        return lax.all_to_all(_rows_at(rows_MC, sent_DR.ravel()), _AXIS, 0, 0, tiled=True)

    # XLA on CPU has no ragged form.
    return lax.platform_dependent(rows_MC, cpu=dense, default=ragged)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fetch(fit: _Fit, places_SC: jax.Array, routes: _Routes) -> jax.Array:
    """The rows that this source has sent, M C, back from their owners."""
    sizes_DD, starts_DD, _, index = routes

    def ragged(places_SC: jax.Array) -> jax.Array:
        rows_MC = jnp.zeros((fit.count, places_SC.shape[1]), places_SC.dtype)
        first_D = jnp.arange(fit.size, dtype=jnp.int32) * fit.room
        return _exchange(places_SC, rows_MC, first_D, sizes_DD[:, index], starts_DD[:, index], sizes_DD[index])

    def dense(places_SC: jax.Array) -> jax.Array:
        rows_M = jnp.arange(fit.count)
        owners_M = _count_ends(starts_DD[index] + sizes_DD[index], rows_M)
        place_M = owners_M * fit.room + rows_M - starts_DD[index, owners_M]
        return _rows_at(lax.all_to_all(places_SC, _AXIS, 0, 0, tiled=True), place_M)

    return lax.platform_dependent(places_SC, cpu=dense, default=ragged)


# Each is the other's transpose; JAX's own of the ragged form would exchange the slices' places again.
_send.defvjp(
    lambda fit, rows_MC, routes: (_send(fit, rows_MC, routes), routes),
    lambda fit, routes, grad_SC: (_fetch(fit, grad_SC, routes), None),
)
_fetch.defvjp(
    lambda fit, places_SC, routes: (_fetch(fit, places_SC, routes), routes),
    lambda fit, routes, grad_MC: (_send(fit, grad_MC, routes), None),
)


def _run_sorted(fit: _Fit, places_SC: jax.Array, kernels: ExpertKernels, routes: _Routes) -> jax.Array:
    """What the experts of this device make of the rows that it was sent, each in its place."""
    ends_DL = jnp.cumsum(routes.counts_DL, 1)
    # Places without a row get the number after the last expert's, and so come last.
    experts_DR = jax.vmap(_count_ends, (0, None))(ends_DL, jnp.arange(fit.room))
    order_S = jnp.argsort(experts_DR.ravel())
    place_S = jnp.argsort(order_S)
    rows_SC = _run_experts(_take(places_SC, order_S, place_S), kernels, routes.counts_DL.sum(0))
    return _take(rows_SC, place_S, order_S)


def _run_experts(rows_C: jax.Array, kernels: ExpertKernels, counts: jax.Array) -> jax.Array:
    """Each expert's gated MLP of its rows, which lie in the experts' order; zeros for the rows after the last one's."""
    is_row = (jnp.arange(rows_C.shape[0]) < counts.sum())[:, None]
    # vmap can take ragged_dot only where it maps all the arguments (jax 0.12): so it does, and nothing is added.
    nothing = lax.stop_gradient(jnp.where(False, sum((array.ravel()[0] for array in kernels), rows_C[0, 0]), 0))
    rows_C, counts = rows_C + nothing, counts + nothing.astype(counts.dtype)

    def multiply(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        if takes_rows_alone():
            # JAX 0.10.2 can't lower the gradient of a batch of ragged_dot: here each row meets all experts.
            owner = _count_ends(jnp.cumsum(counts), jnp.arange(rows.shape[0]))
            return jnp.einsum("me,mc,ecd->md", jax.nn.one_hot(owner, len(counts), dtype=rows.dtype), rows, kernel)
        # JAX doesn't say what a ragged_dot gives after the last group: left in, a NaN would spread through gradients.
        return jnp.where(is_row, lax.ragged_dot(rows, kernel + nothing.astype(kernel.dtype), counts), 0)

    return multiply(jax.nn.silu(multiply(rows_C, kernels.gate)) * multiply(rows_C, kernels.up), kernels.down)


@jax.custom_vjp
def _take(rows: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """The rows at `index`; `back` tells for each row in turn where it was put.

    So its gradient is rows taken too: what JAX makes of it, rows added one by one where they came from, is slow.
    """
    return _rows_at(rows, index)


def _take_backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, None, None]:
    count, _, back = saved
    # A row taken several times, as a token by its choices, stands as often in `back`, one after the other.
    return _rows_at(grad, back).reshape(count, -1, grad.shape[1]).sum(1), None, None


_take.defvjp(lambda rows, index, back: (_take(rows, index, back), (rows.shape[0], index, back)), _take_backward)


def _rows_at(rows: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _count(experts_M: jax.Array, num_experts: int) -> jax.Array:
    """How often each expert occurs: compared with all of them, which costs less than adding one by one."""
    return (experts_M[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)


def _count_ends(ends: jax.Array, places: jax.Array) -> jax.Array:
    """In which of the parts that end there each place lies."""
    return (places[:, None] >= ends).sum(-1, dtype=jnp.int32)


def _measure(logits: jax.Array, counts_E: jax.Array, top_k: int) -> MoELosses:
    leading, num_experts = tuple(range(logits.ndim - 1)), logits.shape[-1]
    fractions_E = counts_E.astype(logits.dtype) / (math.prod(logits.shape[:-1]) * top_k)
    balance = num_experts * (fractions_E * jax.nn.softmax(logits).mean(leading)).sum()
    return MoELosses(balance, (jax.nn.logsumexp(logits, axis=-1) ** 2).mean(), fractions_E)


def _check_arrays(x: Any, router: Any, experts: Any, top_k: Any) -> None:
    if not isinstance(experts, ExpertKernels):
        raise ExpertError(f"experts is a {type(experts).__name__}; give jaxpar.ExpertKernels(up, gate, down).")
    for name, array in {"x": x, "router": router, **experts._asdict()}.items():
        dtype = getattr(array, "dtype", type(array).__name__)
        if not hasattr(array, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
            raise ExpertError(f"{name} is of {dtype}; give floating-point arrays.")
    if np.ndim(x) < 2 or 0 in np.shape(x):
        raise ExpertError(f"x has shape {np.shape(x)}; give rows, any more dims, and features last, none of them 0.")
    features = x.shape[-1]
    if np.ndim(router) != 2 or router.shape[0] != features:
        raise ExpertError(f"router has shape {np.shape(router)}; x of {features} features needs ({features}, experts).")
    num_experts, hidden = router.shape[1], experts.up.shape[-1] if np.ndim(experts.up) else 0
    shapes = (*[(num_experts, features, hidden)] * 2, (num_experts, hidden, features))
    for name, kernel, shape in zip(experts._fields, experts, shapes, strict=True):
        if kernel.shape != shape:
            raise ExpertError(
                f"{name} has shape {kernel.shape}, but a router of {num_experts} experts, x of {features} features and "
                f"up of {hidden} hidden ones need {shape}."
            )
    if not is_integer(top_k) or top_k > num_experts:
        raise ExpertError(f"top_k is {top_k!r}; give a whole number from 1 to the {num_experts} experts.")


def _check_split(x: jax.Array, num_experts: int, size: int, axes: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    if num_experts % size:
        raise ExpertError(
            f"The router has {num_experts} experts, which do not divide by {size}, the size of mesh axis {_AXIS!r}; "
            "give a multiple of it, or a smaller axis."
        )
    mesh = jax.sharding.get_abstract_mesh()
    for dim, (what, names) in enumerate(zip(("rows", "tokens"), axes, strict=True)):
        parts, length = math.prod(mesh.shape[name] for name in names), x.shape[dim]
        if length % parts:
            near = length - length % parts
            raise ExpertError(
                f"x has {length} {what}, which do not divide by {parts}, the size of mesh axes {names}; pad to "
                f"{near + parts}{f', or use {near}' if near else ''}."
            )
