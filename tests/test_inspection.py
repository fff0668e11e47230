"""`inspect`: the reader on each trap of XLA's text, and live steps against closed forms."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import DEVICES, STRATEGIES, make_batches, make_task, sub_mesh

import jaxpar
from jaxpar.inspection.bounds import Terms, sort_traffic
from jaxpar.inspection.collectives import describe_source, find_collectives
from jaxpar.inspection.flops import count_products
from jaxpar.inspection.groups import axes_of_groups, read_groups
from jaxpar.inspection.hlo import Frame, read_program
from jaxpar.testing import assert_collectives
from jaxpar.train_command import loss_fn
from jaxpar.transformer import Sizes, Transformer


def program_of(body, more=""):
    return read_program(f"HloModule m\n{more}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def collectives_of(body, more="", **sizes):
    return find_collectives(program_of(body, more), sub_mesh(**(sizes or {"data": 2, "model": 4})))


# the text, as XLA's compilers print it

SUM = (
    "  %x = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)\n  ROOT %s = bf16[16,8]{1,0} all-reduce(%x), channel_id=1, "
)
GROUPS = {
    "lists": "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
    "a transposed range": "replica_groups=[4,2]<=[2,4]T(1,0)",
    "names of axes": "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}",
    "parts of axes": "replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}",
    "names of axes, devices in an order of their own": "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], "
    "device_ids=([2,4]T(1,0)) {'axis_2'}",
    "... in a listed one": "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=(0,4,1,5,2,6,3,7) {'axis_1'}",
}


@pytest.mark.parametrize("spelling", GROUPS)
def test_groups_are_read_in_every_spelling(spelling):
    (one,) = collectives_of(f"{SUM}{GROUPS[spelling]}, use_global_device_ids=true, to_apply=%add")
    assert (one.kind, one.axes, one.group_size, one.bytes, one.times) == ("all-reduce", ("data",), 2, 256, 1)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [([[0, 1, 2, 3, 4, 5, 6, 7]], ("data", "model")), ([[0, 1], [2, 3], [4, 5], [6, 7]], ()), ([[0, 4]], ("data",))],
)
def test_groups_that_follow_no_axes_have_none(groups, axes):
    assert axes_of_groups(np.array(groups), sub_mesh(data=2, model=4)) == axes


def test_groups_of_several_sizes_are_read_by_the_largest_and_no_pairs_move_nothing():
    assert read_groups("replica_groups={{0,1,2},{3}}", 4).tolist() == [[0, 1, 2]]
    (one,) = collectives_of(
        "  %x = f32[4]{0} parameter(0)\n  ROOT %p = f32[4]{0} collective-permute(%x), channel_id=4, "
        "source_target_pairs={}"
    )
    assert (one.axes, one.bytes) == ((), 0)


def test_a_ragged_exchange_sends_the_smaller_of_what_it_takes_and_gives():
    numbers = ", ".join(f"%n{number}" for number in range(4))
    lines = ["  %x = f32[8]{0} parameter(0)", "  %out = f32[64]{0} parameter(1)"]
    lines += [f"  %n{number} = s32[8]{{0}} parameter({number + 2})" for number in range(4)]
    lines += [f"  ROOT %r = f32[64]{{0}} ragged-all-to-all(%x, %out, {numbers}), replica_groups=[1,8]<=[8]"]
    (one,) = collectives_of("\n".join(lines))
    assert (one.kind, one.bytes) == ("ragged-all-to-all", 28)


def test_groups_in_a_spelling_that_is_unknown_are_an_error_and_not_all_devices():
    message = (
        r"XLA writes which devices take part together as 'replica_groups=<8x2>.*'; read are lists, ranges and names"
    )
    with pytest.raises(ValueError, match=message):
        read_groups("replica_groups=<8x2>, to_apply=%add", 16)


def test_no_groups_are_all_devices():
    assert read_groups("replica_groups={}", 4).tolist() == [[0, 1, 2, 3]]


START = """  %x = f32[4]{0} parameter(0)
  %start = ((f32[4]{0}), f32[16]{0}) all-gather-start(%x), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = f32[16]{0} all-gather-done(%start)"""
PERMUTE = """  %x = f32[4]{0} parameter(0)
  %p = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  ROOT %done = f32[4]{0} collective-permute-done(%p)"""


@pytest.mark.parametrize(("body", "kind", "sent"), [(START, "all-gather", 3 * 16), (PERMUTE, "collective-permute", 16)])
def test_a_start_and_its_done_are_one_asynchronous_collective(body, kind, sent):
    (one,) = collectives_of(body)
    assert (one.kind, one.axes, one.bytes, one.is_asynchronous) == (kind, ("model",), sent, True)


FUSED = """%part.{n} (p: f32[4]) -> f32[16] {{
  %p = f32[4]{{0}} parameter(0)
  %g = f32[16]{{0}} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={{0}}
  ROOT %c = f32[16]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}
"""


def test_the_parts_of_a_collective_that_is_fused_with_other_work_are_one():
    calls = [f"  %f{n} = f32[16]{{0}} fusion(%x), kind=kOutput, calls=%part.{n}" for n in (1, 2)]
    body = "\n".join(["  %x = f32[4]{0} parameter(0)", *calls])
    (one,) = collectives_of(body, "".join(FUSED.format(n=n) for n in (1, 2)))
    assert (one.kind, one.bytes, one.times, one.is_asynchronous) == ("all-gather", 48, 1, True)


def test_a_sum_of_which_a_device_keeps_its_part_is_a_reduce_scatter():
    fused = """%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %s = f32[16]{0} all-reduce(%p), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %d = f32[4]{0} dynamic-slice(%s, %p), dynamic_slice_sizes={4}
}
"""
    call = "  %x = f32[16]{0} parameter(0)\n  %f = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    (one,) = collectives_of(call, fused)
    assert (one.kind, one.bytes) == ("reduce-scatter", 48)


LOOP = """%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {{
  %p = (u32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=0
  %a = f32[8]{{0}} get-tuple-element(%p), index=1
  %by = u32[]{{:T(128)}} constant({by})
  %next = u32[] {add}
  %s = f32[8]{{0}} all-reduce(%a), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %t = (u32[], f32[8]{{0}}) tuple(%next, %s)
}}
%plus (a: u32[], b: u32[]) -> u32[] {{
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  ROOT %r = u32[] add(%a, %b)
}}
%cond (p: (u32[], f32[8])) -> pred[] {{
  %p = (u32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %limit = u32[]{{:T(128)}} constant(8)
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %limit), direction=LT
}}
"""
WHILE = """  %x = f32[8]{{0}} parameter(0)
  %zero = u32[] {start}
  %in = (u32[], f32[8]{{0}}) tuple(%zero, %x)
  %w = (u32[], f32[8]{{0}}) while(%in), condition=%cond, body=%body{known}"""
ADD, FUSED_ADD = "add(%i, %by)", "fusion(%i, %by), kind=kLoop, calls=%plus"


@pytest.mark.parametrize(
    ("by", "add", "start", "known", "times"),
    [
        (1, ADD, "constant(0)", "", 8),
        (2, ADD, "constant(0)", "", 4),
        (3, FUSED_ADD, "constant(1)", "", 3),
        (1, ADD, "constant(0)", ', backend_config={"known_trip_count":{"n":"5"}}', 5),
        (1, ADD, 'custom-call(), custom_call_target="Mystery"', "", None),
        (0, ADD, "constant(0)", "", None),
    ],
)
def test_a_loops_trips_are_read_from_its_counter(by, add, start, known, times):
    (one,) = collectives_of(WHILE.format(start=start, known=known), LOOP.format(by=by, add=add))
    assert one.times == times
    assert one.bytes_a_step == one.bytes * (times or 1)


def test_a_kernels_text_does_not_end_its_computation():
    body = """  %x = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config="
} // a kernel's own
"
  ROOT %s = f32[8]{0} all-reduce(%k), replica_groups=[1,8]<=[8], to_apply=%add"""
    assert len(collectives_of(body)) == 1


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="The text begins 'nothing': no HLO module"):
        read_program("nothing")


def test_a_source_is_the_models_own_line():
    flax, own = "/site-packages/flax/nnx/nn/linear.py", "/home/jaxpar/train.py"
    frames = [Frame("Linear.__call__", flax, 1), Frame("Block.<locals>.f", "/home/me/model.py", 9), Frame("g", own, 2)]
    assert describe_source(frames) == "Block.f (model.py:9)"
    assert describe_source(frames[::2]) == describe_source([*frames[::2], frames[1]]) == "g (train.py:2)"
    assert describe_source(frames[:1]) == "Linear.__call__ (linear.py:1)"
    assert describe_source([]) == ""


def test_slices_tell_which_collectives_cross_them():
    mesh = sub_mesh(data=2, model=4)
    program = program_of(f"{SUM}replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add")
    (one,) = find_collectives(program, mesh, slice_of=lambda device: device.id // 4)
    assert one.crosses_slices
    (one,) = find_collectives(program, mesh, slice_of=lambda device: device.id % 4)
    assert not one.crosses_slices


# live steps


def inspect_task(strategy, name="linen_mlp", *, rows=1024, **build):
    task = make_task(name)
    kind = name.partition("_")[2]
    step = jaxpar.make_train_step(task.loss_fn, strategy, **build)
    return jaxpar.inspect(step, strategy.abstract_state(task.init_fn), make_batches(kind, 1, rows=rows)[0])


def param_count(name):
    state = jax.eval_shape(make_task(name).init_fn, jax.random.key(0))
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))


def traffic_of(report, purpose="weights and gradients"):
    return {row.axes: row for row in report.traffic if row.purpose == purpose}


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("kind", ["pmap", "data"])
def test_data_parallel_sends_its_gradients_once_to_the_byte(kind, microbatches):
    report = inspect_task(STRATEGIES[kind](DEVICES), num_microbatches=microbatches)
    row = traffic_of(report)["data",]
    assert row.bytes == row.bound == 2 * (DEVICES - 1) * 4 * param_count("linen_mlp") // DEVICES
    assert report.unexplained == ()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_fsdp_gathers_and_reduces_to_the_byte(dtype):
    # XLA on CPU gathers once what the first layer needs forth alone; what is too small to split is all-reduced.
    report = inspect_task(STRATEGIES["fsdp"](DEVICES), rows=4096, compute_dtype=dtype)
    row, size = traffic_of(report)["fsdp",], 4 if dtype is None else 2
    whole = sum(np.prod(leaf.shape) for leaf in report.left_whole if leaf.path.startswith("params/"))
    split = param_count("linen_mlp") - whole
    assert row.logical_bytes == row.bound == size * (DEVICES - 1) * (2 * split + 2 * whole) / DEVICES
    assert report.unexplained == ()


def test_a_stack_of_layers_is_gathered_layer_by_layer():
    report = inspect_task(STRATEGIES["fsdp"](DEVICES), "nnx_scanned", rows=80)
    assert {one.times for one in report.collectives if one.kind == "all-gather"} >= {2}
    assert report.unexplained == ()


def test_what_no_rule_explains_is_named_with_the_models_line(monkeypatch):
    monkeypatch.setattr(sys.modules["jaxpar.sharded"], "split_carries", lambda fn, rows, constrain: fn)
    report = inspect_task(STRATEGIES["fsdp"](DEVICES), "nnx_scanned", rows=80)
    assert report.unexplained
    assert "no rule explains: all-reduce over fsdp of f32[80, 4" in str(report)
    assert "(models.py:" in str(report).split("no rule explains")[1]


@pytest.mark.parametrize("kind", ["data", "pmap", "fsdp_model"])
def test_operations_are_those_of_the_closed_form(kind):
    sizes, rows, length = Sizes(d_model=32, layers=3, heads=4, kv_heads=4, hidden=64), 8, 16
    strategy = STRATEGIES[kind](4)
    init_fn = lambda rng: jaxpar.TrainState.create(Transformer(sizes, rngs=nnx.Rngs(rng)), optax.sgd(1.0))
    step = jaxpar.make_train_step(loss_fn, strategy)
    batch = {key: jax.ShapeDtypeStruct((rows, length), jnp.uint8) for key in "xy"}
    products = count_products(step.trace(strategy.abstract_state(init_fn), batch))
    weights = 3 * (4 * 32 * 32 + 3 * 32 * 64) + 256 * 32
    attention = 12 * 3 * length * 32
    assert sum(one.flops for one in products) == (6 * weights + attention) * rows * length


MEGATRON_CELLS = [
    ({"model": 4}, 1),
    ({"data": 2, "model": 4}, 1),
    ({"data": 2, "model": 4}, 2),
    ({"fsdp": 2, "model": 4}, 1),
]


@pytest.mark.parametrize(("sizes", "microbatches"), MEGATRON_CELLS)
def test_tensor_parallel_sums_are_four_a_layer_and_those_of_the_vocabulary(sizes, microbatches):
    rows, length, layers, width = 16, 8, 3, 32
    rules = [jaxpar.MEGATRON, *([jaxpar.FSDP] if "fsdp" in sizes else [])]
    strategy = jaxpar.sharded(sub_mesh(**sizes), *rules)
    shape = Sizes(d_model=width, layers=layers, heads=4, kv_heads=4, hidden=64)
    init_fn = lambda rng: jaxpar.TrainState.create(Transformer(shape, rngs=nnx.Rngs(rng)), optax.sgd(1.0))
    step = jaxpar.make_train_step(loss_fn, strategy, num_microbatches=microbatches)
    batch = {key: jax.ShapeDtypeStruct((rows, length), jnp.uint8) for key in "xy"}
    report = jaxpar.inspect(step, strategy.abstract_state(init_fn), batch)
    activations = rows * length * width * 4 // strategy.num_shards
    # Two forth and two back a layer; the head's gradient is a sum too, and each row of the table is on one device.
    assert traffic_of(report, "activations")["model",].bound == activations * (2 * (4 * layers + 1) + 1) * 3 // 4
    weights = layers * (4 * width * width + 3 * width * 64) + 256 * width
    assert report.flops == (6 * weights + 12 * layers * length * width) * rows * length


def test_convolutions_and_branches_are_counted():
    def step(x, k):
        y = jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        flat = y.reshape(-1, 6)
        return jax.lax.cond(y.sum() > 0, lambda: flat @ jnp.ones((6, 2)), lambda: flat @ jnp.ones((6, 9))[:, :2])

    products = count_products(jax.make_jaxpr(step)(jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 6))))
    assert sorted(one.flops for one in products) == [2 * 50 * 6 * 2, 2 * 50 * 27 * 6]


def test_what_a_strided_convolutions_gradient_does_not_meet_is_not_counted():
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    back = jax.make_jaxpr(jax.grad(lambda x, k: conv(x, k).sum()))(jnp.ones((2, 32, 32, 8)), jnp.ones((4, 4, 8, 16)))
    assert [one.flops for one in count_products(back)] == [2 * 2 * 8 * 8 * 4 * 4 * 8 * 16]


def test_ragged_products_are_counted_and_dead_ones_are_not():
    def step(x, w, sizes):
        dead = x @ x.T
        _ = jax.lax.scan(lambda c, _: (c + 1, dead @ x), 0.0, None, length=3)
        return jax.lax.ragged_dot(x, w, sizes)

    products = count_products(jax.make_jaxpr(step)(jnp.ones((8, 3)), jnp.ones((2, 3, 5)), jnp.array([4, 4])))
    assert [one.shape for one in products] == [(1, 8, 3, 5)]


def test_a_product_of_nothing_has_no_intensity():
    (product,) = count_products(jax.make_jaxpr(lambda x: x[:0] @ x.T)(jnp.ones((4, 3))))
    assert (product.flops, product.intensity) == (0, 0)


def test_an_eval_step_and_a_users_own_can_be_inspected():
    strategy, task = STRATEGIES["data"](DEVICES), make_task("linen_mlp")
    state, batch = strategy.abstract_state(task.init_fn), make_batches("mlp", 1, rows=64)[0]
    report = jaxpar.inspect(jaxpar.make_eval_step(task.loss_fn, strategy), state, batch)
    assert traffic_of(report) == {}
    whole = NamedSharding(strategy.mesh, P())
    add = strategy.compile(lambda total, batch: (total + batch["x"].sum(), {}))
    report = jaxpar.inspect(add, jax.ShapeDtypeStruct((), "float32", sharding=whole), batch)
    assert report.param_bytes == 0
    assert report.wire_bytes > 0


def test_memory_is_the_layouts():
    strategy, task = STRATEGIES["fsdp"](DEVICES), make_task("linen_mlp")
    report = inspect_task(strategy)
    rows = strategy.layout(task.init_fn).rows
    held = {
        name: sum(row.bytes_per_device for row in rows if row.path.startswith(name)) for name in ("params", "opt_s")
    }
    assert (report.param_bytes, report.optimizer_bytes) == (held["params"], held["opt_s"])
    whole = sum(np.prod(row.shape) * 4 for row in rows if row.path.startswith(("params", "opt_state")))
    assert report.ideal_bytes == whole // DEVICES
    assert report.peak_bytes >= report.argument_bytes + report.temp_bytes


def test_a_report_prints_and_is_plain_data():
    report = inspect_task(STRATEGIES["fsdp_model"](DEVICES), "nnx_decoder", rows=64)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["mesh"] == {"fsdp": 2, "model": 4}
    # Only a target's memory is known.
    assert data["fits"] is None
    assert sum(row["bytes"] for row in data["traffic"]) == data["wire_bytes"]
    for text in (str(report), report._repr_html_()):
        for part in (
            "(in parentheses)",
            "optimizer state",
            "all-reduce",
            "models.py",
            "weights and gradients",
            "flops",
        ):
            assert part in text


# A leaf of 16 by 8, of which each of 4 devices has 4 rows: on v5p its gather is a sum of parts in zeros. The sum of its
# gradient, of which a slice takes a device's part alone, is written whole.
IN_ZEROS = """  %part = f32[4,8]{1,0} parameter(0)
  %row = s32[] parameter(1)
  %zero = s32[] constant(0)
  %nought = f32[] constant(0)
  %zeros = f32[16,8]{1,0} broadcast(%nought), dimensions={}
  %placed = f32[16,8]{1,0} dynamic-update-slice(%zeros, %part, %row, %zero)
  ROOT %whole = f32[16,8]{1,0} all-reduce(%placed), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add"""
THEN_SLICED = """  %grad = f32[16,8]{1,0} parameter(0)
  %row = s32[] parameter(1)
  %zero = s32[] constant(0)
  %sum = f32[16,8]{1,0} all-reduce(%grad), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %own = f32[4,8]{1,0} dynamic-slice(%sum, %row, %zero), dynamic_slice_sizes={4,8}"""


ALL_FOUR = "replica_groups=[1,4]<=[4]"


def traffic_of_text(body, terms=Terms(), features=(8,)):  # noqa: B008
    mesh = sub_mesh(fsdp=4)
    strategy = jaxpar.sharded(mesh, [("kernel$", P("fsdp")), (".*", P())])
    make = lambda rng, out: nnx.Linear(16, out, use_bias=False, rngs=nnx.Rngs(rng))
    make_layers = lambda rng: nnx.Sequential(*(make(rng, out) for out in features))
    rows = strategy.layout(lambda rng: jaxpar.TrainState.create(make_layers(rng), optax.sgd(1.0))).rows
    (row,) = sort_traffic(find_collectives(program_of(body), mesh), rows, mesh, terms).traffic
    return row


@pytest.mark.parametrize(
    ("terms", "gathers", "needed"),
    [
        # Once, or again for the way back.
        (Terms(), 1, 1),
        (Terms(), 2, 2),
        (Terms(), 3, 2),
        (Terms(has_way_back=False, frozen=frozenset({"params/layers/0/kernel"})), 2, 1),
        # Once for the step or in each of four microbatches; once or again.
        (Terms(num_microbatches=4), 3, 2),
        (Terms(num_microbatches=4), 5, 4),
        (Terms(num_microbatches=4), 7, 4),
        (Terms(num_microbatches=4), 8, 8),
        (Terms(num_microbatches=4), 12, 8),
    ],
)
def test_a_gather_more_than_a_step_needs_is_above_the_bound(terms, gathers, needed):
    sums = 0 if terms.frozen else terms.num_microbatches
    lines = ["  %part = f32[4,8]{1,0} parameter(0)", "  %grad = f32[16,8]{1,0} parameter(1)"]
    lines += [f"  %g{n} = f32[16,8]{{1,0}} all-gather(%part), {ALL_FOUR}" for n in range(gathers)]
    lines += [f"  %r{n} = f32[4,8]{{1,0}} reduce-scatter(%grad), {ALL_FOUR}" for n in range(sums)]
    row = traffic_of_text("\n".join(lines), terms)
    assert (row.bytes, row.bound) == (384 * (gathers + sums), 384 * (needed + sums))


def test_the_gathers_that_are_needed_are_counted_leaf_by_leaf():
    lines = ["  %x = f32[4,8]{1,0} parameter(0)", "  %y = f32[4,5]{1,0} parameter(1)"]
    gathers = [("x", 8), ("x", 8), ("y", 5)]
    lines += [f"  %g{n} = f32[16,{dim}]{{1,0}} all-gather(%{of}), {ALL_FOUR}" for n, (of, dim) in enumerate(gathers)]
    frozen = Terms(frozenset({"params/layers/0/kernel", "params/layers/1/kernel"}))
    row = traffic_of_text("\n".join(lines), frozen, features=(8, 5))
    assert row.bytes == row.bound == 3 * 16 * (2 * 8 + 5)


def test_a_gather_written_as_a_sum_is_told_with_both_its_counts():
    row = traffic_of_text(IN_ZEROS)
    assert (row.bytes, row.if_gathered, row.logical_bytes) == (2 * 3 * 128, 3 * 128, 3 * 128)
    report = dataclasses.replace(inspect_task(STRATEGIES["fsdp"](4)), traffic=(row,))
    message = (
        "over fsdp as sums of parts in zeros, which send twice as much. As written a device sends 768 B of weights"
    )
    for text in (str(report), report._repr_html_()):
        assert message in " ".join(text.split())
        assert "in a step; 384 B if the chip gathers" in " ".join(text.split())
    assert report.to_dict()["traffic"][0]["if_gathered"] == 384


def test_a_sum_of_which_a_slice_takes_a_part_counts_as_written_and_as_it_could_be():
    row = traffic_of_text(THEN_SLICED)
    assert (row.bytes, row.if_gathered, row.logical_bytes) == (2 * 3 * 128, 2 * 3 * 128, 3 * 128)


def test_what_is_no_step_is_an_error():
    with pytest.raises(TypeError, match="train_step is a function; inspect takes what make_train_step, make_eval_step"):
        jaxpar.inspect(lambda state, batch: None, None, None)


# budgets


def test_a_budget_is_kept_or_says_what_breaks_it():
    strategy = STRATEGIES["data"](DEVICES)
    task = make_task("linen_mlp")
    args = jaxpar.make_train_step(task.loss_fn, strategy), strategy.abstract_state(task.init_fn)
    batch = make_batches("mlp", 1, rows=64)[0]
    sent = 2 * (DEVICES - 1) * 4 * param_count("linen_mlp") // DEVICES
    assert_collectives(*args, batch, {"all-reduce data": sent})
    with pytest.raises(
        AssertionError, match=rf"the step sends \d+ bytes on each device, but the budget allows {sent - 1} "
    ):
        assert_collectives(*args, batch, {"all-reduce data": sent - 1})
    with pytest.raises(AssertionError, match=r"doesn't name it; at LinenMLP.__call__ \(models.py:\d+\)"):
        assert_collectives(*args, batch, {})
    with pytest.raises(AssertionError, match=r"all-gather fsdp: the budget allows 9 B, but the step sends none"):
        assert_collectives(*args, batch, {"all-reduce data": sent, "all-gather fsdp": 9})


def test_a_budget_of_nothing_is_kept_by_what_sends_none():
    strategy, task = jaxpar.sharded(sub_mesh(data=1)), make_task("linen_mlp")
    step, batch = jaxpar.make_train_step(task.loss_fn, strategy), make_batches("mlp", 1, rows=64)[0]
    assert_collectives(
        step, strategy.abstract_state(task.init_fn), batch, {"all-gather model,data": 0, "all-reduce -": 0}
    )


def test_a_loop_of_unknown_trips_keeps_to_no_budget():
    strategy = STRATEGIES["data"](DEVICES)
    whole = NamedSharding(strategy.mesh, P())

    def step(state, batch):
        turn = lambda x: x + (batch["x"] * x).sum(0)
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, turn, state), {}

    state = jax.ShapeDtypeStruct((8,), "float32", sharding=whole)
    with pytest.raises(AssertionError, match="a loop whose trips XLA doesn't know sends"):
        assert_collectives(
            strategy.compile(step), state, {"x": np.ones((16, 8), "float32")}, {"all-reduce data": 2**20}
        )


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (None, "The budget is None; give a dict"),
        ([("all-reduce data", 1)], "give a dict"),
        ({1: 2}, "The budget has 1; write a kind and axes"),
        ({"all-reduce data": "1MB"}, "The budget has '1MB' for 'all-reduce data'; give a whole number of bytes"),
        ({"all-reduce data": -1}, "give a whole number of bytes"),
    ],
)
def test_a_budget_that_is_none_is_an_error(budget, message):
    with pytest.raises(ValueError, match=message):
        assert_collectives(None, None, None, budget)


def test_a_slice_of_that_is_no_function_is_an_error():
    strategy, task = STRATEGIES["data"](DEVICES), make_task("linen_mlp")
    step = jaxpar.make_train_step(task.loss_fn, strategy)
    with pytest.raises(TypeError, match="slice_of is 3; give a function"):
        jaxpar.inspect(step, strategy.abstract_state(task.init_fn), make_batches("mlp", 1)[0], slice_of=3)


@pytest.mark.parametrize("name", ["all-reduce", "all-reduce batch", "allreduce data"])
def test_a_budget_of_unknown_names_is_an_error(name):
    with pytest.raises(ValueError, match=f"The budget has '{name}'; write a kind and axes"):
        assert_collectives(None, None, None, {name: 1})


# Of 4 rows, 16 tokens and 32 features in float32. Keys and values: three hops forward, three back, three of their
# gradients. Queries, keys, values and output, forward and back: three of four parts.
PASSED = 4 * 16 * 32 * 4
ISLAND_CELLS = [
    (jaxpar.ring_attention, {"data": 2, "context": 4}, 2 * PASSED * (3 + 3 + 3)),
    (jaxpar.ulysses_attention, {"data": 2, "context": 4}, 8 * PASSED * 3 // 4),
    (jaxpar.ulysses_attention, {"data": 2, "context": 2, "model": 2}, 8 * PASSED // 2),
]


@pytest.mark.parametrize(("attend", "sizes_of_mesh", "bound"), ISLAND_CELLS)
def test_what_an_island_sends_is_its_own_bound(attend, sizes_of_mesh, bound):
    mesh = jaxpar.make_mesh(**sizes_of_mesh)
    attend = functools.partial(attend, is_causal=True)
    strategy = jaxpar.sharded(mesh, *([jaxpar.MEGATRON] if "model" in sizes_of_mesh else []))
    sizes = Sizes(d_model=32, layers=3, heads=4, kv_heads=4, hidden=64)
    init_fn = lambda rng: jaxpar.TrainState.create(
        Transformer(sizes, attend=attend, rngs=nnx.Rngs(rng)), optax.sgd(1.0)
    )
    step = jaxpar.make_train_step(loss_fn, strategy)
    batch = {key: jax.ShapeDtypeStruct((8, 64), "uint8") for key in "xy"}
    report = jaxpar.inspect(step, strategy.abstract_state(init_fn), batch)
    found = {(row.axes, row.purpose): row for row in report.traffic}
    row = found[("context",), "activations"]
    assert row.bound == 3 * bound
    assert row.bound <= row.bytes
