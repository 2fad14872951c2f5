"""The latency sweep in a process of its own: `python -m qexp.sweep REQUEST.json RESULT.json`.

It loads both registered models as a user does, fixes the thread count, and does nothing else while it times them.
"""

import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from qexp.config import LatencyConfig
from qexp.errors import StageError
from qexp.evidence import from_json, to_json
from qexp.latency import LatencyResult, LatencyRow, Run, measure_latency
from qexp.progress import say


@dataclass(frozen=True)
class SweepRequest:
    """What the child process is asked: two versions, at so many threads, on images of this size in pixels."""

    fp32_uri: str
    int8_uri: str
    image_size: int
    threads: int
    options: LatencyConfig


def run_sweep(request: SweepRequest, environment: dict[str, str]) -> LatencyResult:
    """Start the child process with `environment`, wait for it, and return what it measured.

    Raises:
        StageError: the child failed; its own message is on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(to_json(request))
        command = [sys.executable, "-W", "ignore", "-m", "qexp.sweep", str(question), str(answer)]
        status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        if status != 0:
            raise StageError(
                f"the latency sweep of {request.int8_uri} failed with exit code {status}; see the lines above"
            )
        return from_json(LatencyResult, answer.read_text())


def _main(question: Path, answer: Path) -> None:
    from qexp.registry import load_version

    request = from_json(SweepRequest, question.read_text())
    torch.set_num_threads(request.threads)
    torch.set_num_interop_threads(1)
    fp32, int8 = load_version(request.fp32_uri), load_version(request.int8_uri)
    generator = torch.Generator().manual_seed(0)

    def prepare(batch_size: int) -> tuple[Run, Run]:
        shape = (batch_size, 3, request.image_size, request.image_size)
        images = torch.rand(shape, generator=generator)
        return lambda: fp32(images), lambda: int8(images)

    with torch.no_grad():
        result = measure_latency(prepare, request.options, request.threads, on_row=_say_row)
    answer.write_text(to_json(result))


def _say_row(row: LatencyRow) -> None:
    say(
        f"latency at batch size {row.batch_size}: fp32 {row.fp32.p50_ms:.2f} ms, int8 {row.int8.p50_ms:.2f} ms, "
        f"speed-up {row.speedup:.2f}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process without a word; its parent has the last one
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
