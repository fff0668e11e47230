"""`inspect`: what a step will do once it runs, as a report; changes with what a user must see of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxpar.ahead import CompiledProgram, compile_ahead
from jaxpar.evaluation import EvalStep
from jaxpar.inspection.bounds import Terms, Traffic, sort_traffic
from jaxpar.inspection.collectives import Collective, find_collectives
from jaxpar.inspection.declared import count_declared
from jaxpar.inspection.flops import Product, count_products
from jaxpar.inspection.hlo import read_program
from jaxpar.inspection.partials import count_partial_sums
from jaxpar.layout import LayoutRow, format_bytes
from jaxpar.mesh import BATCH_AXES, count_shards
from jaxpar.partition import axes_of
from jaxpar.state import TrainState
from jaxpar.step import Step
from jaxpar.tables import Table, align, name_axes, show, to_html
from jaxpar.targets import target_of

_ISLANDS = ("stage", "context", "expert")
_MEMORY = ("memory", "a device")
_TRAFFIC = ("sent by a device in a step", "over", "bytes", "at least", "ratio")
_COLLECTIVES = ("collective", "over", "bytes", "times", "", "from")
_PRODUCTS = ("matrix product (batch, M, K, N)", "dtype", "times", "flops", "flops/byte")


class InspectionError(TypeError):
    """What can't be inspected: the message says what can."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """What a compiled step will do: `print` it, show it in a notebook, or read its fields.

    Attributes:
      strategy: how the strategy was made, as text.
      mesh: the devices.
      param_bytes: parameters, on a device.
      optimizer_bytes: optimizer state, on a device.
      ideal_bytes: parameters and optimizer state, if every device of the mesh held an equal part.
      argument_bytes: all that a step is given, on a device.
      temp_bytes: activations and what else lives while it runs, on a device.
      peak_bytes: arguments, outputs that take no argument's place, and temporaries, on a device.
      hbm_bytes: what a device of a target has; None where the devices are here.
      rows: where each leaf of the state lies.
      collectives: every collective.
      traffic: what a device sends in a step, by axes and purpose, beside the fewest bytes that the layout allows.
      unexplained: the collectives over batch axes that no rule explains, largest first.
      products: the matrix products, costliest first.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> step = strategy.compile(lambda state, batch: (state + batch["x"].sum(), {}))
    >>> report = inspect(step, strategy.place(jax.numpy.zeros(())), {"x": jax.ShapeDtypeStruct((16,), "float32")})
    >>> [(each.kind, each.axes) for each in report.collectives], report.hbm_bytes
    ([('all-reduce', ('data',))], None)
    """

    strategy: str
    mesh: Mesh
    param_bytes: int
    optimizer_bytes: int
    ideal_bytes: int
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    hbm_bytes: int | None
    rows: tuple[LayoutRow, ...]
    collectives: tuple[Collective, ...]
    traffic: tuple[Traffic, ...]
    unexplained: tuple[Collective, ...]
    products: tuple[Product, ...]

    @property
    def left_whole(self) -> tuple[LayoutRow, ...]:
        """The leaves that a heuristic left whole, largest first, each with its reason."""
        return tuple(sorted((row for row in self.rows if row.note), key=lambda row: -row.bytes_per_device))

    @property
    def fits(self) -> bool | None:
        """Whether a device of a target holds what a step takes; None where the devices are here."""
        return None if self.hbm_bytes is None else self.peak_bytes <= self.hbm_bytes

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products in a step, over all devices."""
        return sum(one.flops for one in self.products)

    @property
    def wire_bytes(self) -> int:
        """What a device sends in a step."""
        return sum(one.bytes_a_step for one in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain numbers, strings, lists and dicts, as JSON takes them."""
        of = lambda rows: [{**row._asdict(), "array": str(row.array)} for row in rows]
        names = ("param", "optimizer", "ideal", "argument", "temp", "peak")
        return {
            "strategy": self.strategy,
            "mesh": dict(self.mesh.shape),
            **{f"{name}_bytes": getattr(self, f"{name}_bytes") for name in names},
            "hbm_bytes": self.hbm_bytes,
            "fits": self.fits,
            "left_whole": [
                {"path": row.path, "bytes": row.bytes_per_device, "why": row.note} for row in self.left_whole
            ],
            "wire_bytes": self.wire_bytes,
            "traffic": [row._asdict() for row in self.traffic],
            "collectives": of(self.collectives),
            "unexplained": of(self.unexplained),
            "flops": self.flops,
            "products": [{**row._asdict(), "flops": row.flops} for row in self.products],
        }

    def __str__(self) -> str:
        lines = [f"{self.strategy}: a step on {self.mesh.size} devices"]
        lines += align(Table(_MEMORY, self._memory_rows()))
        if self.left_whole:
            lines += ["left whole:"] + [
                f"  {row.path}  {format_bytes(row.bytes_per_device)}  {row.note}" for row in self.left_whole[:8]
            ]
        lines += ["", *align(Table(_TRAFFIC, self._traffic_rows())), *self._legend()]
        lines += ["", *align(Table(_COLLECTIVES, self._collective_rows()))]
        lines += self._ambiguous()
        lines += [f"no rule explains: {_describe(one)}" for one in self.unexplained[:8]]
        lines += ["", *align(Table(_PRODUCTS, self._product_rows()))]
        lines.append(f"{self.flops:.4g} floating-point operations in all, {self.flops / self.mesh.size:.4g} a device")
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self) -> Any:
        """Returns the report as tables for a rich console."""
        whole = [(row.path, format_bytes(row.bytes_per_device), row.note) for row in self.left_whole]
        return show(
            f"{self.strategy}: a step on {self.mesh.size} devices",
            (
                Table(_MEMORY, self._memory_rows()),
                Table(("left whole", "a device", "why"), whole),
                Table(_TRAFFIC, self._traffic_rows()),
                Table(_COLLECTIVES, self._collective_rows()),
                Table(("no rule explains",), [(_describe(one),) for one in self.unexplained[:8]]),
                Table(_PRODUCTS, self._product_rows()),
            ),
            [*self._legend(), *self._ambiguous()],
        )

    def _repr_html_(self) -> str:
        return to_html(self)

    def _ambiguous(self) -> list[str]:
        """What may send less than its text says."""
        return [
            f"ambiguous: XLA writes some gathers over {name_axes(row.axes)} as sums of parts in zeros, which send "
            f"twice as much. As written a device sends {format_bytes(row.bytes)} of {row.purpose} in a step; "
            f"{format_bytes(row.if_gathered)} if the chip gathers."
            for row in self.traffic
            if row.if_gathered < 0.99 * row.bytes
        ]

    def _legend(self) -> list[str]:
        """What the table of traffic doesn't say by itself."""
        notes = [
            "at least: the fewest bytes that the layout allows, weights gathered once or twice as the step does; "
            "-: nothing declares them"
        ]
        if any(_differ(row) for row in self.traffic):
            notes.append(
                "(in parentheses): what remains if gathers are sent in the dtype that is computed in, and of a sum "
                "only the part that is kept, as accelerators may and XLA on CPU doesn't; the ratio is theirs"
            )
        return notes if self.traffic else []

    def _memory_rows(self) -> list[tuple[str, ...]]:
        share = self.param_bytes + self.optimizer_bytes
        return [
            ("parameters", format_bytes(self.param_bytes)),
            ("optimizer state", format_bytes(self.optimizer_bytes)),
            ("both, were they split over all devices", f"{format_bytes(self.ideal_bytes)} of {format_bytes(share)}"),
            ("activations and temporaries", format_bytes(self.temp_bytes)),
            ("peak", self._describe_peak()),
        ]

    def _describe_peak(self) -> str:
        if self.hbm_bytes is None:
            return format_bytes(self.peak_bytes)
        verdict = "fits" if self.fits else "does NOT fit"
        return f"{format_bytes(self.peak_bytes)} of {format_bytes(self.hbm_bytes)}: {verdict}"

    def _traffic_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                row.purpose,
                name_axes(row.axes),
                format_bytes(row.bytes) + (f" ({format_bytes(row.logical_bytes)})" if _differ(row) else ""),
                "-" if row.bound is None else format_bytes(row.bound),
                "-" if not row.bound else f"{row.logical_bytes / row.bound:.2f}",
            )
            for row in self.traffic
        ]

    def _collective_rows(self) -> list[tuple[str, ...]]:
        grouped: dict[tuple[Any, ...], int] = {}
        for one in self.collectives:
            slow = "across slices" if one.crosses_slices else ""
            how = ", ".join(filter(None, ("asynchronous" if one.is_asynchronous else "", slow)))
            times = "unknown" if one.times is None else str(one.times)
            key = (one.kind, name_axes(one.axes), times, how, one.source or one.operation)
            grouped[key] = grouped.get(key, 0) + one.bytes_a_step
        largest = sorted(grouped.items(), key=lambda item: -item[1])[:20]
        return [(kind, axes, format_bytes(size), *rest) for (kind, axes, *rest), size in largest]

    def _product_rows(self) -> list[tuple[str, ...]]:
        return [
            (str(one.shape), one.dtype, str(one.times), f"{one.flops:.3g}", f"{one.intensity:.0f}")
            for one in self.products[:10]
        ]


def inspect(
    train_step: Step | EvalStep, state: Any, batch: Any, *, slice_of: Callable[[Any], int] | None = None
) -> Inspection:
    """Returns what a step will do: its memory, its collectives beside the fewest bytes they could move, its products.

    Compiles the step, and runs nothing: the state and the raw global batch may be arrays or shapes.

    Args:
      train_step: from `make_train_step`, `make_eval_step` or `strategy.compile`.
      state: from `strategy.init` or `strategy.abstract_state`.
      batch: as `shard_batch` takes it, or shapes.
      slice_of: tells which slice a device is on; by default what JAX knows of it.

    Raises:
      InspectionError: `train_step` is no step, or `slice_of` no function.
      AheadError: the compile for a target fails, aborts or takes too long.
      TargetError: what it needs isn't installed.
      StateError, BatchError: the state or the batch doesn't fit the step.

    >>> import jaxpar, optax
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.sgd(0.1))
    >>> step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
    >>> report = inspect(step, strategy.abstract_state(init_fn), {"x": jax.ShapeDtypeStruct((16, 64), "float32")})
    >>> [(row.purpose, row.bytes, row.bound) for row in report.traffic][0]
    ('weights and gradients', 14560, 14560)
    """
    step = step_of(train_step, "inspect")
    if slice_of is not None and not callable(slice_of):
        raise InspectionError(f"slice_of is {slice_of!r}; give a function, as lambda device: device.process_index.")
    strategy, mesh = step.strategy, step.strategy.mesh
    jaxpr = step.trace(state, batch)
    program = _compile(step, state, batch)
    states = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TrainState))
        if isinstance(node, TrainState)
    ]
    layouts = [strategy.layout(one) for one in states]
    rows = [row for layout in layouts for row in layout.rows]
    size = lambda prefix: sum(row.bytes_per_device for row in rows if row.path.startswith(prefix))
    collectives = find_collectives(read_program(program.text), mesh, slice_of=slice_of)
    is_eval = isinstance(train_step, EvalStep)
    terms = Terms(
        frozen=frozenset(row.path for row in rows if is_eval).union(*(one.static.frozen for one in states)),
        has_way_back=not is_eval,
        compute_dtype=step.compute_dtype,
        num_microbatches=step.num_microbatches,
        summed_axes=tuple(axis for layout in layouts for axis in strategy.train_axes(layout, step.num_microbatches)),
        partial_sums=_partial_sums(jaxpr, state, rows, mesh),
    )
    purposes = sort_traffic(collectives, rows, mesh, terms)
    return Inspection(
        strategy.name,
        mesh,
        size("params/"),
        size("opt_state/"),
        sum(
            row.bytes_per_device * count_shards(mesh, axes_of(row.spec))
            for row in rows
            if row.path.startswith(("params/", "opt_state/"))
        )
        // mesh.size,
        program.argument_bytes,
        program.temp_bytes,
        program.peak_bytes,
        program.hbm_bytes,
        tuple(rows),
        collectives,
        *purposes,
        count_products(jaxpr),
    )


def step_of(train_step: Any, taker: str) -> Step:
    """Returns the step itself, of a train or an eval step.

    Raises:
      InspectionError: it is none.
    """
    step = train_step.step if isinstance(train_step, EvalStep) else train_step
    if not isinstance(step, Step):
        raise InspectionError(
            f"train_step is a {type(train_step).__name__}; {taker} takes what make_train_step, make_eval_step or "
            "strategy.compile returns."
        )
    return step


def _compile(step: Step, state: Any, batch: Any) -> CompiledProgram:
    target = target_of(step.strategy.mesh.devices.flat[0])
    if target is not None:
        return compile_ahead(step, state, batch, target)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompiledProgram(compiled.as_text(), memory.argument_size_in_bytes, made, memory.temp_size_in_bytes, None)


def _partial_sums(jaxpr: Any, state: Any, rows: list[LayoutRow], mesh: Mesh) -> dict[str, int]:
    """The fewest bytes of activations: parts of sums over an axis that splits weights, and what islands send."""
    if not isinstance(state, TrainState):
        return {}
    shards = {axis: mesh.shape[axis] for axis in (*BATCH_AXES, "context") if axis in mesh.shape}
    weights = [row.spec if row.path.startswith("params/") else PartitionSpec() for row in rows]
    found = {}
    for axis in {axis for spec in weights for axis in axes_of(spec)} & {"model"}:
        split = [frozenset(dim for dim in range(len(spec)) if axis in axes_of(spec[dim : dim + 1])) for spec in weights]
        rest = [frozenset()] * (len(jaxpr.jaxpr.invars) - len(split))
        found[axis] = count_partial_sums(jaxpr, split + rest, shards, mesh.shape[axis])
    declared = {axis: count_declared(jaxpr, mesh.shape, axis) for axis in _ISLANDS if mesh.shape.get(axis, 1) > 1}
    # An island may also leave what it sends to the compiler, by constraints.
    return found | {axis: count for axis, count in declared.items() if count}


def _differ(row: Traffic) -> bool:
    """Whether a reader would see a difference."""
    return format_bytes(row.logical_bytes) != format_bytes(row.bytes)


def _describe(one: Collective) -> str:
    times = "" if one.times == 1 else f", {'an unknown number of' if one.times is None else one.times} times"
    return (
        f"{one.kind} over {name_axes(one.axes)} of {one.array.dtype}{list(one.array.dims)} at "
        f"{one.source or one.operation}, {format_bytes(one.bytes_a_step)} a step{times}"
    )
