"""benchmarks/language_peers.py: contenders of a format are equally large, and predict text that nobody chose by."""

import copy
import json
from importlib import import_module
from pathlib import Path

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

from mlxquant.calibration.corpus import Corpus
from mlxquant.errors import RecipeError
from mlxquant.metrics.prediction import predict_windows, spread

from support.tiny_language import TEXT, gpt_folder, llama_folder

CORPUS = Corpus("test", TEXT, TEXT[:3000])
WINDOWS = 6


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = import_module("language_peers")
    for place in (module, import_module("mlxquant.api.quantizing")):
        monkeypatch.setattr(place, "read_corpus", lambda path=None: CORPUS)
    return module


@pytest.fixture
def llama(tmp_path):
    return llama_folder(tmp_path / "llama", dtype=mx.float16, tie_word_embeddings=True)


@pytest.fixture
def bench(script, llama, tmp_path):
    return script.Bench(tmp_path / "rows", "llama", llama, WINDOWS, 8)


def test_windows_that_choices_were_made_on_are_left_out(script):
    chosen = script.unseen(1940, 256)
    assert len(set(chosen.tolist())) == 256
    for looked_at in script.LOOKED_AT:
        assert not set(chosen.tolist()) & set(spread(1940, looked_at).tolist())
    assert np.diff(chosen).max() < 30  # spread over the text
    assert script.unseen(9, 20).tolist() == list(range(9))


@pytest.mark.mlxlm
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "dwq@8"])
def test_contenders_of_a_format_are_as_large_as_ours(bench, method):
    method, at, windows = method.partition("@")
    theirs = bench.measure(f"mlx-lm {method}-w4-g64{at}{windows}")
    ours = bench.measure("gptq-w4a16-g64")
    assert theirs["bits_per_weight"] == pytest.approx(ours["bits_per_weight"], rel=1e-3)
    assert theirs["calibrated"] == ours["calibrated"] == 8
    assert len(theirs["nats"]) == len(ours["nats"]) == WINDOWS


@pytest.mark.mlxlm
def test_dynamic_bits_are_about_those_of_uniform_ones(bench):
    """mlx-lm's search ends between two sizes, so the layer between them may be counted or not."""
    sizes = [
        bench.measure(f"mlx-lm {name}-g64")["bits_per_weight"]
        for name in ("rtn-w3", "dynamic_quant-w4", "rtn-w4", "rtn-w5")
    ]
    assert sizes[0] < sizes[1] < sizes[3]
    assert abs(sizes[1] - sizes[2]) < (sizes[3] - sizes[0]) / 7  # a layer of seven


@pytest.mark.mlxlm
def test_what_a_command_does_by_default_quantizes_embeddings(bench):
    assert bench.measure("mlx-lm rtn")["bits_per_weight"] < bench.measure("mlx-lm rtn-w4-g64")["bits_per_weight"]


@pytest.mark.mlxlm
def test_stock_mlx_lm_predicts_what_our_model_does(bench):
    row = bench.measure("gptq-w3a16-g64")
    calib = mq.calibrate_text(bench.model, samples=10**9)
    assert {tuple(window) for window in bench.text.windows} == {tuple(window) for window in calib.windows}
    some = type(calib)(calib.model, calib.source, bench.text.windows[:8], calib.about)
    done = mq.quantize(bench.model, some, "gptq-w3a16-g64")
    own = predict_windows(done.language.logits, bench.model.language.tokenizer, bench.windows)
    exact = bench.measure("full precision")
    np.testing.assert_allclose(row["nats"], own.nats, rtol=1e-4)
    assert np.abs(np.array(row["nats"]) - exact["nats"]).max() > 1e-2  # the model is another one
    assert row["differs"] < 1e-3
    assert exact["bits_per_weight"] == 16


@pytest.mark.mlxlm
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlx-lm gptq-w3-g64", "packs 2, 4 or 8 bits"),
        ("mlx-lm dynamic_quant-w2-g64", "no 1 bit"),
        ("mlx-lm rtn-w4-g128", "64 inputs of a layer are no multiple of 128"),
        ("mlx-lm spqr-w4-g64", "none of mlx-lm's"),
        ("nonsense-w4a16", "nonsense"),
    ],
)
def test_what_there_is_not_is_refused(bench, name, said):
    with pytest.raises(RecipeError, match=said):
        bench.measure(name)


@pytest.mark.mlxlm
def test_awq_knows_no_gpt(script, tmp_path):
    bench = script.Bench(tmp_path / "rows", "gpt", gpt_folder(tmp_path / "gpt"), WINDOWS, 8)
    with pytest.raises(RecipeError, match="no configuration for gpt2"):
        bench.measure("mlx-lm awq-w4-g64")


@pytest.mark.mlxlm
@pytest.mark.parametrize("bias", [False, True])
def test_unpacked_layers_are_packed_ones(script, bias):
    contenders = import_module("mlx_lm_contenders")
    packed = nn.Linear(128, 96, bias=bias).to_quantized(64, 3)
    x = mx.random.normal((4, 128), key=mx.random.key(0))
    unpacked = contenders.Unpacked(packed)
    np.testing.assert_allclose(np.array(unpacked(x)), np.array(packed(x)), atol=1e-4)
    again = unpacked.packed()
    for name in ("weight", "scales", "biases", *["bias"] * bias):
        assert mx.array_equal(again[name], packed[name])
    np.testing.assert_array_equal(np.array(again(x)), np.array(packed(x)))


@pytest.mark.mlxlm
def test_dwq_learns_from_the_model_and_leaves_codes_alone(script, bench, llama):
    contenders = import_module("mlx_lm_contenders")
    windows = mx.array(bench.text.windows[:64])
    teacher, config = script.stock(llama)
    teacher.set_dtype(mx.float32)
    results = {}
    for name in ("rtn-w2-g64", "dwq*1e-3-w2-g64"):
        contender = contenders.Contender.parse(name, 64)
        results[name] = contender.quantize(copy.deepcopy(teacher), config, contenders.Text(windows, windows[:32]))
    plain, learned = results.values()
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            other = dict(learned.named_modules())[path]
            assert mx.array_equal(layer.weight, other.weight)
            assert not mx.array_equal(layer.scales, other.scales)

    def distance(model):
        found = nn.losses.kl_div_loss(*(nn.log_softmax(run(windows[:8])) for run in (script.precise(model), teacher)))
        return found.mean().item()

    assert distance(learned) < 0.9 * distance(plain)


@pytest.mark.mlxlm
def test_the_command_keeps_rows_and_shows_them_by_size(script, llama, tmp_path, monkeypatch):
    rows = ["--row", "mlx-lm rtn-w4-g64", "--row", "rtn-w2a16-g64", "--row", "mlx-lm gptq-w3-g64"]
    arguments = ["--work", str(tmp_path / "rows"), "--llama", str(llama), "--only", "llama", "--windows", "4", *rows]
    done = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["models"]["llama"].keys() == {"full precision", "mlx-lm rtn-w4-g64", "rtn-w2a16-g64"}
    assert list(said["refused"]) == ["llama: mlx-lm gptq-w3-g64"]
    shown = [line.split("`")[1] for line in done.stderr.splitlines() if line.startswith("| `")]
    assert shown == ["rtn-w2a16-g64", "mlx-lm rtn-w4-g64", "full precision"]

    monkeypatch.setattr(script.Bench, "measure", lambda bench, name: pytest.fail(name))
    again = CliRunner().invoke(script.main, arguments[:-2], catch_exceptions=False)
    assert json.loads(again.stdout.splitlines()[-1])["models"] == said["models"]


def test_recipes_are_measured_in_every_format_or_in_their_own(script):
    found = list(script.names("gptq kron-w3a16", ("w4-g64", "w2-g64"), ("rtn",), ("awq",)))
    assert found == [
        "full precision", "mlx-lm rtn-w4-g64", "gptq-w4a16-g64", "mlx-lm rtn-w2-g64", "gptq-w2a16-g64", "kron-w3a16",
        "mlx-lm awq",
    ]  # fmt: skip
