"""Targets: TPU pods that aren't here, as devices to compile for; changes with the chips that libtpu knows.

The compiler for TPUs is a Python package, libtpu, and runs on any Linux machine.
"""

import difflib
import functools
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import numpy as np

_INSTALL = "pip install 'jaxpar[plan]'"


class TargetError(ValueError):
    """A target that doesn't exist or can't be compiled for: the message gives those that can."""


class Chip(NamedTuple):
    """A kind of TPU chip.

    Attributes:
      dims: how many dims its pods have.
      topologies: the shapes of its slices, by chips, as the vendor sells them.
      hbm_bytes: what a program can use of its memory, as libtpu 0.0.42 says when it refuses a larger one.
      pod_chips: the chips of a whole pod.
      options: what libtpu needs to be told beside the shape.
    """

    dims: int
    topologies: dict[int, tuple[int, ...]]
    hbm_bytes: int
    pod_chips: int
    options: dict[str, str]


_FLAT = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 192: (4, 4, 12)}
_CUBES |= {256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)}
_GIB = 2**30
_TARGETS: dict[Any, "Target"] = {}
# Topologies: https://cloud.google.com/tpu/docs/v5e, /v6e, /v4, /v5p, read 2026-11-25.
CHIPS = {
    "v4": Chip(3, _CUBES, int(30.75 * _GIB), 4096, {"chip_config_name": "megacore"}),
    "v5e": Chip(2, _FLAT, int(15.75 * _GIB), 256, {}),
    "v5p": Chip(3, _CUBES, int(95.74 * _GIB), 8960, {}),
    "v6e": Chip(2, _FLAT, int(31.25 * _GIB), 256, {}),
}


class Target(NamedTuple):
    """A pod: its chip, the shape of a slice, and how many slices.

    >>> read_target("v5e-256"), str(read_target("v5p:4x4x8", slices=2))
    (Target(chip='v5e', shape=(16, 16), slices=1), '2 x v5p:4x4x8')
    """

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        one = f"{self.chip}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"


def read_target(text: str, slices: int = 1) -> Target:
    """Returns the target that a text names: `v5e-256`, by chips in a slice, or `v5e:16x16`, by shape.

    The vendor's own `v4-N` and `v5p-N` count cores, two a chip; here it is chips for all.

    Raises:
      TargetError: the chip is unknown, or there is no such slice of it.
    """
    match = re.fullmatch(r"\s*([a-z]+[0-9]\w*?)(?:-(\d+)|:(\d+(?:x\d+)*))\s*", text) if isinstance(text, str) else None
    if not match:
        raise TargetError(f"target is {text!r}; write a chip and how many, as 'v5e-256', or a shape, as 'v5e:16x16'.")
    name, count, shape = match.groups()
    if name not in CHIPS:
        close = difflib.get_close_matches(name, CHIPS, 1, 0.5)
        near = f" (nearest: {close[0]!r})" if close else ""
        raise TargetError(f"target {text!r} has the chip {name!r}{near}; those known are {', '.join(CHIPS)}.")
    chip = CHIPS[name]
    if count:
        if int(count) not in chip.topologies:
            raise TargetError(
                f"target {text!r} asks for {count} chips in a slice; {name} comes in slices of "
                f"{', '.join(map(str, chip.topologies))}, or give a shape, as '{name}:"
                f"{'x'.join(map(str, chip.topologies[64]))}'. More chips are more slices: slices=2."
            )
        return Target(name, chip.topologies[int(count)], slices)
    dims = tuple(int(dim) for dim in shape.split("x"))
    # libtpu aborts the whole process at some shapes that don't exist.
    exists = dims in chip.topologies.values() if chip.dims == 2 else _is_cuboid(dims, chip.pod_chips)
    if len(dims) != chip.dims or not exists:
        shapes = ", ".join("x".join(map(str, dims)) for dims in chip.topologies.values())
        more = (
            ""
            if chip.dims == 2
            else f"; from 4x4x4 on every multiple of 4 up to 28 in each dim, {chip.pod_chips} chips at most"
        )
        raise TargetError(f"target {text!r} has a shape that {name} doesn't come in; it comes in {shapes}{more}.")
    return Target(name, dims, slices)


def _is_cuboid(dims: tuple[int, ...], most: int) -> bool:
    whole = len(dims) == 3 and all(dim % 4 == 0 and 4 <= dim <= 28 for dim in dims)
    return dims in _CUBES.values() or (whole and math.prod(dims) <= most)


@functools.cache
def target_devices(target: Target) -> np.ndarray:
    """Returns the devices of a target, which can be compiled for and hold nothing, in libtpu's order.

    Raises:
      TargetError: libtpu isn't installed, or refuses.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError(f"target {target} needs the TPU compiler, which runs on this machine too: {_INSTALL}.")
    # It would ask a metadata server what machine this is, and take a lock file for chips that aren't here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax
    from jax.experimental import topologies

    platforms: str = jax.config.jax_platforms or "tpu"  # pyright: ignore[reportAttributeAccessIssue]
    if "tpu" not in platforms:
        # Where no TPU will be used, libtpu complains at length that it can't tell which one this is.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{target.chip}-{np.prod(target.shape)}")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    name = f"{target.chip}:{'x'.join(map(str, target.shape))}"
    options: dict[str, Any] = dict(CHIPS[target.chip].options)
    if target.slices > 1:
        options["num_slices"] = target.slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise TargetError(
            f"libtpu can't compile for {target}: {error}; jax needs the libtpu of its own version: {_INSTALL}"
        ) from error
    _TARGETS.update(dict.fromkeys(found.devices, target))
    return np.array(found.devices, dtype=object)


def target_of(device: Any) -> Target | None:
    """Returns the target that a device is of; None for one that `target_devices` didn't make."""
    return _TARGETS.get(device)
