"""Ready-made rules: trees of awkward shapes, and beside them the specs that each list gives on a mesh of 8."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar.layout import layout_state
from jaxpar.rules import EXPERT, FSDP, MEGATRON, PIPELINE, ZERO1, experts, fsdp, megatron, stages, zero1

W, H, V = 32, 64, 48  # width, hidden, vocabulary
HEADS, KV, D = 8, 2, 4
MESHES = {
    "model": {"model": 8},
    "fsdp": {"fsdp": 8},
    "data": {"data": 8},
    "data_model": {"data": 2, "model": 4},
    "fsdp_model": {"fsdp": 2, "model": 4},
}

# What a tree of shapes is laid out as: path: (shape, FSDP on fsdp=8, MEGATRON on model=8, both on fsdp=2, model=4).
# None stands for a leaf that stays whole.
SHAPES = {
    # Flax's attention: (in, heads, head_dim) and (heads, head_dim, out), with biases.
    "attn/query/kernel": ((W, HEADS, D), P("fsdp"), P(None, "model"), P("fsdp", "model")),
    "attn/query/bias": ((HEADS, D), None, P("model"), P("model")),
    "attn/key/kernel": ((W, KV, D), P("fsdp"), None, P("fsdp")),
    "attn/value/kernel": ((W, KV, D), P("fsdp"), None, P("fsdp")),
    "attn/value/bias": ((KV, D), None, None, None),
    "attn/out/kernel": ((HEADS, D, W), P(None, None, "fsdp"), P("model"), P("model", None, "fsdp")),
    "attn/out/bias": ((W,), None, None, None),
    # Plain projections: (in, heads * head_dim) and back.
    "flat/query/kernel": ((W, W), P("fsdp"), P(None, "model"), P("fsdp", "model")),
    "flat/query/bias": ((W,), None, P("model"), P("model")),
    "flat/key/kernel": ((W, 12), P("fsdp"), None, P("fsdp", "model")),
    "flat/value/kernel": ((W, 2 * W), P(None, "fsdp"), P(None, "model"), P("fsdp", "model")),
    "flat/out/kernel": ((W, 2 * W), P(None, "fsdp"), P("model"), P("model", "fsdp")),
    # A stack of three scanned layers, with heads and without.
    "scan/query/kernel": ((3, W, HEADS, D), P(None, "fsdp"), P(None, None, "model"), P(None, "fsdp", "model")),
    "scan/query/bias": ((3, HEADS, D), None, P(None, "model"), P(None, "model")),
    "scan/out/kernel": (
        (3, HEADS, D, W),
        P(None, None, None, "fsdp"),
        P(None, "model"),
        P(None, "model", None, "fsdp"),
    ),
    "stack/query/kernel": ((8, W, W), P(None, "fsdp"), P(None, None, "model"), P(None, "fsdp", "model")),
    "stack/out/kernel": ((8, W, W), P(None, "fsdp"), P(None, "model"), P(None, "model", "fsdp")),
    "layers/up/kernel": ((8, W, H), P(None, None, "fsdp"), P(None, None, "model"), P(None, "fsdp", "model")),
    "layers/up/bias": ((8, H), P(None, "fsdp"), P(None, "model"), P(None, "model")),
    "layers/down/kernel": ((8, H, W), P(None, "fsdp"), P(None, "model"), P(None, "model", "fsdp")),
    "layers/down/bias": ((8, W), P(None, "fsdp"), None, P(None, "fsdp")),
    "layers/norm/scale": ((8, W), P(None, "fsdp"), None, P(None, "fsdp")),
    # MLPs by their listed names.
    "mlp/gate/kernel": ((W, H), P(None, "fsdp"), P(None, "model"), P("fsdp", "model")),
    "mlp/fc1/kernel": ((W, H), P(None, "fsdp"), P(None, "model"), P("fsdp", "model")),
    "mlp/fc1/bias": ((H,), None, P("model"), P("model")),
    "mlp/fc2/kernel": ((H, W), P("fsdp"), P("model"), P("model", "fsdp")),
    "mlp/wi/kernel": ((W, H), P(None, "fsdp"), P(None, "model"), P("fsdp", "model")),
    "mlp/wi_0/kernel": ((W, H), P(None, "fsdp"), P(None, "model"), P("fsdp", "model")),
    "mlp/wi_1/kernel": ((W, H), P(None, "fsdp"), P(None, "model"), P("fsdp", "model")),
    "mlp/wo/kernel": ((H, W), P("fsdp"), P("model"), P("model", "fsdp")),
    "mlp/wo/bias": ((W,), None, None, None),
    # The vocabulary, the tied head's table too; one that doesn't divide by 8.
    "embed/embedding": ((V, W), P("fsdp"), P("model"), P("model", "fsdp")),
    "odd/embedding": ((50, W), P(None, "fsdp"), None, P("fsdp")),
    # What no rule of MEGATRON knows, names that only look alike among them.
    "head/out/kernel": ((W, V), P(None, "fsdp"), None, P(None, "fsdp")),
    "Dense_0/kernel": ((W, H), P(None, "fsdp"), None, P(None, "fsdp")),
    "upper/kernel": ((W, H), P(None, "fsdp"), None, P(None, "fsdp")),
    "up/Dense_0/kernel": ((W, H), P(None, "fsdp"), None, P(None, "fsdp")),
    "conv/kernel": ((3, 3, 16, W), P(None, None, None, "fsdp"), None, P(None, None, None, "fsdp")),
    "norm/scale": ((256,), P("fsdp"), None, P("fsdp")),
    # Awkward: odd in every dim, one row, nothing at all, no dim at all.
    "odd/kernel": ((33, 35), None, None, None),
    "one/kernel": ((1, 1), None, None, None),
    "empty/kernel": ((0, W), None, None, None),
    "scalar": ((), None, None, None),
}


def shapes_tree():
    return tree_of({path: row[0] for path, row in SHAPES.items()})


def tree_of(shapes):
    """Returns parameters, without values, of the given shapes by path."""
    tree = {}
    for path, shape in shapes.items():
        node = tree
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"params": tree}


def specs_of_shapes(shapes, mesh, *rules):
    return specs_of(tree_of(shapes), mesh, *rules)


def specs_of(tree, mesh, *rules):
    """Returns each leaf's spec, trailing None left out, by its path under `params`; None for a whole one."""
    layout = layout_state(tree, rules, jaxpar.make_mesh(**MESHES[mesh]))
    return {row.path.removeprefix("params/"): shorten(row.spec) for row in layout.rows}


def shorten(spec):
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries) if entries else None


def differences(found, expected):
    return {path: (found[path], spec) for path, spec in expected.items() if found[path] != spec}


def test_fsdp_splits_the_largest_dim_of_a_layer_that_divides():
    expected = {path: row[1] for path, row in SHAPES.items()}
    assert differences(specs_of(shapes_tree(), "fsdp", FSDP), expected) == {}


def test_megatron_splits_heads_hidden_features_and_vocabulary():
    expected = {path: row[2] for path, row in SHAPES.items()}
    assert differences(specs_of(shapes_tree(), "model", MEGATRON), expected) == {}


def test_fsdp_fills_the_dims_that_megatron_left_open():
    expected = {path: row[3] for path, row in SHAPES.items()}
    assert differences(specs_of(shapes_tree(), "fsdp_model", MEGATRON, FSDP), expected) == {}


def test_zero1_leaves_every_parameter_whole():
    found = specs_of(shapes_tree(), "data", ZERO1)
    assert set(found.values()) == {None}


# Stacks of 4 layers and mixtures of 8 experts: path: (shape, PIPELINE on stage=2 and EXPERT on expert=2, then MEGATRON
# on model=2, or FSDP on fsdp=2, after them).
STACKED = {
    "blocks/up/kernel": ((4, W, H), P("stage"), P("stage", None, "model"), P("stage", None, "fsdp")),
    "blocks/up/bias": ((4, H), P("stage"), P("stage", "model"), P("stage", "fsdp")),
    "blocks/norm/scale": ((4, W), P("stage"), P("stage"), P("stage", "fsdp")),
    "blocks/attn/query/kernel": ((4, W, HEADS, D), P("stage"), P("stage", None, "model"), P("stage", "fsdp")),
    "blocks/attn/out/kernel": (
        (4, HEADS, D, W),
        P("stage"),
        P("stage", "model"),
        P("stage", None, None, "fsdp"),
    ),
    "blocks/experts/up/kernel": (
        (4, 8, W, H),
        P("stage", "expert"),
        P("stage", "expert", None, "model"),
        P("stage", "expert", None, "fsdp"),
    ),
    "blocks/experts/up/bias": (
        (4, 8, H),
        P("stage", "expert"),
        P("stage", "expert", "model"),
        P("stage", "expert", "fsdp"),
    ),
    "blocks/router/kernel": ((4, W, 8), P("stage"), P("stage"), P("stage", "fsdp")),
    "experts/down/kernel": ((8, H, W), P("expert"), P("expert", "model"), P("expert", "fsdp")),
    # A list of layers is no stack, and a name that only looks alike is none either.
    "layers/0/up/kernel": ((W, H), None, P(None, "model"), P(None, "fsdp")),
    "my_blocks/up/kernel": ((4, W, H), None, P(None, None, "model"), P(None, None, "fsdp")),
    "embed/embedding": ((V, W), None, P("model"), P("fsdp")),
}


@pytest.mark.parametrize(("column", "more", "axis"), [(1, [], "data"), (2, [MEGATRON], "model"), (3, [FSDP], "fsdp")])
def test_pipeline_splits_stacks_and_expert_their_experts_and_more_lists_fill_the_rest(column, more, axis):
    mesh = jaxpar.make_mesh(**{"stage": 2, "expert": 2, axis: 2})
    tree = tree_of({path: row[0] for path, row in STACKED.items()})
    found = {
        row.path.removeprefix("params/"): shorten(row.spec)
        for row in layout_state(tree, [PIPELINE, EXPERT, *more], mesh).rows
    }
    assert differences(found, {path: row[column] for path, row in STACKED.items()}) == {}


def test_stacks_and_experts_can_be_named():
    tree = tree_of({"decoder/kernel": (8, W, W), "moe/bias": (8, W), "experts/kernel": (8, W, W)})
    mesh = jaxpar.make_mesh(stage=4, expert=2)
    rows = layout_state(tree, [stages(stacks=["decoder"]), experts(names=["moe"])], mesh).rows
    assert {row.path: shorten(row.spec) for row in rows} == {
        "params/decoder/kernel": P("stage"),
        "params/moe/bias": P("expert"),
        "params/experts/kernel": None,
    }


def test_a_leaf_of_the_experts_without_their_dim_is_reported():
    tree = tree_of({"experts/up/kernel": (8, W, W), "experts/router/kernel": (W, 8)})
    layout = layout_state(tree, [EXPERT], jaxpar.make_mesh(expert=8))
    (row,) = layout.left_whole
    assert row.path == "params/experts/router/kernel"
    assert row.note == "whole over 'expert': the shape (32, 8) of a kernel has no dim of experts"


def test_fsdp_leaves_the_layers_of_leaves_that_it_does_not_know_alone():
    shapes = {
        "blocks/up/kernel": (16, W, H),
        "blocks/up/lora_a": (16, W, 8),
        "blocks/mixer/decay": (16, 10),
        "blocks/attn/query/kernel": (16, W, HEADS, D),
        "blocks/attn/query/bias": (16, HEADS, D),
        "blocks/attn/out/kernel": (16, HEADS, D, W),
        "blocks/attn/sink": (16, HEADS),
        "other/table": (16, 10),
        "lone/gate": (64, 16),
        "lone/kernel": (W, W),
    }
    found = specs_of_shapes(shapes, "fsdp", FSDP)
    assert found["blocks/up/lora_a"] == P(None, "fsdp")
    assert found["blocks/mixer/decay"] is None
    assert found["blocks/attn/sink"] == P(None, "fsdp")
    assert found["other/table"] == P("fsdp")
    assert found["lone/gate"] == P("fsdp")


def test_what_a_heuristic_leaves_whole_is_reported_with_the_reason():
    mesh = jaxpar.make_mesh(model=8)
    notes = {row.path: row.note for row in layout_state(shapes_tree(), [MEGATRON], mesh).left_whole}
    assert "dim -2 of (32, 2, 4) does not divide by 8" in notes["params/attn/key/kernel"]
    assert "dim -2 of (50, 32) does not divide by 8" in notes["params/odd/embedding"]
    for unknown in ("Dense_0/kernel", "upper/kernel", "up/Dense_0/kernel", "head/out/kernel", "conv/kernel"):
        assert "megatron(column=[...], row=[...])" in notes[f"params/{unknown}"], unknown
    assert not {"params/norm/scale", "params/mlp/wo/bias", "params/scalar"} & set(notes)


def test_fsdp_reports_small_and_odd_leaves():
    layout = layout_state(shapes_tree(), [FSDP], jaxpar.make_mesh(fsdp=8))
    notes = {row.path: row.note for row in layout.left_whole}
    assert "32 elements are fewer than min_size=128" in notes["params/attn/out/bias"]
    assert "no open dim of (33, 35) divides by 8" in notes["params/odd/kernel"]
    assert "params/mlp/fc2/kernel" not in notes
    assert [row.bytes_per_device for row in layout.left_whole] == sorted(
        (row.bytes_per_device for row in layout.left_whole), reverse=True
    )


@pytest.mark.parametrize(("min_size", "spec"), [(1, P("fsdp")), (32, P("fsdp")), (33, None)])
def test_the_smallest_size_that_fsdp_splits_can_be_given(min_size, spec):
    found = specs_of(shapes_tree(), "fsdp", fsdp(min_size=min_size))
    assert found["attn/out/bias"] == spec


@pytest.mark.parametrize(
    ("rules", "path", "spec"),
    [
        (megatron(column=["Dense_0"]), "Dense_0/kernel", P(None, "model")),
        (megatron(row=["Dense_0"]), "Dense_0/kernel", P("model")),
        (megatron(column=["Dense_0"]), "mlp/fc2/kernel", P("model")),
        (megatron(column=[r"Dense_\d+"]), "up/Dense_0/kernel", P(None, "model")),
    ],
)
def test_more_layers_can_be_named(rules, path, spec):
    assert specs_of(shapes_tree(), "model", rules)[path] == spec


def test_rules_can_split_over_another_axis():
    assert specs_of(shapes_tree(), "data", fsdp(axis="data"))["mlp/fc2/kernel"] == P("data")
    assert specs_of(shapes_tree(), "fsdp", megatron(axis="fsdp"))["mlp/fc2/kernel"] == P("fsdp")


def test_a_rule_before_a_ready_made_list_comes_first_and_whole_closes_the_leaf():
    found = specs_of(shapes_tree(), "fsdp", [("fc2", jaxpar.WHOLE), (".*", None)], FSDP)
    assert found["mlp/fc2/kernel"] is None
    assert found["mlp/fc1/kernel"] == P(None, "fsdp")


# real models: nnx and linen, whose trees are spelt alike


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(HEADS, W, decode=False, rngs=rngs)
        self.up = nnx.Linear(W, H, rngs=rngs)
        self.down = nnx.Linear(H, W, rngs=rngs)
        self.norm = nnx.LayerNorm(W, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nnx.relu(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, W, rngs=rngs)
        self.block = NnxBlock(rngs)


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, W, rngs=rngs)

        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs):
            return NnxBlock(rngs)

        self.block = make_blocks(rngs)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        y = linen.LayerNorm(name="norm")(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS, name="attn")(y)
        return x + linen.Dense(W, name="down")(linen.relu(linen.Dense(H, name="up")(x))), None


class LinenModel(linen.Module):
    scanned: bool = False

    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(V, W, name="embed")
        block = LinenBlock
        if self.scanned:
            block = linen.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = block(name="block")(embed(tokens), None)
        return embed.attend(x)


def make_model(name, rng):
    if name.startswith("linen"):
        return LinenModel(name.endswith("scanned")).init(rng, jnp.zeros((2, 4), int))
    return {"nnx": NnxModel, "nnx_scanned": NnxScanned}[name](nnx.Rngs(rng))


MODELS = ["nnx", "linen", "nnx_scanned", "linen_scanned"]
# Each leaf of one block, without the dim of layers: MEGATRON on model=8, FSDP on fsdp=8, both on fsdp=2, model=4.
MODEL_SPECS = {
    "embed/embedding": (P("model"), P("fsdp"), P("model", "fsdp")),
    "block/attn/query/kernel": (P(None, "model"), P("fsdp"), P("fsdp", "model")),
    "block/attn/query/bias": (P("model"), None, P("model")),
    "block/attn/key/kernel": (P(None, "model"), P("fsdp"), P("fsdp", "model")),
    "block/attn/value/kernel": (P(None, "model"), P("fsdp"), P("fsdp", "model")),
    "block/attn/out/kernel": (P("model"), P(None, None, "fsdp"), P("model", None, "fsdp")),
    "block/attn/out/bias": (None, None, None),
    "block/up/kernel": (P(None, "model"), P(None, "fsdp"), P("fsdp", "model")),
    "block/up/bias": (P("model"), None, P("model")),
    "block/down/kernel": (P("model"), P("fsdp"), P("model", "fsdp")),
    "block/down/bias": (None, None, None),
    "block/norm/scale": (None, None, None),
}
SETS = {
    "model": (0, [MEGATRON]),
    "fsdp": (1, [fsdp(min_size=1024)]),
    "fsdp_model": (2, [MEGATRON, fsdp(min_size=1024)]),
}


@pytest.mark.parametrize("mesh", SETS)
@pytest.mark.parametrize("name", MODELS)
def test_flax_models_are_split_alike_in_nnx_and_linen_scanned_or_not(name, mesh):
    column, rules = SETS[mesh]
    strategy = jaxpar.sharded(jaxpar.make_mesh(**MESHES[mesh]), *rules)
    layout = strategy.layout(lambda rng: jaxpar.TrainState.create(make_model(name, rng), optax.sgd(0.1)))
    found = {row.path: shorten(row.spec) for row in layout.rows}
    scanned = name.endswith("scanned")
    for path, specs in MODEL_SPECS.items():
        spec = specs[column]
        if spec is not None and scanned and path.startswith("block"):
            spec = P(None, *spec)
        assert found[f"params/{path}"] == spec, path


# Key and value heads of grouped-query attention, the size of the model axis, and whether they are split.
@pytest.mark.devices(8)
@pytest.mark.parametrize(("kv_heads", "size", "divides"), [(2, 2, True), (2, 4, False), (4, 4, True), (4, 8, False)])
def test_key_and_value_heads_that_do_not_divide_stay_whole_and_are_reported(kv_heads, size, divides):
    def init_fn(rng):
        module = nnx.MultiHeadAttention(HEADS, W, num_kv_heads=kv_heads, normalize_qk=True, rngs=nnx.Rngs(rng))
        return jaxpar.TrainState.create(module, optax.sgd(0.1))

    layout = jaxpar.sharded(jaxpar.make_mesh(data=-1, model=size), MEGATRON).layout(init_fn)
    found = {row.path: shorten(row.spec) for row in layout.rows}
    assert found["params/query/kernel"] == P(None, "model")
    assert found["params/out/kernel"] == P("model")
    assert found["params/key/kernel"] == found["params/value/kernel"] == (P(None, "model") if divides else None)
    assert found["params/query_ln/scale"] is found["params/key_ln/scale"] is None
    reported = {row.path for row in layout.left_whole}
    kv_leaves = {f"params/{name}/{leaf}" for name in ("key", "value") for leaf in ("kernel", "bias")}
    assert reported == (set() if divides else kv_leaves)


# Flax's own sharding metadata

annotate = linen.with_partitioning
logical = linen.with_logical_partitioning
he = linen.initializers.lecun_normal()


def nnx_annotated(rng):
    module = nnx.Linear(W, H, kernel_metadata={"out_sharding": (None, "model")}, rngs=nnx.Rngs(rng))
    return jaxpar.TrainState.create(module, optax.adam(1e-3))


def linen_partitioned(rng):
    module = linen.Dense(H, kernel_init=annotate(he, (None, "model")))
    return jaxpar.TrainState.create(module.init(rng, jnp.ones((1, W))), optax.adam(1e-3))


def linen_logical(rng):
    module = linen.Dense(H, kernel_init=logical(he, ("embed", "hidden")))
    with linen.logical_axis_rules([("embed", None), ("hidden", "model")]):
        return jaxpar.TrainState.create(module.init(rng, jnp.ones((1, W))), optax.adam(1e-3))


ANNOTATED = [nnx_annotated, linen_partitioned, linen_logical]


@pytest.mark.parametrize("init_fn", ANNOTATED)
def test_annotations_are_honoured_without_any_rule(init_fn):
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=2, model=4))
    state = strategy.init(init_fn, jax.random.key(0))
    assert state.params["kernel"].addressable_shards[0].data.shape == (W, H // 4)
    assert state.opt_state[0].mu["kernel"].addressable_shards[0].data.shape == (W, H // 4)


@pytest.mark.parametrize("init_fn", ANNOTATED)
def test_rules_fill_what_annotations_left_open_and_do_not_undo_them(init_fn):
    strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=2, model=4), [("kernel", P("model", None)), (".*", None)], FSDP)
    with pytest.raises(jaxpar.PartitionError, match="use that axis twice"):
        strategy.layout(init_fn)
    strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=2, model=4), FSDP)
    found = {row.path: shorten(row.spec) for row in strategy.layout(init_fn).rows}
    assert found["params/kernel"] == found["opt_state/0/mu/kernel"] == P("fsdp", "model")


@pytest.mark.parametrize("init_fn", ANNOTATED)
def test_an_annotation_for_an_axis_that_the_mesh_lacks_leaves_the_dim_open(init_fn):
    for strategy in (jaxpar.sharded(jaxpar.make_mesh(data=8)), jaxpar.data_parallel()):
        found = {row.path: shorten(row.spec) for row in strategy.layout(init_fn).rows}
        assert set(found.values()) == {None}
    strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=8), FSDP)
    assert {row.path: shorten(row.spec) for row in strategy.layout(init_fn).rows}["params/kernel"] == P(None, "fsdp")


def test_a_logical_name_without_a_rule_is_named():
    def init_fn(rng):
        module = nnx.Linear(W, H, kernel_metadata={"out_sharding": ("embed", "modle")}, rngs=nnx.Rngs(rng))
        return jaxpar.TrainState.create(module, optax.sgd(0.1))

    with pytest.raises(jaxpar.PartitionError, match=r"'params/kernel' is annotated with 'embed'.*logical_axis_rules"):
        jaxpar.sharded(jaxpar.make_mesh(data=8)).layout(init_fn)


def test_an_annotation_that_does_not_divide_is_named():
    def init_fn(rng):
        module = nnx.Linear(W, 6, kernel_metadata={"out_sharding": (None, "model")}, rngs=nnx.Rngs(rng))
        return jaxpar.TrainState.create(module, optax.sgd(0.1))

    with pytest.raises(jaxpar.PartitionError, match=r"shape \(32, 6\): dim 1 does not divide by 8"):
        jaxpar.sharded(jaxpar.make_mesh(model=8)).layout(init_fn)


def test_annotations_of_a_scanned_stack_name_its_layers_dim():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make_layers(rngs):
        return nnx.Linear(W, H, kernel_metadata={"out_sharding": (None, "model")}, rngs=rngs)

    strategy = jaxpar.sharded(jaxpar.make_mesh(model=8))
    layout = strategy.layout(lambda rng: jaxpar.TrainState.create(make_layers(nnx.Rngs(rng)), optax.sgd(0.1)))
    assert {row.path: shorten(row.spec) for row in layout.rows}["params/kernel"] == P(None, None, "model")


def test_zero1_splits_the_moments_alone():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=8), zero1(min_size=64))
    layout = strategy.layout(lambda rng: jaxpar.TrainState.create(make_model("nnx", rng), optax.adamw(1e-3)))
    found = {row.path: shorten(row.spec) for row in layout.rows}
    assert {spec for path, spec in found.items() if path.startswith("params/")} == {None}
    assert found["opt_state/0/mu/block/up/kernel"] == found["opt_state/0/nu/block/up/kernel"] == P(None, "data")
    assert found["opt_state/0/mu/embed/embedding"] == P("data")
