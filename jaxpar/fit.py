"""`fit`: a thin loop over a train step, that resumes, saves, stops when asked to, and tells how it goes."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxpar.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from jaxpar.evaluation import EvalStep, evaluate
from jaxpar.preemption import CODE, Preemption
from jaxpar.progress import show_steps
from jaxpar.state import TrainState, named_leaves
from jaxpar.step import Step

# How often to go back to one checkpoint.
_RETURNS = 3
OnStep = Callable[[int, dict[str, float]], Any]


class FitError(ValueError):
    """What `fit` can't do, or a run that went wrong: the message says what, and at which step."""


def fit(
    train_step: Step,
    state: Any,
    batches: Any,
    *,
    steps: int,
    eval_step: tuple[EvalStep, Iterable[Any]] | None = None,
    checkpoint: Checkpoints | None = None,
    on_step: OnStep | None = None,
    nonfinite: Literal["stop", "roll back"] = "stop",
) -> Any:
    """Returns the state after so many steps in all, those before a restart included.

    Where `checkpoint` holds one, the run goes on from it: same state, same randomness, same batches. It saves every
    `checkpoint.every` steps, at the end, and when the process is asked to end (SIGTERM): then it leaves with code 143.
    A second SIGTERM ends it at once. Without any of this it is

        for batch in batches:
            state, metrics = train_step(state, strategy.shard_batch(batch))

    Args:
      train_step: from `make_train_step`.
      state: from `strategy.init` or `strategy.place`; its memory is taken over.
      batches: raw global batches, of many processes this process's rows. A function `batches(step)` is asked for those
        from a step on; an iterator with `get_state` and `set_state`, as grain's, is set back; any other is drawn from
        until the step is reached.
      steps: how many in all.
      eval_step: from `make_eval_step`, and the batches to evaluate: at each save, and at the end.
      checkpoint: where to save, and to resume from.
      on_step: `on_step(step, metrics)`, called with floats, one step late so that the devices don't wait: a logger.
        What an evaluation gives comes as `eval`, or `eval/` and its names. By default a live line on a terminal.
      nonfinite: what to do when a loss is no number: stop, or go back to the latest checkpoint and on with the batches
        that follow. To skip such updates instead, wrap the optimizer in `optax.apply_if_finite`.

    Raises:
      FitError: the loss is no number, the batches end too early, or an argument can't be.
      CheckpointError: the checkpoint isn't of this state; a save that fails only warns, and the run goes on.
      SystemExit: with code 143, once the state is saved after a SIGTERM.

    >>> import itertools, jaxpar, optax
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(4, 1, rngs=nnx.Rngs(rng)), optax.sgd(0.1))
    >>> step = jaxpar.make_train_step(lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {}), strategy)
    >>> state = strategy.init(init_fn, jax.random.key(0))
    >>> state = fit(step, state, lambda step: itertools.repeat({"x": np.ones((8, 4), "f4")}), steps=3)
    >>> int(state.step)
    3
    """
    _check(train_step, state, steps, eval_step, checkpoint, nonfinite)
    options = _Options(train_step, steps, eval_step, checkpoint, nonfinite)
    with Preemption() as preemption, contextlib.ExitStack() as stack:
        tell = stack.enter_context(show_steps(steps)) if on_step is None else on_step
        try:
            return _Run(options, preemption, tell).go(state, batches)
        finally:
            # Whatever ends the run, what is being saved gets there.
            if checkpoint is not None:
                with _warned():
                    checkpoint.wait()


class _Options(NamedTuple):
    train_step: Step
    steps: int
    eval_step: tuple[EvalStep, Iterable[Any]] | None
    checkpoint: Checkpoints | None
    nonfinite: str


class _Run:
    """One call of `fit`: what is told late, and what stops it."""

    def __init__(self, options: _Options, preemption: Preemption, tell: OnStep):
        self.options, self.preemption, self.tell = options, preemption, tell
        self.late: tuple[int, Any] | None = None
        # The step up to which all is saved, or can be made again.
        self.safe = -1
        self.returns: dict[int, int] = {}

    def go(self, state: TrainState, batches: Any) -> TrainState:
        options, put = self.options, self.options.train_step.strategy.shard_batch
        state, place = self._resume(state)
        number = int(state.step)
        source = _Source(batches, place, number)
        place, batch = source.place(), None
        # What is here is saved, or can be made again: there is nothing to lose while the step compiles.
        self.preemption.nothing_to_lose(self.safe == number)
        while number < options.steps:
            # One is here already, but at first, and after going back from the last step.
            batch = self._draw(source, put, number, state, place) if batch is None else batch
            state, metrics = options.train_step(state, batch)
            self.preemption.nothing_to_lose(False)
            number, place, batch = number + 1, source.place(), None
            failed = self._tell_late()
            self.late = number, metrics
            if number < options.steps and failed is None:
                # While the devices are at work.
                batch = self._draw(source, put, number, state, place)
            stop = self.preemption.asked()
            if failed is None and (stop or number == options.steps or self._is_due(number)):
                failed = self._tell_late()
                if failed is None:
                    self._pause(state, number, place, stop)
            if failed is not None:
                state = self._go_back(state, failed)
                number = int(state.step)
        return state

    def _resume(self, state: TrainState) -> tuple[TrainState, Any]:
        """The state to begin with, and the place in the data that was saved with it; None where nothing was."""
        checkpoint, number = self.options.checkpoint, int(state.step)
        if checkpoint is None or not checkpoint.any():
            self.safe = 0
            return state, None
        if number and number > max(checkpoint.steps, default=number):
            raise FitError(
                f"The state is at step {number}, but {checkpoint.directory} ends at {checkpoint.steps[-1]}: it would "
                "be lost. Save it there with checkpoint.save(state, force=True), or give another folder."
            )
        state, place = self._restore(state, checkpoint)
        self.safe = int(state.step)
        return state, place

    def _restore(self, state: TrainState, checkpoint: Checkpoints) -> tuple[TrainState, Any]:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        # Both would not always fit.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        restored = checkpoint.restore(like)
        return restored.state, restored.data

    def _draw(self, source: "_Source", put: Callable[[Any], Any], number: int, state: TrainState, place: Any) -> Any:
        try:
            return put(source.draw())
        except StopIteration:
            failed = self._tell_late()
            if failed is not None:
                self._go_back(state, failed)
            if self.options.checkpoint is not None and number not in self.options.checkpoint.steps:
                self._save(state, number, place)
            raise FitError(
                f"The batches ended after step {number}, but steps={self.options.steps}; give more, as a function "
                "batches(step) that never ends, or fewer steps."
            ) from None

    def _tell_late(self) -> tuple[int, dict[str, float]] | None:
        """Tells the listeners of the step before, now that its metrics are here; returns it if it is no number."""
        if self.late is None:
            return None
        number, metrics = self.late
        self.late = None
        values = {name: float(value) for name, value in _flatten(metrics).items()}
        self.tell(number, values)
        is_number = all(math.isfinite(values[name]) for name in ("loss", "grad_norm") if name in values)
        return None if is_number else (number, values)

    def _is_due(self, number: int) -> bool:
        return self.options.checkpoint is not None and number % self.options.checkpoint.every == 0

    def _pause(self, state: TrainState, number: int, place: Any, stop: bool) -> None:
        """Saves, and evaluates; leaves the process if it is asked to."""
        is_safe = self._save(state, number, place)
        if stop:
            raise SystemExit(CODE if is_safe else 1)
        if self.options.eval_step is not None:
            step, batches = self.options.eval_step
            if self.options.checkpoint is not None:
                with _warned() as failed:
                    self.options.checkpoint.wait()
                self.preemption.nothing_to_lose(is_safe and not failed)
            found = evaluate(step, state, batches)
            self.preemption.nothing_to_lose(False)
            values = {f"eval/{name}" if name else "eval": float(value) for name, value in _flatten(found).items()}
            self.tell(number, values)

    def _save(self, state: TrainState, number: int, place: Any) -> bool:
        """Saves, and in the end or before the process leaves waits for it; returns whether it is done, or begun.

        A failure is told, and the run goes on. Without a folder there is nothing to save.
        """
        if self.options.checkpoint is None:
            return True
        with _warned():
            # One that failed since must not keep this one from being made.
            self.options.checkpoint.wait()
        with _warned() as failed:
            self.options.checkpoint.save(state, step=number, data=place, force=True)
            if self.preemption.asked() or number == self.options.steps:
                self.options.checkpoint.wait()
        return not failed

    def _go_back(self, state: TrainState, failed: tuple[int, dict[str, float]]) -> TrainState:
        number, values = failed
        told = ", ".join(f"{name} {values[name]}" for name in ("loss", "grad_norm") if name in values)
        checkpoint = self.options.checkpoint
        if self.options.nonfinite != "roll back" or checkpoint is None:
            raise FitError(
                f"Step {number} gave {told}; try a lower learning rate, clip gradients, wrap the optimizer in "
                "optax.apply_if_finite to skip such steps, or nonfinite='roll back'."
            )
        checkpoint.wait()
        if not checkpoint.any():
            raise FitError(f"Step {number} gave {told}, and there is no checkpoint to go back to.")
        self.late = None
        state, _ = self._restore(state, checkpoint)
        reached = int(state.step)
        self.returns[reached] = self.returns.get(reached, 0) + 1
        if self.returns[reached] > _RETURNS:
            raise FitError(
                f"Step {number} gave {told}, after going back to step {reached} {_RETURNS} times: other batches don't "
                "help. Try a lower learning rate, or clip gradients."
            )
        warnings.warn(
            f"Step {number} gave {told}: the run goes on from step {reached}, with the batches that follow.",
            CheckpointWarning,
            stacklevel=4,
        )
        return state


class _Source:
    """Where batches come from, and how far they have been drawn."""

    def __init__(self, batches: Any, place: Any, number: int):
        is_saved = isinstance(place, dict)
        place = place if is_saved else {}
        self._drawn: int = place.get("drawn", number)
        is_stateful = hasattr(batches, "get_state") and hasattr(batches, "set_state")
        is_function = callable(batches) and not is_stateful
        given: Any = batches(self._drawn) if is_function else batches
        self._iterator: Any = iter(given)
        if is_function:
            return
        if is_stateful and "iterator" in place:
            batches.set_state(_decode(place["iterator"]))
        elif is_saved or self._iterator is not batches:
            # From the beginning; but an iterator of this run's own is where it is.
            next(itertools.islice(self._iterator, self._drawn, self._drawn), None)

    def place(self) -> dict[str, Any]:
        """Where to go on from: what was drawn last has been used."""
        state = getattr(self._iterator, "get_state", None)
        return {"drawn": self._drawn, **({"iterator": _encode(state())} if state is not None else {})}

    def draw(self) -> Any:
        """The next batch; raises StopIteration where there is none."""
        batch = next(self._iterator)
        self._drawn += 1
        return batch


def _encode(state: Any) -> Any:
    return {"bytes": state.hex()} if isinstance(state, bytes) else state


def _decode(state: Any) -> Any:
    return bytes.fromhex(state["bytes"]) if isinstance(state, dict) and set(state) == {"bytes"} else state


def _flatten(metrics: Any) -> dict[str, Any]:
    return dict(named_leaves(metrics))


@contextlib.contextmanager
def _warned() -> Iterator[list[CheckpointError]]:
    """Yields a list that holds the error if what is saved inside of it can't be, which is told, and no more."""
    failed: list[CheckpointError] = []
    try:
        yield failed
    except CheckpointError as error:
        failed.append(error)
        warnings.warn(
            f"{error} The run goes on; the checkpoints before are as they were.", CheckpointWarning, stacklevel=5
        )


def _check(train_step: Any, state: Any, steps: Any, eval_step: Any, checkpoint: Any, nonfinite: Any) -> None:
    if not isinstance(train_step, Step):
        raise FitError(f"train_step is a {type(train_step).__name__}; give what jaxpar.make_train_step returns.")
    if not isinstance(state, TrainState) or not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)):
        raise FitError(f"state is a {type(state).__name__}; give a TrainState on devices, as strategy.init returns.")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise FitError(f"steps is {steps!r}; give a whole number, 0 or more: how many in all.")
    if eval_step is not None and not (
        isinstance(eval_step, tuple) and len(eval_step) == 2 and isinstance(eval_step[0], EvalStep)
    ):
        raise FitError(f"eval_step is {eval_step!r}; give a pair: what make_eval_step returns, and its batches.")
    if eval_step is not None and isinstance(eval_step[1], Iterator):
        raise FitError("eval_step's batches are an iterator, which is empty after one evaluation; give a list.")
    if checkpoint is not None and not isinstance(checkpoint, Checkpoints):
        raise FitError(f"checkpoint is a {type(checkpoint).__name__}; give jaxpar.Checkpoints(directory, every=100).")
    if nonfinite not in ("stop", "roll back"):
        raise FitError(f"nonfinite is {nonfinite!r}; give 'stop' or 'roll back'.")
