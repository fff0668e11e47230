"""`jaxpar launch`: several processes of one program on this machine, started together and ended together."""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

from jaxpar.usage import UsageError

# As in jaxpar.distributed, which would import JAX.
_ADDRESS, _COUNT, _INDEX = "JAXPAR_ADDRESS", "JAXPAR_PROCESSES", "JAXPAR_PROCESS"
_LAUNCHER = "JAXPAR_LAUNCHER"
_GRACE_SECONDS = 10
# Of a process that has saved and left after a SIGTERM.
_ASKED = 143


def launch(options: argparse.Namespace) -> int:
    """Returns 0 once all processes have ended well; else the exit code of the first that didn't, after ending the rest.

    Raises:
      UsageError: there is no such program.
    """
    command = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not command:
        raise UsageError("There is nothing to launch; give a program after --, as -- python train.py.")
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]!r} is no program that can be run; give one after --, as -- python train.py.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = {_ADDRESS: address, _COUNT: str(options.processes), _LAUNCHER: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **told, _INDEX: str(index)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A signal from the terminal comes once, from here.
            start_new_session=True,
        )
        for index in range(options.processes)
    ]
    readers = [threading.Thread(target=_prefix, args=(index, one.stdout)) for index, one in enumerate(processes)]
    for reader in readers:
        reader.start()
    before = {
        number: signal.signal(number, _passer(processes)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        failed = _wait(processes)
    finally:
        for one in processes:
            _signal(one, signal.SIGKILL)
        for reader in readers:
            # What a process has left running may hold its output open.
            reader.join(2)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed is None:
        return 0
    # Last, as the others' own words on it are many.
    print(
        f"jaxpar: process {failed} ended {_how(processes[failed])}, and all with it; what it said is above. Run the "
        "same command again to go on from the latest checkpoint, if it saves any.",
        file=sys.stderr,
        flush=True,
    )
    return _code_of(processes[failed])


def _passer(processes: list[subprocess.Popen[bytes]]) -> signal.Handlers:
    def pass_on(number: int, frame: object) -> None:
        for one in processes:
            if one.poll() is None:
                _signal(one, number)

    return pass_on  # pyright: ignore[reportReturnType]


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all have ended, or one ended badly: then the others are asked to, and after a while made to.

    Returns which it was, None where none did.
    """
    while any(one.poll() is None for one in processes):
        if (failed := _find_failed(processes)) is not None:
            how = _how(processes[failed])
            print(f"jaxpar: process {failed} ended {how}; the others are ended too", file=sys.stderr, flush=True)
            if processes[failed].returncode == _ASKED:
                # The others have agreed to stop at the same step; a second SIGTERM would end them before they save.
                _wait_for(processes)
            _end(processes)
            return failed
        time.sleep(0.05)
    return _find_failed(processes)


def _find_failed(processes: list[subprocess.Popen[bytes]]) -> int | None:
    return next((index for index, one in enumerate(processes) if one.poll() not in (None, 0)), None)


def _how(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def _code_of(process: subprocess.Popen[bytes]) -> int:
    """A process's exit code as a shell tells it: 128 and the signal's number, where one ended it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for one in processes:
        if one.poll() is None:
            _signal(one, signal.SIGTERM)
    _wait_for(processes)
    for one in processes:
        # A stopped process takes no other signal.
        _signal(one, signal.SIGKILL)
        one.wait()


def _wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    """Waits until all have ended, at most as long as they are given."""
    end = time.monotonic() + _GRACE_SECONDS
    while any(one.poll() is None for one in processes) and time.monotonic() < end:
        time.sleep(0.05)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _prefix(index: int, stream: IO[bytes] | None) -> None:
    for line in stream or ():
        # Nobody may read it any more; the process must still be able to write.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(b"[%d] " % index + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()
    if stream is not None:
        stream.close()
