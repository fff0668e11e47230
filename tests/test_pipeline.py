"""Pipelines: the numbers of one device on every mesh, memory that microbatches don't add to, and what travels.

B rows, T tokens, V vocabulary.
"""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_text import find_collectives
from flax import linen, nnx
from jax.sharding import PartitionSpec as P
from models import sub_mesh

import jaxpar
from jaxpar import PipelineError, pipeline, pipeline_loss
from jaxpar.schedule import ScheduleError

ROWS, TOKENS, VOCAB, WIDTH, HIDDEN, LAYERS = 32, 4, 16, 16, 32, 4
SGD = optax.sgd(0.2, momentum=0.9)


class Block(nnx.Module):
    def __init__(self, dropout, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, x):
        y = self.down(jnp.tanh(self.up(x)))
        return x + (self.dropout(y) if self.dropout else y)


class Decoder(nnx.Module):
    """Embedding, a stack of blocks, a norm, and the embedding again."""

    def __init__(self, dropout, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        # nnx.Embed alone would turn its table back into the dtype in which it was made.
        self.embed.dtype = None
        self.blocks = make_stack(dropout, rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)


def make_stack(dropout, rngs):
    make = nnx.vmap(lambda rngs: Block(dropout, rngs))
    return nnx.split_rngs(splits=LAYERS)(make)(rngs)


def masked_loss(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jaxpar.Weighted((losses * batch["mask"]).sum(), batch["mask"].sum()), {"plain": losses.mean()}


def gpipe_loss(model, batch, rng):
    x = pipeline(model.blocks, model.embed(batch["x"]), stage_microbatches=4)
    return masked_loss(model.embed.attend(model.norm(x)), batch)


def whole_loss(schedule, model, batch, rng):
    def last(parts, x, batch):
        embed, norm = parts
        return masked_loss(embed.attend(norm(x)), batch)

    first = (lambda embed, batch: embed(batch["x"]), model.embed)
    last = (last, (model.embed, model.norm))
    return pipeline_loss(first, model.blocks, last, batch, stage_microbatches=4, schedule=schedule)


LOSSES = {
    "pipeline": gpipe_loss,
    "1f1b": functools.partial(whole_loss, "1f1b"),
    "gpipe": functools.partial(whole_loss, "gpipe"),
}
STRATEGIES = {
    "stage": lambda: jaxpar.sharded(sub_mesh(stage=2), jaxpar.PIPELINE),
    "stages": lambda: jaxpar.sharded(sub_mesh(stage=4), jaxpar.PIPELINE),
    "data_stage": lambda: jaxpar.sharded(sub_mesh(data=2, stage=4), jaxpar.PIPELINE),
    "stage_model": lambda: jaxpar.sharded(sub_mesh(stage=2, model=2), jaxpar.PIPELINE, jaxpar.MEGATRON),
    "fsdp_stage": lambda: jaxpar.sharded(sub_mesh(fsdp=2, stage=2), jaxpar.PIPELINE, jaxpar.FSDP),
    # Two axes split the embedding's table, in an island over a third.
    "fsdp_stage_model": lambda: jaxpar.sharded(
        sub_mesh(fsdp=2, stage=2, model=2), jaxpar.PIPELINE, jaxpar.MEGATRON, jaxpar.FSDP
    ),
    # Beside what fsdp splits, the step is not manual over data.
    "data_fsdp_stage": lambda: jaxpar.sharded(sub_mesh(data=2, fsdp=2, stage=2), jaxpar.PIPELINE, jaxpar.FSDP),
    "data_stage_model": lambda: jaxpar.sharded(sub_mesh(data=2, stage=2, model=2), jaxpar.PIPELINE, jaxpar.MEGATRON),
    "pmap": lambda: jaxpar.data_parallel(jax.devices()[:2]),
}


def make_batches(count=3, rows=ROWS):
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        text = rng.integers(0, VOCAB, (rows, TOKENS + 1))
        mask = (rng.random((rows, TOKENS)) < 0.4).astype("float32")
        # Microbatch 0 of 4 has no token that counts.
        mask[::4] = 0
        batches.append({"x": text[:, :-1], "y": text[:, 1:], "mask": mask})
    return batches


@functools.cache
def make_init_fn(dropout):
    return lambda rng: jaxpar.TrainState.create(Decoder(dropout, nnx.Rngs(rng)), SGD)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + linen.Dense(WIDTH, name="down")(jnp.tanh(linen.Dense(HIDDEN, name="up")(x)))


def test_a_linen_stack_trains_like_one_device():
    block, sample = LinenBlock(), jnp.ones((1, WIDTH))

    def init_fn(rng):
        layers = jax.vmap(lambda key: block.init(key, sample)["params"])(jax.random.split(rng, LAYERS))
        return jaxpar.TrainState.create({"params": {"layers": layers}}, SGD)

    def loss_fn(variables, batch, rng):
        layers = (lambda params, x: block.apply({"params": params}, x), variables["params"]["layers"])
        return (pipeline(layers, batch["x"], stage_microbatches=4) ** 2).mean()

    batches = [{"x": np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype("float32")}] * 2
    strategy = STRATEGIES["data_stage"]()
    agreement = jaxpar.testing.assert_trains_like_one_device(init_fn, loss_fn, batches, strategy, dtypes=("float64",))
    assert agreement.runs[0].params < 1e-12


def test_each_stage_holds_its_layers_and_their_moments():
    strategy = STRATEGIES["data_stage"]()
    rows = {row.path: row for row in strategy.layout(make_init_fn(0.0)).rows}
    for path in ("params/blocks/up/kernel", "opt_state/0/trace/blocks/down/kernel"):
        assert rows[path].spec == P("stage", None, None)
        assert rows[path].bytes_per_device * 4 == math.prod(rows[path].shape) * 4
    assert rows["params/embed/embedding"].spec == P(None, None)


def test_data_is_left_to_the_compiler_where_it_would_end_the_process_over_a_look_up():
    manual = {}
    for name in ("data_stage", "data_fsdp_stage", "data_stage_model"):
        strategy = STRATEGIES[name]()
        manual[name] = strategy.train_axes(strategy.layout(make_init_fn(0.0)), 1)
    assert manual == {"data_stage": ("data",), "data_fsdp_stage": (), "data_stage_model": ("data",)}


def test_evaluation_and_training_see_the_same_loss():
    strategy = STRATEGIES["data_stage"]()
    state, batch = strategy.init(make_init_fn(0.0), jax.random.key(0)), make_batches(1)[0]
    held_out = jaxpar.evaluate(jaxpar.make_eval_step(LOSSES["1f1b"], strategy), state, [batch])
    _, metrics = jaxpar.make_train_step(LOSSES["1f1b"], strategy)(state, strategy.shard_batch(batch))
    assert held_out[0] == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert held_out[1]["plain"] == pytest.approx(float(metrics["plain"]), rel=1e-6)


def test_a_padded_batch_counts_its_rows_alone():
    strategy, (batch, more) = STRATEGIES["data_stage"](), make_batches(2)
    batches = [batch, {key: leaf[:27] for key, leaf in more.items()}]
    state = strategy.init(make_init_fn(0.0), jax.random.key(0))
    split = jaxpar.evaluate(jaxpar.make_eval_step(LOSSES["1f1b"], strategy), state, batches)
    lone = jaxpar.sharded(sub_mesh(data=1))
    step = jaxpar.make_eval_step(
        lambda model, batch, rng: masked_loss(model.embed.attend(model.norm(run_in_turn(model, batch))), batch), lone
    )
    expected = jaxpar.evaluate(step, lone.place(state), batches)
    assert split[0] == pytest.approx(expected[0], rel=1e-6)


def test_layers_may_be_rematerialised_by_flax():
    blocks, x = make_stack(0.0, nnx.Rngs(0)), jnp.ones((8, WIDTH))
    again = pipeline((nnx.remat(lambda block, x: block(x)), blocks), x, stage_microbatches=4)
    np.testing.assert_allclose(again, pipeline(blocks, x, stage_microbatches=4), rtol=1e-6)


def run_in_turn(model, batch):
    return pipeline(model.blocks, model.embed(batch["x"]), stage_microbatches=1)


def test_dropout_is_another_in_each_microbatch_and_layer():
    blocks = make_stack(0.5, nnx.Rngs(0))
    x = jnp.ones((8, WIDTH))
    with jax.set_mesh(sub_mesh(stage=2)):
        split = jax.jit(lambda x: pipeline(blocks, x, stage_microbatches=4))(x)
    alone = pipeline(blocks, x, stage_microbatches=4)
    np.testing.assert_allclose(split, alone, rtol=1e-5, atol=1e-6)
    # Rows 0 and 4 are one microbatch's, 0 and 1 are not; equal rows in one microbatch have masks of their own.
    seen = {tuple(np.round(np.asarray(row), 4)) for row in alone}
    assert len(seen) == 8


def test_a_key_that_layers_close_over_draws_alike_on_every_mesh():
    key, x = jax.random.key(0), jnp.ones((8, 64))
    layer = lambda w, x: x * w * jax.random.bernoulli(key, 0.5, x.shape)
    draw = lambda x: pipeline((layer, jnp.ones(4)), x, stage_microbatches=4)
    with jax.set_mesh(sub_mesh(stage=4)):
        split = jax.jit(draw)(x)
    np.testing.assert_array_equal(split, draw(x))


def test_a_key_that_layers_are_given_differs_in_each_microbatch():
    layer = lambda w, x, key: x * w * jax.random.bernoulli(key, 0.5, x.shape)
    draw = lambda x: pipeline((layer, jnp.ones(4)), x, jax.random.key(0), stage_microbatches=4)
    x = jnp.ones((8, 64))
    with jax.set_mesh(sub_mesh(stage=4)):
        split = jax.jit(draw)(x)
    np.testing.assert_array_equal(split, draw(x))
    assert len(np.unique(split, axis=0)) == 8


def test_what_a_layer_is_given_besides_is_whole_for_every_microbatch():
    params, shift = jnp.arange(1.0, 5.0), jnp.arange(3.0)
    with jax.set_mesh(sub_mesh(data=2, stage=4)):
        # Rows that differ: each must come back in its own place.
        x = jnp.arange(24.0).reshape(8, 3)
        out = jax.jit(lambda x: pipeline((lambda w, x, s: x * w + s, params), x, shift, stage_microbatches=4))(x)
    expected = np.arange(24.0).reshape(8, 3)
    for w in np.arange(1.0, 5.0):
        expected = expected * w + np.arange(3.0)
    np.testing.assert_allclose(out, expected)


@pytest.mark.parametrize("axes", [{"data": 1}, {"stage": 2}])
def test_a_python_number_takes_the_dtype_of_what_it_meets_and_8_bit_weights_serve(axes):
    layer = lambda w, x, scale: (x @ w.astype(x.dtype)) * scale
    params, x = jnp.ones((2, 3, 3), jnp.float8_e4m3fn), jnp.ones((4, 3), jnp.bfloat16)
    with jax.set_mesh(sub_mesh(**axes)):
        y = pipeline((layer, params), x, 0.5, stage_microbatches=2)
    assert (y == 2.25).all()
    assert y.dtype == jnp.bfloat16


def test_keys_of_rows_draw_alike_on_every_mesh_and_numbers_are_whole():
    keys = jax.random.split(jax.random.key(0), 8)
    draw = jax.vmap(lambda key, x: x * jax.random.normal(key))

    def objective(layers, schedule):
        first = (lambda shift, batch: draw(batch["key"], batch["x"]) + shift * batch["scale"], 0.5)
        batch = {"x": X, "key": keys, "scale": 2.0}
        loss, _ = pipeline_loss(first, (double, layers), LAST, batch, stage_microbatches=4, schedule=schedule)
        return loss.total

    expected = jax.grad(objective)(FOUR, "gpipe")
    with jax.set_mesh(sub_mesh(data=2, stage=4)):
        # Op by op: beside an axis that is not the island's own, too.
        for schedule in ("gpipe", "1f1b"):
            np.testing.assert_allclose(jax.grad(objective)(FOUR, schedule), expected, rtol=1e-5)
        out = pipeline((lambda w, x, shift: x * w + shift, FOUR), X, 0.5, stage_microbatches=4)
    np.testing.assert_allclose(out, X + 2)


@pytest.mark.parametrize("schedule", ["pipeline", "1f1b", "gpipe"])
@pytest.mark.parametrize("axes", [{"data": 1}, {"stage": 2}])
def test_gradients_of_many_microbatches_are_summed_in_float32(axes, schedule):
    rng = np.random.default_rng(0)
    params, x = jnp.asarray(rng.normal(size=(2, 8, 8)) * 0.3, "bfloat16"), jnp.asarray(rng.normal(size=(512, 8)) + 1)
    layer = lambda w, x: x + jnp.tanh(x @ w)

    def objective(params, x):
        first, last = (lambda _, batch: batch, ()), (lambda _, x, batch: (x.astype("float32") ** 2).mean(), ())
        if schedule == "pipeline":
            return last[0]((), pipeline((layer, params), x, stage_microbatches=256), x)
        loss, _ = pipeline_loss(first, (layer, params), last, x, stage_microbatches=256, schedule=schedule)
        return loss.total / loss.weight

    exact = jax.grad(lambda params: ((run_stack(layer, params, x)) ** 2).mean())(params.astype("float32"))
    with jax.set_mesh(sub_mesh(**axes)):
        found = jax.jit(jax.grad(objective))(params, x.astype("bfloat16"))
    # Summed in bfloat16 it is off by 0.02; this is what one gradient in bfloat16 is off by.
    assert np.linalg.norm(found.astype("float32") - exact) < 0.005 * np.linalg.norm(exact)


def run_stack(layer, params, x):
    return jax.lax.scan(lambda x, w: (layer(w, x), None), x, params)[0]


def test_whole_numbers_are_counted_in_float64_where_there_is_one():
    def last(_, x, batch):
        return x.mean(), {"tokens": jaxpar.Weighted(batch["count"].sum(), jnp.ones((), int))}

    with jax.enable_x64(True):
        batch = {"x": X, "count": jnp.full(8, 2**24 + 1)}
        for axes in ({"data": 1}, {"stage": 4}):
            with jax.set_mesh(sub_mesh(**axes)):
                _, metrics = pipeline_loss(
                    (lambda _, batch: batch["x"], ()), (double, FOUR), (last, ()), batch, stage_microbatches=4
                )
            assert float(metrics["tokens"].total) == 8 * (2**24 + 1)


def mean_square(schedule, params, layer, x):
    """Returns the mean square of what a stack makes of `x`, by `pipeline` or by `pipeline_loss`."""
    if schedule == "pipeline":
        return (pipeline((layer, params), x, stage_microbatches=4) ** 2).mean()
    first, last = (lambda _, batch: batch, ()), (lambda _, x, batch: (x**2).mean(), ())
    loss, _ = pipeline_loss(first, (layer, params), last, x, stage_microbatches=4, schedule=schedule)
    return loss.total / loss.weight


def attend(w, x):
    heads = x.reshape(*x.shape[:2], 2, -1)
    mixed = jaxpar.ring_attention((x @ w["query"]).reshape(heads.shape), heads, heads, is_causal=True)
    return x + mixed.reshape(x.shape)


def mix(w, x):
    kernels = jaxpar.ExpertKernels(w["up"], w["gate"], w["down"])
    return x + jaxpar.mixture_of_experts(x, w["router"], kernels)[0]


ISLANDS = {
    "context": (attend, {"query": (8, 8)}),
    "expert": (mix, {"router": (8, 4), "up": (4, 8, 16), "gate": (4, 8, 16), "down": (4, 16, 8)}),
}


@pytest.mark.parametrize("schedule", ["pipeline", "1f1b", "gpipe"])
@pytest.mark.parametrize("axis", ISLANDS)
def test_islands_stand_inside_the_layers(axis, schedule):
    layer, shapes = ISLANDS[axis]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {name: jnp.asarray(rng.normal(size=(LAYERS, *shape)) * 0.3) for name, shape in shapes.items()}
        x = jnp.asarray(rng.normal(size=(8, 8, 8)))
        run = lambda schedule: jax.jit(jax.value_and_grad(lambda params: mean_square(schedule, params, layer, x)))
        expected = run("pipeline")(params)
        with jax.set_mesh(sub_mesh(**{"stage": 2, axis: 2})):
            got = run(schedule)(params)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-12, atol=1e-12)


def roll_tokens(w, x):
    """A layer that moves tokens, which `model` splits, to the device beside."""
    return x + jnp.tanh(jnp.roll(jaxpar.split_sequence(x), 1, axis=1) @ w)


def norm_without_epsilon(w, x):
    """A layer whose gradient at zeros is NaN."""
    return x + jnp.tanh(x / jnp.sqrt((x**2).mean(-1, keepdims=True)) @ w)


def shift_loss(w, x, batch):
    """A loss of tokens beside each other, which `context` splits."""
    return ((x[:, :-1] - batch[:, 1:]) ** 2).mean() * w


STAGE_AND_MORE = {
    "tokens moved in a layer": ({"stage": 2, "model": 4}, roll_tokens, "pipeline"),
    "tokens moved in a layer of 1F1B": ({"stage": 2, "model": 4}, roll_tokens, "1f1b"),
    "tokens moved in a layer of four stages": ({"stage": 4, "model": 2}, roll_tokens, "1f1b"),
    "tokens moved in the loss": ({"stage": 2, "context": 2}, norm_without_epsilon, "1f1b"),
    "tokens moved in the loss of GPipe": ({"stage": 2, "context": 2}, norm_without_epsilon, "gpipe"),
    "no gradient at zeros": ({"stage": 4, "model": 2}, norm_without_epsilon, "pipeline"),
}


@pytest.mark.parametrize("case", STAGE_AND_MORE)
def test_layers_and_losses_may_move_what_other_axes_split(case):
    sizes, layer, schedule = STAGE_AND_MORE[case]

    def objective(params, x):
        if schedule == "pipeline":
            return (pipeline((layer, params), x, stage_microbatches=4) ** 2).mean()
        first, last = (lambda _, batch: batch, ()), (shift_loss, jnp.float64(1))
        loss, _ = pipeline_loss(first, (layer, params), last, x, stage_microbatches=4, schedule=schedule)
        return loss.total / loss.weight

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params, x = jnp.asarray(rng.normal(size=(4, 8, 8)) * 0.3), jnp.asarray(rng.normal(size=(8, 16, 8)))
        expected = jax.jit(jax.value_and_grad(objective))(params, x)
        with jax.set_mesh(sub_mesh(**sizes)):
            x = jax.device_put(x, P(None, next(axis for axis in sizes if axis != "stage")))
            found = jax.jit(jax.value_and_grad(objective))(params, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["pipeline", "1f1b", "gpipe"])
def test_bfloat16_is_computed_in_beside_other_axes(schedule):
    layer = lambda w, x: x + jnp.tanh(x @ w)
    first, last = (lambda table, batch: table[batch]), (lambda w, x, batch: (x @ w).astype("float32").mean())

    def objective(params, ids):
        table, layers, head = params
        if schedule == "pipeline":
            return last(head, pipeline((layer, layers), first(table, ids), stage_microbatches=4), ids)
        loss, _ = pipeline_loss(
            (first, table), (layer, layers), (last, head), ids, stage_microbatches=4, schedule=schedule
        )
        return loss.total / loss.weight

    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=shape) * 0.3, "bfloat16") for shape in ((16, 8), (4, 8, 8), (8, 1))]
    ids = jnp.arange(8 * 4).reshape(8, 4) % 16
    expected = jax.jit(jax.grad(objective))(params, ids)
    with jax.set_mesh(sub_mesh(stage=2, context=2, model=2)):
        found = jax.jit(jax.grad(objective))(params, jax.device_put(ids, P(None, "context")))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, "float32"), np.asarray(other, "float32"), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_whole_numbers_may_travel_with_the_features(schedule):
    first = (lambda table, batch: {"x": table[batch], "ids": batch}, jnp.linspace(0, 1, VOCAB * 4).reshape(VOCAB, 4))
    layer = lambda w, x: {"x": x["x"] * w + x["ids"][:, None], "ids": x["ids"]}
    last = (lambda w, x, batch: (x["x"] * w).mean(), jnp.ones(()))

    def objective(layers):
        return pipeline_loss(first, (layer, layers), last, jnp.arange(8), stage_microbatches=4, schedule=schedule)[
            0
        ].total

    expected = jax.jit(jax.grad(objective))(FOUR)
    with jax.set_mesh(sub_mesh(stage=4)):
        np.testing.assert_allclose(np.asarray(jax.jit(jax.grad(objective))(FOUR)), np.asarray(expected), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_metrics_and_weights_have_no_gradient_on_any_mesh_and_the_batch_may_need_none(schedule):
    def objective(layers, x):
        last = (lambda _, x, batch: (jaxpar.Weighted((x**3).sum(), (x**2).sum()), {"size": abs(x).mean()}), ())
        first = (lambda _, batch: batch, ())
        loss, metrics = pipeline_loss(first, (double, layers), last, x, stage_microbatches=4, schedule=schedule)
        return loss.total / loss.weight + metrics["size"].total / metrics["size"].weight

    layers, x = jnp.arange(1.0, 5.0) / 4, jnp.arange(8.0 * WIDTH).reshape(8, WIDTH) / WIDTH
    gradient = jax.jit(jax.grad(objective))
    alone = gradient(layers, x)
    with jax.set_mesh(sub_mesh(stage=4)):
        np.testing.assert_allclose(np.asarray(gradient(layers, x)), np.asarray(alone), rtol=1e-5)
    for mesh in (sub_mesh(data=1), sub_mesh(stage=4)):
        # Inside a jit of the loss's own, too.
        with jax.set_mesh(mesh), pytest.raises(PipelineError, match=r"leaf of the batch, of shape .* is computed from"):
            jax.grad(lambda x: jax.jit(objective)(layers, x))(x)


def test_what_1f1b_can_not_differentiate_is_named():
    def objective(scale):
        last = (lambda _, x, batch: (x * scale).mean(), ())
        return pipeline_loss((lambda _, b: b, ()), (double, FOUR), last, X, stage_microbatches=4)[0].total

    text = r"last uses a value of shape \(\), to be differentiated, that is not among its parameters; give it as one"
    with jax.set_mesh(sub_mesh(stage=4)), pytest.raises(PipelineError, match=text):
        jax.grad(objective)(jnp.ones(()))


def compile_step(loss, stage_microbatches, rows, strategy, *, width=64, tokens=16):
    """Returns the compiled train step of a plain stack of matrices with embedding and head, in float32."""

    def init_fn(rng):
        params = {"embed": jnp.ones((VOCAB, width)), "blocks": {"kernel": jnp.ones((LAYERS, width, width))}}
        return jaxpar.TrainState.create({"params": params}, optax.sgd(0.1))

    def loss_fn(variables, batch, rng):
        params = variables["params"]
        return pipeline_loss(
            (lambda table, batch: table[batch["x"]], params["embed"]),
            (lambda layer, x: x + jnp.tanh(x @ layer["kernel"]), params["blocks"]),
            (lambda table, x, batch: ((x @ table.T) ** 2).mean(), params["embed"]),
            batch,
            stage_microbatches=stage_microbatches,
            schedule=loss,
        )

    batch = {"x": jax.ShapeDtypeStruct((rows, tokens), jnp.int32)}
    step = jaxpar.make_train_step(loss_fn, strategy)
    return step.lower(strategy.abstract_state(init_fn), batch).compile()


def test_1f1b_needs_no_more_memory_for_more_microbatches():
    strategy = jaxpar.sharded(sub_mesh(stage=4), jaxpar.PIPELINE)
    used = {
        schedule: [
            compile_step(schedule, count, 8 * count, strategy).memory_analysis().temp_size_in_bytes
            for count in (4, 8, 16, 32)
        ]
        for schedule in ("1f1b", "gpipe")
    }
    print(used)
    assert max(used["1f1b"]) <= 1.05 * min(used["1f1b"]), used
    assert used["gpipe"][-1] > 2 * used["gpipe"][0], used


@pytest.mark.parametrize("schedule", ["pipeline", "gpipe"])
def test_gpipe_keeps_of_each_microbatch_its_input_and_no_copy_of_the_layers(schedule):
    width, rows = 256, 4
    params = jax.ShapeDtypeStruct((LAYERS, width, width), jnp.float32)
    layer = lambda w, x: jnp.tanh(x @ w)

    def temp_bytes(count):
        x = jax.ShapeDtypeStruct((rows * count, width), jnp.float32)
        first, last = (lambda _, batch: batch, ()), (lambda _, x, batch: (x**2).mean(), ())

        def loss(params, x):
            if schedule == "pipeline":
                return (pipeline((layer, params), x, stage_microbatches=count) ** 2).mean()
            return pipeline_loss(first, (layer, params), last, x, stage_microbatches=count, schedule=schedule)[0].total

        with jax.set_mesh(sub_mesh(stage=4)):
            compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temp_bytes(4), temp_bytes(20)
    boundary = rows * width * 4
    assert (many - few) / 16 < 8 * boundary < width * width * 4 / 2, (few, many)


def test_one_boundary_activation_travels_each_way_and_gradients_are_summed_once():
    strategy = jaxpar.sharded(sub_mesh(data=2, stage=4), jaxpar.PIPELINE)
    found = find_collectives(compile_step("1f1b", 4, 32, strategy).as_text())
    inside = collections.Counter((one.kind, *one.shapes) for one in found if one.computation != "main")
    # 32 rows over 2 shards of the data and 4 microbatches: 4 rows of 16 tokens of 64 features, there and back.
    assert inside == {("collective-permute", "f32[4,16,64]"): 2}
    outside = [one for one in found if one.computation == "main"]
    assert {one.kind for one in outside} == {"all-reduce"}
    # No stage's layers leave it: they are summed over the data alone, one layer a stage.
    sizes = [shape for one in outside for shape in one.shapes]
    assert sizes.count("f32[1,64,64]") == 1
    assert not [shape for shape in sizes if shape == "f32[4,64,64]"]


# With 2 stages of 2 layers and 4 microbatches. A backward pass runs what it goes back over again, but 1F1B's last stage
# and its head run nowhere else.
CALLS = {
    "pipeline": {"layer": 4 * 4 * 2},
    "gpipe": {"first": 4 * 2, "layer": 4 * 4 * 2, "last": 4 * 2},
    "1f1b": {"first": 4 * 2, "layer": 2 * 4 + 4 * 4, "last": 4},
}


@pytest.mark.parametrize("schedule", CALLS)
def test_idle_ticks_run_no_layer_and_other_stages_neither_embedding_nor_head(schedule):
    calls = []

    def count(name, x):
        # With an operand: one without would be moved out of the loop over the layers.
        jax.debug.callback(lambda _: calls.append(name), x)
        return x

    def loss(layers):
        layer = (lambda w, x: count("layer", x * w), layers)
        if schedule == "pipeline":
            return (pipeline(layer, X, stage_microbatches=4) ** 2).mean()
        first = (lambda w, batch: count("first", batch * w), jnp.ones(()))
        last = (lambda w, x, batch: count("last", x * w).mean(), jnp.ones(()))
        return pipeline_loss(first, layer, last, X, stage_microbatches=4, schedule=schedule)[0].total

    with jax.set_mesh(sub_mesh(stage=2)):
        jax.block_until_ready(jax.jit(jax.grad(loss))(FOUR))
    jax.effects_barrier()
    assert collections.Counter(calls) == CALLS[schedule]


def test_idle_ticks_are_left_out_in_the_step_that_the_builder_makes():
    strategy = jaxpar.sharded(sub_mesh(stage=4), jaxpar.PIPELINE)
    text = compile_step("1f1b", 4, 32, strategy).as_text()
    # Forward and backward, whether the first and the last stage, and the input kept: none became a select.
    assert len(re.findall(r" conditional\(", text)) >= 5


def test_a_step_is_traced_and_compiled_once():
    strategy, traces = STRATEGIES["data_stage"](), []

    def loss_fn(model, batch, rng):
        traces.append(1)
        return LOSSES["1f1b"](model, batch, rng)

    state = strategy.init(make_init_fn(0.0), jax.random.key(0))
    step = jaxpar.make_train_step(loss_fn, strategy)
    for batch in make_batches(3):
        state, _ = step(state, strategy.shard_batch(batch))
    assert len(traces) == 1


class Statistics(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


def double(w, x):
    return x * w


X = jnp.ones((8, WIDTH))
FOUR, TABLE = jnp.ones(4), jnp.ones((VOCAB, WIDTH))
LAST = (lambda w, x, batch: (x * w).mean(), jnp.ones(()))
BAD = {
    "layers that don't divide": (
        lambda: pipeline((double, jnp.ones(6)), X, stage_microbatches=4),
        "6 layers do not divide by 4 stages; give a multiple of 4.",
    ),
    "too few microbatches": (
        lambda: pipeline((double, FOUR), X, stage_microbatches=2),
        "stage_microbatches is 2, but there are 4 stages, some of which would always idle; give 4 or more, better 16.",
    ),
    "rows that don't divide": (
        lambda: pipeline((double, FOUR), jnp.ones((10, 3)), stage_microbatches=4),
        "10 rows do not divide by 4 stage microbatches; pad to 12 a shard of the data, or give a divisor of 10, as "
        "stage_microbatches=2.",
    ),
    "no number of microbatches": (
        lambda: pipeline((double, FOUR), X, stage_microbatches=0),
        "stage_microbatches is 0; give a whole number, 1 or more.",
    ),
    "leaves of different stacks": (
        lambda: pipeline((double, [FOUR, jnp.ones(8)]), X, stage_microbatches=4),
        ["The blocks have leaves of shapes [(4,), (8,)]; a stack's leaves share a leading dim of layers.", "nnx.vmap"],
    ),
    "no layer": (
        lambda: pipeline((double, jnp.ones(0)), X, stage_microbatches=4),
        "The blocks have leaves of shapes [(0,)]: 0 layers; give 4 or more.",
    ),
    "a number in place of a stack": (
        lambda: pipeline((double, 2.0), X, stage_microbatches=4),
        [
            "The blocks have leaves of shapes [()]; a stack's leaves share a leading dim of layers.",
            "nnx.vmap(lambda rngs",
        ],
    ),
    "text among the parameters": (
        lambda: pipeline((double, [FOUR, "tanh"]), X, stage_microbatches=4),
        "params[1] is 'tanh', a str; give numbers, or arrays of them, and text outside of the pytree.",
    ),
    "text after x": (
        lambda: pipeline((double, FOUR), X, "tanh", stage_microbatches=4),
        "more[0] is 'tanh', a str; give numbers, or arrays of them",
    ),
    "text in the batch": (
        lambda: pipeline_loss(LAST, (double, FOUR), LAST, {"x": X, "name": "a"}, stage_microbatches=4),
        "batch['name'] is 'a', a str; give numbers, or arrays of them",
    ),
    "random keys that travel": (
        lambda: pipeline((double, FOUR), {"x": X, "key": jax.random.split(jax.random.key(0), 8)}, stage_microbatches=4),
        ["x holds random keys, which don't travel between stages", "jax.random.key_data(keys)"],
    ),
    "no stack": (
        lambda: pipeline((double, jnp.ones(())), X, stage_microbatches=4),
        [
            "The blocks have leaves of shapes [()]; a stack's leaves share a leading dim of layers.",
            "nnx.vmap(lambda rngs",
        ],
    ),
    "a layer that changes its input": (
        lambda: pipeline((lambda w, x: x.sum(-1) * w, FOUR), X, stage_microbatches=4),
        ["A layer turns x from ((2, 16), dtype('float32')) into ((2,), dtype('float32'))", "as it was"],
    ),
    "a layer that changes its own variables": (
        lambda: pipeline(nnx.split_rngs(splits=4)(nnx.vmap(Statistics))(nnx.Rngs(0)), X, stage_microbatches=4),
        ["'norm/mean' changes while a layer runs, as BatchNorm's statistics do", "nnx.LayerNorm"],
    ),
    "a function without parameters": (
        lambda: pipeline(double, X, stage_microbatches=4),
        ["A part of the model is a function; give an nnx module, or (fn, params).", "a leading dim of layers: nnx"],
    ),
    "arrays of different rows": (
        lambda: pipeline((double, FOUR), {"a": X, "b": X[:4]}, stage_microbatches=4),
        ["x has arrays of shapes [(8, 16), (4, 16)]", "the same number of rows in dim 0"],
    ),
    "a scalar that travels": (
        lambda: pipeline((double, FOUR), {"x": X, "loss": jnp.zeros(())}, stage_microbatches=4),
        "x has a leaf that is a scalar; give one value a row, or pass it after x.",
    ),
    "a mask with rows": (
        lambda: pipeline((lambda w, x, mask: x * w * mask, FOUR), X, jnp.ones((8, 1)), stage_microbatches=4),
        ["can't take a microbatch of 2 rows beside an argument of shape (8, 1)", "Put what has rows into x"],
    ),
    "one row": (
        lambda: pipeline((double, FOUR), X[:1], stage_microbatches=4),
        "1 rows do not divide by 4 stage microbatches; pad to 4",
    ),
    "a batch made of parameters": (
        lambda: jax.grad(
            lambda scale: (
                pipeline_loss(
                    (lambda w, x: x * w, jnp.ones(())), (double, FOUR), LAST, X * scale, stage_microbatches=4
                )[0].total
            )
        )(2.0),
        ["A leaf of the batch, of shape (8, 16), is computed from parameters", "jax.lax.stop_gradient"],
    ),
    "float16 in 1F1B": (
        lambda: pipeline_loss(
            (lambda w, x: x * w, jnp.ones((), "float16")), (double, FOUR), LAST, X, stage_microbatches=4
        ),
        ["The parameters are float16", "compute_dtype=jnp.bfloat16, or schedule='gpipe'"],
    ),
    "a bfloat16 value from outside": (
        lambda: jax.grad(lambda w: pipeline((lambda _, x: x * w, FOUR), X, stage_microbatches=4).sum())(
            jnp.ones(WIDTH, "bfloat16")
        ),
        ["A layer uses a bfloat16 value of shape (16,), to be differentiated, that it isn't given", "after x"],
    ),
    "a bfloat16 value from outside of the loss": (
        lambda: jax.grad(
            lambda w: (
                pipeline_loss(
                    (lambda table, batch: table[batch], TABLE),
                    (double, FOUR),
                    (lambda _, x, batch: (x * w).mean(), ()),
                    jnp.zeros(8, int),
                    stage_microbatches=4,
                    schedule="gpipe",
                )[0].total
            )
        )(jnp.ones(WIDTH, "bfloat16")),
        ["last uses a bfloat16 value of shape (16,), to be differentiated", "by (fn, params)"],
    ),
    "three values": (
        lambda: pipeline_loss(
            (lambda w, x: x * w, jnp.ones(())),
            (double, FOUR),
            (lambda w, x, batch: (x.mean(), {}, {}), jnp.ones(())),
            X,
            stage_microbatches=4,
        ),
        "last returned three values; give the loss, or (loss, metrics).",
    ),
    "an unknown schedule": (
        lambda: pipeline_loss(
            (lambda table, batch: table[batch], TABLE),
            (double, FOUR),
            LAST,
            jnp.zeros(8, int),
            stage_microbatches=4,
            schedule="1f1",
        ),
        "Schedule '1f1' is unknown (nearest: '1f1b'); the schedules are gpipe, 1f1b.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_is_named_before_any_compile(case):
    call, expected = BAD[case]
    with jax.set_mesh(sub_mesh(data=2, stage=4)), pytest.raises((PipelineError, ScheduleError)) as caught:
        jax.eval_shape(call)
    message = str(caught.value)
    for part in [expected] if isinstance(expected, str) else expected:
        assert part in message


# what a stage that isn't active computes


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("axes", [{"stage": 2}, {"data": 2, "stage": 2}])
def test_no_stage_adds_what_is_no_number_on_rows_that_are_not_its_own(schedule, axes):
    # The last layer's output is a square, but before it there are rows whose root has no slope.
    layers, x = -jnp.ones((2, 1)), jnp.full((4, 1), 10.0)

    def loss(first, layers, last):
        total, _ = pipeline_loss(
            (lambda p, batch: batch["x"] * p, first),
            (lambda w, x: x * w, layers),
            (lambda p, x, batch: jnp.sqrt(x * p).mean(), last),
            {"x": x},
            stage_microbatches=4,
            schedule=schedule,
        )
        return total.total / total.weight

    gradient = jax.grad(loss, (0, 1, 2))
    given = jnp.ones(1), layers, jnp.ones(1)
    expected = gradient(*given)
    with jax.set_mesh(sub_mesh(**axes)):
        found = jax.jit(gradient)(*given)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_layer_may_permute_over_a_batch_axis_that_is_manual():
    def layer(w, x):
        size = jax.lax.axis_size("data")
        return x * w + 0.5 * jax.lax.ppermute(x, "data", [(i, (i + 1) % size) for i in range(size)])

    class Layers(nnx.Module):
        def __init__(self):
            self.blocks = nnx.Dict(w=nnx.Param(jnp.arange(1.0, 5).reshape(4, 1) / 4))

    def loss_fn(model, batch, rng):
        return (pipeline((layer, model.blocks["w"][...]), batch["x"], stage_microbatches=2) ** 2).mean(), {}

    losses = []
    for axes, rules in (({"data": 2}, []), ({"data": 2, "stage": 2}, [jaxpar.PIPELINE])):
        strategy = jaxpar.sharded(sub_mesh(**axes), *rules)
        state = strategy.init(lambda rng: jaxpar.TrainState.create(Layers(), SGD), jax.random.key(0))
        step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=2)
        _, metrics = step(state, strategy.shard_batch({"x": np.arange(1.0, 17).reshape(16, 1)}))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
