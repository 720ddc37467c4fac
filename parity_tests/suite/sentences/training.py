"""Training: groups of parameters in both packages, the loop of Flax, and Lightning's modules."""

from functools import cache

import jax
import numpy as np
import optax
import torch
from flax import nnx

from parity_tests.suite.sentences.frameworks import FLAX, TORCH
from parity_tests.suite.sentences.harness import Row

X, Y = np.zeros((4, 2), "float32"), np.zeros(4, "int32")
SGD = optax.sgd(0.1)


@cache
def batch_ensemble(f):
    return f.package.batchensemble(f.linear(2, 3), 4)


def groups(f, model=None, weight_decay=0.5, **options):
    return f.package.training.fast_weight_groups(model or batch_ensemble(f), weight_decay, **options)


def batches(epoch):
    return [(X, Y)]


def fit(f, model=None, optimizer=None, **changes):
    """Trains a small model. Most users do so in float32."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        own = nnx.clone(batch_ensemble(f))
        optimizer = optimizer or nnx.Optimizer(own, SGD, wrt=nnx.Param)
        f.package.training.fit(model or own, optimizer, **{"train": batches, "epochs": 2, "progress": False, **changes})


def step(f, *batch, **options):
    batch = tuple(map(torch.tensor, batch or (X, Y)))
    return f.package.training.EnsembleClassifier(f.linear(2, 3), **options).training_step(batch)


def refused_by_fit(error, sentence, **changes):
    return Row(lambda f: fit(f, **changes), error, sentence, (FLAX,))


ROWS = {
    "no fast weights": Row(
        lambda f: groups(f, f.linear(2, 3)),
        ValueError,
        "r and s of BatchEnsemble layers; got one with 1 slow weights and no fast ones. ... = batchensemble(model, 4).",
    ),
    "no slow weights": Row(
        lambda f: groups(f, no_decay=(f.package.BatchEnsembleLinear,)),
        ValueError,
        "with slow weights, which decay; got one with 2 fast weights and no slow ones. Leave types out of no_decay.",
    ),
    "weight_decay below 0": Row(
        lambda f: groups(f, weight_decay=-1), ValueError, "weight_decay of 0 or more; got -1. Pass weight_decay=0.5."
    ),
    "fast_lr_multiplier a string": Row(
        lambda f: groups(f, fast_lr_multiplier="half"),
        TypeError,
        "fast_lr_multiplier as a number; got str. Pass fast_lr_multiplier=0.5.",
    ),
    "decay a string": Row(
        lambda f: groups(f, decay="Linear"),
        TypeError,
        "decay as a tuple of types of modules; got 'Linear'. Pass decay=(MyLayer,).",
    ),
    "an optimizer of another model": Row(
        lambda f: nnx.Optimizer(nnx.Dict(head=nnx.clone(batch_ensemble(f))), groups(f), wrt=nnx.Param),
        ValueError,
        "of this model's parameters; got ... such as 'head.network.bias'. ... (model, weight_decay).",
        (FLAX,),
    ),
    "epochs 0": refused_by_fit(ValueError, "epochs of 1 or more; got 0. Pass epochs=10.", epochs=0),
    "epochs 1.5": refused_by_fit(TypeError, "epochs as an integer; got float. Pass epochs=10.", epochs=1.5),
    "patience 0": refused_by_fit(
        ValueError, "patience of 1 or more; got 0. Pass patience=10.", patience=0, val=batches
    ),
    "patience without val": refused_by_fit(
        ValueError, "validation batches for patience to judge; got val=None. Pass val=batches.", patience=1
    ),
    "monitor that is not logged": refused_by_fit(
        ValueError,
        "one of train_loss, val_accuracy, ... got 'val_auc'. Pass monitor='val_loss'.",
        patience=1,
        val=batches,
        monitor="val_auc",
    ),
    "unknown mode": refused_by_fit(
        ValueError, "mode 'min' or 'max'; got 'low'. Pass mode='max' if larger is better.", mode="low"
    ),
    "mode of the accuracy": refused_by_fit(
        ValueError,
        "mode='max' for val_accuracy, the larger the better; got 'min'. Pass mode='max'.",
        patience=1,
        val=batches,
        monitor="val_accuracy",
    ),
    "metrics of no kind": refused_by_fit(
        TypeError,
        "metrics to be a MultiMetric; got dict. Pass nnx.MultiMetric(nll=metrics.NLL()).",
        val=batches,
        metrics={"nll": 1},
    ),
    "metrics in a list": Row(
        lambda f: f.package.training.make_eval_step(batch_ensemble(f), [f.package.metrics.NLL()]),
        TypeError,
        "metrics to be a Metric; got list. Pass nnx.MultiMetric(nll=metrics.NLL()).",
        (FLAX,),
    ),
    "unknown task": refused_by_fit(
        ValueError, "task 'classification' or 'regression'; got 'ranking'. ... mean and variance.", task="ranking"
    ),
    "nothing to resume": refused_by_fit(
        ValueError, "a folder to resume from; got checkpoint=None. Pass checkpoint='run'.", resume=True
    ),
    "batches once": refused_by_fit(
        ValueError,
        "train to yield its batches in each of 2 epochs; got a list_iterator, ... batches(epoch).",
        train=iter(batches(0)),
    ),
    "no batches": refused_by_fit(
        ValueError, "batches (inputs, targets) in train; got none in epoch 0. ... batches(epoch).", train=[]
    ),
    "no validation batches": refused_by_fit(
        ValueError, "batches (inputs, targets) in val; got none in epoch 0. ... batches(epoch).", val=[]
    ),
    "a batch of three": refused_by_fit(
        ValueError, "inputs and targets; got 3 of them. Pass (inputs, targets).", train=[(1, 2, 3)]
    ),
    "loss a string": refused_by_fit(
        TypeError,
        "loss as a function of outputs and targets; got str. Pass loss=losses.member_cross_entropy.",
        loss="nll",
    ),
    "a loss for each member": refused_by_fit(
        ValueError,
        "a loss that returns a scalar; got one of shape (4,). Return its mean: loss.mean().",
        loss=lambda logits, y: logits.sum((1, 2)),
    ),
    "model a function": refused_by_fit(
        TypeError,
        "model to be a Module; got function. Pass a network, as in make_train_step(network, ...).",
        model=lambda x: x,
    ),
    "optimizer of optax": refused_by_fit(
        TypeError, "an nnx.Optimizer; got GradientTransformation ... wrt=nnx.Param).", optimizer=SGD
    ),
    "decay a type": Row(
        lambda f: groups(f, decay=f.sequential), TypeError, "tuple of types ... Pass decay=(MyLayer,).", (TORCH,)
    ),
    "model a string": Row(
        lambda f: f.package.training.EnsembleClassifier("resnet"),
        TypeError,
        "model to be a Module; got str. Pass a network, as in EnsembleClassifier(network, ...).",
        (TORCH,),
    ),
    "module, in_axes 1": Row(
        lambda f: f.package.training.EnsembleRegressor(f.mlp(), in_axes=1),
        ValueError,
        "in_axes to be None ... got 1. Call model(x) or model(x, in_axes=0).",
        (TORCH,),
    ),
    "module, weight_decay below 0": Row(
        lambda f: step(f, weight_decay=-1),
        ValueError,
        "weight_decay of 0 or more; got -1. Pass weight_decay=0.5.",
        (TORCH,),
    ),
    "module, a loss for each output": Row(
        lambda f: step(f, loss=lambda logits, labels: logits),
        ValueError,
        "a loss that returns a scalar; got one of shape (1, 4, 3). Return its mean: loss.mean().",
        (TORCH,),
    ),
    "module, a batch of three": Row(
        lambda f: step(f, X, Y, Y),
        ValueError,
        "a batch of inputs and targets; got 3 of them. Pass (inputs, targets).",
        (TORCH,),
    ),
    "module, in_axes of one network": Row(
        lambda f: step(f, in_axes=0),
        ValueError,
        "under in_axes=0, with num_members=1; got (4, 2). ... leave in_axes out: model(x).",
        (TORCH,),
    ),
    "callback, unknown task": Row(
        lambda f: f.package.training.EnsembleMetrics("both"),
        ValueError,
        "task 'classification' or 'regression'; got 'both'. ... mean and variance.",
        (TORCH,),
    ),
}
