"""Which files the params' section `model` names, before anything is loaded."""

from pathlib import Path

from calligrapher.errors import ArtifactError, CheckpointError, ParamsError
from calligrapher.tiny.pack import DATA, TINY
from tasks.params.sections import ModelParams
from tasks.resources.resources import ModelFiles
from tasks.weights.checkpoints import base_folder
from tasks.weights.convert import adapter_file


def model_files(model: ModelParams, runs_dir: Path) -> ModelFiles:
    """Return where base, SigLIP and adapter lie; the word `tiny` stands for the embedded model's.

    LoRA that a run trained on its adapter is merged into a file below `runs_dir` here. Raises
    ParamsError or CheckpointError for names that stand for nothing.
    """
    if model.siglip is None and model.base != TINY:
        raise ParamsError(
            f"model.siglip must name SigLIP's folder when model.base is {model.base!r}. Got null."
        )
    siglip = DATA / "siglip" if model.siglip in (None, TINY) else Path(model.siglip)
    given = model.initial_adapter
    try:
        adapter = adapter_file(given, runs_dir) if given else None
    except ArtifactError as error:
        raise CheckpointError(
            f"model.initial_adapter must name weights. Got {given}: {error}"
        ) from error
    return ModelFiles(base_folder(model.base), siglip, adapter)
