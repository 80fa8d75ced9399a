"""Small pipelines of mflux, written as the hub has them: mflux's mappings of names and shapes, the other way round."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from support.mflux_checkpoints import CHECKPOINTS, build
from support.mflux_models import mflux

SHAPES = {
    None: lambda weight: weight,
    "transpose_conv2d_weight": lambda weight: weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight,
    "transpose_conv3d_weight": lambda weight: weight.transpose(0, 4, 1, 2, 3) if weight.ndim == 5 else weight,
    "reshape_gamma_to_1d": lambda weight: weight,
    "vision_weight": lambda weight: weight.transpose(0, 4, 1, 2, 3) if weight.ndim == 5 else weight,
    "vae_weight": lambda weight: weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight,
    "prepare_tensor": lambda weight: weight,
}
SHAPES["text_weight"] = SHAPES["vision_weight"]
"""What each transformation of mflux makes of a hub's weight, undone."""
PREFIXES = ("model.language_model.", "language_model.", "model.model.", "model.", "query_tokens_dict.")
"""What names of a hub's text encoders begin with."""
DERIVED = ("inv_freq", "pos_embed.", "_inv_freq")
"""Parts of the names of arrays that constructors make and that no checkpoint has."""


def as_on_the_hub(name, folder, seed=0):
    """A pipeline, and a folder of its weights under the names and in the shapes of the hub's checkpoint.

    The names are those that mflux's mapping reads, the first where it knows several. There are no configurations:
    mflux reads none of these models'.
    """
    folder = Path(folder)
    pipeline = build(name, folder, seed)
    for component in CHECKPOINTS[name].components():
        weights = dict(tree_flatten(getattr(pipeline, component.model_attr or component.name).parameters()))
        target = folder / component.hf_subdir
        target.mkdir(exist_ok=True)
        _write(target, _hub_weights(component, weights), component.weight_files)
    return pipeline


def _hub_weights(component, weights):
    """The weights of a component under their names and in their shapes on the hub."""
    if component.mapping_getter is None:
        weights = {name: weight for name, weight in weights.items() if "inv_freq" not in name}
        undone = SHAPES[component.weight_transform and component.weight_transform.__name__]
        return {_with_prefix(component, name): undone(weight) for name, weight in weights.items()}
    mapper = mflux("models.common.weights.mapping.weight_mapper.WeightMapper")
    blocks = component.num_blocks or mapper._detect_num_blocks(weights)
    layers = component.num_layers or mapper._detect_num_layers({f"model.{name}": None for name in weights})
    written, named = set(), {}
    for name, places in mapper._build_flat_mapping(component.mapping_getter(), blocks, layers).items():
        inside = [(path, transform) for path, transform in places if path in weights and path not in written]
        if inside:
            path, transform = inside[0]
            named[_with_prefix(component, name)] = SHAPES[transform and transform.__name__](weights[path])
            written |= {path for path, _ in inside}
    if lost := [path for path in weights if path not in written and not any(part in path for part in DERIVED)]:
        raise AssertionError(f"{component.name}: no name on the hub for {lost[:5]}")
    return named


def _with_prefix(component, name):
    """The name that the component's own renaming turns into this one."""
    if component.key_transform is None:
        return name
    stem = name.removeprefix("model.")
    names = (f"{prefix}{stem}" for prefix in PREFIXES)
    return next(n for n in (*names, name) if component.key_transform(n) == name)


def _write(folder, weights, files):
    """One file, under the name that the definition of the component gives, or with an index as larger ones have."""
    file = files[0] if files else "model.safetensors"
    mx.save_safetensors(str(folder / file), weights, {"format": "pt"})
    if not files:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
