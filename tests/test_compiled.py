"""What the compiled programs hold: memory, donated buffers, and the collectives of hand-written JAX, no more."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_text import count_collectives, find_collectives
from flax import linen, nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import DEVICES, STRATEGIES, make_batches, make_task, start, sub_mesh

import jaxpar
from jaxpar.state import named_leaves
from jaxpar.train_command import loss_fn
from jaxpar.transformer import Sizes, Transformer


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


@pytest.mark.parametrize("kind", ["pmap", "fsdp_model", "zero1"])
def test_the_compiled_step_aliases_all_of_its_state(kind):
    strategy, state, step = start(kind, make_task("linen_mlp"))
    memory = step.lower(state, make_batches("mlp", 1)[0]).compile().memory_analysis()
    keys = sum(jax.random.key_data(leaf).nbytes for path, leaf in named_leaves(state) if path == "rng")
    held = sum(row.bytes_per_device for row in strategy.layout(state).rows if row.path != "rng")
    assert memory.alias_size_in_bytes >= held + keys


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


@pytest.mark.parametrize("kind", ["pmap", "data"])
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_data_parallel_gradients_are_reduced_once_a_step_in_one_collective(kind, num_microbatches):
    _, state, step = start(kind, make_task("linen_mlp"), num_microbatches=num_microbatches)
    found = find_collectives(step.lower(state, make_batches("mlp", 1)[0]).compile().as_text())
    gradients = len(jax.tree.leaves(state.params))
    # The loss and the one metric travel with the gradients.
    assert [(one.computation, one.kind, len(one.sizes)) for one in found] == [("main", "all-reduce", gradients + 2)]


def test_microbatches_reduce_over_data_outside_their_loop_beside_a_model_axis():
    task = make_task("linen_mlp")
    _, state, step = start("data_model", task, num_microbatches=4)
    text = step.lower(state, task.batches[0]).compile().as_text()
    found = find_collectives(text)
    inside = [one.kind for one in found if one.computation != "main"]
    gradients = len(jax.tree.leaves(state.params))
    assert any(len(one.sizes) >= gradients for one in found if (one.computation, one.kind) == ("main", "all-reduce"))
    # Megatron's own all-reduces stay in the loop; neither batch nor weights are gathered there.
    assert set(inside) == {"all-reduce"}


@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_microbatches_gather_split_weights_and_reduce_their_gradients_in_the_loop(axis):
    task, strategy = make_task("linen_mlp"), jaxpar.sharded(sub_mesh(**{axis: DEVICES}), jaxpar.rules.fsdp(axis=axis))
    state = strategy.abstract_state(task.init_fn)
    step = jaxpar.make_train_step(task.loss_fn, strategy, num_microbatches=4)
    lowered = step.lower(state, make_batches("mlp", 1, rows=4096)[0])
    # XLA on CPU drops the barrier that keeps them there, and would move the gathers out by this pass.
    text = lowered.compile(compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}).as_text()
    found = find_collectives(text)
    assert [one.computation == "main" for one in found if one.kind == "all-gather"] == [False, False]
    gradients = len(jax.tree.leaves(state.params))
    assert [one.computation == "main" for one in found if len(one.sizes) >= gradients] == [False]


def test_the_sum_of_gradients_over_microbatches_stays_split():
    _, state, step = start("fsdp", make_task("linen_mlp"), num_microbatches=4)
    lowered = step.lower(state, make_batches("mlp", 1, rows=4096)[0])
    # The zeros, each microbatch's gradient and the sum: asked for, whether or not a compiler would do so by itself.
    for shape in ("8x32", "32x8"):
        assert len(re.findall(rf'sdy.sharding_constraint .*"fsdp".* : tensor<{shape}xf32>', lowered.as_text())) == 3
    text = lowered.compile(compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}).as_text()
    # Smaller loops are XLA's own.
    carries = [
        re.findall(r"f32\[[\d,]+\]", line.split(" while(")[0]) for line in text.splitlines() if " while(" in line
    ]
    carried = max(carries, key=len)
    assert {"f32[8,4]", "f32[4,8]"} <= set(carried)
    assert not {"f32[8,32]", "f32[32,8]"} & set(carried)


def test_frozen_leaves_get_no_gradient_moment_or_reduction():
    task = make_task("linen_mlp")
    strategy = STRATEGIES["data"](DEVICES)

    def init_fn(rng):
        state = task.init_fn(rng)
        return jaxpar.TrainState.create(state.model, optax.adam(1e-2), trainable=lambda path: "/up/" not in path)

    def reduced_bytes(state):
        text = jaxpar.make_train_step(task.loss_fn, strategy).lower(state, task.batches[0]).compile().as_text()
        return sum(one.bytes for one in find_collectives(text))

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


def test_bf16_tables_may_be_indexed_in_microbatches_on_a_manual_axis():
    strategy = jaxpar.sharded(sub_mesh(data=4, fsdp=2), jaxpar.FSDP)
    init_fn = lambda rng: jaxpar.TrainState.create({"params": {"embed": jnp.ones((256, 128))}}, optax.sgd(0.1))
    loss_fn = lambda model, batch, rng: ((model["params"]["embed"][batch["x"]] ** 2).mean(), {})
    state = strategy.init(init_fn, jax.random.key(0))
    step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=2, compute_dtype=jnp.bfloat16)
    _, metrics = step(state, strategy.shard_batch({"x": np.arange(16) % 256}))
    assert float(metrics["loss"]) == 1


@pytest.mark.parametrize("model", ["nnx_scanned", "linen_scanned"])
def test_a_models_own_scan_gets_its_weights_gathered_and_never_the_rows_of_all_devices(model):
    _, state, step = start("fsdp", make_task(model))
    found = find_collectives(step.lower(state, make_batches("scanned", 1, rows=80)[0]).compile().as_text())
    assert [one for one in found if any("[80," in shape for shape in one.shapes) and one.computation != "main"] == []


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 4, "model": 2}, {"fsdp": 4, "context": 2}, {"fsdp": 4, "stage": 2}]
)
def test_stacked_layers_get_their_weights_gathered_and_never_the_rows_of_all_devices(sizes, microbatches):
    # Numbers of rows and bytes that no weight's dims have.
    rows, num_bytes, parts = 80, 68, {"stage_microbatches": sizes.get("stage", 1)}
    if "context" in sizes:
        parts["attend"] = functools.partial(jaxpar.ring_attention, is_causal=True)
    rules = {"stage": jaxpar.PIPELINE, "model": jaxpar.MEGATRON, "fsdp": jaxpar.FSDP}
    strategy = jaxpar.sharded(sub_mesh(**sizes), *(rules[axis] for axis in rules if axis in sizes))

    def init_fn(rng):
        return jaxpar.TrainState.create(Transformer(Sizes(64, 2, 4, 4, 192), rngs=nnx.Rngs(rng), **parts), optax.sgd(1))

    batch = {key: jax.ShapeDtypeStruct((rows, num_bytes), jnp.uint8) for key in "xy"}
    step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=microbatches)
    found = find_collectives(step.lower(strategy.abstract_state(init_fn), batch).compile().as_text())
    inside = [one for one in found if one.computation != "main"]
    whole = f"[{rows // microbatches // sizes.get('stage', 1)},"
    assert [one for one in inside if any(whole in shape for shape in one.shapes)] == []
    assert any(one.kind == "all-gather" for one in inside)
