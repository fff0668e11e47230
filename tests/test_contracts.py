"""What every strategy promises beside the same numbers: bytes, compiles, donation, weights, means, what is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from models import DEVICES, ROWS, STRATEGIES, init_once, make_batches, make_task, start, to_numpy

import jaxpar
from jaxpar.state import named_leaves

every_strategy = pytest.mark.parametrize("kind", STRATEGIES)
SGD = optax.sgd(0.5)
CLIPPED = optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(1.0))

# Parts of each of these leaves that a device keeps, with 8 devices: 1 is the whole of it.
PARTS = {
    "pmap": {"params/block/up/kernel": 1, "opt_state/0/mu/block/up/kernel": 1},
    "data": {"params/block/up/kernel": 1, "opt_state/0/mu/block/up/kernel": 1},
    "model": {"params/block/up/kernel": 8, "params/block/key/kernel": 1, "opt_state/0/mu/block/up/kernel": 8},
    "data_model": {"params/block/up/kernel": 4, "params/embed/embedding": 4, "opt_state/0/nu/block/up/kernel": 4},
    "fsdp": {"params/block/up/kernel": 8, "params/block/norm1/scale": 1, "opt_state/0/mu/block/out/kernel": 8},
    "fsdp_model": {"params/block/up/kernel": 8, "params/block/key/kernel": 1, "opt_state/0/nu/block/up/kernel": 8},
    "zero1": {"params/block/up/kernel": 1, "opt_state/0/mu/block/up/kernel": 8},
}


@every_strategy
def test_each_device_holds_its_share_of_parameters_and_moments(kind):
    # As init made it; most other tests see a copy that was placed.
    strategy, state = init_once(kind, make_task("nnx_decoder").init_fn)
    layout = strategy.layout(state)
    held = {path: leaf.addressable_shards[0].data.nbytes for path, leaf in named_leaves(state) if path != "rng"}
    assert held == {row.path: row.bytes_per_device for row in layout.rows if row.path != "rng"}
    whole = {path: leaf.nbytes for path, leaf in named_leaves(state)}
    assert {path: whole[path] // held[path] for path in PARTS[kind]} == PARTS[kind]


@every_strategy
def test_the_layout_and_the_abstract_state_foretell_the_state(kind):
    strategy, state, _ = start(kind, make_task("linen_conv"))
    abstract = strategy.abstract_state(make_task("linen_conv").init_fn)
    for (path, leaf), (_, shape) in zip(named_leaves(state), named_leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), path
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype), path


@every_strategy
def test_a_loop_traces_and_compiles_the_step_once(kind):
    task, traces, compiles = make_task("nnx_mlp"), [], []
    strategy, state, _ = start(kind, task)

    def counted(model, batch, rng):
        traces.append(1)
        return task.loss_fn(model, batch, rng)

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(details.get("fun_name"))

    step = jaxpar.make_train_step(counted, strategy)
    batches = [strategy.shard_batch(batch) for batch in task.batches]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for batch in batches:
            state, _ = step(state, batch)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(traces) == 1
    # Under pmap the watch on drift is a second program.
    assert len(compiles) == (2 if kind == "pmap" else 1), compiles


@every_strategy
def test_a_step_takes_over_its_states_buffers_and_gives_them_back_laid_out_alike(kind):
    strategy, state, step = start(kind, make_task("linen_conv"))
    old = named_leaves(state)
    new, _ = step(state, strategy.shard_batch(make_batches("conv", 1)[0]))
    for (path, before), (_, after) in zip(old, named_leaves(new), strict=True):
        assert before.is_deleted() or (before is after and path == "rng"), path
        assert before.sharding.is_equivalent_to(after.sharding, after.ndim), path


@every_strategy
def test_a_changed_batch_shape_compiles_again_and_says_so(kind):
    strategy, state, step = start(kind, make_task("nnx_mlp"))
    state, _ = step(state, strategy.shard_batch(make_batches("mlp", 1)[0]))
    text = r"\['x'\] changed from \(32, 8\) float32 to \(64, 8\) float32: the step compiled again, in [0-9.]+ s"
    with pytest.warns(jaxpar.RecompileWarning, match=text):
        state, _ = step(state, strategy.shard_batch(make_batches("mlp", 1, rows=64)[0]))
    padded = jaxpar.pad_batch({name: leaf[:30] for name, leaf in make_batches("mlp", 1)[0].items()}, 32)
    with pytest.warns(
        jaxpar.RecompileWarning, match=r"The batch gained the leaf \['example_weight'\]: the step compiled"
    ):
        step(state, strategy.shard_batch(padded))


# weights, clipping, scaling


@every_strategy
def test_a_batch_that_weighs_nothing_gives_loss_zero_and_no_update(kind):
    strategy, state, step = start(kind, make_task("nnx_mlp", masked=True))
    batch = make_batches("mlp", 1, masked=True)[0]
    before = to_numpy(state)
    state, metrics = step(state, strategy.shard_batch(batch | {"mask": np.zeros_like(batch["mask"])}))
    after = to_numpy(state)
    assert (float(metrics["loss"]), float(metrics["skipped"])) == (0, 1)
    assert after.pop("step") == before.pop("step") + 1
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    assert float(step(state, strategy.shard_batch(batch))[1]["skipped"]) == 0


@functools.cache
def step_on_one_device_without_padding(init_fn, loss_fn):
    strategy, state = init_once("data", init_fn, 1)
    rows = {name: leaf[:19] for name, leaf in make_batches("mlp", 1)[0].items()}
    state, metrics = jaxpar.make_train_step(loss_fn, strategy)(strategy.place(state), strategy.shard_batch(rows))
    return to_numpy(state.params), metrics


@every_strategy
def test_padding_counts_for_nothing(kind):
    task = make_task("nnx_mlp", SGD)
    strategy, state, step = start(kind, task)
    padded = jaxpar.pad_batch({name: leaf[:19] for name, leaf in task.batches[0].items()}, ROWS)
    state, metrics = step(state, strategy.shard_batch(padded))

    params, means = step_on_one_device_without_padding(task.init_fn, task.loss_fn)
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], means[name], rtol=1e-5, err_msg=name)
    for path, leaf in to_numpy(state.params).items():
        np.testing.assert_allclose(leaf, params[path], atol=1e-6, err_msg=path)


@every_strategy
def test_clipping_sees_the_global_gradient(kind):
    strategy, state, step = start(kind, make_task("linen_mlp", CLIPPED))
    before = to_numpy(state.params)
    state, metrics = step(state, strategy.shard_batch(make_batches("mlp", 1)[0]))
    moved = math.sqrt(sum(((leaf - before[path]) ** 2).sum() for path, leaf in to_numpy(state.params).items()))
    assert float(metrics["grad_norm"]) > 0.1
    assert moved == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("kind", ["pmap", "data", "fsdp_model"])
def test_float16_divides_its_scale_out_and_skips_a_step_that_overflows(kind):
    task = make_task("nnx_mlp", optax.sgd(0.1))

    def init_fn(rng):
        return jaxpar.TrainState.create(task.init_fn(rng).model, optax.sgd(0.1), dynamic_scale=DynamicScale(scale=64.0))

    batch = task.batches[0]
    strategy, state, step = start(kind, task._replace(init_fn=init_fn), compute_dtype=jnp.float16)
    _, plain_state, plain_step = start(kind, task)
    _, plain = plain_step(plain_state, strategy.shard_batch(batch))
    state, metrics = step(state, strategy.shard_batch(batch))
    assert float(metrics["skipped"]) == 0
    assert float(metrics["grad_norm"]) == pytest.approx(float(plain["grad_norm"]), rel=1e-2)

    before = to_numpy(state.params)
    state, metrics = step(state, strategy.shard_batch(batch | {"x": batch["x"] * np.float32(1e38)}))
    assert float(metrics["skipped"]) == 1
    assert float(state.dynamic_scale.scale) == 32.0
    for path, leaf in to_numpy(state.params).items():
        np.testing.assert_array_equal(before[path], leaf, err_msg=path)


# what is refused


@every_strategy
def test_a_metric_may_not_take_the_name_of_the_steps_own(kind):
    task = make_task("nnx_mlp")

    def loss_fn(model, batch, rng):
        loss, _ = task.loss_fn(model, batch, rng)
        return loss, {"grad_norm": loss}

    strategy, state, step = start(kind, task._replace(loss_fn=loss_fn))
    with pytest.raises(jaxpar.LossError, match=r"\['grad_norm'\].*rename"):
        step(state, strategy.shard_batch(task.batches[0]))


@pytest.mark.devices(8)
def test_a_step_of_ones_own_that_lacks_a_reduction_is_named_under_pmap():
    strategy, state, _ = start("pmap", make_task("linen_mlp"))

    def step(state, batch):
        drifting = {**state.params, "down": jax.tree.map(lambda leaf: leaf + batch["x"].mean(), state.params["down"])}
        return state.replace(params=drifting), {}

    with pytest.raises(jaxpar.DriftError, match=r"'params/down/bias' differs among the 8 devices.*pmean"):
        strategy.compile(step)(state, strategy.shard_batch(make_batches("mlp", 1)[0]))


def test_a_step_of_ones_own_that_reduces_is_not_refused_under_pmap():
    strategy, state, _ = start("pmap", make_task("linen_mlp"))

    def step(state, batch):
        mean = jax.lax.pmean(batch["x"].mean(), "data")
        return state.replace(params=jax.tree.map(lambda leaf: leaf + mean, state.params)), mean

    batch = make_batches("mlp", 1)[0]
    _, mean = strategy.compile(step)(state, strategy.shard_batch(batch))
    assert float(mean) == pytest.approx(batch["x"].mean(), abs=1e-6)


# BatchNorm and evaluation


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, axis_name="data", rngs=rngs)

    def __call__(self, x):
        return self.norm(self.up(x))


def init_normed(rng):
    return jaxpar.TrainState.create(Normed(nnx.Rngs(rng)), SGD)


@functools.cache
def batch_statistics(kind, devices, num_microbatches):
    return batch_statistics_under(STRATEGIES[kind](devices), num_microbatches)


def batch_statistics_under(strategy, num_microbatches):
    state = strategy.init(init_normed, jax.random.key(0))
    step = jaxpar.make_train_step(
        lambda model, batch, rng: (model(batch["x"]) ** 2)[:, 0].mean(), strategy, num_microbatches=num_microbatches
    )
    # Rows that grow, so that each shard's own statistics are far from the whole batch's.
    x = make_batches("mlp", 1)[0]["x"] * np.arange(ROWS, dtype="float32")[:, None]
    state, _ = step(state, strategy.shard_batch({"x": x}))
    return to_numpy(state.model_state["batch_stats"])


@pytest.mark.parametrize("num_microbatches", [1, 4])
@every_strategy
def test_batch_statistics_are_those_of_the_global_batch_or_microbatch(kind, num_microbatches):
    found = batch_statistics(kind, DEVICES, num_microbatches)
    expected = batch_statistics("data", 1, num_microbatches)
    assert set(expected) == {"norm/mean", "norm/var"}
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"expert": 8}, {"data": 2, "fsdp": 2, "expert": 2}])
def test_batch_statistics_are_those_of_the_microbatch_whatever_the_axes_of_the_batch(sizes):
    rules = [jaxpar.FSDP] if "fsdp" in sizes else []
    found = batch_statistics_under(jaxpar.sharded(jaxpar.make_mesh(**sizes), *rules), 4)
    for path, leaf in batch_statistics("data", 1, 4).items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


class Counting(nnx.Module):
    def __init__(self, summed, rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.summed = summed

    def __call__(self, x):
        rows = (x[:, 0] > 0).sum(dtype=jnp.int32)
        self.count[...] += jax.lax.psum(rows, "data") if self.summed else rows
        return self.up(x)


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("kind", ["pmap", "data", "fsdp"])
@pytest.mark.parametrize("summed", [True, False])
def test_counts_that_a_model_keeps_are_summed_or_refused(kind, num_microbatches, summed):
    strategy = STRATEGIES[kind](DEVICES)
    state = strategy.init(lambda rng: jaxpar.TrainState.create(Counting(summed, nnx.Rngs(rng)), SGD), jax.random.key(0))
    step = jaxpar.make_train_step(
        lambda model, batch, rng: (model(batch["x"]) ** 2).mean(), strategy, num_microbatches=num_microbatches
    )
    batch = {"x": make_batches("mlp", 1)[0]["x"]}
    if not summed and (kind == "pmap" or (kind == "data" and num_microbatches > 1)):
        with pytest.raises(jaxpar.DriftError, match=r"'model_state/batch_stats/count' differs among the 8 devices"):
            step(state, strategy.shard_batch(batch))
        return
    state, _ = step(state, strategy.shard_batch(batch))
    assert int(state.model_state["batch_stats"]["count"]) == (batch["x"][:, 0] > 0).sum()


def test_state_that_differs_by_shard_is_averaged_under_pmap():
    class Local(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 8, rngs=rngs)
            self.mean = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.mean[...] = x.mean()
            return self.up(x)

    def init_fn(rng):
        return jaxpar.TrainState.create(Local(nnx.Rngs(rng)), optax.sgd(0.1))

    strategy = STRATEGIES["pmap"](DEVICES)
    step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
    x = make_batches("mlp", 1)[0]["x"] + np.arange(ROWS, dtype="float32")[:, None]
    state, _ = step(strategy.init(init_fn, jax.random.key(0)), strategy.shard_batch({"x": x}))
    assert float(state.model_state["batch_stats"]["mean"]) == pytest.approx(x.mean(), rel=1e-5)


@every_strategy
def test_evaluate_is_exact_with_a_short_last_batch(kind):
    strategy, state, _ = start(kind, make_task("linen_mlp"))
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(37, 8)).astype("float32"), rng.integers(0, 2, 37).astype("float32")
    # Padding repeats the last row: it must not count though that row does.
    mask[-1] = 1

    def fn(variables, batch, rng):
        return {
            "row": batch["x"].sum(-1),
            "scalar": batch["x"].mean(),
            "weighted": jaxpar.Weighted(batch["mask"] * batch["x"][:, 0], batch["mask"]),
            "weighted_sum": jaxpar.Weighted((batch["mask"] * batch["x"][:, 0]).sum(), batch["mask"].sum()),
        }

    batches = [{"x": x[i : i + 16], "mask": mask[i : i + 16]} for i in (0, 16, 32)]
    means = jaxpar.evaluate(jaxpar.make_eval_step(fn, strategy), state, batches)
    weighted = (mask * x[:, 0]).sum() / mask.sum()
    expected = {"row": x.sum(-1).mean(), "scalar": x.mean(), "weighted": weighted, "weighted_sum": weighted}
    assert means == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in expected.items()}


@every_strategy
def test_an_eval_step_gives_means_over_the_batch_and_rows_in_their_order(kind):
    task = make_task("nnx_conv", dropout=0.5)
    strategy, state, _ = start(kind, task)
    batch = task.batches[0]

    def fn(model, batch, rng):
        logits = model(batch["x"])
        return {"logits": logits, "mean": logits.mean()}

    found = jaxpar.make_eval_step(fn, strategy)(state, strategy.shard_batch(batch))
    model = STRATEGIES["data"](1).place(state).model
    model.eval()
    # Outside a step nothing binds the name over which BatchNorm would reduce; in eval mode it doesn't.
    expected = np.asarray(model(batch["x"]))
    np.testing.assert_allclose(np.asarray(found["logits"]), expected, atol=1e-5)
    assert float(found["mean"]) == pytest.approx(expected.mean(), abs=1e-6)


# looking for what is wrong inside a step


@pytest.mark.parametrize("name", ["data", "pmap"])
def test_a_step_that_makes_a_nan_says_how_to_find_the_operation(name):
    strategy, state, step = start(name, make_task("nnx_mlp"))
    batch = make_batches("mlp", 1)[0]
    batch["x"][0, 0] = np.nan
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match=r"The step made a nan.*; .* loss_fn\(state.model, batch, .* set"):
            step(state, strategy.shard_batch(batch))
        # The state is there still, and the function by itself tells the operation.
        with pytest.raises(FloatingPointError, match=r"encountered in \w+"):
            make_task("nnx_mlp").loss_fn(state.model, batch, jax.random.key(0))


@pytest.mark.parametrize("name", ["data", "pmap"])
def test_a_step_inside_a_transformation_says_that_it_stands_outside(name):
    strategy, state, step = start(name, make_task("nnx_mlp"))
    batch = strategy.shard_batch(make_batches("mlp", 1)[0])
    for _ in range(2):  # before it is compiled, and after
        with pytest.raises(jaxpar.StateError, match=r"called inside jax.jit, vmap, grad .*; call it outside"):
            jax.jit(step)(state, batch)
        state, _ = step(state, batch)


def test_numbers_of_four_bits_are_compared_over_devices_too():
    strategy = jaxpar.data_parallel()
    state = strategy.place(jnp.arange(8, dtype=jnp.int4))
    step = strategy.compile(lambda state, batch: (state, jax.lax.psum(batch["x"].sum(), "data")))
    assert (step(state, strategy.shard_batch({"x": np.ones(8, "float32")}))[0] == jnp.arange(8, dtype=jnp.int4)).all()


def test_a_step_without_jit_says_what_to_do_instead():
    strategy, state, step = start("data", make_task("nnx_mlp"))
    batch = strategy.shard_batch(make_batches("mlp", 1)[0])
    with (
        jax.disable_jit(),
        pytest.raises(ValueError, match=r"jax_disable_jit is set, .* call your own function by itself"),
    ):
        step(state, batch)


@pytest.mark.parametrize("name", ["data", "pmap"])
def test_a_nan_that_the_loss_itself_makes_is_told_alike(name):
    strategy, state, _ = start(name, make_task("nnx_mlp"))
    step = jaxpar.make_train_step(lambda model, batch, rng: (jnp.log(-jnp.square(batch["x"])).mean(), {}), strategy)
    with (
        jax.debug_nans(True),
        pytest.raises(FloatingPointError, match=r"The step made a nan.*; .* loss_fn\(state.model"),
    ):
        step(state, strategy.shard_batch(make_batches("mlp", 1)[0]))
