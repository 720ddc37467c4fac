"""Bad input of random numbers in torch. jax.random has its own sentences."""

import torch

from parity_tests.suite.sentences.frameworks import TORCH
from parity_tests.suite.sentences.harness import Row
from probly_torch import random

CALLS = (
    (lambda: random.key(2**32), ValueError, "Pass 0, its low 32 bits."),
    (lambda: random.key(-1), ValueError, "Pass 4294967295, its low 32 bits."),
    (lambda: random.key(1.5), TypeError, "got float. Pass a seed, rngs=0, or Rngs(0)."),
    (lambda: random.normal(0), TypeError, "Make one: key(0), or Rngs(0)()."),
    (lambda: random.normal(random.split(random.key(0))), TypeError, "of shape (2, 2) ... "),
    (lambda: random.uniform(random.key(0), (), torch.int32), TypeError, "Pass dtype=torch.float32."),
    (lambda: random.bits(random.key(0), (), torch.int32), TypeError, "Pass dtype=torch.uint32."),
    (lambda: random.fold_in(random.key(0), -1), ValueError, "Pass data % 2**32."),
    (lambda: random.bernoulli(random.key(0), 1), TypeError, "Pass a float, p=0.5."),
    (lambda: random.permutation(random.key(0), 2.5), TypeError, "Pass x=10."),
    (lambda: random.truncated_normal(random.key(0), 2.0, -2.0), ValueError, "lower < upper ... "),
    (lambda: random.truncated_normal(random.key(0), -1.0, torch.ones(3), (4,)), ValueError, "Pass shape=(3,) ... "),
    (lambda: random.bernoulli(random.key(0), torch.ones(3, 1), (4,)), ValueError, "Pass shape=(3, 1) ... "),
    (lambda: random.bernoulli(random.key(0), mode="lo"), ValueError, "Pass mode='low'."),
    (lambda: random.randint(random.key(0), (), 3, 3), ValueError, "minval < maxval ... "),
    (lambda: random.randint(random.key(0), (), 0, 257, torch.uint8), ValueError, "that torch.uint8 holds ... "),
    (
        lambda: random.randint(random.key(0), (), -(2**63), 2**63 - 1, torch.int64),
        ValueError,
        "Pass minval=0, maxval=10.",
    ),
    (lambda: random.randint(random.key(0), (), 0, 1.5), TypeError, "Pass maxval=10."),
    (lambda: random.randint(random.key(0), (), 0, 9, torch.float32), TypeError, "Pass dtype=torch.int32."),
    (lambda: random.choice(random.key(0), 3, 4, False), ValueError, "Pass shape=(3,), or replace=True."),
    (lambda: random.choice(random.key(0), 0, 1), ValueError, "at least 1 to choose from; got 0. Pass shape=(0,)."),
    (lambda: random.choice(random.key(0), 3, p=torch.ones(2)), ValueError, "Pass p=torch.ones(3), or p=None."),
    (lambda: random.choice(random.key(0), 2, p=torch.tensor([1.0, -1.0])), ValueError, "not negative ... "),
    (lambda: random.choice(random.key(0), "ab"), TypeError, "got 'ab'. Pass a=10."),
    (lambda: random.normal(random.key(0), 2.5), TypeError, "got 2.5. Pass shape=(2, 3)."),
    (lambda: random.split(random.key(0), "2"), TypeError, "split expects shape ... "),
    (lambda: random.categorical(random.key(0), torch.tensor([1, 2])), TypeError, "Pass logits=torch.zeros(3)."),
    (lambda: random.categorical(random.key(0), torch.ones(3), shape=4, replace=False), ValueError, "replace=True."),
    (lambda: random.categorical(random.key(0), torch.ones(5, 3), shape=4), ValueError, "Pass shape=(5,) ... "),
    (lambda: random.Rngs(params=0).dropout(), AttributeError, "Build it with Rngs(0), or Rngs(dropout=0)."),
)
ROWS = {sentence: Row(lambda f, call=call: call(), error, sentence, (TORCH,)) for call, error, sentence in CALLS}
