"""jaxpar's step beside a hand-written donated `jax.jit`: what a call costs, and how long a step takes on a mesh.

Both run in one process, in turns, and only ratios are reported: python benchmarks/overhead.py [--json FILE] [--quick]
"""

import argparse
import json
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import jaxpar

LEAVES = 50  # parameters; with two moments each the state has 150 leaves and three scalars
TARGETS = {"dispatch, linen": 1.05, "dispatch, nnx": 1.10, "step": 1.05}


class Many(nnx.Module):
    """A module of many small parameters."""

    def __init__(self):
        self.layers = nnx.List([nnx.Param(jnp.ones(4)) for _ in range(LEAVES)])

    def total(self):
        """The sum of all parameters."""
        return sum(layer[...].sum() for layer in self.layers)


class MLP(nnx.Module):
    """Two blocks of up and down, wide enough that a step on a CPU takes milliseconds."""

    def __init__(self, rngs, width=256):
        self.up = nnx.List([nnx.Linear(width, 4 * width, rngs=rngs) for _ in range(2)])
        self.down = nnx.List([nnx.Linear(4 * width, width, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        """The input, with each block's output added."""
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nnx.relu(up(x)))
        return x


def hand_step(loss_of_params, tx, shardings):
    """A donated jit step as one writes it by hand, over the carry (params, opt_state, step, rng)."""

    def step(carry, batch):
        params, opt_state, number, rng = carry
        loss, grads = jax.value_and_grad(loss_of_params)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state, number + 1, rng), metrics

    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None))


def hand_step_beside(loss_of_params, tx, shardings, rng):
    """The same, its key beside the carry: what one writes who knows what a typed key among the results costs."""

    def step(carry, rng, batch):
        params, opt_state, number = carry
        loss, grads = jax.value_and_grad(loss_of_params)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state, number + 1), metrics

    *shardings, key_sharding = shardings
    shardings = tuple(shardings)
    run = jax.jit(step, donate_argnums=0, in_shardings=(shardings, key_sharding, None), out_shardings=(shardings, None))
    return lambda carry, batch: run(carry, rng, batch)


def compare(ours, theirs, batch, *, calls, rounds, wait):
    """Seconds a call of each, and their ratio, for each round; the two take turns, so that noise meets both."""

    def run(pair):
        step, state = pair
        start = time.perf_counter()
        for _ in range(calls):
            state, metrics = step(state, batch)
        if wait:
            jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - start) / calls
        jax.block_until_ready((state, metrics))
        return seconds, (step, state)

    rows = []
    for index in range(rounds + 1):
        # Who goes first changes, since the second finds a warmer cache.
        if index % 2:
            mine, ours = run(ours)
            hand, theirs = run(theirs)
        else:
            hand, theirs = run(theirs)
            mine, ours = run(ours)
        rows.append((mine, hand, mine / hand))
    return np.array(rows[1:])


def dispatch(kind, num_devices, key_beside=False, *, quick):
    """The cost of calling a step on a state of 150 leaves with next to no arithmetic."""
    mesh = jaxpar.make_mesh(data=num_devices, devices=jax.devices()[:num_devices])
    strategy, tx = jaxpar.sharded(mesh), optax.adam(1e-3)
    flat = {"params": {f"layer_{index:02d}": jnp.ones(4) for index in range(LEAVES)}}
    model = Many() if kind == "nnx" else flat
    total = (
        (lambda model: model.total()) if kind == "nnx" else (lambda tree: sum(x.sum() for x in jax.tree.leaves(tree)))
    )
    loss_fn = lambda model, batch, rng: (total(model) * batch["x"].mean(), {})
    state = strategy.place(jaxpar.TrainState.create(model, tx))
    by_hand = lambda params, batch: sum(x.sum() for x in jax.tree.leaves(params)) * batch["x"].mean()
    carry = (flat["params"], tx.init(flat["params"]), jnp.int32(0), jax.random.key(1))
    carry = jax.device_put(jax.tree.map(jnp.copy, carry), NamedSharding(mesh, P()))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)
    batch = strategy.shard_batch({"x": np.ones((8, 4), np.float32)})
    ours = jaxpar.make_train_step(loss_fn, strategy), state
    if key_beside:
        theirs = hand_step_beside(by_hand, tx, shardings, carry[-1]), carry[:-1]
    else:
        theirs = hand_step(by_hand, tx, shardings), carry
    return compare(ours, theirs, batch, calls=50, rounds=4 if quick else 160, wait=False)


def step_time(name, *, quick):
    """The time of a whole step on 8 devices, against the same placement written out by hand."""
    mesh, rules, specs = {
        "DP8": ({"data": 8}, [], {"up": P(), "down": P(), "up_bias": P()}),
        "FSDP8": ({"fsdp": 8}, [jaxpar.FSDP], {"up": P(None, "fsdp"), "down": P("fsdp"), "up_bias": P("fsdp")}),
        "DP2xTP4": (
            {"data": 2, "model": 4},
            [jaxpar.MEGATRON],
            {"up": P(None, "model"), "down": P("model"), "up_bias": P("model")},
        ),
    }[name]
    mesh = jaxpar.make_mesh(**mesh)
    strategy, tx = jaxpar.sharded(mesh, *rules), optax.adam(1e-3)
    loss_fn = lambda model, batch, rng: (((model(batch["x"]) - batch["y"]) ** 2).mean(), {})
    state = strategy.init(lambda rng: jaxpar.TrainState.create(MLP(nnx.Rngs(rng)), tx), jax.random.key(0))

    def spec_of(path):
        layer, kind = path.split("/")[-3], path.split("/")[-1]
        if kind == "bias":
            return specs["up_bias"] if layer == "up" or name == "FSDP8" else P()
        return specs[layer]

    def by_hand(params, batch):
        x = batch["x"]
        for index in range(2):
            up, down = params["up"][index], params["down"][index]
            x = x + jax.nn.relu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]
        return ((x - batch["y"]) ** 2).mean()

    params = jax.device_get(state.params)
    place = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(jax.tree_util.keystr(path, simple=True, separator="/"))), tree
    )
    whole = NamedSharding(mesh, P())
    opt_state: Any = tx.init(params)
    adam, *rest = opt_state
    opt_shardings = (adam._replace(count=whole, mu=place(params), nu=place(params)), *rest)
    shardings = (place(params), opt_shardings, whole, whole)
    carry = jax.device_put((params, opt_state, jnp.int32(0), jax.random.key(1)), shardings)
    rows = 512 if quick else 4096
    batch = strategy.shard_batch({key: np.ones((rows, 256), np.float32) for key in "xy"})
    ours = jaxpar.make_train_step(loss_fn, strategy), state
    theirs = hand_step(by_hand, tx, shardings), carry
    return compare(ours, theirs, batch, calls=2, rounds=3 if quick else 12, wait=True)


def main(argv=None):
    """Runs all comparisons, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, measures nothing")
    options = parser.parse_args(argv)
    jaxpar.fake_devices(8)
    cases: dict[str, Any] = {
        f"dispatch, {kind}, {count} device{'s' * (count > 1)}": (dispatch, (kind, count))
        for kind in ("linen", "nnx")
        for count in (1, 8)
    }
    cases |= {f"dispatch, {kind}, key beside": (dispatch, (kind, 1, True)) for kind in ("linen", "nnx")}
    cases |= {f"step, {name}": (step_time, (name,)) for name in ("DP8", "FSDP8", "DP2xTP4")}
    figures = {}
    table = Table(
        "case", "jaxpar", "by hand", "ratio: median", "quartiles", "aim", title="jaxpar against hand-written jax.jit"
    )
    for case, (measure, arguments) in cases.items():
        rows = measure(*arguments, quick=options.quick)
        mine, hand, ratio = np.median(rows, axis=0)
        low, high = np.percentile(rows[:, 2], [25, 75])
        # The aim is for a step over the same state.
        aim = next(aim for start, aim in TARGETS.items() if case.startswith(start)) if "beside" not in case else None
        figures[case] = {"jaxpar_s": mine, "hand_s": hand, "ratio": ratio, "quartiles": [low, high], "aim": aim}
        table.add_row(
            case,
            f"{mine * 1e6:.0f} us",
            f"{hand * 1e6:.0f} us",
            f"{ratio:.3f}",
            f"{low:.3f} .. {high:.3f}",
            str(aim or "-"),
        )
    versions = {"jax": jax.__version__, "python": platform.python_version(), "machine": platform.machine()}
    Console(width=110).print(table, versions)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"versions": versions, "figures": figures}, file, indent=1)
    return figures


if __name__ == "__main__":
    main()
