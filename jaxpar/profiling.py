"""A trace of some steps of a run, by JAX's own profiler; changes with that."""

import pathlib
from typing import Any, NamedTuple

import jax


class Profile(NamedTuple):
    """Which steps of a run to trace, and where to: `tensorboard --logdir` with xprof shows it.

    Attributes:
      directory: the folder; of many processes each writes into one of its own in it.
      first: the first step, counted from 1 as `on_step` counts; leave out those that compile.
      last: the last one, included.

    >>> Profile("run/profile", first=10, last=12)
    Profile(directory='run/profile', first=10, last=12)
    """

    directory: str | pathlib.Path
    first: int
    last: int


class Recorder:
    """Starts and stops the trace: what the devices do in it is of its steps alone.

    A run that begins inside of them traces those that are left; one that begins after them, nothing.

    >>> Recorder(None).before(1, None)
    """

    def __init__(self, profile: Profile | None):
        self._profile, self._is_on = profile, False
        self._mark: Any = None

    def before(self, number: int, state: Any) -> None:
        """Is told of a step before it is given to the devices, and of the state that it takes."""
        profile = self._profile
        if profile is None or not profile.first <= number <= profile.last:
            return
        if not self._is_on:
            jax.block_until_ready(state)
            many = jax.process_count() > 1
            folder = pathlib.Path(profile.directory) / (f"process_{jax.process_index()}" if many else "")
            jax.profiler.start_trace(folder)
            self._is_on = True
        # By these marks xprof tells one step from the next.
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=number)
        self._mark.__enter__()

    def after(self, number: int, results: Any) -> None:
        """Is told of it once the devices have it, and of what it will give."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        if self._is_on and self._profile is not None and number >= self._profile.last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._is_on:
            # One is enough, though a run that goes back comes here again.
            self._is_on, self._profile = False, None
            jax.profiler.stop_trace()
