"""``W8A16Linear`` and ``quantize_linears`` as they are used: by itself, in a model of one's own, in a text model like
CodeGen, in a detector of convolutions.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant import W8A16Linear


class MyCustomModel(nn.Module):
    """Any model with Linear layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.lm_head = (
            nn.Embedding(100, 64),
            nn.Linear(64, 256),
            nn.Linear(256, 100, bias=False),
        )

    def __call__(self, tokens):
        return self.lm_head(nn.relu(self.hidden(self.embed(tokens))))


class CodeGenBlock(nn.Module):
    """Attention and MLP side by side on one norm, attention from one fused projection: Salesforce/codegen's block."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.heads = nn.LayerNorm(width), heads
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc_in, self.fc_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x):
        batch, length, width = x.shape
        h = self.ln_1(x)
        q, k, v = self.qkv_proj(h).reshape(batch, length, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length, x.dtype)
        seen = mx.fast.scaled_dot_product_attention(q, k, v, scale=(width // self.heads) ** -0.5, mask=mask)
        return x + self.out_proj(seen.transpose(0, 2, 1, 3).reshape(x.shape)) + self.fc_out(nn.gelu(self.fc_in(h)))


class CodeGen(nn.Module):
    def __init__(self, vocabulary=80, width=64):
        super().__init__()
        self.transformer = {"wte": nn.Embedding(vocabulary, width), "h": [CodeGenBlock(width, 4) for _ in range(2)]}
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def __call__(self, tokens):
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.ln_f(x))

    def generate(self, tokens, count):
        """Greedy continuation."""
        for _ in range(count):
            tokens = mx.concatenate([tokens, self(tokens)[:, -1:].argmax(-1)], axis=1)
        return tokens


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(width, 16, 1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, width, 1),
        )
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm(16), nn.BatchNorm(16), nn.BatchNorm(width)

    def __call__(self, x):
        y = nn.relu(self.bn1(self.conv1(x)))
        return nn.relu(x + self.bn3(self.conv3(nn.relu(self.bn2(self.conv2(y))))))


class Detector(nn.Module):
    """DETR's parts: a convolutional backbone, a transformer over its cells and learned queries, a head for classes and
    one for boxes.
    """

    def __init__(self, width=64, classes=11, queries=6):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 32, 7, stride=2, padding=3), Bottleneck(32), Bottleneck(32))
        self.input_projection = nn.Conv2d(32, width, 1)
        self.query_position_embeddings = nn.Embedding(queries, width)
        self.transformer = nn.Transformer(width, 4, num_encoder_layers=1, num_decoder_layers=1, mlp_dims=128)
        self.class_labels_classifier = nn.Linear(width, classes)
        self.bbox_predictor = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def __call__(self, picture):
        cells = self.input_projection(self.backbone(picture)).flatten(1, 2)
        queries = mx.broadcast_to(
            self.query_position_embeddings.weight, (len(picture), *self.query_position_embeddings.weight.shape)
        )
        found = self.transformer(cells, queries, None, None, None)
        return self.class_labels_classifier(found), mx.sigmoid(self.bbox_predictor(found))


def built(model_class, dtype=mx.float32):
    mx.random.seed(0)
    model = model_class()
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def relative(found, exact):
    found, exact = (np.array(value.astype(mx.float32)) for value in (found, exact))
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def test_basic_usage():
    model, input_data = built(MyCustomModel), mx.array([[1, 2, 3]])
    exact = model(input_data)
    mq.quantize_linears(model, "w8a16", exclude=["lm_head"])
    output = model(input_data)
    assert isinstance(model.hidden, W8A16Linear)
    assert type(model.lm_head) is nn.Linear
    assert 0 < relative(output, exact) < 0.01


def test_creating_quantized_layers():
    quant_layer = W8A16Linear(in_features=512, out_features=256, bias=True)
    original_weights = mx.random.normal((256, 512), key=mx.random.key(0))
    quant_layer.quantize(original_weights)
    x = mx.random.normal((4, 512), key=mx.random.key(1))
    assert relative(quant_layer(x), x @ original_weights.T) < 0.01


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_language_model_without_its_head(dtype):
    model, prompt = built(CodeGen, dtype), mx.array([[4, 8, 15]])
    exact = model(prompt)
    mq.quantize_linears(model, "w8a16", exclude=["lm_head"])
    logits = model(prompt)
    assert logits.dtype == dtype
    assert 0 < relative(logits, exact) < 0.02
    assert model.generate(prompt, 5).shape == (1, 8)
    assert {path for path, m in model.named_modules() if type(m) is nn.Linear} == {"lm_head"}


def test_an_object_detector():
    model, picture = built(Detector), mx.random.normal((1, 32, 32, 3), key=mx.random.key(1))
    exact = model(picture)
    report = mq.quantize_linears(model, "w8a16", exclude=[])
    assert not {path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for found, wanted in zip(model(picture), exact, strict=True):
        assert 0 < relative(found, wanted) < 0.05
    assert report.ratio > 3  # "significant memory reduction", of the whole model, as it is stored
    assert 8 < report.bits_per_weight < 10.5
    assert {layer.path for layer in report.kept} == {"query_position_embeddings"}


def test_a_quantized_detector_compiles_and_passes_gradients_on():
    model, picture = built(Detector), mx.random.normal((1, 32, 32, 3), key=mx.random.key(1))
    mq.quantize_linears(model, "w8a16")
    boxes = mx.compile(lambda x: model(x)[1], inputs=[model.state])(picture)
    np.testing.assert_allclose(np.array(boxes), np.array(model(picture)[1]), atol=1e-6)
    gradient = mx.grad(lambda x: model(x)[0].square().sum())(picture)
    step = 1e-2 * gradient / mx.linalg.norm(gradient.reshape(-1))
    up, down = (model(picture + sign * step)[0].square().sum().item() for sign in (1, -1))
    assert up - down == pytest.approx(2e-2 * mx.linalg.norm(gradient.reshape(-1)).item(), rel=0.1)
    assert not model.class_labels_classifier.trainable_parameters()


def test_excluding_several_layers():
    model = built(Detector)
    excluded_layers = ["class_labels_classifier", "bbox_predictor", "backbone"]
    mq.quantize_linears(model, "w8a16", exclude=excluded_layers)
    kept = {path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {path.split(".")[0] for path in kept} == set(excluded_layers)


def test_quantized_layers_can_be_accessed():
    model = built(MyCustomModel)
    mq.quantize_linears(model, "w8a16")
    lines = [
        f"Layer {name}: scales={m.scales.shape}" for name, m in model.named_modules() if isinstance(m, W8A16Linear)
    ]
    assert sorted(lines) == ["Layer hidden: scales=(256, 1)", "Layer lm_head: scales=(100, 1)"]


def test_the_stated_equations():
    """``scales = abs(weights).max(dim=-1) / 127``, ``round(weights / scales)``, ``linear(input, int8_weights) *
    scales``.
    """
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=(8, 32)).astype(np.float32), rng.normal(size=(3, 32)).astype(np.float32)
    layer = W8A16Linear(32, 8, bias=False).quantize(mx.array(weights))
    scales = np.abs(weights).max(-1) / 127
    np.testing.assert_allclose(np.array(layer.scales)[:, 0], scales, rtol=2**-10)  # they are stored as float16
    int8_weights = layer.codes().astype(np.int32) - 128
    assert (np.abs(int8_weights - weights / np.array(layer.scales).astype(np.float32)) <= 0.51).all()
    expected = (x.astype(np.float64) @ int8_weights.T) * np.array(layer.scales).astype(np.float64)[:, 0]
    np.testing.assert_allclose(np.array(layer(mx.array(x))), expected, atol=1e-5)


def test_a_quantized_model_survives_a_file(tmp_path):
    model, tokens = built(CodeGen), mx.array([[4, 8, 15]])
    mq.quantize_linears(model, "w4a16-g64", exclude=["lm_head"])
    path = mq.save_module(model, tmp_path / "codegen.safetensors")
    assert mx.array_equal(mq.load_module(CodeGen(), path)(tokens), model(tokens)).item()
