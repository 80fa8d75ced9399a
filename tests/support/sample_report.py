"""The folder of an evaluation as ``mlxquant evaluate`` writes it, with made-up numbers, for tests of what is drawn from
it.
"""

import numpy as np
from PIL import Image

from mlxquant.files.checked import write_json

KINDS = ("attn.q_proj", "mlp.fc2")


def write_sample(folder, names=("rtn-w4a8", "gptq-w4a8"), prompts=3, steps=4, side=16, blocks=2):
    """Returns the facts of ``report.json``."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        {"index": i, "seed": 10000 + i, "text": f"a large red circle <{i}> & a blue square"} for i in range(prompts)
    ]
    reference = _model("FP", None, prompts, steps, rng, 0.0)
    results = [_model(name, name, prompts, steps, rng, 0.03 / (1 + place)) for place, name in enumerate(names)]
    clean = rng.random((prompts, side, side, 3))
    for place, model in enumerate([reference, *results]):
        (folder / "images" / model["folder"]).mkdir(parents=True, exist_ok=True)
        for i in range(prompts):
            shown = np.clip(clean[i] + 0.1 * place * rng.standard_normal(clean[i].shape), 0, 1)
            Image.fromarray((255 * shown).astype(np.uint8)).save(folder / "images" / model["folder"] / f"{i:04d}.png")
    facts = {
        "mlxquant": "0.1.0",
        "mlx": "0.32.4",
        "source": "models",
        "settings": {
            "model": "mmdit-shapes", "steps": steps, "cfg_weight": 2.0, "size": side, "seed": 0, "batch": 16,
            "calibration": {"prompts": 16, "steps": steps, "cfg_weight": 2.0, "seed": 0},
        },
        "machine": "x86_64 Linux, Python 3.11.7, mlx 0.32.4, cpu",
        "prompts": texts,
        "metrics": [
            _metric("psnr_db", "PSNR", "dB", True), _metric("ssim", "SSIM", "", True), _metric("accuracy",
            "Attributes", "", True),
            {**_metric("kid", "KID", "", False), "network": "Inception-v3", "per_image": False},
        ],
        "reference": reference,
        "results": results,
        "noise_floor": {**_model("float16", "float16", prompts, steps, rng, 1e-4), "quantized": False,
        "model_bytes": None},
        "differences": [
            {"metric": "psnr_db", "a": name, "b": names[0], "mean": 3.21875, "interval": [2.5, 3.9]}
            for name in names[1:]
        ],
        "measured": ["latency_s", "latency_p95_s", "latency_ratio", "seconds_quantize", "peak_bytes"],
        "notes": ["KID on 3 pictures: a rough figure", "<script>alert(1)</script>"],
        "methods": [
            {"name": "gptq", "source": "arXiv 2210.17323", "bibtex": "@inproceedings{frantar, title = {<GPTQ>}}"},
            {"name": "unpublished", "source": "nobody"},
        ],
        "trajectory_sigma": [*np.linspace(1, 0.001, steps).tolist(), 0.0],
    }  # fmt: skip
    write_json(folder / "report.json", "evaluation", facts)
    for place, model in enumerate(results):
        write_layers(folder, model, steps, blocks, rng, 0.1 / (1 + place))
    return facts


def _metric(key, title, unit, higher):
    return {
        "key": key, "title": title, "unit": unit, "higher_is_better": higher,
        "network": "", "source": "arXiv 0000.00000", "per_image": True,
    }  # fmt: skip


def _model(name, recipe, prompts, steps, rng, error):
    judged = recipe is not None
    psnr = (30 - 100 * error + rng.standard_normal(prompts)).tolist() if judged else None
    model = {
        "name": name, "folder": name.lower(), "recipe": recipe, "quantized": judged,
        "psnr_db": float(np.mean(psnr)) if judged else None, "psnr_db_interval": [28.123456, 31.5] if judged else None,
        "ssim": 0.9712345 if judged else None, "ssim_interval": [0.96, 0.98] if judged else None,
        "accuracy": 0.9375 - error, "accuracy_interval": [0.9, 0.97],
        "kid": 0.00123 if judged else None, "kid_interval": None, "kid_samples": prompts,
        "attributes": {"mean": 0.9375 - error, "shape": 0.9}, "each": {"accuracy": [1.0] * prompts},
        "trajectory": None, "trajectory_interval": None,
        "model_bytes": 2_596_388 + int(1e7 * error) if judged else 7_060_000,
        "bits_per_weight": 5.886 if judged else 16.0,
        "bits_per_quantized_weight": 5.5385 if judged else None,
        "latency_s": 0.0187, "latency_p95_s": 0.0213, "latency_ratio": 1.125, "peak_bytes": 31_234_567,
        "seconds_quantize": 12.34 if judged else None,
    }  # fmt: skip
    if judged:
        curve = [0.0, *(error * np.arange(1, steps + 1)).tolist()]
        model["each"] |= {"psnr_db": psnr, "ssim": [0.97] * prompts}
        model |= {"trajectory": curve, "trajectory_interval": [[0.9 * value, 1.1 * value] for value in curve]}
    return model


def write_layers(folder, model, steps, blocks, rng, error):
    (folder / "layers").mkdir(exist_ok=True)
    sigma = np.linspace(0.001, 1, steps).tolist()
    stages = ["embed", *(f"blocks.{i}" for i in range(blocks)), "head"]
    layers = [_layer("context_embedder", "embedder", "embed", "w8", sigma, rng, error / 20, 16.0)]
    for block in range(blocks):
        for kind in KINDS:
            path = f"blocks.{block}.image_transformer_block.{kind}"
            layers.append(_layer(path, "attention", f"blocks.{block}", "w4", sigma, rng, error * (1 + block), 8.0))
    layers[-1]["error"] = None  # a division was folded into it
    facts = {
        "model": model["name"],
        "sigma": sigma,
        "stages": {"name": stages, "error": [[error * (i + 1) * (1 + s) for s in sigma] for i in range(len(stages))]},
        "layers": layers,
        "decisions": [
            *(_decision(stage, error) for stage in stages[:-1]),
            {"stage": stages[-1], "kept": "exact", "layers": {}},
        ],
    }
    write_json(folder / "layers" / f"{model['folder']}.json", "layer-report", facts)


def _layer(path, role, stage, weight, sigma, rng, error, activation):
    bits = int(weight[1:])
    high = 4 + rng.random(len(sigma))
    table = {
        "sigma": sigma,
        "low": (-high).tolist(),
        "high": high.tolist(),
        "step": (high / 128).tolist(),
        "bits": [8] * len(sigma),
    }
    counts = np.histogram(rng.standard_normal(4096).clip(-3, 3), 2**bits, (-3, 3))[0]
    return {
        "path": path, "role": role, "stage": stage, "weight": weight, "activation": activation,
        "shape": [64, 64], "bits_per_weight": bits + 0.25,
        "error": (error * (1 + rng.random(len(sigma)))).tolist(),
        "range": {"low": (-0.8 * high).tolist(), "high": (0.9 * high).tolist()},
        "table": None if activation == 16 else table,
        "clipped": None if activation == 16 else [0.0] * len(sigma),
        "codes": {"first": -(2 ** (bits - 1)), "count": counts.tolist()},
    }  # fmt: skip


def _decision(stage, error):
    tensor = {"error_before": 3 * error, "error_after": error}
    return {
        "stage": stage, "kept": "calibrated", "error": error**2, "errors": {"calibrated": error**2,
        "rtn": 4 * error**2},
        "learning": {"flipped": 0.0625, "iterations": 20}, "layers": {},
        "transforms": {
            "smoothquant": {"kept": True, "error": error**2, "tensors": dict.fromkeys((f"{stage}.q", f"{stage}.fc1"),
            tensor)},
            "rotation": {"kept": False, "error": 2 * error**2, "tensors": {f"{stage}.q": tensor}},
            "tcaq": {"kept": False, "tensors": {}},
            "ptq4dit": {"kept": False, "failed": "a <stage> overflows", "tensors": {f"{stage}.q": tensor}},
        },
    }  # fmt: skip
