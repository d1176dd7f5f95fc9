"""Where a run's numbers go besides trainer_log.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio.

A monitor has three methods, start, log and finish, around a library that is imported when the run asks for it and asked
for by name before anything is loaded. Names are those of transformers: train/loss, train/lr, eval/loss, by optimizer
step. Where they write is the library's own matter (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_DIR ...);
what a library would put into the working directory goes under ``logging_dir``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fuselora.engine.config import Config
from fuselora.engine.config_docs import config_yaml
from fuselora.engine.errors import expected
from fuselora.engine.loop_callbacks import Callback
from fuselora.engine.progress import full_speed

if TYPE_CHECKING:
    from fuselora.engine.trainer import Trainer

PROJECT = "fuselora"


class Monitor(Protocol):
    """One destination of a run's numbers."""

    package: str

    def start(self, name: str, folder: Path, settings: dict[str, Any], first_step: int) -> None: ...

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def finish(self, ok: bool) -> None: ...


class TensorBoard:
    """Event files in ``folder``; what an interrupted run wrote beyond the step it resumes from is hidden."""

    package = "tensorboard"

    def start(self, name: str, folder: Path, settings: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        lines = "".join(f"    {key}: {value}\n" for key, value in settings.items())
        self.writer.add_text("configuration", lines, first_step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def finish(self, ok: bool) -> None:
        self.writer.close()


class Wandb:
    package = "wandb"

    def start(self, name: str, folder: Path, settings: dict[str, Any], first_step: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=project, name=name, dir=str(folder), config=settings)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def finish(self, ok: bool) -> None:
        self.run.finish(exit_code=0 if ok else 1)


class MLflow:
    """A file store under ``folder`` unless MLFLOW_TRACKING_URI says otherwise."""

    package = "mlflow"

    def start(self, name: str, folder: Path, settings: dict[str, Any], first_step: int) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.x asks for it by name
            uri = (folder / "mlruns").resolve().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(project)
        experiment_id = self.client.create_experiment(project) if experiment is None else experiment.experiment_id
        self.run_id = self.client.create_run(experiment_id, run_name=name).info.run_id
        for key, value in settings.items():
            self.client.log_param(self.run_id, key, str(value)[:500])

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.client.log_metric(self.run_id, key, value, step=step)

    def finish(self, ok: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if ok else "FAILED")


class Trackio:
    package = "trackio"

    def start(self, name: str, folder: Path, settings: dict[str, Any], first_step: int) -> None:
        import trackio

        self.library = trackio
        trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, config=settings, embed=False)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.library.log(numbers, step=step)

    def finish(self, ok: bool) -> None:
        self.library.finish()


MONITORS: dict[str, type[Monitor]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def monitors_of(config: Config) -> list[Monitor]:
    """The monitors that ``report_to`` names; ``all``: those whose library is installed.

    Raises:
        UserError: an unknown name, or a named one's library is missing.
    """
    wanted = [name for name in config.report_to if name != "none"]
    if "all" in wanted:
        wanted = [name for name, kind in MONITORS.items() if _installed(kind)]
    for name in wanted:
        if name not in MONITORS:
            known = ", ".join(("none", "all", *MONITORS))
            raise expected(
                "report_to", f"names among {known}", repr(name), "correct it; trainer_log.jsonl is always there"
            )
        if not _installed(MONITORS[name]):
            package = MONITORS[name].package
            raise expected("report_to", f"{package} to be installed", "none", f"run: pip install {package}")
    return [MONITORS[name]() for name in dict.fromkeys(wanted)]


def _installed(kind: type[Monitor]) -> bool:
    return importlib.util.find_spec(kind.package) is not None


class Reporting(Callback):
    """The callback that feeds the monitors, and tells the log what full speed is."""

    def __init__(self, monitors: Sequence[Monitor], config: Config) -> None:
        self.monitors, self.config = list(monitors), config

    @contextmanager
    def running(self, trainer: Trainer) -> Iterator[None]:
        """Monitors of the main process are open inside, and learn whether the run went to its end."""
        if not trainer.world.main:
            self.monitors = []
        folder = Path(self.config.logging_dir or Path(self.config.output_dir) / "runs")
        name = self.config.run_name or Path(self.config.output_dir).name
        ok = False
        with ExitStack() as started:  # all of them are finished, whichever start or finish fails
            for monitor in self.monitors:
                monitor.start(name, folder, _settings(self.config), trainer.step)
                started.callback(lambda monitor=monitor: monitor.finish(ok))
            yield
            ok = True

    def on_begin(self, trainer: Trainer) -> None:
        if trainer.world.main:
            trainer.log.full_speed = full_speed(trainer.model, trainer.device, trainer.config)

    def on_log(self, trainer: Trainer, entry: dict[str, Any]) -> None:
        skip = ("current_steps", "total_steps")
        self._log(trainer.step, {f"train/{key}": value for key, value in entry.items() if key not in skip})

    def on_evaluate(self, trainer: Trainer, scores: dict[str, float]) -> None:
        self._log(trainer.step, {f"eval/{key.removeprefix('eval_')}": value for key, value in scores.items()})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        for monitor in self.monitors:
            monitor.log(step, numbers)


def _settings(config: Config) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(config_yaml(config))
