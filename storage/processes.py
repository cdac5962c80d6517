"""What torchrun tells each process of a run: which one it is, and of how many.

This is in the environment, and so known before there is a process group. All of it counts only where RANK is
set: else there is one process, whatever a scheduler or another program has left there.
"""

import os

GROUP = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a process group needs beside RANK


def is_distributed():
    """Return whether this process was started as one of a run's, be they one or many."""
    return "RANK" in os.environ


def missing_variables():
    """Return the names of the variables of GROUP that are not set, a list."""
    return [name for name in GROUP if name not in os.environ]


def is_process_0():
    """Return whether this is the first process of the run."""
    return os.environ.get("RANK", "0") == "0"


def world_size():
    """Return how many processes the run has."""
    return _number("WORLD_SIZE", 1)


def local_rank():
    """Return the number of this process among those on its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def local_world_size():
    """Return how many processes the run has on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def is_under_torchrun():
    """Return whether torchrun itself waits for this process: it passes signals on, and ends all if one ends.

    RANK may come from another launcher, too.
    """
    return is_distributed() and "TORCHELASTIC_RUN_ID" in os.environ


def restarts():
    """Return how often torchrun has started the run again (--max_restarts) after a process had died."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def _number(name, without):
    """Return the whole number that a variable holds, or `without` where it is not set or does not count."""
    return int(os.environ.get(name, without)) if is_distributed() else without
