"""`make_mesh`, `check_mesh`, `fake_devices`: the right axes in the one order, or an error with the numbers."""

import math
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from models import DEVICES, make_batches, make_task

import jaxpar
from jaxpar.mesh import check_mesh, count_shards, nearest

pytestmark = pytest.mark.devices(8)

# Arguments, and the axes with their sizes that the mesh has on 8 devices, in order.
MESHES = [
    ((), {}, {"data": 8}),
    ((), {"data": -1}, {"data": 8}),
    ((), {"model": 4, "data": 2}, {"data": 2, "model": 4}),
    ((), {"model": 4, "data": -1}, {"data": 2, "model": 4}),
    ((), {"model": -1, "stage": 2, "fsdp": 2}, {"fsdp": 2, "stage": 2, "model": 2}),
    ((), {"model": 1, "context": 2, "expert": 2, "data": 2}, {"data": 2, "expert": 2, "context": 2, "model": 1}),
    ((), {"data": np.int64(8)}, {"data": 8}),
    ((), {"data": -1, "model": 8}, {"data": 1, "model": 8}),
    (("data=2,model=4",), {}, {"data": 2, "model": 4}),
    ((" model = 4 , data = 2 ",), {}, {"data": 2, "model": 4}),
    (("fsdp=-1",), {}, {"fsdp": 8}),
    (("data=2",), {"model": 4}, {"data": 2, "model": 4}),
]


@pytest.mark.parametrize(("args", "sizes", "expected"), MESHES)
def test_axes_lie_in_the_fixed_order_whatever_the_order_they_are_given_in(args, sizes, expected):
    mesh = jaxpar.make_mesh(*args, **sizes)
    assert list(mesh.shape.items()) == list(expected.items())


@pytest.mark.parametrize(("args", "sizes", "expected"), MESHES)
def test_every_device_is_used_once_and_every_axis_is_auto(args, sizes, expected):
    mesh = jaxpar.make_mesh(*args, **sizes)
    assert sorted(device.id for device in mesh.devices.flat) == [device.id for device in jax.devices()]
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_the_axes_are_the_six_names_in_their_order():
    assert jaxpar.AXES == ("data", "fsdp", "stage", "expert", "context", "model")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_subset_of_the_devices_is_used_as_given(count):
    devices = jax.devices()[::-1][:count]
    assert list(jaxpar.make_mesh(devices=devices, data=-1).devices.flat) == devices


def test_devices_may_be_an_array_of_any_shape():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jaxpar.make_mesh("data=2,model=2", devices=devices)
    assert (mesh.devices == devices).all()


def test_a_mesh_is_jax_own_type_and_equal_to_one_made_alike():
    assert type(jaxpar.make_mesh(data=8)) is Mesh
    assert jaxpar.make_mesh(model=4, data=2) == jaxpar.make_mesh("data=2,model=4")


def test_a_hand_made_mesh_in_order_is_as_good():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    check_mesh(mesh)
    assert jaxpar.sharded(mesh, jaxpar.MEGATRON).mesh is mesh


@pytest.mark.parametrize(
    ("axes", "expected"),
    [((), 1), (("data",), 2), (("model",), 4), (("fsdp",), 1), (("data", "fsdp", "model"), 8)],
)
def test_shards_are_counted_over_the_axes_that_the_mesh_has(axes, expected):
    assert count_shards(jaxpar.make_mesh(data=2, model=4), axes) == expected


@pytest.mark.parametrize(
    ("name", "aside"), [("modle", " (nearest: 'model')"), ("fdsp", " (nearest: 'fsdp')"), ("", "")]
)
def test_the_nearest_name_is_an_aside(name, aside):
    assert nearest(name, jaxpar.AXES) == aside


# How many devices lie on a slice in turn, the arguments, and the slices that each axis crosses.
SLICES = [
    (lambda device: device.id // 4, {"data": 2, "model": 4, "slices": 2}, {"data": True, "model": False}),
    (lambda device: device.id % 2, {"data": 2, "model": 4, "slices": 2}, {"data": True, "model": False}),
    (lambda device: device.id % 4, {"data": 4, "fsdp": 2, "slices": 4}, {"data": True, "fsdp": False}),
    (lambda device: device.id // 4, {"data": 4, "model": 2, "slices": 2}, {"data": True, "model": False}),
    (lambda device: "ba"[device.id % 2], {"data": -1, "slices": 2}, {"data": True}),
    (
        lambda device: device.id % 2,
        {"data": 2, "fsdp": 2, "model": 2, "slices": 2, "slice_axis": "fsdp"},
        {"data": False, "fsdp": True, "model": False},
    ),
    (
        lambda device: device.id % 2,
        {"fsdp": 2, "model": 4, "slices": 2, "slice_axis": "model"},
        {"fsdp": False, "model": True},
    ),
    (lambda device: 7, {"data": 2, "model": 4}, {"data": False, "model": False}),
]


@pytest.mark.parametrize(("slice_of", "sizes", "crosses"), SLICES)
def test_one_axis_alone_crosses_between_slices(slice_of, sizes, crosses):
    mesh = jaxpar.make_mesh(slice_of=slice_of, **sizes)
    slices = np.vectorize(slice_of)(mesh.devices)
    found = {axis: bool((slices != slices.take([0], dim)).any()) for dim, axis in enumerate(mesh.axis_names)}
    assert found == crosses
    assert sorted(device.id for device in mesh.devices.flat) == [device.id for device in jax.devices()]
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_the_outer_part_of_the_axis_is_what_crosses():
    mesh = jaxpar.make_mesh(data=4, model=2, slices=2, slice_of=lambda device: device.id // 4)
    assert [[device.id // 4 for device in row] for row in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("given", "axis"), [("tensor", "model"), ("pipeline", "stage"), ("dp", "data"), ("sp", "context")]
)
def test_another_fields_word_for_an_axis_is_told_the_one_here(given, axis):
    with pytest.raises(jaxpar.MeshError, match=rf"Mesh axis '{given}' is unknown \(here it is '{axis}'\)"):
        jaxpar.make_mesh(f"{given}=8")


def test_an_unknown_slow_axis_is_named_with_one_slice_too():
    with pytest.raises(jaxpar.MeshError, match=r"Mesh axis 'modle' is unknown \(nearest: 'model'\)"):
        jaxpar.make_mesh(data=8, slice_axis="modle")


def test_the_slow_axis_alone_has_collectives_across_slices():
    slice_of = lambda device: device.id % 2
    mesh = jaxpar.make_mesh(data=2, fsdp=2, model=2, slices=2, slice_of=slice_of)
    task = make_task("linen_mlp")
    strategy = jaxpar.sharded(mesh, jaxpar.MEGATRON, jaxpar.FSDP)
    step = jaxpar.make_train_step(task.loss_fn, strategy)
    batch = make_batches("mlp", 1, rows=1024)[0]
    text = step.lower(strategy.abstract_state(task.init_fn), batch).compile().as_text()
    # A program numbers devices by their place on the mesh.
    slices = [slice_of(device) for device in mesh.devices.flat]
    groups = {group: {slices[int(place)] for place in group.split(",")} for group in find_groups(text)}
    assert {group for group, crossed in groups.items() if len(crossed) == 1}
    places = np.arange(8).reshape(2, 2, 2)
    for group, crossed in groups.items():
        along_data = len({int(np.argwhere(places == int(place))[0][0]) for place in group.split(",")}) > 1
        assert (len(crossed) == 2) == along_data, group


def find_groups(text):
    """Returns the devices, by number, of each group of each collective of a compiled program.

    Programs spell them in three ways: listed, as `[rows,columns]<=[dims]T(order)`, and by named axes.
    """
    groups = set()
    for line in filter(lambda line: "replica_groups=" in line, text.splitlines()):
        listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
        tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?),? ", line)
        named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\S+?)\))? \{(.*?)\}", line)
        if listed:
            groups |= set(listed[1].split("},{"))
            continue
        if tiled:
            rows = number_devices(tiled[3]).reshape(int(tiled[1]), int(tiled[2]))
        else:
            sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
            along = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[3])]
            numbers = number_devices(named[2] or f"[{DEVICES}]").reshape(*sizes.values())
            count = math.prod(numbers.shape[dim] for dim in along)
            rows = np.moveaxis(numbers, along, range(-len(along), 0)).reshape(-1, count)
        groups |= {",".join(map(str, row)) for row in rows}
    return groups


def number_devices(text):
    """Returns the numbers that `[4,2]T(1,0)` stands for: those of 8 devices, laid out and transposed."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(DEVICES).reshape([int(size) for size in dims.split(",")])
    return numbers.transpose([int(dim) for dim in order.split(",")]) if order else numbers


def test_making_a_mesh_sets_none():
    jaxpar.make_mesh(data=8)
    assert jax.sharding.get_abstract_mesh().empty


def test_fake_devices_are_given_where_jax_has_enough_already():
    assert jaxpar.fake_devices(5) == jax.devices("cpu")[:5]


def test_fake_devices_are_refused_where_jax_may_not_use_cpus():
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda")
    try:
        with pytest.raises(jaxpar.MeshError, match="JAX_PLATFORMS=cuda rules CPUs out; unset it"):
            jaxpar.fake_devices(8)
    finally:
        jax.config.update("jax_platforms", before)


def run_python(code):
    # A start of JAX of its own: the number of devices is counted once a process.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return result.stdout.strip(), result.stderr.strip()


@pytest.mark.slow
def test_fake_devices_come_before_jax_starts_and_say_what_to_do_after():
    out, _ = run_python(
        "import jaxpar, jax\n"
        "print(len(jaxpar.fake_devices(3)), jax.device_count())\n"
        "try:\n    jaxpar.fake_devices(6)\n"
        "except jaxpar.MeshError as error:\n    print(error)"
    )
    first, message = out.splitlines()
    assert first == "3 3"
    assert message.startswith("6 fake devices were asked for, but JAX has already started with 3;")
    assert "JAX_NUM_CPU_DEVICES=6" in message
