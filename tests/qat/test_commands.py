"""Commands that train, save integers and draw text, with options spelt with underscores: one after the other, as a
user types them.
"""

import json
import shlex
import subprocess
import sys

import pytest

from support.small_gpt import SMALL, text_file

TRAIN = """python3 -m mlxquant.train_gpt \
--quantize_linear_method="symmetric_quant" \
--activations_quant_method="symmetric_quant" \
--dtype="bfloat16" \
--quantization_warmup_iters=0 \
--quantize_attn_act \
--quantize_mlp_act \
--linear_variant_attn="quantized_linear" \
--linear_variant_mlp="quantized_linear" \
--store_activations"""
SAVE = """python3 -m mlxquant.save_weights \
--out_dir="quantized_model" \
--file_name="quantized_data" \
--file_type="npz" """
DRAW = """python3 -m mlxquant.visualize \
--file_name="quantized_data.npz" \
--image_folder="quantized_images" \
--weight="all" \
--graph="histogram" """


def shell(folder, command, *more):
    words = [sys.executable, *shlex.split(command)[1:], *more]
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_train_save_and_draw(tmp_path):
    trained = shell(
        tmp_path,
        TRAIN,
        "--data",
        text_file(tmp_path),
        "--out_dir=quantized_model",
        *SMALL,
        "--max_iters=3",
        "--n_layer=1",
    )
    assert trained["quantized"]
    saved = shell(tmp_path, SAVE)
    assert saved["file"] == "quantized_data.npz"
    assert len(saved["tensors"]) == 6 + 12
    drawn = shell(tmp_path, DRAW)
    assert sorted(path.name for path in (tmp_path / "quantized_images").iterdir()) == sorted(
        [*drawn["files"], "report.json"]
    )
    assert {tensor["name"].rsplit(".", 1)[0] for tensor in drawn["tensors"]} == set(saved["tensors"])
