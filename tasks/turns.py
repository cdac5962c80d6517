"""Measure sides in turns, each in a process of its own, so that a drift of the machine meets all of them."""

import contextlib
import multiprocessing
import signal


def take_turns(serve, names, steps, *arguments):
    """Let each side take `steps` timed steps in two turns, and return its entry of results, a dict.

    serve(connection, name, *arguments) is what the process of a side does. It sends {} once it is warm. For
    every number of steps that comes it takes them, and sends its entry. An entry with the key "error" says
    why there is none, or how the process died. The other sides go on then, but not without the first.
    """
    first_turn = (steps + 1) // 2
    sides = []
    try:
        for name in names:  # One after the other, so that none is warmed up beside a busy one.
            sides.append(SideProcess(serve, name, *arguments))
            sides[-1].await_answer()
            if "error" in sides[0].entry:
                break
        for turn in (first_turn, steps - first_turn):
            for side in sides:
                if turn and "error" not in sides[0].entry:
                    side.take_turn(turn)
    finally:
        for side in sides:
            side.process.kill()
            side.process.join()  # its memory is free again then
    return [side.entry for side in sides]


def failed(reason):
    """Return what stands in the entry of a side that could not be measured."""
    return {"error": reason, "tokens_per_second": None, "step_seconds": None, "peak_memory_gib": None}


class SideProcess:
    """A side in a process of its own, which is idle until it has its turn. entry: its entry of results."""

    def __init__(self, serve, name, *arguments):
        """Start the process."""
        spawning = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        self.entry = {"side": name}
        self.connection, its_end = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(its_end, name, *arguments))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it inherits: take_turns ends it
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        its_end.close()  # so that its death ends the connection

    def take_turn(self, steps):
        """Let the side take so many timed steps, unless it has failed before."""
        if "error" not in self.entry:
            with contextlib.suppress(ConnectionError):  # it has died, which await_answer finds
                self.connection.send(steps)
            self.await_answer()

    def await_answer(self):
        """Wait until the side is warm or has had its turn, or its process has died."""
        try:
            self.entry |= self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.entry |= failed(f"its process ended with code {self.process.exitcode}")
