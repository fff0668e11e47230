"""`make_mesh`, `check_mesh`, `fake_devices`: the right axes in the one order, or an error with the numbers."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxpar
from jaxpar.mesh import axis_sizes, check_mesh, nearest

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
def test_axis_sizes_multiply_what_the_mesh_has(axes, expected):
    assert axis_sizes(jaxpar.make_mesh(data=2, model=4), axes) == expected


@pytest.mark.parametrize(
    ("name", "aside"), [("modle", " (nearest: 'model')"), ("fdsp", " (nearest: 'fsdp')"), ("", "")]
)
def test_the_nearest_name_is_an_aside(name, aside):
    assert nearest(name, jaxpar.AXES) == aside


def test_making_a_mesh_sets_none():
    jaxpar.make_mesh(data=8)
    assert jax.sharding.get_abstract_mesh().empty


def test_fake_devices_are_given_where_jax_has_enough_already():
    assert jaxpar.fake_devices(5) == jax.devices("cpu")[:5]


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
