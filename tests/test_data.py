"""Batches in a shuffled order: one for any number of processes, found again by number, its last one filled up."""

import builtins
import types

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar
from jaxpar.data import DataError, TextWindows, load

pytest.importorskip("grain", reason="needs grain, as jaxpar[data] installs it")


def process(index, count, shards=4):
    """A strategy as one of several processes sees it."""
    return types.SimpleNamespace(name="sharded", num_shards=shards, data_shard=lambda: (index, count))


def values(batches, count=None):
    return [batch["x"].tolist() for _, batch in zip(range(10**6 if count is None else count), batches, strict=False)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_global_order_is_the_same_for_any_number_of_processes(count):
    source = {"x": np.arange(30)}
    parts = [load(source, process(index, count), batch_size=8, seed=3, epochs=2) for index in range(count)]
    joined = [[x for part in rows for x in part] for rows in zip(*map(values, parts), strict=True)]
    assert joined == values(load(source, process(0, 1), batch_size=8, seed=3, epochs=2))


def test_each_example_comes_once_an_epoch_in_another_order():
    batches = values(load({"x": np.arange(16)}, process(0, 1), batch_size=8, seed=1), 4)
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    assert first != values(load({"x": np.arange(16)}, process(0, 1), batch_size=8, seed=2), 2)[0]


@pytest.mark.parametrize("epochs", [None, 3])
def test_a_batch_is_found_again_by_its_number(epochs):
    batches = load({"x": np.arange(20)}, process(0, 1), batch_size=8, epochs=epochs)
    whole = values(batches, 7)
    assert values(batches(3), 4) == whole[3:7]
    assert values(batches, 7) == whole


def test_a_last_short_batch_is_filled_up_with_what_counts_for_nothing():
    found = [list(load({"x": np.arange(11)}, process(index, 2), batch_size=8, epochs=1)) for index in range(2)]
    assert [len(batches) for batches in found] == [2, 2]
    weights = np.concatenate([batches[1]["example_weight"] for batches in found])
    assert weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    kept = [x for batches in found for batch in batches for x in batch["x"][batch["example_weight"] > 0].tolist()]
    assert sorted(kept) == list(range(11))
    assert len(load({"x": np.arange(11)}, process(0, 1), batch_size=8, epochs=1)) == 2
    assert "example_weight" not in next(iter(load({"x": np.arange(16)}, process(0, 1), batch_size=8, epochs=1)))


def test_weights_of_the_sources_own_stay():
    source = {"x": np.arange(11), "example_weight": np.full(11, 0.5, "f4")}
    first, last = load(source, process(0, 1), batch_size=8, epochs=1)
    assert first["example_weight"].tolist() == [0.5] * 8
    assert last["example_weight"].tolist() == [0.5] * 3 + [0] * 5
    with pytest.raises(DataError, match="The batch to begin at is -1"):
        load(source, process(0, 1), batch_size=8)(-1)


def test_text_files_and_folders_are_windows(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 40)
    windows = TextWindows(tmp_path, length=16)
    assert len(windows) == 22
    assert windows[0]["x"].tobytes() == b"abcdefghijabcdef"
    assert (windows[-1]["x"] == windows[len(windows) - 1]["x"]).all()
    assert len(TextWindows(tmp_path, length=16, held_out=True)) == 2
    with pytest.raises(IndexError, match="There are 22 windows, from 0; 22 is none"):
        windows[22]
    batch = next(iter(load(windows, process(0, 1), batch_size=4)))
    assert batch["x"].shape == batch["y"].shape == (4, 16)


def test_a_run_goes_on_with_its_data(tmp_path):
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=2, devices=jax.devices()[:2]))
    init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(3, 3, rngs=nnx.Rngs(rng)), optax.sgd(0.1))
    step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(-1), {}), strategy)
    source = {"x": np.random.default_rng(0).normal(size=(13, 3)).astype("f4")}
    batches = load(source, strategy, batch_size=4, epochs=3)
    losses = []
    tell = lambda number, metrics: losses.append((number, metrics["loss"]))
    for folder, parts in (("whole", [10]), ("parts", [4, 10])):
        losses.append(folder)
        for steps in parts:
            with jaxpar.Checkpoints(tmp_path / folder, every=4) as checkpoints:
                state = strategy.init(init_fn, jax.random.key(0))
                jaxpar.fit(step, state, batches, steps=steps, checkpoint=checkpoints, on_step=tell)
    whole, parts = losses[1:11], losses[12:]
    assert parts == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"x": np.ones(3), "y": np.ones(4)}}, "arrays of {'x': 3, 'y': 4} rows; give arrays with the same"),
        ({"source": {"x": np.float32(1)}}, "arrays of {'x': None} rows"),
        ({"source": []}, "source has no example; give one with at least as many as batch_size"),
        ({"source": [1, 2]}, "An example is a int; give dicts of arrays"),
        ({"source": "folder"}, r"An example is a str; .* of a text file or folder, jaxpar.data.TextWindows\(path"),
        ({"source": iter([])}, "source is a list_iterator; give what has a length"),
        ({"batch_size": 6}, "batch_size is 6, which does not divide by 4, .* give 8"),
        ({"batch_size": 0}, "batch_size is 0; give a whole number, 1 or more"),
        ({"epochs": 1.5}, r"epochs is 1\.5; give a whole number, 1 or more"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 to 4294967295"),
    ],
)
def test_bad_data_is_named(changes, message):
    given = {"source": {"x": np.arange(8)}, "batch_size": 4, "seed": 0, "epochs": None, **changes}
    with pytest.raises(DataError, match=message):
        load(given.pop("source"), process(0, 1), **given)


def test_a_mesh_in_the_place_of_a_strategy_is_named():
    with pytest.raises(DataError, match=r"strategy is a Mesh; give what jaxpar\.sharded\(mesh"):
        load({"x": np.arange(8)}, jaxpar.make_mesh(data=8), batch_size=8)


def test_batches_without_end_have_no_length():
    with pytest.raises(TypeError, match="give epochs="):
        len(load({"x": np.arange(8)}, process(0, 1), batch_size=4))


def test_without_grain_the_one_command_is_given(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "grain":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"jaxpar.data needs grain: pip install 'jaxpar\[data\]'"):
        load({"x": np.arange(8)}, process(0, 1), batch_size=4)
