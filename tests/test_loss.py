"""What a model's function returns, and that it adds up alike however the rows are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar
from jaxpar import LossError, Weighted
from jaxpar.loss import fold, grow, mean_value, read_loss

ONE = jnp.ones(())

# What a function returned, and (loss, metrics, updates) as it is read.
RESULTS = {
    "a scalar alone": (ONE, (ONE, {}, None)),
    "a float alone": (1.0, (1.0, {}, None)),
    "a pair": ((ONE, {"a": ONE}), (ONE, {"a": ONE}, None)),
    "three": ((ONE, {}, {"batch_stats": {}}), (ONE, {}, {"batch_stats": {}})),
    "a weighted loss": (Weighted(ONE, ONE), (Weighted(ONE, ONE), {}, None)),
}


@pytest.mark.parametrize(("result", "expected"), RESULTS.values(), ids=RESULTS)
def test_a_result_is_read_as_loss_metrics_and_updates(result, expected):
    assert read_loss(result) == expected


@pytest.mark.parametrize(
    "result", [None, "x", (ONE,), (ONE, {}, {}, {}), (ONE, [ONE]), (ONE, ONE), ({}, {}), [ONE, {}]]
)
def test_anything_else_is_named(result):
    with pytest.raises(LossError, match=r"loss_fn (returned|gave)"):
        read_loss(result)


@pytest.mark.parametrize(
    ("total", "weight", "mean"), [(6.0, 3.0, 2.0), (6.0, None, 6.0), (6.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 0.25, 4.0)]
)
def test_a_mean_is_the_total_by_the_weight_and_zero_where_nothing_weighs(total, weight, mean):
    weight = None if weight is None else jnp.float32(weight)
    assert float(mean_value(Weighted(jnp.float32(total), weight))) == mean


@pytest.mark.parametrize(
    ("dtype", "kept"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("int32", "float32")]
)
def test_sums_are_kept_in_float32(dtype, kept):
    assert grow(jnp.ones(2, dtype)).dtype == kept


def test_numbers_are_folded_one_after_the_other():
    key = jax.random.key(0)
    expected = jax.random.fold_in(jax.random.fold_in(key, 3), 1)
    assert (jax.random.key_data(fold(key, (3, 1))) == jax.random.key_data(expected)).all()
    assert (jax.random.key_data(fold(key, ())) == jax.random.key_data(key)).all()


def test_a_weighted_value_is_a_pytree():
    doubled = jax.tree.map(lambda leaf: leaf * 2, Weighted(ONE, ONE))
    assert (float(doubled.total), float(doubled.weight)) == (2.0, 2.0)


# over shards and microbatches: rows of unequal weight, whole shards of none

ROWS = 32
rng = np.random.default_rng(0)
MASK = (rng.random((ROWS, 3)) < 0.3).astype("float32")
MASK[:4] = MASK[20:24] = 0
BATCH = {"x": rng.normal(size=(ROWS, 3)).astype("float32"), "mask": MASK}


def init_fn(rng):
    return jaxpar.TrainState.create(nnx.Linear(3, 3, rngs=nnx.Rngs(rng)), optax.sgd(0.1))


def squares(model, batch):
    return (model(batch["x"]) - 1) ** 2


VALUES = {
    "a mean": lambda model, batch, rng: squares(model, batch).mean(),
    "one value an example": lambda model, batch, rng: squares(model, batch).mean(axis=1),
    "weighted sums": lambda model, batch, rng: Weighted(
        (squares(model, batch) * batch["mask"]).sum(), batch["mask"].sum()
    ),
    "weighted sums an example": lambda model, batch, rng: Weighted(
        (squares(model, batch) * batch["mask"]).sum(1), batch["mask"].sum(1)
    ),
}
EXPECTED = {
    "a mean": lambda values: values.mean(),
    "one value an example": lambda values: values.mean(),
    "weighted sums": lambda values: (values * MASK).sum() / MASK.sum(),
    "weighted sums an example": lambda values: (values * MASK).sum() / MASK.sum(),
}
WAYS = {"jit": ("jit", 1), "jit, 4 microbatches": ("jit", 4), "pmap": ("pmap", 1), "pmap, 4 microbatches": ("pmap", 4)}


def make_strategy(view):
    return jaxpar.data_parallel() if view == "pmap" else jaxpar.sharded(jaxpar.make_mesh(data=8))


def run(loss_fn, way, batch=BATCH):
    view, count = WAYS[way]
    strategy = make_strategy(view)
    state = strategy.place(init_fn(jax.random.key(0)))
    values = np.asarray(squares(state.model, batch))
    step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=count)
    state, metrics = step(state, strategy.shard_batch(batch))
    return values, state, metrics


@pytest.mark.parametrize("way", WAYS)
@jax.default_matmul_precision("highest")
def test_losses_and_metrics_are_global_means(way):
    everything = lambda model, batch, rng: (
        VALUES["weighted sums"](model, batch, rng),
        {name: value(model, batch, rng) for name, value in VALUES.items()},
    )
    values, _, metrics = run(everything, way)
    np.testing.assert_allclose(metrics["loss"], EXPECTED["weighted sums"](values), rtol=2e-6)
    for name in VALUES:
        np.testing.assert_allclose(metrics[name], EXPECTED[name](values), rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", VALUES)
def test_each_kind_of_value_may_be_the_loss(name):
    values, _, metrics = run(lambda model, batch, rng: (VALUES[name](model, batch, rng), {}), "jit, 4 microbatches")
    np.testing.assert_allclose(metrics["loss"], EXPECTED[name](values), rtol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_weighs_nothing_changes_nothing_and_is_counted(way):
    batch = {**BATCH, "mask": np.zeros_like(MASK)}
    _, state, metrics = run(VALUES["weighted sums"], way, batch)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    assert float(metrics["skipped"]) == 1
    assert int(state.step) == 1
    before = init_fn(jax.random.key(0))
    np.testing.assert_array_equal(state.params["kernel"], before.params["kernel"])


@pytest.mark.parametrize("view", ["jit", "pmap"])
def test_metrics_may_nest_and_be_numbers(view):
    def loss_fn(model, batch, rng):
        return squares(model, batch).mean(), {"a": {"b": 2, "c": (True, squares(model, batch).mean(1))}}

    strategy = make_strategy(view)
    state = strategy.place(init_fn(jax.random.key(0)))
    values = np.asarray(squares(state.model, BATCH))
    _, metrics = jaxpar.make_train_step(loss_fn, strategy)(state, strategy.shard_batch(BATCH))
    assert float(metrics["a"]["b"]) == 2
    assert float(metrics["a"]["c"][0]) == 1
    np.testing.assert_allclose(metrics["a"]["c"][1], values.mean(), rtol=2e-6)


def test_a_bfloat16_mask_of_many_ones_is_counted_whole():
    """A running bf16 sum of ones stops at 256."""
    rows = 1024
    batch = {"x": np.ones((rows, 3), "float32"), "mask": np.ones(rows, jnp.bfloat16)}
    value = lambda model, batch, rng: Weighted(batch["mask"], batch["mask"])
    strategy = make_strategy("jit")
    state = strategy.place(init_fn(jax.random.key(0)))
    loss_fn = lambda model, batch, rng: (squares(model, batch).mean(), {"ones": value(model, batch, rng)})
    step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=2, compute_dtype=jnp.bfloat16)
    _, metrics = step(state, strategy.shard_batch(batch))
    assert float(metrics["ones"]) == 1
