"""Two processes that save four steps; one of them finds no room for its part of the second: program.py FOLDER WHICH."""

import resource
import sys

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar import checkpoint as checkpoint_module


def main(folder, which):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    index, _ = jaxpar.initialize()
    sharding = NamedSharding(jaxpar.make_mesh(fsdp=4), P("fsdp"))
    state = {"w": jax.jit(lambda: jax.random.normal(jax.random.key(0), (512, 1024)), out_shardings=sharding)()}
    # Or else Python would wait at its end for the thread of Orbax's that waits for the process that failed.
    checkpoint_module._LEAST_SECONDS = 15
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = jaxpar.Checkpoints(folder, every=1)
    for number in range(1, 5):
        if number == 2 and index == int(which):
            # Python ignores the signal that would end the process.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            checkpoints.save(state, step=number)
            checkpoints.wait()
            print("saved", number, flush=True)
        except ValueError as error:
            print("failed", number, error, flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    multihost_utils.sync_global_devices("the end")
    print("whole", [step for step in checkpoints.steps if checkpoints.verify(step)], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
