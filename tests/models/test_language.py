"""Language models as adapters: the chain is the model, whatever the model is."""

import json
import re
from dataclasses import replace

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.api.plan import plan
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError, RecipeError
from mlxquant.layers.kinds import find_exact_layers
from mlxquant.layers.sizes import planned_bits_per_weight
from mlxquant.layers.tree import tapped
from mlxquant.models.catalog import find_model
from mlxquant.models.diffusion import diffusion
from mlxquant.models.gpt.adapter import GPTAdapter
from mlxquant.models.gpt.network import causal_mask
from mlxquant.models.gpt.tokenizers import ByteTokenizer
from mlxquant.models.language import language
from mlxquant.recipes.grammar import parse_recipe

from support.adapter_contract import HostContract
from support.tiny_language import TEXT, gpt_folder, llama_folder, tiny_gpt

TOKENS = mx.array(np.frombuffer(TEXT[:64].encode(), np.uint8).astype(np.int32).reshape(2, 32))


LLAMAS = [pytest.param(name, marks=pytest.mark.mlxlm) for name in ("llama", "tied llama", "bfloat16 llama")]


@pytest.fixture(params=["gpt", *LLAMAS], scope="module")
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if request.param == "gpt":
        return mq.load(gpt_folder(folder))
    dtype = mx.bfloat16 if "bfloat16" in request.param else mx.float32
    return mq.load(llama_folder(folder, dtype=dtype, tie_word_embeddings="tied" in request.param))


class TestContract(HostContract):
    @classmethod
    def make_adapter(cls):
        raise NotImplementedError  # there are several: ``adapter`` gives them

    @pytest.fixture
    def adapter(self, model):
        return model.adapter

    @pytest.fixture
    def entered(self):
        return {"tokens": TOKENS}, 0.0

    def test_stages_compose_to_the_model(self, model):
        state = model.adapter.run({"tokens": TOKENS}, 0.0)
        whole = np.array(model.adapter.module(TOKENS).astype(mx.float32))
        tolerance = 1e-5 if model.language.dtype == "float32" else 5e-2
        assert np.abs(np.array(state["logits"]) - whole).max() <= tolerance * np.abs(whole).max()
        np.testing.assert_array_equal(np.array(state["logits"]), np.array(model.language.logits(TOKENS)))
        model.language.check_chain(TOKENS)

    def test_every_layer_belongs_to_exactly_one_stage_and_is_reached_by_it(self, model):
        adapter, seen = model.adapter, set()
        state = {"tokens": TOKENS}
        for stage in adapter.stages:
            own = [path for path in adapter.layers() if stage.owns(path)]
            with tapped(adapter.module, own, lambda path, *call: seen.add(path)):
                state = stage.run(state)
                mx.eval(state)
            assert seen >= set(own)
        assert seen == set(find_exact_layers(adapter.module))

    def test_roles(self, model):
        roles = model.adapter.roles()
        assert set(roles.values()) <= {"attention", "mlp", "output", "embedding"}
        assert {path for path, role in roles.items() if role == "embedding"} == {
            path for path, layer in model.adapter.layers().items() if isinstance(layer, nn.Embedding)
        }
        assert all(role == "attention" for path, role in roles.items() if "attn" in path)
        assert roles.get("lm_head", "output") == "output"

    def test_only_the_last_tokens_state_is_causal(self, model):
        """A later token changes nothing before it."""
        other = mx.concatenate([TOKENS[:, :-1], (TOKENS[:, -1:] + 1) % 256], axis=1)
        np.testing.assert_array_equal(
            np.array(model.language.logits(TOKENS))[:, :-1], np.array(model.language.logits(other))[:, :-1]
        )

    def test_structure_is_rebuilt_and_weights_are_shared_by_a_clone(self, model):
        clone = model.clone()
        assert clone.fingerprint == model.adapter.fingerprint
        np.testing.assert_array_equal(np.array(clone.logits(TOKENS)), np.array(model.language.logits(TOKENS)))

    def test_a_stage_runs_alone(self, model):
        """A resumed sweep may start at a later layer, before the embedding has shown what the layers are given."""
        adapter = model.clone()
        hidden = model.adapter.stages[0].run({"tokens": TOKENS})["hidden"]
        expected = model.adapter.stages[2].run({"tokens": TOKENS, "hidden": hidden})["hidden"]
        np.testing.assert_array_equal(
            np.array(adapter.stages[2].run({"tokens": TOKENS, "hidden": hidden})["hidden"]), np.array(expected)
        )


@pytest.mark.parametrize(
    "recipe", ["rtn-w4a16-g32", "gptq-w4a8", "gptq-w4a4-token", "qronos-w3a16", "gptq+smoothquant+rotation-w4a8-token"]
)
def test_recipes_run_and_a_saved_model_predicts_the_same(model, recipe, tmp_path):
    calib = mq.calibrate_text(model, samples=4, length=32, data=_text(tmp_path))
    quantized = mq.quantize(model, calib, recipe)
    before = quantized.predict(TEXT, limit=4)
    quantized.save(tmp_path / "out")
    after = mq.load(tmp_path / "out").predict(TEXT, limit=4)
    np.testing.assert_array_equal(before.nats, after.nats)
    assert before.bits_per_character != model.predict(TEXT, limit=4).bits_per_character
    heads = {layer.format.bits for path, layer in quantized.layers.items() if path == "lm_head"}
    assert heads <= {8}


def test_a_killed_sweep_ends_with_the_same_bytes(model, tmp_path):
    calib = mq.calibrate_text(model, samples=4, length=32, data=_text(tmp_path))
    whole = mq.quantize(model, calib, "gptq-w4a8-token")
    whole.save(tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop_late(items, label):
        if label.startswith(model.adapter.stages[2].name):
            raise StopError
        return items

    with pytest.raises(StopError):
        mq.quantize(model, calib, "gptq-w4a8-token", tmp_path / "work", stop_late)
    mq.quantize(model, calib, "gptq-w4a8-token", tmp_path / "work").save(tmp_path / "resumed")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_large_vocabularies_are_judged_on_some_tokens(monkeypatch):
    adapter = GPTAdapter(tiny_gpt(), ByteTokenizer(), {})
    monkeypatch.setattr("mlxquant.models.language.JUDGED", 256 * 8)
    state = adapter.run({"tokens": TOKENS}, 0.0)
    np.testing.assert_allclose(np.array(state["logits"]), np.array(adapter.module(TOKENS))[:, ::4], atol=1e-5)
    assert adapter.logits(TOKENS).shape == (2, 32, 256)


class Odd(nn.Module):
    """A GPT whose layers are called by ``call(block, x, tokens)``."""

    def __init__(self, call):
        super().__init__()
        gpt = tiny_gpt()
        self.model, self.config, self._call = gpt.model, gpt.config, call

    @property
    def layers(self):
        return self.model.h

    def __call__(self, tokens):
        x = self.model.wte(tokens)
        for block in self.layers:
            x = self._call(block, x, tokens)
        return self.model.wte.as_linear(x)


def doubled(block, x, tokens):
    return 2 * block(x, mx.zeros((tokens.shape[1],) * 2))


def told(block, x, tokens):
    """What a layer is given beside hidden states hangs on the tokens."""
    return block(x, causal_mask(tokens.shape[1]) + 3 * mx.sin(tokens[0].astype(mx.float32)))


def test_a_model_that_tells_its_layers_about_the_tokens_is_a_chain():
    """Batches of one shape run by turns, as in a sweep: each layer is given what its own tokens ask for."""
    adapter = GPTAdapter(Odd(told), ByteTokenizer(), {})
    adapter.check_chain(TOKENS)
    batches = [TOKENS, (TOKENS + 1) % 256]
    states = [{"tokens": tokens} for tokens in batches]
    for stage in adapter.stages:
        states = [stage.run(state) for state in states]
    for tokens, state in zip(batches, states, strict=True):
        np.testing.assert_allclose(np.array(state["logits"]), np.array(adapter.module(tokens)), atol=1e-5)


def test_a_model_that_does_more_between_its_layers_is_refused():
    adapter = GPTAdapter(Odd(doubled), ByteTokenizer(), {})
    with pytest.raises(AdapterError, match="quantize_linears"):
        adapter.check_chain(TOKENS)


def test_pictures_and_text_are_not_mixed_up(tmp_path):
    shapes, text = mq.load("mmdit-shapes"), mq.load(gpt_folder(tmp_path / "gpt"))
    with pytest.raises(AdapterError, match="draws no pictures"):
        diffusion(text.adapter)
    with pytest.raises(AdapterError, match="writes no text"):
        language(shapes.adapter)
    with pytest.raises(AdapterError, match="draws no pictures"):
        text.generate("a circle")


def test_folders_are_told_apart_by_what_they_hold(tmp_path):
    assert find_model(str(gpt_folder(tmp_path / "gpt")))[0] == "gpt"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert find_model(str(tmp_path / "other"))[0] == "mlx-lm"


@pytest.mark.mlxlm
def test_a_folder_that_mlx_lm_cannot_load_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ArtifactError, match="mlx-lm cannot load it"):
        mq.load(tmp_path / "other")


@pytest.mark.mlxlm
def test_a_quantized_checkpoint_is_refused(tmp_path):
    folder = llama_folder(tmp_path / "llama")
    import mlx_lm.utils as utils

    model, config = utils.load_model(folder)
    model, config = utils.quantize_model(model, config, 64, 4)
    utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="quantized already"):
        mq.load(folder)


def _text(folder):
    path = folder / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ("gptq+progressive-w4a16", "pictures"),
        ("gptq+softmax8-w4a8", "attention"),
        ("tcaqdm-w4a8", "attention"),
    ],
)
def test_recipes_that_need_pictures_are_refused_before_anything_runs(recipe, word, tmp_path):
    model = mq.load(gpt_folder(tmp_path / "gpt"))
    calib = mq.calibrate_text(model, samples=2, length=16, data=_text(tmp_path))

    def never(items, label):
        raise AssertionError(label)

    with pytest.raises(RecipeError, match=rf"(?s)^recipe {re.escape(recipe)}.*{word}.*leave"):
        mq.quantize(model, calib, recipe, tmp_path / "work", never)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "recipe", ["gptq+sensitivity-w4a16", "gptq+tiers-w4a8", "mixed-w4a16", "best-w3a16", "taqdit-w4a8"]
)
def test_errors_are_weighed_by_what_they_change_in_the_next_tokens_distribution(recipe, tmp_path):
    model, parsed = mq.load(gpt_folder(tmp_path / "gpt")), parse_recipe(recipe)
    parsed = replace(parsed, learning=replace(parsed.learning, iterations=2))
    if parsed.tuning is not None:
        parsed = replace(parsed, tuning=replace(parsed.tuning, iterations=2))
    calib = mq.calibrate_text(model, samples=9, length=16, data=_text(tmp_path))
    done = mq.quantize(model, calib, parsed)
    allocation = done.facts.get("allocation")
    assert (allocation is not None) == parsed.allocates
    if allocation is not None:
        assert "weighed" not in allocation  # there were gradients
        assert allocation["error"] < allocation["error_before"]
        assert done.size.bits_per_quantized_weight <= planned_bits_per_weight(
            plan(model, parsed), model.adapter.layers()
        )


def test_bits_average_what_was_asked_for(tmp_path):
    model = mq.load(gpt_folder(tmp_path / "gpt"))
    calib = mq.calibrate_text(model, samples=4, length=16, data=_text(tmp_path))
    done = mq.quantize(model, calib, replace(parse_recipe("gptq-w4a16"), bits_per_weight=6.5))
    assert 6 < done.size.bits_per_quantized_weight <= 6.5


def test_signs_are_drawn_as_fishers_information_has_them(tmp_path):
    """Drawing is linear in the signs, so those of one place each give its matrix M, and M Mᵀ is the Hessian."""
    adapter = mq.load(gpt_folder(tmp_path / "gpt")).adapter
    size = int(adapter.module(mx.zeros((1, 1), mx.int32)).shape[-1])
    logits = mx.random.normal((size,), key=mx.random.key(3)) * 2
    places = {"logits": mx.eye(size)[:, None]}
    drawn = adapter.weighed(places, {"logits": mx.broadcast_to(logits, (size, 1, size))})["logits"]
    matrix, likely = np.array(drawn, np.float64)[:, 0].T, np.array(mx.softmax(logits), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T / size, np.diag(likely) - np.outer(likely, likely), atol=1e-7)


def test_windows_longer_than_the_positions_are_refused(tmp_path):
    """MLX does not look where a table ends: it would read what lies behind it."""
    model = mq.load(gpt_folder(tmp_path / "gpt"))
    with pytest.raises(CalibrationError, match="windows of 33 tokens are longer than the 32 positions of gpt"):
        mq.calibrate_text(model, samples=2, length=33, data=_text(tmp_path))
    with pytest.raises(CalibrationError, match="33 tokens"):
        model.predict(TEXT, 33)
    with pytest.raises(AdapterError, match="33 tokens at once, and this GPT has 32 positions"):
        model.adapter.module(mx.zeros((1, 33), mx.int32))


@pytest.mark.mlxlm
def test_positions_of_mlx_lm_models_are_known_where_they_are_learned(tmp_path):
    from mlxquant.models.mlx_lm import MLXLanguageModel

    llama = mq.load(llama_folder(tmp_path / "llama"))
    assert llama.predict(TEXT, 100, 1).tokens.sum() == 100  # rotary positions have no end
    gpt2 = MLXLanguageModel.pretrained(str(gpt_folder(tmp_path / "gpt")))
    with pytest.raises(CalibrationError, match="longer than the 32 positions of mlx-lm"):
        gpt2.logits(mx.zeros((1, 33), mx.int32))
