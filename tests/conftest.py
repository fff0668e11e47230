"""What every test file shares."""

import os

import jax
import pytest

from jaxpar.mesh import MeshError

# A test's time is mostly XLA's writing of machine code, which none is about: so it writes it the shortest way. All of
# XLA's own passes run, the partitioner's too. One module a program, for a process can map only so many (65,530), and
# JAX crashes beyond.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]  # twice as fast; XLA aborts at a flag that it has dropped
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
jax.config.update("jax_disable_most_optimizations", True)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for a bare `pytest`; one for tests that are named, and on real devices, which one process holds."""
    is_bare = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return 2 if is_bare and on_cpu and (os.cpu_count() or 1) > 1 else 0


def pytest_collection_modifyitems(items):
    """Docstrings show what eight devices give."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.devices(8))


def _skip_without_devices():
    """Where the machine has few devices of its own, a mesh that needs more skips its test, with both numbers."""
    try:
        return (yield)
    except MeshError as error:
        if len(jax.devices()) < 8 and "are available; sizes must multiply" in str(error):
            pytest.skip(str(error).partition(";")[0])
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    """Skips a test whose fixtures lack devices."""
    return (yield from _skip_without_devices())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips a test that lacks devices."""
    return (yield from _skip_without_devices())
