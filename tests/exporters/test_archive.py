"""Archives: the very folder comes back, whatever is in it, and nothing comes back of a file that is not as it was
written.
"""

import gzip
import hashlib
import io
import shutil
import tarfile

import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import ArtifactError, ExportError
from mlxquant.exporters import archive
from mlxquant.exporters.archive import unpack_archive, write_archive
from mlxquant.files.checked import VERSION, canonical, digest
from mlxquant.grids.packing import pack
from mlxquant.numerics.rate_distortion import entropy

from support.command_line import fail, succeed
from support.tiny_pictures import tiny_adapter

RECIPES = (
    "rtn-w2a16-g32", "rtn-w3a16", "rtn-w3a16-g32-bf16", "rtn-w4a8", "rtn-w4a16-g32", "rtn-w5a16", "rtn-w6a8-token",
    "rtn-w7a8-g32", "rtn-w8a8", "rtn+rotation-w3a4", "rtn+svd4-w3a8", "rtn+softmax8-w4a8",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model():
    return mq.Model(tiny_adapter())


@pytest.fixture(scope="module")
def calibration(tiny_model):
    return mq.calibrate(tiny_model, prompts=1, steps=2)


@pytest.fixture(scope="module")
def folders(tiny_model, calibration, tmp_path_factory):
    """The folder of a recipe, made when it is first asked for."""
    place, made = tmp_path_factory.mktemp("folders"), {}

    def folder(recipe):
        if recipe not in made:
            made[recipe] = mq.quantize(tiny_model, calibration, recipe).save(place / recipe)
        return made[recipe]

    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_very_folder_comes_back(folders, tmp_path, recipe):
    folder, file = folders(recipe), tmp_path / "a.tar.gz"
    facts = write_archive(folder, file)
    assert facts["bytes"] == file.stat().st_size < facts["bytes_before"] == sum(map(len, contents(folder).values()))
    assert facts["layers"] == len(mq.load(str(folder)).layers)
    unpack_archive(file, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert mq.load(str(tmp_path / "again")).size == mq.load(str(folder)).size


def test_other_tools_folders_come_back_too(folders, tmp_path):
    """Also what lies deeper, and names that a tar has no room for in its first header."""
    mq.export(mq.load(str(folders("rtn-w3a16"))), tmp_path / "mlx", "mlx")
    deep = tmp_path / "mlx" / "part" / ("long" * 40) / "notes.txt"
    deep.parent.mkdir(parents=True)
    deep.write_text("and so on\n" * 1000)
    shutil.copytree(folders("rtn-w5a16"), tmp_path / "mlx" / "inner")
    facts = write_archive(tmp_path / "mlx", tmp_path / "a.tar.gz")
    assert facts["layers"] == 2 * len(mq.load(str(folders("rtn-w5a16"))).layers)
    unpack_archive(tmp_path / "a.tar.gz", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "mlx")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("units", [1, 7, 5000])
def test_any_words_are_codes(bits, units):
    """What stands in a stretch comes back, whatever it is, in pieces that are all full but the last."""
    raw = np.random.default_rng(bits).integers(0, 256, 4 * bits * units, np.uint8).tobytes()
    pieces = archive._pieces({"name": "x", "bytes": len(raw), "codes": [[0, len(raw), bits]]})
    stored = [archive._spread(raw[start:end], bits) for start, end, _ in pieces]
    assert list(map(len, stored)) == list(map(archive._stored, pieces))
    assert b"".join(archive._gathered(s, piece) for s, piece in zip(stored, pieces, strict=True)) == raw


def test_pieces_cover_a_file_once_and_are_bounded(monkeypatch):
    monkeypatch.setattr(archive, "PIECE", 100)
    pieces = archive._pieces({"name": "x", "bytes": 1000, "codes": [[8, 8 + 12 * 20, 3], [400, 432, 8]]})
    assert [start for start, _, _ in pieces] == [0, *(end for _, end, _ in pieces[:-1])]
    assert pieces[-1][1] == 1000
    assert all(0 < end - start <= 100 for start, end, _ in pieces)
    assert {(end - start) % 12 for start, end, bits in pieces if bits == 3} == {0}
    for wrong in ([[8, 20, 3], [16, 32, 4]], [[992, 1024, 8]]):
        with pytest.raises(ValueError, match="overlap or lie outside"):
            archive._pieces({"name": "x", "bytes": 1000, "codes": wrong})


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_little_more_than_their_entropy(bits):
    """Gaussian codes of every width; of 3, 5, 6 and 7 bits packed bytes hide how frequent they are."""
    top = 2 ** (bits - 1)
    values = np.random.default_rng(0).standard_normal((256, 1024)) * top / 3
    codes = np.clip(np.rint(values) + top, 0, 2 * top - 1).astype(np.uint8)
    file = io.BytesIO()
    squeezed = archive._Squeezed(file)
    squeezed.write(archive._spread(pack(codes, bits).tobytes(), bits), codes=True)
    squeezed.close()
    least = entropy(np.bincount(codes.ravel())) * codes.size / 8
    assert least < len(file.getvalue()) < 1.02 * least + 100


def test_where_codes_fill_bytes_any_tar_gives_the_folder(folders, tmp_path):
    write_archive(folders("rtn-w4a16-g32"), tmp_path / "four.tar.gz")
    with tarfile.open(tmp_path / "four.tar.gz", "r:gz") as tar:
        assert tar.getnames() == ["archive.json", "model.json", "weights.safetensors"]
        tar.extractall(tmp_path / "tar", filter="data")
    (tmp_path / "tar" / "archive.json").unlink()
    assert contents(tmp_path / "tar") == contents(folders("rtn-w4a16-g32"))
    write_archive(folders("rtn-w3a16"), tmp_path / "three.tar.gz")
    with tarfile.open(tmp_path / "three.tar.gz", "r:gz") as tar:
        assert tar.getnames()[-1] == "weights.safetensors.codes"


def test_equal_folders_give_equal_bytes(folders, tmp_path):
    shutil.copytree(folders("rtn-w3a16"), tmp_path / "copy")
    (tmp_path / "copy" / ".lock").write_text("not a part of it")
    write_archive(folders("rtn-w3a16"), tmp_path / "a")
    write_archive(tmp_path / "copy", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def refusal(file, out):
    """What is said of a file that is not unpacked; None where it is."""
    try:
        unpack_archive(file, out)
    except ArtifactError as error:
        return str(error)
    return None


def test_what_is_damaged_is_refused(folders, tmp_path):
    """A file that ends early, and any flipped bit, but for those of gzip's headers that say nothing."""
    write_archive(folders("rtn-w3a16"), tmp_path / "a.tar.gz")
    whole, expected = (tmp_path / "a.tar.gz").read_bytes(), contents(folders("rtn-w3a16"))
    random, refused = np.random.default_rng(0), 0
    cuts = [0, 1, 20, *random.integers(100, len(whole), 12), len(whole) - 4, len(whole) - 1]
    flips = [*random.integers(100, len(whole), 40), len(whole) - 1, len(whole) - 6]
    for text in [whole[:cut] for cut in cuts] + [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in flips]:
        (tmp_path / "b.tar.gz").write_bytes(text)
        said = refusal(tmp_path / "b.tar.gz", tmp_path / "again")
        if said is None:
            assert contents(tmp_path / "again") == expected
            shutil.rmtree(tmp_path / "again")
        else:
            refused += 1
            assert "\n" not in said
            assert said.startswith(f"{tmp_path / 'b.tar.gz'}: not an archive of mlxquant, or a damaged one (")
            assert said.endswith("; write or download it anew")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "b.tar.gz"]
    assert refused >= len(cuts) + len(flips) - 3


def forged(path, files, members=None, **index):
    """An archive that says ``files`` of itself and holds ``members``, (name, bytes, type)."""
    facts = {"kind": "archive", "version": VERSION, "files": files, **index}
    text = canonical({**facts, "sha256": digest(facts)}).encode()
    with gzip.open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name, content, kind in [("archive.json", text, tarfile.REGTYPE), *(members or [])]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def entry(name="x", content=b"1234", codes=()):
    sha256 = hashlib.sha256(content).hexdigest()
    return {"name": name, "bytes": len(content), "sha256": sha256, "codes": list(codes)}


X = ("x", b"1234", tarfile.REGTYPE)


@pytest.mark.parametrize(
    ("files", "members", "why"),
    [
        ([entry("../x")], [("../x", b"1234", tarfile.REGTYPE)], "archive.json is not as it was written"),
        ([entry("/x")], [("/x", b"1234", tarfile.REGTYPE)], "archive.json is not as it was written"),
        ([entry(codes=[[0, 4, 3]])], [X], "archive.json is not as it was written"),
        ([entry(codes=[[4, 16, 3]])], [X], "the codes of x overlap or lie outside of it"),
        ([entry(), entry()], [X, X], "it names a file twice"),
        ([entry()], [], "expected x of 4 bytes, found nothing"),
        ([entry()], [("y", b"1234", tarfile.REGTYPE)], "expected x of 4 bytes, found 'y' of 4 bytes"),
        ([entry()], [("x", b"12345", tarfile.REGTYPE)], "expected x of 4 bytes, found 'x' of 5 bytes"),
        ([entry(content=b"")], [("x", b"", tarfile.SYMTYPE)], "'x' is no file"),
        ([entry(content=b"")], [("x", b"", tarfile.DIRTYPE)], "'x' is no file"),
        ([entry(content=b"4321")], [X], "x is not what was packed"),
        ([entry()], [X, ("y", b"more", tarfile.REGTYPE)], "it holds more than it says"),
    ],
)
def test_an_archive_is_not_believed(tmp_path, files, members, why):
    forged(tmp_path / "a.tar.gz", files, members)
    with pytest.raises(ArtifactError) as found:
        unpack_archive(tmp_path / "a.tar.gz", tmp_path / "out")
    assert why in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_forger_who_tells_the_truth_is_believed(tmp_path):
    """So that the test above is about what is wrong in each of its archives."""
    forged(tmp_path / "a.tar.gz", [entry()], [X])
    unpack_archive(tmp_path / "a.tar.gz", tmp_path / "out")
    assert contents(tmp_path / "out") == {"x": b"1234"}


def test_without_room_nothing_is_written(folders, tmp_path, monkeypatch):
    write_archive(folders("rtn-w4a8"), tmp_path / "a.tar.gz")
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ArtifactError, match="has room for 1; make room"):
        unpack_archive(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_other_gzip_files_and_none_are_refused(tmp_path):
    (tmp_path / "plain.gz").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "text").write_text("hello")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "text", "text")
    for name in ("plain.gz", "text", "other.tar.gz"):
        with pytest.raises(ArtifactError, match="not an archive of mlxquant"):
            unpack_archive(tmp_path / name, tmp_path / "out")
    with pytest.raises(ArtifactError, match="check the path"):
        unpack_archive(tmp_path / "none", tmp_path / "out")


def test_only_whole_folders_of_ours_are_packed(folders, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ArtifactError, match="not a folder that mlxquant wrote"):
        write_archive(tmp_path / "photos", tmp_path / "a.tar.gz")
    shutil.copytree(folders("rtn-w4a8"), tmp_path / "damaged")
    file = tmp_path / "damaged" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="that was written"):
        write_archive(tmp_path / "damaged", tmp_path / "a.tar.gz")
    assert not (tmp_path / "a.tar.gz").exists()


def test_the_commands(folders, tmp_path):
    folder, file, again = folders("rtn-w3a16"), tmp_path / "a.tar.gz", tmp_path / "again"
    pack_it = ["export", "--model", folder, "--target", "archive", "--out", file]
    facts, said = succeed(*pack_it)
    assert facts["bytes"] == file.stat().st_size < facts["bytes_before"]
    assert f"less than {folder}" in said
    assert "exists; choose another file or pass --force" in fail(*pack_it, code=1)
    succeed(*pack_it, "--force")
    unpack_it = ["export", "--model", file, "--target", "folder", "--out", again]
    facts, _ = succeed(*unpack_it)
    size = sum(map(len, contents(folder).values()))
    assert facts == {"target": "folder", "out": str(again), "bytes": size, "files": 2}
    assert contents(again) == contents(folder)
    assert "--force" in fail(*unpack_it, code=1)
    succeed(*unpack_it, "--force")
    assert "not an archive of mlxquant" in fail(*unpack_it[:2], again / "model.json", *unpack_it[3:], "--force", code=1)
    assert "--dtype changes a model, and these are files; leave it out" in fail(*pack_it, "--dtype", "float16", code=1)


def test_force_replaces_archives_alone(folders, tmp_path):
    folder, file = folders("rtn-w4a8"), tmp_path / "thesis.tar.gz"
    for content in (b"years of work", gzip.compress(b"years of work")):
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match="is no archive of mlxquant, so --force does not replace it"):
            write_archive(folder, file, force=True)
        assert file.read_bytes() == content
    with pytest.raises(ArtifactError, match="is a folder; choose a file"):
        write_archive(folder, tmp_path, force=True)


def test_python_packs_folders_and_exports_models(folders, tmp_path, tiny_model):
    facts = mq.export(folders("rtn-w4a8"), tmp_path / "a.tar.gz", "archive")
    assert facts["target"] == "archive"
    with pytest.raises(ExportError, match="archive and folder take a path, and other targets a model; found Model mm"):
        mq.export(tiny_model, tmp_path / "b", "archive")
    with pytest.raises(ExportError, match="found the path"):
        mq.export(folders("rtn-w4a8"), tmp_path / "b", "mlx")
    with pytest.raises(ExportError, match="leave --dtype out"):
        mq.export(folders("rtn-w4a8"), tmp_path / "b", "archive", dtype="float16")
