"""A decoder of about 1 B parameters in bf16 on the GPUs that are there: tokens/s, MFU, memory, gap between steps.

No figure is claimed until one is committed beside this file: so far it has run on a CPU alone (`--tiny`), to show that
it runs.

    python benchmarks/gpu.py [--mesh fsdp=8] [--batch-size 8] [--remat] [--json FILE]
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxpar
from jaxpar.transformer import Features, Sizes, Transformer

# Dense bf16 arithmetic, operations a second, from NVIDIA's data sheets (without sparsity).
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def count_operations(sizes, num_params, tokens, seq_len):
    """The multiply-adds of a step, twice: 6 for each parameter and token, and causal attention's own."""
    attention = 6 * sizes.layers * sizes.d_model * seq_len * tokens
    return 6 * num_params * tokens + attention


def make_loss(remat):
    """The mean loss of the next byte; with `remat` each block is computed again in the backward pass."""
    run = lambda block, x: block(x)
    run = nnx.remat(run) if remat else run

    def loss_fn(model, batch, rng):
        x = model.embed(batch["tokens"][:, :-1])
        features = Features(x, jnp.zeros(x.shape[0], jnp.float32))
        x, _ = jaxpar.pipeline((run, model.blocks), features, stage_microbatches=1)
        logits = model.embed.attend(model.norm(x)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean(), {}

    return loss_fn


def time_steps(step, state, batch, count):
    """Seconds a step when all are sent at once, and when each is waited for."""
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    together = (time.perf_counter() - start) / count
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
    apart = (time.perf_counter() - start) / count
    return together, apart, float(metrics["loss"])


def main(argv=None):
    """Runs the benchmark, prints its figures and returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="data=-1", help="as for jaxpar train; by default all devices on data")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a device")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--remat", action="store_true", help="compute each block again in the backward pass")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU, to see that it runs")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    if options.tiny:
        options.layers, options.d_model, options.seq_len, options.batch_size, options.steps = 2, 64, 32, 1, 2
    heads = max(options.d_model // 128, 4)
    sizes = Sizes(options.d_model, options.layers, heads, max(heads // 4, 1), options.d_model * 11 // 4)
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)

    mesh = jaxpar.make_mesh(options.mesh)
    rules = [rule for axis, rule in (("model", jaxpar.MEGATRON), ("fsdp", jaxpar.FSDP)) if axis in mesh.shape]
    strategy = jaxpar.sharded(mesh, *rules)
    tx = optax.adamw(1e-4)
    init_fn = lambda rng: jaxpar.TrainState.create(Transformer(sizes, attend=attend, rngs=nnx.Rngs(rng)), tx)
    state = strategy.init(init_fn, jax.random.key(0))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    rows = options.batch_size * strategy.num_shards
    tokens = np.random.default_rng(0).integers(0, 256, (rows, options.seq_len + 1))
    step = jaxpar.make_train_step(make_loss(options.remat), strategy, compute_dtype=jnp.bfloat16)
    memory = step.lower(state, {"tokens": tokens}).compile().memory_analysis()
    batch = strategy.shard_batch({"tokens": tokens})
    state, _ = step(state, batch)
    together, apart, loss = time_steps(step, state, batch, options.steps)

    device = mesh.devices.flat[0]
    peak = next((peak for name, peak in PEAK.items() if name in device.device_kind), None)
    operations = count_operations(sizes, num_params, rows * options.seq_len, options.seq_len)
    figures = {
        "device": f"{mesh.size} x {device.device_kind}",
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "parameters": num_params,
        "tokens_per_second": rows * options.seq_len / together,
        "mfu": peak and operations / together / (peak * mesh.size),
        "step_seconds": together,
        "gap_seconds": apart - together,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "loss": loss,
        "options": vars(options),
    }
    print(json.dumps(figures, indent=1))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)
    return figures


if __name__ == "__main__":
    main()
