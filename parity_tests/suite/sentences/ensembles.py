"""Networks that cannot be converted, and lists that are no members."""

import numpy as np
import torch
from flax import nnx
from torch import nn

from parity_tests.suite.sentences.frameworks import FLAX, TORCH, converted, deep, model, network
from parity_tests.suite.sentences.harness import Row

ENSEMBLE = "call ensemble(network, num_members)."


def many(f):
    return f.sequential(*(f.linear(1, 1) for _ in range(23)))


def seeded(f):
    torch.manual_seed(0)
    return f.linear(2, 2)


def evaluated(network):
    network.eval()
    return network


def never(path, layer):
    return False


NO_MEANING = "got {}, for which it has no meaning. Leave it out: ensemble(base, num_members)."
ROWS = {
    "many layers of torch": Row(
        lambda f: f.package.batchensemble(many(f), 3, exclude="x"),
        ValueError,
        "match none of: 0, 1, ... 19 and 3 more. Pass exclude='0', or leave it out.",
        (TORCH,),
    ),
    "many layers of Flax": Row(
        lambda f: f.package.batchensemble(many(f), 3, exclude="x"),
        ValueError,
        "match none of: layers.0, layers.1, ... layers.19 and 3 more. Pass exclude='layers.0', or leave it out.",
        (FLAX,),
    ),
    "a constructor that ignores its rngs": Row(
        lambda f: f.package.ensemble(lambda rngs: seeded(f), 3),
        ValueError,
        "got 3 equal ones. Draw from the rngs that are given: ensemble(lambda rngs: Network(rngs=rngs), 3).",
    ),
    "a rule that ignores its rngs": Row(
        lambda f: f.package.ensemble(f.linear(2, 2), 3, reset=lambda p, rngs: p * 0),
        ValueError,
        "got 3 equal ones. Draw from the rngs that are given: ensemble(lambda rngs: Network(rngs=rngs), 3).",
    ),
    **{
        f"{name} without a network to copy, {kind}": Row(
            lambda f, base=base, name=name, value=value: f.package.ensemble(base(f), 1, **{name: value}),
            TypeError,
            f"ensemble expects {name} with a network to copy; {NO_MEANING.format(kind)}",
        )
        for name, value in {"reset_params": False, "reset": lambda p, rngs: p}.items()
        for kind, base in {
            "a list of networks": lambda f: [f.linear(2, 2)],
            "a constructor": lambda f: lambda rngs: f.linear(2, 2),
        }.items()
    },
    "example_input for an nnx.Module": Row(
        lambda f: f.package.ensemble(f.linear(4, 2), 2, example_input=np.zeros((5, 4))),
        TypeError,
        "got no Linen module, for which it has no meaning. Leave it out: ensemble(base, num_members).",
        (FLAX,),
    ),
    "a class without rngs": Row(
        lambda f: f.package.ensemble(nn.Linear, 3),
        TypeError,
        "expects a constructor that takes the member's rngs, or nothing; got one that takes in_features, out_features. "
        "Wrap it: ensemble(lambda rngs: Network(...), num_members).",
        (TORCH,),
    ),
    "members of another structure": Row(
        lambda f: f.package.Ensemble([network(f), network(f), f.sequential(f.linear(4, 3), f.linear(3, 5))]),
        ValueError,
        "of one structure; got member 0, where 1.out_features is 2, and member 2, where it is 5. Build them all alike: "
        "ensemble(network, num_members=3).",
        (TORCH,),
    ),
    "members of another structure in Flax": Row(
        lambda f: f.package.Ensemble([network(f), network(f), f.sequential(f.linear(4, 3), f.linear(3, 5))]),
        ValueError,
        "got member 0, where layers.1.bias is Param of float32 (2,), and member 2, where it is Param of float32 (5,). "
        "Build them all alike: ensemble(network, num_members=3).",
        (FLAX,),
    ),
    "members in two modes": Row(
        lambda f: f.package.Ensemble([network(f), evaluated(network(f))]),
        ValueError,
        "got member 0, where training is True, and member 1, where it is False. Build ... num_members=2).",
        (TORCH,),
    ),
    "members in two modes of Flax": Row(
        lambda f: f.package.Ensemble([nnx.Dropout(0.5), evaluated(nnx.Dropout(0.5))]),
        ValueError,
        "got member 0, where deterministic is False, and member 1, where it is True. Build ... num_members=2).",
        (FLAX,),
    ),
    "no network": Row(lambda f: f.package.batchensemble("mlp", 3), TypeError, "batchensemble(network, ...)."),
    "num_members of a network": Row(lambda f: f.package.batchensemble(network(f), 0), ValueError, "num_members=4."),
    "exclude of another kind": Row(
        lambda f: f.package.batchensemble(network(f), 3, exclude=[3]), TypeError, "Pass exclude='head.*'."
    ),
    "no BatchEnsemble layer": Row(
        lambda f: f.package.BatchEnsemble(network(f)), ValueError, "call batchensemble(network, num_members=4)."
    ),
    "layers of different members": Row(
        lambda f: f.package.BatchEnsemble(
            f.sequential(
                f.package.BatchEnsembleLinear(f.linear(4, 3), num_members=2),
                f.package.BatchEnsembleLinear(f.linear(3, 2), num_members=3),
            )
        ),
        ValueError,
        "call batchensemble(network, num_members=4).",
    ),
    "index too large": Row(lambda f: deep(f)[3], IndexError, "Call model[2]."),
    "index a string": Row(lambda f: deep(f)["0"], TypeError, "Call model[0]."),
    "no member selected": Row(lambda f: deep(f)[[]], ValueError, "Call model[[0]]."),
    "no members given": Row(lambda f: f.package.Ensemble([]), ValueError, "Ensemble([network])."),
    "a network as members": Row(
        lambda f: f.package.Ensemble(f.linear(4, 3)), TypeError, "call ensemble(network, num_members=4)."
    ),
    "a Sequential as members": Row(
        lambda f: f.package.Ensemble(network(f)), TypeError, "call ensemble(network, num_members=4)."
    ),
    "a member twice": Row(
        lambda f: f.package.Ensemble([network(f)] * 2), ValueError, "call ensemble(network, 2, reset_params=False)."
    ),
    "a list of another length": Row(
        lambda f: f.package.ensemble([network(f), network(f)], 3), ValueError, "Call ensemble(modules, 2)."
    ),
    "a base of another kind": Row(lambda f: f.package.ensemble(3, 3), TypeError, "ensemble(network, ...)."),
    "reset of another shape": Row(
        lambda f: f.package.ensemble(f.linear(4, 3), 3, reset=lambda p, rngs: f.zeros(1)),
        ValueError,
        "normal(rngs.params(), parameter.shape).",
    ),
    "a constructor that draws nothing": Row(
        lambda f: f.package.ensemble(lambda: seeded(f), 3),
        ValueError,
        "got 3 equal ones. Draw from the rngs that are given: ensemble(lambda rngs: Network(rngs=rngs), 3).",
    ),
    "a constructor with other arguments": Row(
        lambda f: f.package.ensemble(lambda width, depth: network(f), 3),
        TypeError,
        "ensemble(lambda rngs: Network(...), num_members).",
    ),
    "converted already": Row(
        lambda f: f.package.batchensemble(model(f, "mlp"), 3),
        ValueError,
        "wrap this one: BatchEnsemble(network).",
    ),
    "nothing to convert": Row(lambda f: f.package.batchensemble(f.sequential(f.norm()), 3), ValueError, ENSEMBLE),
    "no parameters": Row(lambda f: f.package.batchensemble(f.sequential(), 3), ValueError, ENSEMBLE),
    "everything excluded": Row(lambda f: converted(f, "mlp", exclude="*"), ValueError, ENSEMBLE),
    "everything excluded by its root": Row(lambda f: converted(f, "mlp", exclude=f.sequential), ValueError, ENSEMBLE),
    "a misspelt name": Row(
        lambda f: converted(f, "lstm", exclude=["head", "embde"]), ValueError, "Pass exclude='embed', or leave it out."
    ),
    "a type that is not there": Row(
        lambda f: converted(f, "lstm", exclude=set), ValueError, "Pass exclude='embed', or leave it out."
    ),
    "a predicate that never holds": Row(
        lambda f: converted(f, "lstm", exclude=never), ValueError, "Pass exclude='embed', or leave it out."
    ),
    "a single layer by name": Row(
        lambda f: f.package.batchensemble(f.linear(4, 3), 3, exclude="head"), ValueError, "Leave it out: exclude=()."
    ),
    "a layer itself": Row(
        lambda f: converted(f, "mlp", exclude=[f.linear(4, 3)]), TypeError, "or its type, exclude=Linear."
    ),
    "None": Row(lambda f: converted(f, "mlp", exclude=None), TypeError, "Pass exclude='head.*'."),
    "converted already, the network": Row(
        lambda f: f.package.batchensemble(model(f, "lstm").network, 3),
        ValueError,
        "wrap this one: BatchEnsemble(network).",
    ),
    "converted already, one layer": Row(
        lambda f: f.package.batchensemble(
            f.sequential(f.linear(4, 4), f.package.BatchEnsembleLinear(f.linear(4, 3), num_members=3)), 3
        ),
        ValueError,
        "wrap this one: BatchEnsemble(network).",
    ),
    "an Ensemble": Row(
        lambda f: f.package.batchensemble(f.package.ensemble(f.mlp(), 2, reset_params=False), 3),
        ValueError,
        "batchensemble(model[0], num_members=4).",
    ),
}
