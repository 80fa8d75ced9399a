"""Where weights are looked for, and what is said when they are not there or not theirs."""

import builtins
import hashlib
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.metrics import clip_files, torch_file
from mlxquant.metrics.torch_file import read_checkpoint
from mlxquant.metrics.weights import Weights, fitted, read_tensors

from support.hub_stand_in import stand_in

WEIGHTS = Weights("Net", "someone/net", ("sub/model.safetensors", "tokenizer.json"), "MIT")


def test_a_folder_holds_files_by_path_or_by_name(tmp_path):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    assert WEIGHTS.paths(tmp_path) == [tmp_path / "model.safetensors", tmp_path / "tokenizer.json"]
    assert WEIGHTS.paths(tmp_path / "model.safetensors") == WEIGHTS.paths(str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/model.safetensors").touch()
    assert WEIGHTS.paths(tmp_path)[0] == tmp_path / "sub/model.safetensors"


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(
        ArtifactError,
        match=r"missing; get it with 'hf download someone/net sub/model.safetensors tokenizer.json --local-dir",
    ):
        WEIGHTS.paths(tmp_path)


def test_the_hub_is_asked_by_id_and_file(monkeypatch, tmp_path):
    stand_in(monkeypatch, lambda repository, name: str(tmp_path / repository / name))
    assert WEIGHTS.paths() == [tmp_path / "someone/net" / name for name in WEIGHTS.files]


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def download(repository, name):
        raise ConnectionError("no network\nand more")

    stand_in(monkeypatch, download)
    with pytest.raises(
        ArtifactError, match=r"^someone/net: .*\(no network\)[^\n]* or give a local file or folder with --weights$"
    ):
        WEIGHTS.paths()


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def refusing(name, *rest):
        if name.split(".")[0] in {"huggingface_hub", "tokenizers"}:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(AdapterError, match=r"pip install 'mlxquant\[evaluate\]'"):
        WEIGHTS.paths()
    with pytest.raises(AdapterError, match=r"pip install 'mlxquant\[evaluate\]'"):
        clip_files.tokenizer("tokenizer.json", 77)


def test_only_the_published_bytes_count_as_published(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    assert Weights("Net", "a/b", ("w.pth",), "MIT", digest).is_published(path)
    assert not Weights("Net", "a/b", ("w.pth",), "MIT", "00000000").is_published(path)
    assert not WEIGHTS.is_published(path)


def test_tensors_become_float32_and_others_are_left_out(tmp_path):
    path = tmp_path / "w.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3), mx.float16), "b": mx.zeros(4)})
    found = fitted(read_tensors(path), {"a": (2, 3)}, "w")
    assert list(found) == ["a"]
    assert found["a"].dtype == mx.float32
    with pytest.raises(ArtifactError, match=r"w: 1 of 1 tensors are missing, such as c"):
        fitted(found, {"c": (1,)}, "w")
    with pytest.raises(ArtifactError, match=r"w: a has shape \(2, 3\), expected \(3, 2\)"):
        fitted(found, {"a": (3, 2)}, "w")


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{not a header...")
    with pytest.raises(ArtifactError, match="download it again"):
        read_tensors(path)


# --- checkpoints of PyTorch, written here by hand; PyTorch's own are read in ``public`` ---

ARRAY = np.arange(12, dtype=np.float32)
DATA = ARRAY.tobytes()


class Storage:
    """Stands for a storage: pickled as a persistent id."""


class Tensor:
    def __init__(self, offset, shape, strides):
        self.arguments = (Storage(), offset, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


@pytest.fixture
def pickled(monkeypatch):
    """Pickles as PyTorch would, on stand-ins for the two things of PyTorch that a checkpoint names."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def rebuild():
        """The name is all that matters."""

    rebuild.__name__ = rebuild.__qualname__ = "_rebuild_tensor_v2"
    rebuild.__module__ = "torch._utils"
    utils._rebuild_tensor_v2 = rebuild
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", ARRAY.size) if isinstance(value, Storage) else None

    def dump(value):
        file = io.BytesIO()
        Pickler(file, 2).dump(value)
        return file.getvalue()

    return dump


def write_zip(path, table, data=DATA):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", table)
        archive.writestr("archive/data/0", data)


def write_row(path, pickled, table):
    parts = [pickled(torch_file.MAGIC), pickled(1001), pickled({"little_endian": True}), table, pickled(["0"])]
    path.write_bytes(b"".join(parts) + len(ARRAY).to_bytes(8, "little") + DATA)


@pytest.mark.parametrize("layout", ["zip", "row"])
def test_checkpoints(pickled, tmp_path, layout):
    path = tmp_path / "w.pth"
    table = pickled(
        OrderedDict(a=Tensor(0, (3, 4), (4, 1)), view=Tensor(1, (4, 2), (1, 4)), scalar=Tensor(7, (), ()), version=3)
    )
    write_zip(path, table) if layout == "zip" else write_row(path, pickled, table)
    found = read_checkpoint(path)
    assert set(found) == {"a", "view", "scalar"}
    np.testing.assert_array_equal(found["a"], ARRAY.reshape(3, 4))
    np.testing.assert_array_equal(found["view"], ARRAY.reshape(3, 4)[:2, :].T + 1)
    np.testing.assert_array_equal(found["scalar"], 7)
    assert read_tensors(path)["a"].shape == (3, 4)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_is_executed(pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda path: write_zip(path, pickle.dumps({"a": Evil()})),
        lambda path: path.write_bytes(pickle.dumps(Evil())),
    ):
        write(tmp_path / "w.pth")
        with pytest.raises(ArtifactError, match=r"names posix.mkdir, which no table of tensors needs"):
            read_checkpoint(tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "tensor", [(0, (13,), (1,)), (5, (2, 4), (4, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (12, (1,), (1,))]
)
def test_a_tensor_outside_its_storage_is_refused(pickled, tmp_path, tensor):
    write_zip(tmp_path / "w.pth", pickled({"a": Tensor(*tensor)}))
    with pytest.raises(ArtifactError, match="outside its storage"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_checkpoint_allocates_no_more_than_it_has(pickled, tmp_path):
    path = tmp_path / "w.pth"
    write_zip(path, pickled({"a": Tensor(0, (2**20, 2**20), (0, 0))}))
    with pytest.raises(ArtifactError, match="larger than its storage"):
        read_checkpoint(path)
    write_zip(path, pickled({"a": Tensor(0, (3, 4), (4, 1))}))
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(ArtifactError, match="members are compressed"):
        read_checkpoint(tmp_path / "c.pth")


def test_damaged_checkpoints(pickled, tmp_path):
    path = tmp_path / "w.pth"
    table = pickled({"a": Tensor(0, (3, 4), (4, 1))})
    write_row(path, pickled, table)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[:-5], whole[:40], pickled(7), pickled(torch_file.MAGIC)):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="download it again"):
            read_checkpoint(path)
    write_zip(path, table, DATA[:-6])
    with pytest.raises(ArtifactError, match="download it again"):
        read_checkpoint(path)
