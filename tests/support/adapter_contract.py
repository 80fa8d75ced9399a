"""What every adapter must keep. A new one that draws subclasses ``AdapterContract`` and gives ``make_adapter`` and
``whole``; any other ``HostContract``, with ``entered``.
"""

import json
from abc import ABC, abstractmethod
from inspect import signature

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.layers.attention import ShownAttention
from mlxquant.layers.tree import parameters, swapped, tapped
from mlxquant.models.adapter import Adapter
from mlxquant.models.edges import check_edges
from mlxquant.models.stages import tensors, written
from mlxquant.recipes.roles import Role
from mlxquant.sweep.folding import check_folds


class HostContract(ABC):
    """Of any host."""

    @classmethod
    @abstractmethod
    def make_adapter(cls) -> Adapter:
        """The model under test."""

    @pytest.fixture(scope="class")
    @classmethod
    def adapter(cls):
        return cls.make_adapter()

    @abstractmethod
    def entered(self, adapter):
        """A fixture: what enters the first stage, two samples, and the noise level."""

    def test_blocks_are_what_is_between_the_first_stage_and_the_last(self, adapter):
        assert len(adapter.stages) >= 2
        assert adapter.stages == (adapter.stages[0], *adapter.blocks, adapter.stages[-1])
        assert adapter.stages is adapter.stages
        assert len({stage.name for stage in adapter.stages}) == len(adapter.stages)

    def test_every_layer_belongs_to_exactly_one_stage_and_has_a_role(self, adapter):
        for path in adapter.layers():
            assert sum(stage.owns(path) for stage in adapter.stages) == 1, path
            assert isinstance(adapter.roles()[path], Role)

    def test_blocks_hand_on_what_they_do_not_change(self, adapter, entered):
        state, sigma = entered
        extra = mx.zeros((2, 1))
        with adapter.clock.at(sigma):
            state = adapter.stages[0].run(state) | {"extra": extra}
            for block in adapter.blocks:
                after = block.run(state)
                assert after["extra"] is extra
                assert set(written(after, state)) < set(after)
                assert {key for keys in tensors(after, state).values() for key in keys} <= set(written(after, state))
                assert sum(adapter.weights(block, tensors(after, state)).values()) > 0
                state = after

    def test_edges_are_about_layers_and_name_no_channel_twice(self, adapter):
        check_edges(adapter.name, adapter.module, adapter.edges())
        assert {path for edge in adapter.edges() for path in edge.consumers} <= set(adapter.layers())

    def test_edges_tell_the_truth(self, adapter, entered):
        before = dict(parameters(adapter.module))
        check_folds(adapter, *entered)
        assert all(value is before[name] for name, value in parameters(adapter.module).items())  # undone exactly

    def test_weights_come_from_a_place(self, adapter):
        place = signature(type(adapter).pretrained).parameters["place"]
        assert (place.default, place.kind) == ("", place.POSITIONAL_OR_KEYWORD)

    def test_every_layer_is_reached_by_its_stage(self, adapter, entered):
        seen = set()
        with tapped(adapter.module, adapter.layers(), lambda path, *call: seen.add(path)):
            adapter.run(*entered)
        assert seen == set(adapter.layers())

    def test_structure_is_rebuilt_from_its_description(self, adapter):
        blank = type(adapter).described(json.loads(json.dumps(adapter.describe())))
        shapes = [{path: layer.weight.shape for path, layer in one.layers().items()} for one in (blank, adapter)]
        assert shapes[0] == shapes[1]
        assert blank.roles() == adapter.roles()


class AdapterContract(HostContract):
    """Of a host that draws."""

    @abstractmethod
    def whole(self, adapter, latent, conditioning, t):
        """The host's own forward pass, without stages."""

    @pytest.fixture(scope="class")
    @classmethod
    def entered(cls, adapter, inputs):
        return adapter.state(*inputs, 0.5), 0.5

    @pytest.fixture(scope="class")
    @classmethod
    def inputs(cls, adapter):
        prompts = [p.text for p in adapter.prompts("calibration", 2)]
        text = adapter.encode(prompts)
        noise = mx.random.normal((2, *adapter.latent_shape), key=mx.random.key(0))
        return noise, text

    def test_stages_compose_to_the_model(self, adapter, inputs):
        for sigma in (1.0, 0.37):
            staged = adapter.velocity(*inputs, sigma)
            whole = self.whole(adapter, *inputs, mx.full((2,), 1000 * sigma))
            np.testing.assert_allclose(np.array(staged), np.array(whole), atol=1e-5)

    def test_a_batch_may_mix_timesteps(self, adapter, inputs):
        mixed = np.array(adapter.velocity(*inputs, np.array([0.9, 0.2])))
        for i, sigma in enumerate((0.9, 0.2)):
            row = slice(i, i + 1)
            alone = np.array(adapter.velocity(inputs[0][row], inputs[1].take(row), sigma))
            np.testing.assert_allclose(mixed[i : i + 1], alone, atol=2e-4)

    def test_an_attention_that_can_be_opened_is_where_its_model_computes_it(self, adapter, inputs):
        exact, shown = np.array(adapter.velocity(*inputs, 0.5)), {path: [] for path in adapter.attentions()}
        for path in shown:
            assert sum(stage.owns(path) for stage in adapter.stages) == 1, path
        with swapped(
            adapter.module,
            {path: ShownAttention(lambda p, opened, seen=seen: seen.append(p)) for path, seen in shown.items()},
        ):
            np.testing.assert_allclose(np.array(adapter.velocity(*inputs, 0.5)), exact, atol=2e-3 * np.abs(exact).max())
        for path, seen in shown.items():
            assert len(seen) == 1, path
            np.testing.assert_allclose(np.array(seen[0].sum(-1)), 1, atol=1e-4)

    def test_clock_runs_only_during_forward_passes(self, adapter, inputs):
        adapter.velocity(*inputs, 0.5)
        with pytest.raises(AdapterError, match="no timestep"):
            _ = adapter.clock.sigma

    def test_sampling_is_reproducible_and_independent_of_the_batch(self, adapter):
        prompts = adapter.prompts("evaluation", 2)
        both = np.array(adapter.generate([p.text for p in prompts], [p.seed for p in prompts], 2, 3.0))
        np.testing.assert_array_equal(
            both, np.array(adapter.generate([p.text for p in prompts], [p.seed for p in prompts], 2, 3.0))
        )
        alone = np.array(adapter.generate([prompts[1].text], [prompts[1].seed], 2, 3.0))
        np.testing.assert_allclose(both[1:], alone, atol=1e-3)

    def test_pictures_are_in_range(self, adapter):
        prompt = adapter.prompts("evaluation", 1)[0]
        images = adapter.decode(adapter.generate([prompt.text], [prompt.seed], 2))
        assert images.ndim == 4
        assert images.shape[-1] == 3
        assert images.min() >= 0
        assert images.max() <= 1

    def test_wrong_counts_are_refused(self, adapter):
        with pytest.raises(AdapterError, match="one seed for each"):
            adapter.generate(["a"], [1, 2])
        with pytest.raises(AdapterError, match="one seed for each"):
            adapter.generate([], [])
