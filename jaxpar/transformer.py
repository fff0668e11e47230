"""The model of `jaxpar train`: a decoder-only transformer over bytes, in plain Flax; knows nothing of devices.

B rows, T bytes, C features, H heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpar.pipeline import pipeline

VOCAB = 256
# What of each layer the backward pass finds kept: all; nothing but its input; the products of activations and weights.
REMATS = {"none": None, "full": jax.checkpoint_policies.nothing_saveable}
REMATS |= {"dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims}
# What mixtures of experts add to the loss, as their papers do: see jaxpar.MoELosses.
BALANCE, ROUTER_Z = 0.01, 0.001
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
MakeMLP = Callable[..., nnx.Module]


class Sizes(NamedTuple):
    """How large a `Transformer` is.

    Attributes:
      d_model: the features of each byte between the layers.
      layers: how many blocks.
      heads: query heads; they divide `d_model` into heads of even size.
      kv_heads: key/value heads, each shared by `heads // kv_heads` query heads.
      hidden: the features inside each MLP.
      vocab: how many tokens there are: bytes, by default.
      head_dim: the features of one head, an even number; by default `d_model // heads`.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int = VOCAB
    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        """The features of one head."""
        return self.head_dim or self.d_model // self.heads


def attend_causally(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
    """Returns grouped-query attention in which no byte sees a later one, with the shape of the queries.

    >>> attend_causally(jnp.ones((2, 5, 8, 4)), jnp.ones((2, 5, 2, 4)), jnp.ones((2, 5, 2, 4))).shape
    (2, 5, 8, 4)
    """
    return jax.nn.dot_product_attention(q_BTHD, k_BTKD, v_BTKD, is_causal=True)


def rotate(x_BTHD: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Returns queries or keys turned by angles that grow with their place: products then tell how far apart two are.

    Rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864). `positions`, of shape (T,) or (B, T), tells
    each byte's place where they don't lie in order, as after `jaxpar.zigzag`.

    >>> x = jnp.ones((1, 3, 1, 2))
    >>> bool(jnp.allclose(rotate(x)[0, 0], x[0, 0])), bool(jnp.allclose(rotate(x)[0, 1], x[0, 1]))
    (True, False)
    """
    half = x_BTHD.shape[-1] // 2
    places = jnp.arange(x_BTHD.shape[1]) if positions is None else positions
    angles = places[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x_BTHD, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    # In a narrow dtype the angles alone stay float32: far places need more digits than bfloat16 has.
    return turned.astype(x_BTHD.dtype)


class SwiGLU(nnx.Module):
    """A gated MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202), under the names that `jaxpar.MEGATRON` knows."""

    def __init__(self, d_model: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(d_model, hidden, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(d_model, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, d_model, use_bias=False, rngs=rngs)

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        """Returns the MLP of each byte's features."""
        return self.down(nnx.silu(self.gate(x_BTC)) * self.up(x_BTC))


class Attention(nnx.Module):
    """Projections around an attention function, named as Flax names them."""

    def __init__(self, sizes: Sizes, *, attend: Attend, rngs: nnx.Rngs):
        heads, kv_heads = (sizes.heads, sizes.head_size), (sizes.kv_heads, sizes.head_size)
        self.query = nnx.LinearGeneral(sizes.d_model, heads, use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(sizes.d_model, kv_heads, use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(sizes.d_model, kv_heads, use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral(heads, sizes.d_model, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.attend = attend

    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        """Returns what each byte gathers from those before it."""
        q_BTHD, k_BTKD = rotate(self.query(x_BTC)), rotate(self.key(x_BTC))
        return self.out(self.attend(q_BTHD, k_BTKD, self.value(x_BTC)))


class Features(NamedTuple):
    """What goes from layer to layer.

    Attributes:
      x_BTC: the features of each byte.
      penalty_B: what mixtures of experts have added so far to each row's loss.
    """

    x_BTC: jax.Array
    penalty_B: jax.Array


class Block(nnx.Module):
    """One layer: attention, then the MLP, each of normalised features and added to them."""

    def __init__(self, sizes: Sizes, *, attend: Attend, make_mlp: MakeMLP, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(sizes.d_model, rngs=rngs)
        self.attention = Attention(sizes, attend=attend, rngs=rngs)
        self.norm2 = nnx.RMSNorm(sizes.d_model, rngs=rngs)
        self.mlp = make_mlp(sizes.d_model, sizes.hidden, rngs=rngs)

    def __call__(self, features: Features) -> Features:
        """Returns the features after this layer."""
        x_BTC, penalty_B = features
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        mixed = self.mlp(self.norm2(x_BTC))
        if isinstance(mixed, tuple):
            mixed, losses = mixed
            penalty_B += (BALANCE * losses.balance + ROUTER_Z * losses.router_z).astype(penalty_B.dtype)
        return Features(x_BTC + mixed, penalty_B)


class Transformer(nnx.Module):
    """A decoder-only transformer over bytes, or over the tokens of another vocabulary.

    Args:
      sizes: how large it is.
      attend: `attend(q_BTHD, k_BTKD, v_BTKD)`, any causal attention.
      make_mlp: `make_mlp(d_model, hidden, rngs=rngs)`, the MLP of each layer, or a `jaxpar.MoE`.
      make_block: `make_block(sizes, attend=attend, make_mlp=make_mlp, rngs=rngs)`, a layer.
      is_tied: whether the head is the embedding again.
      remat: what the backward pass computes anew, of `REMATS`.
      stage_microbatches: into how many parts to cut the rows where the layers are split over stages.
      rngs: for the parameters.

    >>> model = Transformer(Sizes(d_model=16, layers=2, heads=4, kv_heads=2, hidden=32), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), jnp.uint8)).shape
    (2, 5, 256)
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        attend: Attend = attend_causally,
        make_mlp: MakeMLP = SwiGLU,
        make_block: Callable[..., nnx.Module] = Block,
        is_tied: bool = True,
        remat: str = "none",
        stage_microbatches: int = 1,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(sizes.vocab, sizes.d_model, rngs=rngs)
        # nnx.Embed alone would turn its table back into the dtype in which it was made.
        self.embed.dtype = None
        make_blocks = nnx.vmap(lambda rngs: make_block(sizes, attend=attend, make_mlp=make_mlp, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=sizes.layers)(make_blocks)(rngs)
        self.norm = nnx.RMSNorm(sizes.d_model, rngs=rngs)
        self.head = None if is_tied else nnx.Linear(sizes.d_model, sizes.vocab, use_bias=False, rngs=rngs)
        self.remat, self.stage_microbatches = remat, stage_microbatches

    def __call__(self, bytes_BT: jax.Array) -> jax.Array:
        """Returns the logits of the token after each, B T vocab, in float32."""
        return self.predict(bytes_BT)[0]

    def predict(self, bytes_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the logits, and what mixtures of experts add to each row's loss: 0 without any."""
        x_BTC = self.embed(bytes_BT.astype(jnp.int32))
        features = Features(x_BTC, jnp.zeros(x_BTC.shape[0], jnp.float32))
        run = _run_block if self.remat == "none" else nnx.remat(_run_block, policy=REMATS[self.remat])
        x_BTC, penalty_B = pipeline((run, self.blocks), features, stage_microbatches=self.stage_microbatches)
        head = self.embed.attend if self.head is None else self.head
        return head(self.norm(x_BTC)).astype(jnp.float32), penalty_B


def _run_block(block: Any, features: Features) -> Features:
    return block(features)
