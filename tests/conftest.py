"""What every test file shares."""

import os

import jax
import pytest

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
