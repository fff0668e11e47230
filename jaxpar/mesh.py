"""Meshes: the axis names, their one order, and the devices on them; changes with hardware and `jax.sharding.Mesh`."""

import contextlib
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxpar.integers import is_integer
from jaxpar.targets import read_target, target_devices, target_of

AXES = ("data", "fsdp", "stage", "expert", "context", "model")
BATCH_AXES = ("data", "fsdp", "expert")
_ALSO_CALLED = {"batch": "data", "dp": "data", "ddp": "data", "replica": "data", "zero": "fsdp", "pipeline": "stage"}
_ALSO_CALLED |= {"pp": "stage", "ep": "expert", "sequence": "context", "cp": "context", "sp": "context"}
_ALSO_CALLED |= {"tensor": "model", "tp": "model", "mp": "model"}
# What a model may reduce over in every view, as BatchNorm does.
AXIS_NAME = "data"
# What `jax.vmap` calls the rows of a padded batch, where the model sees one after the other.
ROW_AXIS = "jaxpar_row"
# Over which a batch for pmap lies: no strategy takes it for rows of its own.
STACK_AXIS = "jaxpar_stack"


class MeshError(ValueError):
    """A mesh that can't be made or used: the message gives the axes, their sizes and the device count."""


def make_mesh(
    spec: str | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
    slice_axis: str = "data",
    slice_of: Callable[[jax.Device], int] | None = None,
    target: str | None = None,
    **sizes: int,
) -> Mesh:
    """Returns a `jax.sharding.Mesh` over every given device, its axes of type Auto and in jaxpar's fixed order.

    Unlike `jax.make_mesh`, whose axes are Explicit by default and which leaves devices over without a word.

    Args:
      spec: the sizes as text, `"data=2,model=4"`, for a command line; the same as `data=2, model=4`.
      devices: the devices to use, all of them; by default `jax.devices()`.
      slices: how many slices, joined by a slow network, the devices lie on. With 2 or more, `slice_axis` alone crosses
        it, and every other axis stays inside a slice.
      slice_axis: the axis that crosses between slices; its size is a multiple of `slices`.
      slice_of: tells which slice a device is on; by default what JAX knows of it, else (but for TPUs) its process.
      target: a TPU pod that isn't here, in place of devices: `"v5e-256"`, by the chips of a slice, or `"v5e:16x16"`.
        Steps can be inspected on it, and nothing is allocated; with `slices`, it is as many of them.
      **sizes: the size of each axis, named as in `jaxpar.AXES`. One may be -1: what the others leave. None at all is
        `data=-1`.

    Raises:
      TargetError: the target is unknown, or the TPU compiler isn't installed.
      MeshError: an axis is unknown or given twice, a size is not a whole number, the sizes don't multiply to the
        device count, or the devices don't lie on that many slices of one size.

    >>> dict(make_mesh(model=4, data=-1).shape)
    {'data': 2, 'model': 4}
    >>> make_mesh("data=3,model=2")
    Traceback (most recent call last):
    jaxpar.mesh.MeshError: Mesh axes {'data': 3, 'model': 2} use 6 devices, but 8 are available; sizes must multiply \
to the device count. Pass devices=jax.devices()[:6] for a part of them.
    >>> mesh = make_mesh(data=2, model=4, slices=2, slice_of=lambda device: device.id % 2)
    >>> [[device.id for device in row] for row in mesh.devices]
    [[0, 2, 4, 6], [1, 3, 5, 7]]
    """
    if spec is not None:
        sizes = _parse_sizes(spec, sizes)
    sizes = sizes or {"data": -1}
    for axis, size in sizes.items():
        check_axis_name(axis)
        if not is_integer(size, least=-1) or not size:
            raise MeshError(f"Mesh axis {axis!r} has size {size!r}; a size is a whole number, 1 or more, or -1 once.")
    if target is not None and devices is not None:
        raise MeshError(f"devices= and target={target!r} are given; a target brings its own devices.")
    _check_slice_count(slices)
    if target is not None:
        devices = list(target_devices(read_target(target, slices)))
    chosen = check_devices(jax.devices() if devices is None else devices)
    shape = _fill_in({axis: int(sizes[axis]) for axis in AXES if axis in sizes}, chosen)
    check_axis_name(slice_axis)
    axis_types = (AxisType.Auto,) * len(shape)
    if slices != 1 or slice_of is not None:
        laid = _lay_slices(shape, chosen, slices, slice_axis, slice_of)
        return Mesh(laid, tuple(shape), axis_types=axis_types)
    if target is not None:
        laid = mesh_utils.create_device_mesh(
            tuple(shape.values()), devices=list(chosen), allow_split_physical_axes=True
        )
        return Mesh(laid, tuple(shape), axis_types=axis_types)
    if devices is None:
        # JAX knows which order of the chips makes neighbours on the wire neighbours on the mesh.
        return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axis_types)
    return Mesh(chosen.reshape(tuple(shape.values())), tuple(shape), axis_types=axis_types)


def check_devices(devices: Any) -> np.ndarray:
    """Returns the devices as a flat array.

    Raises:
      MeshError: there is none, one comes twice, or one is no device.
    """
    chosen = np.array(devices, dtype=object).ravel() if isinstance(devices, Sequence | np.ndarray) else np.array([])
    if not chosen.size or isinstance(devices, str) or not all(hasattr(device, "process_index") for device in chosen):
        raise MeshError(f"devices= is {devices!r}; give a list of devices, as jax.devices()[:4].")
    if len(set(chosen)) != chosen.size:
        raise MeshError(f"devices= holds {chosen.size} devices, {len(set(chosen))} of them distinct; give each once.")
    return chosen


def check_axis_name(axis: str) -> None:
    """Raises MeshError, with the nearest name, unless `axis` is one of `jaxpar.AXES`."""
    if axis not in AXES:
        known = _ALSO_CALLED.get(str(axis))
        near = f" (here it is {known!r})" if known else nearest(str(axis), AXES)
        raise MeshError(f"Mesh axis {axis!r} is unknown{near}; the axes are {', '.join(AXES)}.")


@functools.cache
def is_target(mesh: Mesh) -> bool:
    """Returns whether the mesh's devices aren't here: those of a target, for which a step can only be compiled.

    >>> is_target(make_mesh(data=8))
    False
    """
    device = mesh.devices.flat[0]
    try:
        return device not in jax.devices(device.platform)
    except RuntimeError:
        return True


def check_is_here(mesh: Mesh) -> None:
    """Raises MeshError if the mesh's devices aren't here, and so can hold nothing."""
    if is_target(mesh):
        raise MeshError(
            f"The mesh {dict(mesh.shape)} is of {mesh.devices.flat[0].device_kind} chips that aren't here: nothing can "
            "be put on them. Use strategy.abstract_state(init_fn), and a raw batch or its shapes, with jaxpar.inspect."
        )


def is_stacked(array: Any) -> bool:
    """Returns whether an array lies as a batch for pmap: (shards, rows of one, ...)."""
    return getattr(getattr(getattr(array, "sharding", None), "mesh", None), "axis_names", ()) == (STACK_AXIS,)


def check_mesh(mesh: Mesh) -> None:
    """Raises MeshError unless `mesh`, perhaps made by hand, has known axes in the fixed order, all of type Auto.

    The order is fixed since islands nest from the outer axis to the inner one; JAX 0.12 aborts the process on another.
    """
    if not isinstance(mesh, Mesh):
        raise MeshError(f"mesh is {mesh!r}, a {type(mesh).__name__}; give a jax.sharding.Mesh, as make_mesh returns.")
    for axis in mesh.axis_names:
        check_axis_name(axis)
    ordered = tuple(axis for axis in AXES if axis in mesh.axis_names)
    if mesh.axis_names != ordered:
        raise MeshError(f"Mesh axes are {mesh.axis_names}, but must lie in the order {ordered}; make_mesh orders them.")
    check_no_axis_is(mesh, AxisType.Explicit, AxisType.Manual)


def count_shards(mesh: Mesh, axes: Sequence[str]) -> int:
    """Returns how many ways `axes` split a dim: the product of the sizes of those that the mesh has.

    >>> count_shards(make_mesh(data=2, model=4), ("data", "fsdp", "model"))
    8
    """
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)


def check_no_axis_is(mesh: Mesh | AbstractMesh, *kinds: AxisType) -> None:
    """Raises MeshError if an axis of the mesh is of one of these kinds: jaxpar's are Auto, manual inside islands."""
    named = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in kinds]
    if named:
        raise MeshError(
            f"Mesh axes {named} are not of type Auto; pass axis_types=(AxisType.Auto,) * {len(mesh.axis_names)} to "
            "jax.make_mesh, or use jaxpar.make_mesh."
        )


def fake_devices(count: int = 8) -> list[jax.Device]:
    """Returns `count` CPU devices, made up on this machine's one CPU: what tests and notebooks run a mesh on.

    Call it before anything else uses JAX, since JAX counts its devices once. Other devices stay beside them: where
    there are more, give what it returns to `make_mesh(devices=...)`.

    Raises:
      MeshError: JAX has started already, with fewer CPU devices, or may not use CPUs.

    >>> len(fake_devices(8))
    8
    >>> dict(make_mesh(devices=fake_devices(4), data=-1).shape)
    {'data': 4}
    """
    if not is_integer(count):
        raise MeshError(f"count is {count!r}; give a whole number of devices, 1 or more.")
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if platforms and "cpu" not in platforms.split(","):
        raise MeshError(f"Fake devices are CPU devices, but JAX_PLATFORMS={platforms} rules CPUs out; unset it.")
    # Once JAX has started it refuses; that is right if it did so with enough devices, which the count below tells.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise MeshError(
            f"{count} fake devices were asked for, but JAX has already started with {len(devices)}; call fake_devices "
            f"first (restart a notebook's kernel), or start Python with JAX_NUM_CPU_DEVICES={count} set."
        )
    return devices[:count]


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns ` (nearest: 'x')` for the spelling in `names` closest to `name`, or nothing: an error's aside.

    >>> nearest("modle", AXES)
    " (nearest: 'model')"
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


def _parse_sizes(spec: str, sizes: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(spec, str):
        raise MeshError(
            f"The mesh is {spec!r}, a {type(spec).__name__}; name each axis's size, as make_mesh(data=2, model=4), or "
            "write 'data=2,model=4'."
        )
    parsed = dict(sizes)
    for part in spec.split(","):
        axis, _, size = part.partition("=")
        axis = axis.strip()
        try:
            number = int(size)
        except ValueError:
            raise MeshError(f"Mesh {spec!r} has the part {part!r}; write axis=size, as in 'data=2,model=4'.") from None
        check_axis_name(axis)
        if axis in parsed:
            raise MeshError(f"Mesh {spec!r} gives axis {axis!r} twice: {parsed[axis]} and {number}; give one.")
        parsed[axis] = number
    return parsed


def _lay_slices(
    shape: dict[str, int], devices: np.ndarray, slices: int, axis: str, slice_of: Callable[[jax.Device], int] | None
) -> np.ndarray:
    """The devices laid out so that `axis` alone crosses between slices: its outer part, as JAX's hybrid mesh does."""
    by_process = slice_of is None and _process_is_slice(devices)
    groups: dict[int, list[jax.Device]] = {}
    known = lambda device: device.process_index if by_process else getattr(device, "slice_index", 0)
    indices = [known(device) for device in devices] if slice_of is None else _call_slice_of(slice_of, devices)
    for index, device in zip(indices, devices, strict=True):
        groups.setdefault(index, []).append(device)
    _check_slices(shape, slices, axis, {index: len(group) for index, group in groups.items()})
    inside = {name: size // slices if name == axis else size for name, size in shape.items()}
    if slice_of is not None:
        parts = [np.array(groups[index], dtype=object).reshape(tuple(inside.values())) for index in sorted(groups)]
        return np.concatenate(parts, axis=list(shape).index(axis))
    return mesh_utils.create_hybrid_device_mesh(
        tuple(inside.values()),
        tuple(slices if name == axis else 1 for name in shape),
        devices=list(devices),
        process_is_granule=by_process,
        allow_split_physical_axes=target_of(devices[0]) is not None,
    )


def _call_slice_of(slice_of: Any, devices: np.ndarray) -> list[Any]:
    if not callable(slice_of):
        raise MeshError(f"slice_of is {slice_of!r}; give a function of a device, as lambda device: device.id // 4.")
    indices = [slice_of(device) for device in devices]
    if not any(all(isinstance(index, kind) for index in indices) for kind in (int | np.integer, str)):
        raise MeshError(f"slice_of gave {indices}; give for each device its slice's number, or for each a name.")
    return indices


def _process_is_slice(devices: np.ndarray) -> bool:
    # Without a fast network that JAX finds, processes on CPUs and GPUs all say slice 0; a TPU slice has many too.
    return devices[0].platform != "tpu" and len({getattr(device, "slice_index", 0) for device in devices}) == 1


def _check_slice_count(slices: Any) -> None:
    if not is_integer(slices):
        raise MeshError(f"slices is {slices!r}; give a whole number, 1 or more.")


def _check_slices(shape: dict[str, int], slices: Any, axis: str, found: dict[int, int]) -> None:
    if axis not in shape:
        raise MeshError(
            f"slice_axis is {axis!r}{nearest(axis, tuple(shape))}, which the mesh {shape} does not have; name the "
            "axis that crosses between slices."
        )
    if len(found) != slices or len(set(found.values())) != 1:
        raise MeshError(
            f"slices={slices}, but the devices lie on {len(found)}, as {found} (slice: devices); each of {slices} "
            "needs as many. slice_of=lambda device: ... tells which slice a device is on."
        )
    if shape[axis] % slices:
        raise MeshError(
            f"Mesh axis {axis!r} of size {shape[axis]} does not divide by {slices} slices; give a multiple of it."
        )


def _fill_in(shape: dict[str, int], devices: np.ndarray) -> dict[str, int]:
    """The sizes with -1 replaced by what the others leave of the devices."""
    num_devices = devices.size
    unknown = [axis for axis, size in shape.items() if size == -1]
    known = math.prod(size for size in shape.values() if size != -1)
    if len(unknown) > 1:
        raise MeshError(f"Mesh axes {unknown} are all -1; one at most can be what the others leave.")
    if unknown and num_devices % known:
        others = {axis: size for axis, size in shape.items() if size != -1}
        raise MeshError(
            f"Mesh axis {unknown[0]!r} is -1, but the others {others} use {known}, which do not divide "
            f"{num_devices} devices.{_how_to_fake(known, devices)}"
        )
    filled = {axis: num_devices // known if size == -1 else size for axis, size in shape.items()}
    total = math.prod(filled.values())
    if total != num_devices:
        few = total < num_devices
        hint = f" Pass devices=jax.devices()[:{total}] for a part of them." if few else _how_to_fake(total, devices)
        raise MeshError(
            f"Mesh axes {filled} use {total} devices, but {num_devices} are available; sizes must multiply "
            f"to the device count.{hint}"
        )
    return filled


def _how_to_fake(count: int, devices: np.ndarray) -> str:
    """An error's aside, where there are too few: CPU devices can be made up."""
    if count <= devices.size or target_of(devices[0]) is not None:
        return ""
    return (
        f" To try it without them: jaxpar.fake_devices({count}), before anything else uses JAX; on the command "
        f"line --fake-devices {count}."
    )
