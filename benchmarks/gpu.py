"""A decoder of about 1 B parameters in bf16 on the GPUs that are there: tokens/s, MFU, memory.

README.md has the figures of one H200. `--tiny` runs on a CPU, to show that it runs.

    python benchmarks/gpu.py [--mesh fsdp=8] [--batch-size 8] [--remat dots] [--json FILE]
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
from jaxpar.transformer import REMATS, Block, Features, Sizes, SwiGLU, Transformer
from jaxpar.work import peak_flops


def count_operations(sizes, num_params, tokens, seq_len):
    """The multiply-adds of a step, twice: 6 for each parameter and token, and causal attention's own."""
    attention = 6 * sizes.layers * sizes.d_model * seq_len * tokens
    return 6 * num_params * tokens + attention


class Decoder(nnx.Module):
    """The transformer of `jaxpar train` with its layers one by one, where that one scans over a stack of them."""

    def __init__(self, sizes, *, attend, remat, rngs):
        self.embed = nnx.Embed(sizes.vocab, sizes.d_model, rngs=rngs)
        # nnx.Embed alone would turn its table back into the dtype in which it was made.
        self.embed.dtype = None
        make_block = lambda: Block(sizes, attend=attend, make_mlp=SwiGLU, rngs=rngs)
        self.blocks = nnx.List([make_block() for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.d_model, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens_BT):
        """The logits of the token after each."""
        x_BTC = self.embed(tokens_BT)
        run = lambda block, features: block(features)
        run = run if self.remat == "none" else nnx.remat(run, policy=REMATS[self.remat])
        features = Features(x_BTC, jnp.zeros(x_BTC.shape[0], jnp.float32))
        for block in self.blocks:
            features = run(block, features)
        return self.embed.attend(self.norm(features.x_BTC)).astype(jnp.float32)


def predict_next(model, batch, rng):
    """The mean loss of the next byte."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:])
    return losses.mean(), {}


def time_steps(step, state, batch, count):
    """The state after, seconds a step when all are sent at once and when each is waited for, and the last loss."""
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
    return state, together, apart, float(metrics["loss"])


def parse(argv):
    """The options, those of the tiny model filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="data=-1", help="as for jaxpar train; by default all devices on data")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a device")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--remat", choices=[*REMATS], default="none", help="what the backward pass computes again")
    parser.add_argument("--scan", action="store_true", help="scan over the layers: compiles once for all of them")
    parser.add_argument("--profile", metavar="DIR", help="write a trace of three more steps there")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU, to see that it runs")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    if options.tiny:
        options.layers, options.d_model, options.seq_len, options.batch_size, options.steps = 2, 64, 32, 1, 2
    return options


def main(argv=None):
    """Runs the benchmark, prints its figures and returns them."""
    options = parse(argv)
    heads = max(options.d_model // 128, 4)
    sizes = Sizes(options.d_model, options.layers, heads, max(heads // 4, 1), options.d_model * 11 // 4)
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)

    mesh = jaxpar.make_mesh(options.mesh)
    rules = [rule for axis, rule in (("model", jaxpar.MEGATRON), ("fsdp", jaxpar.FSDP)) if axis in mesh.shape]
    strategy = jaxpar.sharded(mesh, *rules)
    tx = optax.adamw(1e-4)
    make_model = functools.partial(Transformer if options.scan else Decoder, sizes, attend=attend, remat=options.remat)
    init_fn = lambda rng: jaxpar.TrainState.create(make_model(rngs=nnx.Rngs(rng)), tx)
    state = strategy.init(init_fn, jax.random.key(0))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    rows = options.batch_size * strategy.num_shards
    tokens = np.random.default_rng(0).integers(0, 256, (rows, options.seq_len + 1))
    step = jaxpar.make_train_step(predict_next, strategy, compute_dtype=jnp.bfloat16)
    memory = step.lower(state, {"tokens": tokens}).compile().memory_analysis()
    batch = strategy.shard_batch({"tokens": tokens})
    # The first ones compile, take memory, and record what they launch.
    state, *_ = time_steps(step, state, batch, 2)
    state, together, apart, loss = time_steps(step, state, batch, options.steps)

    if options.profile:
        with jax.profiler.trace(options.profile):
            state, *_ = time_steps(step, state, batch, 3)

    device, peak = mesh.devices.flat[0], peak_flops(mesh.devices.flat)
    operations = count_operations(sizes, num_params, rows * options.seq_len, options.seq_len)
    figures = {
        "device": f"{mesh.size} x {device.device_kind}",
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "parameters": num_params,
        "tokens_per_second": rows * options.seq_len / together,
        "mfu": peak and operations / together / peak,
        "step_seconds": together,
        "seconds_lost_by_waiting": apart - together,
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
