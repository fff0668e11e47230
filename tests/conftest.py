"""What every test file shares."""

import os

import jax

# A test's time is mostly XLA's writing of machine code, which none is about: so it writes it the shortest way. All of
# XLA's own passes run, the partitioner's too. One module a program, for a process can map only so many (65,530), and
# JAX crashes beyond.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]  # twice as fast; XLA aborts at a flag that it has dropped
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
jax.config.update("jax_disable_most_optimizations", True)
