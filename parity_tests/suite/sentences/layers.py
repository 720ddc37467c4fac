"""Bad arguments of layers, and of the functions under them."""

import torch
from flax import nnx
from torch import nn

from parity_tests.suite.sentences.frameworks import FLAX, TORCH, drawn
from parity_tests.suite.sentences.harness import Row


def layer(f, **options):
    return f.package.BatchEnsembleLinear(f.linear(16, 8), **({"num_members": 4} | options))


def padded(f, padding):
    transposed = drawn(nnx.ConvTranspose, 3, 2, (2,), padding=padding)
    return f.package.batchensemble(f.sequential(transposed), 3)


ROWS = {
    "lazy layers": Row(
        lambda f: f.package.batchensemble(f.sequential(nn.Linear(4, 3), nn.LazyLinear(2)), 3),
        ValueError,
        "got lazy ones, without 1.weight. Call the network once first: network(x).",
        (TORCH,),
    ),
    "another dtype": Row(
        lambda f: layer(f)(torch.zeros(8, 16, dtype=torch.float64)),
        TypeError,
        "Convert them: x.to(torch.float32).",
        (TORCH,),
    ),
    "padding of torch": Row(
        lambda f: f.package.batchensemble(f.cnn("REPLICATE"), 3),
        ValueError,
        "one of SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL; got 'REPLICATE'. ... is torch's 'replicate'.",
        (FLAX,),
    ),
    "padding that transposed convolutions lack": Row(
        lambda f: padded(f, "REFLECT"),
        ValueError,
        "one of SAME, VALID, CIRCULAR; got 'REFLECT'. ... is torch's 'replicate'.",
        (FLAX,),
    ),
    "no members": Row(lambda f: layer(f, num_members=0), ValueError, "Pass num_members=4."),
    "negative members": Row(lambda f: layer(f, num_members=-3), ValueError, "Pass num_members=4."),
    "2.5 members": Row(lambda f: layer(f, num_members=2.5), TypeError, "Pass num_members=4."),
    "True members": Row(lambda f: layer(f, num_members=True), TypeError, "Pass num_members=4."),
    "unknown init": Row(
        lambda f: layer(f, init="gaussian"), ValueError, "or 'ones'; got 'gaussian'. Pass init='normal'."
    ),
    "r_std below 0": Row(lambda f: layer(f, r_std=-0.5), ValueError, "Pass r_std=0.5."),
    "s_std negative": Row(lambda f: layer(f, s_std=-1.0), ValueError, "Pass s_std=0.5."),
    "r_std NaN": Row(lambda f: layer(f, r_std=float("nan")), ValueError, "Pass r_std=0.5."),
    "s_mean infinite": Row(lambda f: layer(f, s_mean=float("inf")), ValueError, "Pass s_mean=1.0."),
    "r_mean a string": Row(lambda f: layer(f, r_mean="1"), TypeError, "Pass r_mean=1.0."),
    "base no Linear": Row(
        lambda f: f.package.BatchEnsembleLinear(f.norm(), num_members=4),
        TypeError,
        "call batchensemble(network, num_members=4).",
    ),
    "rngs a string": Row(lambda f: layer(f, rngs="0"), TypeError, "rngs=0, or Rngs(0)."),
    "rngs a float": Row(lambda f: layer(f, rngs=1.0), TypeError, "rngs=0, or Rngs(0)."),
    "rngs negative": Row(lambda f: layer(f, rngs=-1), ValueError, "its low 32 bits."),
    "seed meant as members": Row(
        lambda f: f.package.BatchEnsembleLinear(f.linear(16, 8), 4),
        TypeError,
        "call BatchEnsembleLinear(base_layer, rngs=4, num_members=1).",
    ),
    "one row of r": Row(
        lambda f: f.package.functional.batch_ensemble_linear(
            f.zeros(4, 3), f.zeros(3, 3), f.zeros(2, 3), f.zeros(1, 3)
        ),
        ValueError,
        "tile_members(s, 2).",
    ),
    "r by columns": Row(
        lambda f: f.package.functional.batch_ensemble_linear(
            f.zeros(4, 3), f.zeros(3, 3), f.zeros(3, 2), f.zeros(2, 3)
        ),
        ValueError,
        "tile_members(r, 3).",
    ),
    "a stack of weights": Row(
        lambda f: (
            f.package.functional.batch_ensemble_linear(
                f.zeros(4, 3), f.zeros(2, 3, 3), f.zeros(2, 3), f.zeros(2, 3)
            ).shape
        ),
        ValueError,
        "call ensemble(network, num_members).",
    ),
}
