"""torchvision imports beside a CPU build of torch, and its classifiers are there, also in a process that only unpickles
one, as that of the latency sweep does."""

import subprocess
import sys
from pathlib import Path

import torch

from qexp.models.vision import torchvision


def test_a_pickled_network_in_a_fresh_process(tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1(), tmp_path / "module.pt")
    code = (
        "import sys; from pathlib import Path; from qexp.models.stored import load_module\n"
        "assert type(load_module(Path(sys.argv[1]))).__name__ == 'SqueezeNet'\n"
        "from qexp.models.vision import torchvision; assert 'vgg16' in torchvision.models.list_models()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "module.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
