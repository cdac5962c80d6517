"""What torchrun tells each process of a run: which one it is, and of how many.

This is in the environment, and so known before there is a process group. Without torchrun there is one
process.
"""

import os


def is_process_0():
    """Return whether this is the first process of the run."""
    return os.environ.get("RANK", "0") == "0"


def world_size():
    """Return how many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    """Return the number of this process among those on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size():
    """Return how many processes the run has on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
