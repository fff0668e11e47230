"""The pytest plugin: fake devices before any conftest, a marker for how many a test needs, meshes and strategies."""

import os
import sys

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--fake-devices=N`."""
    group = parser.getgroup("jaxpar")
    group.addoption("--fake-devices", type=int, default=None, metavar="N", help="run JAX on N fake CPU devices")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Asks for the devices by environment variable: before any conftest, and without importing JAX."""
    count = early_config.known_args_namespace.fake_devices
    if count is None or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(count))
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))
