"""Estimated beside published training steps on real TPU pods: each row of a table, built as it was run.

    python benchmarks/published.py --table published.csv [--where slices=1,chip=v5e]

The table's columns are those of MaxText's published figures: one program a row, with the seconds a step that were
measured. Each program is built with jaxpar (same dims, batch, mesh, remat, dtype and attention), compiled for the pod
that it ran on, and estimated; nothing was fitted to such tables. A row with a tensor axis is compiled both with and
without XLA's windowed products, as whoever tunes a run would, and the faster counts. The bare rule beside it is the
operations that are executed, over 0.8 of the chips' peak.
"""

import argparse
import csv
import functools
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

import jaxpar
from jaxpar.estimation.chips import read_figures
from jaxpar.inspection.flops import count_products
from jaxpar.transformer import Attention, Block, Features, Sizes, SwiGLU, Transformer, attend_causally

# What the scripts that printed the figures gave the compiler, by LIBTPU_INIT_ARGS. v6e refuses them, and on v4 they
# change nothing in the two programs of one slice.
_FLAGS = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
)
_NO_WINDOWS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_AXES = {"tensor": "model", "sequence": "context", "pipeline": "stage"}
_REMATS = {"full": "full", "minimal(dots)": "dots", "minimal": "dots", "none": "none"}
_RULES = {
    "stage": jaxpar.PIPELINE,
    "expert": jaxpar.EXPERT,
    "model": jaxpar.megatron(column=["head"]),
    "fsdp": jaxpar.FSDP,
}


class Outcome(NamedTuple):
    """What came of a row: seconds a step estimated and published, by the bare rule, and the estimate's own time."""

    estimated: float
    published: float
    bare: float
    fits: bool
    took: float


def split_features(x: jax.Array) -> jax.Array:
    """Returns activations whose features are split over `model`, as MaxText keeps them between and inside layers."""
    if jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1:
        return x
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[free] * (x.ndim - 1), "model"))


class ReluMLP(nnx.Module):
    """Two matrices with ReLU between them."""

    def __init__(self, d_model: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(d_model, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, d_model, use_bias=False, rngs=rngs)

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        """Returns the MLP of each token's features."""
        return self.down(split_features(nnx.relu(self.up(x_BTC))))


class ParallelBlock(nnx.Module):
    """A layer whose attention and MLP read the same normalised input, and are added."""

    def __init__(self, sizes: Sizes, *, attend: Any, make_mlp: Any, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(sizes.d_model, rngs=rngs)
        self.attention = Attention(sizes, attend=attend, rngs=rngs)
        self.mlp = make_mlp(sizes.d_model, sizes.hidden, rngs=rngs)

    def __call__(self, features: Features) -> Features:
        """Returns the features after this layer."""
        x_BTC = split_features(features.x_BTC)
        normed_BTC = split_features(self.norm(x_BTC))
        out_BTC = split_features(x_BTC + self.attention(normed_BTC) + self.mlp(normed_BTC))
        return Features(out_BTC, features.penalty_B)


class SerialBlock(Block):
    """The layer of `jaxpar.transformer`, its features split between its parts."""

    def __call__(self, features: Features) -> Features:
        """Returns the features after this layer."""
        out = super().__call__(Features(split_features(features.x_BTC), features.penalty_B))
        return Features(split_features(out.x_BTC), out.penalty_B)


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Returns each row's mean cross-entropy."""
    logits, _ = model.predict(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(axis=-1), {}


def build(row: dict[str, str], options: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
    """Returns the row's train step, abstract state and batch, on a mesh of its pod."""
    sizes_of = dict(part.split("=") for part in row["mesh"].split(","))
    slices = int(row["slices"])
    axes: dict[str, int] = {}
    for name, size in sizes_of.items():
        axis = _AXES.get(name.removeprefix("dcn_"), name.removeprefix("dcn_"))
        axes[axis] = axes.get(axis, 1) * int(size)
    axes = {axis: size for axis, size in axes.items() if size > 1} or {"data": 1}
    slow = next(
        (name.removeprefix("dcn_") for name, size in sizes_of.items() if name.startswith("dcn_") and size != "1"),
        "data",
    )
    mesh = jaxpar.make_mesh(
        ",".join(f"{axis}={size}" for axis, size in axes.items()),
        target=f"{row['chip']}:{row['topology']}",
        slices=slices,
        slice_axis=_AXES.get(slow, slow),
    )
    strategy = jaxpar.sharded(mesh, *(rules for axis, rules in _RULES.items() if axis in mesh.shape))
    number = lambda name: int(row[name])
    sizes = Sizes(
        number("d_model"),
        number("layers"),
        number("heads"),
        number("kv_heads"),
        number("d_ff"),
        number("vocab"),
        number("head_dim"),
    )
    is_kernel = "flash" in row["attention_kernel"] or "splash" in row["attention_kernel"]
    parts = {
        "attend": functools.partial(jaxpar.splash_attention, is_causal=True) if is_kernel else attend_causally,
        "make_mlp": SwiGLU if row["gated"] == "yes" else ReluMLP,
        "make_block": ParallelBlock if row["parallel_block"] == "yes" else SerialBlock,
        "is_tied": row["tied_embed"] == "yes",
        "remat": _remat_of(row),
    }
    init_fn = lambda rng: jaxpar.TrainState.create(Transformer(sizes, **parts, rngs=nnx.Rngs(rng)), optax.adamw(1e-3))
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.bfloat16, compiler_options=options)
    rows = round(float(row["per_device_batch"]) * mesh.size)
    batch = {key: jax.ShapeDtypeStruct((rows, number("seq_len")), jnp.int32) for key in ("x", "y")}
    return step, strategy.abstract_state(init_fn), batch


def _remat_of(row: dict[str, str]) -> str:
    if row["remat"] not in _REMATS:
        raise ValueError(f"remat is {row['remat']!r}; it is one of {', '.join(_REMATS)}")
    return _REMATS[row["remat"]]


def run(row: dict[str, str]) -> Outcome:
    """Returns the row's estimate beside what was published."""
    start = time.perf_counter()
    flags: dict[str, Any] = {} if row["chip"] in ("v4", "v6e") else dict.fromkeys(_FLAGS, True)
    choices = [flags, {**flags, **_NO_WINDOWS}] if "tensor" in row["mesh"] else [flags]
    found = []
    for options in choices:
        step, state, batch = build(row, options or None)
        found.append(jaxpar.estimate(step, state, batch))
    took = time.perf_counter() - start
    best = min(found, key=lambda each: (not each.fits, each.seconds))
    flops = sum(product.flops for product in count_products(step.trace(state, batch)))
    bare = flops / (0.8 * read_figures()[row["chip"]]["peak_flops"].value * best.mesh.size)
    return Outcome(best.seconds, float(row["implied_step_s"]), bare, best.fits, took)


def read_rows(table: pathlib.Path, where: str) -> list[dict[str, str]]:
    """Returns the table's rows whose columns have the values that `where` asks for, as `slices=1,chip=v5e`."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    asked = dict(part.split("=", 1) for part in where.split(",") if part)
    unknown = set(asked) - set(rows[0] if rows else asked)
    if unknown:
        sys.exit(f"--where asks for columns {sorted(unknown)}, which {table} does not have")
    return [row for row in rows if all(row[name] == value for name, value in asked.items())]


def main() -> None:
    """Prints a line a row, and the mean of the errors' sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=pathlib.Path, required=True, help="the published figures, as CSV")
    parser.add_argument("--where", default="", help="columns and their values: slices=1,chip=v5e")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    errors, bare_errors = [], []
    print(f"{'row':<18} {'estimated':>10} {'published':>10} {'error':>7} {'bare rule':>10} {'error':>7} {'took':>7}")
    for row in read_rows(options.table, options.where):
        try:
            outcome = run(row)
        except (KeyError, ValueError, TypeError, jaxpar.AheadError) as error:
            print(f"{row['id']:<18} not estimated: {error}", flush=True)
            continue
        error, bare_error = (seconds / outcome.published - 1 for seconds in (outcome.estimated, outcome.bare))
        errors.append(abs(error))
        bare_errors.append(abs(bare_error))
        print(
            f"{row['id']:<18} {outcome.estimated:>8.3f} s {outcome.published:>8.3f} s {error:>+7.1%} "
            f"{outcome.bare:>8.3f} s {bare_error:>+7.1%} {outcome.took:>5.1f} s"
            + ("" if outcome.fits else "  does NOT fit"),
            flush=True,
        )
    if not errors:
        sys.exit("no row was estimated")
    mean = lambda numbers: 100 * sum(numbers) / len(numbers)
    print(f"mean absolute error {mean(errors):.1f} % over {len(errors)} rows; bare rule {mean(bare_errors):.1f} %")


if __name__ == "__main__":
    main()
