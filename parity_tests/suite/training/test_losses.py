"""Losses against the frameworks' own, what is ignored or out of range, and what holds between them."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close

HUGE = float(np.finfo("float32").max)
LOGITS = np.random.default_rng(0).standard_normal((3, 6, 4))
LABELS = np.array([0, 3, 2, 1, 2, 0])
LABELS_EACH = np.stack([LABELS, LABELS[::-1], (LABELS + 1) % 4])
WEIGHT = np.array([0.3, 2.0, 1.0, 0.7])
MEAN, VARIANCE = np.random.default_rng(1).standard_normal((3, 6, 2)), np.random.default_rng(2).random((3, 6, 2)) + 0.1
TARGETS = np.random.default_rng(3).standard_normal((6, 2))


def cross_entropies(logits, labels, weight=None, **options):
    """Returns the mean of torch's own over members.

    With one member, it is that of the logarithm of mean probabilities.
    """
    labels = torch.tensor(labels).expand(logits.shape[:2])
    weight = None if weight is None else torch.tensor(weight)
    each = [functional.cross_entropy(z, y, weight, **options) for z, y in zip(logits, labels, strict=True)]
    return torch.stack(each).mean()


@pytest.mark.parametrize("labels", [LABELS, LABELS_EACH], ids=["shared", "each"])
@pytest.mark.parametrize(("weight", "smoothing", "ignored"), [*product((None, WEIGHT), (0.0, 0.1, 1.0), (-100, 2))])
def test_torch_cross_entropy_with_all_options(weight, smoothing, ignored, labels):
    options = {"label_smoothing": smoothing, "ignore_index": ignored}
    expected = cross_entropies(torch.tensor(LOGITS), labels, weight, **options)
    tensor = None if weight is None else torch.tensor(weight)
    ours = pt.losses.member_cross_entropy(torch.tensor(LOGITS), torch.tensor(labels), weight=tensor, **options)
    assert_close(ours, expected, "float64")
    if labels.ndim == 1:
        mixture = pt.losses.mixture_cross_entropy(torch.tensor(LOGITS), torch.tensor(labels), weight=tensor, **options)
        log_mean = torch.tensor(LOGITS).softmax(-1).mean(0).log()[None]
        assert_close(mixture, cross_entropies(log_mean, labels, weight, **options), "float64")
        assert mixture <= ours


@pytest.mark.parametrize(
    ("weight", "smoothing", "ignored", "labels"),
    [(None, 0.1, -100, LABELS), (WEIGHT, 0.0, 2, LABELS), (WEIGHT, 0.1, 2, LABELS_EACH)],
)
def test_flax_cross_entropy_with_options(weight, smoothing, ignored, labels):
    options = {"label_smoothing": smoothing, "ignore_index": ignored}
    expected = cross_entropies(torch.tensor(LOGITS), labels, weight, **options)
    array = None if weight is None else jnp.asarray(weight)
    member = jax.jit(lambda *arrays: pf.losses.member_cross_entropy(*arrays, weight=array, **options))
    assert_close(member(LOGITS, labels), expected, "float64")


def losses_and_gradients(labels, **options):
    """Returns the loss and gradients of both frameworks."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = pt.losses.member_cross_entropy(logits, torch.tensor(labels), **options)
    loss.backward()
    flax = jax.jit(jax.value_and_grad(lambda z: pf.losses.member_cross_entropy(z, labels, **options)))
    return [(loss.detach().numpy(), logits.grad.numpy()), tuple(map(np.asarray, flax(LOGITS)))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_where_every_label_is_ignored_the_loss_is_nan_and_its_gradient_zero_as_in_torch(smoothing):
    labels = np.full(6, 7)
    own = torch.tensor(LOGITS[0], requires_grad=True)
    expected = functional.cross_entropy(own, torch.tensor(labels), ignore_index=7, label_smoothing=smoothing)
    expected.backward()
    assert expected.isnan()
    assert (own.grad == 0).all()
    for loss, gradient in losses_and_gradients(labels, ignore_index=7, label_smoothing=smoothing):
        assert np.isnan(loss)
        assert (gradient == 0).all()


def test_a_member_whose_labels_are_all_ignored_leaves_the_others_gradients_alone():
    labels = LABELS_EACH.copy()
    labels[1] = -100
    for loss, gradient in losses_and_gradients(labels):
        assert np.isnan(loss)
        assert (gradient[1] == 0).all()
        assert np.isfinite(gradient).all()
        assert (gradient[[0, 2]] != 0).all()


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = np.zeros((2, 3, 300)), np.array([0, 255, 1], dtype)  # more classes than uint8 has numbers
    for loss, expected in (("member_cross_entropy", np.log(300.0)), ("mixture_brier", 1 - 1 / 300)):
        ours = getattr(pt.losses, loss)(torch.tensor(logits), torch.tensor(labels))
        theirs = jax.jit(getattr(pf.losses, loss))(logits, labels)
        assert_close(ours, expected, "float64")
        assert_close(theirs, expected, "float64")


@pytest.mark.parametrize("loss", ["member_cross_entropy", "mixture_cross_entropy", "member_brier", "mixture_brier"])
def test_labels_out_of_range_are_not_read_as_others(loss):
    for label in (-1, 4):
        with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|Class values"):
            getattr(pt.losses, loss)(torch.zeros(2, 3, 4), torch.tensor([0, 1, label]))
        of_flax = jax.jit(getattr(pf.losses, loss))(np.zeros((2, 3, 4), "float32"), np.array([0, 1, label]))
        assert np.isnan(of_flax)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits_give_finite_losses_and_gradients(smoothing):
    logits = np.full((3, 50, 8), -HUGE, "float32")
    logits[..., 0] = HUGE
    labels = np.arange(50) % 8
    options = {"weight": np.ones(8, "float32"), "label_smoothing": smoothing}
    for name in ("member_cross_entropy", "mixture_cross_entropy"):
        tensor = torch.tensor(logits, requires_grad=True)
        ours = getattr(pt.losses, name)(
            tensor, torch.tensor(labels), **options | {"weight": torch.tensor(options["weight"])}
        )
        ours.backward()
        theirs, gradient = jax.jit(jax.value_and_grad(lambda z, of=name: getattr(pf.losses, of)(z, labels, **options)))(
            logits
        )
        for values in (ours.detach(), tensor.grad, theirs, gradient):
            assert np.isfinite(np.asarray(values)).all()
        assert_close(theirs, ours.detach(), "float32")


def test_what_the_mixture_gains_in_brier_score_is_the_variance_of_the_members():
    logits, labels = torch.tensor(LOGITS), torch.tensor(LABELS)
    variance = logits.softmax(-1).var(0, correction=0).sum(-1).mean()
    gain = pt.losses.member_brier(logits, labels) - pt.losses.mixture_brier(logits, labels)
    assert_close(gain, variance, "float64")


def test_gaussian_nll_is_torchs_own():
    mean, variance, targets = map(torch.tensor, (MEAN, VARIANCE, TARGETS))
    own = functional.gaussian_nll_loss(mean, targets.expand(mean.shape), variance, full=True, eps=1e-30)
    assert_close(pt.losses.member_gaussian_nll(mean, variance, targets), own, "float64")
    assert_close(pt.losses.member_gaussian_nll(mean, variance, targets.expand(mean.shape)), own, "float64")
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(6, 2, 3, dtype=torch.float64)),
        torch.distributions.Normal(mean.movedim(0, -1), variance.movedim(0, -1).sqrt()),
    )
    ours = pt.losses.mixture_gaussian_nll(mean, variance, targets)
    assert_close(ours, -mixture.log_prob(targets).mean(), "float64")
    assert ours <= own


def test_beta_nll_between_the_likelihood_and_the_squared_error():
    mean, variance, targets = map(torch.tensor, (MEAN, VARIANCE, TARGETS))
    assert torch.equal(
        pt.losses.member_beta_nll(mean, variance, targets, beta=0.0),
        pt.losses.member_gaussian_nll(mean, variance, targets),
    )
    mean.requires_grad_()
    (ours,) = torch.autograd.grad(pt.losses.member_beta_nll(mean, variance, targets, beta=1.0), mean)
    (squared,) = torch.autograd.grad(0.5 * (targets - mean).square().mean(), mean)
    assert_close(ours, squared, "float64")


def test_variances_that_are_not_above_zero_are_refused_or_nan():
    for name in ("member_gaussian_nll", "member_beta_nll", "mixture_gaussian_nll"):
        for bad, target in ((0.0, 0.0), (0.0, 1.0), (-1.0, 1.0)):
            mean, variance, targets = np.zeros((2, 1)), np.array([[1.0], [bad]]), np.array([target])
            with pytest.raises(ValueError, match="variances above 0"):
                getattr(pt.losses, name)(*map(torch.tensor, (mean, variance, targets)))
            assert np.isnan(jax.jit(getattr(pf.losses, name))(mean, variance, targets))


def test_to_gaussian_keeps_every_variance_above_the_smallest():
    outputs = np.array([[1.0, -HUGE], [2.0, 0.0], [3.0, 50.0]], "float32")
    of_flax = map(np.asarray, pf.losses.to_gaussian(jax_of(outputs)))
    for mean, variance in (pt.losses.to_gaussian(torch.tensor(outputs)), of_flax):
        np.testing.assert_array_equal(mean, outputs[:, :1])
        assert float(variance[0, 0]) == np.float32(1e-6)
        assert float(variance[2, 0]) == 50.0


@pytest.mark.parametrize("loss", ["member_gaussian_nll", "member_beta_nll", "mixture_gaussian_nll"])
def test_torch_traces_the_gaussian_losses_in_one_graph(loss):
    """Its check of the variances looks at values, which a traced graph has not."""
    arrays = tuple(map(torch.tensor, (MEAN, VARIANCE, TARGETS)))
    function = getattr(pt.losses, loss)
    assert_close(torch.compile(function, backend="eager", fullgraph=True)(*arrays), function(*arrays), "float64")
