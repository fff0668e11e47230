"""The same seed gives the same numbers on every mesh, and no two shards, rows, microbatches or steps the same mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import DEVICES, ROWS, STRATEGIES, init_once, make_batches, make_task, start, to_numpy

import jaxpar

every_strategy = pytest.mark.parametrize("kind", STRATEGIES)
SAME_EVERYWHERE = [kind for kind in STRATEGIES if kind != "pmap"]


@pytest.mark.parametrize("kind", SAME_EVERYWHERE)
@pytest.mark.parametrize("name", ["nnx_decoder", "linen_conv"])
def test_the_same_seed_gives_the_same_state_on_every_mesh(kind, name):
    task = make_task(name)
    here, there = to_numpy(init_once(kind, task.init_fn)[1]), to_numpy(init_once("data", task.init_fn, 1)[1])
    for path, leaf in there.items():
        np.testing.assert_array_equal(here[path], leaf, err_msg=path)


class Recorder(nnx.Module):
    """Its gradient is the dropout mask of every row, so that training writes the masks into `drawn`."""

    def __init__(self, rngs):
        self.drawn = nnx.Param(jnp.zeros((ROWS, 128)))
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@functools.cache
def draw_masks(kind, num_microbatches=1, devices=DEVICES, steps=1, weighted=False):
    """Returns the masks drawn for each row over some steps: from nnx's keys in even columns, the step's in odd ones."""

    def init_fn(rng):
        return jaxpar.TrainState.create(Recorder(nnx.Rngs(rng)), optax.sgd(1.0))

    def loss_fn(model, batch, rng):
        rows = model.drawn[...][batch["row"]]
        masks = model.dropout(jnp.ones((rows.shape[0], 64))) * 0.5
        also = jax.random.bernoulli(rng, 0.5, (rows.shape[0], 64))
        unused = 0 * model.up(jnp.ones((1, 8))).sum()
        return -(rows * jnp.concatenate([masks, also], axis=1)).sum(1).mean() * ROWS + unused, {}

    strategy = STRATEGIES[kind](devices)
    state = strategy.init(init_fn, jax.random.key(3))
    step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=num_microbatches)
    masks, before = [], 0
    for _ in range(steps):
        batch = {"row": np.arange(ROWS)} | ({"example_weight": np.ones(ROWS, "float32")} if weighted else {})
        state, _ = step(state, strategy.shard_batch(batch))
        masks.append(np.round(np.asarray(state.params["drawn"]) - before, 3))
        before = np.asarray(state.params["drawn"])
    return masks


@pytest.mark.parametrize("kind", SAME_EVERYWHERE)
def test_the_same_seed_draws_the_same_dropout_on_every_mesh(kind):
    (mask,), (expected,) = draw_masks(kind), draw_masks("data", devices=1)
    assert 0.4 < mask.mean() < 0.6
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(("kind", "num_microbatches"), [("pmap", 1), ("pmap", 4), ("data", 4), ("fsdp", 4)])
def test_no_two_rows_steps_shards_or_microbatches_draw_the_same_mask(kind, num_microbatches):
    masks = np.concatenate(draw_masks(kind, num_microbatches, steps=2))
    assert set(np.unique(masks)) == {0, 1}
    for half in (masks[:, :64], masks[:, 64:]):
        assert len(np.unique(half, axis=0)) == 2 * ROWS


@pytest.mark.parametrize("kind", ["pmap", "fsdp"])
def test_rows_that_are_taken_one_by_one_for_their_weights_draw_masks_of_their_own(kind):
    masks = np.concatenate(draw_masks(kind, weighted=True))
    for half in (masks[:, :64], masks[:, 64:]):
        assert len(np.unique(half, axis=0)) == ROWS


@every_strategy
def test_no_two_shards_of_an_eval_step_draw_the_same(kind):
    strategy, state, _ = start(kind, make_task("linen_mlp"))

    def fn(variables, batch, rng):
        return jax.random.bernoulli(rng, 0.5, (*batch["y"].shape, 64))

    drawn = jaxpar.make_eval_step(fn, strategy)(state, strategy.shard_batch(make_batches("mlp", 1)[0]))
    assert len(np.unique(np.asarray(drawn), axis=0)) == ROWS
