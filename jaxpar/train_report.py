"""What `jaxpar train` shows and writes: a table, lines, the log and the curve."""

import contextlib
import importlib.util
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from jaxpar.layout import Layout, format_bytes
from jaxpar.progress import is_live
from jaxpar.strategy import Strategy
from jaxpar.usage import UsageError

Row = dict[str, Any]


def print_layout(console: Console, strategy: Strategy, layout: Layout) -> None:
    """Prints the mesh, the number of parameters, and what each device holds of the state."""
    devices = strategy.mesh.devices.ravel()
    axes = " x ".join(f"{axis}={size}" for axis, size in strategy.mesh.shape.items())
    params = [row for row in layout.rows if row.path.startswith("params/")]
    moments = sum(row.bytes_per_device for row in layout.rows if row.path.startswith("opt_state/"))
    held = sum(row.bytes_per_device for row in params)
    whole = sum(math.prod(row.shape) * row.dtype.itemsize for row in params)
    table = Table(show_header=False)
    table.add_row("mesh", f"{axes}, {devices.size} {devices[0].platform} device{'s' * (devices.size > 1)}")
    table.add_row("strategy", Line(strategy.name))
    table.add_row("parameters", f"{sum(math.prod(row.shape) for row in params):,}, {format_bytes(whole)}")
    table.add_row(
        "a device holds",
        f"{format_bytes(layout.bytes_per_device)}: {format_bytes(held)} of parameters, {format_bytes(moments)} of "
        "optimizer state",
    )
    left_whole = [row for row in layout.left_whole if row.path.startswith("params/")]
    if left_whole:
        reasons = dict.fromkeys(f"{row.path.rsplit('/', 2)[-2]}: {row.note}" for row in left_whole)
        table.add_row("left whole", Line("\n".join(reasons)))
    console.print(table)


def print_tenths(console: Console, num_steps: int) -> Callable[[Row], None]:
    """Returns `show(row)`, which prints the first row and each tenth of the steps, unless fit's live line tells all."""
    if console.is_terminal and is_live():
        return lambda row: None
    marks = {math.ceil(num_steps * tenth / 10) for tenth in range(11)}
    # The first row tells where a run goes on, too.
    rows = itertools.count()
    return lambda row: console.print(_as_line(row)) if not next(rows) or row["step"] in marks else None


@contextlib.contextmanager
def open_log(folder: str | None) -> Iterator[Callable[[Row], None]]:
    """Yields `write(row)`, which adds a line to `log.jsonl` in the folder; without a folder it does nothing.

    The rows of an earlier run stay up to the first step that is written: one that goes on has each step once.

    Raises:
      UsageError: the folder can't be made or written to.
    """
    if folder is None:
        yield lambda row: None
        return
    path = _open(Path(folder))
    is_begun = False

    def write(row: Row) -> None:
        nonlocal is_begun
        if not is_begun:
            _keep_rows(path, row["step"])
            is_begun = True
        # Whole lines at once: what a run that is killed leaves can be read.
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    yield write


def _keep_rows(path: Path, before: int) -> None:
    """Keeps the rows of a log whose steps come before one, and no half-written line."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] < before:
                kept.append(line)
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    part.replace(path)


def save_curve(folder: str, rows: Sequence[Row], held_out: float) -> None:
    """Draws the loss of each step, and the held-out loss, into `loss.png`; needs matplotlib."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training batch")
    axes.axhline(held_out, linestyle="--", color="tab:orange", label=f"held out: {held_out:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.legend()
    figure.savefig(Path(folder) / "loss.png", dpi=120)


def can_draw() -> bool:
    """Returns whether matplotlib, which `jaxpar[plot]` installs, is there."""
    return importlib.util.find_spec("matplotlib") is not None


def as_printable(data: bytes, encoding: str) -> str:
    r"""Returns bytes as text that is safe for a terminal: control characters, and what it can't show, replaced.

    >>> as_printable(b"a\tb\x1b[2J\xff", "ascii")
    'a\tb?[2J?'
    """
    text = "".join(char if char.isprintable() or char in "\n\t" else "?" for char in data.decode(errors="replace"))
    return text.encode(encoding, "replace").decode(encoding)


def tokens_per_second(rows: Sequence[Row]) -> float:
    """Returns the mean over all steps but the first, which compiles."""
    timed = rows[1:] or rows
    return len(timed) / math.fsum(1 / row["tokens_per_second"] for row in timed)


def _as_line(row: Row) -> str:
    return f"step {row['step']}  loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"


def _open(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_first = not (folder / "loss.png").exists()
        for name in ("loss.png", "log.jsonl"):
            # Found out now rather than after the training.
            (folder / name).open("ab").close()
        if is_first:
            (folder / "loss.png").unlink()
        return folder / "log.jsonl"
    except OSError as error:
        raise UsageError(
            f"--out {str(folder)!r} can't be written: {error.strerror}: {error.filename!r}; give another folder."
        ) from error
