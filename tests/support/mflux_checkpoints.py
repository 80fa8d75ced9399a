"""Whole pipelines of mflux, small and with random weights, and their folders, in its own layout and in the hub's.

Text encoders, transformer, autoencoder, tokenizers and scheduler are mflux's classes, built by its constructors, saved
by its ``save_model`` and loaded by its loader; only the numbers of tests/support/mflux_widths.py are others. All of it
runs inside ``small_models``, drawing too: some of the numbers stand in the code that runs.
"""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from support.mflux_models import mflux
from support.mflux_rewritten import rewritten
from support.mflux_tokenizers import write_tokenizers
from support.mflux_widths import CONFIGURATIONS, EDITS, FILES

DRAW = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 2, "width": 64, "height": 64}


@dataclass(frozen=True)
class Checkpoint:
    """A model that mflux knows.

    Attributes:
        name: Its name in mflux's table of models.
        pipeline: Where its class stands.
        definition: Where the definition of its components and tokenizers stands.
        source: The name of a fine-tune whose base ``name`` is, as ``--model`` with ``--base-model``.
        blocks: What a checkpoint's transformer tells its builder: how many blocks each list has, or that it has a
            part (0).
    """

    name: str
    pipeline: str
    definition: str
    source: str | None = None
    blocks: tuple[tuple[str, int], ...] = ()

    @property
    def config(self):
        models = mflux("models.common.config.model_config.ModelConfig")
        if self.source is None:
            return models.from_name(self.name)
        return models.from_name(self.source, base_model=self.name)

    def components(self):
        """mflux's definitions of its components."""
        return mflux(self.definition).get_components()


def _flux1(name, double=2, single=2, source=None):
    return Checkpoint(
        name, "models.flux.variants.txt2img.flux.Flux1",
        "models.flux.weights.flux_weight_definition.FluxWeightDefinition", source,
        (("transformer_blocks", double), ("single_transformer_blocks", single)),
    )  # fmt: skip


def _z_image(name):
    return Checkpoint(
        name, "models.z_image.variants.z_image.ZImage",
        "models.z_image.weights.z_image_weight_definition.ZImageWeightDefinition",
    )  # fmt: skip


def _flux2(name):
    return Checkpoint(
        name, "models.flux2.variants.txt2img.flux2_klein.Flux2Klein",
        "models.flux2.weights.flux2_weight_definition.Flux2KleinWeightDefinition",
    )  # fmt: skip


def _flux3(name, kind, blocks):
    return Checkpoint(
        name, "models.flux3.variants.txt2img.flux3_klein.Flux3Klein",
        f"models.flux3.weights.flux3_weight_definition.Flux3Klein{kind}WeightDefinition", blocks=blocks,
    )  # fmt: skip


def _ernie(name):
    return Checkpoint(
        name, "models.ernie_image.variants.txt2img.ernie_image.ErnieImage",
        "models.ernie_image.weights.ernie_weight_definition.ErnieWeightDefinition",
    )  # fmt: skip


CHECKPOINTS = {
    "dev": _flux1("dev"),
    "schnell": _flux1("schnell"),
    "lite": _flux1("dev", 8, 38, source="Freepik/flux.1-lite-8B"),
    "z-image-turbo": _z_image("z-image-turbo"),
    "z-image": _z_image("z-image"),
    "flux2-klein-4b": _flux2("flux2-klein-4b"),
    "flux2-klein-base-4b": _flux2("flux2-klein-base-4b"),
    "flux3-image-klein": _flux3("flux3-image-klein", "", (("target_timestep_embedder", 0),)),
    "flux3-image-klein-base": _flux3("flux3-image-klein-base", "Base", ()),
    "qwen-image": Checkpoint(
        "qwen-image",
        "models.qwen.variants.txt2img.qwen_image.QwenImage",
        "models.qwen.weights.qwen_weight_definition.QwenWeightDefinition",
    ),
    "ernie-image-turbo": _ernie("ernie-image-turbo"),
    "ernie-image": _ernie("ernie-image"),
    "krea-2": Checkpoint(
        "krea-2",
        "models.krea2.variants.txt2img.krea2.Krea2",
        "models.krea2.weights.krea2_weight_definition.Krea2WeightDefinition",
    ),
    "boogu-image-turbo": Checkpoint(
        "boogu-image-turbo",
        "models.boogu.variants.txt2img.boogu_image.BooguImage",
        "models.boogu.weights.boogu_weight_definition.BooguWeightDefinition",
    ),
    "moss-image-sft": Checkpoint(
        "moss-image-sft",
        "models.moss_image.variants.txt2img.moss_image.MOSSImage",
        "models.moss_image.weights.moss_image_weight_definition.MOSSImageWeightDefinition",
    ),
    "fibo": Checkpoint(
        "fibo",
        "models.fibo.variants.txt2img.fibo.FIBO",
        "models.fibo.weights.fibo_weight_definition.FIBOWeightDefinition",
    ),
    "fibo2": Checkpoint(
        "fibo2",
        "models.fibo2.variants.txt2img.fibo2.Fibo2",
        "models.fibo2.weights.fibo2_weight_definition.Fibo2WeightDefinition",
    ),
    "anima-turbo": Checkpoint(
        "anima-turbo",
        "models.anima.variants.txt2img.anima.Anima",
        "models.anima.weights.anima_weight_definition.AnimaWeightDefinition",
    ),
    "iris-3b": Checkpoint(
        "iris-3b",
        "models.iris.variants.txt2img.iris.Iris",
        "models.iris.weights.iris_weight_definition.IrisTurboWeightDefinition",
    ),
    "ideogram-4-fp8": Checkpoint(
        "ideogram-4-fp8",
        "models.ideogram4.variants.txt2img.ideogram4.Ideogram4",
        "models.ideogram4.weights.ideogram4_weight_definition.Ideogram4WeightDefinition",
    ),
    "ming-image-design": Checkpoint(
        "ming-image-design",
        "models.ming_image.variants.ming_image.MingImage",
        "models.ming_image.weights.ming_image_weight_definition.MingImageWeightDefinition",
    ),
    "qwen-image-2.1": Checkpoint(
        "qwen-image-2.1",
        "models.qwen21.variants.edit.qwen_image_21_edit.QwenImage21Edit",
        "models.qwen21.weights.qwen_image21_weight_definition.QwenImage21WeightDefinition",
    ),
}
"""Families of mflux, by the names of the tests: those of mflux, and ``lite`` for FLUX.1-lite, which has none there."""
FAMILIES = (
    "schnell", "z-image-turbo", "flux2-klein-4b", "flux3-image-klein", "qwen-image", "ernie-image-turbo", "krea-2",
    "boogu-image-turbo", "moss-image-sft", "fibo", "fibo2", "anima-turbo", "iris-3b",
    "ideogram-4-fp8", "ming-image-design", "qwen-image-2.1",
)  # fmt: skip
"""One model of each."""


@contextmanager
def small_models(precision=mx.float32, compiled=False):
    """mflux with small models in place of its own.

    Args:
        precision: What mflux computes in.
        compiled: Whether ``mx.compile`` works inside. On the CPU it calls a C++ compiler for every new graph, which
            takes a minute for the prediction of some families; without it a picture takes a second or two.
    """
    with ExitStack() as stack:
        if not compiled:
            mx.disable_compile()
            stack.callback(mx.enable_compile)
        stack.enter_context(rewritten(EDITS))
        models = mflux("models.common.config.model_config.AVAILABLE_MODELS")
        for name, values in CONFIGURATIONS.items():
            stack.enter_context(mock.patch.multiple(models[name], **values))
        config = mflux("models.common.config.model_config.ModelConfig")
        stack.enter_context(mock.patch.object(config, "precision", precision))
        yield


def build(name, folder, seed=0):
    """A pipeline with random weights, made by mflux's constructor. Its tokenizers are written to the folder first.

    Args:
        name: One of ``CHECKPOINTS``.
        folder: Where tokenizers go, and are read from.
        seed: Of the weights.

    Returns:
        The pipeline.
    """
    checkpoint, folder = CHECKPOINTS[name], Path(folder)
    write_tokenizers(mflux(checkpoint.definition).get_tokenizers(), folder)
    for file, facts in FILES.get(name, {}).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(facts))
    loader = mflux("models.common.weights.loading.weight_loader.WeightLoader")
    qwen21 = mflux("models.qwen21.qwen21_initializer.Qwen21Initializer")  # loads one component after the other
    mx.random.seed(seed)
    with (
        mock.patch.object(loader, "load", staticmethod(lambda weight_definition, **_: _nothing(checkpoint))),
        mock.patch.object(qwen21, "load_components", staticmethod(_no_components)),
    ):
        pipeline = load(name, folder)
    for component in CHECKPOINTS[name].components():
        module = getattr(pipeline, component.model_attr or component.name)
        for _, layer in module.named_modules():
            if hasattr(layer, "weight_scale"):  # 8-bit floats, with a scale for each row
                layer.weight = mx.to_fp8(mx.random.normal((layer.out_features, layer.in_features)))
                layer.weight_scale = mx.full((layer.out_features,), layer.in_features**-0.5)
        module.update(tree_map_with_path(_random, module.parameters()))
        mx.eval(module.parameters())
    if name in ("dev", "schnell", "lite"):  # one table of biases in a checkpoint, for all blocks
        first, *others = [block.attention.SelfAttention for block in pipeline.t5_text_encoder.t5_blocks]
        for block in others:
            block.relative_attention_bias.weight = first.relative_attention_bias.weight
    return pipeline


def load(name, folder, **options):
    """A pipeline from a folder, by mflux's own constructor; options are its ``quantize``, ``lora_paths`` and so on."""
    checkpoint = CHECKPOINTS[name]
    return mflux(checkpoint.pipeline)(model_config=checkpoint.config, model_path=str(folder), **options)


def saved(name, folder, seed=0, quantize=None):
    """A pipeline, and its folder as ``mflux-save`` leaves it, ``mflux_model.json`` included."""
    checkpoint, folder = CHECKPOINTS[name], Path(folder)
    pipeline = build(name, folder, seed)
    pipeline.save_model(str(folder))
    if quantize is not None:
        pipeline = load(name, folder, quantize=quantize)
        pipeline.save_model(str(folder))
    mflux("models.common.weights.saving.saved_model_info.SavedModelInfo").write(
        target=folder, key=checkpoint.name, model_path=checkpoint.source, quantize=quantize,
        model_config_repo_id=checkpoint.config.model_name, lora_sources=[], lora_files=[], lora_scales=[],
    )  # fmt: skip
    return pipeline


def draw(pipeline, **changes):
    """The picture, as an array [64,64,3] of bytes."""
    options = {**DRAW, **changes}
    if isinstance(pipeline, mflux("models.fibo.variants.txt2img.fibo.FIBO")):  # it reads JSON
        options["prompt"] = json.dumps({"short_description": options["prompt"]})
    if isinstance(pipeline, mflux("models.ideogram4.variants.txt2img.ideogram4.Ideogram4")):  # it would like to
        options["warn_on_caption_issues"] = False
    return np.array(pipeline.generate_image(**options).image.convert("RGB"))


def _nothing(checkpoint):
    """What a loader returns that has found the parts of a checkpoint, and no weights in them."""
    places = "models.common.weights.loading.loaded_weights"
    parts = {component.name: {} for component in checkpoint.components()}
    parts["transformer"] = {name: [{} for _ in range(count)] if count else {} for name, count in checkpoint.blocks}
    return mflux(f"{places}.LoadedWeights")(components=parts, meta_data=mflux(f"{places}.MetaData")())


def _no_components(pipeline, *arguments, **options):
    pipeline.bits = None


def _random(path, value):
    """Gains, biases and tokens that MLX makes all the same get some noise; tables of angles and statistics stay."""
    if value.dtype != mx.uint8 and path.rpartition(".")[2] in ("weight", "bias", "x_pad_token", "cap_pad_token"):
        return value + 0.05 * mx.random.normal(value.shape)
    return value
