"""The pytest plugin: fake devices before any conftest, a marker for how many a test needs, meshes and strategies.

It comes with the package, and imports JAX only for a test that asks for devices:

    pytest --fake-devices=8                     # or `fake_devices = 8` in the ini file; else the devices there are

    @pytest.mark.devices(8)                     # skipped where there are fewer, with both numbers
    def test_on_eight_devices(): ...

    def test_on_a_mesh(jaxpar_mesh):            # over the first devices that fit, skipped where there are fewer
        mesh = jaxpar_mesh("data=2,model=4")

    def test_everywhere(jaxpar_strategy):       # once for each standard strategy
        jaxpar.testing.assert_trains_like_one_device(init_fn, loss_fn, batches, jaxpar_strategy)
"""

import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from jaxpar.integers import is_integer

# The names of jaxpar.testing.strategies(8), which can't be asked for here without importing JAX.
STRATEGIES = ("one", "pmap", "data", "model", "data_model", "fsdp", "fsdp_model", "zero1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--fake-devices=N`, and the ini option `fake_devices`."""
    told = "run JAX on N fake CPU devices, unless XLA_FLAGS, JAX_NUM_CPU_DEVICES or JAX_PLATFORMS ask for others"
    parser.getgroup("jaxpar").addoption("--fake-devices", type=int, default=None, metavar="N", help=told)
    parser.addini("fake_devices", told)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Asks for the devices by environment variable: before any conftest, and without importing JAX."""
    count = _asked_count(early_config)
    if count is None or os.environ.get("JAX_PLATFORMS", "cpu").split(",")[0] != "cpu":
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(count))
    if "jax" in sys.modules:
        _tell_jax(count)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker `devices`."""
    config.addinivalue_line("markers", "devices(count): needs that many JAX devices; skipped where there are fewer")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that is marked as needing more devices than there are."""
    needed = _marked_count(item)
    if needed is not None:
        _need_devices(needed, "the test")


@pytest.fixture
def jaxpar_mesh() -> Callable[..., Any]:
    """Returns `make(spec, **sizes)`: `jaxpar.make_mesh` over the first devices that fit, `"data=2,model=4"`.

    Where there are fewer devices the test is skipped, with both numbers; a size of -1 takes all there are.
    """
    import jax

    from jaxpar.mesh import make_mesh

    def make(spec: str | None = None, **sizes: Any) -> Any:
        given = [*map(int, re.findall(r"=\s*(-?\d+)", spec or "")), *sizes.values()]
        needed = math.prod(size for size in given if size > 0)
        _need_devices(needed, f"a mesh of {spec or sizes}")
        return make_mesh(spec, devices=None if -1 in given or not given else jax.devices()[:needed], **sizes)

    return make


@pytest.fixture(params=STRATEGIES)
def jaxpar_strategy(request: pytest.FixtureRequest) -> Any:
    """Returns each standard strategy of `jaxpar.testing.strategies` in turn, its name as the test's id.

    They use as many devices as the test is marked with, `@pytest.mark.devices(8)`, else all. The ids are the same on
    every machine: a strategy that the devices don't suffice for is skipped.
    """
    import jax

    from jaxpar.testing import strategies

    count = _marked_count(request.node) or len(jax.devices())
    table = strategies(count)
    if request.param not in table:
        needed = "2 devices or more" if request.param in strategies(2) else "an even number of devices, 4 or more"
        pytest.skip(f"strategy {request.param!r} needs {needed}, but there {_are(count)}{_way_out(4)}")
    return table[request.param]()


def _asked_count(config: pytest.Config) -> int | None:
    """What `--fake-devices` or the ini file ask for."""
    count = config.known_args_namespace.fake_devices
    text = config.getini("fake_devices") if count is None else str(count)
    if not text:
        return None
    if not text.strip().isdecimal() or int(text) < 1:
        raise pytest.UsageError(f"fake devices are {text!r}; give a whole number, 1 or more, as --fake-devices=8.")
    return int(text)


def _tell_jax(count: int) -> None:
    """Sets the configuration of a JAX that another plugin has imported: it reads the environment no more."""
    import jax

    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if not platforms:
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    told = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if "JAX_NUM_CPU_DEVICES" not in os.environ or told > 0:
        return
    try:
        jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))
    except RuntimeError:
        if jax.device_count() < count:
            raise pytest.UsageError(
                f"--fake-devices={count}, but another plugin has already started JAX, with {jax.device_count()} "
                f"devices; set JAX_NUM_CPU_DEVICES={count} in the environment."
            ) from None


def _marked_count(item: Any) -> int | None:
    """The most devices that the test's marks ask for."""
    counts = []
    for mark in item.iter_markers("devices"):
        if len(mark.args) != 1 or mark.kwargs or not is_integer(mark.args[0]):
            given = ", ".join([*map(repr, mark.args), *(f"{name}={value!r}" for name, value in mark.kwargs.items())])
            pytest.fail(f"@pytest.mark.devices({given}): give one whole number, as devices(8).", pytrace=False)
        counts.append(int(mark.args[0]))
    return max(counts, default=None)


def _need_devices(needed: int, what: str) -> None:
    import jax

    have = len(jax.devices())
    if have < needed:
        pytest.skip(f"{what} needs {needed} devices, but there {_are(have)}{_way_out(needed)}")


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _way_out(needed: int) -> str:
    """What gives more devices: an aside for a reason to skip."""
    import jax

    platform = jax.default_backend()
    if platform != "cpu":
        return f" ({platform}); JAX_PLATFORMS=cpu pytest --fake-devices={needed} has them"
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return f"; XLA_FLAGS says so: ask it for {needed}, or unset it and run pytest --fake-devices={needed}"
    return f"; run pytest --fake-devices={needed}"
