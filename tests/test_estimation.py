"""Estimates: figures with their sources, links, what an instruction takes, the walk, and the report."""

import json

import numpy as np
import pytest

import jaxpar
from jaxpar.estimation.chips import CASES, Rates, rates_of, read_figures
from jaxpar.estimation.costs import Product, read_convolution, read_dot, work_of
from jaxpar.estimation.links import Torus, time_collective, time_network
from jaxpar.estimation.timeline import Machine, Wait, as_gathered, as_written, walk
from jaxpar.inspection.collectives import find_collectives, read_transfer
from jaxpar.inspection.groups import axes_touched, groups_of
from jaxpar.inspection.hlo import Array, read_program
from jaxpar.targets import CHIPS

# A chip with round figures: a byte of memory takes a nanosecond, one of a link ten, one of the network a hundred.
RATES = Rates(
    math=1e12, kernel=5e11, hbm=1e9, link=1e8, network=1e7, hop_seconds=0.0, doubling=0.5, wraps_at=4, array=128
)


def torus_of(shape, slices=1, rates=RATES):
    places = np.array(list(np.ndindex(*shape)) * slices)
    return Torus(shape, places, np.repeat(np.arange(slices), len(places) // slices), rates)


# figures


@pytest.mark.parametrize("chip", [*CHIPS, "reached"])
def test_every_figure_has_its_source_and_the_day_it_was_read(chip):
    for name, figure in read_figures()[chip].items():
        assert len(figure.source) > 10, name
        assert figure.read.year >= (2025 if name == "dollars_an_hour" else 2026), name


@pytest.mark.parametrize("chip", CHIPS)
def test_the_expected_lies_between_the_most_and_the_least(chip):
    most, expected, least = (rates_of(chip, case) for case in CASES)
    for name in ("math", "kernel", "hbm", "link", "network", "doubling"):
        assert getattr(most, name) >= getattr(expected, name) >= getattr(least, name)
    assert set(read_figures()[chip]) == set(read_figures()["v4"])


# links: the formulas of https://jax-ml.github.io/scaling-book/sharding, in bytes over 1e8 a second

FLAT, CUBE = (4, 4), (4, 4, 4)
COLUMN = np.arange(16).reshape(4, 4).T  # the devices of a column take part together
HALVES = np.array([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("shape", "kind", "groups", "seconds"),
    [
        # Both ways of two rings: 4 links.
        (FLAT, "all-gather", np.arange(16)[None], 15 * 100 / 4e8),
        (FLAT, "reduce-scatter", np.arange(16)[None], 100 * 15 / 16 / 4e8),
        (FLAT, "all-reduce", np.arange(16)[None], 2 * 100 * 15 / 16 / 4e8),
        # A ring of four: 2 links. Three rings of a cube: 6.
        (FLAT, "all-gather", COLUMN, 3 * 100 / 2e8),
        (CUBE, "all-reduce", np.arange(64)[None], 2 * 100 * 63 / 64 / 6e8),
        # A line of two chips: one link each way, and the chip at the end has but one.
        (FLAT, "all-gather", HALVES, 100 / 1e8),
        # Every second chip of a ring: half of the links' time is the others'.
        (FLAT, "all-gather", np.array([[0, 2], [1, 3]]), 100 / 1e8),
        # A ring's busiest link carries a fourth of what a gather would send.
        (FLAT, "all-to-all", COLUMN, 4 * 100 / (4 * 2e8)),
        (FLAT, "collective-permute", np.array([[0, 1], [1, 2], [2, 3], [3, 0]]), 100 / 1e8),
        (FLAT, "collective-permute", np.array([[0, 2], [2, 0]]), 0.5 * 100 / 1e8),
        (FLAT, "all-reduce", np.array([[0]]), 0),
    ],
)
def test_a_collective_takes_the_links_of_its_own_axis(shape, kind, groups, seconds):
    assert time_collective(torus_of(shape), kind, groups, 100).seconds == pytest.approx(seconds)


def test_of_groups_that_lie_differently_the_slowest_counts_and_each_keeps_its_links():
    # A ring down a column, and a line of four of a row's eight.
    groups = np.array([[0, 8, 16, 24], [1, 2, 3, 4]])
    for each in (groups, groups[::-1]):
        use = time_collective(torus_of((4, 8)), "all-gather", each, 100)
        assert use.seconds == pytest.approx(3 * 100 / 1e8)
        assert use.links == {"x+", "x-", "y+", "y-"}


def test_small_slices_are_lines_and_whole_ones_rings():
    assert [torus_of((4, 4)).is_ring(0), torus_of((4, 8)).is_ring(1), torus_of((4, 4, 8)).is_ring(2)] == [1, 0, 1]
    assert not torus_of((2, 2, 4)).is_ring(2)
    flat = rates_of("v5e")
    assert [torus_of(shape, rates=flat).is_ring(0) for shape in ((16, 16), (8, 16))] == [True, False]


def test_opposite_ways_of_a_ring_are_other_links():
    up, down = (np.array([[i, (i + step) % 4] for i in range(4)]) for step in (1, -1))
    uses = [time_collective(torus_of(FLAT), "collective-permute", pairs, 100) for pairs in (up, down)]
    assert [use.links for use in uses] == [{"y+"}, {"y-"}]


def test_between_slices_a_chip_has_its_part_of_the_network():
    factors = {"all-reduce": 1.5, "all-gather": 3, "reduce-scatter": 0.75, "all-to-all": 0.75}
    factors |= {"collective-permute": 1, "collective-broadcast": 1}
    for kind, factor in factors.items():
        assert time_network(RATES, kind, 4, 100).seconds == pytest.approx(factor * 100 / 1e7)


def test_a_far_chip_is_as_many_hops_away_as_the_path_is_long():
    torus = torus_of(FLAT, rates=RATES._replace(hop_seconds=1.0))
    # Two rings of four, each gone half round; a line of two; two ways through it to sum.
    latencies = [
        time_collective(torus, kind, groups, 100).latency
        for kind, groups in (
            ("all-gather", np.arange(16)[None]),
            ("all-gather", HALVES),
            ("all-reduce", HALVES),
            ("collective-permute", np.array([[0, 10]])),
        )
    ]
    assert latencies == [4, 1, 2, 4]


@pytest.mark.parametrize(
    ("pairs", "load"),
    [
        # All through one link of a line.
        ([[0, 3], [1, 3], [2, 3]], 3),
        # Every fourth chip of a ring of sixteen: the links between are everyone's.
        ([[i, (i + 4) % 16] for i in range(16)], 4),
        # Half round a ring, one half goes each way.
        ([[i, (i + 8) % 16] for i in range(16)], 4),
    ],
)
def test_the_busiest_link_of_a_permute_decides(pairs, load):
    shape = (4, 8) if len(pairs) == 3 else (16, 16)
    rates = RATES._replace(wraps_at=16)
    # Along the first dim.
    scaled = np.array(pairs) * shape[1]
    torus = torus_of(shape, rates=rates)
    assert time_collective(torus, "collective-permute", scaled, 100).seconds == pytest.approx(load * 100 / 1e8)


# what an instruction takes


@pytest.mark.parametrize(
    ("text", "left", "right", "out", "product"),
    [
        ("dim_labels=bf_io->bf", (64, 32), (32, 16), (64, 16), Product(1, 64, 32, 16)),
        # Rows in a spatial dim; the kernel's window walks nothing.
        ("window={size=1}, dim_labels=0bf_io0->0bf", (8, 64, 32), (32, 16, 1), (8, 64, 16), Product(1, 512, 32, 16)),
        # Heads as a window of padding: columns.
        (
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            (2, 64, 32, 1),
            (32, 4, 8, 1),
            (2, 64, 4, 8),
            Product(1, 128, 32, 32),
        ),
        # A gradient: the rows are summed over.
        ("window={size=16}, dim_labels=0fb_0io->bf0", (16, 8, 32), (16, 8, 64), (32, 64, 1), Product(1, 32, 128, 64)),
        # A batch: each place of the output meets one of the kernel.
        (
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            (4, 8, 32),
            (4, 32, 16),
            (4, 8, 16),
            Product(4, 8, 32, 16),
        ),
        # A convolution of 3 places, without padding.
        ("window={size=3}, dim_labels=b0f_0io->b0f", (2, 10, 4), (3, 4, 8), (2, 8, 8), Product(1, 16, 12, 8)),
        # ... and with it: what lies outside is gone through too.
        (
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            (2, 8, 8, 4),
            (3, 3, 4, 16),
            (2, 8, 8, 16),
            Product(1, 128, 36, 16),
        ),
        (
            "window={size=3 stride=2 pad=1_0}, dim_labels=b0f_0io->b0f",
            (2, 8, 4),
            (3, 4, 8),
            (2, 4, 8),
            Product(1, 8, 12, 8),
        ),
        ("batch_group_count=4, dim_labels=bf_io->bf", (64, 32), (32, 16), (16, 16), Product(4, 16, 32, 4)),
        ("feature_group_count=4, dim_labels=bf_io->bf", (64, 32), (8, 16), (64, 16), Product(4, 64, 8, 4)),
    ],
)
def test_a_convolution_is_the_product_that_it_means(text, left, right, out, product):
    assert read_convolution(text, *(Array("bf16", dims) for dims in (left, right, out))) == product


def test_a_dot_is_read_by_its_dims():
    text = "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    arrays = [Array("bf16", dims) for dims in ((3, 8, 16), (3, 16, 4), (3, 8, 4))]
    assert read_dot(text, *arrays) == Product(3, 8, 16, 4)


def test_small_products_leave_a_part_of_the_units_idle():
    assert Product(1, 1024, 512, 256).flops(128) == 2 * 1024 * 512 * 256
    assert Product(1, 1024, 64, 100).flops(128) == 2 * 1024 * 128 * 104
    assert Product(2, 1, 128, 128).flops(128) == 2 * 2 * 8 * 128 * 128


def bytes_of(lines, name="out", side=128):
    """What an instruction of a program moves; `lines` are computations, the entry last."""
    program = read_program("HloModule m\n\n" + lines)
    entry = program.computations[program.entry]
    return work_of(program, entry, entry.instructions[name], side).bytes


def test_memory_on_the_chip_is_not_counted_and_tiles_are_rounded_up():
    lines = """ENTRY %main (x: f32[16,256]) -> f32[16,256] {
  %x = f32[16,256]{1,0:T(8,128)} parameter(0)
  %fast = f32[16,256]{1,0:T(8,128)S(1)} copy(%x)
  %out = f32[16,256]{1,0:T(8,128)} add(%x, %fast)
  ROOT %narrow = f32[16,3]{1,0:T(8,128)} slice(%x), slice={[0:16],[0:3]}
}"""
    assert bytes_of(lines) == 2 * 16 * 256 * 4
    assert bytes_of(lines, "fast") == 16 * 256 * 4
    assert bytes_of(lines, "narrow") == 2 * 16 * 128 * 4


FUSED = """%inner (a: f32[64,512], i: s32[]) -> f32[1,512] {{
  %a = f32[64,512]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  {body}
}}

ENTRY %main (x: f32[64,512], i: s32[], u: f32[1,512]) -> f32[64,512] {{
  %x = f32[64,512]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = {result} fusion(%x, %i), kind=kLoop, calls=%inner
}}"""


@pytest.mark.parametrize(
    ("body", "result", "count"),
    [
        # Of a slice only its part is read, through what else the fusion does.
        (
            "%n = f32[64,512]{1,0} negate(%a)\n  ROOT %s = f32[1,512]{1,0} dynamic-slice(%n, %i, %i), "
            "dynamic_slice_sizes={1,512}",
            "f32[1,512]{1,0}",
            2 * 512 * 4,
        ),
        # An update in place reads and writes its part.
        (
            "%z = f32[] constant(0)\n  %u = f32[1,512]{1,0} broadcast(%z), dimensions={}\n  ROOT %d = f32[64,512]{1,0} "
            "dynamic-update-slice(%a, %u, %i, %i)",
            "f32[64,512]{1,0}",
            512 * 4,
        ),
        # All of it is summed.
        (
            "%z = f32[] constant(0)\n  %r = f32[512]{0} reduce(%a, %z), dimensions={0}, to_apply=%add\n  ROOT %b = "
            "f32[1,512]{1,0} bitcast(%r)",
            "f32[1,512]{1,0}",
            (64 + 1) * 512 * 4,
        ),
        # What is passed on as it is takes nothing.
        (
            "%n = f32[64,512]{1,0} negate(%a)\n  ROOT %t = (f32[64,512]{1,0}, f32[64,512]{1,0}) tuple(%n, %a)",
            "(f32[64,512]{1,0}, f32[64,512]{1,0})",
            2 * 64 * 512 * 4,
        ),
    ],
    ids=["slice", "update", "reduce", "passed on"],
)
def test_a_fusion_moves_what_it_needs(body, result, count):
    index = 4 if "dynamic" in body else 0
    assert bytes_of(FUSED.format(body=body, result=result)) == pytest.approx(count, abs=index)


# the walk


def spend(lines, mesh=None, kernels=None, **more):
    mesh = jaxpar.make_mesh(data=8) if mesh is None else mesh
    places = np.array([[i, 0] for i in range(8)])
    torus = Torus((8, 4), places, np.zeros(8, int), RATES)
    return walk(read_program("HloModule m\n\n" + lines), Machine(mesh, torus, kernels or {}, **more))


MB = 2**20  # a megabyte of memory takes about a millisecond
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

"""
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}"
ALL = Wait(("data",), "ICI")


def entry(*lines):
    return (
        "ENTRY %main (x: f32[262144]) -> f32[262144] {\n  %x = f32[262144]{0} parameter(0)\n  "
        + "\n  ".join(lines)
        + "\n}"
    )


def test_products_are_bound_by_math_and_copies_by_memory():
    lines = """ENTRY %main (x: bf16[1024,1024]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0:S(1)} parameter(0)
  %p = bf16[1024,1024]{1,0:S(1)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = bf16[1024,1024]{1,0} copy(%p)
}"""
    spent = spend(lines)
    assert spent.busy == pytest.approx({"math": 2 * 1024**3 / 1e12, "HBM": 2 * MB / 1e9})
    assert spent.seconds == pytest.approx(sum(spent.busy.values()))


def test_float32_at_the_highest_precision_takes_six_passes():
    lines = """ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0:S(1)} parameter(0)
  ROOT %p = f32[1024,1024]{1,0:S(1)} dot(%x, %x), lhs_contracting_dims={1}, operand_precision={highest,highest}
}"""
    assert spend(lines).seconds == pytest.approx(6 * 2 * 1024**3 / 1e12)


def test_a_collective_is_waited_for_and_an_asynchronous_one_only_for_what_is_left():
    sync = spend(ADD + entry(f"ROOT %r = f32[262144]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add"))
    # Of a line of eight: 2 x 7/8 of a megabyte at 1e8.
    whole = 2 * MB * 7 / 8 / 1e8
    assert sync.seconds == sync.waits[ALL] == pytest.approx(whole)
    beside = spend(
        ADD
        + entry(
            f"%s = f32[262144]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add",
            "%c = f32[262144]{0} negate(%x)",
            "ROOT %r = f32[262144]{0} all-reduce-done(%s)",
        )
    )
    assert beside.seconds == pytest.approx(whole)
    assert beside.waits[ALL] == pytest.approx(whole - 2 * MB / 1e9)
    assert beside.sent[ALL] == pytest.approx(whole)


def test_collectives_of_the_same_links_queue_and_others_dont():
    lines = [
        f"%s1 = f32[262144]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add",
        f"%s2 = f32[262144]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add",
        "%d1 = f32[262144]{0} all-reduce-done(%s1)",
        "ROOT %d2 = f32[262144]{0} all-reduce-done(%s2)",
    ]
    assert spend(ADD + entry(*lines)).seconds == pytest.approx(2 * 2 * MB * 7 / 8 / 1e8)
    ways = [
        "%s1 = f32[262144]{0} collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}",
        "%s2 = f32[262144]{0} collective-permute-start(%x), source_target_pairs={{1,0},{2,1}}",
        "%d1 = f32[262144]{0} collective-permute-done(%s1)",
        "ROOT %d2 = f32[262144]{0} collective-permute-done(%s2)",
    ]
    assert spend(entry(*ways)).seconds == pytest.approx(MB / 1e8)


LOOP = """%body (p: (s32[], f32[262144])) -> (s32[], f32[262144]) {{
  %p = (s32[], f32[262144]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[262144]{{0}} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[262144]{{0}} negate(%x)
  ROOT %t = (s32[], f32[262144]{{0}}) tuple(%next, %y)
}}

%test (p: (s32[], f32[262144])) -> pred[] {{
  %p = (s32[], f32[262144]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] {bound}
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}}

"""
RUN_LOOP = (
    "%zero = s32[] constant(0)",
    "%start = (s32[], f32[262144]{0}) tuple(%zero, %x)",
    "%loop = (s32[], f32[262144]{0}) while(%start), condition=%test, body=%body",
    "ROOT %out = f32[262144]{0} get-tuple-element(%loop), index=1",
)


def test_a_loop_takes_as_long_as_its_trips_and_one_of_unknown_trips_is_told():
    known = spend(LOOP.format(bound="constant(7)") + entry(*RUN_LOOP))
    assert (known.seconds, known.unknown_loops) == (pytest.approx(7 * 2 * MB / 1e9, rel=1e-4), 0)
    unknown = spend(LOOP.format(bound="get-tuple-element(%p), index=0") + entry(*RUN_LOOP))
    assert (unknown.seconds, unknown.unknown_loops) == (pytest.approx(2 * MB / 1e9, rel=1e-4), 1)


def test_what_starts_before_a_loop_goes_on_beside_it():
    lines = [f"%s = f32[262144]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add", *RUN_LOOP[:-1]]
    lines += ["ROOT %d = f32[262144]{0} all-reduce-done(%s)"]
    spent = spend(ADD + LOOP.format(bound="constant(20)") + entry(*lines))
    whole, loop = 2 * MB * 7 / 8 / 1e8, 20 * 2 * MB / 1e9
    assert spent.seconds == pytest.approx(max(whole, loop), rel=1e-3)


def test_of_a_conditional_the_longest_branch_counts():
    branches = """%short (a: f32[262144]) -> f32[262144] {
  ROOT %a = f32[262144]{0} parameter(0)
}

%long (a: f32[262144]) -> f32[262144] {
  %a = f32[262144]{0} parameter(0)
  ROOT %n = f32[262144]{0} negate(%a)
}

"""
    lines = ["%c = s32[] constant(0)"]
    lines += ["ROOT %o = f32[262144]{0} conditional(%c, %x, %x), branch_computations={%short, %long}"]
    assert spend(branches + entry(*lines)).seconds == pytest.approx(2 * MB / 1e9)


def test_a_copy_to_the_chip_uses_the_memory_that_products_leave():
    lines = """ENTRY %main (x: bf16[1024,1024], y: bf16[1024,1024]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0:S(1)} parameter(0)
  %y = bf16[1024,1024]{1,0} parameter(1)
  %s = (bf16[1024,1024]{1,0:S(1)}, bf16[1024,1024]{1,0}, u32[]) copy-start(%y)
  %p = bf16[1024,1024]{1,0:S(1)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d = bf16[1024,1024]{1,0:S(1)} copy-done(%s)
  ROOT %q = bf16[1024,1024]{1,0:S(1)} dot(%d, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""
    product, copy = 2 * 1024**3 / 1e12, 2 * MB / 1e9
    assert copy > 0
    assert spend(lines).seconds == pytest.approx(2 * product + max(0, copy - product))


ASYNC = """%start (a: f32[32768]) -> (f32[32768], f32[262144]) {
  %a = f32[32768]{0} parameter(0)
  %g = f32[262144]{0} all-gather(%a), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %c = (f32[32768]{0}, f32[262144]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (a: f32[32768], b: f32[262144]) -> (f32[262144], f32[262144]) {
  %a = f32[32768]{0} parameter(0)
  %b = f32[262144]{0} parameter(1)
  %n = f32[262144]{0} negate(%b)
  %g = f32[262144]{0} all-gather(%a), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %t = (f32[262144]{0}, f32[262144]{0}) tuple(%n, %g)
}

%done (a: f32[32768]) -> f32[262144] {
  %a = f32[32768]{0} parameter(0)
  %g = f32[262144]{0} all-gather(%a), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %c = f32[262144]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[32768], b: f32[262144]) -> f32[262144] {
  %a = f32[32768]{0} parameter(0)
  %b = f32[262144]{0} parameter(1)
  %s = (f32[32768]{0}, f32[262144]{0}) fusion(%a), kind=kCustom, calls=%start
  %m = (f32[262144]{0}, f32[262144]{0}) fusion(%a, %b), kind=kOutput, calls=%beside
  ROOT %d = f32[262144]{0} fusion(%a), kind=kCustom, calls=%done
}"""


def test_a_gather_fused_with_other_work_runs_beside_it():
    spent = spend(ASYNC)
    whole, work = 7 * MB / 8 / 1e8, 2 * MB / 1e9
    assert spent.seconds == pytest.approx(whole)
    assert spent.waits[ALL] == pytest.approx(whole - work)
    assert spent.busy["HBM"] == pytest.approx(work)


SCATTER = """%all-reduce-scatter.1 (a: f32[262144]) -> f32[32768] {
  %a = f32[262144]{0} parameter(0)
  %r = f32[262144]{0} all-reduce(%a), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %s = f32[32768]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={32768}
}

"""


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
    line = "ROOT %f = f32[32768]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    assert spend(ADD + SCATTER + entry(line)).waits[ALL] <= MB * 7 / 8 / 1e8


IN_ZEROS = (
    "%z = f32[] constant(0)",
    "%zeros = f32[262144]{0} broadcast(%z), dimensions={}",
    "%i = s32[] constant(0)",
    "%part = f32[32768]{0} slice(%x), slice={[0:32768]}",
    "%w = f32[262144]{0} dynamic-update-slice(%zeros, %part, %i)",
    f"ROOT %r = f32[262144]{{0}} all-reduce(%w), {GROUPS}, to_apply=%add",
)


def test_a_gather_written_as_a_sum_has_two_readings():
    written, gathered = (
        spend(ADD + entry(*IN_ZEROS), of_parts=of_parts).waits[ALL] for of_parts in (as_written, as_gathered)
    )
    assert written == pytest.approx(2 * MB * 7 / 8 / 1e8)
    assert gathered == pytest.approx(written / 2)
    plain = entry(f"ROOT %r = f32[262144]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add")
    assert spend(ADD + plain, of_parts=as_gathered).waits[ALL] == pytest.approx(written)


def test_a_kernel_takes_the_operations_that_its_jaxpr_holds():
    line = 'ROOT %flash_fwd.3 = f32[1024]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
    assert spend(entry(line), kernels={("flash_fwd", ((1024,),)): 10**12}).busy == {"kernels": pytest.approx(2.0)}
    assert spend(entry(line), kernels={("flash_fwd", ((8,),)): 10**12}).seconds < 0.1


def test_what_a_loop_sends_waits_for_what_is_under_way_on_its_links():
    body = LOOP.replace(
        "  %y = f32[262144]{{0}} negate(%x)",
        "  %y = f32[262144]{{0}} all-reduce(%x), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add",
    )
    start = f"%s = f32[262144]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add"
    spent = spend(
        ADD
        + body.format(bound="constant(3)")
        + entry(start, *RUN_LOOP[:-1], "ROOT %d = f32[262144]{0} all-reduce-done(%s)")
    )
    assert spent.seconds == pytest.approx(4 * 2 * MB * 7 / 8 / 1e8, rel=1e-3)
    assert spent.waits[ALL] == pytest.approx(spent.sent[ALL], rel=1e-3)


def test_a_wait_is_charged_to_what_keeps_the_link():
    mesh = jaxpar.make_mesh(data=2, fsdp=4)
    pairs = "replica_groups={{0,1,2,3},{4,5,6,7}}"
    lines = [
        f"%s1 = f32[262144]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add",
        "%small = f32[8]{0} slice(%x), slice={[0:8]}",
        f"%s2 = f32[8]{{0}} all-reduce-start(%small), {pairs}, to_apply=%add",
        "%d2 = f32[8]{0} all-reduce-done(%s2)",
        "ROOT %d1 = f32[262144]{0} all-reduce-done(%s1)",
    ]
    spent = spend(ADD + entry(*lines), mesh)
    for wait, seconds in spent.waits.items():
        assert seconds <= spent.sent[wait] * (1 + 1e-9), wait
    assert sum(spent.waits.values()) + sum(spent.busy.values()) == pytest.approx(spent.seconds)


def test_a_copy_that_is_not_done_is_waited_for():
    lines = """ENTRY %main (x: bf16[256,256], y: bf16[1024,1024]) -> bf16[256,256] {
  %x = bf16[256,256]{1,0:S(1)} parameter(0)
  %y = bf16[1024,1024]{1,0} parameter(1)
  %s = (bf16[1024,1024]{1,0:S(1)}, bf16[1024,1024]{1,0}, u32[]) copy-start(%y)
  %p = bf16[256,256]{1,0:S(1)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d = bf16[1024,1024]{1,0:S(1)} copy-done(%s)
  ROOT %q = bf16[256,256]{1,0:S(1)} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""
    product, copy = 2 * 256**3 / 1e12, 2 * MB / 1e9
    assert spend(lines).seconds == pytest.approx(copy + product)
    assert spend(lines).busy["HBM"] == pytest.approx(copy - product)


def test_a_call_takes_what_it_calls():
    inner = """%twice (a: f32[262144]) -> f32[262144] {
  %a = f32[262144]{0} parameter(0)
  ROOT %n = f32[262144]{0} negate(%a)
}

"""
    assert spend(inner + entry("ROOT %o = f32[262144]{0} call(%x), to_apply=%twice")).seconds == pytest.approx(
        2 * MB / 1e9
    )


def test_windows_are_told_with_their_trips():
    body = LOOP.replace("%body", "%wide.windowed_dot_general_body").replace(
        "  %y = f32[262144]{{0}} negate(%x)",
        "  %y = f32[262144]{{0}} collective-permute(%x), source_target_pairs={{{{0,1}},{{1,0}}}}",
    )
    run = [line.replace("body=%body", "body=%wide.windowed_dot_general_body") for line in RUN_LOOP]
    spent = spend(body.format(bound="constant(5)") + entry(*run))
    assert spent.windows == pytest.approx(5 * MB / 1e8)


def test_kernels_are_told_apart_by_their_longest_name_and_unknown_ones_told():
    line = 'ROOT %mm_long.3 = f32[1024]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
    kernels = {("mm", ((1024,),)): 10**9, ("mm.long", ((1024,),)): 10**12, ("", ((1024,),)): 10**15}
    assert spend(entry(line), kernels=kernels).busy == {"kernels": pytest.approx(2.0)}
    assert spend(entry(line), kernels={}).unknown_kernels == 1


def test_a_grouped_product_of_experts_takes_the_rows_that_are_in_use():
    lines = """ENTRY %main (x: bf16[1024,512], w: bf16[4,512,256]) -> bf16[1024,256] {
  %x = bf16[1024,512]{1,0:S(1)} parameter(0)
  %w = bf16[4,512,256]{2,1,0:S(1)} parameter(1)
  ROOT %ragged-dot-none.1 = bf16[1024,256]{1,0:S(1)} custom-call(%x, %w), custom_call_target="tpu_custom_call"
}"""
    whole = 2 * 1024 * 512 * 256 / 5e11
    assert spend(lines).seconds == pytest.approx(whole)
    assert spend(lines, jaxpar.make_mesh(data=2, expert=4)).seconds == pytest.approx(whole / 4)


MEGASCALE = (
    'channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.47_0",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
)
BETWEEN = (
    "%token = token[] after-all()",
    f"%s = (f32[262144]{{0}}, u32[], token[]) send(%x, %token), {MEGASCALE}",
    f"%r = (f32[262144]{{0}}, u32[], token[]) recv(%token), {MEGASCALE}",
    "%c = f32[262144]{0} negate(%x)",
    f"%sd = token[] send-done(%s), {MEGASCALE}",
    f"ROOT %rd = (f32[262144]{{0}}, token[]) recv-done(%r), {MEGASCALE}",
)


def test_what_hosts_exchange_between_slices_is_one_collective_on_the_network(monkeypatch):
    mesh = jaxpar.make_mesh(data=2, fsdp=4, slices=2, slice_of=lambda device: device.id // 4)
    monkeypatch.setattr("jaxpar.inspection.groups._slice_index", lambda device, slice_of: device.id // 4)
    program = read_program("HloModule m\n\n" + entry(*BETWEEN))
    (one,) = find_collectives(program, mesh)
    assert (one.kind, one.axes, one.bytes, one.crosses_slices) == ("all-reduce", ("data",), MB, True)
    spent = walk(program, Machine(mesh, torus_of((2, 2), 2), {}))
    network = MB / 1e7
    assert spent.waits[Wait(("data",), "DCN")] == pytest.approx(network - 2 * MB / 1e9)
    # With every doubling of slices, of this chip's throughput half is left.
    assert spent.waits[Wait(("data",), "pace")] == pytest.approx(network)
    assert spent.seconds == pytest.approx(2 * network)


@pytest.mark.parametrize(
    ("target", "kind", "found"),
    [
        ("{{100000->200000},{100001->200001}}", "ONE_TO_ONE", ("collective-permute", 2)),
        ("{{100000,100001,200000,200001,300000,300001}}", "ALL_TO_ALL", ("all-to-all", 3)),
        ("{{100000,200000}}", "RAGGED_ALL_TO_ALL", ("ragged-all-to-all", 2)),
        ('"{1,2,3,4}x{0:63}"', "ALL_GATHER", ("all-gather", 4)),
    ],
)
def test_a_transfer_between_slices_is_read_in_each_spelling(target, kind, found):
    said = (
        'channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r",'
        f"_xla_megascale_target={target},_xla_megascale_transfer_type={kind}}}"
    )
    lines = (
        "%token = token[] after-all()",
        f"%s = (f32[262144]{{0}}, u32[], token[]) send(%x, %token), {said}",
        f"ROOT %r = (f32[1024]{{0}}, u32[], token[]) recv(%token), {said}",
    )
    program = read_program("HloModule m\n\n" + entry(*lines))
    main, mesh = program.computations["main"], jaxpar.make_mesh(data=2, fsdp=4)
    transfer = read_transfer(main, main.instructions["s"], mesh, np.repeat([0, 1], 4))
    assert (transfer.kind, transfer.slices, transfer.axes) == (*found, ("data",))
    # A ragged one has room for the worst case at one end.
    assert transfer.bytes == (4096 if "RAGGED" in kind else MB)


def test_of_several_slices_a_program_counts_its_own_devices():
    mesh = jaxpar.make_mesh(fsdp=2, model=4)
    # The second of two slices has the odd places of `model`: the compiler numbers each slice's devices from 0.
    slices = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    program = read_program(
        "HloModule m\n\n"
        + ADD
        + entry("ROOT %r = f32[262144]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add")
    )
    one = program.computations["main"].instructions["r"]
    assert groups_of(one, mesh, slices).tolist() == [[0, 4], [2, 6]]
    assert axes_touched(groups_of(one, mesh, slices), mesh) == ("fsdp",)
    assert groups_of(one, mesh, np.zeros(8, int)).tolist() == [[0, 2], [1, 3]]


# the report


def test_a_mesh_that_is_here_has_nothing_to_estimate():
    step = jaxpar.sharded(jaxpar.make_mesh(data=2, model=4)).compile(lambda state, batch: (state, batch))
    with pytest.raises(jaxpar.EstimationError, match=r"give a target, as make_mesh\(data=2, model=4, target='v5e-8'\)"):
        jaxpar.estimate(step, np.ones(8), {"x": np.ones(8)})
    with pytest.raises(jaxpar.InspectionError, match="train_step is a function; estimate takes what make_train_step"):
        jaxpar.estimate(lambda state, batch: state, None, None)


def make_estimate(**changes):
    from jaxpar.targets import Target

    values = {
        "strategy": "sharded",
        "target": Target("v5e", (4, 4)),
        "mesh": jaxpar.make_mesh(data=8),
        "seconds": 2.0,
        "fastest": 1.5,
        "slowest": 3.0,
        "if_gathered": 2.0,
        "tokens": 1000,
        "unit": "tokens",
        "model_flops": int(8 * 197e12),
        "peak_bytes": 2**30,
        "hbm_bytes": 2**34,
        "busy": {"math": 1.0, "HBM": 0.4},
        "waits": {ALL: 0.6},
        "sent": {ALL: 0.8},
        "price": read_figures()["v5e"]["dollars_an_hour"],
        "unknown_loops": 0,
        "windows": 0.0,
        "unknown_kernels": 0,
    }
    return jaxpar.Estimate(**{**values, **changes})


def test_a_report_adds_up():
    report = make_estimate()
    assert (report.mfu, report.tokens_per_second, report.fits) == (0.5, 500, True)
    assert report.dollars_an_hour == pytest.approx(8 * 1.20)
    assert report.dollars_a_billion == pytest.approx(8 * 1.20 / 3600 * 2 / 1000 * 1e9)
    assert sum(report.parts().values()) == pytest.approx(report.seconds)
    assert report.bound == "math (the matrix units)"
    assert make_estimate(waits={ALL: 5.0}).bound == "the links between chips (ICI) over data"
    assert json.loads(json.dumps(report.to_dict()))["links"] == [
        {"axes": ["data"], "link": "ICI", "exposed_seconds": 0.6, "seconds": 0.8}
    ]
    for shown in (str(report), report._repr_html_()):
        assert "50.0%" in shown
        assert "read 2025" in shown
    assert "does NOT fit" in str(make_estimate(peak_bytes=2**35))
    assert "Ambiguous" in str(make_estimate(if_gathered=1.5))
    assert "3 calls of kernels whose operations are unknown" in str(make_estimate(unknown_kernels=3))
    assert "More than all of the peak" in str(make_estimate(seconds=0.5))
    assert "windowed einsum" in str(make_estimate(windows=0.5))
    assert "unknown number of times" in str(make_estimate(unknown_loops=2))
