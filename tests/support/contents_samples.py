"""One of every file and folder that mlxquant writes, from the tiny model, and checkpoints as other tools write them."""

import json

import mlx.core as mx
import numpy as np

import mlxquant as mq

from support.six_steps import analyze, cache, collect, draw, optimize, tiny_model
from support.tiny_pictures import tiny_adapter


def write_everything(temporary):
    """``model`` (quantized, with its unfinished job in ``work``), ``calib`` with both tracks in it, ``weights`` of the
    weight track.

    Written once a session, where pytest's ``tmp_path_factory`` keeps temporary folders.
    """
    folder = temporary.getbasetemp() / "everything"
    if folder.exists():
        return folder
    with tiny_model():
        model = mq.Model(tiny_adapter())
        calibration = mq.calibrate(model, prompts=1, steps=2, work=folder / "work")
        mq.quantize(model, calibration, "gptq-w4a8", work=folder / "work" / "gptq-w4a8").save(folder / "model")
        calib = folder / "calib"
        draw(calib, 1, 2)
        cache(calib, 1)
        optimize(calib, folder / "weights", "--iters", 1)
        collect(calib, 1)
        analyze(calib)
    return folder


def write_mlx_checkpoint(folder):
    """A folder as mlx-lm writes it: two shards, an index, one layer of 4 bits in groups of 32 and one of 8 in 64, one
    not quantized.
    """
    folder.mkdir()
    weights = {
        name: mx.random.normal((16, 128), key=mx.random.key(place)) for place, name in enumerate(("a", "b", "norm"))
    }
    arrays = {"norm.weight": weights["norm"].astype(mx.bfloat16)}
    for name, bits, group in (("a", 4, 32), ("b", 8, 64)):
        packed = mx.quantize(weights[name], group_size=group, bits=bits)
        arrays |= {f"{name}.{part}": value for part, value in zip(("weight", "scales", "biases"), packed, strict=True)}
    files = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b", "norm"]}
    where = {}
    for file, names in files.items():
        own = {name: value for name, value in arrays.items() if name.split(".")[0] in names}
        mx.save_safetensors(str(folder / file), own, {"format": "mlx"})
        where |= dict.fromkeys(own, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    write_json(
        folder / "config.json", {"quantization": {"group_size": 32, "bits": 4, "b": {"group_size": 64, "bits": 8}}}
    )
    return arrays


def write_json(path, data):
    path.write_text(json.dumps(data))


def dequantized(arrays, name, bits, group):
    parts = (arrays[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    return np.array(mx.dequantize(*parts, group_size=group, bits=bits))
