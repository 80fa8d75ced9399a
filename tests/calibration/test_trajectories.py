"""Calibration data: which rows go through the model, what they hold in memory, and going on after a kill."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibration.trajectories import Calibration, collect, take_turns
from mlxquant.errors import ArtifactError, CalibrationError
from mlxquant.files.checked import read_json, read_tensors, write_tensors
from mlxquant.files.kept_arrays import KeptArrays
from mlxquant.models.shapes.adapter import MMDiTShapes

from support.command_line import fail, succeed
from support.six_steps import files
from support.synthetic_chain import Chain
from support.tiny_pictures import tiny_adapter

FILE, FOLDER = "calibration.safetensors", "calibration"


def drawn(adapter, prompts=5, steps=3, cfg=2.0, **options):
    some = adapter.prompts("calibration", prompts) if isinstance(prompts, int) else prompts
    return collect(adapter, some, steps, cfg, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 28, 50])
@pytest.mark.parametrize("pictures", [1, 2, 5, 50])
@pytest.mark.parametrize("samples", [1, 2, 3, 7, 28, 64, 100, 10_000, None])
def test_pictures_take_turns_and_every_step_has_some(steps, pictures, samples):
    turns = take_turns(steps, pictures, samples)
    assert len(turns) == steps
    sizes = [len(some) for some in turns]
    assert sum(sizes) == (steps * pictures if samples is None else min(max(samples, steps), steps * pictures))
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert all(some == sorted(set(some)) for some in turns)
    uses = Counter(picture for some in turns for picture in some)
    counts = [uses[picture] for picture in range(pictures)]
    assert max(counts) - min(counts) <= 1


def test_the_limit_is_recorded_and_part_of_the_identity():
    adapter = Chain()
    full, limited = drawn(adapter), drawn(adapter, samples=4)
    assert limited.facts["samples"] == 4
    assert limited.facts["pictures"] == [[0], [1], [2, 3]]
    assert (full.facts["samples"], full.facts["pictures"]) == (15, [[0, 1, 2, 3, 4]] * 3)
    assert drawn(adapter, samples=1000).facts == full.facts != limited.facts
    assert mx.array_equal(full.latents, limited.latents)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(samples):
    with pytest.raises(CalibrationError, match="at least one sample"):
        drawn(Chain(), samples=samples)


@pytest.mark.parametrize("cfg", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("samples", [None, 7])
def test_a_batch_is_what_the_sampler_sees(cfg, samples):
    """Latents, text and noise levels of every row, in both orders, against the trajectories and prompts themselves."""
    adapter = Chain()
    calib = drawn(adapter, cfg=cfg, samples=samples)
    texts = [p.text if cfg else "" for p in calib.prompts]
    for in_order in (False, True):
        sigmas, states = calib.in_order(adapter, 2) if in_order else calib.batches(adapter)
        found = []
        for sigma, state in zip(sigmas, states, strict=True):
            step = int(np.abs(calib.sigmas - sigma).argmin())
            count = len(state["t"]) // (2 if cfg == 2 else 1)
            assert 1 <= count <= 2
            np.testing.assert_array_equal(np.array(state["t"]), np.float32(1000) * np.float32(sigma))
            rows = range(len(state["t"]))
            guided = [row % 2 == 0 if in_order else row < count for row in rows] if cfg == 2 else [True] * count
            for row in rows:
                picture = next(
                    p for p in calib.pictures[step] if mx.array_equal(calib.latents[step, p], state["latent"][row])
                )
                text = texts[picture] if guided[row] else ""
                assert mx.array_equal(state["tokens"][row], adapter.encode([text])["tokens"][0])
                assert mx.array_equal(state["pooled"][row], adapter.encode([text])["pooled"][0])
                found.append((step, picture, guided[row]))
        sides = (True, False) if cfg == 2 else (True,)
        assert sorted(found) == sorted(
            (s, p, side) for s, some in enumerate(calib.pictures) for p in some for side in sides
        )


def test_in_order_takes_all_pictures_of_a_step_at_once():
    adapter = tiny_adapter()
    sigmas, states = drawn(adapter, prompts=3, steps=2).in_order(adapter)
    assert [len(state["t"]) for state in states] == [6, 6]
    assert len(sigmas) == 2
    np.testing.assert_array_equal(np.array(states[0]["latent"][0]), np.array(states[0]["latent"][1]))


def test_batches_have_as_many_pictures_as_the_adapter_samples():
    adapter = Chain()
    assert [len(state["t"]) for state in drawn(adapter, prompts=3, steps=1).batches(adapter)[1]] == [4, 2]
    adapter.batch = 3
    assert [len(state["t"]) for state in drawn(adapter, prompts=3, steps=1).batches(adapter)[1]] == [6]
    assert adapter.drawn == [["x", "xx"], ["xxx"], ["x", "xx", "xxx"]]


def test_each_prompt_is_encoded_once_and_only_where_it_is_used():
    adapter = Chain()
    calib = drawn(adapter, prompts=5, steps=2, samples=4)
    calib = replace(calib, prompts=(*calib.prompts[:3], calib.prompts[0], calib.prompts[4]))
    adapter.encoded.clear()
    _, states = calib.batches(adapter)
    for _ in range(2):
        mx.eval(list(states))
    assert adapter.encoded == {"x": 1, "xx": 1, "xxx": 1, "": 1}


def test_rows_are_made_when_they_are_asked_for_and_not_kept():
    adapter = Chain(side=32)
    calib = drawn(adapter, prompts=8, steps=2)
    before = mx.get_active_memory()
    _, states = calib.batches(adapter)
    one = sum(value.nbytes for value in states[0].values())
    assert mx.get_active_memory() - before < one / 10
    mx.reset_peak_memory()
    for state in states:
        mx.eval(state)
        del state
    assert mx.get_peak_memory() - before < len(states) / 2 * one  # three while one is put together
    assert mx.get_active_memory() - before < one / 10
    states.clear()
    assert len(states) == 0
    assert list(states) == []


def test_states_that_are_made_on_demand_are_a_sequence():
    adapter = Chain()
    _, states = drawn(adapter, prompts=3, steps=2).batches(adapter)
    assert len(states) == 4
    assert mx.array_equal(states[-1]["latent"], states[3]["latent"])
    assert [len(state["t"]) for state in states[1:3]] == [2, 4]
    with pytest.raises(IndexError):
        states[4]


def interrupted(adapter, after):
    """The adapter, which gives up after some batches."""
    generate = adapter.generate

    def stop(*arguments):
        if len(adapter.drawn) == after:
            raise KeyboardInterrupt
        return generate(*arguments)

    adapter.generate = stop
    return adapter


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_calibration_goes_on_after_its_last_batch(tmp_path, after):
    whole = drawn(Chain(), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        drawn(interrupted(Chain(), after), folder=tmp_path / "killed")
    again = Chain()
    resumed = drawn(again, folder=tmp_path / "killed")
    assert again.drawn == [["x", "xx"], ["xxx", "xxxx"], ["xxxxx"]][after:]
    assert resumed.facts == whole.facts == drawn(Chain()).facts
    assert mx.array_equal(resumed.latents, whole.latents)
    assert mx.array_equal(resumed.latents, drawn(Chain()).latents)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_every_batch_is_written_once(tmp_path):
    """What was drawn before is neither read again nor rewritten when the next batch is kept."""
    seen, save = [], KeptArrays.save

    def follow(self, arrays, header=None):
        save(self, arrays, header)
        seen.append({path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptArrays, "save", follow)
        calib = drawn(Chain(), folder=tmp_path)
    assert [sorted(names) for names in seen] == [
        ["0000.safetensors"],
        ["0000.safetensors", "0002.safetensors"],
        ["0000.safetensors", "0002.safetensors", "0004.safetensors"],
    ]
    assert all(before.items() <= after.items() for before, after in pairwise(seen))
    kept = [read_tensors(path, "calibration-batch")[0]["latents"] for path in sorted(tmp_path.iterdir())]
    assert mx.array_equal(mx.concatenate(kept, axis=1), calib.latents)


def test_a_finished_calibration_is_only_read(tmp_path):
    drawn(Chain(), folder=tmp_path / FOLDER)
    again = Chain()
    drawn(again, folder=tmp_path / FOLDER, samples=4)
    assert again.drawn == []
    assert not again.encoded


def test_trajectories_serve_another_number_of_prompts_in_the_same_batches(tmp_path):
    """The last batch of five prompts holds one picture, of six it holds two: it is drawn anew, the others are not."""
    drawn(Chain(), folder=tmp_path / FOLDER)
    for prompts, fresh in ((6, [["xxxxx", "xxxxxx"]]), (3, [["xxx"]])):
        again = Chain()
        calib = drawn(again, prompts=prompts, folder=tmp_path / FOLDER)
        assert again.drawn == fresh
        assert mx.array_equal(calib.latents, drawn(Chain(), prompts=prompts).latents)


@pytest.mark.parametrize("change", ["steps", "cfg", "prompts", "weights", "size"])
def test_trajectories_of_another_job_are_not_used(tmp_path, change):
    drawn(Chain(), folder=tmp_path / FOLDER)
    other, options = Chain(side=8) if change == "size" else Chain(), {}
    if change == "weights":
        other.module.head.bias = other.module.head.bias + 1
    if change in ("steps", "cfg"):
        options = {change: 4}
    prompts = other.prompts("calibration", 5, seed=1 if change == "prompts" else 0)
    calib = collect(other, prompts, **{"steps": 3, "cfg": 2.0, **options}, folder=tmp_path / FOLDER)
    assert len(other.drawn) == 3
    assert calib.facts == drawn(other, folder=tmp_path / FOLDER, prompts=prompts, **options).facts
    assert len(other.drawn) == 3


def test_a_damaged_file_is_refused(tmp_path):
    drawn(Chain(), folder=tmp_path / FOLDER)
    file = tmp_path / FOLDER / "0002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"pass --no-resume, or remove the file"):
        drawn(Chain(), folder=tmp_path / FOLDER)


def test_a_limit_is_saved_and_what_has_none_yet_is_read(tmp_path):
    calib = drawn(Chain(), samples=4)
    calib.save(tmp_path / FILE)
    assert Calibration.load(tmp_path / FILE).facts == calib.facts
    arrays, header = read_tensors(tmp_path / FILE, "calibration")
    old = {
        key: value
        for key, value in header.items()
        if key not in ("samples", "pictures", "latent_shape", "kind", "version")
    }
    write_tensors(tmp_path / "old", "calibration", arrays, old)
    assert Calibration.load(tmp_path / "old").facts == drawn(Chain()).facts


def test_a_job_and_a_notebook_draw_the_same(tmp_path):
    adapter = Chain()
    adapter.samples = 6
    prompts = adapter.prompts("calibration", 5)
    calib = mq.calibrate(mq.Model(adapter), prompts, steps=3)
    assert calib.facts["samples"] == 6
    again = mq.calibrate(mq.Model(Chain()), prompts, 3, samples=6, work=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, "blas.json"}
    assert again.facts == calib.facts
    assert mx.array_equal(again.latents, calib.latents)
    assert mq.calibrate(mq.Model(adapter), prompts, steps=3, samples=4, work=tmp_path).facts["samples"] == 4


def test_the_command_takes_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, *place: tiny_adapter()))
    job = ["quantize", "--model", "mmdit-shapes", "--recipe", "rtn-w4a8", "--num-prompts", 3, "--steps", 2]
    succeed(*job, "--samples", 2, "--out", tmp_path / "few")
    assert read_json(tmp_path / "few" / "model.json", "quantized-model")["calibration"]["pictures"] == [[0], [1]]
    succeed(*job, "--out", tmp_path / "all")
    assert read_json(tmp_path / "all" / "model.json", "quantized-model")["calibration"]["samples"] == 6
    assert "0 is not in the range" in fail(*job, "--samples", 0, "--out", tmp_path / "none")


def test_a_part_has_some_pictures_at_some_steps():
    calib = drawn(tiny_adapter(), prompts=3, steps=4)
    part = calib.part(steps=slice(1, 3), pictures=slice(2))
    assert part.prompts == calib.prompts[:2]
    np.testing.assert_array_equal(part.sigmas, calib.sigmas[1:3])
    np.testing.assert_array_equal(np.array(part.latents), np.array(calib.latents)[1:3, :2])
