"""Text: what is learned from, what is held out, which windows are taken, and how predictions of it are counted."""

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.corpus import read_corpus
from mlxquant.calibration.text import TextCalibration, choose_windows
from mlxquant.errors import CalibrationError, NumericsError
from mlxquant.metrics.prediction import predict
from mlxquant.models.gpt.tokenizers import ByteTokenizer, CharTokenizer

from support.command_line import fail, succeed
from support.tiny_language import TEXT, gpt_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gpt_folder(tmp_path_factory.mktemp("gpt"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_standard_library_is_split_by_modules():
    corpus = read_corpus()
    assert len(corpus.train) > 10 * len(corpus.held_out) > 1_000_000
    assert "standard library" in corpus.source
    assert corpus.facts == read_corpus().facts


def test_the_end_of_a_file_is_held_out(text):
    corpus = read_corpus(text)
    assert corpus.train + corpus.held_out == TEXT
    assert len(corpus.held_out) == len(TEXT) // 20


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "short").write_text("short")
    for name, match in (("bytes", "UTF-8"), ("short", "too few"), ("missing", "No such file"), (".", "directory")):
        with pytest.raises(CalibrationError, match=match):
            read_corpus(tmp_path / name)


def test_windows_do_not_overlap_and_follow_the_seed():
    tokens = np.arange(1000, dtype=np.int32)
    windows = choose_windows(tokens, 10, 32, seed=1)
    assert windows.shape == (10, 32)
    assert len(np.unique(windows)) == 320
    assert (np.diff(windows[:, 0]) >= 32).all()
    np.testing.assert_array_equal(windows, choose_windows(tokens, 10, 32, seed=1))
    assert not np.array_equal(windows, choose_windows(tokens, 10, 32, seed=2))
    assert choose_windows(tokens, None, 32).shape == (31, 32)
    with pytest.raises(CalibrationError, match="no window of 2000"):
        choose_windows(tokens, 1, 2000)
    for samples, length in ((0, 32), (-1, 32), (1, 0), (1, -1)):
        with pytest.raises(CalibrationError, match="at least 1"):
            choose_windows(tokens, samples, length)


@pytest.mark.parametrize(("count", "judged"), [(1, [0]), (2, [0, 1]), (5, [0, 2, 4]), (32, [0, 8, 16, 24])])
def test_some_batches_judge(count, judged):
    assert list(TextCalibration("gpt", "", np.zeros((1, 1), np.int32), {}).judged(count)) == judged


def test_calibration_depends_on_text_and_weights(folder, text):
    model = mq.load(folder)
    calib = mq.calibrate_text(model, text, samples=3, length=16)
    assert calib.windows.shape == (3, 16)
    sigmas, batches = calib.batches(model.adapter, 2)
    assert sigmas == [0.0, 0.0]
    assert [batches[0]["tokens"].shape, batches[1]["tokens"].shape] == [(2, 16), (1, 16)]
    other = mq.calibrate_text(model, text, samples=3, length=16, seed=5)
    assert calib.record != other.record
    with pytest.raises(CalibrationError, match="other weights"):
        mq.quantize(mq.load(gpt_folder(folder.parent / "second", seed=1)), calib, "rtn-w4a16")


class TestPrediction:
    def test_a_uniform_guess_costs_eight_bits_a_byte(self):
        found = predict(lambda tokens: mx.zeros((*tokens.shape, 256)), ByteTokenizer(), TEXT, 64)
        assert found.bits_per_character == pytest.approx(8)
        assert found.perplexity == pytest.approx(256, rel=1e-5)
        assert found.each.mean() == pytest.approx(8)

    def test_characters_are_counted_not_tokens(self):
        found = predict(lambda tokens: mx.zeros((*tokens.shape, 256)), ByteTokenizer(), "ü" * 200, 40)
        assert found.characters.sum() < found.tokens.sum()
        assert found.bits_per_character > 15
        letters = CharTokenizer("abü")
        exact = predict(lambda tokens: mx.zeros((*tokens.shape, 3)), letters, "aüb" * 100, 30)
        assert exact.bits_per_character == pytest.approx(np.log2(3))

    def test_every_token_but_the_first_is_predicted_once(self):
        seen = []

        def logits(tokens):
            seen.append(np.array(tokens))
            return mx.zeros((*tokens.shape, 256))

        found = predict(logits, ByteTokenizer(), TEXT[:257], 64)
        np.testing.assert_array_equal(np.concatenate(seen).ravel(), np.frombuffer(TEXT[:256].encode(), np.uint8))
        assert found.tokens.sum() == 256

    def test_equals_a_float64_reference(self, folder):
        model = mq.load(folder)
        found = model.predict(TEXT[:129], length=32)
        tokens = np.frombuffer(TEXT[:129].encode(), np.uint8).astype(int)
        for window in range(4):
            part = tokens[window * 32 : window * 32 + 33]
            logits = np.array(model.language.logits(mx.array(part[None, :-1]))).astype(np.float64)[0]
            costs = np.log(np.exp(logits).sum(-1)) - logits[np.arange(32), part[1:]]
            assert found.nats[window] == pytest.approx(costs.sum(), rel=1e-5)

    def test_a_limit_takes_windows_from_all_of_the_text(self):
        seen = []

        def logits(tokens):
            seen.extend(np.array(tokens)[:, 0].tolist())
            return mx.zeros((*tokens.shape, 128))

        text = "".join(chr(number) for number in range(101))
        predict(logits, ByteTokenizer(), text, 10, limit=4)
        assert seen == [0, 30, 60, 90]

    @pytest.mark.parametrize(
        ("text", "length", "limit"), [("", 64, None), (TEXT, 0, None), (TEXT, -5, None), (TEXT, 64, 0)]
    )
    def test_nothing_to_predict_is_said_so(self, text, length, limit):
        with pytest.raises(CalibrationError, match=r"too short|at least 1"):
            predict(lambda tokens: mx.zeros((*tokens.shape, 256)), ByteTokenizer(), text, length, limit)

    def test_limits_and_bad_models(self):
        assert len(predict(lambda t: mx.zeros((*t.shape, 256)), ByteTokenizer(), TEXT, 64, limit=3).nats) == 3
        with pytest.raises(CalibrationError, match="too short"):
            predict(lambda t: mx.zeros((*t.shape, 256)), ByteTokenizer(), "short", 64)
        with pytest.raises(NumericsError, match="NaN"):
            predict(lambda t: mx.full((*t.shape, 256), float("nan")), ByteTokenizer(), TEXT, 64)


def test_quantize_and_perplexity_on_the_command_line(folder, text, tmp_path):
    done, _ = succeed(
        "quantize",
        "--model",
        folder,
        "--recipe",
        "gptq-w4a8-token",
        "--data",
        text,
        "--samples",
        4,
        "--out",
        tmp_path / "out",
    )
    assert 4 < done["bits_per_quantized_weight"] < 5
    facts, said = succeed("perplexity", "--model", folder, "--model", tmp_path / "out", "--data", text)
    full, quantized = facts["models"][str(folder)], facts["models"][str(tmp_path / "out")]
    assert quantized["difference"] == pytest.approx(
        quantized["bits_per_character"] - full["bits_per_character"], abs=1e-9
    )
    assert quantized["bits_per_weight"] == pytest.approx(done["bits_per_weight"])
    assert "bits per character" in said


def test_options_of_the_other_kind_of_model_are_refused(folder, text, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "--data TEXT" in fail("quantize", "--model", folder, "--recipe", "rtn-w4a16", "--num-prompts", 2, *out)
    assert "--prompts FILE" in fail(
        "quantize", "--model", "mmdit-shapes", "--recipe", "rtn-w4a16", "--data", text, *out
    )
    assert "writes no text" in fail("perplexity", "--model", "mmdit-shapes")
    assert "draws no pictures" in fail("generate", "--model", folder, "--prompt", "a circle")
    assert not list(tmp_path.glob("out*"))
