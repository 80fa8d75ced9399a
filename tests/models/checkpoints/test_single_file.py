"""Original single files: what comes out under diffusers' names, and what is said of a file that cannot be read."""

import json
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.layers.tree import parameters
from mlxquant.models.checkpoints.open import open_source
from mlxquant.models.checkpoints.sd3_file import SD3_FILE
from mlxquant.models.sd3.names import config_from_diffusers, from_diffusers, to_diffusers

from support.hub_stand_in import RepositoryNotFoundError, repositories
from support.original_files import original_autoencoder, original_transformer, write_sd3_file
from support.sd3_transformers import DUAL, KINDS, LARGE, MEDIUM, random_transformer

WIDE = {**MEDIUM, "attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64}
FILES = {**KINDS, "medium": WIDE, "dual without norms": {**DUAL, **WIDE, "dual_attention_layers": [1]}}
MEDIUM_HUB = "stabilityai/stable-diffusion-3-medium-diffusers"


@pytest.mark.parametrize("kind", FILES)
def test_a_transformer_comes_out_as_it_went_in(tmp_path, kind):
    path = tmp_path / "any.safetensors"
    model, said = write_sd3_file(path, FILES[kind])
    source = open_source(str(path))
    assert source.pipeline == "StableDiffusion3Pipeline"
    found = source.config("transformer")
    assert found == said
    back = from_diffusers(source.tensors("transformer"), config_from_diffusers(found, "test"))
    assert back.keys() == parameters(model).keys()
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(np.array(back[name]), np.array(value), name)


def test_a_file_may_be_the_transformer_alone(tmp_path):
    model = random_transformer(LARGE)
    tensors = original_transformer(to_diffusers(parameters(model), model.config), prefix="")
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    source = open_source(str(tmp_path / "a.safetensors"))
    assert source.config("transformer")["num_layers"] == 3
    assert source.tensors("transformer").keys() == to_diffusers(parameters(model), model.config).keys()


def test_what_was_read_is_not_held(tmp_path):
    """A source lives as long as the model: what the model lets go of, when it is quantized, is to be gone."""
    write_sd3_file(tmp_path / "a.safetensors", LARGE)
    source = open_source(str(tmp_path / "a.safetensors"))
    source.config("transformer")
    before = mx.get_active_memory()
    tensors = source.tensors("transformer")
    mx.eval(tensors)
    assert mx.get_active_memory() - before > 100_000
    del tensors
    assert mx.get_active_memory() - before < 10_000


@pytest.mark.diffusers
@pytest.mark.parametrize("kind", FILES)
def test_a_transformer_is_what_diffusers_reads_of_it(kind):
    torch, utils = import_module("torch"), import_module("diffusers.loaders.single_file_utils")
    model = random_transformer(FILES[kind])
    file = original_transformer(to_diffusers(parameters(model), model.config))
    theirs = utils.convert_sd3_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(np.array(value)) for name, value in file.items()}
    )
    ours = SD3_FILE.tensors["transformer"](file)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(np.array(ours[name]), value.numpy(), name)


@pytest.mark.diffusers
@pytest.mark.parametrize(("widths", "layers", "quant"), [((32, 64), 1, False), ((32, 32, 64), 2, True)])
def test_an_autoencoder_is_what_diffusers_reads_of_it(widths, layers, quant):
    """Its config builds the module that takes the tensors, too."""
    torch, diffusers = import_module("torch"), import_module("diffusers")
    utils = import_module("diffusers.loaders.single_file_utils")
    file = original_autoencoder(4, widths, layers, quant)
    ours = SD3_FILE.tensors["vae"](file)
    config = SD3_FILE.configs["vae"](ours)
    theirs = utils.convert_ldm_vae_checkpoint(
        {name: torch.from_numpy(np.array(value)) for name, value in file.items()}, config
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(np.array(ours[name]), value.numpy(), name)
    diffusers.AutoencoderKL.from_config(config).load_state_dict(theirs, strict=True)
    assert (config["scaling_factor"], config["shift_factor"], config["use_quant_conv"]) == (1.5305, 0.0609, quant)


def clip(which, width=64, layers=2, projection=False):
    """A CLIP text encoder's tensors in a single file."""
    shapes = {
        "embeddings.token_embedding.weight": (100, width),
        "embeddings.position_embedding.weight": (77, width),
        "final_layer_norm.weight": (width,),
    }
    shapes |= {f"encoder.layers.{i}.mlp.fc1.weight": (3 * width, width) for i in range(layers)}
    found = {f"text_encoders.clip_{which}.transformer.text_model.{name}": mx.ones(s) for name, s in shapes.items()}
    more = {f"text_encoders.clip_{which}.transformer.text_projection.weight": mx.ones((40, width))}
    return {**found, **(more if projection else {}), f"text_encoders.clip_{which}.logit_scale": mx.ones(())}


T5 = {
    "shared.weight": (90, 32),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (8, 2),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (24, 32),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (48, 32),
    "encoder.block.1.layer.0.SelfAttention.q.weight": (24, 32),
}
T5_TENSORS = {f"text_encoders.t5xxl.transformer.{name}": mx.ones(shape) for name, shape in T5.items()}


def test_text_encoders_in_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_sd3_file(path, LARGE, **clip("l"), **clip("g", 128, 3, projection=True), **T5_TENSORS)
    source = open_source(str(path))
    assert all(source.has(f"text_encoder{which}") for which in ("", "_2", "_3"))
    small, large, t5 = (source.config(f"text_encoder{which}") for which in ("", "_2", "_3"))
    assert (small["hidden_size"], small["num_hidden_layers"], small["hidden_act"]) == (64, 2, "quick_gelu")
    assert (small["num_attention_heads"], small["intermediate_size"], small["vocab_size"]) == (1, 192, 100)
    assert (large["projection_dim"], large["hidden_act"], large["num_attention_heads"]) == (40, "gelu", 2)
    assert large["architectures"] == small["architectures"] == ["CLIPTextModelWithProjection"]
    np.testing.assert_array_equal(
        np.array(source.tensors("text_encoder")["text_projection.weight"]), np.eye(64), "as diffusers has it"
    )
    assert "logit_scale" not in source.tensors("text_encoder")
    assert (t5["d_kv"], t5["num_heads"], t5["num_layers"], t5["d_ff"], t5["vocab_size"]) == (12, 2, 2, 48, 90)
    assert source.tensors("text_encoder_3").keys() == T5.keys()


def test_a_file_with_text_encoders_but_without_t5_draws_without_it(tmp_path):
    path = tmp_path / "a.safetensors"
    write_sd3_file(path, LARGE, **clip("l"), **clip("g", 128, 3, projection=True))
    source = open_source(str(path))
    assert [source.has(f"text_encoder{which}") for which in ("", "_2", "_3")] == [True, True, False]
    (tmp_path / "text_encoder_3").mkdir()
    mx.save_safetensors(str(tmp_path / "text_encoder_3" / "model.safetensors"), {"shared.weight": mx.ones((3, 2))})
    assert open_source(str(path)).has("text_encoder_3")
    assert not source.has("unet")


def test_what_the_file_lacks_lies_beside_it_or_on_the_hub(tmp_path, monkeypatch):
    """Of the scheduler nobody needs to be asked."""
    here = tmp_path / "here"
    here.mkdir()
    write_sd3_file(here / "a.safetensors", WIDE)
    held = {"model_index.json": {}, "tokenizer/vocab.json": {"a": 1}, "text_encoder/config.json": {"b": 2}}
    asked = repositories(monkeypatch, tmp_path / "hub", {MEDIUM_HUB: held})
    source = open_source(str(here / "a.safetensors"))
    assert source.config("scheduler")["shift"] == 3.0
    assert source.has("text_encoder_3"), "a file without text encoders takes them all from elsewhere"
    assert asked == []
    assert json.loads(source.file("tokenizer", "vocab.json").read_text()) == {"a": 1}
    assert source.config("text_encoder") == {"b": 2}
    for name, said in {"tokenizer/vocab.json": {"c": 3}, "scheduler/scheduler_config.json": {"shift": 1.0}}.items():
        (here / name).parent.mkdir()
        (here / name).write_text(json.dumps(said))
    assert json.loads(source.file("tokenizer", "vocab.json").read_text()) == {"c": 3}
    assert open_source(str(here / "a.safetensors")).config("scheduler") == {"shift": 1.0}


@pytest.mark.parametrize(
    ("said", "repository"),
    [
        (WIDE, MEDIUM_HUB),
        (LARGE, "stabilityai/stable-diffusion-3.5-large"),
        (DUAL, "stabilityai/stable-diffusion-3.5-medium"),
    ],
)
def test_a_gated_repository_is_named_with_the_command(tmp_path, monkeypatch, said, repository):
    write_sd3_file(tmp_path / "a.safetensors", said)
    repositories(monkeypatch, tmp_path / "hub", {repository: RepositoryNotFoundError("401")})
    with pytest.raises(ArtifactError) as caught:
        open_source(str(tmp_path / "a.safetensors")).tensors("text_encoder")
    for part in (
        "a.safetensors has no text_encoder",
        "nor a folder text_encoder beside it",
        f"accept the licence at https://huggingface.co/{repository.removesuffix('-diffusers')}",
        "hf auth login",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "command"),
    [
        (WIDE, "stable-diffusion-3-medium sd3_medium.safetensors"),
        (LARGE, "stable-diffusion-3.5-large sd3.5_large.safetensors"),
        (DUAL, "stable-diffusion-3.5-medium sd3.5_medium.safetensors"),
    ],
)
def test_the_command_gets_the_same_model(tmp_path, said, command):
    fp8(tmp_path / "a.safetensors", said)
    with pytest.raises(ArtifactError, match=f"'hf download stabilityai/{command}'"):
        open_source(str(tmp_path / "a.safetensors"))


def fp8(path, said=WIDE):
    """A file with one tensor in eight bits."""
    write_sd3_file(path, said)
    data, name = path.read_bytes(), "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    length = int(np.frombuffer(data[:8], np.uint64)[0])
    header = json.loads(data[8 : 8 + length])
    rows, columns = header[name]["shape"]
    header[name] |= {"dtype": "F8_E4M3", "shape": [rows * 4, columns]}  # of as many bytes
    text = json.dumps(header).encode()
    path.write_bytes(np.uint64(len(text)).tobytes() + text + data[8 + length :])


def of_flux(path):
    mx.save_safetensors(str(path), {"double_blocks.0.img_attn.qkv.weight": mx.ones(3)})


def without(path, name):
    write_sd3_file(path, WIDE)
    arrays = mx.load(str(path))
    del arrays[name]
    mx.eval(arrays)
    path.unlink()
    mx.save_safetensors(str(path), arrays)


FILE = "a.safetensors"
HOLED = "model.diffusion_model.joint_blocks.1.context_block.mlp.fc2.bias"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (FILE, fp8, r"stored in 8 bits, so the file is quantized already \(fp8\).*'hf download stabilityai/"),
        (FILE, lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "is a GGUF file.*had with 'hf download .* or 'hf"),
        ("a.gguf", lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "is a GGUF file"),
        ("a.ckpt", lambda path: path.write_bytes(b"PK\3\4"), "pickles .* are not read: get the same"),
        (FILE, lambda path: path.write_bytes(b"nothing"), "not a safetensors file, or a damaged one"),
        (FILE, of_flux, r"no single file of Stable Diffusion .* or 3.5 .*: it has double_blocks\.0.*; pass a file"),
        (FILE, lambda path: without(path, HOLED), r"the transformer lacks a tensor .*mlp\.fc2\.bias.*get the"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_an_error_about_it(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_source(str(path)).tensors("transformer")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
