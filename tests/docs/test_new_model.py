"""docs/new-model.md takes a model from a folder of weights to a picture, as it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxquant as mq

# isort: split
import mlx.core as mx
import numpy as np
from PIL import Image

from mlxquant.models import catalog
from mlxquant.sweep.folding import check_folds
from models.test_register import package

PAGE = Path(__file__).parents[2] / "docs" / "new-model.md"
FILES = ["tiny_dit.py", "make_folder.py", "tiny_host.py", "draw.py"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A folder in which the page's files were written, and those that are scripts ran; what the last of them left."""
    folder = tmp_path_factory.mktemp("page")
    found = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == FILES
    assert len(re.findall("^```python", PAGE.read_text(), re.MULTILINE)) == len(FILES)
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(catalog, "_registered", {})
        for name, text in found:
            (folder / name).write_text(text)
            if name in ("make_folder.py", "draw.py"):
                names = {}
                exec(compile(text, str(folder / name), "exec"), names)
        yield folder, names
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_it_draws_a_square_of_its_colour_and_the_quantized_model_nearly_the_same(page):
    folder, names = page
    exact, done, again = (names[name] for name in ("model", "quantized", "again"))
    prompt = [mq.Prompt(7, "red")]
    picture = exact.images(prompt)
    assert picture[0, 3:5, 3:5].mean((0, 1)) == pytest.approx([1, 0, 0], abs=0.2)
    assert mq.compare(exact, done, prompt).psnr_db["quantized"][0] > 20
    np.testing.assert_array_equal(again.images(prompt), done.images(prompt))
    with Image.open(folder / "red.png") as drawn:
        assert drawn.size[0] >= 2 * picture.shape[2]
    assert done.size.bits_per_weight < 8


def test_norms_take_in_what_smoothquant_finds(page):
    _, names = page
    stages = {stage["stage"]: stage for stage in names["quantized"].facts["stages"]}
    assert any(stage.get("transforms", {}).get("smoothquant", {}).get("tensors") for stage in stages.values())


def test_its_folder_stands_for_it_and_its_edges_are_true(page):
    folder, _ = page
    assert catalog.find_model(str(folder / "tiny-dit")) == ("tiny-dit", str(folder / "tiny-dit"))
    adapter = mq.load(folder / "tiny-dit").adapter
    check_folds(adapter, adapter.state(mx.ones((1, 8, 8, 3)), adapter.encode(["blue"]), 0.3), 0.3, 1e-4)


def test_the_command_line_knows_it_once_it_is_installed(page, monkeypatch):
    folder, _ = page
    toml = re.search(r'^```toml\n\[project.entry-points."(.+)"\]\n(.+) = "(.+)"\n```$', PAGE.read_text(), re.MULTILINE)
    assert toml[1] == catalog.GROUP
    package(folder, toml[3], toml[2])
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{PAGE.parents[1] / 'src'}")
    command = ["inspect", "tiny-dit-w4a8", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "mlxquant", *command], cwd=folder, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)
    command = ["generate", "--model", "tiny-dit", "--prompt", "green", "--output", "green.png"]
    subprocess.run([sys.executable, "-m", "mlxquant", *command], cwd=folder, check=True, capture_output=True)
    with Image.open(folder / "green.png") as drawn:
        assert np.array(drawn)[3:5, 3:5].mean((0, 1)).argmax() == 1
