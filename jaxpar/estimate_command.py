"""`jaxpar estimate`: how long a step takes on a pod that isn't here and what it costs, or which of several to take."""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

import jaxpar
from jaxpar.estimation.chips import read_figures
from jaxpar.layout import format_bytes
from jaxpar.tables import Table, align, show
from jaxpar.targets import CHIPS
from jaxpar.usage import UsageError
from jaxpar.user_module import make_mesh, run_step

_HEADS = (
    "target",
    "fits",
    "memory",
    "a step takes in",
    "step",
    "a second",
    "MFU",
    "bound by",
    "$/hour",
    "$/billion",
    "price of",
)


def estimate(options: argparse.Namespace) -> int:
    """Returns 0 once the report is printed; 1 if the step fits none of its targets.

    Raises:
      UsageError: the options, or the module, can't be.
    """
    targets = [target.strip() for target in options.target.split(",") if target.strip()]
    if not targets:
        raise UsageError(
            f"--target {options.target!r} names no pod; give one, as v5e-256, or several, as v5e-64,v5p-16."
        )
    prices = _read_prices(options.price, targets)
    if options.chart:
        _check_chart(pathlib.Path(options.chart))
    if len(targets) == 1:
        report = _estimate(options, targets[0], prices)
        found: list[Any] = [report]
        _print(report, report.to_dict(), options)
    else:
        found = []
        for target in targets:
            try:
                found.append(_estimate(options, target, prices))
            except UsageError as error:
                found.append(error)
        if all(isinstance(each, UsageError) for each in found):
            raise found[0]
        _compare(targets, found, options)
    reports = [each for each in found if isinstance(each, jaxpar.Estimate)]
    if options.chart:
        _draw(reports, options.chart)
    return 0 if any(report.fits for report in reports) else 1


def _estimate(options: argparse.Namespace, target: str, prices: dict[str, float]) -> jaxpar.Estimate:
    mesh = make_mesh(options, target)
    report = functools.partial(
        jaxpar.estimate, dollars_an_hour=prices.get(_chip_of(target)), seconds=options.time_limit
    )
    with _progress(f"compiling for {target}"):
        return run_step(options, mesh, report)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield


def _read_prices(text: str | None, targets: list[str]) -> dict[str, float]:
    prices = {}
    for part in (text or "").split(","):
        if not part:
            continue
        chip, _, price = part.partition("=")
        try:
            prices[chip.strip()] = float(price)
        except ValueError:
            raise UsageError(f"--price has {part!r}; write chips and dollars an hour, as v5e=0.6,v5p=2.") from None
        if chip.strip() not in CHIPS:
            raise UsageError(f"--price has the chip {chip.strip()!r}; those known are {', '.join(CHIPS)}.")
        if chip.strip() not in map(_chip_of, targets):
            raise UsageError(
                f"--price has the chip {chip.strip()!r}, but --target names {', '.join(targets)} alone; leave it out."
            )
    return prices


def _chip_of(target: str) -> str:
    return re.split("[-:]", target)[0]


def _print(report: Any, content: Any, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(content))
    elif sys.stdout.isatty():
        Console().print(report)
    else:
        # Tables would wrap at a width that a file doesn't have.
        print(report)


def _compare(targets: list[str], found: list[Any], options: argparse.Namespace) -> None:
    rows, notes, content = [], [], []
    for target, report in zip(targets, found, strict=True):
        if isinstance(report, UsageError):
            rows.append((target, "-", *["-"] * (len(_HEADS) - 2)))
            notes.append(f"{target}: {report}")
            content.append({"target": target, "error": str(report)})
            continue
        rows.append(_row(target, report))
        notes.append(f"{target}: {read_figures()[report.target.chip]['weigh'].value}.")
        content.append(report.to_dict())
    notes += _what_is_held(found)
    notes.append(
        "Beside time and dollars weigh the task (a chip's memory, its slices' sizes, the kernels and dtypes that your "
        "code needs), compatibility (what the JAX and libtpu that you pin support), security (which regions your data "
        "may be in, who shares the project), and how long you would wait for the capacity."
    )
    if options.json:
        print(json.dumps(content))
    elif sys.stdout.isatty():
        Console().print(show("which pod", [Table(_HEADS, rows)], notes))
    else:
        print("\n".join([*align(Table(_HEADS, rows)), "", *notes]))


def _what_is_held(found: list[Any]) -> list[str]:
    """What is the same for all pods, and so what may be compared."""
    batches = {report.tokens for report in found if isinstance(report, jaxpar.Estimate)}
    if len(batches) == 1:
        return ["Held the same: the batch. So a chip of a larger pod has less to do."]
    return [
        "Held the same: a chip's rows, one unless microbatches need more. So a larger pod takes in more a step, and "
        "steps' seconds don't compare; tokens a second and dollars a billion do. --batch-size N gives all the same."
    ]


def _row(target: str, report: jaxpar.Estimate) -> tuple[str, ...]:
    return (
        target,
        "yes" if report.fits else "NO",
        f"{format_bytes(report.peak_bytes)} of {format_bytes(report.hbm_bytes)}",
        f"{report.tokens:,} {report.unit}",
        f"{report.seconds:.3g} s ({report.fastest:.3g} to {report.slowest:.3g})",
        f"{report.tokens_per_second:,.0f} {report.unit}",
        f"{report.mfu:.1%}",
        report.bound,
        f"{report.dollars_an_hour:,.2f}",
        f"{report.dollars_a_billion:,.2f}",
        str(report.price.read or report.price.source),
    )


def _check_chart(path: pathlib.Path) -> None:
    """What would be found out after the compiles.

    Raises:
      UsageError: matplotlib isn't there, or the file can't be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--chart needs matplotlib: pip install 'jaxpar[plot]'.")
    if not path.parent.is_dir():
        raise UsageError(f"--chart {path} can't be written: there is no folder {path.parent}; make it first.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(
            f"--chart {path} can't be written: {'a folder' if path.is_dir() else 'permission denied'}; give another."
        )


def _draw(reports: list[jaxpar.Estimate], path: str) -> None:
    """Draws where the time goes, and the memory, as a PNG.

    Raises:
      UsageError: the file can't be written.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 2.6 + 0.6 * len(reports)), layout="constrained")
    times, memory = figure.subplots(1, 2, width_ratios=[2, 1], sharey=True)
    names = [str(report.target) for report in reports]
    parts = [report.parts() for report in reports]
    left = [0.0] * len(reports)
    for name in dict.fromkeys(name for part in parts for name in part):
        lengths = [part.get(name, 0.0) for part in parts]
        times.barh(names, lengths, left=left, label=name)
        left = [a + b for a, b in zip(left, lengths, strict=True)]
    times.set_xlabel("seconds a step")
    memory.barh(names, [report.peak_bytes / 2**30 for report in reports], label="a step takes")
    memory.plot([report.hbm_bytes / 2**30 for report in reports], names, "k|", markersize=20, label="a chip has")
    memory.set_xlabel("GiB a chip")
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UsageError(f"--chart {path} can't be written: {error.strerror}; give another.") from error
