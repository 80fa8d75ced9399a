"""Step 1: real trajectories, resumable to the byte, refused when they are not what they say."""

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlxquant.commandline import cli
from mlxquant.errors import ArtifactError, CalibrationError
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.pipeline.samples import Samples
from mlxquant.report.comparison import to_pil
from mlxquant.sampling.conditioning import Conditioning
from mlxquant.sampling.prompts import write_prompts

from support import command_line
from support.six_steps import files, interrupt_writing, use_tiny_model
from support.tiny_pictures import tiny_adapter

SMALL = ["--model", "mmdit-shapes", "--num-images", 3, "--num-steps", 3, "--cfg-weight", 2]
VERB = ("generate-calibration-data", *SMALL, "--calib-dir")
run, succeed, fail = command_line.of(*VERB)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    use_tiny_model(monkeypatch, batch=2)  # three images are two batches


def test_the_folder_holds_what_the_sampler_saw(tmp_path):
    facts, _ = succeed(tmp_path / "c")
    written = files(tmp_path / "c")
    samples = [f"samples/000{i}_00{s}.npz" for i in range(3) for s in range(3)]
    assert set(written) == {
        *samples,
        *(f"latents/000{i}.npz" for i in range(3)),
        *(f"images/000{i}.png" for i in range(3)),
        "manifest.json",
    }
    assert facts["disk_bytes"] == sum(map(len, written.values()))
    adapter = tiny_adapter()
    prompts = adapter.prompts("calibration", 3)
    for some in ([0, 1], [2]):
        seen = []
        chosen = [prompts[i] for i in some]
        final = adapter.generate([p.text for p in chosen], [p.seed for p in chosen], 3, 2.0, seen.append)
        for row, image in enumerate(some):
            for step in seen:
                with np.load(tmp_path / "c" / f"samples/{image:04d}_{step.index:03d}.npz") as sample:
                    assert set(sample) == {"x", "timestep", "sigma"}
                    assert {sample[k].dtype for k in sample} == {np.dtype(np.float32)}
                    np.testing.assert_array_equal(sample["x"], np.array(step.latent[row]))
                    np.testing.assert_allclose(
                        (sample["sigma"], sample["timestep"]), (step.sigma, 1000 * step.sigma), rtol=1e-6
                    )
            with np.load(tmp_path / "c" / f"latents/{image:04d}.npz") as latent:
                np.testing.assert_array_equal(latent["latent"], np.array(final[row]))
            with Image.open(tmp_path / "c" / f"images/{image:04d}.png") as picture:
                np.testing.assert_array_equal(np.asarray(picture), np.asarray(to_pil(adapter.decode(final)[row])))


def test_every_image_is_conditioned_on_its_own_prompt(tmp_path):
    """And not on the pooled embedding of another image."""
    succeed(tmp_path / "c")
    adapter = tiny_adapter()
    prompts = adapter.prompts("calibration", 3)
    x = np.stack([np.load(tmp_path / "c" / f"samples/000{i}_002.npz")["x"] for i in range(3)])
    for image, prompt in enumerate(prompts):
        seen, other = [], []
        adapter.generate([prompt.text], [prompt.seed], 3, 2.0, seen.append)
        adapter.generate([prompts[image - 1].text], [prompt.seed], 3, 2.0, other.append)
        own = np.abs(x[image] - np.array(seen[2].latent[0])).max()
        assert own < 1e-3
        assert np.abs(x[image] - np.array(other[2].latent[0])).max() > 20 * own


def test_the_manifest_says_what_it_is_made_from_with_relative_paths_only(tmp_path):
    succeed(tmp_path / "c", "--seed", 7)
    text = (tmp_path / "c" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    facts = json.loads(text)
    adapter = tiny_adapter()
    wanted = adapter.prompts("calibration", 3, 7)
    assert (facts["prompts"], facts["seeds"]) == ([p.text for p in wanted], [p.seed for p in wanted])
    assert (facts["num_steps"], facts["cfg"], facts["seed"], facts["model"]) == (3, 2.0, 7, "mmdit-shapes")
    assert facts["source"] == adapter.fingerprint
    assert set(facts["versions"]) == {"mlxquant", "mlx"}


@pytest.mark.parametrize("writes", [0, 3, 9, 14])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, monkeypatch, writes):
    succeed(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_writing(patch, writes)
        outcome = run(tmp_path / "c")
        assert outcome.exit_code == (130 if writes < 12 else 0)
    if 8 <= writes < 12:  # the first batch of two images is eight files
        assert len(json.loads((tmp_path / "c" / "manifest.json").read_text())["files"]) == 10
    calls = []
    generate = MMDiTShapes.generate
    monkeypatch.setattr(
        MMDiTShapes, "generate", lambda self, prompts, *rest: calls.append(prompts) or generate(self, prompts, *rest)
    )
    succeed(tmp_path / "c")
    assert len(calls) == (2 if writes < 8 else 1 if writes < 12 else 0)
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_a_finished_folder_costs_no_sampling_and_a_lost_file_only_its_batch(tmp_path, monkeypatch):
    first, _ = succeed(tmp_path / "c")
    before = files(tmp_path / "c")
    calls = []
    generate = MMDiTShapes.generate
    monkeypatch.setattr(
        MMDiTShapes, "generate", lambda self, prompts, *rest: calls.append(prompts) or generate(self, prompts, *rest)
    )
    outcome = run(tmp_path / "c")
    assert "finished already" in outcome.stderr
    assert json.loads(outcome.stdout)["manifest"] == first["manifest"]
    assert calls == []
    (tmp_path / "c" / "images" / "0002.png").unlink()
    succeed(tmp_path / "c")
    assert len(calls) == 1
    assert files(tmp_path / "c") == before


def test_other_settings_need_force_and_foreign_files_survive_it(tmp_path):
    succeed(tmp_path / "c")
    before = files(tmp_path / "c")
    assert "other settings or inputs (cfg)" in fail(tmp_path / "c", "--cfg-weight", 3)
    assert files(tmp_path / "c") == before
    (tmp_path / "c" / "samples" / "notes.txt").write_text("mine")
    succeed(tmp_path / "c", "--num-images", 1, "--force")
    left = files(tmp_path / "c")
    assert len(left) == 3 + 1 + 1 + 1 + 1
    assert left["samples/notes.txt"] == b"mine"


def test_a_nan_latent_names_image_and_step_and_writes_nothing_of_its_batch(tmp_path, monkeypatch):
    encode, bad = MMDiTShapes.encode, tiny_adapter().prompts("calibration", 3)[2].text

    def poisoned(self, prompts):
        text = encode(self, prompts)
        rows = mx.array([[float("nan") if p == bad else 0.0] for p in prompts])
        return Conditioning(tokens=text["tokens"], pooled=text["pooled"] + rows)

    monkeypatch.setattr(MMDiTShapes, "encode", poisoned)
    message = fail(tmp_path / "c")
    assert "image 2" in message
    assert "step 1" in message
    assert not (tmp_path / "c" / "samples" / "0002_000.npz").exists()
    assert len(json.loads((tmp_path / "c" / "manifest.json").read_text())["files"]) == 10
    with pytest.raises(ArtifactError, match=r"not finished \(10 files so far\)"):
        Samples.read(tmp_path / "c")


def test_prompt_files_are_taken_from_the_top_and_must_suffice(tmp_path):
    prompts = tiny_adapter().prompts("calibration", 4, seed=100)[1:]
    write_prompts(tmp_path / "p.txt", prompts)
    succeed(tmp_path / "c", "--prompts", tmp_path / "p.txt", "--num-images", 2)
    assert Samples.read(tmp_path / "c").prompts == tuple(prompts[:2])
    message = fail(tmp_path / "d", "--prompts", tmp_path / "p.txt", "--num-images", 4)
    assert "p.txt holds 3 prompts, --num-images is 4" in message
    assert not (tmp_path / "d").exists()


def test_impossible_requests_are_one_clear_error_and_leave_nothing(tmp_path):
    assert "cfg weight" in fail(tmp_path / "c", "--cfg-weight", "inf")
    assert "unknown model 'sd9'" in fail(tmp_path / "c", "--model", "sd9")
    (tmp_path / "p.txt").write_text("1\ta tabby cat\n")
    assert "cannot draw 'a tabby cat'" in fail(tmp_path / "c", "--prompts", tmp_path / "p.txt", "--num-images", 1)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "p.txt"]


def test_defaults_stay_what_they_were(tmp_path):
    command = cli.main.get_command(None, "generate-calibration-data")
    defaults = {
        p.name: p.default for p in command.params if p.name in ("name", "num_images", "num_steps", "cfg_weight")
    }
    assert defaults == {"name": "sd3-medium", "num_images": 50, "num_steps": 50, "cfg_weight": 7.5}


def test_calibration_is_a_selection_whose_text_is_encoded_again(tmp_path):
    succeed(tmp_path / "c")
    samples, adapter = Samples.read(tmp_path / "c"), tiny_adapter()
    calibration = samples.calibration(images=2, stride=2)
    assert (calibration.model, calibration.source, calibration.steps, calibration.cfg) == (
        "mmdit-shapes",
        adapter.fingerprint,
        3,
        2.0,
    )
    assert calibration.latents.shape == (2, 2, *adapter.latent_shape)
    np.testing.assert_array_equal(calibration.sigmas, adapter.sigmas(3)[[0, 2]])
    seen = []
    generate_prompts = samples.prompts[:2]
    adapter.generate([p.text for p in generate_prompts], [p.seed for p in generate_prompts], 3, 2.0, seen.append)
    sigmas, states = calibration.batches(adapter)
    assert sigmas == [seen[0].sigma, seen[2].sigma]
    for step, state in zip((seen[0], seen[2]), states, strict=True):
        conditional, unconditional = mx.split(adapter.run(state, step.sigma)["velocity"], 2)
        guided = unconditional + 2.0 * (conditional - unconditional)
        np.testing.assert_allclose(np.array(guided), np.array(step.velocity), atol=1e-5)


@pytest.mark.parametrize(("images", "stride"), [(4, 1), (0, 1), (1, 0), (1, 4), (-1, 1)])
def test_selections_that_are_not_there_are_refused(tmp_path, images, stride):
    succeed(tmp_path / "c")
    with pytest.raises(CalibrationError, match="choose between 1 and that"):
        Samples.read(tmp_path / "c").calibration(images, stride)


def test_trajectories_of_other_weights_are_refused(tmp_path):
    succeed(tmp_path / "c")
    samples, adapter = Samples.read(tmp_path / "c"), tiny_adapter()
    samples.check(adapter)
    adapter.module.final_layer.linear.bias = adapter.module.final_layer.linear.bias + 1e-3
    with pytest.raises(CalibrationError, match="other weights"):
        samples.check(adapter)
    adapter.name = "another"
    with pytest.raises(CalibrationError, match="'mmdit-shapes', not of 'another'"):
        samples.check(adapter)


def test_damage_is_refused(tmp_path):
    succeed(tmp_path / "c")
    with pytest.raises(ArtifactError, match=r"generate-calibration-data"):
        Samples.read(tmp_path / "none")
    path = tmp_path / "c" / "samples" / "0001_001.npz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"0001_001\.npz.*changed"):
        Samples.read(tmp_path / "c").calibration(3, 1)
    Samples.read(tmp_path / "c").calibration(1, 1)
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"cfg": 2.0', '"cfg": 3.0'))
    with pytest.raises(ArtifactError, match="checksum"):
        Samples.read(tmp_path / "c")
