"""Joining many processes into one program: who is the first, who am I; changes with `jax.distributed`."""

import contextlib
import os
import re
import sys
import threading
import time
from typing import Any

import jax

from jaxpar.integers import is_integer

# What `jaxpar launch` tells each process that it starts.
ADDRESS, COUNT, INDEX = "JAXPAR_ADDRESS", "JAXPAR_PROCESSES", "JAXPAR_PROCESS"
LAUNCHER = "JAXPAR_LAUNCHER"


class DistributedError(RuntimeError):
    """Processes that can't be joined: the message says what is missing, or who didn't answer."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    coordinator_bind_address: str | None = None,
    heartbeat_timeout_seconds: int = 30,
) -> tuple[int, int]:
    """Returns this process's id and how many there are, all joined; call it before anything else of JAX.

    It is `jax.distributed.initialize`, with its names, that listens where it is told to and gives up sooner.

    Under `jaxpar launch`, on Cloud TPU, and under Slurm, MPI or Kubernetes, where JAX finds the others by itself, it
    takes no arguments. Elsewhere give all three, alike in all processes but for `process_id`. Alone, without
    arguments, it does nothing; told that it is one of one, as by `jaxpar launch -n 1`, it gives the bits of several.
    Once all have joined, one that is dead or hangs ends all others within the heartbeat and ten seconds.

    The first process listens at its address alone, where JAX by itself would at every one that the host has. There is
    no authentication: whoever reaches that port can end the job. Keep it inside of your own network.

    Args:
      coordinator_address: of the first process, as `10.0.0.1:1234`; its port is free.
      num_processes: how many.
      process_id: which of them this is, from 0.
      coordinator_bind_address: where the first process listens, if not at `coordinator_address`.
      heartbeat_timeout_seconds: seconds of silence after which a process is given up, and the others end.

    Raises:
      DistributedError: some but not all of the three are given, one can't be, or the others didn't answer.

    >>> initialize()
    (0, 1)
    """
    beat = heartbeat_timeout_seconds
    if not is_integer(beat):
        raise DistributedError(f"heartbeat_timeout_seconds is {beat!r}; give whole seconds, 1 or more.")
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    if ADDRESS in os.environ and not any(value is not None for value in given.values()):
        given = dict(zip(given, _read_launched(), strict=True))
        if LAUNCHER in os.environ:
            threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return _join_detected(beat)
    if missing:
        raise DistributedError(f"{', '.join(missing)} is missing: give {', '.join(given)}, or none of them.")
    address, count, index = given.values()
    return _join(address, count, index, coordinator_bind_address, int(beat))


def _read_launched() -> tuple[str, int, int]:
    """What the launcher told this process."""
    told = [os.environ.get(name, "") for name in (ADDRESS, COUNT, INDEX)]
    if not (told[1].isdecimal() and told[2].isdecimal()):
        raise DistributedError(
            f"{ADDRESS} is set, but {COUNT} is {told[1]!r} and {INDEX} is {told[2]!r}; set all of them, or none."
        )
    return told[0], int(told[1]), int(told[2])


def _join(address: Any, count: Any, index: Any, bind: str | None, heartbeat: int) -> tuple[int, int]:
    address = str(address)
    if not re.fullmatch(r"[^\s:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", address):
        raise DistributedError(f"coordinator_address is {address!r}; give a host and a port, as '10.0.0.1:1234'.")
    if not is_integer(count):
        raise DistributedError(f"num_processes is {count!r}; give a whole number, 1 or more.")
    if not is_integer(index, least=0) or index >= count:
        raise DistributedError(
            f"process_id is {index!r}; of {count} processes give a whole number from 0 to {count - 1}."
        )
    count, index = int(count), int(index)
    _check_unused()
    if count == 1:
        # Joined all the same: on a CPU it then adds by gloo, in the order in which several do, and so gives their bits.
        # But a SIGTERM ends it, as it does any process that is alone.
        jax.config.update("jax_enable_preemption_service", False)
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
        if "before any JAX" in str(error):
            raise DistributedError(
                f"Process {index} of {count} has used JAX already, as jax.devices() does; call jaxpar.initialize "
                "before anything else of JAX."
            ) from error
        raise DistributedError(
            f"Process {index} of {count} could not join at {address}: {str(error)[:300]}. Do all of them "
            "run, with the same coordinator_address and num_processes, and can they reach it?"
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
            # Its end of the pipe may be gone with it.
            with contextlib.suppress(OSError):
                print(
                    f"jaxpar: the launcher, process {launcher}, is gone: this one ends too.",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(1)
        time.sleep(1)


def _check_unused() -> None:
    if jax.distributed.is_initialized():
        raise DistributedError("The processes are joined already; call jaxpar.initialize once.")
