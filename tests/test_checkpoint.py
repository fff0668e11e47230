"""Checkpoints: any layout to any other bit for bit, damage of every kind refused, and what can't be named."""

import functools
import json
import pathlib
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import sub_mesh
from orbax.checkpoint import v1

import jaxpar
from jaxpar import checkpoint as checkpoint_module
from jaxpar.checkpoint import CheckpointError, Checkpoints, CheckpointWarning, describe_checkpoint
from jaxpar.manifest import NAME, _digest_of, write_manifest
from jaxpar.state import is_key, named_leaves


class Layers(nnx.Module):
    """A stack of layers, and an embedding and a head: every kind of axis has something to split."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=4)(make)(rngs)
        self.up, self.down = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)


def init_fn(rng, tx=None, width=None):
    return jaxpar.TrainState.create(Layers(nnx.Rngs(rng)), optax.adamw(1e-2) if tx is None else tx)


RULES = {
    "stage": jaxpar.PIPELINE,
    "model": jaxpar.MEGATRON,
    "fsdp": jaxpar.fsdp(min_size=1),
}


def sharded(**axes):
    mesh = sub_mesh(**axes)
    return jaxpar.sharded(mesh, *(rules for axis, rules in RULES.items() if axis in mesh.shape))


STRATEGIES = {
    "one": lambda: sharded(data=1),
    "pmap": lambda: jaxpar.data_parallel(jax.devices()[:4]),
    "data": lambda: sharded(data=8),
    "zero1": lambda: jaxpar.sharded(sub_mesh(data=4), jaxpar.zero1(min_size=1)),
    "fsdp": lambda: sharded(fsdp=8),
    "fsdp2": lambda: sharded(fsdp=2),
    "fsdp x model": lambda: sharded(fsdp=2, model=4),
    "stage x model": lambda: sharded(stage=2, model=2),
    "data x stage": lambda: sharded(data=2, stage=4),
}
# Each to the next, and each back to one device.
PAIRS = list(zip(STRATEGIES, [*list(STRATEGIES)[1:], "one"], strict=True))
PAIRS += [("fsdp x model", "pmap"), ("data x stage", "fsdp"), ("stage x model", "data"), ("fsdp", "fsdp2")]


@functools.cache
def start(name):
    strategy = STRATEGIES[name]()
    return strategy, strategy.init(init_fn, jax.random.key(3))


def values(state):
    return {path: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for path, leaf in named_leaves(state)}


FAST = {("one", "pmap"), ("pmap", "data"), ("fsdp x model", "pmap"), ("data x stage", "fsdp"), ("fsdp", "fsdp2")}


@pytest.mark.parametrize(
    ("source", "target"),
    [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in dict.fromkeys(PAIRS)],
)
def test_a_checkpoint_restores_under_any_other_layout_bit_for_bit(tmp_path, source, target):
    _, state = start(source)
    strategy, other = start(target)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(state, data={"place": 7})
        restored = checkpoints.restore(strategy.abstract_state(init_fn))
    assert (restored.step, restored.data) == (0, {"place": 7})
    for path, value in values(state).items():
        np.testing.assert_array_equal(values(restored.state)[path], value)
    for leaf, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(other), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
        assert leaf.dtype == expected.dtype


def test_a_restored_state_keeps_the_targets_static_part_and_its_step_runs_on(tmp_path):
    strategy, state = start("fsdp")
    step = strategy.compile(lambda state, batch: (state, batch["x"].sum()))
    batch = strategy.shard_batch({"x": np.ones(8)})
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    step(restored.state, batch)
    assert len(step._runs) == 1


def test_what_is_saved_is_what_was_there_though_the_step_takes_over_its_memory(tmp_path):
    strategy = STRATEGIES["fsdp"]()
    state = strategy.place(jnp.arange(2**16, dtype=jnp.float32).reshape(256, 256))
    add = strategy.compile(lambda state, batch: (state + 1, {}))
    batch = strategy.shard_batch({"x": np.ones(8)})
    with Checkpoints(tmp_path, every=1, keep=None) as checkpoints:
        for number in range(4):
            checkpoints.save({"w": state}, step=number)
            state, _ = add(state, batch)
        like = {"w": jax.ShapeDtypeStruct(state.shape, state.dtype, sharding=state.sharding)}
        for number in range(4):
            found = checkpoints.restore(like, step=number).state["w"]
            np.testing.assert_array_equal(found, np.arange(2**16).reshape(256, 256) + number)


def test_the_last_few_are_kept_and_only_the_steps_asked_for(tmp_path):
    state = {"w": jnp.ones(4)}
    with Checkpoints(tmp_path, every=5, keep=2) as checkpoints:
        saved = [checkpoints.save(state, step=number) for number in range(21)]
        assert saved == [number % 5 == 0 for number in range(21)]
        assert checkpoints.save(state, step=21, force=True)
        checkpoints.wait()
        assert checkpoints.steps == [20, 21]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    _, state = start("fsdp x model")
    with Checkpoints(folder, every=1) as checkpoints:
        for number in (1, 2):
            checkpoints.save(state, step=number)
    return folder


def copy_of(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def seal(path, told):
    """Writes a changed manifest with a digest that fits, as only someone who means to does."""
    told.pop("digest")
    path.write_text(json.dumps({**told, "digest": _digest_of(told)}))


def damage(folder, draw):
    """Changes a file of a checkpoint, as `draw` decides; returns what it did."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, kind = draw.choice(files), draw.choice(["flip", "flip", "flip", "cut", "grow", "delete", "empty"])
    data = bytearray(path.read_bytes())
    if kind == "flip" and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        data = data[: draw.randrange(len(data) + 1)]
    elif kind == "grow":
        data += b"\0" * 7
    elif kind == "empty":
        data = bytearray()
    path.unlink() if kind == "delete" else path.write_bytes(data)
    return f"{kind} {path.name}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_damage_is_refused(saved, tmp_path, seed):
    folder, draw = copy_of(saved, tmp_path), random.Random(seed)
    strategy, state = start("fsdp")
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    told = damage(folder / "2", draw)
    changed = before != {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with Checkpoints(folder, every=1) as checkpoints:
        if changed:
            with pytest.raises(CheckpointError, match="Checkpoint 2 must not be restored"):
                checkpoints.restore(strategy.abstract_state(init_fn), step=2)
        restored = checkpoints.restore(strategy.abstract_state(init_fn), step=1)
    assert all((values(restored.state)[path] == value).all() for path, value in values(state).items()), told


@pytest.mark.parametrize("seed", range(8))
def test_of_damaged_ones_the_one_before_is_taken_and_named(saved, tmp_path, seed):
    folder = copy_of(saved, tmp_path)
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file() and path.stat().st_size)
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    strategy, _ = start("fsdp")
    with Checkpoints(folder, every=1) as checkpoints:
        with pytest.warns(CheckpointWarning, match=r"2 .*or delete its folder\. An older one, 1, is taken"):
            assert checkpoints.restore(strategy.abstract_state(init_fn)).step == 1
        with pytest.raises(CheckpointError, match=r"Checkpoint 2 .*Others in .* are \[1"):
            checkpoints.restore(strategy.abstract_state(init_fn), step=2)


def test_a_save_that_was_cut_off_is_passed_over_and_written_anew(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    (folder / "2" / NAME).unlink()
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    strategy, state = start("fsdp")
    with Checkpoints(folder, every=1) as checkpoints:
        assert checkpoints.steps == [1]
        assert checkpoints.restore(strategy.abstract_state(init_fn)).step == 1
        with pytest.raises(CheckpointError, match="its save was not finished"):
            checkpoints.restore(strategy.abstract_state(init_fn), step=2)
        checkpoints.save(state, step=2)
        checkpoints.wait()
        assert checkpoints.steps == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["content"]["leaves"].pop("step"), r"lacks 1 of \d+ leaves: step"),
        (
            lambda told: told["content"]["leaves"].update(more=[[1], "float32"]),
            "has 1 leaves that the state lacks: more",
        ),
        (lambda told: told["content"]["leaves"].update(step=[[], "float32"]), r"has 'step' as \(\) float32, but"),
        (lambda told: told["content"]["leaves"].update(step=3), "lists no leaves"),
        (
            lambda told: told.update(format=9),
            r"by a newer jaxpar, in format 9, and this one reads 1; upgrade jaxpar\. Others .* \[1",
        ),
        (lambda told: told.update(format=9, files=[]), "written by a newer jaxpar, in format 9"),
        (lambda told: told.update(format=0), "has format 0; this jaxpar reads 1"),
        (lambda told: told.update(files=[]), "is damaged"),
        (lambda told: told["files"].update({"../../x": [1, "0"]}), "is missing"),
    ],
)
def test_a_manifest_is_read_with_care(saved, tmp_path, change, message):
    folder = copy_of(saved, tmp_path)
    path = folder / "2" / NAME
    told = json.loads(path.read_text())
    change(told)
    seal(path, told)
    strategy, _ = start("fsdp")
    with Checkpoints(folder, every=1) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(strategy.abstract_state(init_fn), step=2)


def test_a_changed_dtype_or_shape_is_no_silent_cast(tmp_path):
    state = {"w": jnp.ones((4, 2)), "n": jnp.int32(3)}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(state, step=1)
        for like, message in (
            ({"w": jnp.ones((4, 2)), "n": jnp.float32(3)}, r"has 'n' as \(\) int32, but the state needs \(\) float32"),
            ({"w": jnp.ones((2, 4)), "n": jnp.int32(3)}, r"has 'w' as \(4, 2\) float32, but the state needs \(2, 4\)"),
            ({"v": jnp.ones((4, 2)), "n": jnp.int32(3)}, "lacks 1 of 2 leaves: v; it has 2"),
        ):
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(like)
        path = tmp_path / "1" / NAME
        told = json.loads(path.read_text())
        told["content"]["leaves"]["n"] = [[], "float32"]
        seal(path, told)
        with pytest.raises(CheckpointError, match=r"Checkpoint 1 stores \(\) int32 as 'n', but its manifest says"):
            checkpoints.restore({"w": jnp.ones((4, 2)), "n": jnp.float32(3)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directory": ""}, "directory is ''; give the path of a folder"),
        ({"directory": "a\0b"}, "give the path of a folder"),
        ({"directory": 3}, "directory is 3; give the path of a folder"),
        ({"directory": "gs://bucket/run"}, "a store's address; give a folder"),
        ({"every": 0}, "every is 0; give a whole number, 1 or more"),
        ({"keep": True}, "keep is True; give a whole number, 1 or more"),
        (
            {"directory": "/dev/null/x"},
            "The checkpoint folder /dev/null/x can't be made: Not a directory; a file stands where a folder is needed: "
            "give another path",
        ),
        ({"directory": __file__}, "can't be made: File exists; a file is there already: give a folder's path"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(**{"directory": tmp_path, **arguments})


def test_an_init_fn_in_place_of_a_state_is_named(tmp_path):
    def init_fn(rng):
        return {"w": jnp.ones(4)}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"w": jnp.ones(4)}, step=0)
        with pytest.raises(CheckpointError, match=r"The state is the function init_fn; give .*abstract_state\(init_fn"):
            checkpoints.restore(init_fn)
        for options in ({}, {"step": 0}):
            with pytest.raises(CheckpointError, match=r"The state is a partial; give .*abstract_state\(init_fn"):
                checkpoints.save(functools.partial(init_fn, None), **options)


def test_a_folder_that_vanished_fails_the_next_call_and_no_other(tmp_path):
    state = {"w": jnp.ones(4)}
    checkpoints = Checkpoints(tmp_path / "gone", every=1)
    checkpoints.save(state, step=1)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").write_text("a file")
    with pytest.raises(CheckpointError, match=r"The checkpoint folder .*gone can't be read: Not a directory"):
        checkpoints.save(state, step=2)
    (tmp_path / "gone").unlink()
    (tmp_path / "gone").mkdir()
    checkpoints.save(state, step=3)
    checkpoints.close()
    assert checkpoints.steps == [3]


def test_a_folder_that_is_only_read_keeps_what_it_has(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    (folder / "5.orbax-checkpoint-tmp-1").mkdir()
    (folder / "007").mkdir()
    strategy, _ = start("fsdp")
    with Checkpoints(folder, every=1, keep=1) as checkpoints:
        assert checkpoints.restore(strategy.abstract_state(init_fn), step=1).step == 1
    assert checkpoints.steps == [1, 2]
    # It may be another's save under way.
    assert (folder / "5.orbax-checkpoint-tmp-1").exists()


def test_a_folder_that_vanished_is_made_anew(tmp_path):
    with Checkpoints(tmp_path / "gone", every=1) as checkpoints:
        for number in (1, 2):
            checkpoints.save({"w": jnp.ones(4)}, step=number)
            checkpoints.wait()
            assert checkpoints.steps == [number]
            shutil.rmtree(tmp_path / "gone")


def test_empty_leaves_and_narrow_ones_come_back(tmp_path):
    state = {"none": jnp.ones((0, 3)), "half": jnp.ones(3, jnp.bfloat16), "key": jax.random.key(1), "one": jnp.int32(1)}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(state, step=1)
        found = checkpoints.restore(state).state
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in state.items()
    }
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(state["key"])).all()


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {"step": 1}, "Two leaves of the state have the path 'a/b'"),
        ({"a": np.ones(1)}, {"step": 1}, "State leaf 'a' is a ndarray, of no devices; give a state that"),
        ({"a": jnp.ones(1)}, {"step": 1, "data": {"n": np.int64(3)}}, "data is .*; give what JSON takes"),
        ({"a": jnp.ones(1)}, {"step": 1, "data": (1, 2)}, r"data is \(1, 2\); give what JSON takes"),
        (
            {"a": jnp.ones(1)},
            {"force": True},
            r"The state has no step of its own; give save\(state, step=n\)\.",
        ),
        ({"a": jnp.ones(1)}, {"step": 2**31}, "step is 2147483648; give a whole number"),
        ({"a": jnp.ones(1)}, {"step": jnp.float32(2.5)}, "step is 2.5; give a whole number"),
        ({}, {"step": 1}, "The state has no array that holds anything"),
    ],
)
def test_what_cannot_be_saved_is_named_at_once(tmp_path, state, options, message):
    with Checkpoints(tmp_path, every=1) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.save(state, **options)


@pytest.mark.parametrize("step", ["x", 2.5, True, -1, 2**31, [1]], ids=str)
@pytest.mark.parametrize("method", ["save", "verify", "restore"])
def test_a_step_that_is_no_whole_number_is_named(tmp_path, method, step):
    state = {"a": jnp.ones(1)}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        call = {
            "save": lambda: checkpoints.save(state, step=step),
            "verify": lambda: checkpoints.verify(step),
            "restore": lambda: checkpoints.restore(state, step=step),
        }[method]
        message = f"step is {step!r}; give a whole number, 0 or more and less than 2147483648."
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            call()
        assert checkpoints.steps == []


def test_no_step_to_verify_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="step is None; give a whole"):
        checkpoints.verify(None)


def test_a_step_may_be_a_number_of_numpys_or_the_states_own(tmp_path):
    state = {"a": jnp.ones(1)}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        for step in (np.int64(3), jnp.int32(4), np.array(5)):
            checkpoints.save(state, step=step)
        checkpoints.wait()
        assert checkpoints.steps == [3, 4, 5]
        assert checkpoints.verify(np.int64(3))["step"] == 3
        assert checkpoints.restore(state, step=jnp.int32(4)).step == 4


def test_a_file_replaced_by_a_link_to_nothing_is_damage(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    path = next(path for path in sorted((folder / "2").rglob("*")) if path.is_file() and path.name != NAME)
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    strategy, _ = start("fsdp")
    with Checkpoints(folder, every=1) as checkpoints, pytest.warns(CheckpointWarning, match="is a link"):
        assert checkpoints.restore(strategy.abstract_state(init_fn)).step == 1


@pytest.mark.parametrize(
    ("step", "message"),
    [(None, "has no checkpoint that can be restored"), (5, "Checkpoint 5 must not be restored: .* has no other")],
)
def test_an_empty_folder_has_nothing_to_restore_and_says_what_to_do(tmp_path, step, message):
    next_step = r"; save one first, or give the folder that holds them \(its subfolders are numbers\)\.$"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message + next_step):
        checkpoints.restore({"w": jnp.ones(4)}, step=step)


def test_a_checkpoint_tells_of_itself(saved):
    told = describe_checkpoint(saved / "1")
    assert (told["step"], told["devices"], told["processes"]) == (1, 8, 1)
    assert told["bytes"] > 1000
    with pytest.raises(CheckpointError, match="its save was not finished"):
        describe_checkpoint(pathlib.Path("/tmp"))


def test_a_step_that_is_saved_anew_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    there = []

    def write(folder, content):
        # What a kill would leave by now.
        there.append((tmp_path / "1" / NAME).exists() and jaxpar.Checkpoints(tmp_path).restore(like).state["w"][0])
        write_manifest(folder, content)

    monkeypatch.setattr(checkpoint_module, "write_manifest", write)
    like = {"w": jnp.zeros(4)}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        for value in (1.0, 2.0, 3.0):
            checkpoints.save({"w": jnp.full(4, value)}, step=1)
        assert checkpoints.restore(like).state["w"][0] == 3
    assert there == [False, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_what_a_save_in_anothers_place_has_left_is_removed_by_the_next(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    shutil.copytree(folder / "2", folder / "2.jaxpar-new")
    shutil.copytree(folder / "2", folder / "2.jaxpar-before")
    with Checkpoints(folder, every=1) as checkpoints:
        assert checkpoints.steps == [1, 2]
        checkpoints.save({"w": jnp.ones(4)}, step=3)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_a_kill_between_the_two_renames_of_a_save_anew_loses_nothing(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    cut_off = lambda: (folder / "2").rename(folder / "2.jaxpar-before")
    cut_off()
    shutil.copytree(folder / "1", folder / "2.jaxpar-new")
    (folder / ".jaxpar-before").mkdir()
    strategy, _ = start("fsdp")
    with Checkpoints(folder, every=1) as checkpoints:
        assert checkpoints.restore(strategy.abstract_state(init_fn)).step == 2
        cut_off()
        checkpoints.save({"w": jnp.ones(4)}, step=3)
        checkpoints.wait()
        assert checkpoints.steps == [1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_of_several_damaged_ones_each_is_told_with_what_is_taken_in_the_end(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    for step in (3, 4):
        shutil.copytree(folder / "2", folder / str(step))
        (folder / str(step) / "more").touch()
    strategy, _ = start("fsdp")
    with Checkpoints(folder, every=1) as checkpoints, pytest.warns(CheckpointWarning) as told:
        assert checkpoints.restore(strategy.abstract_state(init_fn)).step == 2
    messages = [str(warning.message) for warning in told]
    assert [message.split()[1] for message in messages] == ["4", "3"]
    assert all(message.endswith("An older one, 2, is taken.") for message in messages)


def test_a_newer_jaxpars_checkpoint_is_not_passed_over_for_an_older_one(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    path = folder / "2" / NAME
    path.write_text(json.dumps({"format": 2}))
    strategy, _ = start("fsdp")
    with Checkpoints(folder, every=1) as checkpoints, pytest.raises(CheckpointError, match=r"2 .*; upgrade jaxpar\."):
        checkpoints.restore(strategy.abstract_state(init_fn))
    with pytest.raises(CheckpointError, match=r"this one reads 1; upgrade jaxpar\.$"):
        describe_checkpoint(folder / "2")


def test_a_process_waits_for_others_longer_the_more_they_write(tmp_path, monkeypatch, capfd):
    made = []
    make = v1.Context
    monkeypatch.setattr(v1, "Context", lambda: made.append(make()) or made[-1])
    monkeypatch.setattr(checkpoint_module, "_BYTES_A_SECOND", 1024)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        for size in (1, 2**10, 2**20):
            checkpoints.save({"w": jnp.zeros(size)}, step=1)
    assert [context.async_options.timeout_secs for context in made] == [120, 124, 1200]
    # Orbax would warn at each save of options that it takes no more.
    assert "deprecated" not in capfd.readouterr().err


def test_a_step_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    init_fn = lambda rng: jaxpar.TrainState.create({"params": {"w": jnp.ones(8)}}, optax.sgd(0.1))
    with jaxpar.Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(strategy.init(init_fn, jax.random.key(0)), step=3)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"there is no .*7; give a step that is there\. Others .* are \[3\]"):
            checkpoints.restore(strategy.abstract_state(init_fn), step=7)
