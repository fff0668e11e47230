"""What many processes must agree on before they save or restore: one that goes on alone waits for ever."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.saved_leaves import CheckpointError


def all_ready(get_ready: Callable[[], None]) -> None:
    """Raises CheckpointError in every process if one can't save: the others would wait for it."""
    error: CheckpointError | None = None
    try:
        get_ready()
    except CheckpointError as failed:
        error = failed
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed_somewhere = np.any(multihost_utils.process_allgather(np.array(error is not None)))
        if failed_somewhere and error is None:
            raise CheckpointError("Another process can't save, and says why; none of them does.")
    if error is not None:
        raise error


def agree(choose: Callable[[], int]) -> int:
    """What the first process chooses; it raises in every process if it does in that one."""
    if jax.process_count() == 1:
        return choose()
    from jax.experimental import multihost_utils

    error, chosen = None, -1
    if jax.process_index() == 0:
        try:
            chosen = choose()
        except CheckpointError as failed:
            error = failed
    chosen = int(multihost_utils.broadcast_one_to_all(jnp.int32(chosen)))
    if chosen < 0:
        raise error or CheckpointError("The first process found no checkpoint to restore; it says why.")
    return chosen
