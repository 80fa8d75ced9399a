"""Which model is meant: a name, a hub id, or a folder that says which part of mlxquant wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import AdapterError, ArtifactError
from ..files.checked import kind_of
from ..files.pickles import refuse_pickle
from ..models.catalog import pretrained
from ..sampling.picture_size import PictureSize
from ..spin_quant import files as spun
from ..spin_quant.adapter import SpunGPT
from .model import KIND, Model, QuantizedModel
from .pipeline_files import is_pipeline

CONTAINERS: dict[str, tuple[str, Callable[[Path], Model]]] = {  # by kind: the file that speaks for a folder, a reader
    KIND: ("model.json", QuantizedModel.load),
    spun.KIND: (spun.FILE, lambda folder: Model(SpunGPT.of(folder))),
}
NO_MODELS = {  # what else mlxquant writes, by kind: what it is, and what to do with it
    "quantized-module": "a module's parameters; build the module and pass it to mlxquant.load_module with this file",
    "fake-quant-linear": "one layer; mlxquant.FakeQuantLinear.load reads it",
    "adaround-weights": "learned weights; 'mlxquant load-adaround-model --adaround-output' puts them into their model",
    "calibration-samples": "trajectories; 'mlxquant cache-adaround-data' and 'collect-layer-activations' go on from it",
    "adaround-cache": "what blocks write; 'mlxquant adaround-optimize' goes on from it",
    "activation-statistics": "statistics of layers' inputs; 'mlxquant analyze-activations' goes on from it",
    "evaluation": "a report on models; its report.html is for reading",
    "demo-report": "a report on models; its report.html is for reading",
}
SPEAKERS = ("report.json", "manifest.json", "metadata.json", "config.json", "layer_statistics.json")


def load(reference: str | Path, size: int | PictureSize | None = None) -> Model:
    """Load a model: with its full-precision weights, or from a folder that mlxquant wrote, whatever wrote it.

    Args:
        reference: A name (``"mmdit-shapes"``), a hub id, a folder with a checkpoint, or a folder of
            ``QuantizedModel.save``, ``mlxquant train-gpt``, ``mlxquant export`` or SpinQuant.
        size: Width and height of the pictures in pixels, or one number for squares, for models that draw several sizes.

    Returns:
        The model; a ``QuantizedModel`` where it is one that ``quantize`` made.

    Raises:
        AdapterError: On an unknown name, an impossible size, or a pipeline of mflux.
        ArtifactError: On a damaged folder, or one that holds something else than a model; the error says what.
    """
    if is_pipeline(str(reference)):
        raise AdapterError(
            f"{reference} is a pipeline of mflux, which 'mlxquant quantize', 'export' and 'generate' take, and"
            " mq.load_pipeline; 'mlxquant generate --compare' draws two of them side by side"
        )
    model = _read(Path(reference)) or Model(pretrained(str(reference)))
    if size is not None:
        model.diffusion.resize(size)
    return model


def _read(place: Path) -> Model | None:
    """The model in a folder of one of ``CONTAINERS``, or in the file that speaks for it; None where there is none.
    Raises ArtifactError where mlxquant wrote something else there, and on a pickle.
    """
    refuse_pickle(place, "pass the folder that it is in, if mlxquant wrote it, or safetensors")
    if place.is_dir():
        for file, read in CONTAINERS.values():
            if (place / file).exists():
                return read(place)
    elif (kind := kind_of(place)) in CONTAINERS:
        file, read = CONTAINERS[kind]
        return read(place.parent if place.name == file else place)
    for path in [place / name for name in SPEAKERS] if place.is_dir() else [place]:
        if (kind := kind_of(path)) is not None:
            raise ArtifactError(
                f"{path} is no model but {NO_MODELS.get(kind, f'a file of kind {kind!r}')}; 'mlxquant inspect' shows"
                " what it holds"
            )
    return None
