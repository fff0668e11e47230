"""A run of `fit` as a program of its own, to be killed: fit_program.py FOLDER STEPS [axes] [pause] [when] [heartbeat].

Under `jaxpar launch` its four devices lie on as many processes. `when` is what takes the pause: compiling, or
evaluating, or else each step.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx

import jaxpar


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.up(x))))


class Stateful:
    """Batches from a step on, that can be set back to a place of the same process alone, as grain's."""

    def __init__(self, batches, index):
        self.batches, self.index, self.step = batches, index, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return next(self.batches(self.step - 1))

    def get_state(self):
        return json.dumps([self.index, self.step]).encode()

    def set_state(self, state):
        index, self.step = json.loads(state)
        assert index == self.index


def make_strategy(axes):
    size = int(np.prod([int(part.split("=")[1]) for part in axes.split(",")]))
    mesh = jaxpar.make_mesh(axes, devices=jax.devices()[:size])
    rules = {"model": jaxpar.MEGATRON, "fsdp": jaxpar.fsdp(min_size=1)}
    return jaxpar.sharded(mesh, *(rules[axis] for axis in ("model", "fsdp") if axis in mesh.shape))


def main(folder, steps, axes="fsdp=4", pause=0.0, when="", heartbeat=30):
    jax.config.update("jax_num_cpu_devices", 4 // int(os.environ.get("JAXPAR_PROCESSES", "1")))
    jax.config.update("jax_platforms", "cpu")
    index, _ = jaxpar.initialize(heartbeat_timeout_seconds=heartbeat)
    strategy = make_strategy(axes)

    def make_loss(name):
        def loss_fn(model, batch, rng):
            # A step is traced once, where it is compiled: as long as this, if asked to.
            print(name, flush=True)
            time.sleep(pause if when == name else 0)
            return ((model(batch["x"]) - batch["x"]) ** 2).mean(-1), {}

        return loss_fn

    def batches(step):
        part, parts = strategy.data_shard()
        while when not in ("ends", "fails") or not index or step < 7:
            yield {"x": np.split(np.random.default_rng(step).normal(size=(8, 8)).astype("f4"), parts)[part]}
            step += 1
        if when == "fails":
            raise OSError("the disk is gone")

    def log(step, metrics):
        if index or "loss" not in metrics:
            return
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        print(step, flush=True)
        time.sleep(0 if when else pause)

    step = jaxpar.make_train_step(make_loss("compiling"), strategy)
    eval_step = jaxpar.make_eval_step(make_loss("evaluating"), strategy), [next(batches(0))]
    init_fn = lambda rng: jaxpar.TrainState.create(MLP(nnx.Rngs(rng)), optax.adamw(1e-2))
    state = strategy.init(init_fn, jax.random.key(0))
    print("ready", flush=True)
    with jaxpar.Checkpoints(folder / "checkpoints", every=5) as checkpoints:
        more = {"eval_step": eval_step} if when == "evaluating" else {}
        source = Stateful(batches, index) if when == "stateful" else batches
        state = jaxpar.fit(step, state, source, steps=steps, checkpoint=checkpoints, on_step=log, **more)
    print("done", int(state.step), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)


if __name__ == "__main__":
    given = dict(zip(("axes", "pause", "when", "heartbeat"), sys.argv[3:], strict=False))
    given |= {name: kind(given[name]) for name, kind in (("pause", float), ("heartbeat", int)) if name in given}
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), **given)
