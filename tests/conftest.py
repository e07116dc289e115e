"""Several processes in a test: `processes(world, function, *arguments)` → each process's answer."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tests are small; threads of several processes would wait for each other
multiprocessing.set_forkserver_preload(["torch._dynamo", "tokenizers", "PIL.Image"])  # imported once, for all processes


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, or gigabytes; runs with -m slow only")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def _start(rank, world, port, group, function, arguments, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if group:
        dist.init_process_group("gloo")
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    def run(world, function, *arguments, group=True):
        """group: there is a process group when function starts; else it makes one itself, as a script does."""
        folder = tmp_path_factory.mktemp("processes")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = (world, port, group, function, arguments, str(folder))
        mp.start_processes(_start, started, nprocs=world, start_method="forkserver")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"needs the data beside the checkout ({SHARED.name}/ is not there)")
    return SHARED
