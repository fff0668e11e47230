"""Assertions for users' own tests: that a model trains under a strategy as it does on one device."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.batch import match_path, read_batch
from jaxpar.data_parallel import data_parallel
from jaxpar.differences import Difference, find_differences, find_noise, largest_move, relative_norms, with_params
from jaxpar.inspection.budget import assert_collectives as assert_collectives
from jaxpar.inspection.budget import assert_fits as assert_fits
from jaxpar.integers import is_integer
from jaxpar.mesh import make_mesh
from jaxpar.oracle import View, find_narrowed_loss, one_device_step
from jaxpar.rules import FSDP, MEGATRON, ZERO1
from jaxpar.sharded import sharded
from jaxpar.state import TrainState, is_key
from jaxpar.strategy import Strategy, check_compute_dtype, check_strategy
from jaxpar.train import make_train_step

# Float64 is where an error in logic can't hide; float32 is what runs.
TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
_LOSS = "metrics/loss"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Run(NamedTuple):
    """How far a strategy was from one device in one dtype: the largest differences over all steps, and where.

    A difference is absolute, and relative where the value is above 1. Parameters, the model's state and the metrics
    other than the loss are held to the tolerance in float64 alone.
    """

    dtype: str
    tolerance: float
    loss: float
    params: float
    leaf: str


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What `assert_trains_like_one_device` found: `print` it.

    Attributes:
      strategy: the strategy's name.
      steps: how many steps were compared.
      runs: one for each dtype.
      noise: the parameters left out, since their gradient is rounding noise on every step.
      parts: in how many parts one device took each batch, since the strategy's step sees as many.

    >>> print(Agreement("sharded({'data': 8}, 0 lists of rules)", 5, (Run("float64", 1e-9, 0.0, 2e-16, "params/w"),)))
    sharded({'data': 8}, 0 lists of rules) trains like one device over 5 steps:
      float64: losses to 0, parameters to 2e-16 ('params/w'); tolerance 1e-09
    """

    strategy: str
    steps: int
    runs: tuple[Run, ...]
    noise: tuple[str, ...] = ()
    parts: int = 1

    def __str__(self) -> str:
        taking = f" that takes each batch in {self.parts} parts," if self.parts > 1 else ""
        lines = [f"{self.strategy} trains like one device{taking} over {self.steps} steps:"]
        for run in self.runs:
            params = f", parameters to {run.params:.2g} ({run.leaf!r})" if run.dtype == "float64" else ""
            lines.append(f"  {run.dtype}: losses to {run.loss:.2g}{params}; tolerance {run.tolerance:g}")
        if self.noise:
            lines.append(f"  not compared, their gradient is rounding noise: {', '.join(self.noise)}")
        return "\n".join(lines)


def assert_trains_like_one_device(
    init_fn: Callable[[jax.Array], TrainState],
    loss_fn: Callable[[Any, Any, jax.Array], Any],
    batches: Sequence[Any],
    strategy: Strategy,
    *,
    num_microbatches: int = 1,
    compute_dtype: Any = None,
    dtypes: Sequence[str] | None = None,
) -> Agreement:
    """Returns, and prints, how closely a strategy's own train step follows one device over `batches`.

    One device plays the step in plain JAX, without jaxpar's builder: each microbatch in turn, each shard where the
    strategy's step sees one. In float64 each loss, metric, parameter and model state must agree to 1e-9 after every
    step; in float32, with exact matrix products, each loss to 1e-5. The state must lie as `strategy.layout` says, and
    the step must compile once for each shape of batch; some gradient must not be 0. What one device does is compiled
    once for the strategies that follow, if they get the same `init_fn` and `loss_fn`: make those outside the test.

    Args:
      init_fn: makes the state, as for `strategy.init`; it gets `jax.random.key(0)`, split.
      loss_fn: as for `make_train_step`.
      batches: the global batches, one a step; a few are enough.
      strategy: what to compare.
      num_microbatches: as for `make_train_step`.
      compute_dtype: as for `make_train_step`; then losses agree to 1e-2, and float64 has no part in it.
      dtypes: those to run in; by default `("float64", "float32")`. Where a layer fixes float32, give `("float32",)`.

    Raises:
      ValueError, TypeError: an argument that can't be; a strategy that is none.
      AssertionError: they differ: the first step, the leaf, by how much, and operations left in float32 in float64.

    >>> import optax
    >>> from flax import nnx
    >>> init_fn = lambda rng: TrainState.create(nnx.Linear(4, 8, rngs=nnx.Rngs(rng)), optax.adam(0.1))
    >>> loss_fn = lambda model, batch, rng: (((model(batch["x"]) - 1) ** 2).mean(), {})
    >>> batches = [{"x": np.ones((16, 4), "float32")}] * 2
    >>> agreement = assert_trains_like_one_device(init_fn, loss_fn, batches, sharded(make_mesh(data=8)))
    sharded({'data': 8}, 0 lists of rules) trains like one device over 2 steps:
      float64: losses to ..., parameters to ...; tolerance 1e-09
      float32: losses to ...; tolerance 1e-05
    """
    dtypes = _read_dtypes(batches, strategy, num_microbatches, compute_dtype, dtypes)
    start = strategy.init(init_fn, jax.random.key(0))
    _check_layout(start, strategy, "strategy.init")
    case = _Case(loss_fn, list(batches), strategy, num_microbatches, compute_dtype, start)
    runs, noises, parts = zip(*(_compare(case, dtype) for dtype in dtypes), strict=True)
    agreement = Agreement(strategy.name, len(batches), runs, noises[0], parts[0])
    print(agreement)
    return agreement


def strategies(num_devices: int | None = None) -> dict[str, Callable[[], Strategy]]:
    """Returns the standard strategies that fit a number of devices: a table of names and functions that make each.

    For `pytest.mark.parametrize`: the functions use the first `num_devices` devices when they are called; where the
    number is given, asking for their names starts no device. By default it is all, which to count starts JAX.

    >>> list(strategies(8))
    ['one', 'pmap', 'data', 'model', 'data_model', 'fsdp', 'fsdp_model', 'zero1']
    >>> list(strategies(2))
    ['one', 'pmap', 'data', 'model', 'fsdp', 'zero1']
    >>> strategies(8)["data_model"]()
    sharded({'data': 2, 'model': 4}, 1 list of rules)
    """
    count = len(jax.devices()) if num_devices is None else num_devices
    if not is_integer(count):
        raise ValueError(f"num_devices is {num_devices!r}; give a whole number, 1 or more.")

    def on_mesh(*rules: Any, **sizes: Any) -> Callable[[], Strategy]:
        used = math.prod(sizes.values())
        return lambda: sharded(make_mesh(None, devices=jax.devices()[:used], **sizes), *rules)

    table = {"one": on_mesh(data=1), "pmap": lambda: data_parallel(jax.local_devices()[:count])}
    if count > 1:
        table |= {"data": on_mesh(data=count), "model": on_mesh(MEGATRON, model=count)}
        if count % 2 == 0 and count > 2:
            table["data_model"] = on_mesh(MEGATRON, data=2, model=count // 2)
        table["fsdp"] = on_mesh(FSDP, fsdp=count)
        if count % 2 == 0 and count > 2:
            table["fsdp_model"] = on_mesh(MEGATRON, FSDP, fsdp=2, model=count // 2)
        table["zero1"] = on_mesh(ZERO1, data=count)
    return table


def _read_dtypes(batches: Any, strategy: Any, num_microbatches: Any, compute_dtype: Any, dtypes: Any) -> Sequence[str]:
    """The dtypes to run in, once every argument is checked."""
    if isinstance(batches, Mapping) or not isinstance(batches, Sequence):
        raise ValueError(f"batches is a {type(batches).__name__}; give a list of batches, one a step, as [batch] * 3.")
    if not batches:
        raise ValueError("batches is empty; give the global batch of at least one step.")
    check_strategy(strategy)
    if not is_integer(num_microbatches):
        raise ValueError(f"num_microbatches is {num_microbatches!r}; give a whole number, 1 or more.")
    # With x64 on, since what is wrong with float64 is said better below.
    with jax.enable_x64(True):
        check_compute_dtype(compute_dtype)
    known = ("float64", "float32") if compute_dtype is None else (jnp.dtype(compute_dtype).name,)
    if known[0] not in TOLERANCES or (len(known) == 1 and known[0].endswith(("32", "64"))):
        raise ValueError(f"compute_dtype is {known[0]}; give jnp.bfloat16 or jnp.float16, or None.")
    dtypes = known if dtypes is None else dtypes
    if isinstance(dtypes, str) or not dtypes or set(dtypes) - set(known):
        raise ValueError(f"dtypes is {dtypes!r}; give one or more of {list(known)}.")
    return dtypes


class _Case(NamedTuple):
    """What is compared in each dtype."""

    loss_fn: Callable[..., Any]
    batches: list[Any]
    strategy: Strategy
    num_microbatches: int
    compute_dtype: Any
    start: TrainState


def _compare(case: _Case, dtype: str) -> tuple[Run, tuple[str, ...], int]:
    """One dtype's run, the leaves whose gradients are noise, and in how many parts one device took a batch."""
    strategy, exact = case.strategy, dtype == "float64"
    with jax.default_matmul_precision("highest"), jax.enable_x64(exact):
        widen = _to_float64 if exact else lambda tree: tree
        start = widen(jax.tree.map(_through_host, case.start))
        batches = [widen(read_batch(batch)) for batch in case.batches]
        view = _view_of(case, start, batches[0])
        differences, norms = _follow(case, view, start, batches)
        noise = find_noise(norms)
        held = [difference for difference in differences if difference.what not in noise]
        run = _measure(dtype, held)
        failed = [item for item in held if not item.size <= run.tolerance and (exact or item.what == _LOSS)]
        if failed:
            narrowed = find_narrowed_loss(case.loss_fn, view, start, batches[0]) if exact else ()
            raise AssertionError(_explain(strategy, run, failed, narrowed))
        return run, noise, math.prod(size for _, size in view.shards) * view.num_microbatches


def _view_of(case: _Case, state: TrainState, batch: Any) -> View:
    """What of the batch one call of the model sees under the strategy."""
    strategy = case.strategy
    axes = strategy.train_axes(strategy.layout(state), case.num_microbatches)
    paths = [match_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(batch)]
    return View(
        shards=tuple((axis, strategy.mesh.shape[axis]) for axis in axes),
        axis_name=strategy.axis_name,
        num_microbatches=case.num_microbatches,
        shared=frozenset(filter(strategy.shared, paths)),
        compute_dtype=case.compute_dtype,
    )


def _follow(
    case: _Case, view: View, start: TrainState, batches: list[Any]
) -> tuple[list[Difference], list[dict[str, float]]]:
    """The differences after each step of the strategy and of one device, and each leaf's share of the gradient."""
    strategy = case.strategy
    train_step = make_train_step(
        case.loss_fn, strategy, num_microbatches=case.num_microbatches, compute_dtype=case.compute_dtype
    )
    step, play = _count_compiles(train_step, strategy), one_device_step(case.loss_fn, view)
    state, lone, differences, norms = strategy.place(jax.tree.map(jnp.copy, start)), start, [], []
    is_trained = False
    for number, batch in enumerate(batches, 1):
        state, metrics = step(state, strategy.shard_batch(batch))
        before, (lone, expected, gradients) = lone, play(lone, batch)
        is_trained |= any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradients))
        differences += (found := find_differences(number, (metrics, state), (expected, lone)))
        # No optimizer moves a leaf by noise much further than it moves others: what goes further counts.
        furthest = 4 * largest_move(before, lone)
        strayed = {item.what for item in found if not item.size <= furthest}
        norms.append({path: 1.0 if path in strayed else norm for path, norm in relative_norms(gradients).items()})
        # Adam makes steps of noise, and a bias before BatchNorm carries them into its statistics.
        state = with_params(state, lone, find_noise(norms))
    _check_layout(state, strategy, f"after {len(batches)} steps")
    if not is_trained:
        raise AssertionError(
            f"The gradient of all {len(norms[0])} parameters is 0 in each of {len(batches)} steps, which shows "
            "nothing: let the loss depend on the model that loss_fn is given, on a batch that weighs something."
        )
    return differences, norms


def _through_host(leaf: jax.Array) -> jax.Array:
    """The leaf on one device."""
    # JAX 0.10.2's device_put leaves what it brings to one device typed with the mesh it came from.
    if is_key(leaf):
        return jax.random.wrap_key_data(_through_host(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(leaf))


def _to_float64(tree: Any) -> Any:
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: leaf.astype("float64") if is_float(leaf) else leaf, tree)


def _measure(dtype: str, differences: list[Difference]) -> Run:
    params = [item for item in differences if item.what.startswith("params/")]
    worst = max(params, key=lambda item: item.size, default=Difference(0, "", 0.0, 0, 0))
    loss = (item.size for item in differences if item.what == _LOSS)
    return Run(dtype, TOLERANCES[dtype], max(loss), worst.size, worst.what)


def _explain(strategy: Strategy, run: Run, failed: list[Difference], narrowings: Sequence[str]) -> str:
    """The first step that differs and its largest difference, how many more, and what may excuse it."""
    step = failed[0].step
    here = sorted((item for item in failed if item.step == step), key=lambda item: -item.size)
    # Metrics follow from the parameters: where one of those differs it is the nearer to the cause.
    first = next((item for item in here if item.what.startswith("params/")), here[0])
    others = [item.what for item in here if item is not first]
    lines = [
        f"{strategy.name} does not train like one device: in {run.dtype}, step {step}, {first.what!r} is "
        f"{first.got:.12g}, but {first.expected:.12g} on one device; they differ by {first.size:.2g}, and "
        f"{run.tolerance:g} is allowed (absolute, or relative to values above 1)."
    ]
    if others:
        lines.append(f"So do {len(others)} more at this step: {', '.join(others[:8])}{', ...' * (len(others) > 8)}.")
    if narrowings:
        shown = "".join(f"\n  {line}" for line in narrowings[:8])
        lines.append(
            f"Float64 is not kept on the way to the loss, so that 1e-9 can't be reached; write these in the "
            f"inputs' own dtype, or give dtypes=('float32',):{shown}"
        )
    return "\n".join(lines)


def _check_layout(state: TrainState, strategy: Strategy, when: str) -> None:
    """Raises AssertionError unless each leaf's real shards are where the layout puts them."""
    layout = strategy.layout(state)
    for row, leaf, sharding in zip(layout.rows, jax.tree.leaves(state), layout.shardings, strict=True):
        want = sharding.devices_indices_map(leaf.shape)
        here = {device: index for device, index in want.items() if device.process_index == jax.process_index()}
        # A random key's shards have a dim more, of its words.
        if {shard.device: shard.index[: leaf.ndim] for shard in leaf.addressable_shards} != here:
            told = f"{when}: {row.path!r} lies as {leaf.sharding}, but {strategy.name} lays it out as {row.spec}"
            raise AssertionError(f"{told}; give it that sharding, as strategy.place does.")


def _count_compiles(step: Callable, strategy: Strategy) -> Callable:
    """`step`, which raises AssertionError where it compiles again for a shape of batch that it has compiled for."""
    seen = set()

    def counted(state: TrainState, batch: Any) -> Any:
        shapes = str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch))
        compiles = []

        def listen(event: str, duration_secs: float, **rest: Any) -> None:
            if event == _COMPILE_EVENT:
                compiles.append(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            result = step(state, batch)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        if shapes in seen and compiles:
            raise AssertionError(
                f"The step of {strategy.name} compiled {len(compiles)} times more for a batch of the same shape: its "
                "state changed; return the state with the shapes and shardings it came with."
            )
        seen.add(shapes)
        return result

    return counted
