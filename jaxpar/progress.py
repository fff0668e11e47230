"""The line that shows on a terminal how a run goes; changes with what a user wants to watch."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnStep = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def show_steps(steps: int, console: Console | None = None) -> Iterator[OnStep]:
    """Yields what shows a step and its metrics on one live line; it shows nothing where the output is no terminal.

    >>> import io
    >>> with show_steps(3, Console(force_terminal=True, file=io.StringIO())) as show:
    ...     show(1, {"loss": 0.5})
    """
    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        yield lambda number, metrics: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=steps)
        last = time.perf_counter()

        def show(number: int, metrics: dict[str, float]) -> None:
            nonlocal last
            now = time.perf_counter()
            told = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:3])
            progress.update(task, completed=number, description=f"{told}  {1e3 * (now - last):.0f} ms a step")
            last = now

        yield show
