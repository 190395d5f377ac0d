"""A run in MLflow: metrics, pictures with a slider, data, and checkpoints as LoggedModels."""

import contextlib
import getpass
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from calligrapher.errors import CalligrapherError
from tasks.artifacts.digests import code_version
from tasks.artifacts.layout import RunsDir
from tasks.params.sections import TrackingParams
from tasks.tracking.journal import REPORT, Entry, Journal
from tasks.tracking.mirror import Failed, Mirror
from tasks.tracking.mlflow_setup import follow_moved_folder, one_at_a_time, prepare_mlflow
from tasks.tracking.models import ensure_model
from tasks.tracking.pointer import read_pointer, store_pointer, with_variables, write_pointer

if TYPE_CHECKING:
    from mlflow.entities import Metric

_BATCH = 900  # MLflow takes at most 1000 metrics at once
_PARAMS_BATCH = 100


class Backend(Mirror):
    """One MLflow run that shows one run folder."""

    title, package = "MLflow", "mlflow"

    def __init__(self, run_dir: Path, journals: tuple[Journal, Journal], failed: Failed) -> None:
        super().__init__(run_dir, journals, failed)
        pointer = read_pointer(run_dir)
        uri = with_variables(pointer["uri"])
        prepare_mlflow()
        import mlflow

        with one_at_a_time(uri):
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            follow_moved_folder(uri)
            self._experiment_id = self._experiment(pointer["experiment"], uri)
        self.run_id, is_new = self._run(pointer)
        run = self._client.get_run(self.run_id)
        self._params = dict(run.data.params)
        # What MLflow has already, fetched when first needed; in a new run: nothing.
        self._steps: dict[str, set[int]] | None = {} if is_new else None
        self._known_keys = set() if is_new else set(run.data.metrics)
        self._datasets = {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}
        self._images = set() if is_new else self._listed_images()
        self._system = self._watch_system(uri)

    @classmethod
    def prepare(cls, run_dir: Path, tracking: TrackingParams, *, again: bool = False) -> str:
        pointer = read_pointer(run_dir) if again else {}
        uri = pointer.get("uri") or tracking.uri
        uri = uri or f"sqlite:///{RunsDir(run_dir.parent).mlflow_database}"
        write_pointer(run_dir, uri, pointer.get("experiment") or tracking.experiment)
        return f"MLflow at {uri}"

    def where(self) -> str:
        return f"MLflow run {self.run_id}"

    def end(self, status: str) -> None:
        if self._system is not None:
            self._system.finish()
        self._client.set_terminated(self.run_id, status)

    def _experiment(self, name: str, uri: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            number = experiment.experiment_id
            raise CalligrapherError(
                f"The MLflow experiment {name!r} must not be deleted. It is. Restore it (`mlflow"
                f" experiments restore --experiment-id {number}`), remove it for good (`mlflow gc"
                f" --experiment-ids {number}`), or name another one (`tracking.experiment`)."
            )
        if experiment is not None:
            return experiment.experiment_id
        place = None
        if uri.startswith("sqlite:///"):
            # MLflow's own default is a folder of whatever directory the process was started in.
            place = (
                Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts"
            ).as_uri()
        return self._client.create_experiment(name, artifact_location=place)

    def _run(self, pointer: Entry) -> tuple[str, bool]:
        """The MLflow run of this run folder: the one noted there if MLflow still has it, else a new
        one."""
        import mlflow

        if pointer.get("run_id"):
            try:
                run = self._client.get_run(pointer["run_id"])
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise  # a server that does not answer may well have the run
            else:
                if run.info.lifecycle_stage == "active":
                    self._client.update_run(run.info.run_id, status="RUNNING")
                    return run.info.run_id, False
        tags = {
            "run_dir": str(self._run_dir),
            "mlflow.source.name": "calligrapher train",
            "mlflow.source.type": "LOCAL",
        }
        with contextlib.suppress(OSError, KeyError):  # no such user in this container
            tags["mlflow.user"] = getpass.getuser()
        if "commit" in code_version():
            tags["mlflow.source.git.commit"] = code_version()["commit"]
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=self._run_dir.name)
        pointer = pointer | {"run_id": run.info.run_id, "experiment_id": self._experiment_id}
        store_pointer(self._run_dir, pointer)
        return run.info.run_id, True

    def _watch_system(self, uri: str) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        try:
            monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=uri)
            monitor.start()
        except Exception as error:
            self._failed("the system monitor", error)
            return None
        return monitor

    def take_metrics(self, records: list[Entry]) -> None:
        from mlflow.entities import Metric

        fresh: dict[tuple[str, int], Metric] = {}
        for record in records:
            for key, value in record["metrics"].items():
                name, step = _metric_name(key), record["step"]
                if value is not None and step not in self._logged_steps(name):
                    fresh[name, step] = Metric(name, value, round(record["time"] * 1000), step)
        metrics = list(fresh.values())
        for start in range(0, len(metrics), _BATCH):
            batch = metrics[start : start + _BATCH]
            self._client.log_batch(self.run_id, metrics=batch, synchronous=True)
            for metric in batch:
                self._logged_steps(metric.key).add(metric.step)

    def _logged_steps(self, name: str) -> set[int]:
        if self._steps is None:
            self._steps = {}
        if name not in self._steps:
            known = (
                self._client.get_metric_history(self.run_id, name)
                if name in self._known_keys
                else []
            )
            self._steps[name] = {metric.step for metric in known}
        return self._steps[name]

    def take_params(self, record: Entry) -> None:
        """Params cannot change in MLflow: those of a resumed run that did become tags."""
        from mlflow.entities import Param, RunTag

        changed = {k: v for k, v in record["params"].items() if self._params.get(k, v) != v}
        fresh = [Param(k, v) for k, v in record["params"].items() if k not in self._params]
        for start in range(0, len(fresh), _PARAMS_BATCH):
            self._client.log_batch(
                self.run_id, params=fresh[start : start + _PARAMS_BATCH], synchronous=True
            )
        tags = [
            RunTag(f"changed.{key}", f"{self._params[key]} -> {value}")
            for key, value in changed.items()
        ]
        if tags:
            self._client.log_batch(self.run_id, tags=tags, synchronous=True)
        self._params |= {param.key: param.value for param in fresh}

    def take_tags(self, record: Entry) -> None:
        for key, value in record["tags"].items():
            self._client.set_tag(self.run_id, key, value)

    def take_image(self, record: Entry) -> None:
        path = self._run_dir / record["path"]
        if not record["slider"]:
            self._client.log_artifact(self.run_id, str(path), REPORT)
        elif (record["key"], record["step"]) not in self._images:
            with Image.open(path) as image:
                # The very file: MLflow would compress the picture anew, which costs more than all
                # the rest.
                image.save = lambda target: shutil.copyfile(path, target)  # type: ignore[method-assign]
                self._client.log_image(
                    self.run_id, image, key=record["key"], step=record["step"], synchronous=True
                )
            self._images.add((record["key"], record["step"]))

    def _listed_images(self) -> set[tuple[str, int]]:
        """(key, step) of the images that MLflow has; its file names are
        `images/KEY+step+STEP+...`."""
        names = (
            Path(info.path).name for info in self._client.list_artifacts(self.run_id, "images")
        )
        matches = (re.match(r"(.+?)[+%]step[+%](\d+)[+%]", name) for name in names)
        return {(m[1].replace("~", "/"), int(m[2])) for m in matches if m}

    def take_dataset(self, record: Entry) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name, digest = record["name"], record["digest"][:32]
        if (name, digest) in self._datasets:
            return
        place = json.dumps({"uri": (self._run_dir / record["path"]).resolve().as_uri()})
        dataset = Dataset(name, digest, "local", place)
        context = [InputTag("mlflow.data.context", record["context"])]
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, context)])
        self._datasets.add((name, digest))

    def take_checkpoint(self, record: Entry) -> None:
        place = self._run_dir / record["path"]
        model = ensure_model(
            self._client, self._experiment_id, self.run_id, record["name"], record["digest"], place
        )
        known = {metric.key for metric in model.metrics or ()}
        scores = [
            self._score_of(model.model_id, _metric_name(key), value, record["step"], record["time"])
            for key, value in record["metrics"].items()
            if _metric_name(key) not in known
        ]
        if scores:
            self._client.log_batch(self.run_id, metrics=scores, synchronous=True)

    def _score_of(self, model_id: str, name: str, value: float, step: int, when: float) -> "Metric":
        """A model's metric lands among the run's too: it must be the very one that is there
        already."""
        from mlflow.entities import Metric

        if step in self._logged_steps(name):
            history = self._client.get_metric_history(self.run_id, name)
            logged = next(metric for metric in history if metric.step == step)
            value, when = logged.value, logged.timestamp / 1000
        self._logged_steps(name).add(step)
        return Metric(name, value, round(when * 1000), step, model_id=model_id, run_id=self.run_id)


def _metric_name(key: str) -> str:
    return re.sub(r"[^\w./ :-]", "_", key)
