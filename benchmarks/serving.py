"""Latency through the served endpoint: `mlflow models serve` of an int8 version and of the fp32 version it came from.

    python benchmarks/serving.py --model-uri models:/smallnet-digits-int8@champion --output results/serving.json

Both servers run as a user starts them, one worker each, with the same number of threads; one of them is asked at a
time, in turns, round by round. Each client is a thread with a connection of its own that sends the same body (JSON, as
`json.dumps` writes it) again as soon as it has the answer. `share_outside_percent` is what is left of the median at one
client when that of the same call in process (`mlflow.pyfunc`, on an array) is taken off: HTTP, JSON, threads.
Clients and server share the machine's cores. Prints a table, then one line of JSON; `--output FILE` writes it there.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import numpy as np
import torch

from qexp.measurement.host import read_host
from qexp.tracking import registry
from qexp.tracking.store import use_store

KINDS = ("fp32", "int8")
START_SECONDS, WARM_UP_REQUESTS = 120, 5


@dataclass(frozen=True)
class Figures:
    """Of one version at one number of clients: p50 and pace are medians of the rounds, p99 is of all requests."""

    p50_ms: float
    p99_ms: float
    images_per_s: float
    requests: int


@dataclass(frozen=True)
class Row:
    """Both versions, and int8 over fp32, above 1 where int8 is faster: median, lowest and highest of the rounds."""

    batch_size: int
    clients: int
    fp32: Figures
    int8: Figures
    speedup_p50: tuple[float, float, float]
    more_images_per_s: tuple[float, float, float]


@dataclass(frozen=True)
class InProcess:
    """The same call without a server, and the share of the served median, one client, that it does not explain."""

    batch_size: int
    fp32_ms: float
    int8_ms: float
    fp32_share_outside_percent: float | None
    int8_share_outside_percent: float | None


@contextmanager
def server(uri: str, threads: int, folder: Path) -> Iterator[int]:
    """The port of a server of the version, which is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = registry.child_environment(threads) | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    command = ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--port", str(port)]
    log = folder / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=own, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server of {uri} does not answer:\n{log.read_text()}")
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False


def ask(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Seconds from the request to the end of the answer."""
    started = time.perf_counter()
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"the server answers {answer.status}: {text[:500]!r}")
    return time.perf_counter() - started


def load(port: int, body: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every request of so many clients at once, and the seconds that all of them took."""
    start = threading.Barrier(clients + 1, timeout=60)

    def client() -> list[float]:
        connection, own = http.client.HTTPConnection("127.0.0.1", port, timeout=60), list[float]()
        connection.connect()
        start.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not own:
            own.append(ask(connection, body))
        connection.close()
        return own

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        start.wait()
        started = time.perf_counter()
        times = [took for one in running for took in one.result()]
        return times, time.perf_counter() - started


def measure(ports: dict[str, int], images: np.ndarray, clients: int, rounds: int, seconds: float) -> Row:
    """One row: the servers in turns, each of them first in every other round."""
    body = json.dumps({"inputs": images.tolist()}).encode()
    pooled: dict[str, list[float]] = {kind: [] for kind in KINDS}
    p50: dict[str, list[float]] = {kind: [] for kind in KINDS}
    pace: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            warm = http.client.HTTPConnection("127.0.0.1", ports[kind], timeout=60)
            for _ in range(WARM_UP_REQUESTS):
                ask(warm, body)
            warm.close()
            times, took = load(ports[kind], body, clients, seconds)
            pooled[kind] += times
            p50[kind].append(1000 * statistics.median(times))
            pace[kind].append(len(times) * len(images) / took)
    figures = {
        kind: Figures(
            statistics.median(p50[kind]),
            float(1000 * np.percentile(pooled[kind], 99)),
            statistics.median(pace[kind]),
            len(pooled[kind]),
        )
        for kind in KINDS
    }
    faster = spread([one / other for one, other in zip(p50["fp32"], p50["int8"], strict=True)])
    more = spread([one / other for one, other in zip(pace["int8"], pace["fp32"], strict=True)])
    return Row(len(images), clients, figures["fp32"], figures["int8"], faster, more)


def spread(ratios: list[float]) -> tuple[float, float, float]:
    return statistics.median(ratios), min(ratios), max(ratios)


def in_process(uris: dict[str, str], images: np.ndarray, rounds: int, rows: list[Row]) -> InProcess:
    """Both versions loaded as the servers load them, in turns of 20 calls."""
    models: dict[str, Callable[[np.ndarray], object]] = {
        kind: mlflow.pyfunc.load_model(uri).predict for kind, uri in uris.items()
    }
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind in KINDS:
            for _ in range(20):
                started = time.perf_counter()
                models[kind](images)
                if number:
                    times[kind].append(1000 * (time.perf_counter() - started))
    took = {kind: statistics.median(times[kind]) for kind in KINDS}
    served = next((row for row in rows if row.batch_size == len(images) and row.clients == 1), None)
    share = {kind: 100 * (1 - took[kind] / getattr(served, kind).p50_ms) if served else None for kind in KINDS}
    return InProcess(len(images), took["fp32"], took["int8"], share["fp32"], share["int8"])


def show(rows: list[Row], alone: list[InProcess]) -> None:
    print(f"{'images':>6} {'clients':>7} {'fp32 p50, p99 ms':>20} {'int8 p50, p99 ms':>20}", end=" ")
    print(f"{'fp32 /s':>8} {'int8 /s':>8} {'p50, int8 faster by':>26} {'images/s':>7}")
    for row in rows:
        times = [f"{found.p50_ms:9.2f} {found.p99_ms:10.2f}" for found in (row.fp32, row.int8)]
        faster = "{:.2f}x ({:.2f} to {:.2f})".format(*row.speedup_p50)
        pace = f"{row.fp32.images_per_s:8.0f} {row.int8.images_per_s:8.0f}"
        print(
            f"{row.batch_size:6} {row.clients:7} {' '.join(times)} {pace} {faster:>26} {row.more_images_per_s[0]:6.2f}x"
        )
    for found in alone:
        for kind in KINDS:
            share = getattr(found, f"{kind}_share_outside_percent")
            outside = f", {share:.1f} % of the time of a request is outside" if share is not None else ""
            print(f"{found.batch_size} images in process, {kind}: {getattr(found, f'{kind}_ms'):.2f} ms{outside}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model-uri", default="models:/smallnet-digits-int8@champion", help="an int8 version")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--batch-sizes", default="1,64", help="images a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, for each version, row and round")
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        help="of torch in each server; default: one a core, as ONNX Runtime always has",
    )
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # torch and MLflow announce the successors of TorchScript
    use_store()
    host = read_host(given.threads)
    torch.set_num_threads(host.threads)
    int8 = registry.find_version(given.model_uri, "int8")
    uris = {"fp32": int8.tags["fp32_uri"], "int8": f"models:/{int8.name}/{int8.version}"}
    size = int(int8.tags["image_size"])
    random = np.random.default_rng(0)
    batches = [random.random((int(count), 3, size, size), dtype=np.float32) for count in given.batch_sizes.split(",")]
    clients = [int(count) for count in given.clients.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server(uris["fp32"], host.threads, folder) as one, server(uris["int8"], host.threads, folder) as other:
            ports = {"fp32": one, "int8": other}
            rows = [
                measure(ports, images, count, given.rounds, given.seconds) for images in batches for count in clients
            ]
    alone = [in_process(uris, images, given.rounds, rows) for images in batches]
    show(rows, alone)
    facts = {"engine": int8.tags["engine"], "workers": 1, "rounds": given.rounds, "seconds_a_round": given.seconds}
    result = {"versions": uris, **facts, "host": asdict(host), "wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    text = json.dumps(result | {"rows": [asdict(row) for row in rows], "in_process": [asdict(one) for one in alone]})
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
