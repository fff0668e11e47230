"""Who is told of each step: one step late, so that the devices never wait; changes with who watches a run."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxpar.agreement import noting_others
from jaxpar.profiling import Profile, Recorder
from jaxpar.progress import Show, show_steps
from jaxpar.state import named_leaves
from jaxpar.step import Step
from jaxpar.work import Meter, Work

OnStep = Callable[[int, dict[str, float]], Any]


class Watch:
    """What a run tells of its steps: the user's `on_step`, the live line, the profile."""

    def __init__(self, on_step: OnStep | None, show: Show | None, meter: Meter, recorder: Recorder):
        self._on_step, self._show, self._meter, self._recorder = on_step, show, meter, recorder
        self._late: tuple[int, Any, Work | None] | None = None
        self._treedef: Any = None
        self._names: list[str] = []

    def before(self, number: int, state: Any) -> None:
        """Is told of a step before it is given to the devices."""
        self._recorder.before(number, state)

    def after(self, number: int, state: Any, metrics: Any, batch: Any) -> None:
        """Is told of it once the devices have it: its metrics will be there a step later."""
        self._recorder.after(number, (state, metrics))
        work = None if self._show is None else self._meter.measure(state, batch)
        self._late = number, metrics, work

    def catch_up(self) -> tuple[int, dict[str, float]] | None:
        """Tells of the step before, as soon as its metrics are here, and returns them; None if all is told."""
        if self._late is None:
            return None
        number, metrics, work = self._late
        self._late = None
        leaves, treedef = jax.tree.flatten(metrics)
        if self._treedef is None or treedef != self._treedef:
            # To spell the paths takes longer than to read the values.
            self._treedef, self._names = treedef, [name for name, _ in named_leaves(metrics)]
        values = {name: float(value) for name, value in zip(self._names, leaves, strict=True)}
        self.tell(number, values, work)
        return number, values

    def forget(self) -> None:
        """Tells nothing of the step before."""
        self._late = None

    def tell(self, number: int, values: dict[str, float], work: Work | None = None) -> None:
        """Tells at once."""
        if self._show is not None:
            self._show(number, values, work)
        if self._on_step is not None:
            self._on_step(number, values)


@contextlib.contextmanager
def watching(
    train_step: Step, steps: int, on_step: OnStep | None, estimated: float | None, profile: Profile | None
) -> Iterator[Watch]:
    """Yields what is told of each step; in the end the line stays, and a profile that was begun is written."""
    recorder = Recorder(profile)
    # Of many processes' lines on one terminal none could be read.
    lines = show_steps(steps, estimated) if jax.process_index() == 0 else contextlib.nullcontext()
    with noting_others(), lines as show, contextlib.closing(recorder):
        yield Watch(on_step, show, Meter(train_step), recorder)
