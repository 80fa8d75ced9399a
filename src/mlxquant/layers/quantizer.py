"""``Quantizer``: put layers of a class in the places of a model's linears.

``quantize_linears`` chooses a format and knows all kinds of layers; here the class is the caller's, of mlxquant or of
his own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.nn as nn

from ..errors import AdapterError, MlxQuantError
from ..recipes.patterns import Pattern, as_list, names, unmatched
from .quantize_linears import Held, Selection, find_held, places_of, replace_layers
from .sizes import SizeReport
from .tree import module_of
from .weight_only import W8A16Linear


class Quantizer:
    """Replaces every ``nn.Linear`` of a model in place, all but those that are excluded, by a layer of one class.

    A layer is made as ``layer_class(in_features=, out_features=, bias=)`` and given the weight by ``quantize(weight)``
    and, where there is one, the bias, as it is, as its ``bias``. All layers are made before the first is replaced:
    after an error the model is as it was. The same layer at two places stays one layer.

    Args:
        model: The module that holds the layers, or what ``load`` returns; it is changed.
        layer_class: ``W8A16LinearLayer``, or any class of MLX modules that is used like it.
        exclude: Names or patterns of layers that stay as they are; see ``recipes.patterns``. "lm_head" is any layer of
            that name. Unlike those of ``quantize_linears``, which are errors then, they may match nothing: a language
            model without an ``lm_head`` is common, its embedding writes the output. A warning says so.

    Attributes:
        report: Bytes before and after, the relative error of each quantized weight, and why other layers stayed.

    Raises:
        AdapterError: On what is no module of MLX, or no class of such layers.
        RecipeError: When there is nothing to quantize.
        NumericsError: On NaN or infinite weights, with the layer's name.

    Examples:
        >>> import mlx.nn as nn
        >>> from mlxquant import Quantizer, W8A16LinearLayer
        >>> class MyCustomModel(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden, self.lm_head = nn.Linear(64, 256), nn.Linear(256, 64)
        >>> model = MyCustomModel()
        >>> report = Quantizer(model, W8A16LinearLayer, ["lm_head"]).report
        >>> type(model.hidden).__name__, type(model.lm_head).__name__, report.after
        ('W8A16Linear', 'Linear', 83712)
    """

    def __init__(
        self, model: Any, layer_class: type[nn.Module] = W8A16Linear, exclude: Pattern | Iterable[Pattern] = ()
    ):
        if not (
            isinstance(layer_class, type) and issubclass(layer_class, nn.Module) and hasattr(layer_class, "quantize")
        ):
            raise AdapterError(
                f"Quantizer takes a class of MLX modules with quantize(weight), such as W8A16LinearLayer, found"
                f" {layer_class!r}; formats by name are for quantize_linears"
            )
        module, patterns = module_of(model), as_list(exclude)
        places = places_of(find_held(module))
        idle = [pattern for pattern in patterns if not any(names(pattern, path) for path in places)]
        for pattern in idle:
            warnings.warn(f"{unmatched('exclude', pattern, places)}; nothing is excluded by it", stacklevel=2)
        self._class = layer_class
        kept = [pattern for pattern in patterns if pattern not in idle]
        self.report: SizeReport = replace_layers(Selection(module, kept), self._made)

    def _made(self, chosen: Sequence[Held]) -> list[nn.Module]:
        return [self._layer(one) for one in chosen]

    def _layer(self, one: Held) -> Any:
        """What stands for a linear; errors name it."""
        rows, width = one.module.weight.shape
        layer_class: Any = self._class
        layer = layer_class(in_features=width, out_features=rows, bias="bias" in one.module)
        try:
            layer.quantize(one.module.weight)
        except MlxQuantError as error:
            raise type(error)(f"layer {one.path}: {error}") from error
        if "bias" in one.module:
            layer.bias = one.module.bias
        return layer
