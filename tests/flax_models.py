"""Models built as Flax's own examples and guides build them, smaller; none was changed for jaxpar, but for dtypes.

B rows, T tokens, C width, H heads, K key/value heads, D head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

VOCAB, CLASSES = 32, 16


# nnx: the basics guide


class BasicLinear(nnx.Module):
    def __init__(self, din: int, dout: int, *, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.uniform(rngs.params(), (din, dout)))
        self.b = nnx.Param(jnp.zeros((dout,)))
        self.din, self.dout = din, dout

    def __call__(self, x):
        return x @ self.w + self.b


class BasicMLP(nnx.Module):
    def __init__(self, din: int, dmid: int, dout: int, *, rngs: nnx.Rngs):
        self.linear1 = BasicLinear(din, dmid, rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.1, rngs=rngs)
        self.bn = nnx.BatchNorm(dmid, rngs=rngs)
        self.linear2 = BasicLinear(dmid, dout, rngs=rngs)

    def __call__(self, x):
        return self.linear2(nnx.gelu(self.dropout(self.bn(self.linear1(x)))))


class LoraParam(nnx.Param):
    pass


class LoraLinear(nnx.Module):
    def __init__(self, linear: BasicLinear, rank: int, rngs: nnx.Rngs):
        self.linear = linear
        self.A = LoraParam(jax.random.normal(rngs(), (linear.din, rank)))
        self.B = LoraParam(jax.random.normal(rngs(), (rank, linear.dout)))

    def __call__(self, x):
        return self.linear(x) + x @ self.A @ self.B


def make_lora(rngs: nnx.Rngs) -> nnx.Module:
    """Returns the MLP after model surgery."""
    model = BasicMLP(8, 32, CLASSES, rngs=rngs)
    model.linear1 = LoraLinear(model.linear1, 4, rngs=rngs)
    model.linear2 = LoraLinear(model.linear2, 4, rngs=rngs)
    return model


class ScannedMLPs(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(lambda key: BasicMLP(CLASSES, 32, CLASSES, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.embed = nnx.Linear(8, CLASSES, rngs=rngs)
        self.layers = make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return layer(x)

        return forward(self.layers, self.embed(x))


# nnx: the MNIST tutorial


class MnistCNN(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(64, 32, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.linear2 = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        return self.linear2(self.dropout2(nnx.relu(self.linear1(x))))


# nnx: Gemma, and Flax's own attention


class Einsum(nnx.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], *, rngs: nnx.Rngs):
        self.equation = equation
        self.w = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class GemmaNorm(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), (dim,)))

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * (1 + self.scale[...])


def rotate(x_BTHD, max_wavelength=10_000):
    """Returns the heads with rotary positions applied."""
    half = x_BTHD.shape[-1] // 2
    angle = jnp.arange(x_BTHD.shape[1])[:, None] / max_wavelength ** (jnp.arange(half) / half)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    first, second = jnp.split(x_BTHD, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class GemmaBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.pre_attention_norm = GemmaNorm(16, rngs=rngs)
        self.q_einsum = Einsum("BTC,HCD->BTHD", (8, 16, 4), rngs=rngs)
        self.kv_einsum = Einsum("BSC,cKCD->cBSKD", (2, 2, 16, 4), rngs=rngs)
        self.attn_vec_einsum = Einsum("BTHD,HDC->BTC", (8, 4, 16), rngs=rngs)
        self.pre_ffw_norm = GemmaNorm(16, rngs=rngs)
        self.gate_proj = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(32, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        normed = self.pre_attention_norm(x)
        key, value = self.kv_einsum(normed)
        query = rotate(self.q_einsum(normed)) * 4**-0.5
        batch, length, heads, size = query.shape
        grouped = query.reshape(batch, length, 2, heads // 2, size)
        logits = jnp.einsum("BTKGD,BSKD->BTKGS", grouped, rotate(key))
        logits = 50 * jnp.tanh(logits / 50)
        causal = jnp.tril(jnp.ones((length, length), bool))[:, None, None]
        weights = jax.nn.softmax(jnp.where(causal, logits, -2.3819763e38))
        mixed = jnp.einsum("BTKGS,BSKD->BTKGD", weights, value).reshape(query.shape)
        x = x + self.attn_vec_einsum(mixed)
        normed = self.pre_ffw_norm(x)
        return x + self.down_proj(nnx.gelu(self.gate_proj(normed)) * self.up_proj(normed))


class Gemma(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.input_embedding = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), (VOCAB, 16)))
        self.layers = nnx.List([GemmaBlock(rngs=rngs) for _ in range(2)])
        self.final_norm = GemmaNorm(16, rngs=rngs)

    def __call__(self, tokens):
        x = self.input_embedding[...][tokens] * 4
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x) @ self.input_embedding[...].T


class AttentionBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(8, 16, dropout_rate=0.1, deterministic=False, decode=False, rngs=rngs)
        self.head = nnx.Linear(16, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.attention(self.norm(x), mask=nnx.make_causal_mask(tokens)))


# linen: the examples mnist, vae, imagenet, ppo, wmt, seq2seq and sst2


class LinenMnistCNN(linen.Module):
    @linen.compact
    def __call__(self, x):
        for features in (8, 16):
            x = linen.relu(linen.Conv(features=features, kernel_size=(3, 3))(x))
            x = linen.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = linen.relu(linen.Dense(features=32)(x))
        return linen.log_softmax(linen.Dense(features=CLASSES)(x))


class VAEEncoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(32, name="fc1")(x))
        return linen.Dense(8, name="fc2_mean")(x), linen.Dense(8, name="fc2_logvar")(x)


class VAEDecoder(linen.Module):
    @linen.compact
    def __call__(self, z):
        return linen.Dense(64, name="fc2")(linen.relu(linen.Dense(32, name="fc1")(z)))


class VAE(linen.Module):
    def setup(self):
        self.encoder, self.decoder = VAEEncoder(), VAEDecoder()

    def __call__(self, x, z_rng):
        mean, logvar = self.encoder(x)
        z = mean + jax.random.normal(z_rng, logvar.shape) * jnp.exp(0.5 * logvar)
        return self.decoder(z), mean, logvar


class ResNetBlock(linen.Module):
    filters: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @linen.compact
    def __call__(self, x):
        y = linen.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=linen.initializers.zeros_init())(self.conv(self.filters, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x))
        return linen.relu(x + y)


class ResNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(linen.Conv, use_bias=False)
        norm = functools.partial(linen.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = linen.relu(norm(name="bn_init")(conv(8, (3, 3), padding=[(1, 1), (1, 1)], name="conv_init")(x)))
        x = linen.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = ResNetBlock(8, conv, norm)(x)
        x = ResNetBlock(16, conv, norm, strides=(2, 2))(x)
        return linen.Dense(CLASSES)(x.mean((1, 2)))


class ActorCritic(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x / 255.0
        for name, features, kernel, stride in (("conv1", 8, 4, 2), ("conv2", 16, 2, 2)):
            x = linen.relu(linen.Conv(features, (kernel, kernel), strides=(stride, stride), name=name)(x))
        x = linen.relu(linen.Dense(32, name="hidden")(x.reshape((x.shape[0], -1))))
        return linen.log_softmax(linen.Dense(CLASSES, name="logits")(x)), linen.Dense(1, name="value")(x)


class WMTEncoder(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(VOCAB, 16, embedding_init=linen.initializers.normal(stddev=1.0))
        angle = np.arange(tokens.shape[1])[:, None] / 10_000 ** (np.arange(8) / 8)
        x = embed(tokens) + np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        drop = functools.partial(linen.Dropout(rate=0.1), deterministic=False)
        mask = linen.make_attention_mask(tokens > 0, tokens > 0)
        for _ in range(2):
            y = linen.LayerNorm()(x)
            y = linen.MultiHeadDotProductAttention(
                num_heads=8, use_bias=False, broadcast_dropout=False, dropout_rate=0.1, deterministic=False
            )(y, mask=mask)
            x = x + drop(y)
            y = drop(linen.relu(linen.Dense(32)(linen.LayerNorm()(x))))
            x = x + drop(linen.Dense(16)(y))
        return embed.attend(linen.LayerNorm(name="encoder_norm")(x)) / 4


class DecoderLSTMCell(linen.RNNCellBase):
    features: int

    @linen.compact
    def __call__(self, carry, x):
        state, _ = carry
        state, y = linen.LSTMCell(self.features)(state, x)
        logits = linen.Dense(features=VOCAB)(y)
        token = jax.random.categorical(self.make_rng("lstm"), logits)
        prediction = jax.nn.one_hot(token, VOCAB, dtype=jnp.float32)
        return (state, prediction), (logits, prediction)

    @property
    def num_feature_axes(self):
        return 1


class Seq2seq(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        inputs = jax.nn.one_hot(tokens, VOCAB)
        encoder = linen.RNN(linen.LSTMCell(VOCAB), return_carry=True, name="encoder")
        decoder = linen.RNN(DecoderLSTMCell(VOCAB), split_rngs={"params": False, "lstm": True}, name="decoder")
        state, _ = encoder(inputs, seq_lengths=jnp.argmax(tokens == 1, axis=-1))
        logits, _ = decoder(inputs, initial_carry=(state, inputs[:, 0]))
        return logits


class TextClassifier(linen.Module):
    """Words in, a two-way LSTM over them, attention by keys alone."""

    @linen.compact
    def __call__(self, tokens):
        x = self.param("embedding", linen.initializers.normal(stddev=0.1), (VOCAB, 16))[tokens]
        forth, back = (linen.RNN(linen.OptimizedLSTMCell(16), reverse=reverse) for reverse in (False, True))
        x = linen.Bidirectional(forth, back)(x)
        x = linen.Dropout(0.1, deterministic=False)(x)
        scores = linen.Dense(1, name="energy", use_bias=False)(linen.tanh(linen.Dense(16, name="keys")(x)))
        scores = jnp.where(tokens > 0, scores.squeeze(-1), -1e9)
        context = (jnp.expand_dims(linen.softmax(scores), 1) @ x).squeeze(1)
        return linen.Dense(CLASSES, use_bias=False)(linen.tanh(linen.Dense(32)(context)))
