"""`TrainState`: a model goes in as plain leaves and comes out as it was, nnx and linen alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict, freeze
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar.state import is_key, join_params, leaf_path, named_leaves, split_params

X = np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)


class Tied(nnx.Module):
    """A table that is embedding and head at once, under two names."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.head = self.embed

    def __call__(self, x):
        return self.head.attend(self.embed(jnp.argmax(x, -1)))


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class Noisy(nnx.Module):
    """BatchNorm, Dropout, a raw array, a variable of its own kind, and a static number."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.offset = jnp.arange(4.0)
        self.calls = nnx.Variable(jnp.zeros((), int))
        self.scale = 2.0

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.dropout(self.norm(self.linear(x))) * self.scale + self.offset


class Stacked(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


class Nested(nnx.Module):
    def __init__(self, rngs):
        self.by_name = nnx.Dict(a=nnx.Linear(4, 4, rngs=rngs), b=nnx.LoRA(4, 2, 4, rngs=rngs))

    def __call__(self, x):
        return self.by_name["a"](x) + self.by_name["b"](x)


NNX_MODELS = {
    "linear": lambda rngs: nnx.Linear(4, 4, rngs=rngs),
    "tied": Tied,
    "listed": Listed,
    "noisy": Noisy,
    "stacked": Stacked,
    "nested": Nested,
    "sequential": lambda rngs: nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 4, rngs=rngs)),
}


class LinenNorm(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(4, name="dense")(x)
        return linen.Dropout(0.5)(linen.BatchNorm(not train, name="norm")(x), deterministic=not train)


BOXED = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
LINEN_MODELS = {
    "dense": linen.Dense(4),
    "norm": LinenNorm(),
    "boxed": linen.Dense(4, kernel_init=BOXED),
    "sequence": linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(4)]),
}


def evaluated(model):
    model.eval()
    return np.asarray(model(X))


@pytest.mark.parametrize("name", NNX_MODELS)
def test_an_nnx_model_comes_back_as_it_was(name):
    model = NNX_MODELS[name](nnx.Rngs(0))
    state = jaxpar.TrainState.create(model, optax.adam(1e-3))
    assert type(state.model) is type(model)
    np.testing.assert_array_equal(evaluated(state.model), evaluated(model))


@pytest.mark.parametrize("name", LINEN_MODELS)
def test_linen_variables_come_back_as_they_were(name):
    module = LINEN_MODELS[name]
    variables = module.init(jax.random.key(0), X)
    state = jaxpar.TrainState.create(variables, optax.adam(1e-3))
    np.testing.assert_array_equal(module.apply(state.model, X), module.apply(linen.unbox(variables), X))
    assert state.model.keys() == variables.keys()


@pytest.mark.parametrize("make", [FrozenDict, freeze, dict])
def test_frozen_dicts_and_dicts_make_one_state(make):
    variables = LINEN_MODELS["norm"].init(jax.random.key(0), X)
    found = jaxpar.TrainState.create(make(variables), optax.adam(1e-3))
    plain = jaxpar.TrainState.create(variables, optax.adam(1e-3))
    assert [path for path, _ in named_leaves(found)] == [path for path, _ in named_leaves(plain)]


@pytest.mark.parametrize("name", NNX_MODELS)
def test_every_leaf_is_a_plain_array_under_plain_dicts(name):
    state = jaxpar.TrainState.create(NNX_MODELS[name](nnx.Rngs(0)), optax.adam(1e-3))
    is_live = lambda node: isinstance(node, nnx.Module | nnx.Variable | nnx.State)
    assert not [node for node in jax.tree.leaves(state, is_leaf=is_live) if is_live(node)]
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(state))


def test_a_live_module_never_crosses_jit():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    seen = []
    state = strategy.init(lambda rng: jaxpar.TrainState.create(Noisy(nnx.Rngs(rng)), optax.sgd(0.1)), jax.random.key(0))
    step = strategy.compile(lambda state, batch: (seen.append(jax.tree.leaves(state)) or state, {}))
    step(state, strategy.shard_batch({"x": np.ones((8, 4))}))
    assert seen
    assert all(isinstance(leaf, jax.core.Tracer) for leaf in seen[0])


def test_tied_weights_are_one_parameter_before_and_after():
    state = jaxpar.TrainState.create(Tied(nnx.Rngs(0)), optax.adam(1e-3))
    assert [path for path, _ in named_leaves(state.params, "params")] == ["params/embed/embedding"]
    model = state.model
    assert model.head is model.embed


def test_the_model_is_a_new_module_over_the_same_arrays():
    model = NNX_MODELS["linear"](nnx.Rngs(0))
    state = jaxpar.TrainState.create(model, optax.adam(1e-3))
    back = state.model
    back.kernel[...] = jnp.zeros((4, 4))
    assert np.asarray(state.params["kernel"]).any()
    assert np.asarray(model.kernel[...]).any()


def test_what_is_not_trained_lies_in_its_collection():
    state = jaxpar.TrainState.create(Noisy(nnx.Rngs(0)), optax.adam(1e-3))
    paths = {path for path, _ in named_leaves(state.model_state, "model_state")}
    assert {"model_state/batch_stats/norm/mean", "model_state/batch_stats/norm/var"} <= paths
    assert any(path.endswith("/offset") for path in paths)
    assert any(path.endswith("/calls") for path in paths)
    assert any("dropout" in path and path.endswith("key") for path in paths)
    assert {path.split("/")[1] for path, _ in named_leaves(state.params, "params")} == {"linear", "norm"}


def test_lora_parameters_are_parameters():
    state = jaxpar.TrainState.create(Nested(nnx.Rngs(0)), optax.adam(1e-3))
    paths = [path for path, _ in named_leaves(state.params, "params")]
    assert "params/by_name/b/lora_a" in paths


def test_layers_of_a_list_are_numbered():
    state = jaxpar.TrainState.create(Listed(nnx.Rngs(0)), optax.adam(1e-3))
    assert {path for path, _ in named_leaves(state)} >= {f"params/layers/{i}/kernel" for i in range(3)}
    assert "opt_state/0/mu/layers/2/bias" in {path for path, _ in named_leaves(state)}


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_boxes_leave_no_trace_in_the_paths(name):
    if name == "nnx":
        with nnx.use_eager_sharding(False):
            model = nnx.Linear(4, 4, kernel_metadata={"out_sharding": (None, "model")}, rngs=nnx.Rngs(0))
    else:
        model = LINEN_MODELS["boxed"].init(jax.random.key(0), X)
    state = jaxpar.TrainState.create(model, optax.adam(1e-3))
    assert {path for path, _ in named_leaves(state.params, "params")} == {"params/kernel", "params/bias"}
    assert state.static.annotations == (("params/kernel", P(None, "model")),)


# trainable


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_trainable_sees_each_canonical_path_once(name):
    model = (
        NNX_MODELS["sequential"](nnx.Rngs(0)) if name == "nnx" else LINEN_MODELS["sequence"].init(jax.random.key(0), X)
    )
    seen = []
    jaxpar.TrainState.create(model, optax.adam(1e-3), trainable=lambda path: seen.append(path) or True)
    layers = ("layers/0", "layers/2") if name == "nnx" else ("layers_0", "layers_2")
    assert sorted(seen) == [f"params/{layer}/{leaf}" for layer in layers for leaf in ("bias", "kernel")]


def train_once(model, strategy, trainable):
    state = strategy.place(jaxpar.TrainState.create(model, optax.adamw(0.1, weight_decay=0.5), trainable=trainable))
    before = {path: np.asarray(leaf) for path, leaf in named_leaves(state.params)}
    loss_fn = lambda model, batch, rng: ((model(batch["x"]) - 1) ** 2).mean()
    step = jaxpar.make_train_step(loss_fn, strategy)
    state, _ = step(state, strategy.shard_batch({"x": np.ones((8, 4), "float32")}))
    return before, {path: np.asarray(leaf) for path, leaf in named_leaves(state.params)}, state


def test_frozen_leaves_have_no_moment_and_stay_to_the_bit():
    frozen = {"layers/0/kernel", "layers/0/bias"}
    before, after, state = train_once(
        NNX_MODELS["sequential"](nnx.Rngs(0)),
        jaxpar.sharded(jaxpar.make_mesh(data=8)),
        lambda path: "layers/0" not in path,
    )
    assert {path for path in before if (before[path] == after[path]).all()} == frozen
    moments = {path for path, _ in named_leaves(state.opt_state) if "/mu/" in path}
    assert {path.split("/mu/")[1] for path in moments} == {"layers/2/kernel", "layers/2/bias"}


def test_whole_numbers_are_never_trained():
    params = {"params": {"w": jnp.ones(3), "table": jnp.arange(3)}}
    state = jaxpar.TrainState.create(params, optax.adam(1e-3))
    assert state.static.frozen == {"params/table"}


def test_lists_of_linen_parameters_are_named():
    with pytest.raises(jaxpar.StateError, match="'params/l' is no dict; linen's params are nested dicts of arrays"):
        jaxpar.TrainState.create({"params": {"l": [jnp.ones(3), jnp.ones(3)]}}, optax.sgd(0.1))


def test_split_and_join_are_inverse():
    params = {"a": {"w": 1, "b": 2}, "c": {"w": 3}}
    for frozen in (frozenset(), frozenset({"params/a/w"}), frozenset({"params/a/w", "params/a/b"})):
        trained, held = split_params(params, frozen)
        assert join_params(trained, held) == params
        assert len(jax.tree.leaves(held)) == len(frozen)


# keys and paths


def test_the_key_is_typed_and_kept():
    key = jax.random.key(7)
    assert is_key(jaxpar.TrainState.create(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1), rng=key).rng)
    old = jaxpar.TrainState.create(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1), rng=jax.random.PRNGKey(7))
    assert is_key(old.rng)
    assert (jax.random.key_data(old.rng) == jax.random.key_data(key)).all()


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": {"b": 1}}, "a/b"),
        ({"a": [1]}, "a/0"),
        ({"a": (1,)}, "a/0"),
        ({"value": 1}, "value"),
        ({"attn": {"value": {"kernel": 1}}}, "attn/value/kernel"),
        ({"a": nnx.Param(jnp.ones(2))}, "a"),
        ({"a": linen.Partitioned(jnp.ones(2), names=("model",))}, "a"),
        ({"value": nnx.Param(jnp.ones(2))}, "value"),
    ],
)
def test_paths_are_canonical(tree, path):
    [(keys, _)] = jax.tree_util.tree_leaves_with_path(tree)
    assert leaf_path(keys) == path


def test_a_state_starts_at_step_zero_with_int32():
    state = jaxpar.TrainState.create(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    assert state.dynamic_scale is None


def test_a_dynamic_scale_goes_from_step_to_step_with_64_bits_enabled():
    with jax.enable_x64(True):
        strategy = jaxpar.sharded(jaxpar.make_mesh(data=1, devices=jax.devices()[:1]))
        params = {"params": {"w": jnp.ones(2, "float32")}}
        state = strategy.place(jaxpar.TrainState.create(params, optax.sgd(0.1), dynamic_scale=DynamicScale()))
        loss_fn = lambda model, batch, rng: ((model["params"]["w"] * batch["x"]).mean(), {})
        step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.float16)
        for _ in range(2):
            state, metrics = step(state, strategy.shard_batch({"x": np.ones((4, 2), "float16")}))
    assert (int(state.step), float(metrics["skipped"])) == (2, 0)


def test_states_of_one_model_and_optimizer_have_one_structure():
    tx = optax.adam(1e-3)
    states = [jaxpar.TrainState.create(Noisy(nnx.Rngs(seed)), tx) for seed in (0, 1)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
