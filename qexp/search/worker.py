"""One worker of a study: takes trials until all are done, its own and those that other workers have left."""

import time

import optuna

from qexp.config import flat_params
from qexp.errors import first_line
from qexp.progress import say
from qexp.report.results import SearchPoint
from qexp.search import queue, runs
from qexp.search.study import Params, Study, known_point
from qexp.search.trials import Bench, measure_point, options_for
from qexp.tracking import runs as tracking

WAIT_S = 1.0  # between two looks at what other workers are at


def do_trials(study: Study, bench: Bench) -> None:
    """Return when no trial of the study waits or runs, with whoever: one whose worker dies comes back to the queue."""
    waiting = False
    while True:
        if trial := queue.take_trial(study, _end_run_of):
            _do_trial(study, bench, trial)
            waiting = False
        elif left := queue.open_trials(study):
            if not waiting:
                say(f"no trial is waiting; {left} running on other workers (repeated here if one dies)")
            waiting = True
            time.sleep(WAIT_S)
        else:
            return


def _do_trial(study: Study, bench: Bench, trial: optuna.Trial) -> None:
    """A trial that fails is failed, in MLflow and in the study, and that is all; what else happens ends the worker."""
    failed = False
    try:
        params = queue.suggest(study, trial)
        with (
            queue.alive(study, trial),
            tracking.start_run(f"trial-{trial.number:03d}", _in_words(params)) as run_id,
        ):
            trial.set_user_attr("run_id", run_id)
            with runs.logging_params(run_id, _params_of_run(bench, params)):
                try:
                    point = known_point(study, params) or measure_point(bench, params)
                except Exception:  # whatever a library raises: of this way to quantize, not of the study
                    failed = True
                    raise
            runs.log_point(run_id, point, bench.config.seed)
    except BaseException as error:
        if not failed or not isinstance(error, Exception):
            queue.give_back(study, trial)
            raise
        say(f"trial {trial.number}: {_in_words(params)} failed: {first_line(error)}")
        queue.fail(study, trial, f"{type(error).__name__}: {error}"[:500])
        return
    if queue.finish(study, trial, point):
        say(f"trial {trial.number}: {_in_words(params)}: {_found(point)}")
    else:
        runs.end_as_killed(run_id, "missed heartbeats: the trial was given to another worker")
        say(f"trial {trial.number}: was given to another worker after missed heartbeats")


def _end_run_of(trial: optuna.trial.FrozenTrial) -> None:
    stopped = "stopped" in trial.user_attrs
    if "run_id" in trial.user_attrs and not stopped:
        worker = trial.user_attrs.get("worker", "unknown")
        say(f"trial {trial.number}: its worker {worker} is gone; it is done again")
        runs.end_as_killed(trial.user_attrs["run_id"], f"its worker {worker} is gone; the trial is done again")


def _params_of_run(bench: Bench, params: Params) -> dict[str, object]:
    """The options of quantization, as other runs have them; what else there is, the parent has."""
    quantize = options_for(bench.config.quantize, bench.order, params)
    flat = flat_params(bench.config.model_copy(update={"quantize": quantize}))
    named = {name: value for name, value in flat.items() if name.startswith("quantize.")}
    return named | {"fp32_layers": params["fp32_layers"], "worker": queue.worker_name()}


def _in_words(params: Params) -> str:
    scale, layers = params["weight_scale"], params["fp32_layers"]
    words = f"{params['calibration_samples']} calibration images, {params['observer']}, {params['engine']}"
    words += f", a weight scale a {scale}" if scale == "layer" else ""
    return words + (f", {layers} layers in fp32" if layers else "")


def _found(point: SearchPoint) -> str:
    text = f"validation top-1 {point.top1_percent:.2f} %"
    if point.speedup:
        text += f", {point.latency_p50_ms:.3f} ms ({point.speedup.median:.2f}x faster than fp32)"
    return text + (f", {point.size_bytes / 1e6:.3f} MB" if point.size_bytes else "")
