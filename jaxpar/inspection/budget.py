"""`assert_collectives` and `assert_fits`: what a step may send and take, pinned in a test."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxpar.inspection.collectives import KINDS
from jaxpar.inspection.report import inspect
from jaxpar.integers import is_integer, is_number
from jaxpar.layout import format_bytes
from jaxpar.mesh import AXES

_NO_AXIS = "-"


def assert_collectives(
    train_step: Any,
    state: Any,
    batch: Any,
    budget: Mapping[str, int],
    *,
    slice_of: Callable[[Any], int] | None = None,
) -> None:
    """Raises AssertionError if a step sends what a budget doesn't name, or more of it, or none of what it names.

    Single numbers, as the means of metrics are, don't count.

    Args:
      train_step: the step; as state and batch, what `jaxpar.inspect` takes.
      state: arrays or shapes.
      batch: the raw global batch, arrays or shapes.
      budget: `"kind axes"` -> the most bytes that a device may send in a step, 0 for none: `{"all-reduce data": 2**20,
        "all-gather fsdp": 2**22, "all-reduce data,fsdp": 4096}`; `-` for groups that follow no axes.
      slice_of: tells which slice a device is on.

    Raises:
      AssertionError: the message gives the collective, both numbers and the model's own lines.
      ValueError: the budget names an unknown kind or axis, or gives no whole number of bytes.
      InspectionError, StateError, BatchError, AheadError: as `jaxpar.inspect`.

    >>> import jax, jaxpar, optax
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.sgd(0.1))
    >>> step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
    >>> batch = {"x": jax.ShapeDtypeStruct((16, 64), "float32")}
    >>> assert_collectives(step, strategy.abstract_state(init_fn), batch, {"all-reduce data": 14560})
    """
    budget = _read_budget(budget)
    report = inspect(train_step, state, batch, slice_of=slice_of)
    sent: dict[str, int] = {}
    sources: dict[str, list[str]] = {}
    unknown = set()
    for one in report.collectives:
        if math.prod(one.array.dims) == 1:
            continue
        name = f"{one.kind} {','.join(one.axes) or _NO_AXIS}"
        sent[name] = sent.get(name, 0) + one.bytes_a_step
        sources.setdefault(name, []).append(one.source or one.operation)
        unknown |= {name} if one.times is None else set()
    wrong = []
    for name in sorted(set(sent) | set(budget)):
        count, allowed = sent.get(name, 0), budget.get(name, 0)
        places = ", ".join(dict.fromkeys(filter(None, sources.get(name, ()))))
        if allowed and not count:
            wrong.append(f"{name}: the budget allows {format_bytes(allowed)}, but the step sends none")
        elif count > allowed:
            allows = f"allows {allowed} bytes" if name in budget else "doesn't name it"
            wrong.append(f"{name}: the step sends {count} bytes on each device, but the budget {allows}; at {places}")
        elif name in unknown:
            wrong.append(f"{name}: a loop whose trips XLA doesn't know sends {count} bytes each time; at {places}")
    if wrong:
        raise AssertionError(f"{report.strategy} doesn't keep to its collectives:\n  " + "\n  ".join(wrong))


def _read_budget(budget: Any) -> dict[str, int]:
    """The budget, its axes in the mesh's order."""
    if not isinstance(budget, Mapping):
        raise ValueError(f"The budget is {budget!r}; give a dict, as {{'all-reduce data': 2**20}}.")
    read = {}
    for name, count in budget.items():
        kind, _, axes = str(name).partition(" ")
        named = [] if axes == _NO_AXIS else [axis.strip() for axis in re.split(r",| x ", axes)]
        if kind not in KINDS or not set(named) <= set(AXES):
            raise ValueError(
                f"The budget has {name!r}; write a kind and axes, as 'all-reduce data' or 'all-gather fsdp,model'. "
                f"Kinds are {', '.join(KINDS)}; axes are {', '.join(AXES)}."
            )
        if not is_integer(count, least=0):
            raise ValueError(f"The budget has {count!r} for {name!r}; give a whole number of bytes, 0 for none.")
        read[f"{kind} {','.join(sorted(named, key=AXES.index)) or _NO_AXIS}"] = int(count)
    return read


def assert_fits(train_step: Any, state: Any, batch: Any, *, hbm_fraction: float = 0.9) -> None:
    """Raises AssertionError if a step needs more than a part of the memory of its mesh's target.

    A test says so of a pod that isn't there, with the TPU compiler (`pip install 'jaxpar[plan]'`):

        strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=256, target="v5e-256"), jaxpar.FSDP)
        batch = {"tokens": jax.ShapeDtypeStruct((256, 2048), "int32")}
        assert_fits(jaxpar.make_train_step(loss_fn, strategy), strategy.abstract_state(init_fn), batch)

    Args:
      train_step: the step, of a strategy on `make_mesh(..., target="v5e-256")`.
      state: from `strategy.abstract_state`.
      batch: the raw global batch, arrays or shapes.
      hbm_fraction: which part of a device's memory it may take; the rest is room for other programs.

    Raises:
      AssertionError: the message gives what it needs, what there is, and the largest leaves.
      ValueError: the mesh is of no target, or the fraction isn't one.
      InspectionError, StateError, BatchError, AheadError: as `jaxpar.inspect`.

    >>> import jax, jaxpar, optax
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.sgd(0.1))
    >>> step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
    >>> assert_fits(step, strategy.abstract_state(init_fn), {"x": jax.ShapeDtypeStruct((16, 64), "float32")})
    Traceback (most recent call last):
    ValueError: The mesh {'data': 8} is of devices that are here; give a target to fit, as make_mesh(fsdp=256, \
target='v5e-256').
    """
    if not is_number(hbm_fraction) or not 0 < hbm_fraction <= 1:
        raise ValueError(f"hbm_fraction is {hbm_fraction!r}; give a part of the memory, more than 0 and up to 1.")
    report = inspect(train_step, state, batch)
    if report.hbm_bytes is None:
        raise ValueError(
            f"The mesh {dict(report.mesh.shape)} is of devices that are here; give a target to fit, as "
            "make_mesh(fsdp=256, target='v5e-256')."
        )
    allowed = hbm_fraction * report.hbm_bytes
    if report.peak_bytes > allowed:
        largest = sorted(report.rows, key=lambda row: -row.bytes_per_device)[:4]
        leaves = ", ".join(f"{row.path} {format_bytes(row.bytes_per_device)}" for row in largest)
        raise AssertionError(
            f"{report.strategy} needs {format_bytes(report.peak_bytes)} on a device, but {format_bytes(allowed)} are "
            f"allowed, {hbm_fraction:g} of {format_bytes(report.hbm_bytes)}: {format_bytes(report.temp_bytes)} are "
            f"activations and temporaries, {format_bytes(report.argument_bytes)} the state and batch; its largest "
            f"leaves are {leaves}. Rematerialise layers (jax.checkpoint), use microbatches, or split more."
        )
