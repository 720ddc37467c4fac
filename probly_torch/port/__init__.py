"""Whole networks from torch to Flax NNX by machine: as source code, or as a live module with the weights."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, fx, nn

from probly_torch.port._functions import functions, methods
from probly_torch.port._layers import FORWARDS, LAYERS, called
from probly_torch.port._proof import Twin, load, prove
from probly_torch.port._source import Make, Value
from probly_torch.port._translate import Rules, Scope, Translator, UnknownError, _class_name

if TYPE_CHECKING:
    from flax import nnx

__all__ = ["port", "register_rule", "to_flax_source"]

Rule = TypeVar("Rule", bound=Callable[..., str])
_REGISTERED = Rules({}, {}, {}, {})


def to_flax_source(network: nn.Module, example_input: Any) -> str:
    """Writes the source code of a network in Flax NNX, which needs jax and flax only.

    Each module class becomes a class of the same name with the same attributes, torch's containers become nnx's, and
    every option in which the frameworks differ is written out. Instances of a class that differ in numbers give it
    arguments; where their code differs, the classes are numbered.

    Images are channels last in the twin: it takes an input of 4 or 5 axes (of floating point) as (N, H, W, C) or
    (N, D, H, W, C), and returns outputs of 3 axes and more so where they come from layers that do; everything else has
    torch's axes. Where torch flattens an image, the twin transposes it first, so that weights keep their order.

    The network is traced by torch.fx on the example, in eval mode: branches are taken as the example takes them, sizes
    stay those of the input. `train()` and `eval()` of the twin switch dropout and batch normalisation; nnx keeps the
    biased variance of a batch where torch keeps the unbiased one.

    Args:
        network: a module; it is not changed.
        example_input: a tensor, a tuple of the forward's arguments, or a dict of its arguments by name.
    Returns:
        A Python module, formatted; its last class is the network's. `load_weights` of probly_flax fills it.
    Raises:
        ValueError: if the forward cannot be traced, or an operation has no rule; it names the operation and its place.
        TypeError: if network is not a module.
    Example:
        >>> import torch
        >>> print(to_flax_source(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(1, 3)))
        \"\"\"Sequential in Flax NNX, written from PyTorch.\"\"\"
        <BLANKLINE>
        from flax import nnx
        <BLANKLINE>
        <BLANKLINE>
        class Network(nnx.Sequential):
            \"\"\"The twin of Sequential in PyTorch.\"\"\"
        <BLANKLINE>
            def __init__(self, *, rngs: nnx.Rngs):
                super().__init__(nnx.Linear(3, 2, rngs=rngs), nnx.relu)
        <BLANKLINE>
    """
    return _twin("to_flax_source", network, example_input).source


def port(network: nn.Module, example_input: Any) -> nnx.Module:
    """Makes the live twin of a network in Flax NNX, with its weights, and proves that it computes the same.

    The twin is in eval mode. Both run in float64 on the example, and must agree to 1e-12 of each output's scale; the
    twin must also take one row more than the example has. It is what the code of `to_flax_source` builds, and takes the
    same inputs.

    Args:
        network: a module; it is not changed.
        example_input: a tensor, a tuple of the forward's arguments, or a dict of its arguments by name.
    Returns:
        An nnx.Module with copies of the weights, in their dtypes.
    Raises:
        ValueError: as `to_flax_source`, and if the outputs differ; it names the first layer that does.
        TypeError: if network is not a module.
    Example:
        >>> import jax.numpy as jnp
        >>> import torch
        >>> twin = port(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), torch.ones(1, 3, 8, 8))
        >>> twin(jnp.ones((1, 8, 8, 3))).shape
        (1, 6, 6, 5)
    """
    twin = _twin("port", network, example_input)
    prove(network, twin)
    return load(network, twin)


def register_rule(
    target: type[nn.Module] | Callable[..., Any] | str, *, channels_last: bool = False, preamble: str = ""
) -> Callable[[Rule], Rule]:
    """Registers how a layer, a function or a method is written in Flax NNX, in place of what is built in.

    A rule returns source code. That of a layer takes the layer and returns a call that builds its twin; the twin is
    called as the layer is. That of a function or method takes the source of its arguments and returns an expression.

    Args:
        target: a module class, a function that torch.fx records, or the name of a method of Tensor.
        channels_last: arrays of 3 axes and more are channels last, in and out; otherwise they have torch's axes.
        preamble: source to put before the classes, an import or a definition that the rule's source needs.
    Returns:
        A decorator for the rule.
    Raises:
        TypeError: if target is none of these.
    Example:
        >>> import torch
        >>> @register_rule(torch.special.entr, preamble="from jax.scipy.special import entr")
        ... def write_entr(x):
        ...     return f"entr({x})"
    """
    if isinstance(target, str):
        table: Any = _REGISTERED.methods
    elif isinstance(target, type) and issubclass(target, nn.Module):
        table = _REGISTERED.layers
    elif callable(target):
        table = _REGISTERED.functions
    else:
        raise TypeError(
            f"register_rule expects a module class, a function, or the name of a method; got {target!r:.80}. Decorate "
            f'a rule: register_rule(torch.exp)(lambda x: f"jnp.exp({{x}})").'
        )

    def register(rule: Rule) -> Rule:
        def of_layer(s: Scope, module: nn.Module, access: str, x: Value | None, *rest: Any, **options: Any) -> Any:
            s.translator.preambles[preamble] = None
            s.translator.made[id(module)] = Make(_checked(rule, rule(module)), (), "")
            if x is None:
                return None
            if rest or options:
                others = [s.src(each) for each in rest] + [f"{name}={s.src(each)}" for name, each in options.items()]
                return s.value(f"{access}({', '.join([x.to(channels_last).text, *others])})", channels_last)
            return called(s, module, access, x.to(channels_last), channels_last)

        def of_call(s: Scope, *args: Any, **options: Any) -> Value:
            s.translator.preambles[preamble] = None

            def src(item: Any) -> str:
                array = isinstance(item, Value) and isinstance(item.example, Tensor)
                return item.to(channels_last).text if array else s.src(item)

            text = _checked(rule, rule(*map(src, args), **{name: src(item) for name, item in options.items()}))
            return s.value(text, channels_last, primary=_is_primary(text))

        table[target] = of_layer if table is _REGISTERED.layers else of_call
        return rule

    return register


def _checked(rule: Callable[..., str], text: str) -> str:
    try:
        ast.parse(re.sub("[«»]", "_", text), mode="eval")
    except (SyntaxError, TypeError, ValueError):
        raise UnknownError(
            f"whose rule {getattr(rule, '__name__', 'rule')} returned no expression, {text!r:.80}"
        ) from None
    return text


def _is_primary(text: str) -> bool:
    body = ast.parse(re.sub("[«»]", "_", text), mode="eval").body
    return isinstance(body, ast.Call | ast.Name | ast.Attribute | ast.Subscript | ast.Constant)


def _twin(what: str, network: nn.Module, example_input: Any) -> Twin:
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{what} expects network to be a torch.nn.Module; got {type(network).__name__}. "
            f"Pass the network and an input: {what}(network, x)."
        )
    network = copy.deepcopy(network).eval()
    kwargs = example_input if isinstance(example_input, dict) else {}
    args = () if kwargs is example_input else example_input if isinstance(example_input, tuple) else (example_input,)
    rules = Rules(
        {**LAYERS, **_REGISTERED.layers},
        {**functions(), **_REGISTERED.functions},
        {**methods(), **_REGISTERED.methods},
        FORWARDS,
    )
    translator = Translator(rules)
    args, kwargs = fx.node.map_aggregate((args, kwargs), _as_input)
    name, result = translator.root(network, args, kwargs)
    paths = {id(module): path for path, module in network.named_modules()}
    rename = {}
    for module in translator.stacked:
        prefix = f"{paths[id(module)]}." if paths[id(module)] else ""
        rename[f"^{re.escape(prefix)}([a-z_]+)_l([0-9]+)"] = rf"{prefix}layers.\2.\1_l0"
    calls = [(paths[id(m)], *rest) for m, *rest in translator.calls if id(m) in paths]
    source = _module(translator, _class_name(network), rename)
    return Twin(what, source, name, args, kwargs, result, rename, calls)


def _as_input(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return Value("", item.detach().clone(), last=item.ndim in (4, 5) and item.is_floating_point())


def _module(translator: Translator, name: str, rename: dict[str, str]) -> str:
    groups = list(translator.groups.values())
    for group in groups:
        group.settle()
    preambles = [text.strip() for text in translator.preambles if text]
    imported = [text for text in preambles if text.startswith(("import ", "from "))]
    blocks = [text for text in preambles if text not in imported]
    blocks += [*translator.helpers.values(), *("\n".join(group.source()) for group in groups)]
    body = "\n\n\n".join(blocks) + "\n"

    notes = []
    if re.search(r"nnx\.(Conv|max_pool|avg_pool)", body):
        notes.append("Images are channels last: (N, H, W, C), where PyTorch has (N, C, H, W).")
    if "nnx.BatchNorm(" in body:
        notes.append("BatchNorm keeps the biased variance of each batch, where PyTorch keeps the unbiased one.")
    for pattern, replacement in rename.items():
        notes.append(f"Names of weights in PyTorch: {pattern!r} is {replacement!r} here.")
    title = f"{name} in Flax NNX, written from PyTorch."
    head = "\n".join([title, "", *notes]) + "\n" if notes else title

    standard = {r"\bmath\.": "import math", r"\bpartial\(": "from functools import partial"}
    third = {r"\bjax\.": "import jax", r"\bjnp\.": "import jax.numpy as jnp", r"\bnnx\.": "from flax import nnx"}
    used = [[line for pattern, line in each.items() if re.search(pattern, body)] for each in (standard, third)]
    used[1] += imported
    quote = 'r"""' if "\\" in head else '"""'
    return "\n\n".join([f'{quote}{head}"""', *("\n".join(lines) for lines in used if lines)]) + f"\n\n\n{body}"
