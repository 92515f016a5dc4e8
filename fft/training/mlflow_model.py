"""A model directory as MLflow takes it: with a signature, an input example and a few lines that load it anywhere."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from fft.models.directory import ADAPTER_CONFIG
from fft.training import mlflow_loader

#: What loads a model, and what an adapter needs besides.
_NEEDS, _ADAPTERS = ("transformers", "torch"), "peft"
#: Seconds that a registry may take to have a version ready.
_READY = 300


def register(name: str, directory: str, run: str) -> str:
    """Log a model or adapter directory as the model of the MLflow run of this id; returns its version in the registry.

    MLflow copies the directory before it sends it. Raises whatever MLflow does.
    """
    from mlflow.models import Model

    info = Model.log(
        artifact_path=None,
        name="model",
        flavor=_Flavor,
        run_id=run,
        registered_model_name=name,
        await_registration_for=_READY,
        loader_module=mlflow_loader.__name__.rpartition(".")[2],
        data_path=directory,
        code_paths=[str(mlflow_loader.__file__)],
        signature=_signature(),
        input_example=([{"prompt": "Hello"}], {name: value for name, value, _ in mlflow_loader.PARAMETERS}),
        pip_requirements=_requirements(Path(directory)),
        validate_serving_input=False,  # which would load the model here, beside the one that was trained
    )
    return str(info.registered_model_version)


class _Flavor:
    """How :meth:`mlflow.models.Model.log` has a directory made of the model."""

    @staticmethod
    def save_model(path: str, validate_serving_input: bool, **facts: Any) -> None:
        """Write the directory."""
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(path, **facts)


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    settings = ParamSchema([ParamSpec(name, kind, default) for name, default, kind in mlflow_loader.PARAMETERS])
    return ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string")]), settings)


def _requirements(directory: Path) -> list[str]:
    found = [f"{name}=={version(name).partition('+')[0]}" for name in _NEEDS]
    return [*found, _ADAPTERS] if (directory / ADAPTER_CONFIG).is_file() else found
