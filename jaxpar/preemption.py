"""Being asked to end: a SIGTERM is noticed at once, and obeyed when the state is safe; changes with how hosts ask."""

import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

import jax

CODE = 143  # what a shell tells of a process that SIGTERM ended: 128 + 15

# JAX stops all processes at the number after the highest that any has given it, 0 before the first: a run that goes on
# from step 90 and gives its steps never sees 1. Nor may numbers go back, as steps do after a loss that is no number.
_asked_before = itertools.count(1)


class Preemption:
    """Notices SIGTERM while it is open; a second one ends the process at once.

    In many processes JAX notices it itself, and all of them learn at which step to stop: the one after that which they
    are at, so that a compile or an evaluation comes to its end first. In one, a thread of its own notices it even while
    the main thread compiles: if nothing would be lost, the process ends there and then. Outside the main thread, where
    Python takes no signals, nothing is noticed.

    >>> with Preemption() as preemption:
    ...     preemption.asked()
    False
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._is_safe = False
        self._all_stop = False
        self._before: Any = None
        self._wakeup = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() > 1:
            _end_at_the_second()
        elif threading.current_thread() is threading.main_thread():
            self._sockets = socket.socketpair()
            self._sockets[1].setblocking(False)
            self._before = signal.signal(signal.SIGTERM, self._handle)
            # Python runs handlers between its own instructions alone; a number is written here the moment one comes.
            self._wakeup = signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._sockets[0],), daemon=True).start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._sockets is not None:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._before)
            # The watcher wakes up from its read, and closes its own end.
            self._sockets[1].close()
            self._sockets = None
            if kind is None and self._asked.is_set():
                # It came when all was done.
                raise SystemExit(CODE)

    def asked(self) -> bool:
        """Returns whether to stop after this step: the same answer in every process, which all ask as often."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self._all_stop |= multihost_utils.reached_preemption_sync_point(next(_asked_before))
            return self._all_stop
        return self._asked.is_set()

    def nothing_to_lose(self, value: bool) -> None:
        """Tells whether the process may end at once: while it compiles, or evaluates a state that is saved.

        Raises:
          SystemExit: it may, and was asked to.
        """
        self._is_safe = value
        if value and self._asked.is_set():
            raise SystemExit(CODE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _watch(self, reader: socket.socket) -> None:
        noticed = 0
        with reader:
            while received := reader.recv(1):
                noticed += received[0] == signal.SIGTERM
                if noticed:
                    self._asked.set()
                # The main thread may be where it takes no second one.
                if noticed > 1 or (noticed and self._is_safe):
                    os._exit(CODE)


def _end_at_the_second() -> None:
    """Leaves the first SIGTERM to JAX's handler, which is C++ and ignores any other, and the second to the default.

    Of C libraries glibc alone can set a handler for one signal and tell the one before; elsewhere a second is ignored.
    """
    once = getattr(ctypes.CDLL(None), "sysv_signal", None) if sys.platform == "linux" else None
    if once is None:
        return
    once.restype, once.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    once(signal.SIGTERM, once(signal.SIGTERM, None))
    # As before: gloo's and gRPC's system calls go on after a signal.
    signal.siginterrupt(signal.SIGTERM, False)
