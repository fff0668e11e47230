"""Targets: pods that aren't here, what can't be, and steps compiled for them by the TPU compiler itself (slow)."""

import functools
import importlib.util
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpar
import jaxpar.ahead
from jaxpar.ahead import AheadError, compile_ahead
from jaxpar.estimation.timeline import Wait
from jaxpar.targets import CHIPS, Target, TargetError, read_target, target_devices
from jaxpar.testing import assert_fits
from jaxpar.train_command import loss_fn
from jaxpar.transformer import Sizes, Transformer

RULES = {"model": jaxpar.MEGATRON, "fsdp": jaxpar.FSDP}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_slice_has_as_many_chips_as_its_shape(chip):
    for count in CHIPS[chip].topologies:
        target = read_target(f"{chip}-{count}")
        assert np.prod(target.shape) == count
        assert read_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5", "target is 'v5'; write a chip and how many, as 'v5e-256', or a shape, as 'v5e:16x16'"),
        (256, "target is 256; write a chip and how many"),
        ("v7x-8", "has the chip 'v7x'; those known are v4, v5e, v5p, v6e"),
        ("v5x-8", r"has the chip 'v5x' \(nearest: 'v5[ep]'\); those known are v4, v5e, v5p, v6e"),
        (
            "v5e-12",
            r"asks for 12 chips in a slice; v5e comes in slices of 4, 8, .* More chips are more slices: slices=2",
        ),
        ("v4:28x28x28", "from 4x4x4 on every multiple of 4 up to 28 in each dim, 4096 chips at most"),
        ("v5e:16x32", "has a shape that v5e doesn't come in; it comes in 2x2, 2x4"),
        ("v5p:4x4", "from 4x4x4 on every multiple of 4"),
        ("v5p:4x4x6", "from 4x4x4 on every multiple of 4"),
    ],
)
def test_a_target_that_does_not_exist_is_named(text, message):
    with pytest.raises(TargetError, match=message):
        read_target(text)


def test_without_the_compiler_the_one_command_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"v4:4x4x12 needs the TPU compiler, .*: pip install 'jaxpar\[plan\]'"):
        jaxpar.make_mesh(fsdp=192, target="v4-192")


def test_what_libtpu_refuses_is_told_with_the_one_command(monkeypatch):
    def refuse(**asked):
        raise RuntimeError("no such topology")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    message = (
        r"libtpu can't compile for v4:4x4x12: no such topology; jax needs the libtpu .*: pip install 'jaxpar\[plan\]'"
    )
    with pytest.raises(TargetError, match=message):
        target_devices(read_target("v4-192"))


def test_without_flatbuffers_the_one_command_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, step, state, batch = start(jaxpar.make_mesh(data=8))
    # What reads the target's devices would need the compiler.
    monkeypatch.setattr(jaxpar.ahead, "_describe", lambda *args: (step.export(state, batch), ""))
    with pytest.raises(TargetError, match=r"target v5e:2x4 needs flatbuffers: pip install 'jaxpar\[plan\]'"):
        compile_ahead(step, state, batch, read_target("v5e-8"))


def test_devices_and_a_target_are_one_too_many():
    with pytest.raises(jaxpar.MeshError, match="devices= and target='v5e-16' are given"):
        jaxpar.make_mesh(data=8, devices=jax.devices(), target="v5e-16")


@pytest.mark.parametrize("slices", ["2", None, [2], 2.0, True, 0])
def test_slices_of_a_target_are_a_whole_number(slices):
    with pytest.raises(jaxpar.MeshError, match=r"slices is .*; give a whole number, 1 or more"):
        jaxpar.make_mesh(data=8, target="v5e-8", slices=slices)


@pytest.mark.parametrize("fraction", ["0.9", None, True, 90])
def test_a_part_of_the_memory_is_a_number(fraction):
    with pytest.raises(ValueError, match=r"hbm_fraction is .*; give a part of the memory, more than 0 and up to 1"):
        assert_fits(None, None, None, hbm_fraction=fraction)


def test_what_is_here_has_no_memory_to_fit():
    _, step, state, batch = start(jaxpar.make_mesh(data=8))
    with pytest.raises(ValueError, match="is of devices that are here; give a target to fit"):
        assert_fits(step, state, batch)


SMALL = Sizes(256, 2, 4, 4, 512)


def start(mesh, sizes=SMALL, rows=128, length=256, **build):
    strategy = jaxpar.sharded(mesh, *(rules for axis, rules in RULES.items() if axis in mesh.shape))
    init_fn = lambda rng: jaxpar.TrainState.create(Transformer(sizes, rngs=nnx.Rngs(rng)), optax.adamw(1e-3))
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.bfloat16, **build)
    batch = {key: jax.ShapeDtypeStruct((rows, length), jnp.uint8) for key in "xy"}
    return strategy, step, strategy.abstract_state(init_fn), batch


# with the TPU compiler


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4-16", "v5e-16", "v5p-16", "v6e-16"])
def test_data_parallel_sends_its_gradients_once_to_the_byte_on_every_chip(target):
    _, step, state, batch = start(jaxpar.make_mesh(data=16, target=target), num_microbatches=2)
    report = jaxpar.inspect(step, state, batch)
    (row,) = [row for row in report.traffic if row.purpose == "weights and gradients"]
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    assert row.bytes == row.bound == 2 * 15 * 4 * count // 16
    assert report.unexplained == ()
    assert report.peak_bytes < report.hbm_bytes == CHIPS[target[:3].rstrip("-")].hbm_bytes


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"fsdp": 4, "model": 4}])
def test_fsdp_moves_weights_near_the_bound_and_loops_are_counted(sizes):
    _, step, state, batch = start(jaxpar.make_mesh(target="v5e-16", **sizes), Sizes(1024, 3, 8, 8, 2816), 64, 512)
    report = jaxpar.inspect(step, state, batch)
    row = next(row for row in report.traffic if (row.axes, row.purpose) == (("fsdp",), "weights and gradients"))
    # A windowed product's ring goes on for 17 sends where 15 would do.
    assert 1 <= row.logical_bytes / row.bound < 1.15
    if "model" in sizes:
        (sums,) = [row for row in report.traffic if (row.axes, row.purpose) == (("model",), "activations")]
        assert 1 <= sums.bytes / sums.bound < 1.1
    assert any(one.times and one.times % 3 == 0 and one.is_asynchronous for one in report.collectives)
    assert sum(one.bytes_a_step for one in report.unexplained) < 0.02 * row.bytes
    assert any("Attention.__call__ (transformer.py" in one.source for one in report.collectives)


WHOLE_GATHERS = {"xla_tpu_enable_windowed_einsum_for_all_gather": "false"}
WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "options", "least_sent", "as_written"),
    [
        # Rings of 16, in step with products, send 17 parts of 16 where 15 would do.
        ({"fsdp": 16}, None, 17 / 15, 17 / 15),
        # Gathers are whole; gradients still go round.
        ({"fsdp": 16}, WHOLE_GATHERS, (2 + 17 / 15) / 3, (2 + 17 / 15) / 3),
        # No ring is left; but sums over all 16 chips are written whole, and a part of each is kept.
        ({"fsdp": 16}, WHOLE, 1, 4 / 3),
        # Over a part of the pod they are scattered.
        ({"fsdp": 4, "model": 4}, WHOLE, 1, 1),
    ],
)
def test_fsdp_sends_the_fewest_bytes_once_rings_are_off(sizes, options, least_sent, as_written):
    mesh = jaxpar.make_mesh(target="v5e-16", **sizes)
    _, step, state, batch = start(mesh, Sizes(1024, 8, 8, 8, 2816), 64, 512, compiler_options=options)
    report = jaxpar.inspect(step, state, batch)
    row = next(row for row in report.traffic if (row.axes, row.purpose) == (("fsdp",), "weights and gradients"))
    assert row.logical_bytes / row.bound == pytest.approx(least_sent, abs=0.004)
    assert row.bytes / row.bound == pytest.approx(as_written, abs=0.006)


@pytest.mark.slow
def test_some_gathers_on_v5p_are_sums_of_parts_in_zeros():
    _, step, state, batch = start(jaxpar.make_mesh(fsdp=16, target="v5p-16"))
    report = jaxpar.inspect(step, state, batch)
    assert any(one.lies_in_zeros for one in report.collectives)
    assert all(row.bytes // 2 <= row.if_gathered <= row.bytes for row in report.traffic)


@pytest.mark.slow
def test_slices_are_crossed_by_their_own_axis_alone():
    mesh = jaxpar.make_mesh(data=2, fsdp=16, target="v5e-16", slices=2)
    assert [{device.slice_index for device in row} for row in mesh.devices] == [{0}, {1}]
    _, step, state, batch = start(mesh)
    for one in jaxpar.inspect(step, state, batch).collectives:
        assert one.crosses_slices == ("data" in one.axes), one


@pytest.mark.slow
def test_memory_is_what_a_whole_compile_says():
    _, step, state, batch = start(jaxpar.make_mesh(fsdp=16, target="v5e-16"), Sizes(512, 2, 4, 4, 1024))
    report = jaxpar.inspect(step, state, batch)
    memory = step.lower(state, batch).compile().memory_analysis()
    assert report.argument_bytes == pytest.approx(memory.argument_size_in_bytes, rel=0.05)
    assert 0 <= memory.temp_size_in_bytes - report.temp_bytes < 0.1 * 2**30


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_an_answer():
    llama = Sizes(d_model=4096, layers=32, heads=32, kv_heads=32, hidden=11008)
    _, step, state, batch = start(jaxpar.make_mesh(fsdp=256, target="v5e-256"), llama, 256, 2048)
    report = jaxpar.inspect(step, state, batch)
    assert "GiB of 15.8 GiB: does NOT fit" in str(report)
    with pytest.raises(
        AssertionError, match=r"needs [\d.]+ GiB on a device, but 14.2 GiB are allowed, 0.9 of 15.8 GiB"
    ):
        assert_fits(step, state, batch)
    _, step, state, batch = start(jaxpar.make_mesh(fsdp=16, target="v5e-16"))
    assert_fits(step, state, batch)


@pytest.mark.slow
def test_nothing_can_be_put_on_what_is_not_here():
    strategy, *_ = start(jaxpar.make_mesh(fsdp=16, target="v5e-16"))
    init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(16, 16, rngs=nnx.Rngs(rng)), optax.sgd(1.0))
    rows = {"x": np.ones((16, 3))}
    for put in (
        lambda: strategy.init(init_fn, jax.random.key(0)),
        lambda: strategy.place(init_fn(jax.random.key(0))),
        lambda: strategy.shard_batch(rows),
    ):
        with pytest.raises(
            jaxpar.MeshError, match="is of TPU v5 lite chips that aren't here: nothing can be put on them"
        ):
            put()
    assert strategy.data_shard() == (0, 1)
    assert strategy.abstract_batch(rows)["x"].shape == (16, 3)


@pytest.mark.slow
def test_a_compile_that_fails_aborts_or_hangs_ends_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = read_target("v5e-16")
    _, step, state, batch = start(jaxpar.make_mesh(fsdp=16, target="v5e-16"))
    monkeypatch.setenv("JAXPAR_CACHE_DIR", "")
    with pytest.raises(AheadError, match=r"The compile for v5e:4x4 was ended after 0.2 s"):
        compile_ahead(step, state, batch, target, seconds=0.2)
    nothing = type("E", (), {"serialize": lambda self: b"nothing", "mlir_module": lambda self: ""})
    monkeypatch.setattr(type(step), "export", lambda *args: nothing())
    with pytest.raises(AheadError, match=r"The compile for v5e:4x4 ended with code 1: "):
        compile_ahead(step, state, batch, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_abort_of_the_compiler_ends_its_own_process_alone():
    # libtpu has no such slice, gives its devices all the same, and aborts when it compiles.
    devices = target_devices(Target("v5e", (16, 32)))
    mesh = jaxpar.make_mesh(data=512, devices=list(devices))
    _, step, state, batch = start(mesh, rows=512)
    with pytest.raises(AheadError, match=re.escape("The compile for v5e:16x32 ended by signal SIG")):
        jaxpar.inspect(step, state, batch)


@pytest.mark.slow
def test_experts_travel_on_a_target_and_their_exchange_is_counted():
    mesh = jaxpar.make_mesh(expert=8, target="v5e-8")
    strategy = jaxpar.sharded(mesh, jaxpar.EXPERT)
    make_mlp = functools.partial(jaxpar.MoE, num_experts=8, top_k=2)
    init_fn = lambda rng: jaxpar.TrainState.create(
        Transformer(SMALL, make_mlp=make_mlp, rngs=nnx.Rngs(rng)), optax.sgd(1.0)
    )
    batch = {key: jax.ShapeDtypeStruct((64, 128), jnp.uint8) for key in "xy"}
    report = jaxpar.inspect(jaxpar.make_train_step(loss_fn, strategy), strategy.abstract_state(init_fn), batch)
    assert any(
        one.kind in ("ragged-all-to-all", "all-to-all") and one.axes == ("expert",) for one in report.collectives
    )


@pytest.mark.slow
def test_an_eval_steps_outputs_take_no_place_of_its_state():
    strategy = jaxpar.sharded(jaxpar.make_mesh(data=8, target="v5e-8"))
    init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(1024, 1024, rngs=nnx.Rngs(rng)), optax.sgd(1.0))
    step = jaxpar.make_eval_step(lambda model, batch, rng: {"y": model(batch["x"])}, strategy)
    batch = {"x": jax.ShapeDtypeStruct((8192, 1024), "float32")}
    report = jaxpar.inspect(step, strategy.abstract_state(init_fn), batch)
    assert report.peak_bytes >= report.argument_bytes + 8192 * 1024 * 4 // 8


@pytest.mark.slow
def test_what_an_eval_step_does_not_use_lies_split_all_the_same():
    strategy, _, state, batch = start(jaxpar.make_mesh(fsdp=16, target="v5e-16"), Sizes(1024, 4, 8, 8, 2816))
    report = jaxpar.inspect(jaxpar.make_eval_step(loss_fn, strategy), state, batch)
    held = sum(row.bytes_per_device for row in report.rows)
    assert held <= report.argument_bytes < 1.1 * held + 2**20


@pytest.mark.slow
def test_a_target_gets_the_steps_own_options_and_says_what_it_cannot_compile():
    strategy, _, state, batch = start(jaxpar.make_mesh(data=8, target="v5e-8"))
    step = jaxpar.make_train_step(loss_fn, strategy, compiler_options={"xla_nonsense": True})
    with pytest.raises(AheadError, match="xla_nonsense"):
        jaxpar.inspect(step, state, batch)

    def printing(model, batch, rng):
        jax.debug.print("loss")
        return loss_fn(model, batch, rng)

    with pytest.raises(AheadError, match=r"Leave out what calls back into Python, as jax\.debug\.print does"):
        jaxpar.inspect(jaxpar.make_train_step(printing, strategy), state, batch)


@pytest.mark.slow
def test_an_estimate_knows_math_links_and_slices():
    sizes = Sizes(1024, 4, 8, 8, 2816)
    _, step, state, batch = start(jaxpar.make_mesh(fsdp=16, target="v5e-16"), sizes, 64, 512)
    report = jaxpar.estimate(step, state, batch, dollars_an_hour=2.0)
    assert (report.tokens, report.unit, report.dollars_an_hour) == (64 * 512, "tokens", 32.0)
    assert report.fastest < report.seconds < report.slowest
    assert sum(report.parts().values()) == pytest.approx(report.seconds)
    # Matrix products take what their count over the expected rate says, since all of the dims are multiples of 128.
    flops = sum(one.flops for one in jaxpar.inspect(step, state, batch).products)
    assert report.busy["math"] <= 1.05 * flops / 16 / (0.9 * 197e12)
    assert {wait.axes for wait in report.sent} >= {("fsdp",)}
    _, step, state, batch = start(jaxpar.make_mesh(data=2, fsdp=16, target="v5e-16", slices=2), sizes, 128, 512)
    slices = jaxpar.estimate(step, state, batch)
    assert slices.waits[Wait(("data",), "pace")] == pytest.approx((1 / 0.975 - 1) / (1 / 0.975) * slices.seconds)
    assert {(wait.axes, wait.link) for wait in slices.sent} >= {(("data",), "DCN"), (("fsdp",), "ICI")}
    assert any(one.crosses_slices and one.axes == ("data",) for one in jaxpar.inspect(step, state, batch).collectives)
    for given in (0, -1, True, "2", 0.5):
        with pytest.raises(jaxpar.EstimationError, match=r"tokens is .*; give a whole number, 1 or more"):
            jaxpar.estimate(step, state, batch, tokens=given)
    for name, given in (("seconds", "5"), ("seconds", 0), ("dollars_an_hour", float("nan"))):
        with pytest.raises(jaxpar.EstimationError, match=rf"{name} is .*; give a number above 0"):
            jaxpar.estimate(step, state, batch, **{name: given})


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["stage", "expert"])
def test_an_axis_that_crosses_slices_inside_of_another_uses_the_network_alone(axis):
    sizes = {"stage": {"data": 8, "stage": 2}, "expert": {"data": 4, "expert": 4}}[axis]
    mesh = jaxpar.make_mesh(target="v5e-8", slices=2, slice_axis=axis, **sizes)
    rules = {"stage": jaxpar.PIPELINE, "expert": jaxpar.EXPERT}
    strategy = jaxpar.sharded(mesh, rules[axis])
    parts = {
        "expert": {"make_mlp": functools.partial(jaxpar.MoE, num_experts=8, top_k=2)},
        "stage": {"stage_microbatches": 4},
    }
    init_fn = lambda rng: jaxpar.TrainState.create(
        Transformer(SMALL, rngs=nnx.Rngs(rng), **parts.get(axis, {})), optax.sgd(1.0)
    )
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.bfloat16)
    batch = {key: jax.ShapeDtypeStruct((64, 128), jnp.uint8) for key in "xy"}
    report = jaxpar.estimate(step, strategy.abstract_state(init_fn), batch)
    slow = {wait.axes for wait in report.sent if wait.link == "DCN"}
    assert slow == {(axis,)}
    assert all(report.waits[wait] <= 1.001 * report.sent[wait] for wait in report.waits if wait.link != "pace")
    found = jaxpar.inspect(step, strategy.abstract_state(init_fn), batch).collectives
    assert {one.axes for one in found if one.crosses_slices} == {(axis,)}


@pytest.mark.slow
def test_a_kernel_is_compiled_and_counted():
    mesh = jaxpar.make_mesh(fsdp=4, model=4, target="v5e-16")
    strategy = jaxpar.sharded(mesh, jaxpar.MEGATRON, jaxpar.FSDP)
    attend = functools.partial(jaxpar.splash_attention, is_causal=True)
    sizes = Sizes(512, 2, 4, 4, 1024)
    model = functools.partial(Transformer, sizes, attend=attend, remat="full", is_tied=False)
    init_fn = lambda rng: jaxpar.TrainState.create(model(rngs=nnx.Rngs(rng)), optax.sgd(1.0))
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.bfloat16)
    batch = {key: jax.ShapeDtypeStruct((16, 512), jnp.int32) for key in "xy"}
    report = jaxpar.estimate(step, strategy.abstract_state(init_fn), batch)
    # Forward, forward again, and five products backward in two kernels that do two over; half of the peak.
    products = (2 + 2 + 7) * 2 * 4 * 512 * 512 * 128
    assert report.busy["kernels"] == pytest.approx(2 * products / (0.5 * 197e12), rel=0.3)


@pytest.mark.slow
def test_a_program_compiled_before_is_read_from_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPAR_CACHE_DIR", str(tmp_path / "programs"))
    mesh = jaxpar.make_mesh(fsdp=16, target="v5e-16")
    _, step, state, batch = start(mesh)
    runs, run = [], jaxpar.ahead._run
    monkeypatch.setattr("jaxpar.ahead._run", lambda *args: runs.append(args) or run(*args))
    _, other, *_ = start(mesh, compiler_options={"xla_tpu_enable_async_collective_fusion": False})
    found = [compile_ahead(each, state, batch, read_target("v5e-16")) for each in (step, step, other)]
    assert found[0] == found[1] != found[2]
    assert len(runs) == 2


@pytest.mark.slow
def test_a_compile_that_takes_too_much_memory_is_ended(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPAR_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setattr("jaxpar.ahead._MEMORY", 1e-6)
    _, step, state, batch = start(jaxpar.make_mesh(fsdp=16, target="v5e-16"))
    with pytest.raises(AheadError, match=r"took .* of this machine's memory, of .* allowed, and was ended"):
        compile_ahead(step, state, batch, read_target("v5e-16"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "parts", "ratio"),
    [
        ("context", {"attend": functools.partial(jaxpar.ring_attention, is_causal=True)}, 1.01),
        ("context", {"attend": functools.partial(jaxpar.ulysses_attention, is_causal=True)}, 1.01),
        ("expert", {"make_mlp": functools.partial(jaxpar.MoE, num_experts=8, top_k=2)}, 1.01),
        # The output of the last stage goes to all of them.
        ("stage", {"stage_microbatches": 8}, 1.5),
    ],
)
def test_islands_send_what_they_say(axis, parts, ratio):
    mesh = jaxpar.make_mesh(target="v5e-16", **{"data": 4, axis: 4})
    rules = {"expert": [jaxpar.EXPERT], "stage": [jaxpar.PIPELINE]}.get(axis, [])
    strategy = jaxpar.sharded(mesh, *rules)
    sizes = Sizes(256, 4, 4, 4, 512)
    init_fn = lambda rng: jaxpar.TrainState.create(Transformer(sizes, rngs=nnx.Rngs(rng), **parts), optax.sgd(1.0))
    step = jaxpar.make_train_step(loss_fn, strategy, compute_dtype=jnp.bfloat16)
    batch = {key: jax.ShapeDtypeStruct((64, 512), jnp.uint8) for key in "xy"}
    report = jaxpar.inspect(step, strategy.abstract_state(init_fn), batch)
    (row,) = [row for row in report.traffic if (row.axes, row.purpose) == ((axis,), "activations")]
    assert 1 <= row.bytes / row.bound < ratio
