"""All of Optuna: which calibration sample count, and observer, is enough? Judged on validation images alone."""

import hashlib
import statistics
import tempfile
import warnings
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from qexp import metrics, pipeline, plots, registered, registry, stages, tracking
from qexp.config import Config
from qexp.data import Dataset, calibration_subset, dataset_name
from qexp.errors import InputError, StageError
from qexp.evaluation import measure_accuracy, predict_logits
from qexp.evidence import SearchPoint, SearchResult
from qexp.host import Host
from qexp.progress import say
from qexp.quantization import quantize_model

# Options of quantization that the grid varies, or that no trial looks at: they make no other study.
OF_NO_TRIAL = {"calibration_samples", "observer", "sensitivity_images", "max_top1_drop", "max_tries"}
STALE_LOCK_S = 10  # writing a line takes milliseconds


def run_search(config: Config, model_uri: str | None) -> dict[str, Any]:
    """Search with the fp32 version `model_uri`; without it, the newest one of this model and data, or a new one."""
    if config.train.processes > 1:
        raise InputError(
            f"--processes {config.train.processes}: a search trains in one process; "
            "give it to `qexp train` first, and the search takes that version"
        )
    if len(config.quantize.engine) > 1:
        raise InputError(f"--engine {','.join(config.quantize.engine)}: a search takes one engine")
    tracking.use_store()
    model_uri = model_uri or registry.newest_uri(f"{config.model}-{dataset_name(config.data)}-fp32")
    config, host, dataset = pipeline.prepare(config, model_uri, given=("data",))
    _check_counts(config, dataset)
    with tracking.start_run("search", f"Calibration search for {config.model} on {dataset.name}.") as run_id:
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, ("train", "validation"))
        if model_uri is None:
            model_uri = stages.train_stage(config, host, dataset).version.uri
        fp32 = registered.fp32_from_registry(model_uri, dataset, splits=("validation",))
        study = _open_study(config, fp32.version.uri)
        _run_trials(study, config, host, dataset, fp32)
        fp32_top1 = measure_accuracy(fp32.logits["validation"], dataset.validation.labels).top1_percent
        result = conclude(study.study_name, _points_of(study), fp32_top1, len(dataset.validation))
        _log(result)
        summary = _summary(run_id, fp32.version.uri, result)
        if config.search.register_best:
            summary |= _register_winner(config, host, dataset, model_uri, result.winner)
    return summary


def conclude(study: str, points: list[SearchPoint], fp32_top1_percent: float, validation_images: int) -> SearchResult:
    """The best point, and the smallest sample count whose mean is within noise of it.

    Noise is twice the standard error of the difference of two means, from the spread between seeds pooled over all
    points, and at least one validation image: a smaller difference could not have been seen.
    """
    best = max(points, key=lambda point: (point.top1_percent, -point.calibration_samples))
    pooled = sqrt(statistics.fmean(point.spread_points**2 for point in points))
    seeds = min(len(point.top1_by_seed_percent) for point in points)
    noise = max(2 * pooled * sqrt(2 / seeds), 100 / validation_images)
    near = [point for point in points if best.top1_percent - point.top1_percent <= noise + 1e-9]
    winner = min(near, key=lambda point: (point.calibration_samples, -point.top1_percent))
    return SearchResult(study, tuple(points), best, winner, noise, fp32_top1_percent, validation_images)


def _check_counts(config: Config, dataset: Dataset) -> None:
    for count in config.search.sample_counts:
        if count > len(dataset.train):
            allowed = f"must be at most {len(dataset.train)}, the number of training images"
            raise InputError(f"--sample-counts {count}: {allowed}")


def _grid(config: Config) -> dict[str, list[Any]]:
    observers = config.search.observers or [config.quantize.observer]
    return {"calibration_samples": list(config.search.sample_counts), "observer": list(observers)}


def _open_study(config: Config, fp32_uri: str) -> optuna.Study:
    """The study of this model version and these options, from its journal file if there is one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fixed = config.quantize.model_dump(exclude=OF_NO_TRIAL)
    options = (fixed, _grid(config), config.search.seeds_per_point, config.search.sampler, config.seed)
    digest = hashlib.sha256(repr(options).encode()).hexdigest()[:8]
    made_for = f"{fp32_uri} {digest}"
    name = config.search.study or f"{fp32_uri.removeprefix('models:/').replace('/', '-v')}-{digest}"
    file = Path(config.search.study_dir, f"{name}.journal")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A worker killed while it wrote leaves its lock behind; the next one takes it over after the grace period.
        lock = JournalFileOpenLock(str(file), grace_period=STALE_LOCK_S)
        storage = JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
    except OSError as error:
        raise InputError(f"--study-dir {file.parent}: cannot be written ({error})") from None
    study = optuna.create_study(
        study_name=name, storage=storage, sampler=_sampler(config), direction="maximize", load_if_exists=True
    )
    if study.user_attrs.setdefault("made_for", made_for) != made_for:
        raise InputError(f"--study {name}: {file} holds trials of another model version or other options; name another")
    study.set_user_attr("made_for", made_for)
    say(f"study {name} in {file}: {len(_finished(study))} finished trials")
    return study


def _sampler(config: Config) -> optuna.samplers.BaseSampler:
    if config.search.sampler == "grid":
        return optuna.samplers.GridSampler(_grid(config), seed=config.seed)
    return optuna.samplers.TPESampler(seed=config.seed)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that are over; one that was cut off is still RUNNING and will be done again."""
    return [trial for trial in study.trials if trial.state.is_finished()]


def _run_trials(study: optuna.Study, config: Config, host: Host, dataset: Dataset, fp32: stages.Fp32) -> None:
    grid = _grid(config)
    points = len(grid["calibration_samples"]) * len(grid["observer"])
    wanted = points if config.search.sampler == "grid" else config.search.trials

    def objective(trial: optuna.Trial) -> float:
        count = trial.suggest_categorical("calibration_samples", grid["calibration_samples"])
        observer = trial.suggest_categorical("observer", grid["observer"])
        options = config.quantize.model_copy(update={"calibration_samples": count, "observer": observer})
        with tracking.start_run(f"trial-{trial.number:03d}", f"{count} calibration images, {observer} observer."):
            tracking.log_setup(config.model_copy(update={"quantize": options}), host)
            top1 = [
                _trial(options, config, host, dataset, fp32, index) for index in range(config.search.seeds_per_point)
            ]
            tracking.log_metrics({"val/top1_mean": statistics.fmean(top1), "val/top1_spread": _spread(top1)})
        trial.set_user_attr("top1_by_seed_percent", top1)
        say(f"trial {trial.number}: {count} images, {observer}: validation top-1 {statistics.fmean(top1):.2f} %")
        return statistics.fmean(top1)

    left = wanted - len(_finished(study))
    if left > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study.optimize(objective, n_trials=left, catch=(StageError,))


def _trial(options: Any, config: Config, host: Host, dataset: Dataset, fp32: stages.Fp32, index: int) -> float:
    """Validation top-1 in percent with the calibration subset of one seed."""
    subset, _ = calibration_subset(dataset.train, options.calibration_samples, (config.seed + index) % 2**32)
    int8 = quantize_model(fp32.model, subset.images, options, reduce_range=not host.has_int8_dot_product)
    logits = predict_logits(int8.module, dataset.validation.images, label="int8 on validation images")
    top1 = measure_accuracy(logits, dataset.validation.labels).top1_percent
    tracking.log_metrics({"val/top1": top1}, step=config.seed + index)
    return top1


def _points_of(study: optuna.Study) -> list[SearchPoint]:
    found = {}
    for trial in study.get_trials(states=(TrialState.COMPLETE,)):
        count, observer = trial.params["calibration_samples"], trial.params["observer"]
        top1 = tuple(trial.user_attrs["top1_by_seed_percent"])
        found[count, observer] = SearchPoint(count, observer, statistics.fmean(top1), _spread(top1), top1)
    if not found:
        raise StageError(f"study {study.study_name}: no trial finished")
    return [found[key] for key in sorted(found)]


def _spread(values: Any) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _log(result: SearchResult) -> None:
    tracking.log_table(metrics.columns([asdict(point) for point in result.points]), "search")
    tracking.log_result("search", result)
    with tempfile.TemporaryDirectory() as folder:
        plots.save_search_figure(result, Path(folder, "search.png"))
        tracking.log_folder(Path(folder), "figures")
    tracking.log_metrics(
        {"val/best_top1": result.best.top1_percent, "search/winner": result.winner.calibration_samples}
    )
    winner, best = result.winner, result.best
    tracking.set_note(
        f"{winner.calibration_samples} calibration images ({winner.observer}) are enough: validation top-1 "
        f"{winner.top1_percent:.2f} %, best {best.top1_percent:.2f} % with {best.calibration_samples} "
        f"({best.observer}), noise {result.noise_points:.2f} points, fp32 {result.fp32_top1_percent:.2f} %."
    )


def _summary(run_id: str, fp32_uri: str, result: SearchResult) -> dict[str, Any]:
    points = {
        name: {key: value for key, value in asdict(point).items() if key != "top1_by_seed_percent"}
        for name, point in (("best", result.best), ("winner", result.winner))
    }
    facts = {"study": result.study, "noise_points": result.noise_points, "trials": len(result.points)}
    return {"command": "search", "run_id": run_id, "fp32": fp32_uri, **facts, **points}


def _register_winner(
    config: Config, host: Host, dataset: Dataset, model_uri: str, winner: SearchPoint
) -> dict[str, Any]:
    """Quantize with the winner, then measure, gate and report as `run` does; only now are test images looked at."""
    options = {"calibration_samples": winner.calibration_samples, "observer": winner.observer}
    config = config.model_copy(update={"quantize": config.quantize.model_copy(update=options)})
    fp32 = registered.fp32_from_registry(model_uri, dataset)
    evidence, report_uri = pipeline.quantize_to_report(config, host, dataset, fp32)
    gate = {"gate": evidence.gate.word, "gate_reason": evidence.gate.summary}
    return {"int8": evidence.int8.version_uri, "report": report_uri, **gate, **evidence.headline}
