"""Where the state of every optax optimizer lies: moments as their parameters, in the layout and after a real step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P
from optax import contrib

import jaxpar
from jaxpar import FSDP, MEGATRON, WHOLE, ZERO1
from jaxpar.layout import format_bytes, layout_state
from jaxpar.state import named_leaves

W, H = 128, 256  # both at least 128, from where Adafactor factors its second moment
RATE = 1e-3


def by_name(name):
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: name in jax.tree_util.keystr(path), params)


def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" if "kernel" in jax.tree_util.keystr(path) else "rest", params
    )


# Every alias in optax, then optax.contrib's, then what wraps others.
OPTIMIZERS = {
    "adabelief": lambda: optax.adabelief(RATE),
    "adadelta": lambda: optax.adadelta(RATE),
    "adafactor": lambda: optax.adafactor(RATE),
    "adafactor with momentum": lambda: optax.adafactor(RATE, momentum=0.9),
    "adafactor unfactored": lambda: optax.adafactor(RATE, factored=False),
    "adagrad": lambda: optax.adagrad(RATE),
    "adam": lambda: optax.adam(RATE),
    "adam in bfloat16": lambda: optax.adam(RATE, mu_dtype=jnp.bfloat16),
    "adamax": lambda: optax.adamax(RATE),
    "adamaxw": lambda: optax.adamaxw(RATE),
    "adamw": lambda: optax.adamw(RATE),
    "adan": lambda: optax.adan(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "fromage": lambda: optax.fromage(RATE),
    "lamb": lambda: optax.lamb(RATE),
    "lars": lambda: optax.lars(RATE, momentum=0.9),
    "lbfgs": lambda: optax.lbfgs(RATE, linesearch=None),
    "lion": lambda: optax.lion(RATE),
    "nadam": lambda: optax.nadam(RATE),
    "nadamw": lambda: optax.nadamw(RATE),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=jax.random.key(0)),
    "novograd": lambda: optax.novograd(RATE),
    "optimistic_adam": lambda: optax.optimistic_adam_v2(RATE),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(RATE),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "radam": lambda: optax.radam(RATE),
    "rmsprop": lambda: optax.rmsprop(RATE, momentum=0.9, centered=True),
    "rprop": lambda: optax.rprop(RATE),
    "sgd": lambda: optax.sgd(RATE),
    "sgd with momentum": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(RATE),
    "signum": lambda: optax.signum(RATE),
    "sm3": lambda: optax.sm3(RATE),
    "yogi": lambda: optax.yogi(RATE),
    "acprop": lambda: contrib.acprop(RATE),
    "ademamix": lambda: contrib.ademamix(RATE),
    "adopt": lambda: contrib.adopt(RATE),
    "cocob": lambda: contrib.cocob(RATE),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "dog": lambda: contrib.dog(RATE),
    "dowg": lambda: contrib.dowg(RATE),
    "galore": lambda: contrib.galore(RATE, rank=8),
    "madgrad": lambda: contrib.madgrad(RATE),
    "mechanize": lambda: contrib.mechanize(optax.adam(RATE)),
    "momo": lambda: contrib.momo(RATE),
    "momo_adam": lambda: contrib.momo_adam(RATE),
    "muon": lambda: contrib.muon(RATE),
    "prodigy": lambda: contrib.prodigy(),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(RATE),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(RATE),
    "sam": lambda: contrib.sam(optax.adam(RATE), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(RATE),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(RATE), contrib.reduce_on_plateau()),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
    "chain with clipping": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
    "chain with adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.adamw(RATE)),
    "a schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, RATE, 10, 100)),
    "ema": lambda: optax.chain(optax.adam(RATE), optax.ema(0.99)),
    "an average of parameters": lambda: optax.chain(optax.adam(RATE), optax.ema(0.99, accumulator_dtype=jnp.float32)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(),
    "multi_transform": lambda: optax.multi_transform({"kernel": optax.adam(RATE), "rest": optax.lion(RATE)}, labels),
    "partition": lambda: optax.partition({"kernel": contrib.muon(RATE), "rest": optax.adam(RATE)}, labels),
    "partition with frozen": lambda: optax.partition({"kernel": optax.adam(RATE), "rest": optax.set_to_zero()}, labels),
    "masked": lambda: optax.masked(optax.adam(RATE), by_name("kernel")),
    "weight decay by a mask": lambda: optax.adamw(RATE, mask=by_name("kernel")),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(RATE), 3),
    "skip_not_finite": lambda: optax.chain(optax.clip(1.0), optax.apply_if_finite(optax.sgd(RATE), 3)),
    "flatten": lambda: optax.flatten(optax.adam(RATE)),
    "add_noise": lambda: optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0)), optax.adam(RATE)),
    "wrapped thrice": lambda: optax.MultiSteps(
        optax.apply_if_finite(optax.masked(optax.inject_hyperparams(optax.adam)(RATE), by_name("kernel")), 2), 2
    ).gradient_transformation(),
}
# One of each family takes its step in every run; the others compile for another half minute.
FAMILIES = {
    "adafactor",
    "adamw",
    "chain with clipping",
    "ema",
    "inject_hyperparams",
    "lamb",
    "lbfgs",
    "lion",
    "MultiSteps",
    "masked",
    "multi_transform",
    "muon",
    "schedule_free_adamw",
    "sm3",
    "wrapped thrice",
}
STEPPED = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
# What is no moment of a parameter, and may stay whole: flat vectors of odd length, projections of low rank.
NOT_A_MOMENT = {"flatten", "galore"}


class MLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm(name="norm")(x)
        return linen.Dense(W, name="down")(linen.relu(linen.Dense(H, name="up")(x)))


def init_with(make_tx):
    return lambda rng: jaxpar.TrainState.create(MLP().init(rng, jnp.ones((1, W))), make_tx())


def loss_fn(variables, batch, rng):
    return ((MLP().apply(variables, batch["x"]) - 1) ** 2).mean(), {}


def hybrid():
    return jaxpar.sharded(jaxpar.make_mesh(data=2, fsdp=2, model=2), MEGATRON, FSDP, ZERO1)


PARAM_SPECS = {
    "up/kernel": P("fsdp", "model"),
    "up/bias": P("model"),
    "down/kernel": P("model", "fsdp"),
    "down/bias": P("fsdp"),
    "norm/scale": P("fsdp"),
}


def parameter_of(path):
    return next((name for name in PARAM_SPECS if path.endswith("/" + name)), None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_split_as_their_parameters(name):
    strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=2, model=4), MEGATRON, FSDP)
    rows = {row.path: row for row in strategy.layout(init_with(OPTIMIZERS[name])).rows}
    for param, spec in PARAM_SPECS.items():
        assert rows[f"params/{param}"].spec == spec
    moments = [row for path, row in rows.items() if path.startswith("opt_state/")]
    for row in moments:
        param = parameter_of(row.path)
        if param and row.shape == rows[f"params/{param}"].shape:
            assert row.spec == PARAM_SPECS[param], row.path
        if math.prod(row.shape) >= W * H and name not in NOT_A_MOMENT:
            assert row.bytes_per_device * 8 == math.prod(row.shape) * row.dtype.itemsize, row.path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero1_adds_its_axis_to_the_moments(name):
    rows = {row.path: row for row in hybrid().layout(init_with(OPTIMIZERS[name])).rows}
    for row in rows.values():
        param = parameter_of(row.path)
        if row.path.startswith("opt_state/") and param and row.shape == rows[f"params/{param}"].shape:
            kept = P(*(None if entry == "data" else entry for entry in row.spec))
            # Every dim of these parameters is taken already, so there is nothing left for a third axis.
            assert kept == PARAM_SPECS[param], row.path


@pytest.mark.parametrize("name", STEPPED)
def test_a_real_step_leaves_every_leaf_where_the_layout_says(name):
    strategy, init_fn = hybrid(), init_with(OPTIMIZERS[name])
    state = strategy.place(init_fn(jax.random.key(0)))
    layout = strategy.layout(state)
    # Where the leaves lie is what is tested, not how fast: 70 programs compile in a third of the time.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    step = jaxpar.make_train_step(loss_fn, strategy, compiler_options=options)
    state, metrics = step(state, strategy.shard_batch({"x": np.ones((8, W), "float32")}))
    for (path, leaf), sharding, row in zip(named_leaves(state), layout.shardings, layout.rows, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
        assert leaf.addressable_shards[0].data.nbytes == row.bytes_per_device or path == "rng", path
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(np.asarray(leaf, "float32")).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (128, 128), (3, 128, 256), (256, 3, 128)])
def test_adafactors_means_lie_as_the_dims_they_keep(shape):
    """A leaf's spec is told from its own values: each of its shards holds the means that a device computes alone."""
    tx = optax.adafactor(RATE)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = {"params": params, "opt_state": jax.eval_shape(tx.init, params)}
    first, second = (int(dim) for dim in np.argsort(shape)[::-1][:2])
    entries = [None] * len(shape)
    entries[first], entries[second] = "fsdp", "model"
    layout = layout_state(state, [[("w$", P(*entries))]], jaxpar.make_mesh(fsdp=2, model=4))
    found = {row.path.split("/")[-2]: row.spec for row in layout.rows if "/v_" in row.path}
    assert found["v_row"] == P(*(entry for dim, entry in enumerate(entries) if dim != first))
    assert found["v_col"] == P(*(entry for dim, entry in enumerate(entries) if dim != second))


@pytest.mark.parametrize("name", ["adafactor", "lbfgs", "adamw", "sgd with momentum", "MultiSteps"])
def test_scalar_parameters_have_optimizer_state_too(name):
    params = {"params": {"temperature": jnp.ones(()), "up": {"kernel": jnp.ones((W, H))}}}
    strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=2, model=4), MEGATRON, FSDP)
    layout = strategy.layout(lambda rng: jaxpar.TrainState.create(params, OPTIMIZERS[name]()))
    specs = {row.spec for row in layout.rows if row.path.endswith("temperature")}
    assert specs <= {P(), P(None)}


def test_optimizer_state_of_frozen_parameters_is_not_there():
    def init_fn(rng):
        return jaxpar.TrainState.create(
            MLP().init(rng, jnp.ones((1, W))), optax.adam(RATE), trainable=lambda path: "kernel" in path
        )

    paths = [row.path for row in hybrid().layout(init_fn).rows]
    assert "params/up/bias" in paths
    assert {path.rsplit("/", 2)[-2] for path in paths if "/mu/" in path} == {"up", "down"}
    assert not [path for path in paths if path.startswith("opt_state/") and path.endswith(("bias", "scale"))]


# what a layout says


def small_layout():
    return layout_state(
        {"params": {"b": jax.ShapeDtypeStruct((6,), jnp.bfloat16), "w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}},
        [[("w$", P(None, "model"))], [(".*", lambda leaf, mesh, so_far: "left whole on purpose")]],
        jaxpar.make_mesh(data=2, model=4),
    )


def test_a_layout_prints_path_shape_spec_rule_and_bytes():
    lines = str(small_layout()).splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "spec", "rule", "bytes/device"]
    assert lines[1].split("  ")[0] == "params/b"
    assert lines[1].endswith("12 B  left whole on purpose")
    assert "P(None, 'model')" in lines[2]
    assert lines[2].endswith("32 B  left whole on purpose")
    assert lines[3] == "total 44 B a device, 140 B whole; mesh {'data': 2, 'model': 4}"


def test_a_layout_counts_a_random_keys_words_whole_and_a_device():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    layout = layout_state({"keys": keys}, [], jaxpar.make_mesh(data=8))
    assert str(layout).endswith("total 24 B a device, 24 B whole; mesh {'data': 8}")


def test_a_layout_counts_bytes_and_names_what_is_whole():
    layout = small_layout()
    assert layout.bytes_per_device == 12 + 32
    # The larger one first, though the other list has split it.
    assert [row.path for row in layout.left_whole] == ["params/w", "params/b"]
    assert {row.note for row in layout.left_whole} == {"left whole on purpose"}
    assert [sharding.spec for sharding in layout.shardings] == [P(None), P(None, "model")]


def test_a_layout_is_known_before_any_array_exists():
    before = len(jax.live_arrays())
    layout = hybrid().layout(init_with(OPTIMIZERS["adamw"]))
    assert len(jax.live_arrays()) == before
    assert layout.rows


def test_a_state_and_its_init_fn_have_one_layout():
    strategy, init_fn = hybrid(), init_with(OPTIMIZERS["adamw"])
    of_fn, of_state = strategy.layout(init_fn), strategy.layout(strategy.init(init_fn, jax.random.key(0)))
    assert [row[:6] for row in of_fn.rows] == [row[:6] for row in of_state.rows]


def test_canonical_paths_are_alike_for_nnx_and_linen():
    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(W, rngs=rngs)
            self.up = nnx.Linear(W, H, rngs=rngs)
            self.down = nnx.Linear(H, W, rngs=rngs)

    strategy = hybrid()
    from_linen = strategy.layout(init_with(OPTIMIZERS["adamw"]))
    from_nnx = strategy.layout(lambda rng: jaxpar.TrainState.create(Nnx(nnx.Rngs(rng)), optax.adamw(RATE)))
    assert [(row.path, row.shape, row.spec) for row in from_nnx.rows] == [
        (row.path, row.shape, row.spec) for row in from_linen.rows
    ]


def test_keys_and_scalars_are_never_split():
    state = {"rng": jax.random.key(0), "keys": jax.random.split(jax.random.key(0), 8), "step": jnp.zeros(())}
    layout = layout_state(state, [[("nothing", P("data"))]], jaxpar.make_mesh(data=8))
    assert {row.path: row.spec for row in layout.rows} == {"keys": P(None), "rng": P(), "step": P()}


def test_an_axis_of_size_one_need_not_split_anything():
    tree = {"params": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    assert layout_state(tree, [[(".*", WHOLE)]], jaxpar.make_mesh(data=8, fsdp=1, model=1)).bytes_per_device == 32


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (5 * 2**40, "5.0 TiB")]
)
def test_bytes_are_written_in_powers_of_1024(count, text):
    assert format_bytes(count) == text
