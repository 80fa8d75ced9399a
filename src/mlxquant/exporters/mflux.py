"""One component of an mflux model, in the files that mflux saves and loads: ``N.safetensors`` and an index in the
component's folder.

mflux (0.24) infers bits and group size of each layer from the shapes of its tensors, so calibrated codes load as they
are. A model may refuse to quantize some of its layers (its ``quantization_predicate``); those have to stay unquantized
here, too. The other components come from a folder that ``mflux-save`` wrote: put this one in the place of its own.
"""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from ..errors import ExportError
from ..files import checked
from ..layers.tree import parameters
from .plain import PlainModule, write_shards

VERSION = "0.24.0"  # of mflux, whose files these are
FILE_LIMIT = 2 << 30  # bytes, as mflux splits its files
COMPONENT = "transformer"
TRANSFORMERS = {  # what the parameters of some families' transformers start with, as mflux names them
    "FLUX.1": (
        "context_embedder norm_out proj_out single_transformer_blocks time_text_embed transformer_blocks x_embedder"
    ),
    "FLUX.2": (
        "context_embedder double_stream_modulation_img double_stream_modulation_txt norm_out proj_out"
        " single_stream_modulation single_transformer_blocks time_guidance_embed transformer_blocks x_embedder"
    ),
    "Qwen-Image": "img_in norm_out proj_out time_text_embed transformer_blocks txt_in txt_norm",
}


def check_component(module: nn.Module) -> None:
    """Raise ExportError unless the module is mflux's own, or has the parameter names of one of the transformers that
    are known here.
    """
    names = {name.split(".")[0] for name in parameters(module)}
    if not type(module).__module__.startswith("mflux.") and all(
        names != set(known.split()) for known in TRANSFORMERS.values()
    ):
        raise ExportError(
            f"a {type(module).__name__} with the parts {sorted(names)} is nothing that mflux knows: expected a module"
            f" of mflux itself, or the transformer of {', '.join(TRANSFORMERS)}; mflux has no SD3, write such a model"
            " with --target mlx or diffusionkit"
        )


def write_mflux(folder: Path, plain: PlainModule, component: str, level: int | None = None) -> None:
    """Write a component, "transformer" or the folder of another, into an empty folder. Where it is quantized it says
    ``level``, or the bits that most of its layers have.
    """
    bits = None if plain.usual is None else level or plain.usual["bits"]
    metadata = {"quantization_level": str(bits), "mflux_version": VERSION}
    (folder / component).mkdir(parents=True, exist_ok=True)  # its tokenizer may be there
    where = write_shards(folder / component, plain.arrays, metadata, "{index}.safetensors", FILE_LIMIT)
    index = checked.canonical({"metadata": metadata, "weight_map": where})
    (folder / component / "model.safetensors.index.json").write_text(index, encoding="utf-8")
