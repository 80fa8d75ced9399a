"""``mlxquant train-gpt``: a run that is killed and resumed ends with the same bytes, and what it writes runs
quantized.
"""

import json

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant import train_gpt
from mlxquant.calibration.corpus import read_corpus
from mlxquant.errors import ArtifactError, MlxQuantError
from mlxquant.files import training_run
from mlxquant.layers.tree import parameters
from mlxquant.metrics.prediction import predict
from mlxquant.models.gpt.files import load_gpt, save_gpt
from mlxquant.models.gpt.tokenizers import ByteTokenizer
from mlxquant.qat.folders import quantized_gpt
from mlxquant.qat.integer import to_integer_layers
from mlxquant.qat.training import batch, fresh_gpt, mean_loss

from support.command_line import fail, run, succeed
from support.small_gpt import CONFIG, SMALL, TEXT, random_gpt, text_file

EVERYTHING = [
    "--quantize_attn_act", "--quantize_mlp_act", "--no-quantize_mlp_act_output",
    "--linear_variant_attn=quantized_linear",
    "--linear_variant_mlp=quantized_linear", "--quantize_linear_method=stochastic_quant",
    "--activations_quant_method=stochastic_quant",
    "--quantize_linear_bits=4", "--quantize_wte", "--store_activations", "--quantization_warmup_iters=1",
    "--quantization_level_schedule=linear", "--full_quant_iteration=5", "--dtype=bfloat16",
]  # fmt: skip


def arguments(folder, out, *options, iterations=7):
    return [
        "train-gpt",
        "--data",
        text_file(folder),
        "--out_dir",
        folder / out,
        *SMALL,
        "--max_iters",
        iterations,
        *options,
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [[], EVERYTHING], ids=["plain", "quantized"])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, monkeypatch, options):
    facts, _ = succeed(*arguments(tmp_path, "whole", *options))
    whole = contents(tmp_path / "whole")
    assert facts["iterations"] == 7
    assert facts["quantized"] == bool(options)
    monkeypatch.setattr(training_run, "INTERVAL", 0)
    save, saved = train_gpt.TrainingRun.save, []

    def save_and_die(self, trees, **options):
        save(self, trees, **options)
        saved.append(self.step)
        if self.step in (2, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt.TrainingRun, "save", save_and_die)
    for _ in range(2):
        assert run(*arguments(tmp_path, "killed", *options)).exit_code == 130
    again, _ = succeed(*arguments(tmp_path, "killed", *options))
    assert saved == [1, 2, 3, 4, 5, 6, 7]
    assert contents(tmp_path / "killed") == whole
    assert again["bits_per_character"] == facts["bits_per_character"]
    assert ("activations.safetensors" in whole) == bool(options)
    for name in set(whole) - {"training.safetensors"}:  # killed between its last iteration and the folder's files
        (tmp_path / "killed" / name).unlink()
    done, _ = succeed(*arguments(tmp_path, "killed", *options))
    assert done["bits_per_character"] == facts["bits_per_character"]
    assert contents(tmp_path / "killed") == whole


def test_what_it_says_is_what_the_folder_does(tmp_path):
    facts, said = succeed(*arguments(tmp_path, "out", "--linear_variant_mlp=quantized_linear",
    "--quantize_linear_method=ternary_quant",
                                     "--quantization_warmup_iters=2", "--eval-windows", "5"))  # fmt: skip
    assert f"{facts['bits_per_character']:.4f} bits per character of held-out text, quantized" in said
    model, tokenizer, known = quantized_gpt(tmp_path / "out")
    held_out = TEXT[len(TEXT) - len(TEXT) // 20 :]
    assert predict(model, tokenizer, held_out, 16, 5).bits_per_character == facts["bits_per_character"]
    assert known["quantization"]["quantize_linear_method"] == "ternary_quant"
    assert (known["training"]["max_iters"], known["text"]["source"]) == (7, "text.txt")
    plain = predict(load_gpt(tmp_path / "out")[0], tokenizer, held_out, 16, 5).bits_per_character
    assert plain != facts["bits_per_character"]
    integer = predict(to_integer_layers(model), tokenizer, held_out, 16, 5).bits_per_character
    assert integer == pytest.approx(facts["bits_per_character"], abs=1e-3)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_training_lowers_the_loss_by_character_and_by_byte(tmp_path):
    for level, size in (("char", len(set(TEXT))), ("byte", 256)):
        found = [
            succeed(*arguments(tmp_path, f"{level}{n}", "--level", level, iterations=n))[0]["bits_per_character"]
            for n in (1, 60)
        ]
        assert found[1] < 0.7 * found[0]
        model, tokenizer, _ = load_gpt(tmp_path / f"{level}60")
        assert model.config.vocab_size == tokenizer.vocab_size == size


def test_held_out_text_is_looked_at_without_a_change(tmp_path):
    plain, _ = succeed(*arguments(tmp_path, "without"))
    with_looks, said = succeed(*arguments(tmp_path, "with", "--eval_interval", 2, "--eval-iters", 1))
    assert said.count("nats a token") == 3
    assert with_looks["bits_per_character"] == plain["bits_per_character"]
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    model = random_gpt()
    before, ids = parameters(model), np.arange(300) % CONFIG.vocab_size
    first = mean_loss(model, ids, 0, 2, 3, 8, mx.bfloat16)
    assert first == mean_loss(model, ids, 0, 2, 3, 8, mx.bfloat16)
    assert all(
        mx.array_equal(value, before[name]) and value.dtype == mx.float32 for name, value in parameters(model).items()
    )


def test_a_trained_model_is_trained_on(tmp_path):
    succeed(*arguments(tmp_path, "first", iterations=30))
    options = [
        "--init-from",
        tmp_path / "first",
        "--linear_variant_mlp=quantized_linear",
        "--quantization_warmup_iters=0",
    ]
    small = ["train-gpt", "--data", text_file(tmp_path), "--max_iters", 3, "--batch_size", 4]
    facts, _ = succeed(*small, "--out-dir", tmp_path / "second", *options)
    start, end = (parameters(load_gpt(tmp_path / name)[0]) for name in ("first", "second"))
    assert all(0 < mx.abs(end[name] - value).max().item() < 0.02 for name, value in start.items() if value.ndim == 2)
    known = load_gpt(tmp_path / "second")[2]
    assert known["training"]["init_from"] == "first"
    assert len(known["training"]["started_at"]) == 64
    assert "n_embd 32" in fail(*small, "--out-dir", tmp_path / "third", *options, "--n_embd", 64)
    assert "level byte" in fail(*small, "--out-dir", tmp_path / "third", *options, "--level", "char")
    assert "other settings" in fail(*small, "--out-dir", tmp_path / "second", *options, "--quantize_linear_bits=4")
    assert "only GPTs of ours" in fail(*small, "--out-dir", tmp_path / "third", "--init-from", "mmdit-shapes")
    assert not (tmp_path / "third").exists()
    assert facts["quantized"]


def test_other_settings_and_foreign_folders_are_refused(tmp_path):
    succeed(*arguments(tmp_path, "out"))
    said = fail(*arguments(tmp_path, "out", "--quantize_attn_act_input", "--seed", 1))
    assert "quantize_attn_act_input False, now True" in said
    assert "seed 0, now 1" in said
    save_gpt(tmp_path / "theirs", random_gpt(), ByteTokenizer(), {})
    assert "without training.safetensors" in fail(*arguments(tmp_path, "theirs"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n_head", 3], "cannot have 3 heads"),
        (["--block_size", 400], "the held-out text has"),
        (["--quantization_level_schedule=linear"], "full_quant_iteration is None"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--learning_rate", 1e30], "the loss of iteration"),
        (["--init-from", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, message):
    said = fail(*arguments(tmp_path, "out", *options), code=1)
    assert message in said
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_weights_of_training_start_and_batches_are_functions_of_the_seed():
    one, two, other = (parameters(fresh_gpt(CONFIG, seed)) for seed in (1, 1, 2))
    assert all(mx.array_equal(value, two[name]) for name, value in one.items())
    assert not mx.array_equal(one["model.wte.weight"], other["model.wte.weight"])
    ids = np.arange(500)
    inputs, targets = batch(ids, 0, 3, 4, 8)
    assert inputs.shape == (4, 8)
    assert mx.array_equal(inputs[:, 1:], targets[:, :-1])
    assert mx.array_equal(inputs, batch(ids, 0, 3, 4, 8)[0])
    assert not mx.array_equal(inputs, batch(ids, 0, 4, 4, 8)[0])


def test_a_damaged_folder_is_one_of_our_errors(tmp_path):
    succeed(*arguments(tmp_path, "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["mlxquant"]["quantization"]["quantize_linear_bits"] = 12
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MlxQuantError, match="found 12"):
        quantized_gpt(tmp_path / "out")
    (tmp_path / "out" / "training.safetensors").write_bytes(b"x" * 100)
    assert "training.safetensors" in fail(*arguments(tmp_path, "out"))
    with pytest.raises(ArtifactError):
        quantized_gpt(tmp_path)
    assert issubclass(ArtifactError, mq.MlxQuantError)


def test_a_warm_up_that_takes_the_whole_run_is_said(tmp_path):
    quantized = "--linear_variant_mlp=quantized_linear"
    _, said = succeed(*arguments(tmp_path, "late", quantized, iterations=2))  # warm-up is 100 by default
    assert "none of the 2 iterations is quantized" in said
    _, said = succeed(*arguments(tmp_path, "in_time", quantized, "--quantization_warmup_iters=1", iterations=2))
    assert "none of the" not in said


def test_a_trained_model_goes_on_in_float32(tmp_path):
    """Small steps would be lost in float16."""
    save_gpt(tmp_path, random_gpt(), ByteTokenizer(), {}, mx.float16)
    model, _ = train_gpt.start(str(tmp_path), None, read_corpus(text_file(tmp_path)), 0)
    assert {value.dtype for value in parameters(model).values()} == {mx.float32}
