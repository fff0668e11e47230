"""The assertion agrees where the step is right, and fails for each way to be wrong, naming step and leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.dynamic_scale import DynamicScale

import jaxpar
from jaxpar import loss as loss_module
from jaxpar import testing, train
from jaxpar.step import Step

ROWS, FEATURES, CLASSES = 32, 8, 16


class Net(nnx.Module):
    """Dropout, and statistics of the rows that it sees, which differ from shard to shard."""

    def __init__(self, dropout, rngs):
        self.up = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
        self.norm = nnx.BatchNorm(CLASSES, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.norm(self.up(x))))


class Frozen(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.down = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def nnx_task(make_model, loss_fn, tx=None, **create):
    tx = optax.adamw(1e-2) if tx is None else tx
    return (lambda rng: jaxpar.TrainState.create(make_model(nnx.Rngs(rng)), tx, **create)), loss_fn


def linear(rngs):
    return nnx.Linear(FEATURES, CLASSES, rngs=rngs)


def squares(model, batch):
    return (model(batch["x"]) - batch["y"][:, None]) ** 2


def mean_loss(model, batch, rng):
    return squares(model, batch).mean(), {"largest": squares(model, batch).mean()}


def vector_loss(model, batch, rng):
    rows = squares(model, batch).mean(1)
    return rows, {"first": {"half": rows / 2}}


def weighted_loss(model, batch, rng):
    rows = squares(model, batch).mean(1)
    mask = batch["mask"]
    return jaxpar.Weighted((rows * mask).sum(), mask.sum()), {"rows": jaxpar.Weighted(rows * mask, mask)}


def noisy_loss(model, batch, rng):
    noise = jax.random.normal(rng, batch["x"].shape, batch["x"].dtype)
    return squares(model, batch | {"x": batch["x"] + noise}).mean()


def padded_loss(model, batch, rng):
    return noisy_loss(model, batch, rng), {"shared": (model(batch["x"]) * batch["scale"]).mean()}


def linen_task():
    module = linen.BatchNorm(use_running_average=False, momentum=0.5, axis_name="data")

    def init_fn(rng):
        return jaxpar.TrainState.create(module.init(rng, jnp.ones((4, FEATURES))), optax.sgd(0.1))

    def loss_fn(variables, batch, rng):
        out, updates = module.apply(variables, batch["x"], mutable=["batch_stats"])
        return ((out - batch["y"][:, None]) ** 2).mean(), {}, updates

    return init_fn, loss_fn


TASKS = {
    "mean": nnx_task(linear, mean_loss),
    "vector": nnx_task(linear, vector_loss),
    "weighted": nnx_task(linear, weighted_loss, optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))),
    "noisy": nnx_task(linear, noisy_loss),
    "padded": nnx_task(linear, padded_loss),
    "padded_vector": nnx_task(linear, vector_loss),
    "net": nnx_task(lambda rngs: Net(0.3, rngs), mean_loss, optax.sgd(0.1)),
    "statistics": nnx_task(lambda rngs: Net(0.0, rngs), mean_loss, optax.sgd(0.1)),
    "statistics_adam": nnx_task(lambda rngs: Net(0.0, rngs), mean_loss),
    "frozen": nnx_task(Frozen, mean_loss, trainable=lambda path: "/up/" not in path),
    "linen": linen_task(),
}


def make_batches(name, count=3):
    rng = np.random.default_rng(0)
    batches = []
    for number in range(count):
        mask = (rng.random(ROWS) < 0.4).astype("float32")
        # Some shards have nothing that counts, and the second batch has nothing at all.
        mask[: ROWS // 4] = 0
        batch = {
            "x": rng.normal(size=(ROWS, FEATURES)).astype("float32"),
            "y": rng.normal(size=ROWS).astype("float32"),
            "mask": mask if number != 1 else np.zeros_like(mask),
        }
        if name.startswith("padded"):
            short = {key: leaf[: ROWS - 3] for key, leaf in batch.items()}
            batch = jaxpar.pad_batch(short, ROWS) | {"scale": np.float32(2)}
        batches.append(batch)
    return batches


def compare(name, strategy="data", *, dtypes=("float64",), **build):
    chosen = testing.strategies(8)[strategy]()
    return testing.assert_trains_like_one_device(*TASKS[name], make_batches(name), chosen, dtypes=dtypes, **build)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("strategy", "num_microbatches"), [pytest.param("pmap", 2, marks=pytest.mark.slow), ("data", 1)]
)
@pytest.mark.parametrize("name", TASKS)
def test_each_kind_of_loss_and_state_agrees(name, strategy, num_microbatches):
    agreement = compare(name, strategy, num_microbatches=num_microbatches)
    assert agreement.steps == 3
    assert agreement.runs[0].loss < 1e-13


@pytest.mark.devices(8)
def test_both_dtypes_are_printed_with_tolerance_and_largest_difference(capsys):
    agreement = compare("mean", "fsdp", dtypes=None)
    assert [(run.dtype, run.tolerance) for run in agreement.runs] == [("float64", 1e-9), ("float32", 1e-5)]
    assert capsys.readouterr().out == f"{agreement}\n"
    first, *rest = str(agreement).splitlines()
    assert first == "sharded({'fsdp': 8}, 1 list of rules) trains like one device over 3 steps:"
    assert "float64: losses to" in rest[0]
    assert "parameters to" in rest[0]
    assert rest[1].endswith("tolerance 1e-05")


@pytest.mark.devices(8)
@pytest.mark.parametrize("strategy", ["pmap", "fsdp_model"])
def test_bf16_compute_is_held_to_a_hundredth(strategy):
    agreement = compare("frozen", strategy, dtypes=None, compute_dtype=jnp.bfloat16, num_microbatches=2)
    assert [(run.dtype, run.tolerance) for run in agreement.runs] == [("bfloat16", 1e-2)]
    assert "parameters" not in str(agreement)


@pytest.mark.devices(8)
@pytest.mark.parametrize("scale", [2.0**8, 2.0**40])
def test_float16_scales_its_loss_and_skips_alike(scale):
    # The larger one overflows, so that every step is skipped and halves it.
    dynamic_scale = DynamicScale(scale=scale, growth_interval=2)
    init_fn, loss_fn = nnx_task(linear, mean_loss, dynamic_scale=dynamic_scale)
    batches, strategy = make_batches("mean"), testing.strategies(8)["data"]()
    agreement = testing.assert_trains_like_one_device(
        init_fn, loss_fn, batches, strategy, compute_dtype=jnp.float16, num_microbatches=2
    )
    assert agreement.runs[0].loss < 1e-2


@pytest.mark.devices(8)
def test_a_leaf_whose_gradient_is_rounding_noise_is_listed():
    def loss_fn(model, batch, rng):
        out = model(batch["x"])
        return (jnp.abs(out - out.mean(0) - batch["y"][:, None])).mean()

    init_fn, _ = nnx_task(linear, loss_fn, optax.adam(0.1, eps=1e-30))
    agreement = testing.assert_trains_like_one_device(
        init_fn, loss_fn, make_batches("mean"), testing.strategies(8)["data"](), dtypes=("float64",)
    )
    assert agreement.noise == ("params/bias",)
    assert str(agreement).endswith("not compared, their gradient is rounding noise: params/bias")


@pytest.mark.devices(8)
def test_a_batch_leaf_that_every_shard_sees_whole_agrees():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=8), batch_rules=[("table", jaxpar.WHOLE)])
    batches = [batch | {"table": np.arange(3, dtype="float32")} for batch in make_batches("mean")]

    def loss_fn(model, batch, rng):
        return (squares(model, batch).mean(1) * batch["table"].sum()).mean()

    init_fn, _ = TASKS["mean"]
    agreement = testing.assert_trains_like_one_device(
        init_fn, loss_fn, batches, strategy, num_microbatches=2, dtypes=("float64",)
    )
    assert agreement.runs[0].params < 1e-13


def without_psum(patch):
    patch.setattr(jax.lax, "psum", lambda value, axes: value)


def mean_of_means(patch):
    patch.setattr(jax.lax, "psum", lambda value, axes, real=jax.lax.pmean: real(value, axes))


def without_average(patch):
    patch.setattr(jax.lax, "pmean", lambda value, axes: value)


def without_fold(place):
    """Leaves out the number of the step (1), the microbatch (2) or the device (3) from the keys."""

    def patch_it(patch):
        def call_model(*args, real=train.call_model, **kwargs):
            *first, keys = args
            return real(*first, (*keys[:place], *keys[place + 1 :]), **kwargs)

        patch.setattr(train, "call_model", call_model)

    return patch_it


def wrong_fraction(patch):
    patch.setattr(
        train, "sum_values", lambda *args, fraction, real=train.sum_values, **rest: real(*args, fraction=1.0, **rest)
    )


def without_row_weight(patch):
    real = loss_module._sum_value
    patch.setattr(loss_module, "_sum_value", lambda value, weight, *rest: real(value, None, *rest))


def without_skip(patch):
    patch.setattr(
        train.jnp, "where", lambda take, new, old, real=jnp.where: new if jnp.ndim(new) else real(take, new, old)
    )


def without_division(patch):
    patch.setattr(train, "mean_value", lambda value: value.total)


def wrong_update(patch):
    patch.setattr(optax, "apply_updates", lambda params, updates: jax.tree.map(jnp.subtract, params, updates))


def changed_norm(patch):
    patch.setattr(optax.tree, "norm", lambda tree: sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))


# name: what is broken, the task that shows it, microbatches, and how the message goes on
MUTATIONS = {
    "no sum over shards": (without_psum, "mean", 2, "step 1, 'params/kernel' is"),
    "a mean of means": (mean_of_means, "mean", 2, "step 1, 'params/kernel' is"),
    "no average of statistics": (without_average, "statistics", 2, "step 1, 'model_state/batch_stats/norm/"),
    "no fold of the step": (without_fold(1), "noisy", 1, "step 1, 'params/kernel' is"),
    "no fold of the microbatch": (without_fold(2), "noisy", 2, "step 1, 'params/kernel' is"),
    "no fold of the device": (without_fold(3), "noisy", 2, "step 1, 'params/kernel' is"),
    "no fold of the device in nnx's keys": (without_fold(3), "net", 2, "step 1, 'params/"),
    "a wrong division": (wrong_fraction, "mean", 2, "step 1, 'params/kernel' is"),
    "no weights of rows": (without_row_weight, "padded_vector", 1, "step 1, 'params/kernel' is"),
    "a loss not divided by its weight": (without_division, "weighted", 1, "step 1, 'metrics/"),
    "a wrong update": (wrong_update, "mean", 1, "step 1, 'params/kernel' is"),
    "another norm": (changed_norm, "mean", 1, "step 1, 'metrics/grad_norm' is"),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "mutation",
    # Every third is fast: all are broken in other ways, and found by the same comparison.
    [name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(MUTATIONS)],
)
def test_a_broken_step_fails_and_names_step_and_leaf(monkeypatch, mutation):
    break_it, task, num_microbatches, text = MUTATIONS[mutation]
    # One device's own step must be compiled before anything is broken that it uses too.
    compare(task, num_microbatches=num_microbatches)
    break_it(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        compare(task, num_microbatches=num_microbatches)
    message = str(caught.value)
    assert message.startswith("sharded({'data': 8}, 0 lists of rules) does not train like one device: in float64, ")
    assert text in message
    assert "1e-09 is allowed" in message


@pytest.mark.devices(8)
def test_the_first_step_that_differs_is_named(monkeypatch):
    compare("mean")
    real = optax.apply_updates

    def apply_updates(params, updates):
        return real(params, jax.tree.map(lambda leaf: leaf * 1.001, updates))

    init_fn, loss_fn = nnx_task(linear, mean_loss, optax.sgd(lambda count: jnp.where(count < 1, 0.0, 0.1)))
    compare_schedule = lambda: testing.assert_trains_like_one_device(
        init_fn, loss_fn, make_batches("mean"), testing.strategies(8)["data"](), dtypes=("float64",)
    )
    compare_schedule()
    monkeypatch.setattr(optax, "apply_updates", apply_updates)
    with pytest.raises(AssertionError, match=r"in float64, step 2, 'params/kernel' is .* differ by .*e-0"):
        compare_schedule()


@pytest.mark.devices(8)
def test_float32_alone_finds_a_wrong_loss(monkeypatch):
    compare("weighted", dtypes=("float32",))
    without_division(monkeypatch)
    with pytest.raises(AssertionError, match=r"in float32, step 1, 'metrics/loss' is .* and 1e-05 is allowed"):
        compare("weighted", dtypes=("float32",))


@pytest.mark.devices(8)
def test_float32_on_the_float64_path_is_named_with_its_line():
    def loss_fn(model, batch, rng):
        return jnp.exp(squares(model, batch).astype("float32")).mean()

    init_fn, _ = TASKS["mean"]
    with pytest.raises(AssertionError) as caught:
        testing.assert_trains_like_one_device(
            init_fn, loss_fn, make_batches("mean"), testing.strategies(8)["data"](), dtypes=("float64",)
        )
    assert "Float64 is not kept on the way to the loss" in str(caught.value)
    assert "convert_element_type float64 -> float32 at " in str(caught.value)
    assert "test_testing.py:" in str(caught.value)


@pytest.mark.devices(8)
def test_a_loss_that_is_not_a_number_shows_nothing_and_fails():
    init_fn, _ = TASKS["mean"]
    with pytest.raises(AssertionError, match=r"step 1, .* is nan, but nan on one device"):
        testing.assert_trains_like_one_device(
            init_fn,
            lambda model, batch, rng: squares(model, batch).mean() * jnp.nan,
            make_batches("mean"),
            testing.strategies(8)["data"](),
        )


@pytest.mark.devices(8)
def test_a_state_that_lies_otherwise_than_its_layout_fails(monkeypatch):
    replicated = testing.strategies(8)["data"]()
    monkeypatch.setattr(jaxpar.Strategy, "init", lambda self, init_fn, rng: replicated.place(init_fn(rng)))
    with pytest.raises(
        AssertionError,
        match=r"strategy.init: 'params/down/bias' lies as .*lays it out as P\(.*; give it that sharding, as",
    ):
        testing.assert_trains_like_one_device(
            *TASKS["frozen"],
            make_batches("mean"),
            jaxpar.sharded(jaxpar.make_mesh(data=8), [("down/kernel", jaxpar.WHOLE), (".*", jax.P("data"))]),
        )


class Unused(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
        self.unused = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return self.up(x)


@pytest.mark.devices(8)
def test_a_parameter_without_a_gradient_must_agree_too(monkeypatch):
    def corrupt(state, sums, update=train._update):
        state, metrics = update(state, sums)
        return state.replace(params={**state.params, "unused": state.params["unused"] + 5}), metrics

    task = nnx_task(Unused, mean_loss)
    assert compare_task(task) is not None
    monkeypatch.setattr(train, "_update", corrupt)
    with pytest.raises(AssertionError, match="params/unused"):
        compare_task(task)


def compare_task(task):
    return testing.assert_trains_like_one_device(
        *task, make_batches("mean"), jaxpar.sharded(jaxpar.make_mesh(data=8)), dtypes=("float64",)
    )


@pytest.mark.devices(8)
def test_a_step_that_compiles_again_fails(monkeypatch):
    real = Step.__call__

    def forget(self, state, batch):
        self._runs.clear()
        self._batches.clear()
        self._last = None, None
        self.fn = lambda *args, fn=self.fn: fn(*args)
        return real(self, state, batch)

    monkeypatch.setattr(Step, "__call__", forget)
    with pytest.raises(AssertionError, match=r"compiled 1 times more .*; return the state with the shapes and shard"):
        compare("mean")


@pytest.mark.devices(8)
def test_batches_of_several_shapes_agree():
    batches = make_batches("mean", 2)
    batches.append({name: leaf[:16] for name, leaf in batches[0].items()})
    with pytest.warns(jaxpar.RecompileWarning):
        agreement = testing.assert_trains_like_one_device(
            *TASKS["mean"], batches, testing.strategies(8)["data"](), dtypes=("float64",)
        )
    assert agreement.steps == 3


@pytest.mark.devices(8)
def test_what_the_strategy_raises_passes_through():
    batches = [{name: leaf[:30] for name, leaf in batch.items()} for batch in make_batches("mean")]
    with pytest.raises(jaxpar.BatchError, match="30 examples, which do not divide by 8 data shards"):
        testing.assert_trains_like_one_device(*TASKS["mean"], batches, testing.strategies(8)["data"]())


BAD_ARGUMENTS = {
    "no batch": ({"batches": []}, "batches is empty"),
    "one batch": ({"batches": {"x": np.ones((8, FEATURES))}}, "batches is a dict; give a list of batches"),
    "a mesh": (
        {"strategy": "data"},
        r"strategy is 'data'; give what jaxpar.sharded\(mesh, ...\) or jaxpar.data_parallel",
    ),
    "microbatches as text": ({"num_microbatches": "4"}, "num_microbatches is '4'; give a whole number, 1 or more"),
    "a compute dtype that there isn't": (
        {"compute_dtype": "bf16"},
        "compute_dtype is 'bf16'; give a floating-point dtype, as jnp.bfloat16, or None",
    ),
    "a compute dtype of whole numbers": ({"compute_dtype": jnp.int32}, "give a floating-point dtype, as jnp.bfloat16"),
    "an unknown dtype": ({"dtypes": ("float8",)}, r"dtypes is \('float8',\)"),
    "a dtype as text": ({"dtypes": "float32"}, "dtypes is 'float32'"),
    "float64 with bf16": (
        {"dtypes": ("float64",), "compute_dtype": jnp.bfloat16},
        r"give one or more of \['bfloat16'\]",
    ),
    "compute in float64": (
        {"compute_dtype": jnp.float64},
        "compute_dtype is float64; give jnp.bfloat16 or jnp.float16",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case):
    changed, text = BAD_ARGUMENTS[case]
    init_fn, loss_fn = TASKS["mean"]
    arguments = {"batches": make_batches("mean"), "strategy": testing.strategies(1)["one"](), **changed}
    with pytest.raises(TypeError if "strategy" in changed else ValueError, match=text):
        testing.assert_trains_like_one_device(init_fn, loss_fn, **arguments)


@pytest.mark.devices(8)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_standard_strategy_uses_the_devices_it_is_made_for(count):
    sizes = {name: make().mesh.size for name, make in testing.strategies(count).items()}
    assert sizes == {name: 1 if name == "one" else count for name in sizes}
    assert ("data_model" in sizes) == (count in (4, 8))


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "8"])
def test_a_number_of_devices_that_can_not_be_is_named(count):
    with pytest.raises(ValueError, match=r"num_devices is .*; give a whole number, 1 or more"):
        testing.strategies(count)


def rows_alike():
    return [{"x": np.ones((ROWS, FEATURES), "float32"), "y": np.ones(ROWS, "float32")}]


def test_a_loss_that_leaves_its_model_alone_shows_nothing():
    alone = lambda model, batch, rng: (jnp.square(batch["x"]).mean() + 0 * model(batch["x"]).sum(), {})
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=-1))
    with pytest.raises(
        AssertionError, match=r"The gradient of all 2 parameters is 0 in each of 1 steps, which shows no"
    ):
        testing.assert_trains_like_one_device(*nnx_task(linear, alone), rows_alike(), strategy, dtypes=("float32",))


def test_what_is_printed_tells_in_how_many_parts_one_device_took_the_batch():
    task, strategy = nnx_task(linear, mean_loss), jaxpar.data_parallel()
    agreement = testing.assert_trains_like_one_device(
        *task, rows_alike(), strategy, num_microbatches=2, dtypes=("float32",)
    )
    assert agreement.parts == 2 * strategy.num_shards
    assert f"one device that takes each batch in {agreement.parts} parts, over 1 steps:" in str(agreement)
