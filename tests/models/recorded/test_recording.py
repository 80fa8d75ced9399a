"""What ``recording`` keeps of calls, and what it refuses."""

import mlx.core as mx
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError

from support import anybody
from support.anybody import seeded, tokens


def test_a_sample_in_which_every_call_has_its_chance():
    module = seeded(anybody.Plain, 1)
    x = tokens(0, width=6)
    with mq.recording(module, samples=8) as seen:
        for index in range(80):
            module(x + index)
    assert (len(seen), seen.seen) == (8, 80)
    kept = [float(np.array(seen[i].args[0] - x).mean()) for i in range(8)]
    assert kept == sorted(kept)
    assert min(kept) < 40 < max(kept)  # not the first eight, nor the last
    with mq.recording(module, samples=8) as again:
        for index in range(80):
            module(x + index)
    assert again.record == seen.record


def test_arrays_are_kept_as_they_were():
    """The caller may write into its own afterwards, and whoever asks for a call into what it gets."""
    module, x = seeded(anybody.Plain, 1), tokens(0, width=6)
    before = np.array(x)
    with mq.recording(module) as seen:
        module(x)
        x[0] = 7
    np.testing.assert_array_equal(np.array(seen[0].args[0]), before)
    got = seen[0].args[0]
    got += 1
    np.testing.assert_array_equal(np.array(seen[0].args[0]), before)


def test_arguments_are_kept_as_the_module_was_given_them():
    """It may write into them, and so may whoever fills the same buffer before each call."""
    module, noise = seeded(anybody.WritesIntoItsInput), np.zeros((2, 5, 16), np.float32)
    with mq.recording(module) as seen:
        module(tokens(0), noise)
        noise[:] = 7
        module(tokens(1), noise)
    for index, given in enumerate([0, 7]):
        np.testing.assert_array_equal(np.array(seen[index].args[0]), np.array(tokens(index)))
        assert (seen[index].args[1] == given).all()
    assert mq.quantize_module(module, seen, "rtn-w8a16").blocks == ("blocks.0", "blocks.1")


@pytest.mark.parametrize("named", [True, False])
def test_past_a_limit_arrays_lie_on_disk(tmp_path, named):
    module = seeded(anybody.Plain, 1)
    folder = tmp_path / "calls" if named else None
    with mq.recording(module, samples=4, memory=0, folder=folder) as seen:
        for seed in range(10):
            module(tokens(seed, width=6).astype(mx.bfloat16))
    assert seen.on_disk == 4
    if named:
        assert len(list(folder.iterdir())) == 4
    with mq.recording(module, samples=4) as in_memory:
        for seed in range(10):
            module(tokens(seed, width=6).astype(mx.bfloat16))
    assert in_memory.on_disk == 0
    assert in_memory.record == seen.record
    for index in range(4):
        assert bool(mx.array_equal(seen[index].result, in_memory[index].result))
        assert seen[index].args[0].dtype == mx.bfloat16


def test_a_folder_holds_one_recording(tmp_path):
    module = seeded(anybody.Plain, 1)
    with mq.recording(module, memory=0, folder=tmp_path) as first:
        module(tokens(0, width=6))
    with (
        pytest.raises(ArtifactError, match=r"000000\.safetensors: another recording's; choose a folder for this"),
        mq.recording(module, memory=0, folder=tmp_path),
    ):
        module(tokens(1, width=6))
    assert bool(mx.array_equal(first[0].args[0], tokens(0, width=6)))


def test_everything_but_arrays_is_kept_by_reference():
    module, note = seeded(anybody.Chooses), object()

    class Notes(anybody.Chooses):
        def __call__(self, x, skip=False, note=None):
            return super().__call__(x, skip)

    module.__class__ = Notes
    with mq.recording(module) as seen:
        module(tokens(0), note=note)
    assert len(seen) == 1  # and not once more for the class that it is derived from
    assert seen[0].kwargs["note"] is note


def test_several_modules_at_once_and_classes_as_they_were():
    one, other = seeded(anybody.Plain, 1), seeded(anybody.Plain, 2)
    call = anybody.Plain.__call__
    with mq.recording(one) as first, mq.recording(other) as second:
        one(tokens(0, width=6))
        other(tokens(1, width=6))
        other(tokens(2, width=6))
    assert (len(first), len(second)) == (1, 2)
    assert anybody.Plain.__call__ is call


def test_a_call_that_changes_what_it_is_given_is_refused_by_name():
    with (
        pytest.raises(
            CalibrationError, match=r"call 0 of Remembers: its argument cache, a Cache, is changed by the call"
        ),
        mq.recording(seeded(anybody.Remembers)) as seen,
    ):
        seen.module(tokens(0), cache=anybody.Cache())


def test_calls_without_values_are_refused():
    module = seeded(anybody.Plain, 1)
    with mq.recording(module), pytest.raises(CalibrationError, match=r"call 0 of Plain: .*outside of mx\.vmap"):
        mx.vmap(lambda x: module(x))(tokens(0, width=6))
    with mq.recording(module), pytest.raises(CalibrationError, match="returned NaN or infinite values"):
        module(tokens(0, width=6) * mx.nan)
    with mq.recording(module), pytest.raises(CalibrationError, match="returned a array without numbers in arrays of"):
        module(mx.zeros((0, 5, 6)))
    assert anybody.Plain.__call__ is type(module).__call__


@pytest.mark.parametrize("limits", [{"samples": 0}, {"memory": -1.0}, {"memory": float("nan")}])
def test_limits_are_checked(limits):
    with (
        pytest.raises(CalibrationError, match="expected at least 1 call and 0 GB"),
        mq.recording(anybody.Plain(1), **limits),
    ):
        pass


def test_what_is_no_module_is_refused():
    with pytest.raises(AdapterError, match=r"expected an mlx\.nn\.Module"), mq.recording("transformer"):
        pass
