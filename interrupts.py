"""Ctrl-C on the command line: from the first import on it ends the process with exit code 130 and one line.

The package imports this module first. When it is the command that imports the package, Ctrl-C ends the imports, which
have nothing to clean up. Later it raises KeyboardInterrupt, as ever; but a main thread inside XLA's compiler, or any
other call that does not return to Python, hears no signals: one that has not after a second is ended from outside.
"""

import contextlib
import functools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
"""The exit code: 128 and the number of SIGINT, as shells have it."""

_GRACE = 1.0  # seconds
_patient = threading.Event()  # set within `ctrl_c`, where work goes on after the first Ctrl-C


def line() -> str:
    """What is said; on a terminal it takes the place of a progress bar, which may have hidden the cursor."""
    return ("\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else "") + "ridgeline: interrupted"


def leave(signum: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    """End the process at once, threads that compile included."""
    with contextlib.suppress(OSError):  # whoever read it has gone
        os.write(2, f"{line()}\n".encode())  # which works within whatever is being written
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, and ends the process where that is not heard. For the command's main thread."""
    signal.set_wakeup_fd(_sockets()[1].fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, name="ridgeline-ctrl-c", daemon=True).start()
    signal.signal(signal.SIGINT, _raise)
    yield
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done but to end


def _raise(signum: int, frame: FrameType | None) -> NoReturn:
    _hear()
    raise KeyboardInterrupt


@functools.cache
def _sockets() -> tuple[socket.socket, socket.socket]:
    """What comes into the second, a byte a signal, stays in the first until Python handles the signal."""
    sockets = socket.socketpair()
    for end in sockets:
        end.setblocking(False)
    return sockets


def _hear(flags: int = 0) -> int:
    """How many Ctrl-C were not handled before."""
    try:
        return _sockets()[0].recv(64, flags).count(signal.SIGINT)
    except BlockingIOError:
        return 0


def _watch() -> NoReturn:
    while True:
        select.select([_sockets()[0]], [], [])
        time.sleep(_GRACE)
        if _hear(socket.MSG_PEEK) > _patient.is_set():
            leave()


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that it ends the work between two programs and not inside one; a second raises."""
    pressed = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        _hear()
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    _patient.set()
    try:
        yield pressed
    finally:
        _patient.clear()
        signal.signal(signal.SIGINT, previous)


def _is_command() -> bool:
    """Whether it is the `ridgeline` command, or `python -m ridgeline`, that imports the package."""
    started = Path(sys.argv[0]).stem if sys.argv else ""
    return started == "ridgeline" or (started == "-m" and "ridgeline" in sys.orig_argv)


if _is_command() and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, leave)
