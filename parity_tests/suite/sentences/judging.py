"""Bad input of losses, uncertainties and metrics."""

from flax import nnx

from parity_tests.suite.sentences.frameworks import FLAX
from parity_tests.suite.sentences.harness import Row


def labels(f, *shape, dtype="int64"):
    return f.zeros(*shape, dtype=dtype)


def loss(f, logits, target):
    return f.package.losses.member_cross_entropy(f.zeros(*logits), target)


def updated(stream, *outputs, **named):
    stream.update(*outputs, **named)
    return stream


def judged(f, num_members):
    return {"logits": f.zeros(num_members, 2, 3), "labels": labels(f, 2)}


ROWS = {
    "a loss for each input": Row(
        lambda f: f.package.losses.member_losses(lambda y, t: y[:, 0] + t, f.zeros(3, 5, 2), f.zeros(5)),
        ValueError,
        "loss(outputs, targets).mean(), outputs, targets).",
    ),
    "targets of another count": Row(
        lambda f: f.package.losses.member_losses(lambda y, t: y.mean(), f.zeros(3, 5, 2), f.zeros(2, 5), in_axes=0),
        ValueError,
        "leave in_axes out: model(x).",
    ),
    "logits of one network": Row(
        lambda f: f.package.uncertainty.mean_probs(f.zeros(5, 4)), ValueError, "add the member axis: logits[None]."
    ),
    "labels of another batch": Row(lambda f: loss(f, (3, 5, 4), labels(f, 6)), ValueError, "labels.argmax(-1)."),
    "one-hot labels": Row(lambda f: loss(f, (3, 5, 4), labels(f, 5, 4)), ValueError, "labels.argmax(-1)."),
    "labels of floats": Row(
        lambda f: loss(f, (3, 5, 4), labels(f, 5, dtype="float32")), TypeError, "labels.argmax(-1)."
    ),
    "labels of members for the mixture": Row(
        lambda f: f.package.losses.mixture_cross_entropy(f.zeros(3, 5, 4), labels(f, 3, 5)),
        ValueError,
        "labels.argmax(-1).",
    ),
    "weights of other classes": Row(
        lambda f: f.package.losses.member_cross_entropy(f.zeros(3, 5, 4), labels(f, 5), weight=f.zeros(3)),
        ValueError,
        "weight=None.",
    ),
    "weights in a list": Row(
        lambda f: f.package.losses.mixture_cross_entropy(f.zeros(3, 5, 2), labels(f, 5), weight=[1.0, 2.0]),
        ValueError,
        "weight=None.",
    ),
    "smoothing above 1": Row(
        lambda f: f.package.losses.member_cross_entropy(f.zeros(3, 5, 4), labels(f, 5), label_smoothing=1.5),
        ValueError,
        "Pass label_smoothing=0.1.",
    ),
    "smoothing a string": Row(
        lambda f: f.package.losses.mixture_cross_entropy(f.zeros(3, 5, 4), labels(f, 5), label_smoothing="0.1"),
        TypeError,
        "Pass label_smoothing=0.1.",
    ),
    "ignore_index a float": Row(
        lambda f: f.package.losses.mixture_cross_entropy(f.zeros(3, 5, 4), labels(f, 5), ignore_index=1.0),
        TypeError,
        "Pass ignore_index=-100.",
    ),
    "variances of one column": Row(
        lambda f: f.package.losses.member_gaussian_nll(f.zeros(3, 5, 2), f.zeros(3, 5, 1), f.zeros(5, 2)),
        ValueError,
        "mean[None], variance[None].",
    ),
    "targets without the last axis": Row(
        lambda f: f.package.losses.member_gaussian_nll(f.zeros(3, 5, 1), f.zeros(3, 5, 1), f.zeros(5)),
        ValueError,
        "Pass targets.reshape((5, 1)).",
    ),
    "targets of members for the mixture": Row(
        lambda f: f.package.losses.mixture_gaussian_nll(f.zeros(3, 5), f.zeros(3, 5), f.zeros(3, 5)),
        ValueError,
        "Pass targets.reshape((5,)).",
    ),
    "beta above 1": Row(
        lambda f: f.package.losses.member_beta_nll(f.zeros(3, 5), f.zeros(3, 5), f.zeros(5), beta=2),
        ValueError,
        "Pass beta=0.5.",
    ),
    "three outputs for a Gaussian": Row(
        lambda f: f.package.losses.to_gaussian(f.zeros(5, 3)), ValueError, "Linear(features, 2 * K)."
    ),
    "no smallest variance": Row(
        lambda f: f.package.losses.to_gaussian(f.zeros(5, 2), min_variance=0.0), ValueError, "Pass min_variance=1e-06."
    ),
    "another unit": Row(
        lambda f: f.package.uncertainty.pairwise_kl(f.zeros(3, 5, 4), unit="bit"), ValueError, "Pass unit='nats'."
    ),
    "variances of another batch": Row(
        lambda f: f.package.uncertainty.regression_uncertainty(f.zeros(3, 5), f.zeros(3, 4)),
        ValueError,
        "mean[None], variance[None].",
    ),
    "a stream without members": Row(
        lambda f: f.package.uncertainty.ClassificationStream().compute(),
        RuntimeError,
        "Call stream.update(logits) first.",
    ),
    "a stream without means": Row(
        lambda f: f.package.uncertainty.RegressionStream().compute(),
        RuntimeError,
        "Call stream.update(mean, variance) first.",
    ),
    "another batch in a stream": Row(
        lambda f: updated(f.package.uncertainty.ClassificationStream(), f.zeros(3, 5, 4)).update(f.zeros(2, 4, 4)),
        ValueError,
        "make another stream: ClassificationStream().",
    ),
    "other targets in a stream": Row(
        lambda f: updated(f.package.uncertainty.RegressionStream(), f.zeros(3, 5), f.zeros(3, 5)).update(
            f.zeros(3, 4), f.zeros(3, 4)
        ),
        ValueError,
        "make another stream: RegressionStream().",
    ),
    "no bins": Row(
        lambda f: f.package.metrics.ece(f.zeros(3, 5, 4), labels(f, 5), num_bins=0), ValueError, "Pass num_bins=15."
    ),
    "half a bin": Row(lambda f: f.package.metrics.AdaptiveECE(num_bins=7.5), TypeError, "Pass num_bins=15."),
    "a level in percent": Row(
        lambda f: f.package.metrics.sharpness(f.zeros(3, 5), f.zeros(3, 5), level=95), ValueError, "Pass level=0.95."
    ),
    "a level as a string": Row(
        lambda f: f.package.metrics.IntervalCoverage(level="0.95"), TypeError, "Pass level=0.95."
    ),
    "labels of members for a metric": Row(
        lambda f: f.package.metrics.accuracy(f.zeros(3, 5, 4), labels(f, 3, 5)), ValueError, "labels.argmax(-1)."
    ),
    "targets of members for a metric": Row(
        lambda f: f.package.metrics.CRPS().update(mean=f.zeros(3, 5), variance=f.zeros(3, 5), targets=f.zeros(3, 5)),
        ValueError,
        "Pass targets.reshape((5,)).",
    ),
    "uncertainty of another batch": Row(
        lambda f: f.package.metrics.aurc(f.zeros(3, 5, 4), labels(f, 5), uncertainty=f.zeros(4)),
        ValueError,
        "uncertainty=None.",
    ),
    "uncertainty of the batch for members": Row(
        lambda f: f.package.metrics.AURC(per_member=True).update(
            logits=f.zeros(3, 5, 4), labels=labels(f, 5), uncertainty=f.zeros(5)
        ),
        ValueError,
        "uncertainty=None.",
    ),
    "scores of members": Row(
        lambda f: f.package.metrics.ood_auroc(f.zeros(3, 5), f.zeros(5)), ValueError, "mutual_information(logits)."
    ),
    "nothing from outside": Row(
        lambda f: f.package.metrics.ood_fpr95(f.zeros(5), f.zeros(0)), ValueError, "or metric.update(scores, is_ood)."
    ),
    "is_ood of another batch": Row(
        lambda f: f.package.metrics.OODAUROC().update(scores=f.zeros(5), is_ood=labels(f, 4, dtype="bool")),
        ValueError,
        "pass full_like(scores, True, dtype=bool).",
    ),
    "is_ood as numbers": Row(
        lambda f: f.package.metrics.OODFPR95().update(scores=f.zeros(5), is_ood=labels(f, 5)),
        TypeError,
        "Pass is_ood == 1.",
    ),
    "no inputs": Row(
        lambda f: f.package.metrics.AURC().compute(),
        RuntimeError,
        "AURC expects at least one input; got none. Call metric.update first.",
    ),
    "another ensemble": Row(
        lambda f: updated(f.package.metrics.NLL(per_member=True), **judged(f, 1)).update(**judged(f, 4)),
        ValueError,
        "NLL expects the members ... got ... For other members, make another metric: NLL().",
    ),
    "a mask": Row(
        lambda f: nnx.MultiMetric(nll=f.package.metrics.NLL()).update(**judged(f, 1), mask=labels(f, 2)),
        ValueError,
        "got a mask. Leave them out: logits[:, mask], labels[mask].",
        (FLAX,),
    ),
    "scores under jit": Row(
        lambda f: nnx.jit(updated)(f.package.metrics.AURC(), **judged(f, 1)),
        ValueError,
        "it keeps every score; got traced ones. Return the outputs from jit, and call metric.update with them.",
        (FLAX,),
    ),
}
