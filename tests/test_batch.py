"""Batches: whatever NumPy can view is read, counted, split and padded, and its padding counts for nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar.batch import EXAMPLE_WEIGHT, count_rows, match_path, read_batch

N = 8


class Tensor:
    """As a torch tensor on the CPU: no NumPy array, but NumPy can view it."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def __array__(self, dtype=None, copy=None):
        return self.array.astype(dtype or self.array.dtype)


STRATEGIES = {
    "pmap": jaxpar.data_parallel,
    "data": lambda: jaxpar.sharded(jaxpar.make_mesh(data=8)),
    "data_model": lambda: jaxpar.sharded(jaxpar.make_mesh(data=2, model=4), jaxpar.MEGATRON),
    "fsdp": lambda: jaxpar.sharded(jaxpar.make_mesh(data=2, fsdp=4), jaxpar.FSDP),
}

# What is given, and the shape and dtype that its one leaf is read as.
READ = {
    "float64": (np.ones((8, 2)), (8, 2), "float32"),
    "float32": (np.ones((8, 2), "float32"), (8, 2), "float32"),
    "float16": (np.ones((8, 2), "float16"), (8, 2), "float16"),
    "bfloat16": (jnp.ones((8, 2), "bfloat16"), (8, 2), "bfloat16"),
    "int64 that fits": (np.full(8, 2**31 - 1), (8,), "int32"),
    "uint8": (np.ones((8, 2), "uint8"), (8, 2), "uint8"),
    "bool": (np.ones(8, bool), (8,), "bool"),
    "complex": (np.ones(8, complex), (8,), "complex64"),
    "a list": ([1, 2, 3], (3,), "int32"),
    "a list of lists": ([[1.0, 2.0], [3.0, 4.0]], (2, 2), "float32"),
    "a list of bools": ([True, False], (2,), "bool"),
    "a range": (range(8), (8,), "int32"),
    "a torch tensor": (Tensor(np.ones((8, 2))), (8, 2), "float32"),
    "a torch tensor of whole numbers": (Tensor(np.arange(8)), (8,), "int32"),
    "a JAX array": (jnp.ones((8, 2)), (8, 2), "float32"),
    "a NumPy scalar": (np.float64(1), (), "float32"),
    "a number": (3, (), "int32"),
    "keys": (jax.random.split(jax.random.key(0), 8), (8,), "key<fry>"),
    "strided": (np.ones((8, 4))[:, ::2], (8, 2), "float32"),
    "big-endian": (np.ones(8, ">f4"), (8,), "float32"),
    "no column": (np.ones((8, 0)), (8, 0), "float32"),
}


@pytest.mark.parametrize(("given", "shape", "dtype"), READ.values(), ids=READ)
def test_what_numpy_can_view_is_read(given, shape, dtype):
    leaf = read_batch({"x": given})["x"]
    assert (leaf.shape, str(leaf.dtype)) == (shape, dtype)


def test_nests_of_every_kind_are_batches():
    batch = {"a": (np.ones(8), [np.ones(8), {"b": Tensor(np.ones(8))}]), "none": None}
    assert jax.tree.map(np.shape, read_batch(batch)) == {"a": ((8,), [(8,), {"b": (8,)}]), "none": None}


def test_a_batch_may_be_one_array():
    assert read_batch(np.ones(8)).shape == (8,)


def test_shapes_are_read_as_they_are():
    shape = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    assert read_batch({"x": shape}) == {"x": shape}


def test_a_batch_is_read_without_a_change_to_the_callers_arrays():
    given = {"x": np.ones((8, 2)), "y": [1, 2, 3]}
    read_batch(given)
    assert given["x"].dtype == np.float64
    assert given["y"] == [1, 2, 3]


def test_rows_are_counted_but_for_scalars_and_shared_leaves():
    batch = {"x": np.ones((30, 4)), "t": np.ones(()), "table": np.ones((5, 2))}
    assert count_rows(batch, lambda path: path == "table") == 30


@pytest.mark.parametrize(
    ("batch", "paths"),
    [({"in": {"x": 1}}, ["in/x"]), ((1, 2), ["0", "1"]), (1, [""]), ({"a": [1, 2]}, ["a/0", "a/1"])],
)
def test_batch_rules_see_the_path(batch, paths):
    assert [match_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(batch)] == paths


# splitting, around the number of shards


@pytest.mark.devices(8)
@pytest.mark.parametrize("rows", [1, N - 1, N, N + 1, 2 * N, 5 * N - 1, 5 * N, 5 * N + 1])
@pytest.mark.parametrize("kind", ["pmap", "data"])
def test_rows_are_split_if_they_divide_and_named_if_not(kind, rows):
    strategy = STRATEGIES[kind]()
    batch = {"x": np.arange(rows * 3.0).reshape(rows, 3), "t": np.float32(2)}
    if rows % N == 0:
        placed = strategy.shard_batch(batch)
        np.testing.assert_array_equal(np.asarray(placed["x"]).reshape(rows, 3), batch["x"])
        assert {shard.data.size for shard in placed["x"].addressable_shards} == {rows * 3 // N}
    else:
        up, down = rows + N - rows % N, rows - rows % N
        message = rf"\['x'\] has {rows} examples, which do not divide by 8 data shards; pad to {up} with"
        with pytest.raises(jaxpar.BatchError, match=message) as caught:
            strategy.shard_batch(batch)
        assert (f"or use {down}" in str(caught.value)) == (down > 0)


@pytest.mark.parametrize("rows", [1, N - 1, N, N + 1, 5 * N - 1, 5 * N, 5 * N + 1])
def test_a_padded_batch_can_be_split(rows):
    strategy = STRATEGIES["data"]()
    placed = strategy.shard_batch(jaxpar.pad_batch({"x": np.ones((rows, 3))}, N))
    assert placed["x"].shape[0] == -(-rows // N) * N
    assert float(placed[EXAMPLE_WEIGHT].sum()) == rows


# The mesh, the leaf's shape, and its spec by default.
DEFAULTS = [
    ({"data": 8}, (16,), P("data")),
    ({"data": 8}, (16, 3, 2), P("data", None, None)),
    ({"data": 8}, (), P()),
    ({"data": 2, "fsdp": 4}, (16, 3), P(("data", "fsdp"), None)),
    ({"data": 2, "fsdp": 2, "expert": 2}, (16, 3), P(("data", "fsdp", "expert"), None)),
    ({"data": 2, "context": 4}, (16, 8), P("data", "context")),
    ({"data": 2, "context": 4}, (16,), P("data")),
    ({"data": 2, "context": 4}, (16, 8, 5), P("data", "context", None)),
    ({"context": 8}, (16, 8), P(None, "context")),
    ({"data": 2, "model": 4}, (16, 3), P("data", None)),
    ({"model": 8}, (16, 3), P(None, None)),
    ({"data": 2, "stage": 4}, (16, 3), P("data", None)),
]


@pytest.mark.parametrize(("sizes", "shape", "spec"), DEFAULTS)
def test_the_default_lays_examples_over_the_batch_axes_and_the_sequence_over_context(sizes, shape, spec):
    strategy = jaxpar.sharded(jaxpar.make_mesh(**sizes))
    batch = {"x": np.zeros(shape), "rows": np.zeros(16)}
    assert strategy.shard_batch(batch)["x"].sharding.spec == spec
    assert strategy.abstract_batch(batch)["x"].sharding.spec == spec


def test_a_leaf_without_rows_is_not_padded_where_it_is_named():
    padded = jaxpar.pad_batch({"x": np.arange(6), "table": np.eye(3)}, 4, whole=["^table$"])
    assert padded["table"].shape == (3, 3)
    assert padded["example_weight"].tolist() == [1] * 6 + [0] * 2
    with pytest.raises(jaxpar.BatchError, match=r"pad_batch\(\.\.\., whole=\[regex\]\)"):
        jaxpar.pad_batch({"x": np.arange(6), "table": np.eye(3)}, 4)
    with pytest.raises(jaxpar.BatchError, match=r"whole= is 'table'; give a list of regexes"):
        jaxpar.pad_batch({"x": np.arange(6)}, 4, whole="table")


@pytest.mark.parametrize("weight", [-jnp.ones(8), jnp.full(8, jnp.nan), np.array([1.0] * 7 + [-2])])
def test_weights_below_0_are_named_on_devices_too(weight):
    with pytest.raises(
        jaxpar.BatchError, match=r"'example_weight'.* holds (-1.0|nan|-2.0); a weight is 0 or more: give 0 to leave"
    ):
        jaxpar.pad_batch({"x": np.arange(8), "example_weight": weight}, 8)


def test_a_whole_leaf_is_on_every_device_and_not_counted():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=8), batch_rules=[("table", jaxpar.WHOLE)])
    placed = strategy.shard_batch({"x": np.ones((16, 2)), "table": np.arange(5.0)})
    assert placed["table"].sharding.is_fully_replicated
    assert placed["x"].sharding.spec == P("data", None)
    padded = jaxpar.pad_batch({"x": np.ones((13, 2))}, 8)
    assert strategy.shard_batch({**padded, "table": np.arange(5.0)})["x"].shape == (16, 2)


def test_batch_rules_come_before_the_default_and_leave_it_the_rest():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=2, model=4), batch_rules=[("image", P(None, "model"))])
    placed = strategy.shard_batch({"image": np.ones((4, 8)), "label": np.ones(4)})
    assert placed["image"].sharding.spec == P("data", "model")
    assert placed["label"].sharding.spec == P("data")


@pytest.mark.parametrize("kind", STRATEGIES)
def test_shapes_foretell_what_shard_batch_gives(kind):
    strategy = STRATEGIES[kind]()
    batch = {"x": np.ones((16, 4)), "y": np.arange(16), "t": np.float32(1)}
    placed, foretold = strategy.shard_batch(batch), strategy.abstract_batch(batch)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), batch)
    for told in (foretold, strategy.abstract_batch(shapes)):
        same = jax.tree.map(lambda a, b: (a.shape, a.sharding) == (b.shape, b.sharding), placed, told)
        assert all(jax.tree.leaves(same))


def test_a_batch_that_is_placed_already_is_taken_as_it_is():
    strategy = STRATEGIES["data"]()
    placed = strategy.shard_batch({"x": np.ones((16, 4))})
    assert strategy.shard_batch(placed)["x"].sharding == placed["x"].sharding


# padding

PADDED = [(1, 8, 8), (7, 8, 8), (8, 8, 8), (9, 8, 16), (39, 8, 40), (41, 8, 48), (3, 1, 3), (5, 7, 7)]


@pytest.mark.parametrize(("rows", "multiple", "target"), PADDED)
def test_rows_are_added_up_to_the_next_multiple_with_weight_zero(rows, multiple, target):
    batch = {"x": np.arange(rows * 2).reshape(rows, 2), "y": jnp.arange(rows), "t": 3.0}
    padded = jaxpar.pad_batch(batch, multiple)
    assert padded["x"].shape == (target, 2)
    assert (padded["x"][:rows] == batch["x"]).all()
    assert (padded["x"][rows:] == batch["x"][-1]).all()
    assert padded["t"].shape == ()
    np.testing.assert_array_equal(padded[EXAMPLE_WEIGHT], np.arange(target) < rows)
    assert padded[EXAMPLE_WEIGHT].dtype == np.float32


def test_a_jax_array_stays_one_and_a_numpy_array_too():
    padded = jaxpar.pad_batch({"x": jnp.ones(3), "y": np.ones(3), "keys": jax.random.split(jax.random.key(0), 3)}, 4)
    assert isinstance(padded["x"], jax.Array)
    assert isinstance(padded["y"], np.ndarray)
    assert padded["keys"].shape == (4,)


def test_the_weights_given_are_kept_and_padded_with_zero():
    padded = jaxpar.pad_batch({"x": np.ones(3), EXAMPLE_WEIGHT: [0.5, 2, 0]}, 4)
    np.testing.assert_array_equal(padded[EXAMPLE_WEIGHT], np.array([0.5, 2, 0, 0], "float32"))


def test_padding_twice_is_padding_once():
    once = jaxpar.pad_batch({"x": np.ones(3)}, 8)
    twice = jaxpar.pad_batch(once, 8)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), once, twice))


def init_fn(rng):
    return jaxpar.TrainState.create(nnx.Linear(4, 1, rngs=nnx.Rngs(rng)), optax.sgd(0.1))


def errors(model, batch):
    return (model(batch["x"])[:, 0] - batch["y"]) ** 2


# The same loss as a mean, as one value an example, and by token weights.
LOSSES = {
    "mean": lambda model, batch, rng: (errors(model, batch).mean(), {"mean": errors(model, batch).mean()}),
    "per example": lambda model, batch, rng: (errors(model, batch), {"rows": errors(model, batch)}),
    "weighted": lambda model, batch, rng: (
        jaxpar.Weighted((errors(model, batch) * batch["w"]).sum(), batch["w"].sum()),
        {},
    ),
    "weighted per example": lambda model, batch, rng: (
        jaxpar.Weighted(errors(model, batch) * batch["w"], batch["w"]),
        {},
    ),
}


def unpadded(rows=11):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(rows, 4)).astype("float32"),
        "y": rng.normal(size=rows).astype("float32"),
        "w": rng.integers(0, 3, rows).astype("float32"),
    }


def step_once(name, strategy, batch):
    state = strategy.place(init_fn(jax.random.key(0)))
    return jaxpar.make_train_step(LOSSES[name], strategy)(state, strategy.shard_batch(batch))


@functools.cache
def step_unpadded(name):
    return step_once(name, jaxpar.sharded(jaxpar.make_mesh(data=1, devices=jax.devices()[:1])), unpadded())


@pytest.mark.parametrize("kind", ["pmap", "data"])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_for_nothing_in_a_step(name, kind):
    alone, expected = step_unpadded(name)
    padded, found = step_once(name, STRATEGIES[kind](), jaxpar.pad_batch(unpadded(), 8))
    assert float(found["skipped"]) == 0
    for metric in expected:
        np.testing.assert_allclose(found[metric], expected[metric], rtol=1e-5)
    np.testing.assert_allclose(padded.params["kernel"], np.asarray(alone.params["kernel"]), rtol=1e-5, atol=1e-7)
