"""Optimizers whose state the other framework does not have."""

from functools import partial

import optax
import torch
from flax import nnx

from parity_tests.suite.sentences.frameworks import FLAX, TORCH
from parity_tests.suite.sentences.harness import Row

SGD, ADAM = partial(torch.optim.SGD, lr=0.1), torch.optim.Adam


def pair(f, ours=ADAM, theirs=optax.adam(1e-3)):  # noqa: B008
    model = f.linear(3, 2)
    return model, ours(model.parameters()) if f is TORCH else nnx.Optimizer(model, theirs, wrt=nnx.Param)


def refused(error, got, **optimizers):
    """Returns rows of an optimizer of one framework that can be neither saved nor loaded."""
    frameworks = (TORCH,) if "ours" in optimizers else (FLAX,)
    sentence = f"got {got}. Pass torch.optim.AdamW(model.parameters())."
    if error is ValueError:
        sentence = f"as both frameworks compute them; got {got}. Train on with torch.optim.SGD, ... that both have."
    yield Row(lambda f: f.package.optimizers.optimizer_to_arrays(*pair(f, **optimizers)), error, sentence, frameworks)
    yield Row(
        lambda f: f.package.optimizers.load_optimizer_arrays(*pair(f, **optimizers), {}), error, sentence, frameworks
    )


REFUSED = {
    "amsgrad": refused(ValueError, "amsgrad=True", ours=partial(torch.optim.AdamW, amsgrad=True)),
    "maximize": refused(ValueError, "maximize=True", ours=partial(SGD, maximize=True)),
    "dampening": refused(ValueError, "dampening=0.1", ours=partial(SGD, momentum=0.9, dampening=0.1)),
    "RMSprop": refused(TypeError, "RMSprop", ours=torch.optim.RMSprop),
    "NAdam": refused(TypeError, "NAdam", ours=torch.optim.NAdam),
    "optax.amsgrad": refused(ValueError, " ... opt_state[0].nu_max", theirs=optax.amsgrad(1e-3)),
    "optax.rmsprop": refused(ValueError, "opt_state[0].nu", theirs=optax.rmsprop(1e-3)),
    "optax.MultiSteps": refused(ValueError, "opt_state.acc_grads", theirs=optax.MultiSteps(optax.adam(1e-3), 2)),
    "a tree of its own": refused(
        ValueError, "opt_state", theirs=optax.GradientTransformation(lambda params: params, None)
    ),
    "two momenta": refused(
        ValueError,
        "opt_state[1] beside opt_state[0][0]",
        theirs=optax.chain(optax.adam(1e-3), optax.trace(0.9)),
    ),
}
ROWS = {
    **{
        f"{name}, {call}": row
        for name, rows in REFUSED.items()
        for call, row in zip(("saved", "loaded"), rows, strict=True)
    },
    "another model": Row(
        lambda f: f.package.optimizers.optimizer_to_arrays(f.linear(3, 5), pair(f)[1]),
        ValueError,
        "expects the model whose parameters the optimizer updates; got a model without 2 of them. Pass the model, or "
        "the part of it, that the optimizer was made for: optimizer_to_arrays(model, ...).",
    ),
    "a state of optax alone": Row(
        lambda f: f.package.optimizers.optimizer_to_arrays(f.linear(3, 2), optax.adam(1e-3).init({})),
        TypeError,
        "Pass nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param).",
        (FLAX,),
    ),
    "two biases that are one": Row(
        lambda f: f.package.optimizers.optimizer_to_arrays(
            f.lstm().rnn, nnx.Optimizer(f.lstm().rnn, optax.adam(1e-3), wrt=nnx.Param)
        ),
        ValueError,
        "got bias_ih_l0: torch trains two where there is one here. Start anew with the weights alone: "
        "nnx.Optimizer(model, tx, wrt=nnx.Param).",
        (FLAX,),
    ),
}
