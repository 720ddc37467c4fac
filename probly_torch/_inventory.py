"""What a torch model holds, by the names and paths of its state_dict: its weights, options and parts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from probly_common.checks.ensembles import check_initialized
from probly_common.checks.weights import check_materialized, check_tensors
from probly_torch import layers as probly
from probly_torch._arguments import WORDS
from probly_torch._kinds import KINDS, options_of_function
from probly_torch.ensemble import Ensemble


class Inventory:
    """Lists what a model holds, by the names and paths that it has in torch.

    Args:
        model: any module; it is read when an attribute is asked for first.
    Raises:
        ValueError: if a weight has no memory.
    Example:
        >>> inventory = Inventory(nn.Sequential(nn.Linear(4, 3), nn.GELU()))
        >>> list(inventory.weights("save_weights"))
        ['0.weight', '0.bias']
        >>> inventory.options
        {'0': {'kind': 'Linear', 'bias': True}, '1': {'kind': 'GELU', 'approximate': 'none'}}
    """

    words = WORDS

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def parts(self) -> list[tuple[str, Any]]:
        """Modules by path, outer ones first where several have one path."""
        return [each[:2] for each in _modules(self.model, "")]

    @cached_property
    def lengths(self) -> dict[str, int]:
        """How many layers each Sequential has."""
        return {path: len(module._modules) for path, module in self.parts if _is_sequential(module)}

    @cached_property
    def options(self) -> dict[str, dict[str, Any]]:
        """The options of every layer that has a kind, by its path: numbers, strings, booleans, None and lists."""
        options = dict(_options(self.model, ""))
        for path, channels in _flattened(self.model):
            if path in options:  # not inside a layer that has a kind itself
                options[path]["flatten_channels"] = channels
        return options

    @cached_property
    def _state(self) -> dict[str, Any]:
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if name.rpartition(".")[2] != "_extra_state"}

    def weights(self, what: str) -> dict[str, Tensor]:
        """Returns every tensor of the state_dict. Extra states are no weights.

        Raises:
            ValueError: naming every weight that has no memory, or no strides.
        """
        state = dict(self._state)
        check_tensors(
            what,
            [name for name, v in state.items() if not isinstance(v, Tensor)],
            [name for name, v in state.items() if isinstance(v, Tensor) and v.layout != torch.strided],
        )
        check_initialized(what, [name for name, tensor in state.items() if is_lazy(tensor)])
        check_materialized(what, [name for name, tensor in state.items() if tensor.is_meta])
        return state


def _options(module: nn.Module, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(module, Ensemble):
        module = module._network
    options = KINDS.options(module)
    if options is not None:
        yield path, options
        return
    functions = ((_joined(path, name), options_of_function(value)) for name, value in vars(module).items())
    yield from ((inner, options) for inner, options in functions if options is not None)
    for inner, child in _children(module, path):
        yield from _options(child, inner)


def _flattened(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields the layers that read something flattened, and how many channels it has.

    The number is 0 if the channels are not known. Layers come in the order of Sequentials, and of the attributes of
    other modules, whose forward is not read.
    """
    for outer, module in (each[:2] for each in _modules(model, "") if each[2]):
        channels, rank, flat, pooled = 0, 4, False, False  # an image, as long as nothing else is known
        for path, layer in _in_order(module, outer):
            if isinstance(layer, nn.Flatten):
                whole = layer.start_dim % rank == 1 and layer.end_dim % rank == rank - 1
                flat = flat or (whole and not pooled)
            elif isinstance(layer, _LINEAR):
                features = layer.weight.shape[-1]
                sure = _is_sequential(module) or not channels or features % channels == 0
                if flat and sure and features != channels:
                    yield path, channels
                channels, flat, pooled = 0, False, False
            elif isinstance(layer, _CONVOLUTIONS):
                channels, rank, flat, pooled = layer.out_channels, layer.weight.dim(), False, False
            elif isinstance(layer, _NORMS):
                if flat:
                    yield path, channels
                elif isinstance(layer, _IMAGE_NORMS):
                    channels = layer.num_features
            elif _is_pooled(layer):
                pooled = True
            elif not isinstance(layer, (*_ELEMENTWISE, *_BY_CHANNEL)):
                channels, rank, pooled = 0, 4, False


def _is_pooled(layer: nn.Module) -> bool:
    """Tells whether the layer leaves one value for each channel.

    Torch's order and any other are then the same.
    """
    return getattr(layer, "output_size", None) in (1, (1,), (1, 1), (1, 1, 1))


def _modules(module: nn.Module, path: str, outermost: bool = True) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yields all modules by their paths, and whether they are no Sequential in another module."""
    if isinstance(module, Ensemble):
        module = module._network
    yield path, module, outermost or not _is_sequential(module)
    for inner, layer in _children(module, path):
        yield from _modules(layer, inner, outermost=False)


def _in_order(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for inner, layer in _children(module, path):
        if _is_sequential(layer):
            yield from _in_order(layer, inner)
        else:
            yield inner, layer


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    return ((_joined(path, name), child) for name, child in module._modules.items() if child is not None)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(probly.BatchEnsembleConv, probly.BatchEnsembleConvTranspose),
)
_LINEAR = (nn.Linear, probly.BatchEnsembleLinear)
_NORMS = tuple(each for row in KINDS.rows if row.kind and row.kind.endswith("Norm") for each in row.types)
_IMAGE_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_ACTIVATIONS = tuple(
    {t for row in KINDS.rows for t in row.types if t.__module__ == nn.ReLU.__module__} - {nn.MultiheadAttention, nn.GLU}
)
_ELEMENTWISE = (*_ACTIVATIONS, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_BY_CHANNEL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.LocalResponseNorm, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d),
)
