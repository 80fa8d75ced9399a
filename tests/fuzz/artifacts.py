"""One of everything that mlxquant reads, made from tiny models, and who reads it."""

import json
from dataclasses import dataclass

import mlxquant as mq

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.api.plan import plan
from mlxquant.calibration.corpus import read_corpus
from mlxquant.contents.reader import read_contents
from mlxquant.contents.views import views
from mlxquant.evaluation.stopwatch import Stopwatch, kept_seconds
from mlxquant.files.blas import blas_kept_in
from mlxquant.files.checked import verify_tensors
from mlxquant.files.kept_arrays import Measurements
from mlxquant.files.training_run import TrainingRun
from mlxquant.layers.module_files import load_module, save_module
from mlxquant.models.gpt.files import save_gpt
from mlxquant.models.gpt.tokenizers import ByteTokenizer, CharTokenizer
from mlxquant.pipeline.activation_stats import ActivationStats
from mlxquant.pipeline.apply import TrackFiles
from mlxquant.pipeline.block_cache import BlockCache
from mlxquant.pipeline.quant_config import QuantConfig
from mlxquant.pipeline.samples import Samples
from mlxquant.pipeline.temporal import config_of
from mlxquant.qat.convert import quantize_while_training
from mlxquant.qat.folders import quantized_gpt, save_activations
from mlxquant.qat.options import QuantizationOptions
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.report.page import write_page
from mlxquant.sampling.prompts import Prompt, read_prompts, write_prompts
from mlxquant.spin_quant.files import FILE, save_spun
from mlxquant.spin_quant.learning import SpinQuant
from mlxquant.sweep.store import FolderStore
from mlxquant.visualize import choose, panel

from support.command_line import run
from support.contents_samples import write_mlx_checkpoint
from support.sample_report import write_sample
from support.six_steps import analyze, cache, collect, draw, optimize, tiny_model
from support.tiny_language import TEXT, gpt_folder, tiny_gpt
from support.tiny_pictures import tiny_adapter

PICTURES = {  # recipes whose files differ in kind: tables, branches, groups and rotations, tokens, probabilities
    "picture": "gptq-w4a8",
    "branch": "svdquant-w4a8",
    "groups": "rtn+rotation-w3a16-g32",
    "tokens": "rtn-w4a8-token",
    "softmax": "rtn+softmax8-w4a8",
}
NAMES = ["rtn-w4a8", "gptq+smoothquant-w4a8-g32", "taqdit-w4a8", "svdquant+mixed20-w4a16", "tcaqdm-w4a4"]
OVERRIDES = ["*.mlp.fc2=w8a16", "@attention=keep", "*.mlp.fc1=w2a4-g32-sym", "*.attn.q_proj=w4a8-token"]
CODES = {"quantize_attn_act": True, "linear_variant_attn": "quantized_linear", "store_activations": True}


@dataclass(frozen=True)
class Artifact:
    """``root`` is the folder that is copied and changed, ``files`` a glob of what is changed in it; ``read`` gets the
    copy.
    """

    name: str
    root: str
    files: str
    read: object


def convolutions():
    mx.random.seed(0)
    return nn.Sequential(nn.Conv2d(4, 32, 3), nn.Linear(32, 32), nn.Embedding(16, 32))


def write_pictures(folder):
    with tiny_model():
        model = mq.Model(tiny_adapter())
        work = folder / "work"
        calibration = mq.calibrate(model, prompts=1, steps=2, work=work)
        for name, recipe in PICTURES.items():
            done = mq.quantize(model, calibration, recipe, work=work / "stages" if name == "picture" else None)
            done.save(folder / name)
        jobs = {path.name: verify_tensors(path)["job"] for path in (work / "stages").glob("*.safetensors")}
        (work / "jobs.json").write_text(json.dumps(jobs))
        mq.export(mq.load(folder / "picture"), folder / "plain", "mlx", drop_activations=True)


def write_steps(folder):
    with tiny_model():
        draw(folder, 1, 2)
        cache(folder, 1)
        optimize(folder, folder / "weights", "--iters", 1)
        collect(folder, 1)
        analyze(folder)


def write_language(folder):
    model = mq.load(gpt_folder(folder / "gpt"))
    (folder / "text").mkdir()
    (folder / "text" / "text.txt").write_text(TEXT)
    calibration = mq.calibrate_text(model, folder / "text" / "text.txt", samples=2)
    done = mq.quantize(model, calibration, "rtn-w4a16-g32")
    done.save(folder / "language")
    mq.export(done, folder / "mlx-lm", "mlx-lm")
    trained = tiny_gpt(width=32, layers=1)
    quantize_while_training(trained, QuantizationOptions(CODES))
    trained.train()
    mx.eval(trained(mx.zeros((1, 8), mx.int32)))
    folder = folder / "trained"
    save_gpt(folder, trained, CharTokenizer(map(chr, range(32, 288))), {"quantization": CODES, "text": {}})
    save_activations(folder, trained)


class Component(nn.Module):
    """With the parts that FLUX.1's transformer has in mflux."""

    def __init__(self):
        super().__init__()
        self.x_embedder, self.context_embedder, self.proj_out = (nn.Linear(32, 32) for _ in range(3))
        self.time_text_embed, self.transformer_blocks = [nn.Linear(32, 32)], [nn.Linear(32, 32)]
        self.single_transformer_blocks, self.norm_out = [nn.Linear(32, 32)], nn.LayerNorm(32)


def write_single(folder):
    component = Component()
    mq.quantize_linears(component, "w4a16-g32")
    mq.export(component, folder / "mflux", "mflux")
    spun = tiny_gpt(width=32, layers=1)
    SpinQuant(spun, activation_bits=4, kv_bits=4).optimize([np.zeros((1, 16), np.int32)], steps=1).apply()
    save_spun(folder / "spun", spun, ByteTokenizer(), {"seed": 0})
    module = convolutions()
    mq.quantize_linears(module, "w4a16", convolutions=True, embeddings=True)
    (folder / "module").mkdir()
    save_module(module, folder / "module" / "module.safetensors")
    layer = mq.FakeQuantLinear(32, 8)
    for time in (0, 1):
        layer(mx.random.normal((4, 32), key=mx.random.key(time)), timestamp=time)
    layer.freeze()
    (folder / "fake").mkdir()
    layer.save(folder / "fake" / "layer.safetensors")
    kept = folder / "kept"
    kept.mkdir()
    TrainingRun(kept, {"a": 1}, 3).save({"model": {"w": mx.ones(3)}})
    Stopwatch(kept / "cost.json", "job").keep()
    Measurements(kept, "job").save("m", {"x": np.ones(4)})


def write_foreign(folder):
    write_mlx_checkpoint(folder / "checkpoint")
    write_sample(folder / "report", ["rtn-w4a8"], prompts=1, steps=2, side=4, blocks=1)
    for name in ("npz", "prompts"):
        (folder / name).mkdir()
    np.savez(folder / "npz" / "a.npz", a=np.arange(24.0).reshape(2, 12), b=np.int8(3), c=np.zeros((4, 4), np.float16))
    write_prompts(folder / "prompts" / "prompts.txt", [Prompt(seed, f"a large red circle {seed}") for seed in range(9)])


def write_all(folder):
    """Everything, each kind in a folder of its own."""
    for write in (write_pictures, write_language, write_single, write_foreign):
        write(folder)
    write_steps(folder / "calib")


def read_pictures(folder):
    mq.load(folder).images([Prompt(1, "a large red circle at left on white background")], steps=1)


def read_language(folder):
    mq.load(folder).predict(TEXT[:200], 16, 1)


def read_trained(folder):
    quantized_gpt(folder)
    mq.load(folder)


def inspect(path):
    command("inspect", path)


def visualize(path):
    command("visualize", path, "--sheet", "--out", path.parent / "pictures")


def look(folder):
    """What visualize would draw of a model."""
    for view in choose(views(read_contents(folder)), "all", folder):
        panel(view, "matrix"), panel(view, "histogram")


class CommandError(Exception):
    """What a command said before it ended with another code than 0."""


def command(*arguments):
    done = run(*arguments)
    if isinstance(done.exception, SystemExit):
        raise CommandError(done.stderr.removeprefix("Error: ").rstrip("\n"))
    if done.exception is not None:
        raise done.exception


def read_work(folder):
    mq.calibrate(mq.Model(tiny_adapter()), prompts=1, steps=2, work=folder)
    with blas_kept_in(folder):
        pass


def read_stages(folder):
    adapter = tiny_adapter()
    for path in sorted(folder.glob("*.safetensors")):
        job = json.loads((folder.parent / "jobs.json").read_text())[path.name]
        store = FolderStore(folder, job)
        store.load(next(stage for stage in adapter.stages if stage.name == path.stem), adapter.clock)


def read_kept(folder):
    TrainingRun(folder, {"a": 1}).resume()
    kept_seconds(folder / "cost.json", "job")
    Measurements(folder, "job").load("m")


def read_samples(folder):
    samples = Samples.read(folder)
    samples.check(tiny_adapter())
    samples.calibration(1, 1)


def read_cache(folder):
    read = BlockCache.read(folder / "adaround_cache")
    read.check(tiny_adapter())
    with tiny_model():
        read.inputs(tiny_adapter())
    for block in range(2):
        read.targets(block)


def read_weights(folder):
    adapter = tiny_adapter()
    config = folder / "activations" / "quant_config.json"
    store = TrackFiles(folder / "weights", config).store(adapter)
    for stage in adapter.blocks:
        store.load(stage, adapter.clock)


def read_statistics(folder):
    stats = ActivationStats.read(folder / "activations" / "layer_statistics.json")
    for path in stats.layers:
        stats.ranges(path), stats.shift(path), stats.sensitivity(path), stats.histogram(path), stats.summary(path)


def read_config(folder):
    config = QuantConfig.read(folder / "activations" / "quant_config.json")
    config.tables(smoothed=True, migrated=True)
    _ = config.mean_bits, config.divisors, config.migrations
    config_of(folder / "activations" / "layer_temporal_analysis.json")


def read_module(folder):
    load_module(convolutions(), folder / "module.safetensors")


ARTIFACTS = [
    *(Artifact(name, name, "*", read_pictures) for name in (*PICTURES, "plain")),
    Artifact("language", "language", "*", read_language),
    Artifact("gpt folder", "gpt", "*", read_language),
    Artifact("trained gpt", "trained", "*", read_trained),
    Artifact("spun gpt", "spun", "*", lambda folder: read_language(folder / FILE)),
    Artifact("module", "module", "*", read_module),
    Artifact("fake quant layer", "fake", "*", lambda folder: mq.FakeQuantLinear.load(folder / "layer.safetensors")),
    Artifact("calibration", "work", "calibration/*", read_work),
    Artifact("calibration", "work", "blas.json", read_work),
    Artifact("stages", "work", "stages/*.safetensors", lambda folder: read_stages(folder / "stages")),
    Artifact("kept", "kept", "*", read_kept),
    Artifact("samples", "calib", "manifest.json", read_samples),
    Artifact("samples", "calib", "samples/*.npz", read_samples),
    Artifact("block cache", "calib", "adaround_cache/**/*", read_cache),
    Artifact("weights", "calib", "weights/**/*", read_weights),
    Artifact("statistics", "calib", "activations/layer_statistics.json", read_statistics),
    Artifact("statistics", "calib", "activations/timestep_stats/*", read_statistics),
    Artifact("quant config", "calib", "activations/quant_config.*", read_config),
    Artifact("quant config", "calib", "activations/layer_temporal_analysis.json", read_config),
    Artifact("report", "report", "**/*.json", write_page),
    Artifact("prompts", "prompts", "*.txt", lambda folder: read_prompts(folder / "prompts.txt")),
    Artifact("text", "text", "*.txt", lambda folder: read_corpus(folder / "text.txt")),
    Artifact("inspect npz", "npz", "*", lambda folder: inspect(folder / "a.npz")),
    Artifact("visualize npz", "npz", "*", lambda folder: visualize(folder / "a.npz")),
    Artifact("inspect checkpoint", "checkpoint", "*", inspect),
    *(Artifact(f"inspect {name}", name, "**/*", inspect)
      for name in ("picture", "branch", "softmax", "language", "spun", "module", "fake", "mlx-lm", "mflux", "plain")),
    Artifact("inspect report", "report", "**/*.json", inspect),
    *(Artifact(f"inspect {name}", "calib", f"{name}/**/*", lambda folder, name=name: inspect(folder / name))
      for name in ("adaround_cache", "weights", "activations")),
    Artifact("inspect quant config", "calib", "activations/quant_config.*",
             lambda folder: inspect(folder / "activations" / "quant_config.json")),
    Artifact("look at model", "picture", "*", look),
    Artifact("look at statistics", "calib", "activations/**/*", lambda folder: look(folder / "activations")),
    Artifact("load export", "mlx-lm", "*.json", mq.load),
]  # fmt: skip


def read_recipe(name, overrides):
    """What a recipe would do to the tiny model."""
    recipe = parse_recipe(name, overrides)
    plan(mq.Model(tiny_adapter()), recipe)
