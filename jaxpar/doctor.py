"""`jaxpar doctor`: what JAX sees on this machine, whether versions fit, and what the settings in effect cost."""

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

import jax

from jaxpar.layout import format_bytes

_PLUGIN_EXTRAS = ("cuda12", "cuda13", "tpu")
# What jaxpar asks for beside JAX, as pyproject.toml names it.
_CORE = ("flax", "optax", "chex", "numpy", "rich", "orbax-checkpoint")
_DEFAULT_FRACTION = "0.75"

# A setting, and what it costs while it is on.
_COSTS = {
    "JAX_PLATFORMS": "JAX looks for these platforms alone; a device of another one stays idle without a word.",
    "JAX_NUM_CPU_DEVICES": "Made-up CPU devices share the cores: they prove a mesh right, and make nothing faster.",
    "JAX_ENABLE_X64": "Arrays are float64 by default: twice the memory, and far slower on GPU and TPU.",
    "JAX_DISABLE_JIT": "Nothing is compiled: every operation runs by itself, many times slower.",
    "JAX_DEBUG_NANS": "Each step is checked, run again without jit where a NaN is found, and keeps its donated memory.",
    "JAX_DEBUG_INFS": "Each step is checked, run again without jit where an infinity is found, and keeps its memory.",
    "JAX_CHECK_TRACER_LEAKS": "Tracing is far slower, since nothing that was traced is cached.",
    "JAX_DEFAULT_MATMUL_PRECISION": "float32 products at 'highest' take several passes on GPU and TPU.",
    "JAX_DEFAULT_PRNG_IMPL": "Other than threefry2x32, a seed may give other numbers on another mesh.",
    "JAX_THREEFRY_PARTITIONABLE": "If false, a seed gives other numbers on another mesh, and they are made whole.",
    "JAX_COMPILATION_CACHE_DIR": "Compiled programs are kept there: later starts are faster; the folder grows.",
    "JAX_LOG_COMPILES": "Each compile is logged; it costs nothing else.",
    "JAX_TRACEBACK_FILTERING": "'off' makes tracebacks long; it costs nothing else.",
    "XLA_FLAGS": "They go to the compiler as they are: each holds for every program of this process.",
    "LIBTPU_INIT_ARGS": "They go to the TPU's compiler and runtime as they are.",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "'platform' allocates each array anew: the least memory, and very slow.",
}


class Pin(NamedTuple):
    """A version that is needed.

    Attributes:
      name: of the package.
      installed: its version; None if it is not there.
      needs: what is asked of it, `>=0.10`; empty if nothing.
      asked_by: the package that asks.
    """

    name: str
    installed: str | None
    needs: str
    asked_by: str

    @property
    def holds(self) -> bool:
        """Whether the installed version is what is needed."""
        return self.installed is not None and satisfies(self.installed, self.needs)


def examine() -> int:
    """Returns 0 if devices start and every pin holds, else 1; prints what it finds."""
    pins = read_pins()
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores\n")
    _print_table([("package", "installed", "needed", "by", "")] + [_as_line(pin) for pin in pins])
    print("\nSettings in the environment")
    for line in _describe_settings(os.environ) or ["none that costs anything"]:
        print("  " + line)
    starts = _print_devices()
    print("\nMemory")
    backend = jax.default_backend() if starts else "none"
    print("  " + _describe_memory(os.environ, backend))
    if _is_noisy(os.environ, backend):
        print(
            "\nlibtpu is installed, but there is no TPU: JAX looks for one at each start, and libtpu complains. "
            f"JAX_PLATFORMS={'cuda' if backend == 'gpu' else 'cpu'} spares that; jaxpar compiles for TPU pods all the "
            "same."
        )
    broken = [pin for pin in pins if not pin.holds]
    for pin in broken:
        found = f"is {pin.installed}" if pin.installed else "is not installed"
        cure = "install another Python" if pin.name == "python" else f"pip install -U '{pin.name}{pin.needs}'"
        print(f"\n{pin.name} {found}, but {pin.asked_by} needs {pin.needs}: {cure}")
    print("\nAll is well." if starts and not broken else "\nSomething is wrong, as said above.")
    return 0 if starts and not broken else 1


def read_pins() -> list[Pin]:
    """Returns what jaxpar asks of Python and its packages, and JAX of its own parts, with what is installed."""
    try:
        python = metadata.metadata("jaxpar")["Requires-Python"]
    except metadata.PackageNotFoundError:
        # Run from its source, uninstalled: there is nothing to compare with, and the table shows so.
        return [Pin(name, _installed(name), "", "-") for name in ("jax", "jaxlib", *_CORE)]
    pins = [Pin("python", platform.python_version(), python or "", "jaxpar")]
    pins += [
        Pin(name, _installed(name), needs, "jaxpar") for name, needs, extra in _requirements("jaxpar") if not extra
    ]
    for name, needs, extra in _requirements("jax") if _installed("jax") else ():
        is_plugin = extra in _PLUGIN_EXTRAS and name != "jaxlib" and _installed(name) is not None
        if (name == "jaxlib" and not extra) or is_plugin:
            pins.append(Pin(name, _installed(name), needs, "jax"))
    return pins


def satisfies(version: str, needs: str) -> bool:
    """Returns whether a version is as a comma-separated requirement asks; marks such as `rc1` are not compared.

    >>> satisfies("0.12.0.1", ">=0.10,<1"), satisfies("0.9", ">=0.10"), satisfies("0.0.42.1", "==0.0.42.*")
    (True, False, True)
    """
    return all(_compare(version, part.strip()) for part in needs.split(",") if part.strip())


def _compare(version: str, part: str) -> bool:
    found = re.fullmatch(r"(===|==|~=|!=|<=|>=|<|>)\s*(.+?)(\.\*)?", part)
    if found is None:
        raise ValueError(f"The requirement {part!r} is not an operator and a version, as '>=0.10'.")
    operator, wanted, prefix = found.groups()
    have, want = _numbers(version), _numbers(wanted)
    length = len(want) if prefix else max(len(have), len(want))
    a, b = (numbers[:length] + (0,) * (length - len(numbers)) for numbers in (have, want))
    compatible = a >= b and a[: len(want) - 1] == b[: len(want) - 1]
    return {
        "===": a == b, "==": a == b, "!=": a != b, "~=": compatible, "<=": a <= b, ">=": a >= b, "<": a < b, ">": a > b
    }[operator]  # fmt: skip


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(int(number) for number in leading.group().split(".")) if leading else ()


def _requirements(package: str) -> list[tuple[str, str, str]]:
    """Name, versions and extra of each requirement of an installed package."""
    pattern = r"([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?"
    found = [re.fullmatch(pattern, line) for line in metadata.requires(package) or []]
    extras = [re.search(r"""extra\s*==\s*["']([^"']+)""", match.group(3) or "") for match in found if match]
    named = [match for match in found if match]
    return [
        (match.group(1), match.group(2).strip(), extra.group(1) if extra else "")
        for match, extra in zip(named, extras, strict=True)
    ]


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _as_line(pin: Pin) -> tuple[str, ...]:
    return pin.name, pin.installed or "not there", pin.needs or "-", pin.asked_by, "" if pin.holds else "VIOLATED"


def _print_table(lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_devices() -> bool:
    """Whether JAX starts; prints the devices, and what kind of speed to expect of them."""
    # Flushed: an unknown flag of XLA's ends the process right here.
    print("\nDevices", flush=True)
    try:
        devices = jax.devices()
    except RuntimeError as error:
        print(f"  none: {' '.join(str(error).split())}")
        return False
    kinds = [device.device_kind for device in devices]
    for kind in dict.fromkeys(kinds):
        print(f"  {kinds.count(kind)} x {kind}, platform {devices[0].platform}, in {jax.process_count()} process(es)")
    if devices[0].platform != "cpu":
        print(f"  {_describe_limit(devices[0])}")
    elif len(devices) > 1:
        print(f"  They are made up and share {os.cpu_count()} cores: they prove a mesh right, and make nothing faster.")
    else:
        print("  One device uses all cores; --fake-devices 8 makes up 8 that share them, to try a mesh, at no speed.")
    return True


def _describe_limit(device: jax.Device) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f"JAX may use {format_bytes(limit)} of memory on each." if limit else "How much memory each has is not told."


def _describe_memory(environment: Mapping[str, str], backend: str) -> str:
    """One sentence or two on what JAX takes of the devices' memory when it starts, and what that costs."""
    if backend != "gpu":
        return f"Nothing is set aside on platform {backend}; on a GPU, JAX takes 75 % of its memory when it starts."
    allocator = environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()
    if allocator == "platform" or environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0"):
        return "Nothing is set aside: memory grows as it is asked for, shared with others, but it may fragment."
    fraction = environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", environment.get("XLA_CLIENT_MEM_FRACTION"))
    share = float(fraction or _DEFAULT_FRACTION)
    return (
        f"JAX takes {share:.0%} of each GPU's memory when it starts: it doesn't fragment, but another process on that "
        "GPU finds only the rest. XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives more to a process that is alone, "
        "XLA_PYTHON_CLIENT_PREALLOCATE=false shares."
    )


def _is_noisy(environment: Mapping[str, str], backend: str) -> bool:
    """Whether JAX asks libtpu for a TPU that isn't there."""
    return _installed("libtpu") is not None and not environment.get("JAX_PLATFORMS") and backend != "tpu"


def _describe_settings(environment: Mapping[str, str]) -> list[str]:
    """A line for each setting that is in effect."""
    names = [*_COSTS, *sorted(name for name in environment if name.startswith("JAX_") and name not in _COSTS)]
    return [
        f"{name}={environment[name]}  {_COSTS.get(name, 'One that this command knows nothing of.')}"
        for name in names
        if environment.get(name)
    ]
