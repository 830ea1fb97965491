"""A process that runs functions one at a time and is replaced when one of them hangs or takes it down.

A kernel that never ends cannot be stopped from within, and one that reads out of bounds breaks its whole process's CUDA
context: neither may cost the other figures of a run.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection


class WorkerDied(RuntimeError):
    """The function did not come back."""


class Worker:
    def __init__(self):
        self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def call(self, function: Callable, *args, seconds: float):
        """function(*args), pickled there and back. Raises WorkerDied after `seconds`, or where the process ends."""
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            self._pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
        try:
            self._pipe.send((function, args))
            if self._pipe.poll(seconds):
                return self._pipe.recv()
            reason = f"no answer in {seconds:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            reason = f"its process ended with code {self._process.exitcode}"
        self.end()
        raise WorkerDied(reason)

    def end(self) -> None:
        """Stop the process, whatever it does; the next call starts another."""
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args))
