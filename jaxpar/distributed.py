"""Joining many processes into one program: who is the first, who am I; changes with `jax.distributed`."""

import os
import re
import threading
import time

import jax

# What `jaxpar launch` tells each process that it starts.
ADDRESS, COUNT, INDEX = "JAXPAR_ADDRESS", "JAXPAR_PROCESSES", "JAXPAR_PROCESS"
LAUNCHER = "JAXPAR_LAUNCHER"


class DistributedError(RuntimeError):
    """Processes that can't be joined: the message says what is missing, or who didn't answer."""


def initialize(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    bind: str | None = None,
    heartbeat: int = 30,
) -> tuple[int, int]:
    """Returns `(index, count)` of this process, joined with the others; call it before anything else of JAX.

    Under `jaxpar launch`, on Cloud TPU, and under Slurm, MPI or Kubernetes, where JAX finds the others by itself, it
    takes no arguments. Elsewhere give all three, alike in all processes but for the index. In one process of its own it
    does nothing. Once all have joined, one that is dead or hangs ends all others within the heartbeat and ten seconds.

    The first process listens at its address alone, where JAX by itself would at every one that the host has. There is
    no authentication: whoever reaches that port can end the job. Keep it inside of your own network.

    Args:
      address: of the first process, as `10.0.0.1:1234`; its port is free.
      count: how many processes.
      index: which of them this is, from 0.
      bind: where the first process listens, if not at `address`.
      heartbeat: seconds of silence after which a process is given up, and the others end.

    Raises:
      DistributedError: some but not all of the three are given, one can't be, or the others didn't answer.

    >>> initialize()
    (0, 1)
    """
    if isinstance(heartbeat, bool) or not isinstance(heartbeat, int) or heartbeat < 1:
        raise DistributedError(f"heartbeat is {heartbeat!r}; give whole seconds, 1 or more.")
    given = {"address": address, "count": count, "index": index}
    if ADDRESS in os.environ and not any(value is not None for value in given.values()):
        if COUNT not in os.environ or INDEX not in os.environ:
            raise DistributedError(f"{ADDRESS} is set, but not {COUNT} and {INDEX}; set all of them, or none.")
        address, count, index = os.environ[ADDRESS], int(os.environ[COUNT]), int(os.environ[INDEX])
        given = {"address": address, "count": count, "index": index}
        if LAUNCHER in os.environ:
            threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return _join_detected(heartbeat)
    if missing:
        raise DistributedError(f"{', '.join(missing)} is missing: give address, count and index, or none of them.")
    return _join(str(address), count, index, bind=bind, heartbeat=heartbeat)


def _join(address: str, count: object, index: object, *, bind: str | None, heartbeat: int) -> tuple[int, int]:
    if not re.fullmatch(r"[^\s:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", address):
        raise DistributedError(f"address is {address!r}; give a host and a port, as '10.0.0.1:1234'.")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DistributedError(f"count is {count!r}; give a whole number, 1 or more.")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise DistributedError(f"index is {index!r}; of {count} processes give a whole number from 0 to {count - 1}.")
    if count == 1:
        return 0, 1
    _check_unused()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            coordinator_bind_address=bind or address,
            heartbeat_timeout_seconds=heartbeat,
            cluster_detection_method="deactivate",
        )
    except Exception as error:
        raise DistributedError(
            f"Process {index} of {count} could not join at {address}: {str(error)[:300]}. Do all of them "
            "run, with the same address and count, and can they reach it?"
        ) from error
    return index, count


def _join_detected(heartbeat: int) -> tuple[int, int]:
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    except (ValueError, RuntimeError) as error:
        if not _is_in_cluster():
            # This process is alone.
            return 0, 1
        raise DistributedError(
            f"This process is one of several, but could not join the others: {error} Call jaxpar.initialize before "
            "anything else of JAX."
        ) from error
    return jax.process_index(), jax.process_count()


def _is_in_cluster() -> bool:
    """Whether the environment tells of several processes: of Slurm, MPI, Cloud TPU or Kubernetes."""
    told = os.environ.get
    counts = (told(name, "") for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    hosts = told("TPU_WORKER_HOSTNAMES", "")
    return (
        any(count.isdecimal() and int(count) > 1 for count in counts)
        or "," in hosts
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or "JOB_COMPLETION_INDEX" in os.environ
    )


def _end_with(launcher: int) -> None:
    """Ends this process once the one that launched it is gone: it could no longer end it with the others."""
    while True:
        try:
            os.kill(launcher, 0)
        except OSError:
            os._exit(1)
        time.sleep(1)


def _check_unused() -> None:
    if jax.distributed.is_initialized():
        raise DistributedError("The processes are joined already; call jaxpar.initialize once.")
