"""What XLA's GPU compiler writes, for an H100 and jax 0.10.2, against closed forms and a compile for CPU."""

import math

import pytest
from gpu_programs import FOLDER, LENGTH, ROWS, SIZES, STEPS, make_step

import jaxpar
from jaxpar.inspection.collectives import find_collectives
from jaxpar.inspection.hlo import read_program

# The bytes, in bfloat16, of a layer's weights, of the embedding, and of what one device of 8 has between layers.
WIDTH, LAYERS = SIZES.d_model, SIZES.layers
LAYER = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * SIZES.hidden)
EMBED = 2 * 256 * WIDTH
NORMS = 2 * WIDTH  # elements a layer
PASSED = 2 * ROWS * LENGTH * WIDTH // 8


def collectives_of(name):
    axes = STEPS[name][0] if name in STEPS else {"data": 8}
    return find_collectives(read_program((FOLDER / f"{name}.hlo").read_text()), jaxpar.make_mesh(**axes))


def sent(found, kind, axes, *, least=65):
    """What a device sends in a step by one kind over some axes, small numbers left out."""
    ones = [one for one in found if (one.kind, one.axes) == (kind, axes) and one.array.bytes >= least]
    return sum(one.bytes_a_step for one in ones)


def test_gradients_laid_flat_behind_one_another_count_each_by_itself():
    found = collectives_of("data")
    whole = 2 * LAYERS * LAYER + 2 * 2 * EMBED + 2 * 4 * (LAYERS * NORMS + WIDTH)
    assert sent(found, "all-reduce", ("data",)) == whole * 7 // 8
    in_loop = [one for one in found if one.times == LAYERS]
    assert [one.array.dims for one in in_loop] == [(4096,)] * 4 + [(8192,)] * 3
    assert {one.source for one in in_loop} == {
        "Attention.__call__ (transformer.py:107)",
        "Attention.__call__ (transformer.py:108)",
        "SwiGLU.__call__ (transformer.py:91)",
    }
    assert [one.array.dims for one in found if one.source.startswith("_sum_value")] == [(1,)]


def test_gathers_and_scatters_of_several_arrays_are_read_from_what_they_are_given():
    found = collectives_of("fsdp")
    # Norms are gathered in bfloat16 forth, and in float32 back.
    gathered = LAYERS * (2 * LAYER + (2 + 4) * NORMS) + 3 * EMBED
    assert sent(found, "all-gather", ("fsdp",), least=1) == gathered * 7 // 8
    assert sent(found, "reduce-scatter", ("fsdp",)) == (LAYERS * (LAYER + 4 * NORMS) + 2 * EMBED) * 7 // 8


def test_a_ring_is_read_from_its_pairs_and_its_loops_trips():
    found = collectives_of("ring")
    # Keys and values: three hops forth, three back, and three of their gradients in float32.
    hops = 2 * PASSED * (3 + 3 + 2 * 3)
    assert sent(found, "collective-permute", ("context",)) == LAYERS * hops
    assert {one.times for one in found if one.kind == "collective-permute"} == {3, 6, 9}


def test_tokens_are_exchanged_for_heads_eight_times_a_layer():
    found = collectives_of("ulysses")
    assert sent(found, "all-to-all", ("context",)) == LAYERS * 8 * PASSED * 3 // 4
    assert sum(one.kind == "all-to-all" for one in found) == 8


def test_of_a_ragged_exchange_that_starts_and_ends_apart_the_smaller_end_counts():
    found = collectives_of("expert")
    # Two experts for each token, there and back again.
    assert sent(found, "ragged-all-to-all", ("expert",)) == LAYERS * 4 * 2 * PASSED * 3 // 4
    # Groups along `expert` by the names of axes whose devices lie in another order.
    assert [one.group_size for one in found if one.array.dims == (1,) and one.axes == ("expert",)] == [4] * 3


@pytest.mark.parametrize("name", ["data", "fsdp", "ring", "ulysses", "expert"])
def test_what_its_own_end_follows_at_once_is_not_asynchronous(name):
    lines = (FOLDER / f"{name}.hlo").read_text().splitlines()
    starts = [line for line in lines if "-start(" in line]
    at_once = sum('"is_sync":true' in line for line in starts)
    calm = {(one.kind, one.operation, one.array) for one in collectives_of(name) if not one.is_asynchronous}
    assert bool(calm) == bool(at_once)
    assert any(one.is_asynchronous for one in collectives_of(name))


def test_what_a_call_that_starts_apart_sends_is_asynchronous_and_counts_once():
    found = collectives_of("stream")
    assert [(one.kind, one.bytes, one.times, one.is_asynchronous) for one in found] == [
        ("collective-permute", 512, 1, True),
        ("all-reduce", 2 * 512 * 7 // 8, 1, True),
    ]


WRAPPED = """HloModule m

%wrapped (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %r = f32[8]{0} reduce-scatter(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[64]) -> f32[8] {
  %x = f32[64]{0} parameter(0)
  %s = ((f32[64]{0}), f32[8]{0}) async-start(%x), calls=%wrapped
  %u = ((f32[64]{0}), f32[8]{0}) async-update(%s), calls=%wrapped
  ROOT %d = f32[8]{0} async-done(%u), calls=%wrapped
}
"""


def test_a_wrapped_collective_that_all_its_stages_name_counts_once():
    (one,) = find_collectives(read_program(WRAPPED), jaxpar.make_mesh(data=8))
    assert (one.kind, one.bytes, one.times, one.is_asynchronous) == ("reduce-scatter", 224, 1, True)


@pytest.mark.parametrize("name", ["data", "fsdp"])
def test_both_compilers_sum_as_many_gradients(name):
    def count(found):
        # XLA on CPU sums in float32, and keeps of a sum a part by a slice.
        sums = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
        return sum(math.prod(one.array.dims) * one.times for one in sums if math.prod(one.array.dims) > 1)

    step, state, batch = make_step(name)
    assert count(jaxpar.inspect(step, state, batch).collectives) == count(collectives_of(name))
