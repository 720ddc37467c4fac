"""What a Flax model holds, by the names and paths that it has in torch: one walk, read by all that ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from flax import nnx

from probly_flax import _layouts as layouts
from probly_flax._arguments import WORDS
from probly_flax._kinds import KINDS, options_of_function
from probly_flax._layouts import NoTwinError, Weight
from probly_flax.ensemble import Ensemble

_is_weight = nnx.filterlib.to_predicate(nnx.Not(nnx.Any(nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)))


class _Node(NamedTuple):
    """A module, a list, a dict, a variable or a function, and what it holds."""

    path: str
    value: Any
    children: tuple[_Node, ...]

    def all(self) -> Iterator[_Node]:
        """Yields itself and what it holds, outer nodes first."""
        yield self
        for child in self.children:
            yield from child.all()


class Inventory:
    """Lists what a model holds, by the names and paths that it has in torch.

    Args:
        model: any module; it is read when an attribute is asked for first.
    Raises:
        ValueError: if a module holds itself.
    Example:
        >>> inventory = Inventory(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.gelu))
        >>> list(inventory.weights("save_weights"))
        ['0.weight', '0.bias']
        >>> inventory.options
        {'0': {'kind': 'Linear', 'bias': True}, '1': {'kind': 'GELU', 'approximate': 'tanh'}}
    """

    words = WORDS

    def __init__(self, model: nnx.Module) -> None:
        self.model = model

    @cached_property
    def _root(self) -> _Node:
        return _node(self.model, "")

    @property
    def parts(self) -> list[tuple[str, Any]]:
        """Modules and functions by path, outer ones first where several have one path."""
        values = ((node.path, node.value) for node in self._root.all())
        return [each for each in values if _is_part(each[1])]

    @cached_property
    def lengths(self) -> dict[str, int]:
        """How many layers each Sequential has."""
        return {path: len(part.layers) for path, part in self.parts if isinstance(part, nnx.Sequential)}

    @cached_property
    def options(self) -> dict[str, dict[str, Any]]:
        """The options of every layer that has a kind, by its path: numbers, strings, booleans, None and lists."""
        return dict(_options(self._root))

    def weights(self, what: str) -> dict[str, Weight]:
        """Returns every weight under every name that it has in torch; that of a layer used twice has two.

        Raises:
            ValueError: naming every weight that torch has no name for, its layer and why; or two weights of one name.
        """
        reasons: dict[int, str] = {}
        weights: dict[str, Weight] = {}
        try:
            for name, weight in _weights(self._root, False, False, reasons):
                if name in weights:
                    raise ValueError(
                        f"{what} expects a name in torch for each parameter; got two parameters named {name!r}. Take "
                        f"other keys or attributes, without dots: nnx.Dict({{'a_b': layer}})."
                    )
                weights[name] = weight
        except RecursionError:
            raise ValueError(
                f"{what} expects modules that hold each other as a tree; got a {type(self.model).__name__} with one "
                f"that holds itself. Take that attribute away: del module.parent."
            ) from None
        covered = {_id(variable) for weight in weights.values() for variable in weight.variables}
        missed = _missed(self.model, covered, reasons)
        if missed:
            raise ValueError(
                f"{what} expects layers whose names and layouts in torch it knows; got parameters of others:\n"
                + "\n".join(missed)
                + "\nHold such a parameter in a module of your own: self.scale = nnx.Param(scale) is torch's "
                "self.scale."
            )
        return weights


def _node(value: Any, path: str) -> _Node:
    items: Any = ()
    if isinstance(value, (nnx.Module, dict)):
        items = (value if isinstance(value, dict) else vars(value)).items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    paths: Mapping[str, str] = {"stacked": ""} if isinstance(value, Ensemble) else KINDS.get(type(value), "paths") or {}
    inner = ((".".join(part for part in (path, str(paths.get(name, name))) if part), each) for name, each in items)
    held = (nnx.Module, nnx.Variable, dict, list, tuple)
    return _Node(path, value, tuple(_node(each, p) for p, each in inner if isinstance(each, held) or callable(each)))


def _is_part(value: Any) -> bool:
    return not isinstance(value, nnx.List) and (isinstance(value, nnx.Module) or callable(value))


def _options(node: _Node) -> Iterator[tuple[str, dict[str, Any]]]:
    options = KINDS.options(node.value) if isinstance(node.value, nnx.Module) else options_of_function(node.value)
    if options is None:
        for child in node.children:
            yield from _options(child)
    else:
        base = "base_layer" if isinstance(node.value, nnx.LoRALinear) else ""
        yield ".".join(part for part in (node.path, base) if part), options


def _weights(node: _Node, of_user: bool, stacked: bool, reasons: dict[int, str]) -> Iterator[tuple[str, Weight]]:
    """Yields what a row says of a layer's weights, then what it holds that the row does not cover."""
    layer, prefix = node.value, f"{node.path}." if node.path else ""
    try:
        own = _of_row(layer, stacked)
    except NoTwinError as error:
        reasons.update(dict.fromkeys(_ids(layer), f"{type(layer).__name__}, {error}"))
        return
    for name, weight in own.items():
        yield prefix + name, weight._replace(also=tuple(prefix + other for other in weight.also))
    covered = {_id(variable) for weight in own.values() for variable in weight.variables}
    if isinstance(layer, nnx.Module):
        package = type(layer).__module__.partition(".")[0]
        of_user = type(layer) in (nnx.List, nnx.Dict) or package not in ("flax", "probly_flax")
    stacked = stacked or isinstance(layer, Ensemble)
    for child in node.children:
        value = child.value
        if isinstance(value, nnx.Variable):
            if of_user and _id(value) not in covered and _is_weight((), value) and hasattr(value.get_value(), "shape"):
                yield child.path, layouts.as_it_is(value)
        elif not (covered and isinstance(value, nnx.Module) and _ids(value) <= covered):
            yield from _weights(child, of_user, stacked, reasons)


def _of_row(layer: Any, stacked: bool) -> layouts.Weights:
    if stacked and isinstance(layer, nnx.PReLU):  # (E,), which would be one slope for each of E channels otherwise
        return layouts.stacked_prelu(layer)
    layout = KINDS.get(type(layer), "weights")
    return layout(layer) if layout else {}


def _missed(model: nnx.Module, covered: set[int], reasons: Mapping[int, str]) -> list[str]:
    """Lists the weights that have no name in torch, each with its layer and why."""
    layers = dict(nnx.iter_modules(model))
    missed = []
    for path, variable in nnx.to_flat_state(nnx.state(model, _is_weight)):
        layer = next(layers[path[:end]] for end in reversed(range(len(path))) if path[:end] in layers)
        is_mask = path[-1:] == ("mask",) and isinstance(layer, (nnx.Conv, nnx.ConvTranspose))
        if id(variable) not in covered and not is_mask:
            reason = reasons.get(id(variable), f"{type(layer).__name__}, which has no rule")
            if isinstance(variable, nnx.Variable) and not hasattr(variable.get_value(), "shape"):
                reason = f"{type(layer).__name__}, which is no array; nnx.Param(jnp.asarray(value)) holds one"
            missed.append(f"  {'.'.join(map(str, path))} of {reason}")
    return missed


def _ids(layer: Any) -> set[int]:
    return {id(variable) for _, variable in nnx.to_flat_state(nnx.state(layer, _is_weight))}


def _id(variable: Any) -> int:
    return id(variable.get_value() if isinstance(variable, layouts.Item) else variable)
