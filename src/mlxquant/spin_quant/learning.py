"""SpinQuant: learn rotations of a language model's hidden states on text, so that it survives 4 bits (arXiv
2405.16406).

    SpinQuant(model, bits=4, activation_bits=4).optimize(data, steps=100).apply()

Rotations start as Hadamard or random matrices and follow Cayley steps down the next-token loss of the network with
rounded weights and inputs, on the caller's own text. ``apply`` folds them into the model and puts integer layers in
place of its linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np

from ..errors import CalibrationError, NumericsError, RecipeError
from ..grids.weights import WeightFormat
from ..layers.sizes import stored_bytes
from ..layers.tree import evaluating, get_module, module_of, set_module, tapped
from ..methods import registry
from ..numerics import cayley
from ..numerics.arrays import Array
from ..numerics.moments import Moments
from ..numerics.part_moments import PartMoments
from ..numerics.transform import Transform
from ..progress import Progress, silent
from ..recipes.recipe import LayerSpec
from ..sweep.layer import quantize_layer
from . import rotations
from .network import Precision, SpinNetwork
from .residual_stream import residual_stream
from .rotations import Rotations, hold_heads

BITS = (4, 6, 8)  # of activations
CITATION = """@inproceedings{liu2025spinquant,
  title = {{SpinQuant}: {LLM} Quantization with Learned Rotations},
  author = {Liu, Zechun and Zhao, Changsheng and Fedorov, Igor and Soran, Bilge and Choudhary, Dhruv
            and Krishnamoorthi, Raghuraman and Chandra, Vikas and Tian, Yuandong and Blankevoort, Tijmen},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2405.16406}
}"""
TRIALS = 4  # how often rotations are compared on all data while they are learned


@dataclass
class Report:
    """``before`` and ``after``: bytes of all parameters; ``errors``: relative output error of each layer on the
    calibration text.
    """

    before: int
    after: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{len(self.errors)} layers quantized; {self.before / 1e6:.2f} MB became {self.after / 1e6:.2f} MB; "
            f"largest relative output error {self.errors[worst]:.3f} in {worst}"
        )


class SpinQuant:
    """Rotations of one model, from their start to the quantized layers. The output layer and the embeddings stay in
    full precision.

    Attributes:
        stream: Where the model writes and reads its residual stream.
        rotations: The present ones, NumPy float64.
        history: The loss of each step, nats a token.
        report: What ``apply`` did; None before.
        stock: Whether stock code can load the rotated model; None before it is rotated.
    """

    def __init__(
        self,
        model: Any,
        bits: int = 4,
        activation_bits: int | None = None,
        start: str = "hadamard",
        seed: int = 0,
        group: int | Literal["channel"] = "channel",
        kv_bits: int | None = None,
    ):
        """Nothing of the model is changed yet.

        Args:
            model: Our GPT, also while it is trained through rounding or afterwards; a model of mlx-lm whose residual
                stream is described; or what ``mlxquant.load`` returns for one of them.
            bits: Of the weights.
            activation_bits: Of the inputs of linears, 4, 6 or 8, each token on its own scale; None leaves them as they
                are.
            start: "hadamard" or "random", or "identity", for models without outliers.
            seed: Of the start.
            group: How many weights of a row share a scale: "channel" for all (symmetric), or 32, 64, 128 (asymmetric).
            kv_bits: Of keys and values, 4, 6 or 8, each head of a token on its own scale; None leaves them as they are.

        Raises:
            RecipeError: Settings do not fit each other or the model.
            AdapterError: The model is not described.
        """
        if start not in cayley.STARTS:
            raise RecipeError(f"SpinQuant starts from one of {cayley.STARTS}, not from {start!r}")
        for name, value in (("activation_bits", activation_bits), ("kv_bits", kv_bits)):
            if value is not None and value not in BITS:
                raise RecipeError(f"{name} must be one of {BITS} or None, found {value}")
        self._model = module_of(model)
        self.stream = residual_stream(self._model)
        if kv_bits is not None and not self.stream.keys:
            raise RecipeError("this model has no place where its keys could be rounded; leave kv_bits out")
        self._format = WeightFormat(bits, group, symmetric=group == "channel")
        for linear in rotations.folded(self._model, self.stream).values():
            self._format.columns(linear.weight.shape[1])
        self._precision = Precision(self._format, activation_bits, kv_bits)
        self.rotations = rotations.start(self.stream, start, seed)
        self.history: list[float] = []
        self.report: Report | None = None
        self.stock: bool | None = None  # not known before the model is rotated
        self._data: list[mx.array] = []
        self._rotated = False

    def optimize(
        self,
        data: Iterable[Any],
        steps: int = 100,
        learning_rate: float = 1.5,
        momentum: float = 0.0,
        weights: bool = True,
        progress: Progress = silent,
    ) -> SpinQuant:
        """Learn the rotations.

        Four times on the way the loss over all of the data is taken, and the best rotations win, be it those of the
        start. An interrupted run keeps what it has learned; another goes on from there, on the model's present weights.

        Source: 2405.16406, section 3.2: Cayley steps on the next-token loss, 100 of them from 1.5. Departures: scales
        follow the gradient, which tells a rotation to shrink the extremes; the residual rotation of a LayerNorm model
        keeps ones.

        Args:
            data: Token arrays int [B,T], one a step and by turns.
            steps: Of Cayley descent.
            learning_rate: At first; it falls linearly to 0.
            momentum: Of the descent.
            weights: False rounds only activations in the loss, which the paper advises where GPTQ rounds the weights.
            progress: A bar around the steps.

        Returns:
            Itself.

        Raises:
            RecipeError: Nothing would be rounded, or the model is rotated already.
            CalibrationError: There are no tokens, or none of this model's.
            NumericsError: A gradient is not finite.
        """
        self._refuse_rotated()
        if not weights and self._precision.activation is None and self._precision.held is None:
            raise RecipeError(
                "without weights and without activation_bits nothing is rounded, and there is nothing to learn"
            )
        self._data = self._arrays(data)
        network = self._network(weights)
        with evaluating(self._model), network.installed():
            best = self._mean_loss(network, self._data), self.rotations
            for step in self._descend(network, steps, learning_rate, momentum, progress):
                if step % max(1, steps // TRIALS) == 0 or step == steps:
                    best = min(best, (self._mean_loss(network, self._data), self.rotations), key=lambda tried: tried[0])
        self.rotations = best[1]
        return self

    def loss(self, data: Iterable[Any]) -> float:
        """The mean loss with the present rotations and all weights and inputs rounded to nearest.

        Args:
            data: Token arrays int [B,T].

        Returns:
            Nats a token.
        """
        self._refuse_rotated()
        network, arrays = self._network(True), self._arrays(data)
        with evaluating(self._model), network.installed():
            return self._mean_loss(network, arrays)

    def rotate(self) -> SpinQuant:
        """Fold the rotations into the model, in place, in full precision; the function stays the same. Returns itself.

        Any recipe may quantize what results. ``stock`` says whether stock code can load it.
        """
        if not self._rotated:
            self.stock = rotations.rotate(self._model, _floats(self.rotations))
            self._rotated = True
        return self

    def apply(
        self,
        data: Iterable[Any] | None = None,
        rounding: str = "gptq",
        steps: str = "search",
        progress: Progress = silent,
    ) -> SpinQuant:
        """Rotate, and put integer layers in place of the linears, in order, each rounded on what the rounded ones
        before it write.

        Args:
            data: Token arrays to calibrate on, by default those of ``optimize``; rounding to nearest ("rtn" with steps
                "extremes" or "mse") needs none.
            rounding: A registered rounding that looks at one stream.
            steps: How the steps of a weight are chosen, a registered method.
            progress: A bar around the groups of layers.

        Returns:
            Itself; ``report`` has the bytes before and after.

        Raises:
            CalibrationError: There are no data.
            RecipeError: The model is quantized already, or the rounding compares with the full-precision model.
        """
        if self.report is not None:
            raise RecipeError("this model was quantized already; load it anew to apply something else")
        if registry.get("round", rounding).cross:
            raise RecipeError(
                f"{rounding!r} compares with the full-precision model; call rotate(), then quantize the model by a"
                " recipe"
            )
        spec = LayerSpec(self._format, rounding=rounding, steps=steps)
        arrays = self._data if data is None else self._arrays(data)
        if not arrays and (rounding != "rtn" or steps == "search"):
            raise CalibrationError(
                f"{rounding!r} with steps {steps!r} calibrates on text; pass data, or call optimize first"
            )
        report = Report(stored_bytes(self._model))
        self.rotate()
        for paths in progress(self.stream.groups, "rounding"):
            self._quantize(paths, spec, arrays, report)
        if self._precision.held is not None:
            for path, module in hold_heads(self._model, self.stream, self._precision.held).items():
                set_module(self._model, path, module)
        report.after = stored_bytes(self._model)
        self.report = report
        return self

    def _quantize(self, paths: tuple[str, ...], spec: LayerSpec, arrays: list[mx.array], report: Report) -> None:
        """Round layers that read the same input, in place."""
        linears = {path: get_module(self._model, path) for path in paths}
        width = linears[paths[0]].weight.shape[1]
        transform = Transform(block=self._precision.block(self.stream, paths[0], width))
        moments = self._moments(paths[0], width, arrays) if arrays else Moments.identity(width)
        seen = transform.moments(moments)
        for path, linear in linears.items():
            rounded = quantize_layer(linear, spec, PartMoments.one(seen), path, transform)
            if self._precision.activation is not None:
                rounded.layer.quantize_tokens(self._precision.activation)
            set_module(self._model, path, rounded.layer)
            report.errors[path] = rounded.error

    def _moments(self, path: str, width: int, arrays: list[mx.array]) -> Moments:
        """Of a layer's inputs in the model as it is now."""
        moments = Moments.empty(width)
        see = tapped(self._model, [path], lambda _, x: moments.add(np.array(x.astype(mx.float32))))
        with evaluating(self._model), see:
            for tokens in arrays:
                mx.eval(self._model(tokens))
        return moments

    def _descend(
        self, network: SpinNetwork, steps: int, learning_rate: float, momentum: float, progress: Progress
    ) -> Iterator[int]:
        """Take steps, and count them."""
        gradient_of = mx.value_and_grad(network.loss)
        speeds = _each(np.zeros_like, self.rotations)
        for step in progress(range(steps), "rotations"):
            loss, found = gradient_of(_floats(self.rotations), self._data[step % len(self._data)])
            gradients = _each(lambda g: np.array(g, np.float64), found)
            self.history.append(cast(float, loss.item()))
            if not all(np.isfinite(g).all() for g in (gradients["residual"], *gradients["values"])):
                raise NumericsError(
                    f"step {step} of SpinQuant: the gradient is not finite; use a lower learning_rate or a float32"
                    " model"
                )
            rate = learning_rate * (1 - step / steps)

            def move(
                rotation: Array, gradient: Array, speed: Array, keeps_ones: bool, rate: float = rate
            ) -> tuple[Array, Array]:
                return cayley.cayley_step(rotation, gradient, rate, speed, momentum, keeps_ones)

            residual = move(self.rotations["residual"], gradients["residual"], speeds["residual"], self.stream.centred)
            values = [
                move(*parts, False)
                for parts in zip(self.rotations["values"], gradients["values"], speeds["values"], strict=True)
            ]
            self.rotations, speeds = (
                {"residual": residual[i], "values": [value[i] for value in values]} for i in (0, 1)
            )
            yield step + 1

    def _mean_loss(self, network: SpinNetwork, arrays: list[mx.array]) -> float:
        rotations = _floats(self.rotations)
        tokens = [array.shape[0] * (array.shape[1] - 1) for array in arrays]
        losses = [cast(float, network.loss(rotations, array).item()) for array in arrays]
        return float(np.average(losses, weights=tokens))

    def _network(self, weights: bool) -> SpinNetwork:
        precision = self._precision if weights else replace(self._precision, weight=None)
        return SpinNetwork(self._model, self.stream, precision)

    def _arrays(self, data: Iterable[Any]) -> list[mx.array]:
        """Token arrays int32 [B,T]; raises CalibrationError where there are none, or they are none of this model's."""
        size = get_module(self._model, self.stream.tokens).weight.shape[0]
        arrays = []
        for at, tokens in enumerate(data):
            found = np.array(tokens)
            if found.ndim != 2 or found.shape[1] < 2 or not np.issubdtype(found.dtype, np.integer):
                raise CalibrationError(
                    f"array {at} of the data is {found.dtype} {found.shape}; expected integer tokens [batch, length"
                    " >= 2]"
                )
            if found.size and not 0 <= found.min() <= found.max() < size:
                raise CalibrationError(
                    f"array {at} of the data holds tokens {found.min()} to {found.max()}; the model has 0 to {size - 1}"
                )
            if found.size:
                arrays.append(mx.array(found.astype(np.int32)))
        if not arrays:
            raise CalibrationError("no tokens to calibrate on; pass a sequence of integer arrays [batch, length]")
        return arrays

    def _refuse_rotated(self) -> None:
        if self._rotated:
            raise RecipeError(
                "the rotations are a part of the model already; learn and measure before rotate() and apply()"
            )


def _each(change: Callable[[Any], Any], arrays: Rotations) -> Rotations:
    return {"residual": change(arrays["residual"]), "values": [change(value) for value in arrays["values"]]}


def _floats(rotations: Rotations) -> Rotations:
    return _each(lambda value: mx.array(value, mx.float32), rotations)
