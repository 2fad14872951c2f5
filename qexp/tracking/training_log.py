"""The log of a training under way: the training loop tells it of each epoch, and MLflow shows the curves at once."""

from collections.abc import Sequence
from contextlib import nullcontext

from qexp.config import Config
from qexp.errors import StageError
from qexp.measurement.host import Host
from qexp.progress import say
from qexp.tracking import metrics
from qexp.tracking import runs as tracking
from qexp.tracking.outage import store_errors
from qexp.tracking.store import quickly
from qexp.training.train import EpochResult


class TrainingLog:
    """A training under way: what it settles by timing, and its curves, epoch by epoch, in the active run.

    A store that fails stops no training: what it lacks is sent with the next epoch, or at the end.
    """

    def __init__(self, config: Config, host: Host) -> None:
        self.config, self.host = config, host
        self.waiting: list[EpochResult] = []
        self.logged: set[int] | None = None

    def settled(self, execution: dict[str, bool | int]) -> None:
        """How the steps are computed is part of the configuration from now on."""
        tracking.log_setup(self.config.with_training(execution), self.host)

    def epoch(self, result: EpochResult) -> None:
        """Log an epoch that the run lacks, and those that could not be logged before it."""
        away = bool(self.waiting)
        self.waiting.append(result)
        try:
            with store_errors(), quickly() if away else nullcontext():
                if self.logged is None or away:  # an answer may have been lost, not the request
                    self.logged = tracking.logged_steps(tracking.active_run_id(), metrics.FIRST_OF_EPOCH)
                log_curves(self.waiting, self.logged)
            self.waiting.clear()
        except StageError as error:
            if not away:
                say(f"{error}; training continues, its curves will be logged once the store is back")


def log_curves(epochs: Sequence[EpochResult], logged: set[int], run_id: str | None = None) -> None:
    """Log the epochs that are not in `logged` to a run, the active one unless named, and add them."""
    for epoch in epochs:
        if epoch.epoch not in logged:
            tracking.log_metrics(metrics.of_epoch(epoch), epoch.epoch, (run_id, None) if run_id else None)
            logged.add(epoch.epoch)
