"""The plain lines of a run: one a minute to a file or a pipe, one of a restart anywhere; changes with what is told."""

import pathlib
import sys
import time
from collections.abc import Callable

import jax

from jaxpar.progress import is_live

# A run of seconds, as in a test, says nothing; a day's job leaves 1,440 lines.
_SECONDS = 60


def plain_lines(steps: int) -> Callable[[int, dict[str, float]], None] | None:
    """Returns what writes a line a minute to where errors go; None on a terminal, or in any process but the first.

    Args:
      steps: how many in all.
    """
    if is_live() or jax.process_index():
        return None
    last: tuple[float, int | None] = time.monotonic(), None
    kept: dict[str, float] = {}

    def tell(number: int, metrics: dict[str, float]) -> None:
        nonlocal last
        # What an evaluation gave stays on the lines that follow.
        kept.update(metrics)
        now, (since, before) = time.monotonic(), last
        if now - since < _SECONDS:
            return
        shown = [name for name in kept if name == "loss" or name.startswith("eval")] or list(kept)
        told = "  ".join(f"{name} {kept[name]:.4g}" for name in shown[:3])
        # The first minute compiles too.
        speed = (
            "" if before is None or number == before else f"  {1e3 * (now - since) / (number - before):,.3g} ms a step"
        )
        print(f"step {number} of {steps}  {told}{speed}", file=sys.stderr, flush=True)
        last = now, number

    return tell


def tell_resume(step: int, directory: pathlib.Path) -> None:
    """Writes where a run goes on, once for all processes, to where errors go."""
    if not jax.process_index():
        print(f"resumed from step {step} of {directory}", file=sys.stderr, flush=True)
