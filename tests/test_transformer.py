"""The transformer: causal, its heads grouped, its parts exchangeable, its leaves known to the rules.

B rows, T bytes, C features, H heads, K key/value heads, D head size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar import train_command
from jaxpar.transformer import Features, Sizes, Transformer, attend_causally, rotate

SIZES = Sizes(d_model=64, layers=2, heads=8, kv_heads=4, hidden=128)
TEXT_BT = np.random.default_rng(0).integers(0, 256, (2, 12), dtype=np.uint8)


def make_model(**parts):
    return Transformer(SIZES, rngs=nnx.Rngs(0), **parts)


def init_fn(rng):
    return jaxpar.TrainState.create(Transformer(SIZES, rngs=nnx.Rngs(rng)), optax.adamw(1e-3))


def test_no_byte_sees_a_later_one():
    model, changed_BT = make_model(), TEXT_BT.copy()
    changed_BT[:, 7] += 1
    before, after = model(TEXT_BT), model(changed_BT)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (jnp.abs(before[:, 7:] - after[:, 7:]).max(axis=-1) > 1e-3).all()


@jax.default_matmul_precision("highest")
def test_grouped_heads_are_plain_heads_with_keys_and_values_shared():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 6, heads, 4)) for i, heads in enumerate((8, 2, 2)))
    shared = [jnp.repeat(x_BTKD, 4, axis=2) for x_BTKD in (k, v)]
    np.testing.assert_allclose(attend_causally(q, k, v), attend_causally(q, *shared), rtol=1e-5, atol=1e-6)


def test_rotation_goes_by_positions_where_they_are_given():
    x_BTHD = jax.random.normal(jax.random.key(0), (2, 8, 3, 16))
    order = jaxpar.zigzag_order(8, 2)
    whole = rotate(x_BTHD)
    np.testing.assert_allclose(rotate(x_BTHD[:, order], jnp.asarray(order)), whole[:, order], rtol=1e-5, atol=1e-6)
    each = jnp.tile(jnp.asarray(order), (2, 1))
    np.testing.assert_allclose(rotate(x_BTHD[:, order], each), whole[:, order], rtol=1e-5, atol=1e-6)


def test_experts_add_their_penalty_to_each_rows_loss():
    model = make_model(make_mlp=functools.partial(jaxpar.MoE, num_experts=4))
    logits, penalty_B = model.predict(TEXT_BT)
    assert logits.shape == (2, 12, 256)
    # Balance is 1 or more a layer, and the router's logits are small at first.
    assert (penalty_B >= 2 * 0.01).all()
    assert (make_model().predict(TEXT_BT)[1] == 0).all()
    # What is held out is scored without it.
    batch = {"x": TEXT_BT, "y": TEXT_BT}
    trained, _ = train_command.loss_fn(model, batch, jax.random.key(0))
    np.testing.assert_allclose(trained - train_command.score_fn(model, batch, jax.random.key(0)), penalty_B, atol=1e-5)


@jax.default_matmul_precision("highest")
def test_rotated_products_depend_on_distance_alone():
    q, k = (jnp.tile(jax.random.normal(jax.random.key(i), (1, 1, 1, 16)), (1, 9, 1, 1)) for i in range(2))
    scores_TS = jnp.einsum("bthd,bshd->ts", rotate(q), rotate(k))
    for distance in range(5):
        diagonal = np.diagonal(scores_TS, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4)
    assert len({round(float(score), 3) for score in scores_TS[:, 0]}) == 9


def test_attention_and_mlp_are_arguments():
    class Nothing(nnx.Module):
        def __init__(self, d_model, hidden, *, rngs):
            self.sizes = (d_model, hidden)

        def __call__(self, x_BTC):
            return jnp.zeros_like(x_BTC)

    model = make_model(attend=lambda q_BTHD, k_BTKD, v_BTKD: jnp.zeros_like(q_BTHD), make_mlp=Nothing)
    assert model.blocks.mlp.sizes == (64, 128)
    bare = model.embed.attend(model.norm(model.embed(TEXT_BT.astype(np.int32))))
    np.testing.assert_array_equal(model(TEXT_BT), bare)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_layer_computes_in_the_dtype_of_its_parameters(dtype):
    graphdef, params = nnx.split(make_model())
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    graphdef, layers = nnx.split(model.blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], layers))
    x_BTC, _ = block(Features(model.embed(TEXT_BT.astype(np.int32)), jnp.zeros(len(TEXT_BT))))
    assert x_BTC.dtype == dtype
    assert model(TEXT_BT).dtype == jnp.float32


SPECS = {
    "embed/embedding": P("model", None),
    "attention/query/kernel": P(None, None, "model", None),
    "attention/key/kernel": P(None, None, "model", None),
    "attention/value/kernel": P(None, None, "model", None),
    "attention/out/kernel": P(None, "model", None, None),
    "mlp/up/kernel": P(None, None, "model"),
    "mlp/gate/kernel": P(None, None, "model"),
    "mlp/down/kernel": P(None, "model", None),
    "norm1/scale": P(None, None),
    "norm2/scale": P(None, None),
    "norm/scale": P(None),
}


def test_megatron_splits_every_leaf_but_the_norms():
    layout = jaxpar.sharded(jaxpar.make_mesh(data=2, model=4), jaxpar.MEGATRON).layout(init_fn)
    specs = {row.path: row.spec for row in layout.rows if row.path.startswith("params/")}
    assert len(specs) == len(SPECS)
    for path, spec in specs.items():
        end = next(end for end in SPECS if path.endswith(end))
        assert spec == SPECS[end], path
    assert layout.left_whole == ()


def test_key_and_value_heads_that_do_not_divide_stay_whole_and_are_reported():
    layout = jaxpar.sharded(jaxpar.make_mesh(model=8), jaxpar.MEGATRON).layout(init_fn)
    left = {row.path.split("/")[-2] for row in layout.left_whole if row.path.startswith("params/")}
    assert left == {"key", "value"}
