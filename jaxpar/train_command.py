"""`jaxpar train`: a byte-level transformer trained on text under any mesh; the worked example of the whole API."""

import argparse
import contextlib
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import jaxpar
from jaxpar import train_report
from jaxpar.distributed import COUNT
from jaxpar.layout import Layout
from jaxpar.text import Text, TextError, draw_batches, even_batches, read_text
from jaxpar.transformer import Sizes, Transformer
from jaxpar.usage import UsageError

_HELD_OUT_BYTES = 2**16
_SAMPLE_BYTES = 200
_TEMPERATURE = 0.8
# Those that fill the fewest dims come first.
_RULES = {"stage": jaxpar.PIPELINE, "expert": jaxpar.EXPERT, "model": jaxpar.MEGATRON, "fsdp": jaxpar.FSDP}


class _Job(NamedTuple):
    """What there is to do, checked: nothing of it has been compiled yet."""

    options: argparse.Namespace
    strategy: jaxpar.Strategy
    init_fn: Callable[[jax.Array], jaxpar.TrainState]
    layout: Layout
    text: Text


def train(options: argparse.Namespace) -> int:
    """Returns 0 once the model of `jaxpar train` is trained, scored and sampled; 1 if its loss is no number.

    Raises:
      UsageError: the options can't be; nothing has been compiled yet.
    """
    # Lines stay whole where the output is a file; on a terminal they wrap by themselves.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _check_alone()
    job = _prepare(options)
    rows: list[train_report.Row] = []
    with train_report.open_log(options.out) as write_log, warnings.catch_warnings():
        # Where in jaxpar's code it is that warns, with a line of it, helps no one here.
        warnings.showwarning = lambda message, *_: print(f"jaxpar: {' '.join(str(message).split())}", file=sys.stderr)
        _announce(console, job)
        try:
            state = _run_steps(job, [rows.append, train_report.print_tenths(console, options.steps), write_log])
        except jaxpar.CheckpointError as error:
            raise UsageError(f"--checkpoint {options.checkpoint}: {error}") from error
        except jaxpar.FitError as error:
            # What it advises is for a loop of one's own.
            told = error.gone_wrong
            console.print(f"{told} Try a lower --learning-rate." if told else str(error))
            return 1
    if not rows:
        console.print(f"Step {options.steps} was reached before; give more --steps to go on.")
    else:
        console.print(f"trained at {train_report.tokens_per_second(rows):,.0f} tokens/s, the first step left out")
    _conclude(console, job, state, rows)
    return 0


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Returns each row's mean loss in nats per byte, and what experts add; no metrics of its own."""
    logits, penalty_B = model.predict(batch["x"])
    return _nats_per_byte(logits, batch["y"]) + penalty_B, {}


def score_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    """Returns each row's mean loss in nats per byte, without what experts add."""
    return _nats_per_byte(model.predict(batch["x"])[0], batch["y"])


def _nats_per_byte(logits: jax.Array, bytes_BT: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, bytes_BT.astype(jnp.int32)).mean(axis=-1)


def continue_bytes(model: nnx.Module, prompt_BT: jax.Array, count: int, seed: int) -> jax.Array:
    """Returns `count` bytes for each row, drawn one after the other, each seen with the T before it; alike in all rows.

    The draws come from the seed alone, so that every shard of every mesh makes the same text.
    """

    def draw(window_BT: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BV = model(window_BT)[:, -1] / _TEMPERATURE
        gumbel_V = jax.random.gumbel(key, logits_BV.shape[-1:])
        next_B = jnp.argmax(logits_BV + gumbel_V, axis=-1).astype(window_BT.dtype)
        return jnp.concatenate([window_BT[:, 1:], next_B[:, None]], axis=1), next_B

    _, drawn_NB = jax.lax.scan(draw, prompt_BT, jax.random.split(jax.random.key(seed), count))
    return drawn_NB.T


def _announce(console: Console, job: _Job) -> None:
    text, plural = job.text, "s" * (job.text.num_files != 1)
    train_report.print_layout(console, job.strategy, job.layout)
    console.print(
        f"{text.name}: {text.num_files:,} file{plural}, {len(text.train):,} bytes to train on, "
        f"{len(text.held_out):,} held out"
    )
    if job.options.out and not train_report.can_draw():
        console.print("There will be no loss.png, which matplotlib draws: pip install 'jaxpar[plot]'")


def _conclude(console: Console, job: _Job, state: jaxpar.TrainState, rows: list[train_report.Row]) -> None:
    held_out, num_bytes = _score(job, state)
    console.print(f"held out: {held_out:.4f} nats per byte, over {num_bytes:,} bytes")
    if job.options.out and train_report.can_draw() and rows:
        train_report.save_curve(job.options.out, rows, held_out)
    prompt, sample = (train_report.as_printable(data, console.encoding) for data in _sample(job, state))
    console.print("a sample; first held-out text, then what the model makes of it:\n", style="bold")
    console.print(prompt, style="dim", end="")
    console.print(sample)


def _prepare(options: argparse.Namespace) -> _Job:
    """The job that the options ask for.

    Raises:
      UsageError: they can't be, or don't fit each other.
    """
    sizes = read_sizes(options)
    _check_profile(options)
    try:
        strategy = _make_strategy(options)
        _check_fit(options, strategy)
        init_fn = make_init_fn(options, sizes, strategy.mesh)
        layout = strategy.layout(init_fn)
        return _Job(options, strategy, init_fn, layout, read_text(options.text, min_bytes=options.seq_len + 1))
    except (jaxpar.MeshError, TextError, jaxpar.PartitionError) as error:
        raise UsageError(str(error)) from error


def _check_alone() -> None:
    """Several that are launched together would each train the whole model, into one folder."""
    count = os.environ.get(COUNT, "1")
    if count != "1":
        raise UsageError(
            f"jaxpar train runs in one process, but {count} are launched; leave jaxpar launch out, or launch a program "
            "of your own that calls jaxpar.initialize and jaxpar.fit."
        )


def read_sizes(options: argparse.Namespace) -> Sizes:
    """Returns the model's sizes that the options give.

    Raises:
      UsageError: they don't divide.
    """
    d_model, heads, kv_heads = options.d_model, options.heads, options.kv_heads
    if d_model % (2 * heads):
        raise UsageError(
            f"--d-model {d_model} does not divide into --heads {heads} of even size, which rotary positions need; "
            f"give a multiple of {2 * heads}."
        )
    if heads % kv_heads:
        divisors = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise UsageError(
            f"--heads {heads} does not divide by --kv-heads {kv_heads}: each serves as many query heads; give one of "
            f"{divisors}."
        )
    # Two thirds of the usual 4, for the third matrix of a gated MLP; a multiple of 64 divides over most axes.
    return Sizes(d_model, options.layers, heads, kv_heads, hidden=64 * math.ceil(8 * d_model / 3 / 64))


def _make_strategy(options: argparse.Namespace) -> jaxpar.Strategy:
    """The strategy, its rules chosen by the axes of the mesh."""
    devices = None if options.fake_devices is None else make_fake_devices(options.fake_devices)
    if options.pmap:
        return jaxpar.data_parallel(devices)
    mesh = jaxpar.make_mesh(options.mesh, devices=devices)
    if mesh.shape.get("expert", 1) > 1 and not options.experts:
        raise UsageError(
            f"--mesh axis 'expert' of size {mesh.shape['expert']} has no experts to split; give --experts "
            f"{mesh.shape['expert']}, or a multiple."
        )
    return jaxpar.sharded(mesh, *rules_for(mesh))


def rules_for(mesh: jax.sharding.Mesh) -> list[Any]:
    """Returns the ready-made lists of rules for the axes that a mesh has."""
    return [rules for axis, rules in _RULES.items() if axis in mesh.shape]


def make_fake_devices(count: int) -> list[jax.Device]:
    """Returns CPU devices, made up, with no other platform started.

    Raises:
      MeshError: JAX_PLATFORMS rules CPUs out, or JAX has started with fewer.
    """
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        # A GPU beside them would be started, and most of its memory taken, for nothing.
        jax.config.update("jax_platforms", "cpu")
    return jaxpar.fake_devices(count)


def _check_fit(options: argparse.Namespace, strategy: jaxpar.Strategy) -> None:
    """Raises UsageError unless batch, sequence, heads, layers and experts divide over the mesh."""
    stages, parts = strategy.mesh.shape.get("stage", 1), options.stage_microbatches
    if parts and stages == 1:
        raise UsageError(f"--stage-microbatches {parts} needs stages: give --mesh stage=2, or leave it out.")
    if parts and parts < stages:
        raise UsageError(
            f"--stage-microbatches {parts} leaves some of {stages} stages idle; give {stages} or more, better "
            f"{4 * stages}."
        )
    shards, rows = strategy.num_shards, options.batch_size
    parts = options.microbatches * stage_microbatches(options, strategy.mesh)
    unit = shards * parts
    if rows % unit:
        raise UsageError(
            f"--batch-size {rows} does not divide by {shards} data shards x {parts} microbatches = {unit}; give "
            f"{-(-rows // unit) * unit}{f', or {rows // unit * unit}' if rows > unit else ''}."
        )
    for axis, flag, number in (
        ("stage", "--layers", options.layers),
        ("expert", "--experts", options.experts),
        ("context", "--seq-len", options.seq_len),
        ("model", "--heads", options.heads),
    ):
        size = strategy.mesh.shape.get(axis, 1)
        if number % size:
            raise UsageError(
                f"{flag} {number} does not divide by {size}, the size of mesh axis {axis!r}; give "
                f"{number - number % size + size}{f', or {number - number % size}' if number > size else ''}."
            )


def stage_microbatches(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> int:
    """Returns how many parts are asked for, or two a stage; 1 without stages."""
    stages = mesh.shape.get("stage", 1)
    return 1 if stages == 1 else options.stage_microbatches or 2 * stages


def make_init_fn(
    options: argparse.Namespace, sizes: Sizes, mesh: jax.sharding.Mesh
) -> Callable[[jax.Array], jaxpar.TrainState]:
    """Returns the `init_fn` of the demo's model and optimizer, whose islands are those of the mesh's axes."""
    parts: dict[str, Any] = {"stage_microbatches": stage_microbatches(options, mesh)}
    if mesh.shape.get("context", 1) > 1:
        parts["attend"] = functools.partial(jaxpar.ring_attention, is_causal=True)
    if options.experts:
        parts["make_mlp"] = functools.partial(jaxpar.MoE, num_experts=options.experts, top_k=min(2, options.experts))
    peak = options.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, options.steps // 10, options.steps, peak / 10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
    return lambda rng: jaxpar.TrainState.create(Transformer(sizes, **parts, rngs=nnx.Rngs(rng)), tx)


def _compute_dtype(options: argparse.Namespace) -> Any:
    return None if options.dtype == "float32" else jnp.dtype(options.dtype)


def _run_steps(job: _Job, tell: list[Callable[[train_report.Row], Any]]) -> jaxpar.TrainState:
    """The trained state; each of `tell` gets each step's row.

    Raises:
      FitError: a loss is no number.
      CheckpointError: the checkpoints are of another model.
    """
    options, strategy = job.options, job.strategy
    state = strategy.init(job.init_fn, jax.random.key(options.seed))
    train_step = jaxpar.make_train_step(
        loss_fn, strategy, num_microbatches=options.microbatches, compute_dtype=_compute_dtype(options)
    )
    draw = functools.partial(
        draw_batches, job.text.train, batch_size=options.batch_size, seq_len=options.seq_len, seed=options.seed
    )
    start = time.perf_counter()

    def on_step(step: int, metrics: dict[str, float]) -> None:
        nonlocal start
        end = time.perf_counter()
        speed = options.batch_size * options.seq_len / (end - start)
        for listener in tell:
            listener({"step": step, "loss": metrics["loss"], "tokens_per_second": speed})
        start = end

    with contextlib.ExitStack() as stack:
        checkpoint = None
        if options.checkpoint is not None:
            checkpoint = jaxpar.Checkpoints(options.checkpoint, every=options.checkpoint_every, keep=options.keep)
            stack.enter_context(checkpoint)
        return jaxpar.fit(
            train_step,
            state,
            lambda step: draw(steps=options.steps, first=step),
            steps=options.steps,
            checkpoint=checkpoint,
            on_step=on_step,
            profile=_profile_of(options),
        )


def _check_profile(options: argparse.Namespace) -> None:
    if options.profile is None:
        return
    if options.out is None:
        raise UsageError("--profile needs a folder to write to; give --out DIR.")
    first, last = options.profile
    if last > options.steps:
        raise UsageError(f"--profile {first}..{last} goes beyond --steps {options.steps}; give steps of the run.")


def _profile_of(options: argparse.Namespace) -> jaxpar.Profile | None:
    return None if options.profile is None else jaxpar.Profile(Path(options.out) / "profile", *options.profile)


def _score(job: _Job, state: jaxpar.TrainState) -> tuple[float, int]:
    """The held-out loss in nats per byte, and over how many bytes it is the mean."""
    options = job.options
    batches = list(
        even_batches(
            job.text.held_out,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            max_windows=max(1, _HELD_OUT_BYTES // options.seq_len),
        )
    )
    eval_step = jaxpar.make_eval_step(score_fn, job.strategy, compute_dtype=_compute_dtype(options))
    return jaxpar.evaluate(eval_step, state, batches), sum(batch["x"].size for batch in batches)


def _sample(job: _Job, state: jaxpar.TrainState) -> tuple[bytes, bytes]:
    """Held-out text, and how the model goes on."""
    strategy, options = job.strategy, job.options
    prompt = job.text.held_out[: options.seq_len]
    sample_step = jaxpar.make_eval_step(
        lambda model, batch, rng: continue_bytes(model, batch["x"], _SAMPLE_BYTES, options.seed),
        strategy,
        compute_dtype=_compute_dtype(options),
    )
    # Every shard and stage microbatch needs a row of its own.
    count = strategy.num_shards * stage_microbatches(options, strategy.mesh)
    rows = sample_step(state, strategy.shard_batch({"x": np.tile(prompt, (count, 1))}))
    return prompt.tobytes(), np.asarray(rows[0]).tobytes()
