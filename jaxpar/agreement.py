"""What many processes must agree on, since one that goes on alone waits for ever; changes with how they can ask."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.saved_leaves import CheckpointError


class Agreement:
    """A question to every process of a mesh, whose answers come while the devices go on with what they have to do.

    Each process asks equally often, at the same place of its program: a few bytes travel as a collective of their own,
    in the devices' order, so that nobody waits where the answer is read a step later.

    >>> import jaxpar
    >>> agreement = Agreement(jaxpar.make_mesh(data=8))
    >>> agreement.lacking(agreement.ask(True)), agreement.lacking(agreement.ask(False))
    ((), (0,))
    """

    def __init__(self, mesh: Mesh):
        firsts = {}
        for device in mesh.devices.flat:
            firsts.setdefault(device.process_index, device)
        self._processes = sorted(firsts)
        one_each = Mesh(np.array([firsts[process] for process in self._processes]), ("process",))
        sharding = NamedSharding(one_each, PartitionSpec("process"))
        # Made once: then a question is one call of a compiled function.
        self._told = {
            has: jax.make_array_from_process_local_data(sharding, np.array([has]), (len(firsts),))
            for has in (False, True)
        }
        self._gather = jax.jit(lambda told: told, out_shardings=NamedSharding(one_each, PartitionSpec()))

    def ask(self, has: bool) -> Any:
        """Tells the others whether this process has it; returns what `lacking` reads."""
        return self._gather(self._told[has])

    def lacking(self, asked: Any) -> tuple[int, ...]:
        """Returns the processes that haven't got it, once all have told."""
        told = np.asarray(asked.addressable_data(0))
        return tuple(process for process, has in zip(self._processes, told, strict=True) if not has)


def all_ready(get_ready: Callable[[], None]) -> None:
    """Raises CheckpointError in every process if one can't save: the others would wait for it."""
    error: CheckpointError | None = None
    try:
        get_ready()
    except CheckpointError as failed:
        error = failed
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
        if failed.size and error is None:
            which = ", ".join(map(str, failed))
            raise CheckpointError(
                f"Process {which} can't save, so none of {jax.process_count()} does. See that process's own error."
            )
    if error is not None:
        raise error


def agree(choose: Callable[[], int]) -> int:
    """What the first process chooses; it raises in every process if it does in that one."""
    if jax.process_count() == 1:
        return choose()
    from jax.experimental import multihost_utils

    error: Exception | None = None
    chosen = -1
    if jax.process_index() == 0:
        try:
            chosen = choose()
        except Exception as failed:  # whatever it is: the others wait
            error = failed
    chosen = int(multihost_utils.broadcast_one_to_all(jnp.int32(chosen)))
    if chosen < 0:
        raise error or CheckpointError(
            "The first process found no checkpoint to restore, and says why; do what it says, in a folder that all see."
        )
    return chosen


def gather(text: str) -> list[str]:
    """Returns what each process says, by its index."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    said = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(said.size)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: said.size] = said
    all_said = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(all_said, sizes, strict=True)]


@contextlib.contextmanager
def noting_others() -> Iterator[None]:
    """Adds to an error of the devices, in one of many processes, that another one's end may be why, and what to do."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # A closed connection is a bare ValueError where a computation's result is read (jax 0.10 to 0.12).
        is_of_devices = isinstance(error, jax.errors.JaxRuntimeError) or type(error) is ValueError
        if is_of_devices and jax.process_count() > 1:
            error.add_note(
                f"This is process {jax.process_index()} of {jax.process_count()}. If its connection was closed, "
                "another one has died, and says why in its own output: start all of them again, and the "
                "run goes on from its last checkpoint."
            )
        raise
