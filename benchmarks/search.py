"""What a trial of a search costs beside what it must do: its wall time over that of the bare calls, in turns.

    python benchmarks/search.py --points 20 --seeds-per-point 1

Bare is: draw the calibration images, `quantize_model` (calibrate and convert), accuracy on the validation images. A
trial is all that a worker does from asking for one to the next: Optuna's storage, the run in MLflow and its values. For
each point both are timed, in random order, in one process; SmallNet on digits, in a store of its own.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qexp.config import Config, load_config
from qexp.measurement.accuracy import measure_accuracy
from qexp.search.queue import take_trial
from qexp.search.setup import look_up, set_up
from qexp.search.storage import open_place
from qexp.search.study import Params, Study, grid_of
from qexp.search.trials import Bench, do_trial, options_for, quantize_with_seed, validation_logits
from qexp.tracking import search_runs
from qexp.tracking.store import use_store


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bare(bench: Bench, params: Params) -> None:
    """The three calls, for each seed."""
    options = options_for(bench.config.quantize, bench.order, params)
    for index in range(bench.config.search.seeds_per_point):
        quantized = quantize_with_seed(bench, options, index)
        measure_accuracy(validation_logits(bench, quantized), bench.dataset.validation.labels)


def trial(study: Study, bench: Bench) -> None:
    """One trial, with asking for it."""
    taken = take_trial(study, lambda dead, again: None)
    assert taken is not None
    do_trial(study, bench, taken)


def compare(study: Study, bench: Bench) -> list[tuple[float, float]]:
    """Seconds of the bare calls and of the trial, by point; both have run once before."""
    order, found = random.Random(0), []
    bare(bench, grid_of(study.space)[0])
    trial(study, bench)
    for params in grid_of(study.space)[1:]:
        works: dict[str, Callable[[], None]] = {
            "bare": partial(bare, bench, params),
            "trial": partial(trial, study, bench),
        }
        times = {name: seconds(works[name]) for name in order.sample(list(works), 2)}
        found.append((times["bare"], times["trial"]))
        print(f"{params}: bare {times['bare']:.3f} s, trial {times['trial']:.3f} s", flush=True)
    return found


def run(config: Config) -> list[tuple[float, float]]:
    """Train, make the study, and compare; all in the current folder."""
    use_store()
    with open_place(config.search) as place:
        ready = look_up(config, place, None)
        with search_runs.study_run("Benchmark.", None, place.leave) as run_id:
            return compare(*set_up(ready, place, run_id))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seeds-per-point", type=int, default=1)
    parser.add_argument("--storage", help="postgresql://…; default: a journal file")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    counts = [str(8 * number) for number in range(1, given.points // 2 + 2)]
    search = {"sample_counts": counts, "observers": ["minmax", "histogram"], "study": f"benchmark-{time.time_ns()}"}
    search |= {"seeds_per_point": str(given.seeds_per_point)} | ({"storage": given.storage} if given.storage else {})
    options: dict[str, dict[str, Any]] = {
        "search": search,
        "train": {"epochs": "1"},
        "": {} if given.threads == "auto" else {"threads": given.threads},
    }
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        found = run(load_config(None, options))
        os.chdir("/")
    ratios = [trial / bare for bare, trial in found]
    result = {
        "points": len(found),
        "storage": "postgresql" if given.storage else "journal",
        "bare_s": statistics.median(bare for bare, _ in found),
        "trial_s": statistics.median(trial for _, trial in found),
        "overhead_s": statistics.median(trial - bare for bare, trial in found),
        "ratio_of_sums": sum(trial for _, trial in found) / sum(bare for bare, _ in found),
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }
    print(json.dumps(result, indent=2))
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
