"""Every network equals its public PyTorch implementation on the same random weights, to 1e-4 relative."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.metrics import clip_files, clip_scores, inception, lpips
from mlxquant.metrics.images import largest_square, shortest_side
from mlxquant.metrics.torch_file import read_checkpoint
from mlxquant.metrics.weights import read_tensors

from support.random_weights import random_tensors

pytestmark = [pytest.mark.metrics, pytest.mark.filterwarnings("ignore")]  # warnings of the public code

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 67, 80, 3)).astype(np.float32)
REFERENCE = np.clip(IMAGES + 0.2 * RNG.standard_normal(IMAGES.shape), 0, 1).astype(np.float32)


def torch_images(torch, images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def mlx_tensors(tensors):
    return {name: mx.array(value) for name, value in tensors.items()}


@pytest.mark.parametrize(("name", "trunk"), [("alex", lpips.ALEX), ("vgg", lpips.VGG)])
def test_lpips(public, name, trunk):
    tensors = random_tensors(lpips.shapes(trunk))
    network = public.lpips.LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False).eval()
    theirs = {key for key in network.state_dict() if not key.startswith(("lins.", "scaling_layer."))}
    assert theirs == set(tensors)
    found = network.load_state_dict(
        {key: public.torch.from_numpy(value) for key, value in tensors.items()}, strict=False
    )
    assert not found.unexpected_keys
    with public.torch.no_grad():
        expected = (
            network(*(torch_images(public.torch, x) for x in (IMAGES, REFERENCE)), normalize=True).flatten().numpy()
        )
    np.testing.assert_allclose(lpips.Lpips(trunk, mlx_tensors(tensors), "test")(IMAGES, REFERENCE), expected, rtol=1e-4)


def test_inception(public, monkeypatch):
    """pytorch-fid's graph takes our table of names and shapes, strictly, and gives our features."""
    tensors = random_tensors(inception.shapes())
    torch = public.torch
    published = tensors | {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    state = {key: torch.from_numpy(value) for key, value in published.items()}
    monkeypatch.setattr(public.inception, "load_state_dict_from_url", lambda *args, **options: state)
    network = public.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch_images(torch, pictures))[0].flatten(1).numpy()
    found = np.array(inception.Inception(mlx_tensors(tensors), "test").forward(mx.array(pictures)))
    assert found.shape == expected.shape == (2, 2048)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def clip_folder(public, tmp_path_factory):
    """A tiny CLIPModel with its tokenizer, as transformers saves them, and the two themselves."""
    import json

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "ca",
        "cat</w>",
        "re",
        "red</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nr e\nre d</w>\n")
    tokenizer = public.transformers.CLIPTokenizerFast.from_pretrained(folder, model_max_length=16)
    tokenizer.save_pretrained(folder)
    end = len(words) - 1
    shared = {
        "num_hidden_layers": 3,
        "hidden_act": "quick_gelu",
        "num_attention_heads": 2,
        "hidden_size": 128,
        "intermediate_size": 200,
    }
    text = {
        **shared,
        "vocab_size": len(words),
        "max_position_embeddings": 16,
        "eos_token_id": end,
        "bos_token_id": end - 1,
        "pad_token_id": end,
    }
    vision = {**shared, "patch_size": 14, "image_size": 42}
    config = public.transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    public.torch.manual_seed(0)
    model = public.transformers.CLIPModel(config).eval()
    with public.torch.no_grad():
        for parameter in model.parameters():  # away from the initial values, where a norm's weight is 1 and a bias 0
            parameter += 0.05 * public.torch.randn_like(parameter)
    model.save_pretrained(folder)
    public.torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, model, tokenizer


TEXTS = ["a cat on a red mat", "Red  cat, red!", "", "naïve café 42", "cat " * 40]


def test_clip_towers(public, clip_folder):
    folder, model, tokenizer = clip_folder
    ours = clip_files.read(folder / "model.safetensors", folder / "tokenizer.json")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert ours.sizes.side == 42
    for text, row, mask in zip(TEXTS, ids["input_ids"], ids["attention_mask"], strict=True):
        assert ours._tokenize(text) == row[mask.bool()].tolist()
    pictures = np.random.default_rng(2).standard_normal((2, 42, 42, 3)).astype(np.float32)
    with public.torch.no_grad():
        output = model(**ids, pixel_values=torch_images(public.torch, pictures))
    np.testing.assert_allclose(ours.encode_texts(TEXTS), output.text_embeds.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.array(ours.images(mx.array(pictures))), output.image_embeds.numpy(), rtol=1e-4, atol=1e-5
    )


def test_clip_from_a_checkpoint_of_pytorch(public, clip_folder):
    folder = clip_folder[0]
    pictures = mx.array(np.random.default_rng(3).standard_normal((1, 42, 42, 3)).astype(np.float32))
    expected = clip_files.read(folder / "model.safetensors", folder / "tokenizer.json").images(pictures)
    np.testing.assert_array_equal(
        np.array(clip_files.read(folder / "pytorch_model.bin", None).images(pictures)), np.array(expected)
    )


def test_a_smaller_clip_is_not_taken_for_the_large_one(public, clip_folder):
    for load, side in ((clip_files.load, 224), (clip_files.load_336, 336)):
        with pytest.raises(ArtifactError, match=rf"expected ViT-L/14's \(1024, 24, 14, {side}\)"):
            load(clip_folder[0])


def test_clip_score_of_matched_pairs(public, clip_folder):
    """From pictures and prompts to the figure, with transformers' own preprocessing."""
    folder, model, tokenizer = clip_folder
    processor = (
        public.transformers.CLIPImageProcessorPil if hasattr(public.transformers, "CLIPImageProcessorPil") else None
    )
    processor = (processor or public.transformers.CLIPImageProcessor)(
        size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}
    )
    images, texts = IMAGES[:, :, :67], TEXTS[:3]
    pixels = processor(images=[(255 * image).round().astype(np.uint8) for image in images], return_tensors="pt")[
        "pixel_values"
    ]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with public.torch.no_grad():
        output = model(**ids, pixel_values=pixels)
    expected = 100 * np.maximum((output.image_embeds * output.text_embeds).sum(1).numpy(), 0)
    score = clip_scores.ClipScore(clip_files.read(folder / "model.safetensors", folder / "tokenizer.json"))
    np.testing.assert_allclose(score(images, texts), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(80, 67), (67, 80), (64, 64), (30, 41)])
def test_pictures_of_clip(public, size):
    """The shorter side and the centre as torchvision has them."""
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
    transforms = __import__("torchvision.transforms", fromlist=["x"])
    steps = [transforms.Resize(42, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(42)]
    np.testing.assert_array_equal(np.asarray(shortest_side(image, 42)), np.asarray(transforms.Compose(steps)(image)))
    assert largest_square(image, 42).size == (42, 42)


@pytest.mark.parametrize("new", [True, False])
def test_checkpoints_of_both_layouts(public, new, tmp_path):
    torch, path = public.torch, tmp_path / "weights.pth"
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "a": base,
        "view": base.T[1:4],
        "half": base.half(),
        "count": torch.tensor(7),
        "parameter": torch.nn.Parameter(base + 1),
    }
    torch.save(state, path, _use_new_zipfile_serialization=new)
    found = read_checkpoint(path)
    assert set(found) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy())
        assert np.array(read_tensors(path)[name]).shape == value.shape
