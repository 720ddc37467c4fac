"""From a torch module to the source of its twin: each module class becomes a class, each call an expression."""

from __future__ import annotations

import ast
import inspect
import json
import keyword
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from probly_torch.port._helpers import HELPERS
from probly_torch.port._source import Body, Group, Instance, Make, Option, Statement, Value, _skeleton
from probly_torch.port._trace import Origin, Switch, Tracer, attribute, recorded_factories

Handler = Callable[..., Any]
# What nnx.Module has itself.
_MODULE_NAMES = {"eval", "iter_children", "iter_modules", "perturb", "set_attributes", "sow", "train"}
_IMPORTED = {"jax", "jnp", "math", "nnx", "partial"}
# Of the layers with one weight, its name in nnx.
_KNOWN: dict[type[nn.Module], dict[str, str]] = {
    nn.Embedding: {"weight": "embedding"},
    **{key: {"weight": "kernel", "bias": "bias"} for key in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{key: {"weight": "scale", "bias": "bias"} for key in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)},
}
_KEPT = 64  # elements of a constant that are written out


@dataclass(frozen=True)
class Rules:
    """How layers, functions and methods are written; `forwards` are traced in place of a layer's own forward."""

    layers: Mapping[type[nn.Module], Handler]
    functions: Mapping[Any, Handler]
    methods: Mapping[str, Handler]
    forwards: Mapping[type[nn.Module], Callable[..., Any]]


class _Text(Value):
    """Source that is taken as it is."""


class UnknownError(ValueError):
    """An operation that no rule covers."""


@dataclass
class Scope:
    """The method that is being written, and the call in it that is being translated."""

    translator: Translator
    body: Body = field(default_factory=Body)
    attributes: dict[str, Make] = field(default_factory=dict)  # that torch's module has not
    example: Any = None
    origin: Origin = field(default_factory=lambda: Origin("unknown place", -1))

    def value(self, text: str, last: bool = False, primary: bool = True, example: Any = None) -> Value:
        """Makes an expression for the result of the call.

        Arrays of two axes or fewer have one layout.
        """
        example = self.example if example is None else example
        return Value(text, example, last and getattr(example, "ndim", 0) > 2, primary)

    def several(self, text: str, layouts: Any, examples: Any = None, names: Any = None) -> Any:
        """Assigns an expression for a tuple, perhaps of tuples, to names.

        `layouts` says which are channels last.
        """
        examples = self.example if examples is None else examples
        targets: list[int] = []

        def leaf(last: Any, example: Any) -> Any:
            if isinstance(last, tuple):
                return tuple(leaf(each, of) for each, of in zip(last, example, strict=True))
            targets.append(self.body.token())
            return self.value(f"«{targets[-1]}»", last, example=example)

        def pattern(tree: Any) -> str:
            return ", ".join(f"({pattern(each)})" if isinstance(each, tuple) else each.text for each in tree)

        values = tuple(leaf(last, example) for last, example in zip(layouts, examples, strict=True))
        names = self.origin.names if names is None else names
        names = names if len(names) == len(targets) else (None,) * len(targets)
        comma = "," if len(values) == 1 else ""
        self.body.statements.append(Statement(tuple(targets), pattern(values) + comma, text, True, None, names))
        return values

    def named(self, value: Value) -> Value:
        """Puts the value under a name, so that it may be used several times."""
        return self.body.assign(value, None, None)

    def helper(self, name: str) -> str:
        """Adds a function or class that the source brings along."""
        return self.translator.helper(name)

    def layer(self, name: str, constructor: Make) -> str:
        """Adds a layer of our own in place of a function that has state in nnx."""
        names = (name, *(f"{name}{i}" for i in range(2, 1000)))
        free = next(n for n in names if n not in self.attributes and n not in self.translator.taken[-1])
        self.attributes[free] = constructor
        return f"self.{free}"

    def align(self, *values: Any) -> tuple[list[Any], bool]:
        """Brings operands into one layout, such that they broadcast as torch's do.

        Returns them, and whether the layout is channels last.
        """
        rank = max((v.example.ndim for v in values if _is_array(v)), default=0)
        last = any(v.last and v.example.ndim == rank for v in values if _is_array(v))
        return [self._aligned(v, rank, last) if _is_array(v) else v for v in values], last

    def _aligned(self, value: Value, rank: int, last: bool) -> Value:
        own = value.example.ndim
        if own == rank:
            return value.to(last)
        value = value.to(False)
        if not last or own == 0 or value.example.numel() == 1:
            return value
        text = value.atom if own == rank - 1 else f"{value.atom}[{', '.join(['None'] * (rank - 1 - own))}]"
        axes = ", ".join(map(str, (*range(1, rank - 1), 0)))
        return replace(value, text=f"{text}.transpose({axes})" if rank > 2 else text, primary=True)

    def without(self, x: Value, axes: set[int]) -> tuple[Value, bool]:
        """Returns the array in a layout from which torch's axes can go, and whether the rest is channels last."""
        rest = [axis for axis in x.order if axis not in axes]
        if rest == sorted(rest):
            return x, False
        if len(rest) > 2 and rest == [min(rest), *sorted(rest)[2:], sorted(rest)[1]]:
            return x, True
        return x.to(False), False

    def src_tree(self, item: Any, bracketed: bool = False) -> str:
        """Writes the source of arguments or results, each in the layout that it has."""
        if isinstance(item, Value):
            return item.text
        if isinstance(item, tuple | list | dict):
            text = self.src(fx.node.map_aggregate(item, lambda a: _Text(a.text, None) if isinstance(a, Value) else a))
            return text if bracketed or not isinstance(item, tuple) or len(item) < 2 else text[1:-1]
        return self.src(item)

    def src(self, item: Any) -> str:
        """Writes the source of an argument: values in torch's layout, the rest as literals."""
        if isinstance(item, Value):
            return item.to(False).text if _is_array(item) else item.text
        if isinstance(item, torch.dtype):
            return dtype_source(item)
        if isinstance(item, tuple | list):
            inner = ", ".join(map(self.src, item)) + ("," if isinstance(item, tuple) and len(item) == 1 else "")
            return f"({inner})" if isinstance(item, tuple) else f"[{inner}]"
        if isinstance(item, dict):
            return "{" + ", ".join(f"{_quoted(key)}: {self.src(each)}" for key, each in item.items()) + "}"
        if isinstance(item, str):
            return _quoted(item)
        if isinstance(item, float) and not np.isfinite(item):
            return "jnp.nan" if np.isnan(item) else "jnp.inf" if item > 0 else "-jnp.inf"
        if item is None or isinstance(item, bool | int | float):
            return repr(item)
        raise UnknownError(f"an argument of type {type(item).__name__}")


@dataclass
class Translator:
    """One network on its way; groups become the classes of the source."""

    rules: Rules
    groups: dict[Any, Group] = field(default_factory=dict)
    helpers: dict[str, str] = field(default_factory=dict)
    made: dict[int, Make | Instance] = field(default_factory=dict)  # by module
    functions: dict[int, str] = field(default_factory=dict)  # callables for modules without weights, by module
    names: Counter[str] = field(default_factory=lambda: Counter(HELPERS.keys()))  # of classes, and how often
    taken: list[set[str]] = field(default_factory=lambda: [set()])  # attribute names of the modules on the way
    path: list[str] = field(default_factory=list)
    calls: list[tuple[nn.Module, Any, Any, Any]] = field(default_factory=list)  # modules, inputs, outputs; inner first
    preambles: dict[str, None] = field(default_factory=dict)
    stacked: list[nn.Module] = field(default_factory=list)  # whose layers are items of a list in the source

    # -- calls

    def call(self, scope: Scope, module: nn.Module, access: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes the expression for a call of a module, which is bound to `access` in the source."""
        if parametrize.is_parametrized(module):
            raise UnknownError(
                "parametrized; torch.nn.utils.parametrize.remove_parametrizations leaves the weight that it makes"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnknownError("with hooks that may change what it computes; remove them")
        rule = of_type(self.rules.layers, module)
        if rule is not None:
            if not args and len(kwargs) == 1:  # layer(input=x)
                args, kwargs = tuple(kwargs.values()), {}
            _check_arguments(rule, scope, module, access, *args, **kwargs)
            return rule(scope, module, access, *args, **kwargs)
        if type(module).forward is nn.Sequential.forward and all(name.isdigit() for name in module._modules):
            return self._sequential(scope, module, access, *args)
        if not _written(module):
            raise UnknownError("no rule")
        try:
            return self._call_class(scope, module, access, args, kwargs)
        except ValueError:
            if type(module).__module__.startswith("torch.nn."):
                raise UnknownError("no rule") from None  # for the layer, not for what torch does inside
            raise

    def _call_class(
        self, scope: Scope, module: nn.Module, access: str, args: Any, kwargs: Any, base: str = "nnx.Module"
    ) -> Any:
        result, given = self.translate(module, args, kwargs, base)
        self.calls.append((module, args, kwargs, result))
        return self._returned(scope, f"{access}({', '.join(given)})", result)

    def _returned(self, scope: Scope, call: str, result: Any) -> Any:
        if isinstance(result, Value):
            return scope.value(call, result.last, example=result.example)
        if isinstance(result, tuple) and all(isinstance(r, Value) for r in result):
            return scope.several(call, tuple(r.last for r in result), tuple(r.example for r in result))
        named = scope.named(Value(call, None))

        def items(tree: Any, text: str) -> Any:
            if isinstance(tree, Value):
                return replace(tree, text=text, primary=True)
            if isinstance(tree, tuple | list):
                return type(tree)(items(each, f"{text}[{i}]") for i, each in enumerate(tree))
            if isinstance(tree, dict):
                return {key: items(each, f"{text}[{_quoted(key)}]") for key, each in tree.items()}
            return tree

        return items(result, named.text)

    def _sequential(self, scope: Scope, module: nn.Module, access: str, x: Value) -> Value:
        """Makes an nnx.Sequential, if each item is a layer or a function.

        Else it makes a class of nnx.Sequential that says what comes between.
        """
        items: list[Any] = []
        value = replace(x, text="x", primary=True, example=_copied(x.example))
        for name, child in module._modules.items():
            assert child is not None
            probe = Scope(self, origin=scope.origin)
            with torch.no_grad(), self._inside(name):
                probe.example = child(_copied(value.example))
                result = self.call(probe, child, "LAYER", (value,), {})
            plain = isinstance(result, Value) and not probe.body.statements and not probe.attributes
            if plain and result.text == "LAYER(x)":
                items.append(self.made[id(child)])
            elif plain and "LAYER" not in result.text:
                items.append(_callable(result.text))
                self.functions[id(child)] = items[-1]
            else:
                return self._call_class(scope, module, access, (x,), {}, "nnx.Sequential")
            value = replace(result, text="x", primary=True)
        self.made[id(module)] = Make("nnx.Sequential(", tuple(items))
        self.calls.append((module, (x,), {}, value))
        return scope.value(f"{access}({x})", value.last, example=value.example)

    # -- classes

    def translate(self, module: nn.Module, args: Any, kwargs: Any, base: str = "nnx.Module") -> tuple[Any, list[str]]:
        """Writes a module's class; returns what it returns, and the source of what it is given."""
        scope = Scope(self)
        forward = of_type(self.rules.forwards, module) or type(module).forward
        placed_args, placed_kwargs, given = _placed(scope, forward, args, kwargs)
        tracer = Tracer(forward, placed_args, placed_kwargs)
        self.taken.append({*module._modules, *module._parameters, *module._buffers})
        training = Switch(0)
        try:
            module.__dict__["training"] = training
            with recorded_factories(tracer):
                graph = self._traced(tracer, module)
            module.__dict__["training"] = False
            result = self._nodes(scope, graph, module)
        finally:
            module.__dict__["training"] = False
            self.taken.pop()
        if training.asked:
            warnings.warn(
                f"the forward of {self.where(module)} asks for self.training; its twin does what it does in eval mode",
                stacklevel=2,
            )
        returned = scope.src_tree(result)
        taken = {*HELPERS, *self.names}
        lines = _looped(scope.body.lines(returned, scope.origin.execution, taken))
        signature = f"def __call__({', '.join(['self', *scope.body.arguments])}):"
        self._define(module, base, (signature, *lines), scope.attributes)
        return result, given

    def _traced(self, tracer: Tracer, module: nn.Module) -> fx.Graph:
        try:
            return tracer.trace(module)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"to_flax_source expects a forward that torch.fx can trace; got {type(error).__name__}: {reason}, in "
                f"{self.where(module)}, after {tracer.origin.place}. Register a rule for it: "
                f'register_rule({type(module).__name__})(lambda layer: "MyLayer(rngs=rngs)").'
            ) from error

    def where(self, module: nn.Module) -> str:
        """Returns the module's path, for messages."""
        path = ".".join(self.path)
        return f"{path} ({type(module).__name__})" if path else f"the network ({type(module).__name__})"

    def root(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[str, Any]:
        """Writes the class of a whole network; returns its name, and what it returns."""
        scope = Scope(self)
        with torch.no_grad():
            copies = fx.node.map_aggregate((args, kwargs), lambda v: _copied(v.example) if isinstance(v, Value) else v)
            try:
                scope.example = module(*copies[0], **copies[1])
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"to_flax_source expects example_input that the network takes; got {type(error).__name__}: "
                    f"{reason}. Pass what it is called with: to_flax_source(network, (x, mask)), or a dict by name."
                ) from error
        try:
            result = self.call(scope, module, "self", args, kwargs)
        except _PlacedError:
            raise
        except UnknownError as error:
            raise _layer_error(module, error, "by itself") from None
        made = self.made.get(id(module))
        if isinstance(made, Instance):
            made.attributes += self._ties(module)
            return made.group.name, result
        if made is None or (isinstance(result, Value) and not re.fullmatch(r"self\(\w*\)", result.text)):
            return self.root(nn.Sequential(module), args, kwargs)
        group = Group(self._unique("Network"), made.head[:-1], (), f"The twin of {_class_name(module)} in PyTorch.")
        group.instances.append(Instance(group, (("", replace(made, head="super().__init__(")), *self._ties(module))))
        self.groups["root"] = group
        return group.name, result

    def _ties(self, root: nn.Module) -> tuple[tuple[str, str], ...]:
        """Lists assignments that make one of two weights, where torch has one in two layers."""
        owners: dict[int, tuple[str, nn.Module, str]] = {}
        lines = []
        for path, module in root.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                first_path, first, first_name = owners.setdefault(id(parameter), (path, module, name))
                if first is module:
                    continue
                ours, theirs = _KNOWN.get(type(first)), _KNOWN.get(type(module))
                here, there = (f"{p}.{n}".lstrip(".") for p, n in ((path, name), (first_path, first_name)))
                if ours is None or ours != theirs or name != first_name or name not in ours:
                    warnings.warn(
                        f"{here} and {there} are one weight in the network, and two in its twin, where their layouts "
                        f"differ: both are loaded, and training moves them apart",
                        stacklevel=5,
                    )
                    continue
                target, source = (f"{access(root, p)}.{ours[name]}" for p in (path, first_path))
                lines.append((target.removeprefix("self."), source))
        return tuple(lines)

    def _nodes(self, scope: Scope, graph: fx.Graph, root: nn.Module) -> Any:
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            scope.origin, scope.example = node.meta.get("origin", scope.origin), node.meta.get("value")
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            try:
                if node.op == "output":
                    _check_there(args)
                    return args[0]
                result = self._node(scope, node, root, args, kwargs)
            except UnknownError as error:
                raise self._unknown(node, root, error) from None
            if isinstance(result, Value) and node.op != "placeholder":
                result = scope.body.assign(result, _execution(node), _name(node))
            values[node] = result
            for changed in node.meta.get("changed", ()):
                self._change(values, changed, node, result)
        raise AssertionError("a graph ends with its output")

    def _change(self, values: dict[fx.Node, Any], changed: fx.Node, node: fx.Node, result: Any) -> None:
        """Gives the result to later uses of what a call changed in place.

        Other views of it are refused.
        """
        new, memory = node.meta["value"], changed.meta["value"].untyped_storage().data_ptr()
        for other in values:
            if memory not in [t.untyped_storage().data_ptr() for t in _tensors(other.meta["value"])]:
                continue
            value = other.meta["value"]
            same = isinstance(value, Tensor) and isinstance(new, Tensor) and value.data_ptr() == new.data_ptr()
            same = same and (value.shape, value.stride()) == (new.shape, new.stride()) and other.op != "get_attr"
            place = node.meta["origin"].place
            values[other] = result if same else Missing(f"a use of what the call at {place} has changed in place")

    def _node(self, scope: Scope, node: fx.Node, root: nn.Module, args: Any, kwargs: Any) -> Any:
        if node.target is not operator.getitem:  # which may take something else from where it is
            _check_there((args, kwargs))
        if node.op == "placeholder":
            return node.meta["bound"]
        if node.op == "get_attr":
            return self._attribute(scope, root, str(node.target))
        if node.op == "call_module":
            with self._inside(str(node.target)):
                return self.call(
                    scope, root.get_submodule(str(node.target)), access(root, str(node.target)), args, kwargs
                )
        if node.op == "call_method":
            rule = self.rules.methods.get(str(node.target))
        else:
            rule = self.rules.functions.get(node.target)
        if rule is None:
            raise UnknownError("no rule")
        if kwargs.get("out", 0) is None:
            kwargs = {name: each for name, each in kwargs.items() if name != "out"}
        _check_arguments(rule, scope, *args, **kwargs)
        return rule(scope, *args, **kwargs)

    def _unknown(self, node: fx.Node, root: nn.Module, error: UnknownError) -> ValueError:
        if isinstance(error, _PlacedError):
            return error
        place = f"in {self.where(root)}, at {node.meta['origin'].place if 'origin' in node.meta else 'its return'}"
        target: Any = node.target
        if node.op == "call_module":
            return _layer_error(root.get_submodule(str(target)), error, place)
        if node.op == "output":
            what, key, rule = "an output", "...", "..."
        elif node.op == "call_method":
            what, key, rule = f"the method Tensor.{node.target}", repr(node.target), 'lambda x: f"my_function({x})"'
        else:
            key = _public_name(target)
            what, rule = f"the function {key}", 'lambda x: f"my_function({x})"'
        return _unwritten(what, error, place, key, rule)

    def _define(self, module: nn.Module, base: str, call: tuple[str, ...], own: Mapping[str, Make]) -> None:
        attributes = (*self._attributes(module), *own.items())
        name = _class_name(module)
        if base == "nnx.Sequential":
            name = next((p for p in reversed(".".join(self.path).split(".")) if p.isidentifier()), "Network").title()
        key = (
            type(module),
            base,
            call,
            tuple((n, item if isinstance(item, str) else _skeleton(item)) for n, item in attributes),
        )
        if key not in self.groups:
            self.groups[key] = Group(self._unique(name), base, call, f"The twin of {_class_name(module)} in PyTorch.")
        group = self.groups[key]
        old = self.made.get(id(module))
        if isinstance(old, Instance):
            if old.group is not group:
                raise UnknownError(f"{type(module).__name__} is called in two ways that need different code")
            return
        instance = Instance(group, attributes)
        group.instances.append(instance)
        self.made[id(module)] = instance

    def _unique(self, name: str) -> str:
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}{self.names[name]}"

    def _attributes(self, module: nn.Module) -> list[tuple[str, Make | Instance | str]]:
        found: dict[int, str] = {}
        attributes: list[tuple[str, Make | Instance | str]] = []
        if type(module).forward is nn.Sequential.forward and all(n.isdigit() for n in module._modules):
            items = tuple(self.constructor(child) for child in module._modules.values())
            return [("", Make("super().__init__(", items))]
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                attributes.append((_checked(name), self._variable(module, name, tensor)))
        for name, child in module._modules.items():
            if child is None:
                continue
            if id(child) in found:
                attributes.append((_checked(name), f"self.{found[id(child)]}"))
                continue
            constructor = self.constructor(child)
            if not isinstance(constructor, str):
                attributes.append((_checked(name), constructor))
                found[id(child)] = name
        return attributes

    def _variable(self, module: nn.Module, name: str, tensor: Tensor) -> Make:
        shape, dtype = repr(tuple(tensor.shape)), dtype_source(tensor.dtype)
        trained = name in module._parameters
        values = constant(tensor, explicit=True)
        if not trained:
            self.helper("Buffer")
            return Make("Buffer(", (Option("value", values or f"jnp.zeros({shape}, dtype={dtype})", True),))
        if values and values.startswith(("jnp.zeros", "jnp.ones", "jnp.full")):
            return Make("nnx.Param(", (Option("value", values, True),))
        normal = Make("nnx.initializers.normal(0.02)(", ("rngs.params()", Option("shape", shape, True), dtype))
        return Make("nnx.Param(", (normal,))

    def helper(self, name: str) -> str:
        """Adds a function or class that the source brings along."""
        self.helpers[name] = HELPERS[name].strip()
        return name

    def constructor(self, module: nn.Module | None) -> Make | Instance | str:
        """Returns what builds a module, or the text of a function for one without weights."""
        if module is None:
            return "None"
        if id(module) in self.made:
            return self.made[id(module)]
        if id(module) in self.functions:
            return self.functions[id(module)]
        children = module._modules
        if isinstance(module, nn.ModuleList):
            items = tuple(self.constructor(child) for child in children.values())
            made: Any = Make("nnx.List(", (Make("[", items, "]"),))
        elif isinstance(module, nn.ModuleDict) and not _written(module):
            pairs = tuple(
                Make(f"{_quoted(name)}: ", (self.constructor(child),), "") for name, child in children.items()
            )
            made = Make("nnx.Dict(", (Make("{", pairs, "}"),))
        elif isinstance(module, nn.ParameterList):
            names = [str(i) for i in range(len(module))]
            made = Make("nnx.List(", (Make("[", tuple(self._variable(module, n, module[int(n)]) for n in names), "]"),))
        elif type(module).forward is nn.Sequential.forward and all(name.isdigit() for name in children):
            made = Make("nnx.Sequential(", tuple(self.constructor(child) for child in children.values()))
        elif of_type(self.rules.layers, module) is not None:
            if not list(module.state_dict()):
                return "nnx.identity"
            made = self._uncalled(module)
        elif not list(module.parameters()) and not list(module.buffers()):
            return "nnx.identity"
        else:
            self._define(module, "nnx.Module", (), {})
            return self.made[id(module)]
        self.made[id(module)] = made
        return made

    def _uncalled(self, module: nn.Module) -> Make | Instance | str:
        """Makes a layer that the forward does not call: its weights are used by themselves, or not at all."""
        rule = of_type(self.rules.layers, module)
        assert rule is not None
        rule(Scope(self), module, "LAYER", None)
        return self.made[id(module)]

    def _attribute(self, scope: Scope, root: nn.Module, path: str) -> Any:
        tensor = attribute(root, path)
        owner_path, _, name = path.rpartition(".")
        owner = root.get_submodule(owner_path)
        if not isinstance(tensor, Tensor):
            raise UnknownError(f"the attribute {path!r} of type {type(tensor).__name__}")
        stored = name in owner._parameters or (name in owner._buffers and name not in owner._non_persistent_buffers_set)
        if not stored:
            text = constant(tensor)
            if text is None:
                raise UnknownError(
                    f"{path!r}, {tensor.numel()} numbers that no file of weights holds; keep them by "
                    f"register_buffer({name!r}, ...)"
                )
            return scope.value(text)
        place = access(root, owner_path) if owner_path else "self"
        if isinstance(owner, nn.ParameterList):
            return scope.value(f"{place}[{name}][...]")
        if of_type(self.rules.layers, owner) is None:
            return scope.value(f"{place}.{name}[...]")
        if name not in _KNOWN.get(type(owner), {}) or "Conv" in type(owner).__name__:
            raise UnknownError(f"the {name} of a layer {type(owner).__name__} by itself")
        transposed = ".T" if isinstance(owner, nn.Linear) and name == "weight" else ""
        return scope.value(f"{place}.{_KNOWN[type(owner)][name]}[...]{transposed}")

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        self.path.append(name)
        yield
        self.path.pop()


@dataclass(frozen=True)
class Missing:
    """In place of a result that the source does not have; any use of it is an error, for this reason."""

    reason: str


class _PlacedError(UnknownError):
    """One that says where."""


def _layer_error(module: nn.Module, error: UnknownError, place: str) -> ValueError:
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}".split(".")
    key = f"torch.nn.{kind.__name__}" if name[:2] == ["torch", "nn"] else ".".join(name)
    return _unwritten(f"the layer {kind.__name__}", error, place, key, 'lambda layer: "MyLayer(rngs=rngs)"')


def _unwritten(what: str, error: UnknownError, place: str, key: str, rule: str) -> _PlacedError:
    reason = "" if str(error) == "no rule" else f" ({error})"
    return _PlacedError(
        f"to_flax_source expects operations that it has rules for; got {what}{reason}, {place}. "
        f"Register a rule for it: register_rule({key})({rule})."
    )


def _public_name(function: Any) -> str:
    name = str(getattr(function, "__name__", function))
    for module in (torch, torch.nn.functional, torch.special, torch.linalg, torch.fft):
        for each in (name, name.partition("_")[2]):
            if getattr(module, each, None) is function:
                return f"{module.__name__}.{each}"
    return f"{getattr(function, '__module__', None) or ''}.{name}".lstrip(".")


def _check_arguments(rule: Handler, *args: Any, **kwargs: Any) -> None:
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError as error:
        raise UnknownError(f"called with arguments that its rule has not: {error}") from None


def _check_there(tree: Any) -> None:
    missing: list[Missing] = []
    fx.node.map_aggregate(tree, lambda a: missing.append(a) if isinstance(a, Missing) else None)
    if missing:
        raise UnknownError(missing[0].reason)


def access(root: nn.Module, path: str) -> str:
    """Returns how the source reaches a submodule."""
    text, module = "self", root
    for name in path.split("."):
        if isinstance(module, nn.ModuleList | nn.ParameterList):
            text += f"[{name}]"
        elif isinstance(module, nn.ModuleDict) and not _written(module):
            text += f"[{_quoted(name)}]"
        elif name.isdigit():
            text += f".layers[{name}]"
        else:
            text += f".{name}"
        module = module._modules[name]  # type: ignore[assignment]
    return text


def of_type(table: Mapping[type[nn.Module], Any], module: nn.Module) -> Any:
    """Returns the entry of a module's type, or of one that it is derived from without a forward of its own."""
    layer_type: Any
    for layer_type in type(module).__mro__:
        if layer_type in table and layer_type.forward is type(module).forward:
            return table[layer_type]
    return None


def constant(tensor: Tensor, explicit: bool = False) -> str | None:
    """Writes the source of a tensor that a short expression makes."""
    shape, dtype = tuple(tensor.shape), dtype_source(tensor.dtype)
    array = tensor.detach().cpu()
    kind = "" if tensor.dtype == torch.float32 and not explicit else f", dtype={dtype}"
    if array.numel() == 0:
        return f"jnp.zeros({shape}{kind})"
    first = array.reshape(-1)[0]
    if array.ndim and (array == first).all():
        number = first.item()
        if number in (0, 1):
            return f"jnp.{'ones' if number else 'zeros'}({shape}{kind})"
        return f"jnp.full({shape}, {number!r}{kind})"
    if not array.dtype.is_floating_point and array.ndim and array.dtype != torch.bool:
        step = torch.arange(array.shape[-1]).expand(shape)
        if torch.equal(array.long(), step):
            text = f"jnp.arange({shape[-1]}{kind})".replace(", dtype=int)", ")")
            return text if array.ndim == 1 else f"jnp.broadcast_to({text}, {shape})"
    if array.ndim > 1 and shape[-1] == shape[-2] and array.dtype != torch.bfloat16:
        for name, triangle in (("tril", torch.tril), ("triu", torch.triu)):
            if torch.equal(array, triangle(torch.ones_like(array))):
                return f"jnp.{name}(jnp.ones({shape}{kind}))"
    if array.numel() > _KEPT:
        return None
    return f"jnp.array({array.tolist()!r}, dtype={dtype})".replace("inf", "jnp.inf").replace("nan", "jnp.nan")


def dtype_source(dtype: torch.dtype) -> str:
    """Writes the source of a dtype in JAX.

    The integers of torch are those that JAX makes, of 32 or 64 bits.
    """
    return {torch.bool: "bool", torch.int64: "int"}.get(dtype, f"jnp.{str(dtype).removeprefix('torch.')}")


def _quoted(text: str) -> str:
    return json.dumps(text)


def _is_array(item: Any) -> bool:
    return isinstance(item, Value) and isinstance(item.example, Tensor)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, tuple | list):
        return [tensor for each in tree for tensor in _tensors(each)]
    return [tree] if isinstance(tree, Tensor) else []


def _copied(example: Any) -> Any:
    return example.clone() if isinstance(example, Tensor) else example


def _execution(node: fx.Node) -> Any:
    origin = node.meta.get("origin")
    return None if origin is None or origin.execution < 0 else origin.execution


def _name(node: fx.Node) -> str | None:
    names, index = node.meta["origin"].names, node.args[1] if len(node.args) > 1 else None
    if node.target is operator.getitem and isinstance(index, int) and len(names) > 1:
        return names[index] if -len(names) <= index < len(names) else None
    name: str | None = node.meta["origin"].name
    return name


def _written(module: nn.Module) -> bool:
    """Tells whether the module's class has a forward of its own."""
    return type(module).forward is not nn.Module.forward


def _class_name(module: nn.Module) -> str:
    name = re.sub(r"\W", "_", type(module).__name__)
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"_{name}"


def _checked(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name) or name in _MODULE_NAMES:
        raise UnknownError(f"an attribute named {name[:80]!r}, which a module in nnx cannot have")
    return name


def _callable(text: str) -> str:
    """Writes a function of x that gives this expression."""
    tree = ast.parse(text, mode="eval").body
    if text == "x":
        return "nnx.identity"
    if isinstance(tree, ast.Call) and tree.args and ast.unparse(tree.args[0]) == "x" and len(tree.args) == 1:
        function = ast.get_source_segment(text, tree.func)
        rest = [ast.get_source_segment(text, k) or "" for k in tree.keywords]
        if re.fullmatch(r"[a-z][\w.]*", function or "") and not re.search(r"\bx\b", " ".join([function or "", *rest])):
            return f"partial({', '.join([function or '', *rest])})" if rest else str(function)
    return f"lambda x: {text}"


def _placed(scope: Scope, forward: Any, args: Any, kwargs: Any) -> tuple[Any, Any, list[str]]:
    """Returns the arguments as the class's own method has them, and the source of those that are passed."""
    own = [
        p
        for p in inspect.signature(forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    rest = next((p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.VAR_POSITIONAL), "args")
    names = [p.name for p in own][1:]
    names += [f"{rest}{i}" for i in range(len(args) - len(names))]
    given: list[str] = []

    def place(name: str, item: Any, by_name: bool) -> Any:
        found: list[Any] = []
        fx.node.map_aggregate(item, lambda a: found.append(a) if isinstance(a, Value) else None)
        if not found:
            return item
        name = f"{name}_" if name in _IMPORTED else name
        given.append((f"{name}=" if by_name else "") + scope.src_tree(item, bracketed=True))
        return _rebound(item, scope.body.argument(name, len(item) if isinstance(item, list | tuple) else 0))

    placed = tuple(place(name, item, False) for name, item in zip(names, args, strict=False))
    return placed, {name: place(name, item, True) for name, item in kwargs.items()}, given


def _rebound(item: Any, text: str) -> Any:
    if isinstance(item, Value):
        return replace(item, text=text, primary=True, example=_copied(item.example))
    if isinstance(item, tuple | list):
        return type(item)(_rebound(each, f"{text}[{i}]") for i, each in enumerate(item))
    if isinstance(item, dict):
        return {key: _rebound(each, f"{text}[{_quoted(key)}]") for key, each in item.items()}
    return item


def _looped(lines: list[str]) -> list[str]:
    """Writes calls of all items of a list, each with the result of the one before, as a loop."""
    result: list[str] = []
    i = 0
    while i < len(lines):
        match = re.fullmatch(r"(\w+) = (self[\w.]*)\[0\]\(\1(, .*)?\)", lines[i])
        n = 1
        if match:
            name, items, rest = match[1], match[2], match[3] or ""
            while i + n < len(lines) and lines[i + n] == f"{name} = {items}[{n}]({name}{rest})":
                n += 1
        if match and n > 1:
            item = "layer" if not re.search(r"\blayer\b", " ".join(lines)) else "item"
            result += [f"for {item} in {items}:", f"    {name} = {item}({name}{rest})"]
        else:
            result.append(lines[i])
        i += n if match and n > 1 else 1
    return result
