"""`estimate`: how long a step on a pod will take and what it costs, as a report; changes with what a user must see."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from jaxpar.ahead import SECONDS, compile_ahead
from jaxpar.estimation.chips import Figure, rates_of, read_figures
from jaxpar.estimation.links import Use
from jaxpar.estimation.timeline import (
    KERNEL,
    MATH,
    MEMORY,
    PACE,
    Machine,
    Spent,
    Wait,
    as_gathered,
    as_written,
    torus_of,
    walk,
)
from jaxpar.inspection.flops import count_kernels, count_products
from jaxpar.inspection.hlo import read_program
from jaxpar.inspection.report import step_of
from jaxpar.integers import is_integer, is_number
from jaxpar.layout import format_bytes
from jaxpar.tables import Table, align, name_axes, show, to_html
from jaxpar.targets import Target, target_of
from jaxpar.tokens import count_tokens

_LINKS = {"ICI": "the links between chips (ICI)", "DCN": "the network between slices (DCN)", PACE: "the slowest slice"}


class EstimationError(ValueError):
    """What can't be estimated: the message says what can."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """What a step on a target will take: `print` it, show it in a notebook, or read its fields.

    Attributes:
      strategy: how the strategy was made, as text.
      target: the pod.
      mesh: its devices.
      seconds: a step's time.
      fastest: the same where every part reaches the most that its kind is known to.
      slowest: where every part reaches the least.
      if_gathered: the same as `seconds`, if what XLA writes as a sum of parts in zeros runs as the gather that it is.
      tokens: in a batch: of its rows' whole numbers; or rows, where it holds none.
      unit: `tokens` or `rows`.
      model_flops: floating-point operations that the model needs in a step, over all chips, recomputed ones left out.
      peak_bytes: what a step takes on a chip.
      hbm_bytes: what a chip has.
      busy: seconds in which the chip computes, by what binds them: `math`, `HBM` or `kernels`.
      waits: seconds in which it waits for others, by mesh axes and link.
      sent: seconds in which those links carry something, hidden behind work or not.
      price: of a chip, in dollars an hour.
      unknown_loops: loops whose trips the compiler doesn't tell, each counted once.
      windows: seconds in which rings that XLA makes of a product and its collective wait for their permutes.
      unknown_kernels: calls of Pallas kernels whose operations aren't known.
    """

    strategy: str
    target: Target
    mesh: Mesh
    seconds: float
    fastest: float
    slowest: float
    if_gathered: float
    tokens: int
    unit: str
    model_flops: int
    peak_bytes: int
    hbm_bytes: int
    busy: Mapping[str, float]
    waits: Mapping[Wait, float]
    sent: Mapping[Wait, float]
    price: Figure
    unknown_loops: int
    windows: float
    unknown_kernels: float

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds what the compiler says that a step takes."""
        return self.peak_bytes <= self.hbm_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of all chips together."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the model's operations, as a part of the peak's in a step's time."""
        return self.model_flops / (self.seconds * self.mesh.size * read_figures()[self.target.chip]["peak_flops"].value)

    @property
    def dollars_an_hour(self) -> float:
        """Of all chips together."""
        return self.price.value * self.mesh.size

    @property
    def dollars_a_billion(self) -> float:
        """For a billion tokens, or rows."""
        return self.dollars_an_hour / 3600 * self.seconds / self.tokens * 1e9

    @property
    def bound(self) -> str:
        """What takes the most of a step's time, and so would have to be faster first."""
        parts = {"math (the matrix units)": self.busy.get(MATH, 0.0) + self.busy.get(KERNEL, 0.0)}
        parts["memory (HBM)"] = self.busy.get(MEMORY, 0.0)
        parts |= {f"{_LINKS[wait.link]} over {name_axes(wait.axes)}": spent for wait, spent in self.waits.items()}
        return max(parts, key=lambda name: parts[name])

    def parts(self) -> dict[str, float]:
        """Returns where a step's seconds go, by name, the largest first; they add up to all of it."""
        names = {MATH: "matrix products", KERNEL: "Pallas kernels", MEMORY: "memory (HBM)"}
        parts = {names[name]: spent for name, spent in self.busy.items()}
        parts |= {
            f"waiting for {_LINKS[wait.link]}, {name_axes(wait.axes)}": spent for wait, spent in self.waits.items()
        }
        return {name: spent for name, spent in sorted(parts.items(), key=lambda item: -item[1]) if spent}

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain numbers, strings, lists and dicts, as JSON takes them."""
        links = [
            {
                "axes": list(wait.axes),
                "link": wait.link,
                "exposed_seconds": self.waits.get(wait, 0.0),
                "seconds": self.sent.get(wait, self.waits.get(wait, 0.0)),
            }
            for wait in self._links()
        ]
        return {
            "strategy": self.strategy,
            "target": str(self.target),
            "mesh": dict(self.mesh.shape),
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "hbm_bytes": self.hbm_bytes,
            "seconds": self.seconds,
            "fastest": self.fastest,
            "slowest": self.slowest,
            "if_gathered": self.if_gathered,
            self.unit: self.tokens,
            f"{self.unit}_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "bound": self.bound,
            "busy": dict(self.busy),
            "windows": self.windows,
            "links": links,
            "dollars_an_hour": self.dollars_an_hour,
            f"dollars_a_billion_{self.unit}": self.dollars_a_billion,
            "price": {"dollars_an_hour": self.price.value, "source": self.price.source, "read": str(self.price.read)},
        }

    def __str__(self) -> str:
        lines = [f"{self.strategy}: a step on {self.target}, {self.mesh.size} chips"]
        lines += align(Table(("", "estimate"), self._rows()))
        lines += ["", *align(Table(("where the time goes", "seconds", "part"), self._time_rows()))]
        if self._links():
            lines += ["", *align(Table(("sent over", "link", "seconds", "not hidden"), self._link_rows()))]
        return "\n".join([*lines, "", *self._notes()])

    __repr__ = __str__

    def __rich__(self) -> Any:
        """Returns the report as tables for a rich console."""
        return show(
            f"{self.strategy}: a step on {self.target}, {self.mesh.size} chips",
            (
                Table(("", "estimate"), self._rows()),
                Table(("where the time goes", "seconds", "part"), self._time_rows()),
                Table(("sent over", "link", "seconds", "not hidden"), self._link_rows()),
            ),
            self._notes(),
        )

    def _repr_html_(self) -> str:
        return to_html(self)

    def _links(self) -> list[Wait]:
        return sorted({*self.waits, *self.sent}, key=lambda wait: -self.sent.get(wait, self.waits.get(wait, 0.0)))

    def _rows(self) -> list[tuple[str, ...]]:
        verdict = "fits" if self.fits else "does NOT fit"
        return [
            ("memory", f"{format_bytes(self.peak_bytes)} of {format_bytes(self.hbm_bytes)} a chip: {verdict}"),
            ("step", f"{_time(self.seconds)}, from {_time(self.fastest)} to {_time(self.slowest)}"),
            (f"{self.unit} a second", f"{self.tokens_per_second:,.0f} ({self.tokens:,} a step)"),
            ("model FLOPs utilisation", f"{self.mfu:.1%}"),
            ("bound by", self.bound),
            ("dollars an hour", f"{self.dollars_an_hour:,.2f}"),
            (f"dollars a billion {self.unit}", f"{self.dollars_a_billion:,.2f}"),
        ]

    def _time_rows(self) -> list[tuple[str, ...]]:
        return [(name, _time(spent), f"{spent / self.seconds:.1%}") for name, spent in self.parts().items()]

    def _link_rows(self) -> list[tuple[str, ...]]:
        return [
            (name_axes(wait.axes), wait.link, _time(self.sent[wait]), _time(self.waits.get(wait, 0.0)))
            for wait in self._links()
            if wait in self.sent
        ]

    def _notes(self) -> list[str]:
        read = f", read {self.price.read}" if self.price.read else ""
        notes = [
            f"Price: {self.price.value:.2f} dollars a chip and hour, {self.price.source}{read}.",
            "Range: what matrix units, memory, kernels and links are known to reach, all at most or all at least.",
        ]
        if self.if_gathered < 0.99 * self.seconds:
            notes.append(
                "Ambiguous: XLA writes some gathers as sums of parts in zeros, which send twice as much. As written a "
                f"step takes {_time(self.seconds)}; {_time(self.if_gathered)} if the chip gathers."
            )
        if self.windows > 0.02 * self.seconds:
            notes.append(
                f"For {_time(self.windows)} a step waits for parts that XLA passes round in rings, in step with "
                "products (windowed einsum); whole collectives may be faster, by compiler_options="
                "{'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}."
            )
        if self.unknown_kernels:
            notes.append(
                f"{self.unknown_kernels:g} calls of kernels whose operations are unknown count as memory alone."
            )
        if self.mfu > 1:
            notes.append("More than all of the peak is used: operations are missing, in kernels or small convolutions.")
        if self.unknown_loops:
            notes.append(f"{self.unknown_loops} loops run an unknown number of times, and were counted once.")
        return notes


def estimate(
    train_step: Any,
    state: Any,
    batch: Any,
    *,
    tokens: int | None = None,
    dollars_an_hour: float | None = None,
    seconds: float = SECONDS,
) -> Estimate:
    """Returns how long a step on its mesh's target will take, what it waits for, whether it fits, and what it costs.

    The step that would run is compiled by the TPU compiler, as far as its schedule, and the schedule is walked through;
    nothing is run. Its sources of figures are in `jaxpar/estimation/chips.toml`.

    Args:
      train_step: from `make_train_step`, `make_eval_step` or `strategy.compile`, on `make_mesh(..., target="v5e-256")`.
      state: from `strategy.abstract_state`.
      batch: the raw global batch, arrays or shapes.
      tokens: how many a batch holds; by default the places of its largest leaf of whole numbers with two dims.
      dollars_an_hour: what a chip costs; by default the list price.
      seconds: how long the compile may take.

    Raises:
      EstimationError: the mesh is of no target, or a number can't be.
      InspectionError: `train_step` is no step.
      AheadError: the compile fails, aborts or takes too long. A program too large for the memory is none of these.
      TargetError: what the compile needs isn't installed.
      StateError, BatchError: the state or the batch doesn't fit the step.

    >>> import jaxpar, numpy as np
    >>> step = jaxpar.sharded(jaxpar.make_mesh(data=8)).compile(lambda state, batch: (state, batch))
    >>> estimate(step, np.ones(8), {"x": np.ones(8)})
    Traceback (most recent call last):
    jaxpar.estimation.report.EstimationError: The mesh {'data': 8} is of devices that are here, whose time can be \
measured; give a target, as make_mesh(data=8, target='v5e-8').
    """
    step = step_of(train_step, "estimate")
    strategy, mesh = step.strategy, step.strategy.mesh
    target = target_of(mesh.devices.flat[0])
    if target is None:
        raise EstimationError(
            f"The mesh {dict(mesh.shape)} is of devices that are here, whose time can be measured; give a target, as "
            f"make_mesh({', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}, target='v5e-{mesh.size}')."
        )
    if tokens is not None and not is_integer(tokens):
        raise EstimationError(f"tokens is {tokens!r}; give a whole number, 1 or more.")
    count, unit = count_tokens(batch) if tokens is None else (tokens, "tokens")
    _positive("seconds", seconds)
    listed = read_figures()[target.chip]["dollars_an_hour"]
    given = None if dollars_an_hour is None else _positive("dollars_an_hour", dollars_an_hour)
    price = listed if given is None else Figure(given, "as given", None)
    jaxpr = step.trace(state, batch)
    program = compile_ahead(step, state, batch, target, seconds=seconds)
    read, kernels = read_program(program.text), count_kernels(jaxpr)

    def spend(case: str, of_parts: Callable[[Use], Use]) -> Spent:
        return walk(read, Machine(mesh, torus_of(mesh, target.shape, rates_of(target.chip, case)), kernels, of_parts))

    expected = spend("expected", as_written)
    if not (expected.seconds and count):
        raise EstimationError(
            f"The step takes {expected.seconds} s for {count} {unit}: there is nothing to divide by; give a step that "
            "computes, and a batch that has rows."
        )
    return Estimate(
        strategy=strategy.name,
        target=target,
        mesh=mesh,
        seconds=expected.seconds,
        fastest=spend("most", as_gathered).seconds,
        slowest=spend("least", as_written).seconds,
        if_gathered=spend("expected", as_gathered).seconds,
        tokens=int(count),
        unit=unit,
        model_flops=sum(one.model_flops for one in count_products(jaxpr)),
        peak_bytes=program.peak_bytes,
        hbm_bytes=program.hbm_bytes or 0,
        busy=expected.busy,
        waits=expected.waits,
        sent=expected.sent,
        price=price,
        unknown_loops=expected.unknown_loops,
        windows=expected.windows,
        unknown_kernels=expected.unknown_kernels,
    )


def _positive(name: str, number: Any) -> float:
    if not is_number(number) or number <= 0:
        raise EstimationError(f"{name} is {number!r}; give a number above 0.")
    return float(number)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
