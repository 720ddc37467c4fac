"""Planted faults: each is a plausible slip in the code of one twin, and the suite has to see it.

A parity test that these would pass is not a parity test. A fault is an edit of a function's source, which is compiled
and put in the function's place while the suite's own comparison runs.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import Any

import jax
import numpy as np
import pytest

import probly_flax as pf
import probly_flax.metrics as flax_metrics
import probly_torch as pt
import probly_torch.metrics as torch_metrics
from parity_tests import standard
from parity_tests.suite.layers import test_contract, test_norm, test_recurrent
from parity_tests.suite.layers.contract import KINDS as LAYERS
from parity_tests.suite.networks import test_calls
from parity_tests.suite.parity import test_machines, test_orders, test_random
from parity_tests.suite.port import test_port
from parity_tests.suite.subjects.all import BY_NAME
from parity_tests.suite.subjects.comparison import DTYPES, Comparison
from parity_tests.suite.training import test_losses, test_metrics, test_plots, test_training_torch, test_uncertainty
from probly_common import drawing
from probly_flax.functional import linear as flax_linear
from probly_flax.layers import embed as flax_embed
from probly_flax.layers import norm as flax_norm
from probly_torch import _calls as torch_calls
from probly_torch import _copies as torch_copies
from probly_torch import _mlp as torch_mlp
from probly_torch.functional import conv as torch_conv
from probly_torch.functional import linear as torch_linear
from probly_torch.layers import _base as torch_base
from probly_torch.layers import attention as torch_attention
from probly_torch.layers import embed as torch_embed
from probly_torch.layers import norm as torch_norm
from probly_torch.layers import recurrent as torch_recurrent
from probly_torch.port import _functions as port_functions
from probly_torch.random import _threefry as torch_threefry
from probly_torch.random import _xla as torch_xla
from probly_torch.training import _mixin as torch_mixin


@dataclass(frozen=True)
class Fault:
    """A wrong line, in the place of the right one; what compares the twins, and the tensor where it has to be seen."""

    name: str
    function: Any
    right: str
    wrong: str
    compared: str
    tensor: str = "output"

    @property
    def twin(self) -> str:
        """Which of the two is wrong."""
        return self.function.__module__.partition(".")[0].removeprefix("probly_")

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Runs the wrong line wherever the function is called, then the right one again."""
        code = self.function.__code__
        self.function.__code__ = _edited(self.function, self.right, self.wrong)
        try:
            yield
        finally:
            self.function.__code__ = code

    @contextmanager
    def planted_in_a_subject(self) -> Iterator[None]:
        """Plants a fault where the programs of a fault in Flax run once.

        Without optimizations XLA takes a third less.
        """
        jax.config.update("jax_disable_most_optimizations", self.twin == "flax")
        try:
            with self.planted():
                yield
        finally:
            jax.config.update("jax_disable_most_optimizations", False)

    @cached_property
    def comparison(self) -> Comparison:
        """The comparison of this name. For a fault in Flax a new one, for which nothing is compiled yet."""
        comparison = BY_NAME[self.compared]
        return comparison if self.twin == "torch" else comparison.fresh()


def _edited(function: Any, right: str, wrong: str) -> CodeType:
    """Compiles the function's code with the wrong line in it, within its module."""
    module, source = sys.modules[function.__module__], inspect.getsource(function)
    assert source.count(right) == 1, f"{function.__qualname__} has no single {right!r} to replace"
    text = inspect.getsource(module).replace(source, source.replace(right, wrong))
    found = _code_of(compile(text, str(module.__file__), "exec", dont_inherit=True), function.__qualname__)
    assert found is not None
    return found


def _code_of(code: CodeType, qualname: str) -> CodeType | None:
    nested = (_code_of(each, qualname) for each in code.co_consts if isinstance(each, CodeType))
    return code if code.co_qualname == qualname else next(filter(None, nested), None)


SQUARE, MANY = "batch_ensemble_linear-E3-B4-6to6", "batch_ensemble_linear-E2-B12-6to6-no_bias"
MANY_WITH_BIAS = "batch_ensemble_linear-E3-B16-5to7"
MEMBER_OPTIONS = "member_cross_entropy-3x5x4-labels2d-options"
backward = torch_linear._ScaledWeights.backward
LINEAR = [
    Fault(
        "r and s swapped",
        flax_linear.members_linear,
        "_scale_activations(members, kernel, r, s, bias",
        "_scale_activations(members, kernel, s, r, bias",
        SQUARE,
    ),
    Fault(
        "bias before s",
        flax_linear._scale_activations,
        "rows(s, x).astype(y.dtype)",
        "rows(s, x) + rows(bias, x) * (rows(s, x) - 1)",
        SQUARE,
    ),
    Fault(
        "[B, E] rows",
        flax_linear.members_linear,
        "x.reshape(batches, x.shape[0] // batches, *x.shape[1:])",
        "x.reshape(-1, batches, *x.shape[1:]).swapaxes(0, 1)",
        SQUARE,
    ),
    Fault("square weight not transposed", torch_linear._scale_activations, ", weight)", ", weight.T)", SQUARE),
    Fault(
        "r of the first member for all",
        flax_linear._scale_activations,
        "x * rows(r, x)",
        "x * rows(r[:1], x)",
        SQUARE,
    ),
    Fault("s of the first member for all", flax_linear._scale_weights, "* s[:, None]", "* s[:1, None]", MANY),
    Fault("dx with r and s swapped", backward, "weight, r, s))", "weight, s, r))", MANY, "gradient by x"),
    Fault("dW without s", backward, " * s[:, :, None]", "", MANY, "gradient by weight"),
    Fault("dW without r", backward, "products * r[:, None]", "products", MANY, "gradient by weight"),
    Fault(
        "dr without s",
        backward,
        "bmm(s[:, None], by_weight)",
        "bmm(0 * s[:, None] + 1, by_weight)",
        MANY,
        "gradient by r",
    ),
    Fault(
        "ds without r",
        backward,
        "bmm(by_weight, r[:, :, None])",
        "bmm(by_weight, 0 * r[:, :, None] + 1)",
        MANY,
        "gradient by s",
    ),
    Fault(
        "dr and ds without the weight",
        backward,
        "by_weight = products * weight",
        "by_weight = products",
        MANY,
        "gradient by r",
    ),
    Fault("db of the mean", backward, "g.sum(1)", "g.mean(1)", MANY_WITH_BIAS, "gradient by bias"),
]
OF_MEMBERS = [
    Fault(
        "[B, E] tiling",
        pf.tile_members,
        "jnp.broadcast_to(x, (num_members, *x.shape))",
        "jnp.repeat(x, num_members, 0)",
        "tile_members",
    ),
    Fault(
        "[B, E] splitting",
        pf.split_members,
        "y.reshape(num_members, y.shape[0] // num_members, *y.shape[1:])",
        "y.reshape(-1, num_members, *y.shape[1:]).swapaxes(0, 1)",
        "split_members",
    ),
    Fault(
        "[B, E] rows of a batch that members share",
        torch_linear.members_linear,
        "return y.reshape(",
        "return (y.transpose(0, 1) if shared else y).reshape(",
        "BatchEnsemble-shared_batch",
    ),
    Fault(
        "the last member in the place of all after the first",
        pt.BatchEnsemble.forward,
        "split_members(y, self.num_members)",
        "split_members(y, self.num_members)[[0, *[self.num_members - 1] * (self.num_members - 1)]]",
        "BatchEnsemble-shared_batch",
    ),
    Fault(
        "a member dropped from the mean",
        pt.uncertainty.expected_entropy,
        ".mean(0)",
        "[1:].mean(0)",
        "expected_entropy-3x5x4",
    ),
    Fault(
        "no mean over members",
        pf.uncertainty._log_mean,
        " - math.log(len(log_probs))",
        "",
        "mean_probs-3x5x4",
    ),
    Fault(
        "entropy in bits",
        pt.uncertainty._entropy,
        ".sum(-1)",
        ".sum(-1) / math.log(2)",
        "expected_entropy-3x5x4",
    ),
    Fault(
        "the first member's layers for all",
        torch_mlp.run_mlp,
        "torch.baddbmm(layer.bias[:, :, None], layer.weight,",
        "torch.baddbmm(layer.bias[:, :, None], layer.weight[:1].expand_as(layer.weight),",
        "Ensemble-shared_batch",
    ),
    Fault(
        "softmax of the mean logits",
        pf.uncertainty.mean_probs,
        '_log_mean(_log_probs("mean_probs", logits))',
        '_log_probs("mean_probs", logits.mean(0, keepdims=True))[0]',
        "mean_probs-3x5x4",
    ),
    Fault(
        "log(p + 1e-8)",
        pf.uncertainty._entropy,
        "* -log_probs)",
        "* -jnp.log(jnp.exp(log_probs) + 1e-8))",
        "predictive_entropy-3x5x4",
    ),
]
LOSSES = [
    Fault(
        "no mean over members",
        pf.losses._cross_entropy,
        "num_members * jnp.where",
        "jnp.where",
        "member_cross_entropy-3x5x4-labels1d",
    ),
    Fault("sum for mean", pf.losses._cross_entropy, " / total", "", "mixture_cross_entropy-3x5x4-labels1d"),
    Fault("weights not normalised", pf.losses._cross_entropy, "weights, 0.0)", "weights * 0 + 1, 0.0)", MEMBER_OPTIONS),
    Fault(
        "one total for all members",
        pt.losses._cross_entropy,
        "num_members * weights.sum(-1, keepdim=True)",
        "weights.sum()",
        MEMBER_OPTIONS,
    ),
    Fault(
        "smoothing over the other classes only",
        pf.losses._cross_entropy,
        "(1 - label_smoothing) * losses",
        "(1 - label_smoothing * num_classes / (num_classes - 1)) * losses",
        "mixture_cross_entropy-3x5x4-labels1d-options",
    ),
    Fault(
        "smoothing without weights",
        pt.losses._cross_entropy,
        "(1.0 if weight is None else weight) / num_classes",
        "1.0 / num_classes",
        MEMBER_OPTIONS,
    ),
    Fault(
        "ignored labels are smoothed",
        pt.losses._cross_entropy,
        "torch.where(kept, smooth, 0.0)",
        "smooth",
        "mixture_cross_entropy-3x5x4-labels1d-options",
    ),
    Fault(
        "Brier score of a mean over classes", pt.losses._brier, ".sum(-1)", ".mean(-1)", "member_brier-3x5x4-labels2d"
    ),
    Fault(
        "Brier score of one class",
        pf.losses._brier,
        "(probs - ",
        "((probs - 1) * ",
        "mixture_brier-3x5x4-labels1d",
    ),
    Fault("softplus forgotten", pf.losses.to_gaussian, "jax.nn.softplus(raw)", "raw", "to_gaussian"),
    Fault("variances first", pt.losses.to_gaussian, "mean, raw = ", "raw, mean = ", "to_gaussian"),
    Fault("the sign of log 2 pi", pt.losses._log_density, "(math.log", "(-math.log", "member_gaussian_nll-targets2d"),
    Fault(
        "a deviation for a variance",
        pf.losses._log_density,
        "/ variance",
        "/ variance**2",
        "mixture_gaussian_nll-targets2d",
    ),
    Fault(
        "beta's gradient not stopped",
        pf.losses.member_beta_nll,
        "jax.lax.stop_gradient(variance) ** beta",
        "variance**beta",
        "member_beta_nll-targets3d",
        "gradient by root",
    ),
    Fault("beta of the deviation", pt.losses.member_beta_nll, "** beta", "** (beta / 2)", "member_beta_nll-targets3d"),
    Fault(
        "mean of logarithms for logarithm of the mean",
        pt.losses.mixture_gaussian_nll,
        "math.log(len(mean)) - log_density.logsumexp(0).mean()",
        "-log_density.mean()",
        "mixture_gaussian_nll-targets2d",
    ),
]
UNCERTAINTY = [
    Fault("nats for bits", pf.uncertainty._in_unit, "math.log(2)", "1.0", "pairwise_kl-3x5x4-options"),
    Fault(
        "the divergence of the mean from members",
        pt.uncertainty.mutual_information,
        "log_probs, _log_mean(log_probs)[None]",
        "_log_mean(log_probs)[None], log_probs",
        "mutual_information-3x5x4",
    ),
    Fault(
        "KL(p_j || p_i)",
        pf.uncertainty.pairwise_kl,
        "log_probs[:, None], log_probs[None]",
        "log_probs[None], log_probs[:, None]",
        "pairwise_kl-3x5x4-options",
    ),
    Fault(
        "epistemic of one group",
        pt.uncertainty._moments,
        "_divergence(log_probs, log_mean[None])",
        "_divergence(log_probs, log_probs[:1])",
        "classification_uncertainty-3x5x4-options",
    ),
    Fault(
        "sample variance for population variance",
        pt.uncertainty._gaussian_moments,
        ".square().mean(0)",
        ".square().sum(0) / (len(differences) - 1)",
        "regression_uncertainty",
    ),
    Fault(
        "spread around the first member",
        pf.uncertainty._gaussian_moments,
        "differences - center[None]",
        "differences",
        "regression_uncertainty",
    ),
]
CONV = [
    Fault(
        "r and s swapped",
        torch_conv.members_conv,
        "weight, s, r, groups), x, weight, r, s, bias",
        "weight, r, s, groups), x, weight, s, r, bias",
        "batch_ensemble_conv-2d-square",
    ),
    Fault(
        "bias before s",
        torch_conv._members_conv,
        "torch.addcmul(_rows(bias, y), members, _rows(s, y))",
        "(members + _rows(bias, y)) * _rows(s, y)",
        "batch_ensemble_conv-2d-square",
    ),
    Fault(
        "padding off by one, the extra one in front",
        pf.functional.batch_ensemble_conv,
        "padding=padding",
        "padding=[(1, 0), (2, 2)]",
        "batch_ensemble_conv-2d-same-even",
    ),
    Fault(
        "dilation ignored",
        pf.functional.batch_ensemble_conv,
        "kernel_dilation=kernel_dilation",
        "kernel_dilation=1",
        "batch_ensemble_conv-2d-same-even",
    ),
    Fault(
        "groups ignored, all read the first",
        torch_conv._members_conv,
        "_members(x, batches) * _rows(r, x)",
        "(_members(x, batches) * _rows(r, x))[:, :, [0, 1, 0, 1]]",
        "batch_ensemble_conv-2d-groups",
    ),
    Fault(
        "r in the order of channels within their groups, member by member",
        torch_conv.scaled_weights,
        "second.reshape(num_members, groups, 1, -1, *axes)",
        "second.reshape(num_members, -1, groups, *axes).transpose(1, 2).unsqueeze(2)",
        "batch_ensemble_conv-2d-groups-member_by_member",
    ),
    Fault(
        "kernel not flipped",
        pf.functional.batch_ensemble_conv_transpose,
        "        kernel,\n",
        "        kernel[::-1],\n",
        "batch_ensemble_conv_transpose-1d-stride",
    ),
    Fault(
        "r of the first member for all",
        torch_conv._members_conv,
        "* _rows(r, x)",
        "* _rows(r[:1], x)",
        "batch_ensemble_conv_transpose-1d-stride",
    ),
]
EMBED_AND_NORM = [
    Fault(
        "r and s swapped",
        torch_embed.BatchEnsembleEmbed.forward,
        "self.r.gather(1, index).reshape(*tokens.shape, 1) * rows(self.s, w)",
        "self.s.gather(1, index).reshape(*tokens.shape, 1) * rows(self.r, w)",
        "BatchEnsembleEmbed-E2-ids",
    ),
    Fault(
        "r of the first member for all",
        flax_embed._embed,
        "jnp.take_along_axis(r, tokens",
        "jnp.take_along_axis(r[:1] + 0 * r, tokens",
        "BatchEnsembleEmbed-E3",
    ),
    Fault(
        "tied logits with r and s swapped",
        torch_embed.BatchEnsembleEmbed.attend,
        "self.s, self.r",
        "self.r, self.s",
        "BatchEnsembleEmbed.attend-E2-ids",
    ),
    Fault(
        "another epsilon",
        torch_norm.BatchEnsembleLayerNorm.forward,
        "eps=self.eps",
        "eps=1e-5",
        "BatchEnsembleLayerNorm-6x7",
    ),
    Fault(
        "epsilon of the default",
        flax_norm._ordinary,
        "_OPTIONS[base_type]",
        "_OPTIONS[base_type][1:]",
        "BatchEnsembleGroupNorm-3-4x6x3x5",
    ),
    Fault(
        "one mean and variance for all members",
        torch_norm.BatchEnsembleBatchNorm.forward,
        "batch_norm(side_by_side, mean, var, weight, bias, batch_statistics,",
        "batch_norm(side_by_side, "
        "*(v.repeat(self.num_members) for v in torch.var_mean(x.detach(), (0, 2), correction=0)[::-1]), "
        "weight, bias, False,",
        "BatchEnsembleBatchNorm-8x3x5-train",
    ),
    Fault(
        "sample for population variance",
        torch_norm.BatchEnsembleBatchNorm.forward,
        "batch_norm(side_by_side, mean, var, weight, bias, batch_statistics,",
        "batch_norm(side_by_side, *torch.var_mean(side_by_side.detach(), (0, 2), correction=1)[::-1], "
        "weight, bias, False,",
        "BatchEnsembleBatchNorm-8x3x5-train",
    ),
    Fault(
        "running statistics of the first member for all",
        torch_norm.BatchEnsembleBatchNorm.forward,
        "(self.running_mean, self.running_var) if tracked",
        "[v[:1].repeat(self.num_members, 1) for v in (self.running_mean, self.running_var)] if tracked",
        "BatchEnsembleBatchNorm-8x3x5-eval",
    ),
    Fault(
        "scale of the first member for all",
        torch_norm._scaled,
        "members, weight)",
        "members, weight[:1])",
        "BatchEnsembleLayerNorm-6x3x11",
    ),
    Fault(
        "channels of one group apart",
        torch_norm.BatchEnsembleGroupNorm.forward,
        "group_norm(x, self.num_groups,",
        "group_norm(x, self.num_channels,",
        "BatchEnsembleGroupNorm-3-4x6x3x5",
    ),
]
attention, self_attention = torch_attention.BatchEnsembleMultiHeadAttention, "BatchEnsembleMultiHeadAttention-self-odd"
ATTENTION = [
    Fault(
        "query and key swapped in the packed weight",
        torch_attention._projections,
        "layer.in_proj_weight.chunk(3)",
        "[layer.in_proj_weight.chunk(3)[n] for n in (1, 0, 2)]",
        self_attention,
    ),
    Fault(
        "polarity of the mask",
        attention._merged,
        "masked_fill(m, -torch.inf)",
        "masked_fill(~m, torch.finfo(dtype).min)",
        self_attention,
    ),
    Fault(
        "features of a head apart",
        attention.forward,
        "x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)",
        "x.unflatten(-1, (self.head_dim, self.num_heads)).movedim(-1, 1)",
        self_attention,
    ),
    Fault(
        "scores by the features of all heads",
        attention.forward,
        "math.sqrt(1 / self.head_dim)",
        "math.sqrt(1 / self.embed_dim)",
        self_attention,
    ),
    Fault(
        "r and s of the output swapped",
        attention.forward,
        "self.out_proj(y.transpose(1, 2).flatten(2))",
        "members_linear(y.transpose(1, 2).flatten(2), "
        "*(getattr(self.out_proj, n) for n in ('weight', 's', 'r', 'bias')))",
        self_attention,
    ),
]
lstm_cell = "BatchEnsembleLSTMCell-LSTM-3x2x4x5x3-layers1-biases2-is_cell"
gru_cell = "BatchEnsembleGRUCell-GRU-3x2x4x5x3-layers1-biases2-is_cell"
RECURRENT = [
    Fault(
        "order of the gates",
        torch_recurrent.BatchEnsembleLSTMCell.forward,
        "i, f, g, o = ",
        "i, f, o, g = ",
        lstm_cell,
    ),
    Fault(
        "order of the states",
        torch_recurrent.BatchEnsembleLSTMCell.forward,
        "h, c = self._states",
        "c, h = self._states",
        lstm_cell,
    ),
    Fault(
        "no bias of the state",
        torch_recurrent._Cell._gates,
        "self.s_hh, self.bias_hh",
        "self.s_hh, 0 * self.bias_hh",
        gru_cell,
    ),
    Fault(
        "reset gate before the product",
        torch_recurrent.BatchEnsembleGRUCell.forward,
        "r * h_n",
        "self._gates(x, r * h)[1].chunk(3, -1)[2]",
        gru_cell,
    ),
    Fault(
        "update gate the other way round",
        torch_recurrent.BatchEnsembleGRUCell.forward,
        "(1 - z) * (x_n + r * h_n).tanh() + z * h",
        "z * (x_n + r * h_n).tanh() + (1 - z) * h",
        gru_cell,
    ),
]
KINDS = {
    "linear": LINEAR,
    "members": OF_MEMBERS,
    "losses": LOSSES,
    "uncertainty": UNCERTAINTY,
    "convolution": CONV,
    "embedding and norm": EMBED_AND_NORM,
    "attention": ATTENTION,
    "recurrent": RECURRENT,
}
FAULTS = {f"{kind}, {fault.name}": fault for kind, faults in KINDS.items() for fault in faults}
EXACT = [name for name, fault in FAULTS.items() if fault.comparison.is_exact]


def broken(verdicts, rule):
    return {verdict.tensor for verdict in verdicts if rule in verdict.rule and not verdict.holds}


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_tier_sees(name):
    fault = FAULTS[name]
    for dtype in DTYPES:
        with fault.planted_in_a_subject():
            verdicts = fault.comparison.exact(0, dtype)
        assert fault.tensor in broken(verdicts, f"{fault.twin} and the oracle")


@pytest.mark.parametrize("name", FAULTS)
def test_the_bounded_tier_sees(name):
    fault = FAULTS[name]
    with fault.planted_in_a_subject():
        verdicts = fault.comparison.bounded([fault.comparison.draw(0, "float32")])
    assert fault.tensor in broken(verdicts, "float64 distance of torch and flax")
    assert fault.tensor in broken(verdicts, f"float64 distance of {fault.twin} and the oracle")
    if fault.name != "log(p + 1e-8)":  # 1e-8 is below what float32 resolves: this one needs the float64 tier
        assert fault.tensor in broken(verdicts, f"float32 error of {fault.twin}")
    (other,) = {"torch", "flax"} - {fault.twin}
    assert not broken(verdicts, f"{other} and the oracle"), "the twin without the fault is blamed"


def running_statistics() -> None:
    test_norm.test_running_statistics_of_both_frameworks_over_several_steps()


def torch_norm_in_float32() -> None:
    test_norm.test_each_torch_member_is_the_ordinary_layer_over_several_steps("BatchNorm1d", {}, last=False)


def counters() -> None:
    test_calls.test_what_calls_leave_is_each_members_and_is_copied_and_pickled()


def asks() -> None:
    test_calls.test_two_calls_and_their_gradients_are_those_of_networks_side_by_side(test_calls.AsksForGradients, None)


def clipped() -> None:
    test_training_torch.test_members_are_clipped_by_their_own_norms_in_both_packages()


def torch_lstm() -> None:
    test_recurrent.test_torch_members_are_ordinary_layers_bit_for_bit("LSTM", {}, states=True)


def contiguous() -> None:
    test_contract.test_parameters_of_a_new_layer_are_contiguous(LAYERS[0])


def drawn_alike() -> None:
    for options in test_contract.DRAWS:
        test_contract.test_one_seed_gives_one_layer_bit_for_bit(LAYERS[0], "float32", options)


def any_cpu() -> None:
    for dtype in DTYPES:
        test_machines.test_no_draw_rests_on_how_a_cpu_rounds(dtype)


def truncated() -> None:
    test_random.test_bounds_of_a_truncated_normal_broadcast_and_are_kept((-1.5, 1.5))


def twice_rounded() -> None:
    test_machines.test_half_precision_is_rounded_twice()


def made_under_jit() -> None:
    test_contract.test_a_layer_made_under_jit_is_the_same_bit_for_bit(LAYERS[0])


def random_bits() -> None:
    test_random.test_bits(1)


def disagreement() -> None:
    test_uncertainty.test_disagreement_counts_pairs()


def streams() -> None:
    test_uncertainty.test_streams_give_what_the_functions_of_all_members_give(1.0)


def far_from_zero() -> None:
    test_uncertainty.test_regression_uncertainty_far_from_zero(1e6, 1.0)


def all_ignored() -> None:
    test_losses.test_where_every_label_is_ignored_the_loss_is_nan_and_its_gradient_zero_as_in_torch(0.1)


def band() -> None:
    test_plots.test_a_band_is_as_wide_as_its_variances((60,))


def ported_gelu() -> None:
    test_port.test_operations("activations")


MOMENTUM = "0.0 if self.momentum is None else self.momentum"
# What is not a value or a gradient of one call: a fault in it, and the test of the suite that has to fail of it.
BY_A_TEST: list[tuple[str, Any, str, str, Callable[[], None]]] = [
    (
        "momentum of the old",
        torch_norm.BatchEnsembleBatchNorm.forward,
        MOMENTUM,
        "1 - self.momentum",
        running_statistics,
    ),
    (
        "momentum of the old, float32",
        torch_norm.BatchEnsembleBatchNorm.forward,
        MOMENTUM,
        "1 - self.momentum",
        torch_norm_in_float32,
    ),
    (
        "a missing contiguous copy",
        torch_base.copied,
        "memory_format=torch.contiguous_format",
        "memory_format=torch.preserve_format",
        contiguous,
    ),
    ("fan-out for fan-in", pt.random.lecun_normal, "math.prod(shape[:-1])", "math.prod(shape[1:])", drawn_alike),
    (
        "a square root that each CPU rounds in its own way",
        pt.random.lecun_normal,
        "np.sqrt(real(1 / math.prod(shape[:-1])))",
        "real(torch.tensor(1 / math.prod(shape[:-1]), dtype=dtype).sqrt())",
        any_cpu,
    ),
    ("a logarithm that each CPU rounds in its own way", torch_xla.log, "_log_64(f, power)", "x.log()", any_cpu),
    ("bounds over sqrt(2)", torch_xla.divided, "if x.dtype == torch.bfloat16", "if True", truncated),
    (
        "float16 rounded once",
        torch_xla.fma,
        "return a * b + c",
        "return (a.float() * b.float() + c.float()).to(a.dtype)",
        twice_rounded,
    ),
    ("draws that jit merges", pf.random.rounded, "jnp.maximum(x, jnp.finfo(x.dtype).min)", "x", made_under_jit),
    ("s drawn around r's mean", torch_base.Draws.fast_weights, "self.s_mean", "self.r_mean", drawn_alike),
    ("half of the bits", torch_threefry.words, "high ^ low", "high", random_bits),
    (
        "one copy for all members",
        torch_copies.Copies.of_each,
        "list(zip(self.networks, self.states, strict=True))",
        "[self.of_all()] * num_members",
        counters,
    ),
    ("a watch that sees nothing", torch_calls._Watch.__torch_function__, "name in _TELLING", "not name", asks),
    (
        "members clipped together",
        torch_mixin.clip_by_member.__wrapped__,
        ".norm(dim=0)",
        ".norm().expand(len(gradients[0]))",
        clipped,
    ),
    (
        "pairs with themselves",
        pt.uncertainty.disagreement,
        "num_members * (num_members - 1)",
        "num_members**2",
        disagreement,
    ),
    (
        "the distance of the groups' means",
        pt.uncertainty._merged_gaussian_moments,
        "+ v * w * apart.square()",
        "",
        streams,
    ),
    (
        "the divergence of one group's mean",
        pt.uncertainty._merged_moments,
        "b[2] + _divergence(b[0], log_mean)",
        "b[2]",
        streams,
    ),
    (
        "shares of groups of one size",
        pt.uncertainty._shares,
        "return num_a / (num_a + num_b), num_b / (num_a + num_b)",
        "return 0.5, 0.5",
        streams,
    ),
    (
        "means of large numbers",
        pt.uncertainty.regression_uncertainty,
        "mean - mean[:1]",
        "mean - mean[:1] + 2.0**24",
        far_from_zero,
    ),
    (
        "the gradient of nothing",
        pt.losses._cross_entropy,
        "torch.where(kept, smooth, 0.0)",
        "kept * smooth",
        all_ignored,
    ),
    *(
        (f"metrics, {name}", *rest)
        for name, *rest in (
            (
                "bins closed on the left",
                torch_metrics._calibration._binned,
                "edges)  # closed",
                "edges, right=True)  # closed",
                test_metrics.test_a_confidence_on_an_edge_is_in_the_bin_below_it_and_1_is_in_the_last,
            ),
            (
                "times the inverse of num_members",
                flax_metrics._classification._probs,
                "total / jax.lax.optimization_barrier(jnp.full_like(total, len(probs)))",
                "total / len(probs)",
                test_metrics.test_a_confidence_on_an_edge_is_in_the_bin_below_it_and_1_is_in_the_last,
            ),
            (
                "a confidence of 1 in no bin",
                flax_metrics._calibration._binned,
                'method="compare_all")',
                'method="compare_all") + jnp.where(confidence == 1, num_bins, 0)',
                test_metrics.test_a_confidence_of_1_counts,
            ),
            (
                "all classes in one curve",
                torch_metrics.classwise_ece,
                'return _error(*_every_label("classwise_ece", logits, labels, num_bins)).mean(-1)',
                'return _error(*(b.sum(-2) for b in _every_label("classwise_ece", logits, labels, num_bins)))',
                test_metrics.test_errors_on_edges,
            ),
            (
                "sum for mean over batches",
                torch_metrics._states._Mean.compute,
                " / self.count",
                "",
                test_metrics.test_batches_of_any_size_in_any_order_give_what_all_inputs_do_after_a_reset_too,
            ),
            (
                "sum for mean over coverages",
                flax_metrics._selection._aurc,
                ".mean()",
                ".sum()",
                test_metrics.test_a_confidence_of_1_counts,
            ),
            (
                "inside for outside",
                torch_metrics.OODAUROC.compute,
                "scores[is_ood == 0], scores[is_ood == 1]",
                "scores[is_ood == 1], scores[is_ood == 0]",
                test_metrics.test_ood_metrics_over_mixed_batches,
            ),
            (
                "CRPS without its half",
                flax_metrics._regression._crps,
                "between / 2",
                "between",
                test_metrics.test_regression_against_distributions_and_samples,
            ),
            (
                "what rounding took, forgotten",
                flax_metrics._states._Sums._add,
                "lost[...] + rounded",
                "lost[...]",
                test_metrics.test_counts_do_not_saturate_in_float32,
            ),
            (
                "one sum for all levels in a collection",
                torch_metrics.IntervalCoverage.__init__,
                'f"covered_at_{level}"',
                '"covered"',
                test_metrics.test_metrics_whose_first_sums_are_equal_stay_apart_in_a_collection,
            ),
        )
    ),
    *(
        (f"plots, {name}", *rest)
        for name, *rest in (
            (
                "bands of variances",
                drawing.predictive_band,
                "np.sqrt(aleatoric)",
                "aleatoric",
                band,
            ),
            (
                "epistemic for total",
                drawing.predictive_band,
                "(x, *moments[:3])",
                "(x, moments[0], moments[3], moments[2])",
                band,
            ),
            (
                "inputs in the order they come in",
                drawing.predictive_band,
                "np.argsort(x.ravel())",
                "np.arange(x.size)",
                band,
            ),
            (
                "empty bins as points",
                drawing.reliability_diagram,
                "(values[bins[2] > 0] for values in bins)",
                "(np.where(bins[2] > 0, values, 1) for values in bins)",
                test_plots.test_a_reliability_diagram_has_the_bins_that_are_not_empty,
            ),
            (
                "rows for columns of a map",
                drawing.uncertainty_map,
                "values.reshape(grid.shape[:2])",
                "values.reshape(grid.shape[1::-1]).T",
                test_plots.test_an_uncertainty_map_has_each_value_at_its_point,
            ),
            (
                "a spread of one member",
                drawing.member_spread,
                "values.min(0), values.max(0)",
                "values[0], values[-1]",
                test_plots.test_a_spread_is_from_the_lowest_to_the_highest,
            ),
            (
                "NaN where there is a number",
                drawing.training_curves,
                "curve.get(epoch, value) if np.isnan(value) else value",
                "value",
                test_plots.test_curves_have_one_number_an_epoch,
            ),
        )
    ),
    ("tanh GELU", port_functions._gelu, "approximate == 'tanh'", "approximate == 'none'", ported_gelu),
    (
        "order of the last states",
        torch_recurrent.BatchEnsembleLSTM.forward,
        "return output, (h, c)",
        "return output, (c, h)",
        torch_lstm,
    ),
    (
        "the bias of the inputs twice",
        torch_recurrent._Sequence._flat_weights,
        'for kind in ("ih", "hh")]\n            if self.proj_size',
        'for kind in ("ih", "ih")]\n            if self.proj_size',
        torch_lstm,
    ),
    (
        "members in reverse order",
        torch_recurrent._Sequence._run,
        "self._flat_weights(i)",
        "self._flat_weights(self.num_members - 1 - i)",
        torch_lstm,
    ),
    (
        "the order of many rows for few",
        flax_linear.members_linear,
        ">= 4 *",
        ">= 3 *",
        test_orders.test_the_rule_is_that_of_the_docstring_in_both,
    ),
]


@pytest.mark.parametrize("fault", BY_A_TEST, ids=lambda fault: fault[0])
def test_a_test_of_the_suite_sees(fault):
    name, function, right, wrong, test = fault
    fault = Fault(name, function, right, wrong, None)
    in_flax = fault.twin == "flax"
    if in_flax:
        jax.clear_caches()  # which know a function by its name, whatever its code
    with fault.planted(), pytest.raises(AssertionError):
        test()  # which the suite runs without the fault, too
    if in_flax:
        jax.clear_caches()


def test_a_twin_that_is_nan_in_every_dtype_is_seen_in_float64_too():
    right, wrong = np.ones(3), np.full(3, np.nan)
    runs, faulty = ({dtype: [{"output": values}] for dtype in DTYPES} for values in (right, wrong))
    broken = {v.rule for v in standard.bounded(runs, faulty, [{"output": right}]) if not v.holds}
    assert {"float64 distance of torch and flax", "float64 distance of flax and the oracle"} <= broken
    assert "float64 distance of torch and the oracle" not in broken
