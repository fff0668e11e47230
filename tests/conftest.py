"""What every test file shares."""

import jax

# LLVM's own optimizations are half of a test's time; XLA's passes, the partitioner's too, all run.
jax.config.update("jax_disable_most_optimizations", True)
