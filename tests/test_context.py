"""Attention over a split sequence is plain attention, in every order and on every mesh, and holds and sends no more."""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_text import find_collectives
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import VOCAB, NnxBlock, make_embed, sub_mesh

import jaxpar
from jaxpar import ContextError, context, ring_attention, split_sequence, ulysses_attention, zigzag, zigzag_order

ATTENTIONS = {"ring": ring_attention, "ulysses": ulysses_attention}
BATCH, HEAD_SIZE = 2, 4


def attend_plainly(q_BTHD, k_BTKD, v_BTKD, *, is_causal=False, positions=None, segment_ids=None, scale=None):
    """Returns attention as its definition has it, in the dtype of its input."""
    b, t, h, d = q_BTHD.shape
    q_BTKGD = q_BTHD.reshape(b, t, k_BTKD.shape[2], -1, d)
    scores_BKGTS = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BTKD) * (d**-0.5 if scale is None else scale)
    seen_BTS = np.ones((b, t, t), bool)
    if is_causal:
        place_BT = np.broadcast_to(np.arange(t) if positions is None else positions, (b, t))
        seen_BTS &= place_BT[:, None, :] <= place_BT[:, :, None]
    if segment_ids is not None:
        seen_BTS &= segment_ids[:, None, :] == segment_ids[:, :, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf))
    return jnp.einsum("bkgts,bskd->btkgd", weights_BKGTS, v_BTKD).reshape(b, t, h, d)


class Case(NamedTuple):
    """An attention: the mesh, the sizes, and its masks by name."""

    attention: str
    mesh: dict[str, int]
    tokens: int = 24
    heads: tuple[int, int] = (4, 2)
    block_size: int = 4
    masks: tuple[str, ...] = ()


CASES = {
    "one_device": Case("ring", {"data": 1}, 13, (4, 2), 5),
    "one_device_masked": Case("ring", {"data": 1}, 16, (4, 2), 4, ("causal", "shuffled", "packed")),
    "ring_of_2_causal": Case("ring", {"context": 2}, masks=("causal",)),
    "ring_of_4_zigzag": Case("ring", {"context": 4}, 24, (4, 4), 3, ("causal", "zigzag")),
    "ring_of_4_odd_blocks": Case("ring", {"context": 4}, 28, (4, 2), 3, ("causal", "packed")),
    "ring_of_8_packed": Case("ring", {"context": 8}, masks=("packed", "scaled")),
    "ring_beside_data": Case("ring", {"data": 2, "context": 4}, masks=("causal", "shuffled", "packed")),
    "ring_beside_model": Case("ring", {"context": 2, "model": 4}, 24, (8, 2), masks=("causal",)),
    "ring_multi_query_in_3_axes": Case(
        "ring", {"data": 2, "context": 2, "model": 2}, 24, (4, 1), 5, ("causal", "shuffled")
    ),
    "ulysses_of_2_causal": Case("ulysses", {"context": 2}, 26, masks=("causal",)),
    "ulysses_of_4_multi_query": Case("ulysses", {"context": 4}, 24, (8, 1), 5, ("causal", "zigzag")),
    "ulysses_of_8": Case("ulysses", {"context": 8}, 24, (8, 2), 7, ("packed", "scaled")),
    "ulysses_beside_data_and_model": Case(
        "ulysses", {"data": 2, "context": 2, "model": 2}, 24, (8, 2), 5, ("causal", "shuffled", "packed")
    ),
}


def make_masks(case):
    rng = np.random.default_rng(1)
    shape = (BATCH, case.tokens)
    masks: dict[str, Any] = {"is_causal": "causal" in case.masks}
    if "zigzag" in case.masks:
        masks["positions"] = zigzag_order(case.tokens, case.mesh["context"])
    if "shuffled" in case.masks:
        masks["positions"] = rng.permuted(np.broadcast_to(np.arange(case.tokens), shape), axis=1)
    if "packed" in case.masks:
        masks["segment_ids"] = np.sort(rng.integers(-1, 2, shape), axis=1)
    if "scaled" in case.masks:
        masks["scale"] = 0.3
    return masks


def make_arrays(tokens, heads, dtype="float64", batch=BATCH):
    """Returns queries, keys, values and what the output is pulled by."""
    rng = np.random.default_rng(0)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    return [jnp.asarray(rng.normal(size=(batch, tokens, size, HEAD_SIZE)), dtype) for size in sizes]


def with_gradients(attend):
    def run(q, k, v, pull):
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(pull)

    return run


def run_case(case, attend, dtype="float64"):
    with jax.set_mesh(sub_mesh(**case.mesh)):
        return jax.jit(with_gradients(attend))(*make_arrays(case.tokens, case.heads, dtype))


def differ(got, expected):
    wide = lambda x: np.asarray(x).astype("float64")
    return max(np.abs(wide(x) - wide(y)).max() for x, y in zip(got, expected, strict=True))


SLOW_CASES = ("ring_of_2_causal", "ulysses_of_2_causal", "ulysses_of_8")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_CASES)) for name in CASES]
)
def test_attention_and_its_gradients_are_those_of_the_definition_in_float64(name):
    case = CASES[name]
    masks = make_masks(case)
    with jax.enable_x64(True):
        attend = functools.partial(ATTENTIONS[case.attention], block_size=case.block_size, **masks)
        got = run_case(case, attend)
        expected = run_case(case._replace(mesh={"data": 1}), functools.partial(attend_plainly, **masks))
        assert [x.dtype for x in got] == ["float64"] * 4
        assert differ(got, expected) < 1e-12


@pytest.mark.parametrize("name", ["ring_of_2_causal", pytest.param("ulysses_of_2_causal", marks=pytest.mark.slow)])
def test_bf16_is_as_near_to_float64_as_jax_own_attention(name):
    case = CASES[name]._replace(tokens=32)
    masks = make_masks(case)
    attend = functools.partial(ATTENTIONS[case.attention], block_size=case.block_size, **masks)
    got = run_case(case, attend, "bfloat16")
    jax_own = run_case(case, functools.partial(jax.nn.dot_product_attention, is_causal=True), "bfloat16")
    assert [x.dtype for x in got] == ["bfloat16"] * 4
    assert differ(got, jax_own) < 0.1
    with jax.enable_x64(True):
        arrays = [x.astype("float64") for x in make_arrays(case.tokens, case.heads, "bfloat16")]
        exact = jax.jit(with_gradients(functools.partial(attend_plainly, **masks)))(*arrays)
        for ours, theirs, true in zip(got, jax_own, exact, strict=True):
            assert differ([ours], [true]) < 1.5 * differ([theirs], [true]) + 0.01


def test_a_zigzag_batch_gives_the_same_attention_in_another_order():
    case = CASES["ring_of_4_zigzag"]
    order = zigzag_order(case.tokens, 4)
    with jax.enable_x64(True):
        attend = functools.partial(ring_attention, is_causal=True, block_size=3)
        arrays = make_arrays(case.tokens, case.heads)
        straight = attend(*arrays[:3])
        with jax.set_mesh(sub_mesh(context=4)):
            moved = jax.jit(functools.partial(attend, positions=jnp.asarray(order)))(*(x[:, order] for x in arrays[:3]))
        assert differ([moved[:, np.argsort(order)]], [straight]) < 1e-12


# Where an island may stand: in what the builder wraps a step in, in a model's own loops, in an outer island.
def in_axis_name(attend):
    return lambda *args: jax.vmap(attend, in_axes=None, out_axes=0, axis_name="data", axis_size=1)(*args)[0]


def in_manual_data(attend):
    return jax.shard_map(attend, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=False)


def in_layers(attend):
    def run(q, k, v):
        return jax.lax.scan(lambda q, _: (jax.checkpoint(attend)(q, k, v), None), q, length=2)[0]

    return run


def in_stages(attend):
    def stage(q, k, v, weight):
        return attend(q * weight, k, v)[None]

    island = jax.shard_map(
        stage, in_specs=(P(), P(), P(), P("stage")), out_specs=P("stage"), axis_names={"stage"}, check_vma=False
    )
    return lambda q, k, v: island(q, k, v, jnp.array([0.5, 2.0], q.dtype)).sum(0)


def in_stages_by_hand(attend):
    return lambda q, k, v: attend(q * 0.5, k, v) + attend(q * 2.0, k, v)


NESTS = {
    "axis_name": (in_axis_name, {"data": 2, "context": 4}, lambda attend: attend),
    "manual_data": (in_manual_data, {"data": 2, "context": 2, "model": 2}, lambda attend: attend),
    "layers": (in_layers, {"context": 4}, in_layers),
    "stages": (in_stages, {"stage": 2, "context": 2, "model": 2}, in_stages_by_hand),
}


@pytest.mark.parametrize("name", NESTS)
@pytest.mark.parametrize("attention", ["ring", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_attention_nests_in_what_steps_and_models_are_made_of(attention, name):
    nest, mesh, by_hand = NESTS[name]
    case = Case(attention, mesh)
    with jax.enable_x64(True):
        got = run_case(case, nest(functools.partial(ATTENTIONS[attention], is_causal=True, block_size=4)))
        expected = run_case(case._replace(mesh={"data": 1}), by_hand(functools.partial(attend_plainly, is_causal=True)))
        assert differ(got, expected) < 1e-11


def test_blocks_are_still_skipped_under_the_builders_axis_name():
    case = CASES["ring_of_2_causal"]
    attend = functools.partial(ring_attention, is_causal=True, block_size=4)

    def count_branches(attend):
        with jax.set_mesh(sub_mesh(**case.mesh)):
            text = jax.jit(with_gradients(attend)).lower(*make_arrays(case.tokens, case.heads, "float32")).as_text()
        return text.count("stablehlo.case")

    assert count_branches(in_axis_name(attend)) == count_branches(attend) > 0


def count_collectives(text):
    """Returns (times, bytes) a step for each kind of collective and of number, those in loops as often as they run."""
    totals = collections.defaultdict(lambda: [0, 0])
    for one in find_collectives(text):
        key = one.kind, one.shapes[0][0]
        totals[key][0] += one.times
        totals[key][1] += one.times * one.bytes
    return dict(totals)


def compile_split(attend, mesh, tokens, heads, batch=BATCH, masks=(), backward=True):
    """Returns the compiled attention, or its gradients, of arrays that are split as a model's are on the mesh."""
    mesh = sub_mesh(**mesh)

    def sharding(heads):
        axes = {axis: axis if axis in mesh.shape else None for axis in ("data", "context", "model")}
        splits_heads = "model" in mesh.shape and heads % mesh.shape["model"] == 0
        return NamedSharding(mesh, P(axes["data"], axes["context"], axes["model"] if splits_heads else None))

    shardings = [sharding(size) for size in (heads[0], heads[1], heads[1], heads[0])]
    arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(make_arrays(tokens, heads, "float32", batch), shardings, strict=True)
    ]
    marks = [
        jax.ShapeDtypeStruct((batch, tokens), "int32", sharding=NamedSharding(mesh, P(*shardings[0].spec[:2])))
        for _ in masks
    ]

    def run(arrays, marks):
        bound = functools.partial(attend, **dict(zip(masks, marks, strict=True)))
        return with_gradients(bound)(*arrays) if backward else bound(*arrays[:3])

    out = (shardings[0], *shardings[:3]) if backward else shardings[0]
    with jax.set_mesh(mesh):
        return jax.jit(run, out_shardings=out).lower(arrays, marks).compile()


@pytest.mark.parametrize(("size", "shared"), [(4, 0), (2, 2)])
def test_a_ring_sends_keys_and_values_and_their_gradients_as_often_as_it_must(size, shared):
    tokens, heads = 64, (4, 2)
    attend = functools.partial(ring_attention, is_causal=True, block_size=8)
    part = BATCH * (tokens // size) * heads[1] * HEAD_SIZE * 4
    # A hop that is the only one is no loop: XLA sees that forward and backward send the same keys, and sends them once.
    for backward, arrays in ((False, 2), (True, 2 + 4 - shared)):
        found = count_collectives(compile_split(attend, {"context": size}, tokens, heads, backward=backward).as_text())
        # What each device sends: (n - 1) / n of each whole array, the least that lets every query see every key.
        assert found.pop(("collective-permute", "f")) == [arrays * (size - 1), arrays * (size - 1) * part]
        assert found.pop(("collective-permute", "s"))[1] < part
        assert not found


def test_a_ring_beside_data_and_model_gathers_neither_rows_nor_heads():
    attend = functools.partial(ring_attention, is_causal=True, block_size=8)
    mesh = {"data": 2, "context": 2, "model": 2}
    masks = ("positions", "segment_ids")
    found = count_collectives(compile_split(attend, mesh, 64, (4, 2), 4, masks).as_text())
    part = (4 // 2) * (64 // 2) * (2 // 2) * HEAD_SIZE * 4
    assert found.pop(("collective-permute", "f")) == [4, 4 * part]
    found.pop(("collective-permute", "s"))
    # Which blocks are hidden, told once forward and once backward to the devices that share the rows.
    assert found.pop(("all-reduce", "s"))[0] == 2
    assert not found


def test_key_value_heads_fewer_than_model_are_spread_over_it():
    attend = functools.partial(ring_attention, is_causal=True, block_size=8)
    text = compile_split(attend, {"context": 2, "model": 4}, 64, (8, 2)).as_text()
    found = count_collectives(text)
    assert found[("collective-permute", "f")] == [4, 4 * BATCH * 32 * HEAD_SIZE * 4]
    # The gradients of the repeated heads are summed at the end, not in each block.
    assert found[("all-reduce", "f")][0] == 1


@pytest.mark.parametrize("mesh", [{"context": 4}, {"context": 2, "model": 2}, {"data": 2, "context": 2, "model": 2}])
def test_ulysses_exchanges_within_context_alone_and_once_for_each_array(mesh):
    attend = functools.partial(ulysses_attention, is_causal=True, block_size=8)
    heads = (8, 4)
    found = count_collectives(compile_split(attend, mesh, 64, heads, 4).as_text())
    devices = math.prod(mesh.values())
    sizes = [4 * 64 * count * HEAD_SIZE * 4 // devices for count in (heads[0], heads[1], heads[1], heads[0])]
    assert found == {("all-to-all", "f"): [8, 2 * sum(sizes)]}


def test_ulysses_gathers_the_masks_alone():
    attend = functools.partial(ulysses_attention, is_causal=True, block_size=8)
    masks = ("positions", "segment_ids")
    found = count_collectives(compile_split(attend, {"context": 4}, 64, (8, 4), BATCH, masks).as_text())
    assert found.pop(("all-to-all", "f"))[0] == 8
    # Once for positions, and once for segments in either order: not again in the loops or in the backward pass.
    assert found == {("all-gather", "s"): [3, 3 * BATCH * 64 * 4]}


class SplitBlock(nnx.Module):
    """Attention under Megatron's sequence parallelism: what `model` splits beside it is the tokens."""

    def __init__(self, rngs, attend=ring_attention, split=split_sequence):
        self.query, self.key, self.value, self.out = (nnx.Linear(32, 32, rngs=rngs) for _ in range(4))
        self.attend, self.split = attend, split

    def __call__(self, x):
        x = self.split(x)
        q, k, v = (layer(x).reshape(*x.shape[:2], 4, 8) for layer in (self.query, self.key, self.value))
        return x + self.out(self.attend(q, k, v, is_causal=True).reshape(x.shape))


def test_ulysses_between_layers_moves_heads_for_tokens_and_nothing_else():
    strategy = jaxpar.sharded(sub_mesh(context=2, model=2), jaxpar.MEGATRON)
    make = lambda rng: SplitBlock(nnx.Rngs(rng), ulysses_attention, lambda x: x)
    state = strategy.abstract_state(lambda rng: jaxpar.TrainState.create(make(rng), optax.sgd(0.1)))
    step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
    compiled = step.lower(state, {"x": np.ones((16, 64, 32), "float32")}).compile()
    found = count_collectives(compiled.as_text())
    # Queries, keys, values and output, each way, over two pairs of devices.
    assert found.pop(("all-to-all", "f")) == [8, 8 * 16 * 64 * 32 * 4 // 4]
    assert set(found) == {("all-reduce", "f")}


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_what_some_devices_skip_holds_no_collective_where_model_splits_tokens_too(axis):
    mesh = sub_mesh(**{axis: 2, "context": 2, "model": 2})
    strategy = jaxpar.sharded(mesh, jaxpar.MEGATRON, *([jaxpar.FSDP] if axis == "fsdp" else []))
    state = strategy.abstract_state(lambda rng: jaxpar.TrainState.create(SplitBlock(nnx.Rngs(rng)), optax.sgd(0.1)))
    step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
    found = find_collectives(step.lower(state, {"x": np.ones((16, 16, 32), "float32")}).compile().as_text())
    assert "collective-permute" in {one.kind for one in found}
    assert not [one for one in found if one.in_branch]


LENGTHS = (1024, 2048, 4096, 8192)


@pytest.mark.parametrize(
    ("mesh", "backward"),
    [
        pytest.param({"context": 4}, True, id="ring_gradient"),
        pytest.param({"context": 4}, False, id="ring_forward", marks=pytest.mark.slow),
        pytest.param({"data": 1}, True, id="one_device_gradient", marks=pytest.mark.slow),
        pytest.param({"data": 1}, False, id="one_device_forward", marks=pytest.mark.slow),
    ],
)
def test_memory_grows_with_the_length_and_not_its_square(mesh, backward):
    attend = functools.partial(ring_attention, is_causal=True, block_size=128)
    sizes = [
        compile_split(attend, mesh, length, (2, 1), 1, backward=backward).memory_analysis().temp_size_in_bytes
        for length in LENGTHS
    ]
    assert all(size <= sizes[0] * length / LENGTHS[0] for size, length in zip(sizes, LENGTHS, strict=True)), sizes
    # Not one row of heads of one device's part of the scores would fit.
    assert sizes[-1] < (LENGTHS[-1] // math.prod(mesh.values())) ** 2 * 4 / 2, sizes


def count_pairs(monkeypatch, size, positions, tokens, block_size):
    """Returns how many pairs of blocks each device sums, by device and hop."""
    counts = np.zeros((size, size), int)
    add_values = context._add_values
    part = tokens // size

    def counting(kernel, row, key, sums, key_sums):
        def record(device, source):
            counts[device, (device - source) % size] += 1

        # The one feature of a key tells from which device it comes.
        jax.debug.callback(record, jax.lax.axis_index("context"), key[1][0, 0, 0, 0].astype("int32"))
        return add_values(kernel, row, key, sums, key_sums)

    monkeypatch.setattr(context, "_add_values", counting)
    source = jnp.repeat(jnp.arange(size), part).astype("float32").reshape(1, tokens, 1, 1)
    attend = functools.partial(ring_attention, is_causal=True, positions=positions, block_size=block_size)
    with jax.set_mesh(sub_mesh(context=size)):
        jax.block_until_ready(jax.jit(attend)(source, source, source))
    jax.effects_barrier()
    return counts


def test_zigzag_gives_each_device_the_same_work_in_every_hop(monkeypatch):
    size, tokens = 4, 64
    contiguous = count_pairs(monkeypatch, size, None, tokens, 4)
    monkeypatch.undo()
    balanced = count_pairs(monkeypatch, size, jnp.asarray(zigzag_order(tokens, size)), tokens, 4)
    # Of the 16 pairs of a hop: device 0 waits for device 3, which has work in every one.
    assert contiguous.tolist() == [[10, 0, 0, 0], [10, 16, 0, 0], [10, 16, 16, 0], [10, 16, 16, 16]]
    assert balanced.tolist() == [[10, 8, 8, 8]] * 4
    assert contiguous.sum() == balanced.sum() == 16 * 17 // 2


def test_zigzag_moves_every_sequence_and_says_where_its_tokens_were():
    batch = {"x": np.arange(16).reshape(2, 8), "y": {"z": jnp.arange(32).reshape(2, 8, 2)}, "id": np.arange(2)}
    moved = zigzag(batch, 2)
    order = [0, 1, 6, 7, 2, 3, 4, 5]
    assert list(moved) == ["x", "y", "id", "positions"]
    np.testing.assert_array_equal(moved["x"], batch["x"][:, order])
    np.testing.assert_array_equal(moved["y"]["z"], batch["y"]["z"][:, order])
    np.testing.assert_array_equal(moved["id"], batch["id"])
    np.testing.assert_array_equal(moved["positions"], [order, order])
    assert moved["positions"].dtype == "int32"
    np.testing.assert_array_equal(moved["x"][:, np.argsort(zigzag_order(8, 2))], batch["x"])


def test_zigzag_keeps_given_positions_and_leaves_other_entries():
    places = np.array([0, 1, 2, 0, 1, 2, 3, 4])
    batch = {"x": np.arange(16).reshape(2, 8), "images": np.zeros((2, 3, 3)), "positions": places}
    moved = zigzag(batch, 2, keys=["x"])
    np.testing.assert_array_equal(moved["positions"], [places[[0, 1, 6, 7, 2, 3, 4, 5]]] * 2)
    assert moved["images"] is batch["images"]
    far = zigzag({"x": batch["x"], "positions": places + 2**40}, 2)
    np.testing.assert_array_equal(far["positions"] - 2**40, moved["positions"])
    again = zigzag({"x": batch["x"], "positions": jnp.stack([places, places + 1])}, 4)
    np.testing.assert_array_equal(again["positions"][1] - again["positions"][0], np.ones(8))


def test_zigzag_for_one_device_adds_positions_alone():
    batch = {"x": np.arange(14).reshape(2, 7)}
    moved = zigzag(batch, 1)
    np.testing.assert_array_equal(moved["x"], batch["x"])
    np.testing.assert_array_equal(moved["positions"], [np.arange(7)] * 2)


class Decoder(nnx.Module):
    """Blocks under the names that `MEGATRON` knows, rotated and masked by positions."""

    def __init__(self, attend, split, layers, rngs):
        self.embed = make_embed(rngs)
        self.blocks = nnx.List([NnxBlock(0.0, rngs) for _ in range(layers)])
        self.attend, self.split = attend, split

    def __call__(self, tokens_BT, positions_BT):
        x_BTC = self.split(self.embed(tokens_BT))
        for block in self.blocks:
            normed_BTC = self.split(block.norm1(x_BTC))
            q_BTHD, k_BTKD = (turn(project(normed_BTC), positions_BT) for project in (block.query, block.key))
            mixed_BTHD = self.attend(q_BTHD, k_BTKD, block.value(normed_BTC), positions=positions_BT)
            x_BTC = self.split(x_BTC + block.out(mixed_BTHD))
            hidden_BTC = nnx.gelu(block.up(self.split(block.norm2(x_BTC))))
            x_BTC = self.split(x_BTC + block.down(hidden_BTC))
        return self.embed.attend(x_BTC)


def turn(x_BTHD, positions_BT):
    """Returns queries or keys of 2 features turned by their place."""
    angles_BT1 = positions_BT[..., None] * 0.3
    first, second = x_BTHD[..., 0], x_BTHD[..., 1]
    sin, cos = jnp.sin(angles_BT1).astype(x_BTHD.dtype), jnp.cos(angles_BT1).astype(x_BTHD.dtype)
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], -1)


@functools.cache
def make_init(attention, splits=False, layers=1):
    attend = functools.partial(ATTENTIONS[attention], is_causal=True, block_size=4)
    split = split_sequence if splits else (lambda x: x)
    return lambda rng: jaxpar.TrainState.create(
        Decoder(attend, split, layers, nnx.Rngs(rng)), optax.sgd(0.2, momentum=0.9)
    )


def loss_fn(model, batch, rng):
    logits = model(batch["x"], batch["positions"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {}


def make_batches(rows=8, tokens=16, size=4):
    rng = np.random.default_rng(0)
    text = [rng.integers(0, VOCAB, (rows, tokens + 1)) for _ in range(2)]
    return [zigzag({"x": rows[:, :-1], "y": rows[:, 1:]}, size) for rows in text]


BATCHES = make_batches()
TRAINED = {
    "context": (lambda: jaxpar.sharded(sub_mesh(context=4)), "ring", False),
    "data_context": (lambda: jaxpar.sharded(sub_mesh(data=2, context=4)), "ring", False),
    "context_model": (lambda: jaxpar.sharded(sub_mesh(context=2, model=4), jaxpar.MEGATRON), "ring", True),
    "fsdp_context": (lambda: jaxpar.sharded(sub_mesh(fsdp=2, context=4), jaxpar.FSDP), "ring", False),
    "ulysses": (
        lambda: jaxpar.sharded(sub_mesh(data=2, context=2, model=2), jaxpar.MEGATRON),
        "ulysses",
        True,
    ),
    "model": (lambda: jaxpar.sharded(sub_mesh(model=4), jaxpar.MEGATRON), "ring", True),
}


def compile_training(splits):
    strategy = jaxpar.sharded(sub_mesh(model=4), jaxpar.MEGATRON)
    step = jaxpar.make_train_step(loss_fn, strategy)
    batch = make_batches(rows=8, tokens=512)[0]
    return step.lower(strategy.abstract_state(make_init("ring", splits, layers=2)), batch).compile()


def test_split_sequences_hold_a_share_of_the_activations_between_split_layers():
    whole, split = compile_training(False), compile_training(True)
    assert split.memory_analysis().temp_size_in_bytes < 0.6 * whole.memory_analysis().temp_size_in_bytes
    # Each norm is of a device's own tokens.
    norms = re.compile(r"f32\[(8,\d+)[\d,]*\]\S* rsqrt\(")
    assert set(norms.findall(whole.as_text())) == {"8,512"}
    assert set(norms.findall(split.as_text())) == {"8,128"}


def sharding_of_split(mesh, **options):
    with jax.set_mesh(sub_mesh(**mesh)):
        x = jax.jit(functools.partial(split_sequence, **options))(jnp.ones((4, 16, 2)))
    return tuple(x.sharding.spec)


def test_split_sequence_splits_tokens_over_context_and_then_its_axis():
    assert sharding_of_split({"data": 2, "model": 4}) == (None, "model")
    assert sharding_of_split({"context": 2, "model": 4}) == (None, ("context", "model"))
    assert sharding_of_split({"context": 4, "data": 2}, axis="context") == (None, "context")


def test_split_sequence_is_the_identity_where_there_is_nothing_to_split_over():
    x = jnp.ones((4, 15, 2))
    assert split_sequence(x) is x
    with jax.set_mesh(sub_mesh(data=8)):
        assert split_sequence(x) is x
    with jax.set_mesh(sub_mesh(model=4)):
        island = jax.shard_map(split_sequence, in_specs=P("model"), out_specs=P("model"), axis_names={"model"})
        np.testing.assert_array_equal(jax.jit(island)(x), x)


def test_split_sequence_stands_in_a_stage():
    with jax.set_mesh(sub_mesh(stage=2, context=2, model=2)):
        island = jax.shard_map(
            lambda x: split_sequence(x) * 2, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"}
        )
        out = jax.jit(island)(jnp.ones((4, 16, 2)))
    np.testing.assert_array_equal(out, np.full((4, 16, 2), 2))
    assert out.addressable_shards[0].data.shape == (2, 4, 2)


ONES = {"q": (2, 8, 4, 4), "k": (2, 8, 2, 4), "v": (2, 8, 2, 4)}
INTS = functools.partial(jnp.zeros, dtype="int32")
ATTENTION_ERRORS = {
    "a dim less": ({"q": (8, 4, 4)}, {}, "q is float32 of shape (8, 4, 4); give 4 dims: rows, tokens"),
    "no token": ({"q": (2, 0, 4, 4)}, {}, "q is float32 of shape (2, 0, 4, 4); give 4 dims: rows, tokens"),
    "values of another shape": (
        {"v": (2, 8, 4, 4)},
        {},
        "q has shape (2, 8, 4, 4), k (2, 8, 2, 4) and v (2, 8, 4, 4); k and v must be alike",
    ),
    "keys of another length": (
        {"k": (2, 6, 2, 4), "v": (2, 6, 2, 4)},
        {},
        "q has shape (2, 8, 4, 4), k (2, 6, 2, 4) and v (2, 6, 2, 4); k and v must be alike, and like q but for heads",
    ),
    "heads that don't group": (
        {"k": (2, 8, 3, 4), "v": (2, 8, 3, 4)},
        {},
        "q has 4 heads, which do not divide by 3, those of k and v; repeat heads of k and v.",
    ),
    "tokens that don't divide": (
        dict.fromkeys("qkv", (2, 10, 4, 4)),
        {},
        "q has 10 tokens, which do not divide by 4, the size of mesh axis 'context'; pad to 12, or use 8.",
    ),
    "fewer tokens than devices": (
        dict.fromkeys("qkv", (2, 3, 4, 4)),
        {},
        "q has 3 tokens, which do not divide by 4, the size of mesh axis 'context'; pad to 4.",
    ),
    "positions of another length": (
        {},
        {"positions": INTS(9)},
        "positions is int32 of shape (9,); give whole numbers, as int32, of shape (8,) or (2, 8)",
    ),
    "positions that aren't whole": (
        {},
        {"positions": jnp.ones(8)},
        "positions is float32 of shape (8,); give whole numbers, as int32, of shape (8,) or (2, 8)",
    ),
    "positions in a list": (
        {},
        {"positions": [0] * 8},
        "positions is list of shape (8,); give whole numbers, as int32, of shape (8,) or (2, 8)",
    ),
    "segments of one row": (
        {},
        {"segment_ids": INTS(8)},
        "segment_ids is int32 of shape (8,); give whole numbers, as int32, of shape (2, 8)",
    ),
    "no block": ({}, {"block_size": 0}, "block_size is 0; give a whole number of tokens, 1 or more."),
    "half a block": ({}, {"block_size": 2.5}, "block_size is 2.5; give a whole number"),
    "a scale of text": ({}, {"scale": "small"}, "scale is 'small'; give a plain, finite number"),
    "a scale that is no number": ({}, {"scale": np.nan}, "scale is nan; give a plain, finite number"),
    "a complex scale": ({}, {"scale": np.complex64(1)}, "(1+0j); give a plain, finite number"),
}


@pytest.mark.parametrize("name", ATTENTION_ERRORS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bad_arrays_are_named_before_anything_is_compiled(attention, name):
    shapes, options, message = ATTENTION_ERRORS[name]
    arrays = [jnp.ones({**ONES, **shapes}[key]) for key in "qkv"]
    with jax.set_mesh(sub_mesh(context=4)), pytest.raises(ContextError, match=re.escape(message)):
        ATTENTIONS[attention](*arrays, **options)


def test_queries_keys_and_values_of_several_dtypes_are_named():
    q, k, v = (jnp.ones(ONES[key]) for key in "qkv")
    with pytest.raises(ContextError, match=r"k is bfloat16 of shape .* in one floating-point dtype for q, k and v"):
        ring_attention(q, k.astype("bfloat16"), v)
    with pytest.raises(ContextError, match="q is int32 of shape"):
        ring_attention(*(x.astype("int32") for x in (q, k, v)))


def test_heads_that_ulysses_can_not_share_out_are_named():
    arrays = [jnp.ones((2, 8, 6, 4))] * 3
    message = "q has 6 heads, which do not divide by 4, the size of mesh axis 'context'; use ring_attention"
    with jax.set_mesh(sub_mesh(context=4)), pytest.raises(ContextError, match=message):
        ulysses_attention(*arrays)


def test_an_unknown_axis_to_split_the_sequence_over_is_named():
    with pytest.raises(jaxpar.MeshError, match=r"Mesh axis 'modle' is unknown \(nearest: 'model'\)"):
        split_sequence(jnp.ones((2, 8, 4)), axis="modle")
    for axis in (3, ["model"]):
        with pytest.raises(jaxpar.MeshError, match=re.escape(f"Mesh axis {axis} is unknown")):
            split_sequence(jnp.ones((2, 8, 4)), axis=axis)


@pytest.mark.devices(8)
def test_an_island_stands_in_a_shard_map_over_an_axis_of_the_users_own():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=ONES[key]), "float32") for key in "qkv"]
    mesh = jax.make_mesh((2, 4), ("mine", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = P("mine")
        mine = jax.shard_map(ring_attention, in_specs=split, out_specs=split, axis_names={"mine"}, check_vma=False)
        found = jax.jit(mine)(*arrays)
    np.testing.assert_allclose(found, ring_attention(*arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "mesh"),
    [
        ("ring", {"data": 2, "context": 2}),
        pytest.param("ulysses", {"context": 2, "model": 2}, marks=pytest.mark.slow),
    ],
)
def test_attention_runs_op_by_op_too(attention, mesh):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=ONES[key]), "float32") for key in "qkv"]
    run = with_gradients(lambda *args: ATTENTIONS[attention](*map(split_sequence, args), is_causal=True))
    expected = run(*arrays, arrays[0])
    with jax.set_mesh(sub_mesh(**mesh)):
        found = run(*arrays, arrays[0])
    assert differ(found, expected) < 1e-5


def test_an_island_in_another_over_context_is_named():
    q, k, v = (jnp.ones(ONES[key]) for key in "qkv")
    split = P(None, "context")
    with jax.set_mesh(sub_mesh(context=4)), pytest.raises(jaxpar.MeshError, match="stands inside another one"):
        jax.shard_map(ring_attention, in_specs=split, out_specs=split, check_vma=False)(q, k, v)


X = np.zeros((2, 12))
OTHER_ERRORS = {
    "zigzag tokens": (
        lambda: zigzag({"x": X}, 4),
        "The sequence has 12 tokens, which do not divide by 8, twice 4, the size of mesh axis 'context'; pad to 16, or "
        "use 8.",
    ),
    "zigzag size": (lambda: zigzag_order(12, 0), "size is 0; give the size of the mesh axis 'context'"),
    "zigzag of an array": (lambda: zigzag(X, 2), "The batch is a ndarray, keys= is None; give a dict"),
    "zigzag key": (lambda: zigzag({"x": X}, 2, keys=["y"]), "The batch has ['x'], keys= is ['y']; give a dict, and"),
    "zigzag lengths": (
        lambda: zigzag({"x": X, "y": X[:, :8]}, 2),
        "The batch has sequences of shapes {\"['x']\": (2, 12), \"['y']\": (2, 8)}; name those of one length, as keys=",
    ),
    "zigzag lengths in an entry": (
        lambda: zigzag({"inputs": {"a": X, "b": X[:, :8]}}, 2),
        "The batch has sequences of shapes {\"['inputs']['a']\": (2, 12), \"['inputs']['b']\": (2, 8)}; name those",
    ),
    "zigzag of nothing": (lambda: zigzag({"x": X[0]}, 2), "The batch has sequences of shapes {}; name those"),
    "zigzag positions": (
        lambda: zigzag({"x": X, "positions": np.arange(8)}, 2),
        "positions is int64 of shape (8,); give an array of whole numbers, as int32, (12,) or (2, 12).",
    ),
    "split tokens": (
        lambda: split_sequence(jnp.ones((2, 12, 3))),
        "x has 12 tokens, which do not divide by 8, the size of mesh axes ('context', 'model'); pad to 16, or use 8.",
    ),
    "zigzag positions in a list": (
        lambda: zigzag({"x": X, "positions": list(range(12))}, 2),
        "positions is list of shape (12,); give an array of whole numbers, as int32, (12,) or (2, 12).",
    ),
    "zigzag positions that aren't whole": (
        lambda: zigzag({"x": X, "positions": np.arange(12) + 0.5}, 2),
        "positions is float64 of shape (12,); give an array of whole numbers, as int32, (12,) or (2, 12).",
    ),
    "zigzag keys in text": (
        lambda: zigzag({"x": X}, 2, keys="x"),
        "The batch has ['x'], keys= is 'x'; give a dict, and a list of names that it has.",
    ),
    "zigzag length": (lambda: zigzag_order(12.0, 2), "length is 12.0; give how many tokens a sequence has"),
    "zigzag of no token": (lambda: zigzag_order(0, 2), "length is 0; give how many tokens a sequence has"),
    "split a list": (
        lambda: split_sequence([[1.0, 2.0]]),
        "x is a list of shape (1, 2); give an array of rows, tokens, and more.",
    ),
    "a list": (lambda: ring_attention([1.0], X, X), "q is a list; give an array."),
    "split dims": (
        lambda: split_sequence(jnp.ones(12)),
        f"x is a {type(jnp.ones(1)).__name__} of shape (12,); give an array of rows, tokens",
    ),
}


@pytest.mark.parametrize("name", OTHER_ERRORS)
def test_what_can_not_be_split_is_named(name):
    call, message = OTHER_ERRORS[name]
    with jax.set_mesh(sub_mesh(context=2, model=4)), pytest.raises(ContextError, match=re.escape(message)):
        call()
