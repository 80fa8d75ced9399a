"""Models from outside the package: registered by a program, or by an installed package's entry point."""

import os
import subprocess
import sys
from pathlib import Path

import mlxquant as mq

# isort: split
import pytest

from mlxquant.errors import AdapterError
from mlxquant.models import catalog
from mlxquant.models.adapter import Adapter

from support.by_hand import ByHand

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def none_yet(monkeypatch):
    monkeypatch.setattr(catalog, "_registered", {})


def package(folder, value="support.by_hand:ByHand", name="by-hand", called="hosts"):
    """An installed package, as pip leaves it, with one entry point."""
    metadata = folder / f"{called}-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {called}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[mlxquant.models]\n{name} = {value}\n")
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages with such entry points are installed."""

    def install(*values, **options):
        for number, value in enumerate(values):
            monkeypatch.syspath_prepend(package(tmp_path / str(number), value, called=f"hosts{number}", **options))

    return install


def test_a_registered_model_is_one_like_any_other(tmp_path):
    with pytest.raises(AdapterError, match="unknown model 'by-hand': neither"):
        mq.load("by-hand")
    assert mq.register_model(ByHand) is ByHand
    assert "by-hand" in catalog.known_models()
    model = mq.load("by-hand")
    assert isinstance(model.adapter, ByHand)
    done = mq.quantize(model, mq.calibrate(model, prompts=1, steps=1), "rtn-w4a16")
    done.save(tmp_path / "done")
    assert mq.load(tmp_path / "done").layers.keys() == done.layers.keys()
    catalog._registered.clear()
    with pytest.raises(AdapterError, match=r"unknown model 'by-hand'; there are .*another package's, install that"):
        mq.load(tmp_path / "done")


def test_its_folders_and_hub_ids_stand_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ByHand, "holds", classmethod(lambda cls, folder: (folder / "by-hand.txt").exists()))
    monkeypatch.setattr(ByHand, "hub_ids", ("somebody/by-hand",))
    mq.register_model(ByHand)
    assert catalog.find_model("somebody/by-hand") == ("by-hand", "somebody/by-hand")
    (tmp_path / "by-hand.txt").write_text("")
    assert catalog.find_model(str(tmp_path)) == ("by-hand", str(tmp_path))


def test_an_installed_package_is_found_and_imported_when_it_is_asked_for(installed):
    installed("support.by_hand:ByHand")
    assert catalog.find_model("by-hand") == ("by-hand", "")
    assert catalog.adapter_class("by-hand") is ByHand
    assert "by-hand" in catalog.known_models()


def test_the_command_line_knows_it(tmp_path):
    paths = [package(tmp_path / "site"), TESTS, TESTS.parent / "src"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OPENBLAS_NUM_THREADS": "1"}
    quantize = ["quantize", "--model", "by-hand", "--recipe", "rtn-w4a16", "--num-prompts", "1", "--out"]
    for words in (quantize, ["inspect"]):
        run = [sys.executable, "-m", "mlxquant", *words, tmp_path / "out"]
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "by-hand" in done.stdout


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "nowhere.to_be_found:Host",
            r"nowhere\.to_be_found:Host cannot be imported \(.*nowhere.*\); reinstall the package",
        ),
        ("support.by_hand:Gone", r"support\.by_hand:Gone cannot be imported \(.*Gone.*\)"),
        (
            "support.by_hand:Block",
            r"expected a subclass of mlxquant\.models\.adapter\.Adapter, found <class 'support.by_ha",
        ),
        ("mlxquant.models.shapes.adapter:MMDiTShapes", "MMDiTShapes calls itself 'mmdit-shapes' and not 'by-hand'"),
        (
            "mlxquant.models.diffusion:DiffusionAdapter",
            "DiffusionAdapter is no whole adapter; define .*blank, decode, des",
        ),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_one_error_that_names_its_package(installed, value, said):
    installed(value)
    with pytest.raises(AdapterError, match=rf"^entry point mlxquant\.models:by-hand of hosts0: .*{said}"):
        catalog.adapter_class("by-hand")


def test_two_packages_with_one_name_are_an_error(installed):
    installed("support.by_hand:ByHand", "support.by_hand:Other")
    with pytest.raises(AdapterError, match=r"two installed packages have a model 'by-hand': .*uninstall one"):
        mq.load("by-hand")


def test_what_cannot_be_registered():
    with pytest.raises(AdapterError, match=r"register_model: expected a subclass of .*Adapter, found 'by-hand'"):
        mq.register_model("by-hand")
    with pytest.raises(AdapterError, match=r"test_register:.*Half is no whole adapter; define blank, "):

        @mq.register_model
        class Half(Adapter):
            name = "half"

    for bad in (None, "two words", ""):
        with pytest.raises(AdapterError, match="needs a name of letters, digits"):
            mq.register_model(type("Bad", (ByHand,), {"name": bad}))
    with pytest.raises(AdapterError, match="'mmdit-shapes' is the name of a model of mlxquant; give yours another"):
        mq.register_model(type("Mine", (ByHand,), {"name": "mmdit-shapes"}))
    mq.register_model(ByHand)
    with pytest.raises(AdapterError, match=r"'by-hand' is the name of a model of support\.by_hand:ByHand"):
        mq.register_model(type("Other", (ByHand,), {}))
    again = type("ByHand", (ByHand,), {"__module__": ByHand.__module__, "__qualname__": ByHand.__qualname__})
    assert mq.register_model(again) is again  # the cell of a notebook, run again
