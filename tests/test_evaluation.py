"""`evaluate` gives exact means over a data set of any batch sizes; `make_eval_step` what a function gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict

import jaxpar
from jaxpar import Weighted, evaluate, make_eval_step

STRATEGIES = {
    "pmap": jaxpar.data_parallel,
    "data": lambda: jaxpar.sharded(jaxpar.make_mesh(data=8)),
    "data_model": lambda: jaxpar.sharded(jaxpar.make_mesh(data=2, model=4), jaxpar.rules.megatron(column=["linear"])),
}
every_strategy = pytest.mark.parametrize("kind", ["pmap", "data"])
rng = np.random.default_rng(0)
ROWS = 45
DATA = {
    "x": rng.normal(size=(ROWS, 8)).astype("float32"),
    "w": rng.integers(0, 4, ROWS).astype("float32"),
}
# How 45 rows may be cut into batches; 8 devices.
CUTS = {
    "even, and a short last": [16, 16, 13],
    "each of another size": [1, 7, 8, 9, 20],
    "one": [45],
    "one row each at the end": [43, 1, 1],
    "growing": [3, 17, 25],
}


def cut(sizes, data=None):
    ends = np.cumsum(sizes)
    return [
        {name: leaf[end - size : end] for name, leaf in (data or DATA).items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def start(strategy, model=None):
    return strategy.place(jaxpar.TrainState.create(model or Model(nnx.Rngs(0)), optax.sgd(0.1)))


def squares(model, batch):
    return (model(batch["x"]) ** 2).mean(axis=1)


TRUE = np.asarray(squares(Model(nnx.Rngs(0)), DATA), "float64")
WEIGHTED = (TRUE * DATA["w"]).sum() / DATA["w"].sum()
# What the function gives, and its exact mean over the data.
FUNCTIONS = {
    "a mean": (lambda model, batch, rng: squares(model, batch).mean(), TRUE.mean()),
    "one value an example": (lambda model, batch, rng: squares(model, batch), TRUE.mean()),
    "a row an example": (lambda model, batch, rng: model(batch["x"]) ** 2, TRUE.mean()),
    "weighted sums": (
        lambda model, batch, rng: Weighted((squares(model, batch) * batch["w"]).sum(), batch["w"].sum()),
        WEIGHTED,
    ),
    "weighted sums an example": (
        lambda model, batch, rng: Weighted(squares(model, batch) * batch["w"], batch["w"]),
        WEIGHTED,
    ),
    "a nest": (
        lambda model, batch, rng: {"a": [squares(model, batch), {"b": squares(model, batch).mean()}], "c": None},
        {"a": [TRUE.mean(), {"b": TRUE.mean()}], "c": None},
    ),
    "a loss function": (
        lambda model, batch, rng: (squares(model, batch).mean(), {"again": squares(model, batch)}),
        (TRUE.mean(), {"again": TRUE.mean()}),
    ),
    "whether it is so": (lambda model, batch, rng: squares(model, batch) > 0.1, (TRUE > 0.1).mean()),
}


@every_strategy
@pytest.mark.parametrize("name", FUNCTIONS)
def test_means_over_uneven_batches_are_exact_and_floats(name, kind):
    strategy = STRATEGIES[kind]()
    fn, expected = FUNCTIONS[name]
    found = evaluate(make_eval_step(fn, strategy), start(strategy), cut(CUTS["even, and a short last"]))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(type(value) is float for value in jax.tree.leaves(found))
    np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-6)


def test_a_batch_of_another_shape_is_told_at_the_line_that_evaluates():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    state = strategy.place(jaxpar.TrainState.create(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1)))
    step = jaxpar.make_eval_step(lambda model, batch, rng: batch["x"].mean(-1), strategy)
    with pytest.warns(jaxpar.RecompileWarning, match="compiled again") as told:
        jaxpar.evaluate(step, state, [{"x": np.ones((8, 4))}, {"x": np.ones((16, 4))}])
    assert [each.filename for each in told] == [__file__]


# A batch of another size than the first recompiles, and says so.
@pytest.mark.filterwarnings("ignore::jaxpar.RecompileWarning")
@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_however_the_data_are_cut_the_mean_is_the_same(sizes):
    strategy = STRATEGIES["data"]()
    step = make_eval_step(lambda model, batch, rng: {"a": squares(model, batch).mean()}, strategy)
    assert evaluate(step, start(strategy), cut(sizes))["a"] == pytest.approx(TRUE.mean(), rel=1e-6)


def test_rules_of_any_kind_evaluate_alike():
    strategy = STRATEGIES["data_model"]()
    step = make_eval_step(FUNCTIONS["weighted sums"][0], strategy)
    assert evaluate(step, start(strategy), cut([20, 25])) == pytest.approx(WEIGHTED, rel=1e-6)


@every_strategy
def test_batches_smaller_than_the_first_compile_once(kind):
    strategy = STRATEGIES[kind]()
    calls = []
    step = make_eval_step(lambda model, batch, rng: calls.append(1) or squares(model, batch), strategy)
    state, batches = start(strategy), [jaxpar.pad_batch(batch, 16) for batch in cut([16, 16, 13])]
    for _ in range(2):
        evaluate(step, state, batches)
    assert len(calls) == 1


@every_strategy
def test_weights_of_the_users_own_count(kind):
    strategy = STRATEGIES[kind]()
    data = {**DATA, "example_weight": DATA["w"]}
    step = make_eval_step(FUNCTIONS["a loss function"][0], strategy)
    loss, metrics = evaluate(step, start(strategy), cut([16, 16, 13], data))
    assert loss == pytest.approx(WEIGHTED, rel=1e-6)
    assert metrics["again"] == pytest.approx(WEIGHTED, rel=1e-6)


@every_strategy
def test_a_data_set_that_weighs_nothing_has_the_mean_zero(kind):
    strategy = STRATEGIES[kind]()
    data = {"x": DATA["x"][:16], "w": np.zeros(16, "float32")}
    step = make_eval_step(FUNCTIONS["weighted sums"][0], strategy)
    assert evaluate(step, start(strategy), [data]) == 0.0


def test_a_batch_of_any_mapping_keeps_its_weights():
    strategy = STRATEGIES["data"]()
    state, evaluate_of = (
        start(strategy),
        lambda batch: evaluate(make_eval_step(lambda model, batch, rng: batch["x"].mean(-1), strategy), state, [batch]),
    )
    padded = jaxpar.pad_batch({"x": np.arange(1.0, 11.0)[:, None] * np.ones(4)}, 16)
    assert evaluate_of(padded) == evaluate_of(FrozenDict(padded)) == 5.5


def test_batches_may_be_a_generator():
    strategy = STRATEGIES["data"]()
    step = make_eval_step(FUNCTIONS["a mean"][0], strategy)
    assert evaluate(step, start(strategy), (batch for batch in cut([16, 29]))) == pytest.approx(TRUE.mean(), rel=1e-6)


def test_evaluation_leaves_the_state_as_it_is():
    strategy = STRATEGIES["data"]()
    state = start(strategy)
    step = make_eval_step(FUNCTIONS["a mean"][0], strategy)
    first = evaluate(step, state, cut([16, 16, 13]))
    assert evaluate(step, state, cut([16, 16, 13])) == first
    assert not state.step.is_deleted()


# the step alone


@every_strategy
def test_outputs_come_in_the_order_of_the_rows(kind):
    strategy = STRATEGIES[kind]()
    state = start(strategy)
    predict = make_eval_step(lambda model, batch, rng: {"y": model(batch["x"])}, strategy)
    found = predict(state, strategy.shard_batch({"x": DATA["x"][:16]}))["y"]
    np.testing.assert_allclose(found, state.model(DATA["x"][:16]), rtol=1e-5, atol=1e-6)


@every_strategy
def test_scalars_of_a_step_are_means_over_the_global_batch(kind):
    strategy = STRATEGIES[kind]()
    batch = {name: leaf[:16] for name, leaf in DATA.items()}
    step = make_eval_step(FUNCTIONS["a loss function"][0], strategy)
    loss, metrics = step(start(strategy), strategy.shard_batch(batch))
    np.testing.assert_allclose(loss, TRUE[:16].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["again"], TRUE[:16], rtol=1e-5)


class Regularised(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(x))


@every_strategy
def test_an_nnx_model_is_in_eval_mode_and_its_statistics_stay(kind):
    strategy = STRATEGIES[kind]()
    model = Regularised(nnx.Rngs(0))
    model(DATA["x"])
    state = start(strategy, model)
    model.eval()
    step = make_eval_step(lambda model, batch, rng: model(batch["x"]), strategy)
    found = step(state, strategy.shard_batch({"x": DATA["x"][:16]}))
    np.testing.assert_allclose(found, model(DATA["x"][:16]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.model.norm.mean[...], model.norm.mean[...])


@every_strategy
def test_a_model_trains_on_after_evaluation(kind):
    strategy = STRATEGIES[kind]()
    state = start(strategy, Regularised(nnx.Rngs(0)))
    fn = lambda model, batch, rng: ((model(batch["x"]) - 1) ** 2).mean()
    train, test = jaxpar.make_train_step(fn, strategy), make_eval_step(fn, strategy)
    batch = strategy.shard_batch({"x": DATA["x"][:16]})
    before = float(test(state, batch))
    state, _ = train(state, batch)
    assert float(test(state, batch)) != before
    assert np.asarray(state.model_state["batch_stats"]["norm"]["mean"]).any()


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(not train, name="norm")(linen.Dense(4, name="linear")(x))
        return linen.Dropout(0.5, deterministic=not train)(x)


@every_strategy
def test_linen_models_are_evaluated_with_their_variables(kind):
    strategy = STRATEGIES[kind]()
    variables = LinenModel().init(jax.random.key(0), DATA["x"])
    state = start(strategy, variables)
    step = make_eval_step(lambda variables, batch, rng: LinenModel().apply(variables, batch["x"]), strategy)
    expected = np.asarray(LinenModel().apply(variables, DATA["x"]), "float64").mean()
    assert evaluate(step, state, cut([16, 16, 13])) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_compute_dtype_narrows_what_the_model_sees():
    strategy = STRATEGIES["data"]()
    seen = []
    fn = lambda model, batch, rng: (seen.append(model.linear.kernel[...].dtype), squares(model, batch).mean())[1]
    found = evaluate(make_eval_step(fn, strategy, compute_dtype=jnp.bfloat16), start(strategy), cut([16, 16, 13]))
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert found == pytest.approx(TRUE.mean(), rel=2e-2)


def test_an_eval_step_is_lowered_from_shapes():
    strategy = STRATEGIES["data"]()
    step = make_eval_step(FUNCTIONS["a mean"][0], strategy)
    init_fn = lambda rng: jaxpar.TrainState.create(Model(nnx.Rngs(rng)), optax.sgd(0.1))
    assert "all_reduce" in step.lower(strategy.abstract_state(init_fn), cut([16])[0]).compile().as_text().replace(
        "-", "_"
    )


def test_a_batch_that_is_none_is_an_error_and_no_end():
    strategy = STRATEGIES["data"]()
    step = make_eval_step(FUNCTIONS["a mean"][0], strategy)
    with pytest.raises(jaxpar.BatchError, match="None"):
        evaluate(step, start(strategy), [cut([16])[0], None, cut([16])[0]])
