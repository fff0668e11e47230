"""What every strategy promises beside the same numbers: bytes, compiles, donation, collectives, weights, randomness."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import ROWS, STRATEGIES, make_batches, make_task

import jaxpar
from jaxpar.state import named_leaves

DEVICES = 8
SGD = optax.sgd(0.5)
CLIPPED = optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(1.0))
SAME_EVERYWHERE = [kind for kind in STRATEGIES if kind != "pmap"]
every_strategy = pytest.mark.parametrize("kind", STRATEGIES)
# Of a test that reads what was compiled: all optimizations stay on.
compiled = pytest.mark.usefixtures("optimized")

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


@pytest.fixture(autouse=True)
def quick_compiles(request):
    """Leaves LLVM's optimizations out, which take half the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", "optimized" not in request.fixturenames)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def optimized():
    """Leaves them in, for a test that reads what was compiled."""


def start(kind, task, **build):
    """Returns the strategy, a state of its own, and the step."""
    strategy, state = _init_once(kind, task.init_fn)
    return strategy, strategy.place(state), jaxpar.make_train_step(task.loss_fn, strategy, **build)


@functools.cache
def _init_once(kind, init_fn, devices=DEVICES):
    strategy = STRATEGIES[kind](devices)
    return strategy, strategy.init(init_fn, jax.random.key(0))


def to_numpy(tree):
    keys_as_data = jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, tree
    )
    return {path: np.asarray(leaf) for path, leaf in named_leaves(keys_as_data)}


# ---- bytes


@every_strategy
def test_each_device_holds_its_share_of_parameters_and_moments(kind):
    # As init made it; most other tests see a copy that was placed.
    strategy, state = _init_once(kind, make_task("nnx_decoder").init_fn)
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


@compiled
def test_init_never_holds_a_leaf_whole(monkeypatch):
    programs = []
    jit = jax.jit

    def recording(fn, **options):
        jitted = jit(fn, **options)

        def run(*args):
            programs.append(jitted.lower(*args).compile())
            return jitted(*args)

        return run

    def init_fn(rng):
        return jaxpar.TrainState.create(nnx.Linear(512, 512, rngs=nnx.Rngs(rng)), optax.adam(1e-3))

    strategy = STRATEGIES["fsdp"](DEVICES)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", recording)
        strategy.init(init_fn, jax.random.key(0))
    (program,) = programs
    memory = program.memory_analysis()
    kernel = 512 * 512 * 4
    assert memory.output_size_in_bytes < 3 * kernel / 8 + 20_000
    assert memory.temp_size_in_bytes < kernel


# ---- compiles, donation, shardings


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
        assert before.is_deleted(), path
        assert before.sharding.is_equivalent_to(after.sharding, after.ndim), path


@compiled
@pytest.mark.parametrize("kind", ["pmap", "fsdp_model", "zero1"])
def test_the_compiled_step_aliases_all_of_its_state(kind):
    strategy, state, step = start(kind, make_task("linen_mlp"))
    memory = step.lower(state, make_batches("mlp", 1)[0]).compile().memory_analysis()
    keys = sum(jax.random.key_data(leaf).nbytes for path, leaf in named_leaves(state) if path == "rng")
    held = sum(row.bytes_per_device for row in strategy.layout(state).rows if row.path != "rng")
    assert memory.alias_size_in_bytes >= held + keys


@every_strategy
def test_a_changed_batch_shape_compiles_again_and_says_so(kind):
    strategy, state, step = start(kind, make_task("nnx_mlp"))
    state, _ = step(state, strategy.shard_batch(make_batches("mlp", 1)[0]))
    shapes = r"\(8, 4, 8\) float32 to \(8, 8, 8\) float32" if kind == "pmap" else r"\(32, 8\) float32 to \(64, 8\)"
    with pytest.warns(jaxpar.RecompileWarning, match=rf"\['x'\] changed from {shapes}.*in [0-9.]+ s"):
        step(state, strategy.shard_batch(make_batches("mlp", 1, rows=64)[0]))


# ---- collectives

_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def find_collectives(text):
    """Returns (computation, kind, bytes, arrays) for each collective of a compiled program."""
    found, computation = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = "main" if line.startswith("ENTRY") else line.split(" ")[0]
        match = _COLLECTIVE.search(line)
        if match:
            arrays = [
                (math.prod(map(int, filter(None, dims.split(",")))), int(bits))
                for _, bits, dims in _ARRAY.findall(match[1])
            ]
            found.append((computation, match[2], sum(size * bits // 8 for size, bits in arrays), len(arrays)))
    return found


def count_collectives(text):
    """Returns for each kind of collective how many there are, and their bytes."""
    kinds = collections.defaultdict(lambda: [0, 0])
    for _, kind, size, _ in find_collectives(text):
        kinds[kind][0] += 1
        kinds[kind][1] += size
    return dict(kinds)


class Feedforward(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(16, name="down")(linen.gelu(linen.Dense(64, name="up")(x)))


_FEEDFORWARD_SPECS = {
    "data": {},
    "fsdp": {
        "up/kernel": P(None, "fsdp"),
        "down/kernel": P("fsdp", None),
    },
    "data_model": {
        "up/kernel": P(None, "model"),
        "up/bias": P("model"),
        "down/kernel": P("model", None),
    },
}


def compile_by_hand(kind, mesh, module, tx, batch):
    """Returns the compiled text of the step as one writes it without jaxpar."""

    def step(params, opt_state, batch):
        def loss_fn(params):
            return ((module.apply({"params": params}, batch["x"]) - batch["y"]) ** 2).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        norm = optax.tree.norm(gradients)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, "grad_norm": norm}

    params = jax.eval_shape(lambda: module.init(jax.random.key(0), batch["x"]))["params"]
    opt_state = jax.eval_shape(tx.init, params)

    def shard(path, leaf):
        name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, _FEEDFORWARD_SPECS[kind].get(name, P()))

    shardings = [jax.tree_util.tree_map_with_path(shard, tree) for tree in (params, opt_state)]
    rows = NamedSharding(mesh, P("fsdp" if kind == "fsdp" else "data"))
    jitted = jax.jit(step, in_shardings=(*shardings, rows), out_shardings=(*shardings, None), donate_argnums=(0, 1))
    return jitted.lower(params, opt_state, batch).compile().as_text()


@compiled
@pytest.mark.parametrize("kind", _FEEDFORWARD_SPECS)
def test_the_compiled_step_has_the_collectives_of_hand_written_jax(kind):
    strategy, module, tx = STRATEGIES[kind](DEVICES), Feedforward(), optax.adam(1e-3)
    # Many more rows than a weight has: else XLA moves activations in place of FSDP's weights.
    batch = {"x": np.zeros((4096, 16), "float32"), "y": np.zeros((4096, 16), "float32")}

    def init_fn(rng):
        return jaxpar.TrainState.create(module.init(rng, batch["x"]), tx)

    def loss_fn(variables, batch, rng):
        return ((module.apply(variables, batch["x"]) - batch["y"]) ** 2).mean()

    step = jaxpar.make_train_step(loss_fn, strategy)
    ours = count_collectives(step.lower(strategy.abstract_state(init_fn), batch).compile().as_text())
    by_hand = count_collectives(compile_by_hand(kind, strategy.mesh, module, tx, batch))
    assert by_hand
    assert ours == by_hand


@compiled
@pytest.mark.parametrize("kind", ["pmap", "data"])
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_data_parallel_gradients_are_reduced_once_a_step_in_one_collective(kind, num_microbatches):
    _, state, step = start(kind, make_task("linen_mlp"), num_microbatches=num_microbatches)
    found = find_collectives(step.lower(state, make_batches("mlp", 1)[0]).compile().as_text())
    gradients = len(jax.tree.leaves(state.params))
    # The loss and the one metric travel with the gradients.
    assert [(where, what, arrays) for where, what, _, arrays in found] == [("main", "all-reduce", gradients + 2)]


@compiled
def test_microbatches_reduce_over_data_outside_their_loop_beside_a_model_axis():
    task = make_task("linen_mlp")
    _, state, step = start("data_model", task, num_microbatches=4)
    text = step.lower(state, task.batches[0]).compile().as_text()
    found = find_collectives(text)
    inside = [what for where, what, _, _ in found if where != "main"]
    gradients = len(jax.tree.leaves(state.params))
    assert any(where == "main" and arrays >= gradients for where, what, _, arrays in found if what == "all-reduce")
    # Megatron's own all-reduces stay in the loop; neither batch nor weights are gathered there.
    assert set(inside) == {"all-reduce"}


@compiled
def test_microbatches_gather_split_weights_and_reduce_their_gradients_in_the_loop():
    _, state, step = start("fsdp", make_task("linen_mlp"), num_microbatches=4)
    lowered = step.lower(state, make_batches("mlp", 1, rows=4096)[0])
    # XLA on CPU drops the barrier that keeps them there, and would move the gathers out by this pass.
    text = lowered.compile(compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}).as_text()
    found = find_collectives(text)
    assert [where == "main" for where, what, _, _ in found if what == "all-gather"] == [False, False]
    gradients = len(jax.tree.leaves(state.params))
    assert [where == "main" for where, what, _, arrays in found if arrays >= gradients] == [False]


@compiled
def test_the_sum_of_gradients_over_microbatches_stays_split():
    _, state, step = start("fsdp", make_task("linen_mlp"), num_microbatches=4)
    lowered = step.lower(state, make_batches("mlp", 1, rows=4096)[0])
    # The zeros, each microbatch's gradient and the sum: asked for, whether or not a compiler would do so by itself.
    for shape in ("8x32", "32x8"):
        assert len(re.findall(rf'sdy.sharding_constraint .*"fsdp".* : tensor<{shape}xf32>', lowered.as_text())) == 3
    text = lowered.compile(compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}).as_text()
    (loop,) = [line for line in text.splitlines() if " while(" in line]
    carried = re.findall(r"f32\[[\d,]+\]", loop.split(" while(")[0])
    assert {"f32[8,4]", "f32[4,8]"} <= set(carried)
    assert not {"f32[8,32]", "f32[32,8]"} & set(carried)


@compiled
def test_frozen_leaves_get_no_gradient_moment_or_reduction():
    task = make_task("linen_mlp")
    strategy = STRATEGIES["data"](DEVICES)

    def init_fn(rng):
        state = task.init_fn(rng)
        return jaxpar.TrainState.create(state.model, optax.adam(1e-2), trainable=lambda path: "/up/" not in path)

    def reduced_bytes(state):
        text = jaxpar.make_train_step(task.loss_fn, strategy).lower(state, task.batches[0]).compile().as_text()
        return sum(size for _, _, size, _ in find_collectives(text))

    state = strategy.init(init_fn, jax.random.key(0))
    frozen = {path: np.asarray(leaf) for path, leaf in named_leaves(state.params) if "/up/" in path}
    assert len(frozen) == 2
    assert not [path for path, _ in named_leaves(state.opt_state) if "/up/" in path]
    saved = reduced_bytes(strategy.init(task.init_fn, jax.random.key(0))) - reduced_bytes(state)
    assert saved == sum(leaf.nbytes for leaf in frozen.values())
    state, _ = jaxpar.make_train_step(task.loss_fn, strategy)(state, strategy.shard_batch(task.batches[0]))
    after = dict(named_leaves(state.params))
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)


def test_bf16_compute_gathers_split_parameters_in_bf16():
    _, state, step = start("fsdp", make_task("linen_mlp"), compute_dtype=jnp.bfloat16)
    text = step.lower(state, make_batches("mlp", 1)[0]).as_text()
    # Each split parameter is cast while it is split; the compiled program on CPU gathers in float32 all the same.
    narrow = re.findall(r"sdy.sharding_constraint .*\"fsdp\".*: tensor<([\dx]+)xbf16>", text)
    assert {"8x32", "32x8"} <= set(narrow)


# ---- weights, clipping, scaling


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
    strategy, state = _init_once("data", init_fn, 1)
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


# ---- randomness


@pytest.mark.parametrize("kind", SAME_EVERYWHERE)
@pytest.mark.parametrize("name", ["nnx_decoder", "linen_conv"])
def test_the_same_seed_gives_the_same_state_on_every_mesh(kind, name):
    task = make_task(name)
    here, there = to_numpy(_init_once(kind, task.init_fn)[1]), to_numpy(_init_once("data", task.init_fn, 1)[1])
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


# ---- what is refused


@every_strategy
def test_a_metric_may_not_take_the_name_of_the_steps_own(kind):
    task = make_task("nnx_mlp")

    def loss_fn(model, batch, rng):
        loss, _ = task.loss_fn(model, batch, rng)
        return loss, {"grad_norm": loss}

    strategy, state, step = start(kind, task._replace(loss_fn=loss_fn))
    with pytest.raises(jaxpar.LossError, match=r"\['grad_norm'\].*rename"):
        step(state, strategy.shard_batch(task.batches[0]))


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


# ---- BatchNorm and evaluation


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
    strategy, state = _init_once(kind, init_normed, devices)
    step = jaxpar.make_train_step(
        lambda model, batch, rng: (model(batch["x"]) ** 2)[:, 0].mean(), strategy, num_microbatches=num_microbatches
    )
    # Rows that grow, so that each shard's own statistics are far from the whole batch's.
    x = make_batches("mlp", 1)[0]["x"] * np.arange(ROWS, dtype="float32")[:, None]
    state, _ = step(strategy.place(state), strategy.shard_batch({"x": x}))
    return to_numpy(state.model_state["batch_stats"])


@pytest.mark.parametrize("num_microbatches", [1, 4])
@every_strategy
def test_batch_statistics_are_those_of_the_global_batch_or_microbatch(kind, num_microbatches):
    found = batch_statistics(kind, DEVICES, num_microbatches)
    expected = batch_statistics("data", 1, num_microbatches)
    assert set(expected) == {"norm/mean", "norm/var"}
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


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
