"""`Strategy`: states created or placed where the layout says, batches cut for each process, steps of one's own."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar.state import named_leaves
from jaxpar.strategy import process_part

KEY = jax.random.key(0)
BATCH = {"x": np.linspace(-1, 1, 16 * 32, dtype="float32").reshape(16, 32)}


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def init_fn(rng):
    return jaxpar.TrainState.create(MLP(nnx.Rngs(rng)), optax.adam(1e-2))


def loss_fn(model, batch, rng):
    return ((model(batch["x"]) - 1) ** 2).mean(), {}


STRATEGIES = {
    "pmap": jaxpar.data_parallel,
    "data": lambda: jaxpar.sharded(jaxpar.make_mesh(data=8)),
    "model": lambda: jaxpar.sharded(jaxpar.make_mesh(model=8), jaxpar.MEGATRON),
    "data_model": lambda: jaxpar.sharded(jaxpar.make_mesh(data=2, model=4), jaxpar.MEGATRON),
    "fsdp": lambda: jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP),
    "fsdp_model": lambda: jaxpar.sharded(jaxpar.make_mesh(fsdp=2, model=4), jaxpar.MEGATRON, jaxpar.FSDP),
    "zero1": lambda: jaxpar.sharded(jaxpar.make_mesh(data=8), jaxpar.ZERO1),
}


@functools.cache
def lone_state(seed=0):
    return init_fn(jax.random.key(seed))


def start(strategy, seed=0):
    # To compile an init for each test would take most of this file's time.
    return strategy.place(lone_state(seed))


every_strategy = pytest.mark.parametrize("kind", STRATEGIES)


def to_numpy(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return {path: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for path, leaf in named_leaves(tree)}


def assert_equal(found, expected):
    found, expected = to_numpy(found), to_numpy(expected)
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def assert_laid_out(state, strategy):
    for (path, leaf), sharding in zip(named_leaves(state), strategy.layout(state).shardings, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path


# init


def test_the_same_seed_gives_the_same_bits_where_the_layout_says_under_every_strategy():
    states = {}
    for kind, make in STRATEGIES.items():
        states[kind] = make().init(init_fn, KEY)
        assert_laid_out(states[kind], make())
        assert_equal(states[kind], states["pmap"])


def test_the_states_key_is_split_from_the_one_that_init_fn_gets():
    seen = []
    strategy = STRATEGIES["data"]()
    state = strategy.init(lambda rng: (seen.append(rng), init_fn(rng))[1], KEY)
    init_key, state_key = jax.random.split(KEY)
    assert (jax.random.key_data(state.rng) == jax.random.key_data(state_key)).all()
    lone = init_fn(init_key)
    np.testing.assert_array_equal(state.params["up"]["kernel"], lone.params["up"]["kernel"])


def test_init_compiles_to_outputs_that_are_split_and_no_whole_kernel():
    strategy = STRATEGIES["fsdp"]()
    state = strategy.init(init_fn, KEY)
    assert {shard.data.shape for shard in state.params["up"]["kernel"].addressable_shards} == {(32, 8)}
    assert {shard.data.shape for shard in state.opt_state[0].nu["down"]["kernel"].addressable_shards} == {(8, 32)}


@every_strategy
def test_shapes_of_a_state_allocate_nothing(kind):
    strategy = STRATEGIES[kind]()
    strategy.abstract_state(init_fn)
    before = {id(array) for array in jax.live_arrays()}
    abstract = strategy.abstract_state(init_fn)
    assert not {id(array) for array in jax.live_arrays()} - before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))


@every_strategy
def test_shapes_of_a_state_are_those_of_the_state(kind):
    strategy = STRATEGIES[kind]()
    abstract, state = strategy.abstract_state(init_fn), start(strategy)
    for (path, shape), (other, leaf) in zip(named_leaves(abstract), named_leaves(state), strict=True):
        assert (path, shape.shape, shape.dtype) == (other, leaf.shape, leaf.dtype)
        assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path


# place


@every_strategy
def test_numpy_leaves_are_placed(kind):
    strategy = STRATEGIES[kind]()
    state = lone_state()
    numpy_state = state.replace(
        params=jax.tree.map(np.asarray, state.params), opt_state=jax.tree.map(np.asarray, state.opt_state)
    )
    placed = strategy.place(numpy_state)
    assert_laid_out(placed, strategy)
    assert_equal(placed, state)


@pytest.mark.parametrize("source", ["pmap", "fsdp_model", "zero1"])
@every_strategy
def test_a_state_moves_from_any_strategy_to_any_other(source, kind):
    state = start(STRATEGIES[source]())
    strategy = STRATEGIES[kind]()
    placed = strategy.place(state)
    assert_laid_out(placed, strategy)
    assert_equal(placed, state)


@pytest.mark.parametrize("source", ["one device", "numpy", "the same strategy", "fsdp"])
@pytest.mark.parametrize("kind", ["pmap", "data", "fsdp"])
def test_the_given_state_outlives_steps_that_take_over_the_copy(source, kind):
    strategy = STRATEGIES[kind]()
    state = {
        "one device": lone_state,
        "numpy": lambda: lone_state().replace(params=jax.tree.map(np.asarray, lone_state().params)),
        "the same strategy": lambda: start(strategy),
        "fsdp": lambda: start(STRATEGIES["fsdp"]()),
    }[source]()
    before = to_numpy(state)
    placed = strategy.place(state)
    after, _ = strategy.compile(lambda state, batch: (jax.tree.map(lambda leaf: leaf, state), {}))(
        placed, strategy.shard_batch(BATCH)
    )
    jax.block_until_ready(after)
    assert not [path for path, leaf in named_leaves(state) if isinstance(leaf, jax.Array) and leaf.is_deleted()]
    found = to_numpy(state)
    assert all((found[path] == before[path]).all() for path in before)


def test_a_numpy_array_that_changes_later_does_not_change_the_state():
    kernel = np.ones((8, 8), "float32")
    state = jaxpar.TrainState.create({"params": {"kernel": jnp.zeros((8, 8))}}, optax.sgd(0.1))
    placed = STRATEGIES["data"]().place(state.replace(params={"kernel": kernel}))
    kernel[:] = 7
    assert (np.asarray(placed.params["kernel"]) == 1).all()


# data_shard. A stand-in for devices of several processes: (process of each device, mesh shape, axes, spec of the
# rows) and what each process must load.
PROCESSES = {
    "one process": ([0] * 8, (8,), ("data",), P("data"), {0: (0, 1)}),
    "two, data": ([0, 0, 0, 0, 1, 1, 1, 1], (8,), ("data",), P("data"), {0: (0, 2), 1: (1, 2)}),
    "four, data": ([0, 0, 1, 1, 2, 2, 3, 3], (8,), ("data",), P("data"), {0: (0, 4), 2: (2, 4), 3: (3, 4)}),
    "eight, data": (list(range(8)), (8,), ("data",), P("data"), {5: (5, 8)}),
    "in another order": ([1, 1, 1, 1, 0, 0, 0, 0], (8,), ("data",), P("data"), {0: (1, 2), 1: (0, 2)}),
    "model across processes": (
        [0, 0, 1, 1, 2, 2, 3, 3],
        (2, 4),
        ("data", "model"),
        P("data"),
        {0: (0, 2), 1: (0, 2), 3: (1, 2)},
    ),
    "model alone": ([0, 0, 0, 0, 1, 1, 1, 1], (8,), ("model",), P(None), {0: (0, 1), 1: (0, 1)}),
    "model within a process": ([0, 0, 0, 0, 1, 1, 1, 1], (2, 4), ("data", "model"), P("data"), {0: (0, 2), 1: (1, 2)}),
    "data and fsdp": ([0, 0, 1, 1, 2, 2, 3, 3], (2, 4), ("data", "fsdp"), P(("data", "fsdp")), {1: (1, 4), 3: (3, 4)}),
    "fsdp of which data is whole": (
        [0, 0, 0, 0, 1, 1, 1, 1],
        (2, 4),
        ("data", "fsdp"),
        P("fsdp"),
        {0: (0, 1), 1: (0, 1)},
    ),
}


@pytest.fixture
def parts_of(monkeypatch):
    """Returns what finds each process's part on a mesh whose devices belong to processes that there aren't."""
    real = jax.NamedSharding

    def find(processes, shape, axes, spec, wanted):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: len(processes)]).reshape(shape), axes)
        owner = dict(zip(mesh.devices.flat, processes, strict=True))

        def with_owners(mesh, spec):
            sharding = real(mesh, spec)
            return types.SimpleNamespace(
                devices_indices_map=lambda shape: {
                    Device(owner[device]): index for device, index in sharding.devices_indices_map(shape).items()
                }
            )

        monkeypatch.setattr("jaxpar.strategy.NamedSharding", with_owners)
        process_part.cache_clear()
        return {process: process_part(mesh, process, spec) for process in wanted}

    yield find
    process_part.cache_clear()


class Device:
    """A device of another process, hashed by itself."""

    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.devices(8)
@pytest.mark.parametrize(("processes", "shape", "axes", "spec", "parts"), PROCESSES.values(), ids=PROCESSES)
def test_each_process_loads_its_part(parts_of, processes, shape, axes, spec, parts):
    assert parts_of(processes, shape, axes, spec, parts) == parts


@pytest.mark.devices(8)
def test_processes_that_interleave_are_named(parts_of):
    with pytest.raises(jaxpar.BatchError, match=r"\{'data': 8\} interleave among 2 processes"):
        parts_of([0, 1] * 4, (8,), ("data",), P("data"), [0])


@every_strategy
def test_one_process_loads_everything(kind):
    assert STRATEGIES[kind]().data_shard() == (0, 1)


@pytest.mark.devices(8)
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_batch_rules_may_split_the_rows_over_more_axes(num_microbatches):
    mesh = jaxpar.make_mesh(data=4, model=2)
    wide = jaxpar.sharded(mesh, jaxpar.MEGATRON, batch_rules=[(".*", P(("data", "model")))])
    assert wide.num_shards == 8
    losses = []
    for strategy in (jaxpar.sharded(mesh, jaxpar.MEGATRON), wide):
        step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=num_microbatches)
        _, metrics = step(start(strategy), strategy.shard_batch(BATCH))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("spec", "num_shards"),
    [(P("data", None), 4), (P(("data", "model")), 8), (P(None, "model"), 4), ("a function", 4)],
    ids=str,
)
def test_a_batch_rule_for_every_leaf_need_not_fit_one_of_rows_alone(spec, num_shards):
    rule = spec if isinstance(spec, P) else lambda leaf, mesh, so_far: P("data", "model") if leaf.shape[1] > 1 else None
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=4, model=2), jaxpar.MEGATRON, batch_rules=[(".*", rule)])
    assert strategy.num_shards == num_shards
    assert len(strategy.shard_batch(BATCH)["x"].addressable_shards[0].data) == len(BATCH["x"]) // num_shards


# compile: steps of one's own


def adversarial_step(strategy):
    """A GAN-like step: two states, each trained against the other, and a teacher that averages one's parameters."""
    mean = (lambda x: jax.lax.pmean(x, strategy.axis_name)) if strategy.engine.example_dims == 2 else (lambda x: x)

    def update(state, loss):
        grads = mean(jax.grad(loss)(state.params))
        updates, opt_state = state.static.tx.update(grads, state.opt_state, state.params)
        return state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )

    def apply(params, x):
        return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]

    def step(states, batch):
        x = batch["x"]
        made = apply(states["generator"].params, x)
        critic = update(states["critic"], lambda params: (apply(params, made) - apply(params, x)).mean())
        generator = update(states["generator"], lambda params: -apply(critic.params, apply(params, x)).mean())
        teacher = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, states["teacher"], generator.params)
        out = {"gap": mean((apply(critic.params, made) - apply(critic.params, x)).mean())}
        return {"generator": generator, "critic": critic, "teacher": teacher}, out

    return step


def run_adversaries(strategy):
    """Returns the shardings before two steps, and the states and the output after them, in float64."""
    with jax.enable_x64(True):
        wide = lambda leaf: leaf.astype("float64") if leaf.dtype == jnp.float32 else leaf
        lone = [jax.tree.map(wide, lone_state(seed)) for seed in (1, 2)]
        states = {"generator": strategy.place(lone[0]), "critic": strategy.place(lone[1])}
        states["teacher"] = strategy.place(lone[0]).params
        before = jax.tree.map(lambda leaf: leaf.sharding, states)
        step = strategy.compile(adversarial_step(strategy))
        for _ in range(2):
            states, out = step(states, strategy.shard_batch({"x": BATCH["x"].astype("float64")}))
        return before, states, {name: float(value) for name, value in out.items()}


@pytest.fixture(scope="module")
def adversaries_alone():
    return run_adversaries(jaxpar.sharded(jaxpar.make_mesh(data=1, devices=jax.devices()[:1])))[1:]


@every_strategy
def test_two_states_and_a_teacher_train_alike_under_every_strategy(kind, adversaries_alone):
    before, states, out = run_adversaries(STRATEGIES[kind]())
    expected_states, expected_out = adversaries_alone
    np.testing.assert_allclose(out["gap"], expected_out["gap"], rtol=1e-9)
    found, expected = to_numpy(states), to_numpy(expected_states)
    for path in (path for path in found if "params" in path or "teacher" in path):
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-9, atol=1e-9, err_msg=path)
    for (path, leaf), sharding in zip(named_leaves(states), jax.tree.leaves(before), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path


def test_a_step_of_ones_own_takes_over_its_states_memory():
    strategy = STRATEGIES["data"]()
    state = start(strategy)
    step = strategy.compile(lambda state, batch: (state.replace(step=state.step + 1), batch["x"].sum()))
    after, total = step(state, strategy.shard_batch(BATCH))
    assert state.step.is_deleted()
    assert int(after.step) == 1
    assert np.isfinite(float(total))


@pytest.mark.devices(8)
@every_strategy
def test_a_step_of_ones_own_may_give_back_a_key_of_its_own(kind):
    strategy = STRATEGIES[kind]()
    state, traces = start(strategy), []
    keys, expected = [], [jax.random.clone(state.rng)]

    def step(state, batch):
        traces.append(1)
        rng, noise = jax.random.split(state.rng)
        return state.replace(rng=rng), jax.random.uniform(noise)

    compiled = strategy.compile(step)
    for _ in range(3):
        keys.append(jax.random.key_data(state.rng).tolist())
        state, _ = compiled(state, strategy.shard_batch(BATCH))
        assert state.rng.sharding.is_fully_replicated
    for _ in range(2):
        expected.append(jax.random.split(expected[-1])[0])
    assert keys == [jax.random.key_data(key).tolist() for key in expected]
    assert len(traces) == 1


@pytest.mark.devices(2)
def test_a_new_key_lies_as_the_old_one_did():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=2, devices=jax.devices()[:2]))
    state = strategy.place(start(strategy).replace(rng=jax.random.split(jax.random.key(0), 16)))

    def step(state, batch):
        # A key a row, which the compiler, left to itself, would split as the rows are.
        return state.replace(rng=jax.vmap(jax.random.fold_in)(state.rng, batch["x"][:, 0].astype(int))), {}

    state, _ = strategy.compile(step)(state, strategy.shard_batch(BATCH))
    assert state.rng.sharding.is_fully_replicated


@pytest.mark.devices(8)
@every_strategy
def test_a_key_put_into_the_state_is_laid_out_by_the_next_step(kind):
    strategy = STRATEGIES[kind]()
    step, batch = jaxpar.make_train_step(loss_fn, strategy), strategy.shard_batch(BATCH)
    state, _ = step(start(strategy), batch)
    state, _ = step(state.replace(rng=jax.random.key(5)), batch)
    assert len(state.rng.sharding.device_set) == 8
    assert jax.random.key_data(state.rng).tolist() == jax.random.key_data(jax.random.key(5)).tolist()


# lower: before anything exists


@every_strategy
def test_a_step_is_lowered_from_shapes_alone(kind):
    strategy = STRATEGIES[kind]()
    batch = {"x": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
    before = {id(array) for array in jax.live_arrays()}
    step = jaxpar.make_train_step(loss_fn, strategy)
    text = step.lower(strategy.abstract_state(init_fn), batch).as_text()
    assert "main" in text
    assert not {id(array) for array in jax.live_arrays()} - before


def test_what_is_lowered_is_what_runs():
    strategy = STRATEGIES["fsdp"]()
    step = jaxpar.make_train_step(loss_fn, strategy)
    state = start(strategy)
    of_shapes = step.lower(
        strategy.abstract_state(init_fn), jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), BATCH)
    )
    of_arrays = step.lower(state, BATCH)
    assert of_shapes.as_text() == of_arrays.as_text()


# random keys


@pytest.mark.devices(8)
@every_strategy
def test_the_loss_gets_the_key_of_the_state_folded_with_the_step(kind):
    strategy = STRATEGIES[kind]()

    def loss_with_noise(model, batch, rng):
        loss, _ = loss_fn(model, batch, rng)
        return loss, {"noise": jax.random.uniform(rng)}

    state = start(strategy)
    expected = []
    shards = range(8) if kind == "pmap" else [None]
    for number in range(2):
        keys = [jax.random.fold_in(jax.random.fold_in(state.rng, number), 0)]
        keys = [keys[0] if shard is None else jax.random.fold_in(keys[0], shard) for shard in shards]
        expected.append(np.mean([float(jax.random.uniform(key)) for key in keys]))
    step, found = jaxpar.make_train_step(loss_with_noise, strategy), []
    for _ in range(2):
        state, metrics = step(state, strategy.shard_batch(BATCH))
        found.append(float(metrics["noise"]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] != found[1]


# the value itself


@pytest.mark.devices(8)
@every_strategy
def test_a_strategy_is_a_value_that_says_how_it_was_made(kind):
    strategy = STRATEGIES[kind]()
    assert {strategy: 1}[strategy] == 1
    assert repr(strategy).startswith(("sharded({", "data_parallel(8 devices"))
    with pytest.raises(AttributeError):
        strategy.mesh = None


@pytest.mark.parametrize("axis_name", ["data", "batch", "i"])
def test_pmaps_axis_may_have_any_name(axis_name):
    strategy = jaxpar.data_parallel(axis_name=axis_name)
    step = strategy.compile(lambda state, batch: (state, jax.lax.psum(batch["x"].sum(), axis_name)))
    state = jax.device_put(jnp.zeros(()), jax.NamedSharding(strategy.mesh, P()))
    _, total = step(state, strategy.shard_batch({"x": np.arange(16.0)}))
    assert float(total) == 120


@pytest.mark.parametrize("count", [1, 2, 5])
def test_pmap_takes_some_of_the_devices(count):
    strategy = jaxpar.data_parallel(jax.devices()[-count:])
    state = start(strategy)
    batch = {"x": np.ones((count * 2, 32), "float32")}
    state, metrics = jaxpar.make_train_step(loss_fn, strategy)(state, strategy.shard_batch(batch))
    assert state.params["up"]["kernel"].sharding.device_set == set(jax.devices()[-count:])
    assert state.params["up"]["kernel"].shape == (32, 64)
    assert np.isfinite(float(metrics["loss"]))
