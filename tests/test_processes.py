"""Several real processes under `jax.distributed`: each loads its rows, and all compute what one process does."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import json, sys
    import jax

    address, count, index, devices = sys.argv[1], *map(int, sys.argv[2:])
    jax.config.update("jax_num_cpu_devices", devices)
    if count > 1:
        jax.distributed.initialize(
            address, count, index, coordinator_bind_address=address, cluster_detection_method="deactivate"
        )
    import jax.numpy as jnp, numpy as np, optax, jaxpar
    from flax import nnx


    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))


    def init_fn(rng):
        return jaxpar.TrainState.create(MLP(nnx.Rngs(rng)), optax.adamw(1e-2))


    def loss_fn(model, batch, rng):
        errors = ((model(batch["x"]) - batch["y"]) ** 2).mean(-1)
        return jaxpar.Weighted((errors * batch["w"]).sum(), batch["w"].sum()), {"mse": errors.mean()}


    random = np.random.default_rng(0)
    batches = [{"x": random.normal(size=(32, 16)).astype("f4"), "y": random.normal(size=(32, 16)).astype("f4"),
                "w": (random.random(32) > 0.4).astype("f4")} for _ in range(3)]
    strategies = {
        "data": jaxpar.sharded(jaxpar.make_mesh(data=8)),
        "fsdp": jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP),
        "data x model": jaxpar.sharded(jaxpar.make_mesh(data=2, model=4), jaxpar.MEGATRON),
        "model": jaxpar.sharded(jaxpar.make_mesh(model=8), jaxpar.MEGATRON),
        # Each process is a slice of its own, as hosts without a fast network between them are.
        "slices": jaxpar.sharded(jaxpar.make_mesh(data=4, model=2, slices=count), jaxpar.MEGATRON),
    }
    owners = np.vectorize(lambda device: device.process_index)(strategies["slices"].mesh.devices)
    assert (owners == np.repeat(np.arange(count), 4 // count)[:, None]).all(), owners
    out = {}
    for name, strategy in strategies.items():
        part, parts = strategy.data_shard()
        mine = lambda batch: jax.tree.map(lambda x: np.split(x, parts)[part], batch)
        state = strategy.init(init_fn, jax.random.key(0))
        step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=2)
        losses = []
        for batch in batches:
            state, metrics = step(state, strategy.shard_batch(mine(batch)))
            losses.append(float(metrics["loss"]))
        # Uneven on purpose: process 0 has more rows in its last batch, and one batch more.
        uneven = [mine(batches[0])]
        if part == 0:
            uneven += [jax.tree.map(lambda x: x[:3], batches[1])]
        mean = jaxpar.evaluate(jaxpar.make_eval_step(loss_fn, strategy), state, uneven)
        out[name] = {"losses": losses, "parts": parts, "mean": mean}
    print(json.dumps(out))
    """
)


def run(tmp_path, *, count, devices):
    """What each process prints."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), address, str(count), str(index), str(devices)],
            env=env | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, outputs[0][1][-3000:] + outputs[-1][1][-3000:]
    return [json.loads(stdout.strip().splitlines()[-1]) for stdout, _ in outputs]


# How many parts of a batch each number of processes loads.
PARTS = {
    2: {"data": 2, "fsdp": 2, "data x model": 2, "model": 1, "slices": 2},
    4: {"data": 4, "fsdp": 4, "data x model": 2, "model": 1, "slices": 4},
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    [alone] = run(tmp_path_factory.mktemp("one"), count=1, devices=8)
    return alone


@pytest.mark.slow
@pytest.mark.parametrize("count", PARTS)
def test_several_processes_train_and_evaluate_like_one(tmp_path, one, count):
    first, *_, second = run(tmp_path, count=count, devices=8 // count)
    assert {name: first[name]["parts"] for name in one} == PARTS[count]
    for name in one:
        assert first[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-6), name
        assert first[name]["mean"] == second[name]["mean"], name
        assert first[name]["mean"][0] == pytest.approx(one[name]["mean"][0], rel=1e-5), name
        assert first[name]["mean"][1]["mse"] == pytest.approx(one[name]["mean"][1]["mse"], rel=1e-5), name
