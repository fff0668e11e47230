"""`fit`: a thin loop over a train step, that resumes, saves, stops when asked to, and tells how it goes."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.arguments import check_alive
from jaxpar.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from jaxpar.evaluation import EvalStep, evaluate
from jaxpar.integers import is_integer, is_number
from jaxpar.lines import plain_lines, tell_resume
from jaxpar.preemption import CODE, Preemption
from jaxpar.profiling import Profile
from jaxpar.source import BatchesEnded, Source, place_of_all
from jaxpar.stacklevel import warn_caller
from jaxpar.state import TrainState, named_leaves
from jaxpar.step import Step
from jaxpar.strategy import check_takes
from jaxpar.watch import OnStep, Watch, watching

# How often to go back to one checkpoint.
_RETURNS = 3


class FitError(ValueError):
    """What `fit` can't do, or a run that went wrong: the message says what, and at which step.

    Attributes:
      gone_wrong: what a step gave that is no number, without what to do about it; empty for all else.
    """

    gone_wrong = ""


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
    profile: Profile | None = None,
    estimate: Any = None,
) -> Any:
    """Returns the state after so many steps in all, those before a restart included.

    Where `checkpoint` holds one, the run goes on from it: same state, same randomness, same batches. It saves every
    `checkpoint.every` steps, at the end, and when the process is asked to end (SIGTERM): then it leaves with code 143.
    A second SIGTERM ends it at once. On a terminal one live line tells step, loss, tokens/s, a step's time, model FLOPs
    utilisation where the chip is known, and how long it will take; elsewhere, without `on_step`, a plain line a minute
    tells step, loss and a step's time. Without `on_step` one line says from which step it goes on. Without any of this
    it is

        for batch in batches:
            state, metrics = train_step(state, strategy.shard_batch(batch))

    Args:
      train_step: from `make_train_step`.
      state: from `strategy.init` or `strategy.place`; its memory is taken over.
      batches: raw global batches, of many processes this process's rows. A function `batches(step)` is asked for those
        from a step on; an iterator with `get_state` and `set_state`, as grain's, is set back; any other is drawn from
        until the step is reached.
      steps: how many in all; a checkpoint that is further comes back as it is.
      eval_step: from `make_eval_step`, and the batches to evaluate: at each save, and at the end.
      checkpoint: where to save, and to resume from.
      on_step: `on_step(step, metrics)`, called with floats, one step late so that the devices don't wait: a logger.
        What an evaluation gives comes as `eval`, or `eval/` and its names: of a loss function `eval/loss` and so on.
      nonfinite: what to do when a loss is no number: stop, or go back to the latest checkpoint and on with the batches
        that follow, three times at most from each. To skip such updates instead, wrap the optimizer in
        `optax.apply_if_finite`, which counts them: the run goes on for as long as the parameters are numbers.
      profile: `jaxpar.Profile(directory, first, last)`, the steps to trace.
      estimate: what `jaxpar.estimate` returned, or seconds: stands beside the measured step on the live line.

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
    _check_batches_and_on_step(batches, on_step)
    options = _Options(train_step, steps, eval_step, checkpoint, nonfinite, on_step is None)
    _check_profile(profile, steps)
    estimated = _seconds_of(estimate)
    tell = plain_lines(steps) if on_step is None else on_step
    with Preemption() as preemption, watching(train_step, steps, tell, estimated, profile) as watch:
        try:
            return _Run(options, preemption, watch).go(state, batches)
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
    tells_resume: bool


class _Run:
    """One call of `fit`: what is told late, and what stops it."""

    def __init__(self, options: _Options, preemption: Preemption, watch: Watch):
        self.options, self.preemption, self.watch = options, preemption, watch
        # The step up to which all is saved, or can be made again.
        self.safe = -1
        self.returns: dict[int, int] = {}

    def go(self, state: TrainState, batches: Any) -> TrainState:
        options, put = self.options, self.options.train_step.strategy.shard_batch
        state, place = self._resume(state)
        number = int(state.step)
        source = Source(batches, place, number, options.train_step.strategy.mesh)
        place, batch = source.place(), None
        # What is here is saved, or can be made again: there is nothing to lose while the step compiles.
        self.preemption.nothing_to_lose(self.safe == number)
        while number < options.steps:
            # One is here already, but at first, and after going back from the last step.
            batch = self._draw(source, put, number, state, place) if batch is None else batch
            self.watch.before(number + 1, state)
            state, metrics = options.train_step(state, batch)
            self.preemption.nothing_to_lose(False)
            number, place = number + 1, source.place()
            failed = self._tell_late(state)
            self.watch.after(number, state, metrics, batch)
            batch = None
            if number < options.steps and failed is None:
                # While the devices are at work.
                batch = self._draw(source, put, number, state, place)
            stop = self.preemption.asked()
            if failed is None and (stop or number == options.steps or self._is_due(number)):
                failed = self._tell_late(state)
                if failed is None:
                    self._pause(state, number, place, stop)
            if failed is not None:
                state = self._go_back(state, failed)
                number = int(state.step)
        return state

    def _resume(self, state: TrainState) -> tuple[TrainState, Any]:
        """The state to begin with, and the place in the data that was saved with it; None where nothing was."""
        checkpoint, number = self.options.checkpoint, int(state.step)
        latest = None if checkpoint is None else checkpoint.latest()
        if checkpoint is None or latest is None:
            self.safe = 0
            return state, None
        if number > latest:
            raise FitError(
                f"The state is at step {number}, but {checkpoint.directory} ends at {latest}: it would "
                "be lost. Save it there with checkpoint.save(state, force=True), or give another folder."
            )
        state, place = self._restore(state, checkpoint)
        self.safe = int(state.step)
        if self.options.tells_resume:
            tell_resume(self.safe, checkpoint.directory)
        return state, place

    def _restore(self, state: TrainState, checkpoint: Checkpoints) -> tuple[TrainState, Any]:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        # Both would not always fit.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        restored = checkpoint.restore(like)
        return restored.state, restored.data

    def _draw(self, source: Source, put: Callable[[Any], Any], number: int, state: TrainState, place: Any) -> Any:
        try:
            return put(source.draw(number + 1 < self.options.steps))
        except BatchesEnded as ended:
            failed, checkpoint = self._tell_late(state), self.options.checkpoint
            if failed is not None:
                raise FitError(
                    f"{_told_of_nan(failed)} {_told_of_end(ended, number, self.options.steps)}"
                ) from ended.error
            if checkpoint is not None:
                with _warned():
                    checkpoint.wait()
                if checkpoint.latest() != number:
                    self._save(state, number, place)
            raise FitError(_told_of_end(ended, number, self.options.steps)) from ended.error

    def _tell_late(self, state: TrainState) -> tuple[int, dict[str, float]] | None:
        """Tells of the step before, now that its metrics are here; returns it if it is no number and wasn't skipped."""
        told = self.watch.catch_up()
        if told is None or all(math.isfinite(told[1][name]) for name in ("loss", "grad_norm") if name in told[1]):
            return None
        return None if _is_skipped(told[1], state) else told

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
            values = {f"eval/{name}" if name else "eval": float(value) for name, value in _named(found)}
            self.watch.tell(number, values)

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
            self.options.checkpoint.save(state, step=number, data=place_of_all(place), force=True)
            if self.preemption.asked() or number == self.options.steps:
                self.options.checkpoint.wait()
        return not failed

    def _go_back(self, state: TrainState, failed: tuple[int, dict[str, float]]) -> TrainState:
        told, checkpoint = _told_of_nan(failed), self.options.checkpoint
        if self.options.nonfinite != "roll back" or checkpoint is None:
            raise _diverged(
                told,
                "Try a lower learning rate, clip gradients, wrap the optimizer in optax.apply_if_finite to skip such "
                "steps, or nonfinite='roll back' with a checkpoint.",
            )
        with _warned():
            checkpoint.wait()
        if checkpoint.latest() is None:
            raise FitError(
                f"{told} There is no checkpoint to go back to: none was saved before it. Save more often, by every=."
            )
        self.watch.forget()
        state, _ = self._restore(state, checkpoint)
        reached = int(state.step)
        self.returns[reached] = self.returns.get(reached, 0) + 1
        if self.returns[reached] > _RETURNS:
            raise _diverged(
                f"{told} The run went back to step {reached} {_RETURNS} times: other batches don't help.",
                "Try a lower learning rate, or clip gradients.",
            )
        told = f"{told} The run goes on from step {reached}, with the batches that follow."
        warn_caller(told, CheckpointWarning)
        return state


def _named(found: Any) -> list[tuple[str, Any]]:
    """Each value with its name; what a loss function gives has the names that a train step gives it."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict) and np.ndim(found[0]) == 0:
        found = {"loss": found[0], **found[1]}
    return named_leaves(found)


def _is_skipped(values: dict[str, float], state: TrainState) -> bool:
    """Whether a step that is no number changed nothing: under float16's scale, or `optax.apply_if_finite`.

    The latter lets such updates through after as many as it was told.
    """
    if values.get("skipped") == 1 and math.isfinite(values["loss"]):
        return True
    counts = any(path.endswith("total_notfinite") for path, _ in named_leaves(state.opt_state))
    return counts and bool(_all_finite(state.params))


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def _diverged(told: str, advice: str) -> FitError:
    error = FitError(f"{told} {advice}")
    error.gone_wrong = told
    return error


def _told_of_nan(failed: tuple[int, dict[str, float]]) -> str:
    number, values = failed
    told = ", ".join(f"{name} {values[name]}" for name in ("loss", "grad_norm") if name in values)
    return f"Step {number} gave {told}."


def _told_of_end(ended: BatchesEnded, number: int, steps: int) -> str:
    if not ended.processes:
        return (
            f"The batches ended after step {number}, but steps={steps}; give more, as a function batches(step) that "
            "never ends, or fewer steps."
        )
    why = f" Here they failed, with {type(ended.error).__name__}: {ended.error}." if ended.error is not None else ""
    lacking = ", ".join(map(str, ended.processes))
    return (
        f"Process {lacking} of {jax.process_count()} has no batch after step {number}, but "
        f"steps={steps}: all stop.{why} Give each process as many, as jaxpar.data.load does, or fewer steps."
    )


@contextlib.contextmanager
def _warned() -> Iterator[list[CheckpointError]]:
    """Yields a list that holds the error if what is saved inside of it can't be, which is told, and no more."""
    failed: list[CheckpointError] = []
    try:
        yield failed
    except CheckpointError as error:
        failed.append(error)
        warn_caller(f"{error} The run goes on; the checkpoints before are as they were.", CheckpointWarning)


def _check(train_step: Any, state: Any, steps: Any, eval_step: Any, checkpoint: Any, nonfinite: Any) -> None:
    if not isinstance(train_step, Step):
        raise FitError(f"train_step is a {type(train_step).__name__}; give what jaxpar.make_train_step returns.")
    if not isinstance(state, TrainState) or not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)):
        raise FitError(f"state is a {type(state).__name__}; give a TrainState on devices, as strategy.init returns.")
    check_alive(state, is_donated=True)
    if not is_integer(steps, least=0):
        raise FitError(f"steps is {steps!r}; give a whole number, 0 or more: how many in all.")
    if eval_step is not None and not (
        isinstance(eval_step, tuple) and len(eval_step) == 2 and isinstance(eval_step[0], EvalStep)
    ):
        raise FitError(f"eval_step is a {type(eval_step).__name__}; give a tuple, (an eval step, its batches).")
    if eval_step is not None and isinstance(eval_step[1], Iterator):
        raise FitError("eval_step's batches are an iterator, which is empty after one evaluation; give a list.")
    if checkpoint is not None and not isinstance(checkpoint, Checkpoints):
        raise FitError(f"checkpoint is a {type(checkpoint).__name__}; give jaxpar.Checkpoints(directory, every=100).")
    if nonfinite not in ("stop", "roll back"):
        raise FitError(f"nonfinite is {nonfinite!r}; give 'stop' or 'roll back'.")
    if nonfinite == "roll back" and checkpoint is None:
        raise FitError("nonfinite is 'roll back', but there is nothing to go back to; give checkpoint=, or 'stop'.")


def _check_batches_and_on_step(batches: Any, on_step: Any) -> None:
    """Raises FitError unless batches can come in, and steps be told."""
    if on_step is not None and not callable(on_step):
        raise FitError(f"on_step is {on_step!r}; give a function on_step(step, metrics), or None for a live line.")
    for fn, name, arguments in ((on_step, "on_step", ("step", "metrics")), (batches, "batches", ("step",))):
        if callable(fn):
            check_takes(fn, name, *arguments, kind=FitError)
    if isinstance(batches, Mapping) or not (callable(batches) or isinstance(batches, Iterable)):
        raise FitError(
            f"batches is a {type(batches).__name__}; give an iterable of batches, as [batch], or a function "
            "batches(step) of those from a step on."
        )


def _check_profile(profile: Any, steps: int) -> None:
    """Raises FitError unless the steps are some of the run's, and the folder is there."""
    if profile is None:
        return
    if not isinstance(profile, Profile):
        raise FitError(f"profile is {profile!r}; give jaxpar.Profile(directory, first, last).")
    ends = profile.first, profile.last
    if not all(map(is_integer, ends)) or not profile.first <= profile.last <= steps:
        raise FitError(
            f"profile is of the steps {profile.first!r} to {profile.last!r}, but the run's are 1 to {steps}; give two "
            "of these, the smaller first."
        )
    try:
        pathlib.Path(profile.directory).mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:
        raise FitError(
            f"The profile's folder {str(profile.directory)!r} can't be made: {error}; give another."
        ) from error


def _seconds_of(estimate: Any) -> float | None:
    seconds = getattr(estimate, "seconds", estimate)
    if seconds is not None and not (is_number(seconds) and seconds > 0):
        raise FitError(f"estimate is {estimate!r}; give a step's seconds, above 0, or what jaxpar.estimate returned.")
    return seconds if seconds is None else float(seconds)
