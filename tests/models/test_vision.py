"""torchvision imports beside a CPU build of torch, and its classifiers are there."""

import subprocess
import sys


def test_import_in_a_fresh_process() -> None:
    code = "from qexp.models.vision import torchvision; assert 'vgg16' in torchvision.models.list_models()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
