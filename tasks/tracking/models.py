"""Checkpoints as MLflow's LoggedModels, and which of a run's is the champion."""

from pathlib import Path
from typing import Any

from calligrapher.errors import CalligrapherError
from tasks.tracking.mlflow_setup import prepare_mlflow
from tasks.tracking.pointer import read_pointer, with_variables

CHAMPION_TAG = "champion"


class TrackedRun:
    """The MLflow run of a run folder, for those who add to it after the training.

    Raises CalligrapherError when the folder was never mirrored to MLflow.
    """

    def __init__(self, run_dir: Path) -> None:
        pointer = read_pointer(run_dir)
        if not pointer.get("run_id"):
            raise CalligrapherError(
                f"{run_dir} must be in MLflow. It is not: `calligrapher sync {run_dir}`."
            )
        prepare_mlflow()
        import mlflow

        self.client: Any = mlflow.MlflowClient(tracking_uri=with_variables(pointer["uri"]))
        self.run_id: str = pointer["run_id"]
        self.experiment_id: str = self.client.get_run(self.run_id).info.experiment_id

    def logged_model(self, name: str, digest: str, place: Path) -> str:
        """The id of the checkpoint's LoggedModel, made now if the training has not."""
        model = ensure_model(self.client, self.experiment_id, self.run_id, name, digest, place)
        return model.model_id

    def attach(self, run_id: str, model_id: str) -> None:
        """Make the model an input of another run: its page then lists that run."""
        from mlflow.entities import LoggedModelInput

        self.client.log_inputs(run_id, models=[LoggedModelInput(model_id)])

    def mark_champion(self, model_id: str) -> None:
        """Tag the model `champion`, and no other one of this run."""
        for model in self._champions():
            if model.model_id != model_id:
                self.client.delete_logged_model_tag(model.model_id, CHAMPION_TAG)
        self.client.set_logged_model_tags(model_id, {CHAMPION_TAG: "true"})

    def champion_path(self) -> str | None:
        """Folder of the checkpoint that carries the tag `champion`; None before the first
        evaluation."""
        return next((model.tags["path"] for model in self._champions()), None)

    def _champions(self) -> list[Any]:
        of_this_run = f"source_run_id = '{self.run_id}'"
        models = self.client.search_logged_models([self.experiment_id], filter_string=of_this_run)
        return [model for model in models if CHAMPION_TAG in model.tags]


def model_path(uri: str, model_id: str) -> str | None:
    """Folder of the checkpoint that MLflow at `uri` has as the LoggedModel `model_id`, or None."""
    prepare_mlflow()
    import mlflow

    try:
        return (
            mlflow.MlflowClient(tracking_uri=with_variables(uri))
            .get_logged_model(model_id)
            .tags.get("path")
        )
    except mlflow.exceptions.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise CalligrapherError(
            f"MLflow at {uri} must know its models. It said: {error}"
        ) from error


def ensure_model(
    client: Any, experiment_id: str, run_id: str, name: str, digest: str, place: Path
) -> Any:
    """The LoggedModel of a checkpoint, found by its digest or made; its files stay in `place`."""
    same_name = f"source_run_id = '{run_id}' AND name = '{name}'"
    for model in client.search_logged_models([experiment_id], filter_string=same_name):
        if model.tags.get("digest") == digest:
            return model
    tags = {"digest": digest, "path": str(place.resolve()), "mlflow.model.isExternal": "true"}
    model = client.create_logged_model(
        experiment_id, name=name, source_run_id=run_id, tags=tags, model_type="adapter"
    )
    return client.finalize_logged_model(model.model_id, "READY")
