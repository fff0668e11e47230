"""`jaxpar.fit` beside the loop of four lines that it is: what all that it does adds to a step of 10 ms.

Both run the same compiled step in one process, in turns, on one CPU device that takes one core, so that the program has
another, as beside an accelerator. The live line is on, as on a terminal, a logger gets each step, and checkpoints are
there but not due. Two figures: how much longer a step takes, which needs a machine that does nothing else; and how much
longer Python's threads compute in one, which is what a step could become longer by at most, and doesn't need that.
    python benchmarks/fit_overhead.py [--json FILE] [--quick]
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import tempfile
import threading
import time
import warnings

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxpar

AIM = 1.01
WIDTH, SECONDS = 256, 0.010
AHEAD = 40  # more steps than JAX takes on before it has done them, on a CPU 32


class MLP(nnx.Module):
    """Up and down."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """What is put in, changed."""
        return self.down(nnx.relu(self.up(x)))


def make_step():
    """A train step on one device, and the state that it begins with."""
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=1, devices=jax.devices()[:1]))
    loss_fn = lambda model, batch, rng: (((model(batch["x"]) - batch["x"]) ** 2).mean(), {})
    init_fn = lambda rng: jaxpar.TrainState.create(MLP(nnx.Rngs(rng)), optax.adam(1e-3))
    return jaxpar.make_train_step(loss_fn, strategy), strategy.init(init_fn, jax.random.key(0))


def clocks():
    """Seconds that have passed, and that Python's threads have computed: not those of XLA, nor other programs."""
    idents = [thread.ident for thread in threading.enumerate() if thread.ident is not None]
    computed = math.fsum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents)
    return np.array([time.perf_counter(), computed])


def by_hand(train_step, state, batch, steps):
    """The four lines: the state, and both kinds of seconds a step, once JAX lets the loop run ahead no further."""
    for number in (AHEAD, steps):
        start = clocks()
        for one in itertools.repeat(batch, number):
            state, metrics = train_step(state, train_step.strategy.shard_batch(one))
    seconds = clocks() - start
    jax.block_until_ready((state, metrics))
    return state, seconds / steps


def by_fit(train_step, state, batch, steps):
    """The same, with all that `fit` does beside it; what a run costs at its begin and its end is not a step's."""
    log, marks, first = [], [], int(state.step)

    def on_step(step, metrics):
        log.append(metrics["loss"])
        if step - first in (AHEAD, AHEAD + steps):
            marks.append(clocks())

    with tempfile.TemporaryDirectory() as folder, jaxpar.Checkpoints(folder, every=10**9) as checkpoint:
        state = jaxpar.fit(
            train_step,
            state,
            lambda step: itertools.repeat(batch),
            steps=first + AHEAD + steps,
            checkpoint=checkpoint,
            on_step=on_step,
            estimate=SECONDS,
        )
    if len(log) != AHEAD + steps:
        raise RuntimeError(f"{AHEAD + steps} steps were made, but {len(log)} told.")
    return state, (marks[1] - marks[0]) / steps


def choose_rows(train_step, state):
    """A batch with which a step takes about as long as it should, and the state after trying."""
    rows = 64
    # Each size is compiled for, as is meant.
    warnings.simplefilter("ignore", jaxpar.RecompileWarning)
    while True:
        batch = {"x": np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)}
        tries = []
        for _ in range(3):
            state, both = by_hand(train_step, state, batch, 20)
            tries.append(both[0])
        # What others do on the machine only adds.
        seconds = min(tries)
        if seconds > 0.8 * SECONDS:
            return batch, state
        rows += max(16, int(rows * min(SECONDS / seconds - 1, 1)) // 16 * 16)


def compare(*, steps, rounds):
    """Seconds a step, for each round, of `fit` and of the loop, passed and computed."""
    train_step, state = make_step()
    batch, state = choose_rows(train_step, state)
    rows = []
    with hidden_terminal():
        for index in range(rounds):
            seconds = {}
            # Who goes first changes, since the second finds a warmer machine.
            for run in (by_fit, by_hand)[:: 1 if index % 2 else -1]:
                state, seconds[run] = run(train_step, state, batch, steps)
            rows.append((seconds[by_fit], seconds[by_hand]))
    return np.array(rows)


def describe(ratios):
    """The median over the rounds, and how sure it is."""
    ordered = np.sort(ratios)
    # The median's own interval, by the order of what was measured.
    places = len(ordered) / 2 + 0.98 * len(ordered) ** 0.5 * np.array([-1, 1])
    sure = ordered[np.clip(places, 0, len(ordered) - 1).astype(int)]
    return {"ratio": np.median(ordered), "sure": list(sure), "quartiles": list(np.percentile(ordered, [25, 75]))}


@contextlib.contextmanager
def hidden_terminal():
    """Errors go to what says that it is a terminal, and shows nothing."""
    os.environ |= {"TTY_COMPATIBLE": "1", "FORCE_COLOR": "1", "COLUMNS": "120"}
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        yield shown
    if "rows/s" not in shown.getvalue():
        raise RuntimeError("The live line did not show.")


def main(argv=None):
    """Runs the comparison and prints it; returns 1 if the median overhead is more than it may be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, measures nothing")
    options = parser.parse_args(argv)
    # Else the device's products would take every core there is, those of the program too.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    jaxpar.fake_devices(1)
    rows = compare(steps=10, rounds=2) if options.quick else compare(steps=50, rounds=100)
    loop = np.median(rows[:, 1, 0])
    figures = {
        "passed": describe(rows[:, 0, 0] / rows[:, 1, 0]),
        "computed": describe(1 + (rows[:, 0, 1] - rows[:, 1, 1]) / loop),
    }
    print(
        f"A step by hand takes {1e3 * loop:.2f} ms; Python's threads compute {1e3 * np.median(rows[:, 1, 1]):.2f} ms."
    )
    table = Table("seconds", "fit / four lines: median", "sure to 95 %", "quartiles", "aim")
    for clock, row in figures.items():
        spread = ("{:.4f} .. {:.4f}".format(*row[name]) for name in ("sure", "quartiles"))
        table.add_row(clock, f"{row['ratio']:.4f}", *spread, str(AIM))
    versions = {"jax": jax.__version__, "python": platform.python_version(), "machine": platform.machine()}
    Console(width=110).print(table, versions)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"versions": versions, "figures": figures}, file, indent=1)
    return int(any(row["ratio"] > AIM for row in figures.values()))


if __name__ == "__main__":
    raise SystemExit(main())
