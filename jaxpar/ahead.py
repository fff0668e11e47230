"""Compiling a step for a target in a process of its own, only as far as its program is scheduled.

Of the minute and more that the TPU compiler takes, passes over the program take seconds, and machine code the rest. XLA
writes the scheduled program to a folder when it is there; then the process has done its work. `python -m jaxpar.ahead
FOLDER` is that process. An abort of the compiler, as for shapes it doesn't know, ends it and not the caller.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
from jax import export
from jax.sharding import AxisType, Mesh

from jaxpar import program_cache
from jaxpar.layout import format_bytes
from jaxpar.step import Step
from jaxpar.targets import CHIPS, Target, TargetError, target_devices

SECONDS = 300
_MEMORY = 0.8
# One more where what is kept of a program is read in another way, or means another thing, than before.
_FORMAT = 1
_PROGRAM, _MESH, _ERROR = "program.bin", "mesh.json", "error.txt"


class AheadError(RuntimeError):
    """A compile for a target that failed or took too long: the message gives the compiler's own reason."""


class CompiledProgram(NamedTuple):
    """What a compiled step is, and what it takes on a device.

    Attributes:
      text: the program's text.
      argument_bytes: what the step is given, on a device, as it lies there.
      output_bytes: what it gives that takes no argument's place.
      temp_bytes: what else lives while it runs; on a target without what machine code adds, less than 0.1 GiB.
      hbm_bytes: what a device of a target has; None where the devices are here.
    """

    text: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    hbm_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """All that must fit a device."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes


def compile_ahead(step: Step, state: Any, batch: Any, target: Target, *, seconds: float = SECONDS) -> CompiledProgram:
    """Returns the program of a step for the target that its mesh is of; nothing is allocated.

    One that was compiled before, from the same program for the same target by the same versions and flags, is read from
    the user's own folder. The compile may take 4/5 of this machine's memory.

    Args:
      step: the step.
      state: from `strategy.abstract_state`.
      batch: the raw global batch, arrays or shapes.
      target: what `jaxpar.targets.target_of` gives for its devices.
      seconds: how long it may take.

    Raises:
      AheadError: the compiler fails, aborts, isn't done in time or takes too much memory. A program too large for a
        device's memory is none of these: its bytes are given.
      TargetError: flatbuffers, which carry the program over, aren't installed.
    """
    exported, told = _describe(step, state, batch, target)
    options = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    versions = [f"{name} {_version_of(name)}" for name in ("jaxpar", "jax", "jaxlib", "libtpu", "libtpu-nightly")]
    # The lines of Python that lead here are in it, since reports tell them.
    key = program_cache.key_of([str(_FORMAT), exported.mlir_module(), told, str(target), *options, *versions])
    if (kept := program_cache.read(key)) is not None and set(kept) == set(CompiledProgram._fields):
        return CompiledProgram(**kept)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxpar-"))
    try:
        _check_flatbuffers(target)
        (folder / _PROGRAM).write_bytes(exported.serialize())
        (folder / _MESH).write_text(told)
        compiled = _run(folder, target, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    program_cache.write(key, compiled._asdict())
    return compiled


def _describe(step: Step, state: Any, batch: Any, target: Target) -> tuple[export.Exported, str]:
    """The step's program, and as JSON what else the process that compiles it must know."""
    mesh = step.strategy.mesh
    order = {device: number for number, device in enumerate(target_devices(target))}
    try:
        exported = step.export(state, batch)
    except NotImplementedError as error:
        advice = ""
        if "callback" in str(error).lower():
            advice = " Leave out what calls back into Python, as jax.debug.print does."
        raise AheadError(f"The step can't be compiled for {target}: {error}.{advice}") from error
    told = {
        "target": target,
        "axes": dict(mesh.shape),
        "places": [order[device] for device in mesh.devices.flat],
        "carries_state": step.carries_state,
        "compiler_options": step.compiler_options,
        "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
    }
    return exported, json.dumps(told)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _check_flatbuffers(target: Target) -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise TargetError(f"target {target} needs flatbuffers: pip install 'jaxpar[plan]'")


def _run(folder: pathlib.Path, target: Target, seconds: float) -> CompiledProgram:
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*jit_call.*"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    environment["JAX_ENABLE_X64"] = str(int(jax.config.jax_enable_x64))  # pyright: ignore[reportAttributeAccessIssue]
    # It finds what this process does, and nothing beside it in the folder where it happens to run.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with (folder / "log.txt").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxpar.ahead", str(folder)], env=environment, stdout=log, stderr=log
        )
        end, most = time.monotonic() + seconds, _MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        try:
            while not (found := _find_report(folder)) and child.poll() is None and time.monotonic() < end:
                if (taken := _resident_bytes(child.pid)) > most:
                    raise AheadError(
                        f"The compile for {target} took {format_bytes(taken)} of this machine's memory, of "
                        f"{format_bytes(most)} allowed, and was ended; a smaller step, or fewer layers, may do."
                    )
                time.sleep(0.05)
        finally:
            done = child.poll()
            child.kill()
            child.wait()
    if found or (found := _find_report(folder)):
        return _read(found, target)
    if done is None:
        raise AheadError(
            f"The compile for {target} was ended after {seconds:g} s; a smaller step, or fewer layers, may do."
        )
    reason = (folder / _ERROR).read_text() if (folder / _ERROR).exists() else _last_lines(folder / "log.txt")
    how = f"by signal {signal.Signals(-done).name}" if done < 0 else f"with code {done}"
    raise AheadError(f"The compile for {target} ended {how}: {reason.strip()}")


def _resident_bytes(process: int) -> int:
    try:
        pages = pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _find_report(folder: pathlib.Path) -> pathlib.Path | None:
    """The report that XLA writes once the schedule and the memory it takes are known, after the texts of both."""
    found = next(iter(folder.glob("*.after_optimizations-memory-usage-report.txt")), None)
    return found if found and "Total bytes" in found.read_text() else None


def _read(report: pathlib.Path, target: Target) -> CompiledProgram:
    stem = str(report).removesuffix("-memory-usage-report.txt")
    text = pathlib.Path(f"{stem}-buffer-assignment.txt").read_text()
    given = made = temp = 0
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*):$", text, re.MULTILINE):
        if kind.startswith("parameter"):
            given += int(size)
        elif "maybe-live-out" in kind:
            made += int(size)
        elif kind == "preallocated-temp":
            # Those of a color are on the chip itself.
            temp += int(size)
    return CompiledProgram(pathlib.Path(f"{stem}.txt").read_text(), given, made, temp, CHIPS[target.chip].hbm_bytes)


def _last_lines(log: pathlib.Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    failed = [line for line in lines if "Check failed" in line]
    return "\n".join(failed[:1] or lines[-3:])


def _compile(folder: pathlib.Path) -> None:
    """What the process does: it compiles the program in its folder, and is ended once the schedule is written."""
    told = json.loads((folder / _MESH).read_text())
    chip, shape, slices = told["target"]
    devices = target_devices(Target(chip, tuple(shape), slices))[told["places"]]
    axes = told["axes"]
    mesh = Mesh(devices.reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    exported = export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
    arguments = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        for aval, sharding in zip(exported.in_avals, exported.in_shardings_jax(mesh), strict=True)
    ]
    args, _ = jax.tree.unflatten(exported.in_tree, arguments)
    try:
        donated = (0,) if told["carries_state"] else ()
        options = told["compiler_options"]
        jax.jit(exported.call, donate_argnums=donated, compiler_options=options).lower(*args).compile()
    except Exception as error:
        (folder / _ERROR).write_text(str(error))
        raise


if __name__ == "__main__":
    _compile(pathlib.Path(sys.argv[1]))
