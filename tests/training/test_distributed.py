"""Several processes: shares of a batch, and batch norm and dropout as one process has them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from forked import start_python

from qexp.training.distributed import Group, joined, read_group, shared, threads_each

PARITY = """
import sys, torch
from torch import nn
from qexp.training.distributed import joined, shared
torch.set_num_threads(1)
torch.manual_seed(0)
layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(288, 5)
network = nn.Sequential(*layers).double()
images, labels = torch.rand(7, 3, 8, 8, dtype=torch.double), torch.randint(0, 5, (7,))  # 7: 4 and 3
with joined("cpu") as group, shared(network, group, "cpu") as module:
    for _ in range(3):
        group.batch_size = len(images)
        share = slice(group.rank, None, group.size)
        loss = nn.functional.cross_entropy(module(images[share]), labels[share])
        (loss * len(labels[share]) * group.size / len(images)).backward()
    if group.leads:
        state = dict(network.state_dict()) | {f"{n}.grad": p.grad for n, p in network.named_parameters()}
        torch.save(state, sys.argv[1])
    del module, loss
"""


def test_two_processes_have_the_gradients_and_statistics_of_one(tmp_path: Path) -> None:
    """Real processes, and real torchrun; the one is a fork."""
    script = tmp_path / "parity.py"
    script.write_text(PARITY)
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    alone = start_python(tmp_path, ("-c", PARITY, str(tmp_path / "one.pt")), environment)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command = [sys.executable, *launch, str(tmp_path / "two.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert alone.wait() == 0, alone.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 15
    for name in one:
        assert torch.allclose(one[name].double(), two[name].double(), rtol=1e-9, atol=1e-12), name
    assert one["0.weight.grad"].abs().max() > 1e-3


def test_alone_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    module = torch.nn.BatchNorm1d(3)
    with joined("cpu") as group, shared(module, group, "cpu") as same:
        assert same is module and "forward" not in vars(module)
        assert group == read_group() == Group(0, 1, 1) and group.leads
        values = torch.tensor([1.0, 2.0], dtype=torch.float64)
        assert torch.equal(group.total(values), values) and group.from_leader("x") == "x"


def test_group_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    group = read_group()
    assert group == Group(3, 4, 2) and not group.leads


@pytest.mark.parametrize(("threads", "local", "each"), [(4, 2, 2), (3, 2, 1), (1, 2, 1), (2, 1, 2)])
def test_processes_of_a_machine_share_its_threads(threads: int, local: int, each: int) -> None:
    assert threads_each(threads, Group(0, local, local)) == each
