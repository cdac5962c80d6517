"""What is known of a run's processes before it starts is what torch's process group then says."""

import pytest
import torch.distributed as dist

import fsdp
from storage import processes

TOLD = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_one_of_several_processes(monkeypatch):
    told = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}
    by_torchrun = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 2}
    for name, value in (told | by_torchrun).items():
        monkeypatch.setenv(name, str(value))
    assert processes.is_distributed() and processes.is_under_torchrun() and not processes.is_process_0()
    assert (processes.world_size(), processes.local_rank(), processes.local_world_size()) == (8, 1, 4)
    assert processes.restarts() == 2
    assert processes.missing_variables() == ["MASTER_ADDR", "MASTER_PORT"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "8"},
        {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"},
        {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2", "WORLD_SIZE": "8"},
        TOLD | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"},
    ],
    ids=lambda environment: ", ".join(environment) or "nothing",
)
def test_the_process_group_agrees(monkeypatch, environment):
    """Also where something else has set some of torchrun's variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = processes.is_process_0(), processes.world_size()
    fsdp.start("cpu")
    try:
        assert said == (dist.get_rank() == 0, dist.get_world_size())
        assert (processes.local_rank(), processes.local_world_size()) == (0, 1)  # all are on this machine
        assert processes.restarts() == 0 and not processes.is_under_torchrun()
    finally:
        dist.destroy_process_group()
