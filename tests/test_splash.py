"""Attention by JAX's TPU kernel: elsewhere it is JAX's own, its kernel is exact, and what it can't take is named."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import sub_mesh

import jaxpar
from jaxpar.splash import SplashError


def draw(batch=2, length=256, heads=4, kv_heads=2, size=8):
    shapes = [(batch, length, count, size) for count in (heads, kv_heads, kv_heads)]
    return [
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    ]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("axes", [{}, {"data": 2, "model": 2}, {"fsdp": 2}])
@jax.default_matmul_precision("highest")
def test_it_is_jaxs_own_attention_on_every_mesh(is_causal, axes):
    q, k, v = draw()
    attend = functools.partial(jaxpar.splash_attention, is_causal=is_causal)
    loss = lambda attend: lambda *x: (attend(*x) ** 2).sum()
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
    gradients = jax.grad(loss(functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)), (0, 1, 2))(q, k, v)
    size = int(np.prod(list(axes.values()), initial=1))
    mesh = (
        jaxpar.make_mesh(devices=jax.devices()[:size], **axes)
        if axes
        else jaxpar.make_mesh(data=1, devices=jax.devices()[:1])
    )
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(attend)(q, k, v), expected, atol=1e-5)
        for got, wanted in zip(jax.jit(jax.grad(loss(attend), (0, 1, 2)))(q, k, v), gradients, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.slow
def test_the_kernel_is_exact_where_it_is_interpreted(monkeypatch):
    splash = importlib.import_module("jaxpar.splash")
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")
    make = functools.partial(kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mha", make)
    q, k, v = draw(batch=1, length=256, size=128)
    got = splash._run_kernel(True, 128, q, k, v)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=2e-2)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (
            ((2, 256, 4, 8), (2, 256, 3, 8)),
            {},
            "q has 4 heads, which do not divide by the 3 of k and v; give a multiple",
        ),
        (((2, 100, 4, 8), (2, 100, 4, 8)), {}, "q has 100 tokens and k 100; the kernel takes multiples of 128"),
        (((2, 256, 4, 8), (2, 256, 0, 8)), {}, "q has 4 heads, which do not divide by the 0 of k and v"),
        (
            ((2, 256, 4, 8), (2, 256, 4, 8)),
            {"block_size": "a"},
            "block_size is 'a'; the kernel takes multiples of 128: give one",
        ),
        (((2, 256, 4, 8), (2, 256, 4, 8)), {"block_size": 100}, "block_size is 100; the kernel takes multiples of 128"),
        (((256, 4, 8), (256, 4, 8)), {}, r"q, k and v have shapes .*; give \(B, T, H, D\)"),
        (((2, 256, 4, 8), (3, 256, 4, 8)), {}, r"give \(B, T, H, D\), and \(B, S, K, D\) twice, with the same B and D"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(shapes, options, message):
    q, k = (jnp.ones(shape) for shape in shapes)
    with pytest.raises(SplashError, match=message):
        jaxpar.splash_attention(q, k, k, **options)


def test_arrays_of_one_floating_point_dtype_are_asked_for():
    q = jnp.ones((2, 128, 4, 8))
    message = r"of {'q': 'float32', 'k': 'bfloat16', 'v': 'float32'}; give arrays of one floating-point dtype"
    with pytest.raises(SplashError, match=message):
        jaxpar.splash_attention(q, q.astype("bfloat16"), q)
    with pytest.raises(SplashError, match="'v': 'list'}; give arrays of one floating-point dtype"):
        jaxpar.splash_attention(q, q, [1.0])
    with pytest.raises(SplashError, match="'q': 'int32'"):
        jaxpar.splash_attention(*[q.astype("int32")] * 3)


@pytest.mark.parametrize(
    ("axes", "kv_heads", "message"),
    [
        ({"data": 8}, 2, r"q has 2 rows, which do not divide by 8, the size of \('data',\)"),
        ({"data": 2, "model": 4}, 2, "k has 2 heads, which do not divide by 4, the size of 'model'"),
    ],
)
def test_rows_and_heads_divide_over_the_mesh(axes, kv_heads, message):
    q, k, v = draw(kv_heads=kv_heads)
    with jax.set_mesh(jaxpar.make_mesh(**axes)), pytest.raises(SplashError, match=message):
        jax.jit(jaxpar.splash_attention)(q, k, v)


def test_in_an_island_it_does_not_stand_beside_axes_of_the_compilers():
    q, k, v = draw(batch=4)
    spec = jax.sharding.PartitionSpec()
    island = jax.shard_map(
        jaxpar.splash_attention, in_specs=spec, out_specs=spec, axis_names={"stage"}, check_vma=False
    )
    with (
        jax.set_mesh(jaxpar.make_mesh(fsdp=2, stage=4)),
        pytest.raises(jaxpar.MeshError, match="in an island over 'stage'"),
    ):
        jax.jit(island)(q, k, v)


def test_over_context_and_stage_another_attention_serves():
    q, k, v = draw(batch=4)
    with (
        jax.set_mesh(jaxpar.make_mesh(data=2, context=4)),
        pytest.raises(jaxpar.MeshError, match=r"use jaxpar\.ring_att"),
    ):
        jax.jit(jaxpar.splash_attention)(q, k, v)


def test_rows_that_pad_a_batch_count_for_nothing_whatever_the_mesh():
    losses = []
    batch = {"x": np.random.default_rng(0).normal(size=(3, 128, 8)).astype("f4")}

    class Attend(nnx.Module):
        def __init__(self, rngs):
            self.project = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            q = self.project(x).reshape(*x.shape[:2], 2, 4)
            return jaxpar.splash_attention(q, q, q, is_causal=True)

    for size in (1, 2):
        strategy = jaxpar.sharded(sub_mesh(data=size))
        init_fn = lambda rng: jaxpar.TrainState.create(Attend(nnx.Rngs(rng)), optax.sgd(0.1))
        # A mean over rows, which padding has the step take one by one.
        step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
        state = strategy.init(init_fn, jax.random.key(0))
        _, metrics = step(state, strategy.shard_batch(jaxpar.pad_batch(batch, 4)))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
