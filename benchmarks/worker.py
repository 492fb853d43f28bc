"""A process of its own that answers questions: what hangs, crashes or fills memory in it ends no other."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from .timing import reason


class Worker:
    """Runs `make(*args)` in a new process, then lets what that returned answer each question.

    Args:
      make: a function of a module, as are those of `args`: they are sent by name.
      args: that it takes.
      environment: variables that the process has besides this one's.

    Raises:
      RuntimeError: as `ask`.
    """

    def __init__(self, make: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None):
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, make, args), daemon=True)
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        theirs.close()
        self._receive(None)

    def ask(self, question: Any, seconds: float | None = None) -> Any:
        """The answer, if it comes within so many seconds.

        Raises:
          RuntimeError: it did not, the process ended, or the function failed; the process is then of no more use.
        """
        with contextlib.suppress(BrokenPipeError):  # `_receive` says how it ended
            self._connection.send(question)
        return self._receive(seconds)

    def close(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        self._connection.close()
        self._process.join(5)
        self._process.kill()

    def _receive(self, seconds: float | None) -> Any:
        try:
            if not self._connection.poll(seconds):
                raise RuntimeError(f"no answer within {seconds:.0f} s")
            answer = self._connection.recv()
            if isinstance(answer, str):
                raise RuntimeError(answer)
            return answer
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"the process ended with {self._process.exitcode}") from None


def _serve(connection: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        answer = make(*args)
        connection.send({})
        while True:
            connection.send(answer(connection.recv()))
    except (EOFError, BrokenPipeError):  # nobody asks any more
        return
    except Exception as error:
        connection.send(reason(error))
