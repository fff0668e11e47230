"""Fixtures that several test files share."""

import jax
import pytest


@pytest.fixture
def quick_compiles():
    """Leaves out LLVM's own optimizations, half of a test's time; XLA's passes, the partitioner's too, all run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
