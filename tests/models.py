"""Small models that every test shares, each as plain Flax would have it; every dim divides by 8, and no dtype is fixed.

B rows, T tokens, C width, H heads, K key/value heads, G heads of one key/value head, D head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import jaxpar
import jaxpar.state

DEVICES = 8
ROWS, TOKENS, VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 16, 16, 32, 8, 2, 2
LAYERS, FEATURES, CLASSES, PIXELS, CHANNELS = 2, 8, 8, 4, 8


STRATEGIES = {
    "pmap": lambda n: jaxpar.data_parallel(list(sub_mesh(data=n).devices.flat)),
    "data": lambda n: jaxpar.sharded(sub_mesh(data=n)),
    "model": lambda n: jaxpar.sharded(sub_mesh(model=n), jaxpar.MEGATRON),
    "data_model": lambda n: jaxpar.sharded(sub_mesh(data=min(n, 2), model=max(n // 2, 1)), jaxpar.MEGATRON),
    "fsdp": lambda n: jaxpar.sharded(sub_mesh(fsdp=n), jaxpar.FSDP),
    "fsdp_model": lambda n: jaxpar.sharded(
        sub_mesh(fsdp=max(n // 4, 1), model=min(n, 4)), jaxpar.MEGATRON, jaxpar.FSDP
    ),
    "zero1": lambda n: jaxpar.sharded(sub_mesh(data=n), jaxpar.ZERO1),
}


def sub_mesh(**sizes: int) -> jax.sharding.Mesh:
    """Returns a mesh of the first devices, as many as the sizes need."""
    return jaxpar.make_mesh(devices=jax.devices()[: math.prod(sizes.values())], **sizes)


class Task(NamedTuple):
    """What there is to train: a model with its optimizer, a loss, and five batches."""

    init_fn: Callable[[jax.Array], jaxpar.TrainState]
    loss_fn: Callable[[Any, Any, jax.Array], Any]
    batches: list[dict[str, np.ndarray]]


@functools.cache
def make_task(name: str, tx: Any = None, *, masked: bool = False, dropout: float = 0.0, remat: bool = False) -> Task:
    """Returns the task of one of `MODELS`; `masked` gives each token or row a weight, 0 for many."""
    tx = optax.adamw(1e-2) if tx is None else tx
    library, kind = name.split("_", 1)
    sample = make_batches(kind, 1)[0]["x"]
    if library == "nnx":
        model_class = NNX_MODELS[kind]

        def init_fn(rng: jax.Array) -> jaxpar.TrainState:
            return jaxpar.TrainState.create(model_class(dropout, remat, nnx.Rngs(rng)), tx)

        def loss_fn(model: nnx.Module, batch: Any, rng: jax.Array) -> Any:
            return mean_loss(model(batch["x"]), batch)

        return Task(init_fn, loss_fn, make_batches(kind, masked=masked))
    module = LINEN_MODELS[kind](dropout, remat)

    def init_fn(rng: jax.Array) -> jaxpar.TrainState:
        return jaxpar.TrainState.create(module.init({"params": rng, "dropout": rng}, sample), tx)

    def loss_fn(variables: Any, batch: Any, rng: jax.Array) -> Any:
        logits, updates = module.apply(variables, batch["x"], rngs={"dropout": rng}, mutable=["batch_stats"])
        return *mean_loss(logits, batch), updates

    return Task(init_fn, loss_fn, make_batches(kind, masked=masked))


def mean_loss(logits: jax.Array, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the loss and a metric: means, or `Weighted` by the batch's mask."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    right = logits.argmax(-1) == batch["y"]
    if "mask" not in batch:
        return losses.mean(), {"accuracy": right.mean()}
    mask = batch["mask"]
    return jaxpar.Weighted((losses * mask).sum(), mask.sum()), {
        "accuracy": jaxpar.Weighted((right * mask).sum(), mask.sum())
    }


def start(kind: str, task: Task, **build: Any) -> tuple[jaxpar.Strategy, jaxpar.TrainState, jaxpar.Step]:
    """Returns the strategy on 8 devices, a state of its own, and the step."""
    strategy, state = init_once(kind, task.init_fn)
    return strategy, strategy.place(state), jaxpar.make_train_step(task.loss_fn, strategy, **build)


@functools.cache
def init_once(kind: str, init_fn: Callable, devices: int = DEVICES) -> tuple[jaxpar.Strategy, jaxpar.TrainState]:
    """Returns a strategy and the state that it makes: not to be given to a step, which would take it over."""
    strategy = STRATEGIES[kind](devices)
    return strategy, strategy.init(init_fn, jax.random.key(0))


def to_numpy(tree: Any) -> dict[str, np.ndarray]:
    """Returns each leaf by its path, random keys as their bits."""
    leaves = jaxpar.state.named_leaves(tree)
    return {path: np.asarray(jax.random.key_data(leaf) if jaxpar.state.is_key(leaf) else leaf) for path, leaf in leaves}


def make_batches(kind: str, count: int = 5, *, masked: bool = False, rows: int = ROWS) -> list[dict[str, np.ndarray]]:
    """Returns batches for the models of a kind, alike in every run."""
    rng = np.random.default_rng(0)
    return [_make_batch(kind, rng, masked, rows) for _ in range(count)]


def _make_batch(kind: str, rng: np.random.Generator, masked: bool, rows: int) -> dict[str, np.ndarray]:
    if kind in ("decoder", "scanned"):
        text = rng.integers(0, VOCAB, (rows, TOKENS + 1))
        batch = {"x": text[:, :-1], "y": text[:, 1:]}
    else:
        shape = (rows, FEATURES) if kind == "mlp" else (rows, PIXELS, PIXELS, 3)
        batch = {"x": rng.normal(size=shape).astype("float32"), "y": rng.integers(0, CLASSES, rows)}
    if masked:
        mask = (rng.random(batch["y"].shape) < 0.4).astype("float32")
        # The first and the last of 8 shards have no token that counts, at times half of them.
        mask[: rows // 8] = mask[-rows // 8 :] = 0
        mask[: rows // 2] *= rng.integers(0, 2)
        batch["mask"] = mask
    return batch


def attend(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
    """Returns causal grouped-query attention, B T H D, its softmax in the dtype of its input."""
    b, t, h, d = q_BTHD.shape
    q_BTKGD = q_BTHD.reshape(b, t, k_BTKD.shape[2], -1, d)
    scores_BKGTS = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BTKD) * d**-0.5
    scores_BKGTS = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores_BKGTS, -1e9)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS)
    return jnp.einsum("bkgts,bskd->btkgd", weights_BKGTS, v_BTKD).reshape(b, t, h, d)


class NnxMLP(nnx.Module):
    def __init__(self, dropout: float, remat: bool, rngs: nnx.Rngs):
        self.up = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.remat(type(self).hide)(self, x) if self.remat else self.hide(x)
        return self.down(hidden)

    def hide(self, x: jax.Array) -> jax.Array:
        return self.dropout(nnx.gelu(self.norm(self.up(x))))


class NnxBlock(nnx.Module):
    def __init__(self, dropout: float, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, HEAD_DIM), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(WIDTH, (KV_HEADS, HEAD_DIM), use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(WIDTH, (KV_HEADS, HEAD_DIM), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), WIDTH, axis=(-2, -1), rngs=rngs)
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        normed_BTC = self.norm1(x_BTC)
        mixed_BTHD = attend(self.query(normed_BTC), self.key(normed_BTC), self.value(normed_BTC))
        x_BTC = x_BTC + self.dropout(self.out(mixed_BTHD))
        return x_BTC + self.down(self.dropout(nnx.gelu(self.up(self.norm2(x_BTC)))))


def make_embed(rngs: nnx.Rngs) -> nnx.Embed:
    embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
    # nnx.Embed alone keeps the dtype in which it was made, whatever its table is cast to later.
    embed.dtype = None
    return embed


class NnxDecoder(nnx.Module):
    """Tied embedding; its one block is called as it is, or rematerialised."""

    def __init__(self, dropout: float, remat: bool, rngs: nnx.Rngs):
        self.embed = make_embed(rngs)
        self.block = NnxBlock(dropout, rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        run = nnx.remat(NnxBlock.__call__) if self.remat else NnxBlock.__call__
        return self.embed.attend(self.norm(run(self.block, self.embed(tokens_BT))))


class NnxScanned(nnx.Module):
    """The decoder with a stack of layers made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, dropout: float, remat: bool, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make_blocks(rngs: nnx.Rngs) -> NnxBlock:
            return NnxBlock(dropout, rngs)

        self.embed = make_embed(rngs)
        self.blocks = make_blocks(rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        run = nnx.remat(NnxBlock.__call__) if self.remat else NnxBlock.__call__

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run_stack(block: NnxBlock, x_BTC: jax.Array) -> jax.Array:
            return run(block, x_BTC)

        return self.embed.attend(self.norm(run_stack(self.blocks, self.embed(tokens_BT))))


class NnxConv(nnx.Module):
    """BatchNorm over the whole batch, wherever its rows are."""

    def __init__(self, dropout: float, remat: bool, rngs: nnx.Rngs):
        self.up = nnx.Conv(3, CHANNELS, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, momentum=0.9, axis_name="data", rngs=rngs)
        self.down = nnx.Conv(CHANNELS, CHANNELS, (3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(CHANNELS, CLASSES, rngs=rngs)
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.up(x)))
        x = nnx.remat(type(self).reduce)(self, x) if self.remat else self.reduce(x)
        return self.head(x)

    def reduce(self, x: jax.Array) -> jax.Array:
        return self.dropout(nnx.tanh(self.down(x))).mean((1, 2))


class LinenMLP(linen.Module):
    dropout: float
    remat: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = linen.remat(LinenHidden) if self.remat else LinenHidden
        return linen.Dense(CLASSES, name="down")(hidden(self.dropout, name="hidden")(x))


class LinenHidden(linen.Module):
    dropout: float

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.gelu(linen.LayerNorm()(linen.Dense(HIDDEN, name="up")(x)))
        return linen.Dropout(self.dropout, deterministic=False)(x)


class LinenBlock(linen.Module):
    """Plain attention under Flax's own names: linen's has no grouped queries."""

    dropout: float

    @linen.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        def heads(name: str, count: int, use_bias: bool = False) -> Any:
            return linen.DenseGeneral((count, HEAD_DIM), use_bias=use_bias, name=name)

        drop = linen.Dropout(self.dropout, deterministic=False)
        normed_BTC = linen.RMSNorm(name="norm1")(x_BTC)
        mixed_BTHD = attend(
            heads("query", HEADS)(normed_BTC),
            heads("key", KV_HEADS)(normed_BTC),
            heads("value", KV_HEADS, use_bias=True)(normed_BTC),
        )
        x_BTC = x_BTC + drop(linen.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(mixed_BTHD))
        hidden = linen.gelu(linen.Dense(HIDDEN, name="up")(linen.RMSNorm(name="norm2")(x_BTC)))
        return x_BTC + linen.Dense(WIDTH, name="down")(drop(hidden))


class LinenDecoder(linen.Module):
    dropout: float
    remat: bool

    @linen.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        embed = linen.Embed(VOCAB, WIDTH, name="embed")
        block = linen.remat(LinenBlock) if self.remat else LinenBlock
        x_BTC = block(self.dropout, name="block")(embed(tokens_BT))
        return embed.attend(linen.RMSNorm(name="norm")(x_BTC))


class LinenScanned(linen.Module):
    dropout: float
    remat: bool

    @linen.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        embed = linen.Embed(VOCAB, WIDTH, name="embed")
        block = linen.remat(LinenBlock, prevent_cse=False) if self.remat else LinenBlock
        run_stack = linen.scan(
            lambda block, x_BTC, _: (block(x_BTC), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        x_BTC, _ = run_stack(block(self.dropout, name="blocks"), embed(tokens_BT), None)
        return embed.attend(linen.RMSNorm(name="norm")(x_BTC))


class LinenConv(linen.Module):
    dropout: float
    remat: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(CHANNELS, (3, 3), use_bias=False, name="up")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=False, momentum=0.9, axis_name="data", name="norm")(x))
        reduce = linen.remat(LinenReduce) if self.remat else LinenReduce
        return linen.Dense(CLASSES, name="head")(reduce(self.dropout, name="reduce")(x))


class LinenReduce(linen.Module):
    dropout: float

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.tanh(linen.Conv(CHANNELS, (3, 3), strides=2, name="down")(x))
        return linen.Dropout(self.dropout, deterministic=False)(x).mean((1, 2))


NNX_MODELS = {"mlp": NnxMLP, "decoder": NnxDecoder, "scanned": NnxScanned, "conv": NnxConv}
LINEN_MODELS = {"mlp": LinenMLP, "decoder": LinenDecoder, "scanned": LinenScanned, "conv": LinenConv}
MODELS = [f"{library}_{kind}" for library in ("nnx", "linen") for kind in NNX_MODELS]
