"""Disks that are full or read-only: the run goes on, and what was saved before is whole, as is what comes later."""

import contextlib
import errno
import itertools
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import sub_mesh

import jaxpar
from jaxpar import checkpoint as checkpoint_module
from jaxpar.checkpoint import CheckpointError, Checkpoints, CheckpointWarning

KIB = 1024


def mount(disk, options):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, check=False)


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MiB."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("a small disk needs root, to mount it")
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount(disk, "size=4m").returncode:
        pytest.skip("a small disk needs a right to mount it, which a container's root lacks")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk):
    """Leaves no room but for a page: what a neighbour's job does."""
    with (disk / "filler").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(os.urandom(16 * KIB))
            file.flush()
    with (disk / "filler").open("r+b") as file:
        file.truncate((disk / "filler").stat().st_size - 24 * KIB)


def make_state(number):
    """Half a MiB that can't be packed."""
    return {"w": jnp.asarray(np.random.default_rng(number).normal(size=(128, KIB)).astype("f4"))}


def restored(checkpoints, step):
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_state(0)
    )
    return checkpoints.restore(like, step=step).state


def check(checkpoints, steps):
    """Those steps are there, whole, and nothing else."""
    assert checkpoints.steps == steps
    for step in steps:
        np.testing.assert_array_equal(restored(checkpoints, step)["w"], make_state(step)["w"])


def save(checkpoints, step):
    checkpoints.save(make_state(step), step=step)
    checkpoints.wait()


def refused(message):
    return pytest.raises(CheckpointError, match=message)


def test_a_disk_that_is_full_is_told_before_anything_is_written(disk):
    with Checkpoints(disk / "run", every=1) as checkpoints:
        save(checkpoints, 1)
        fill(disk)
        with refused(
            r"The disk of .*run has [\d.]+ KiB free, but a checkpoint takes up to 512\.0 KiB; make room, or keep"
        ):
            save(checkpoints, 2)
        check(checkpoints, [1])
        (disk / "filler").unlink()
        save(checkpoints, 3)
        check(checkpoints, [1, 3])


@pytest.fixture
def lying(monkeypatch):
    """As with a quota, or a neighbour that fills the disk meanwhile: what is free isn't what can be written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))


def test_a_disk_that_fills_up_during_a_save_is_told_in_one_line(disk, lying, capfd):
    with Checkpoints(disk / "run", every=1) as checkpoints:
        save(checkpoints, 1)
        fill(disk)
        for number in (2, 3):
            message = r"A checkpoint in .*run can't be written: No space left on device; make room, or keep fewer\."
            with refused(message):
                save(checkpoints, number)
            check(checkpoints, [1])
        (disk / "filler").unlink()
        save(checkpoints, 4)
        check(checkpoints, [1, 4])
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["1", "4"]
    # Orbax would log its stack three times.
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_may_not_grow_is_told(tmp_path, lying):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1)
        # Python ignores the signal that would end the process.
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, before[1]))
        try:
            with refused("can't be written: File too large; raise the limit of a file's size, as by ulimit -f"):
                save(checkpoints, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        check(checkpoints, [1])
        save(checkpoints, 2)
        check(checkpoints, [1, 2])


def test_a_manifest_that_finds_no_room_leaves_nothing_that_is_offered(tmp_path, monkeypatch):
    def fail(folder, content):
        (folder / "jaxpar-manifest.json.part").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint_module, "write_manifest", fail)
            with refused("No space left on device; make room"):
                save(checkpoints, 2)
        check(checkpoints, [1])
        with refused("Checkpoint 2 must not be restored: .* its save was not finished; copy it again"):
            restored(checkpoints, 2)
        save(checkpoints, 3)
        check(checkpoints, [1, 3])
    # It took room.
    assert not (tmp_path / "2").exists()


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_disk_that_becomes_read_only_is_told_and_can_be_read(disk):
    with Checkpoints(disk / "run", every=1) as checkpoints:
        save(checkpoints, 1)
        remount(disk, "ro")
        with refused(
            r"Step 2 can't be saved in .*run: Read-only file system; give a folder that this process may write"
        ):
            save(checkpoints, 2)
        check(checkpoints, [1])
        remount(disk, "rw")
        save(checkpoints, 3)
        check(checkpoints, [1, 3])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read any folder")
def test_a_folder_that_may_not_be_written_or_read_is_told(tmp_path):
    with Checkpoints(tmp_path / "run", every=1) as checkpoints:
        save(checkpoints, 1)
        (tmp_path / "run").chmod(0o500)
        with refused("Step 2 can't be saved in .*: Permission denied; give a folder that this process may write"):
            save(checkpoints, 2)
        check(checkpoints, [1])
        (tmp_path / "run").chmod(0o000)
        with refused("The checkpoint folder .* can't be read: Permission denied"):
            checkpoints.restore(make_state(0))
        (tmp_path / "run").chmod(0o700)
        check(checkpoints, [1])


def init_fn(rng):
    return jaxpar.TrainState.create(nnx.Linear(256, 256, rngs=nnx.Rngs(rng)), optax.adam(1e-2))


def loss_fn(model, batch, rng):
    return ((model(batch["x"]) - batch["x"]) ** 2).mean(-1), {}


def batches(step):
    return ({"x": np.random.default_rng(n).normal(size=(8, 256)).astype("f4")} for n in itertools.count(step))


def failing(disk, how):
    """What makes saves fail, and what mends it."""
    filler = disk / "filler"
    return {
        "full": (lambda: fill(disk), filler.unlink),
        "read-only": (lambda: remount(disk, "ro"), lambda: remount(disk, "rw")),
    }[how]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_run_goes_on_and_saves_again_once_it_can(disk, lying, how):
    step = jaxpar.make_train_step(loss_fn, jaxpar.sharded(sub_mesh(fsdp=4), jaxpar.fsdp(min_size=1)))
    start = lambda: step.strategy.init(init_fn, jax.random.key(0))
    fail, mend = failing(disk, how)
    found = {}
    with Checkpoints(disk / "run", every=2, keep=None) as checkpoints:

        def on_step(number, metrics):
            if number == 3:
                # What is being saved is there before.
                checkpoints.wait()
                fail()
            if number == 7:
                if checkpoints._saving is not None:
                    # What is being saved meets the fault.
                    checkpoints._saving.thread.join()
                found["meanwhile"] = checkpoints.steps
                mend()

        with pytest.warns(CheckpointWarning) as told:
            state = jaxpar.fit(step, start(), batches, steps=10, checkpoint=checkpoints, on_step=on_step)
        assert int(state.step) == 10
        assert found["meanwhile"] == [2]
        # Steps 4 and 6 find no room; 8 is saved though 6 was told only then.
        assert checkpoints.steps == [2, 8, 10]
        for number in checkpoints.steps:
            checkpoints.verify(number)
    assert len(told) == 2
    cause = {"full": "No space left on device; make room", "read-only": "Read-only file system; give a folder"}[how]
    for warning in told:
        message = str(warning.message)
        assert cause in message
        assert str(disk / "run") in message
        assert message.endswith("The run goes on; the checkpoints before are as they were.")
        assert "\n" not in message
    assert sorted(path.name for path in pathlib.Path(disk / "run").iterdir()) == ["10", "2", "8"]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_of_two_processes_one_that_finds_no_room_holds_up_neither(tmp_path, which):
    program = pathlib.Path(__file__).parent / "full_process_program.py"
    command = [sys.executable, "-m", "jaxpar", "launch", "-n", "2", "--", sys.executable, str(program), str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run([*command, str(which)], env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"[{which}] failed 2") and "File too large; raise the limit" in line for line in lines)
    told = f"[{1 - which}] failed 2 A checkpoint in {tmp_path} can't be written: another process can't, and says why."
    assert told in lines
    for index in (0, 1):
        assert f"[{index}] whole [1, 3, 4]" in lines
