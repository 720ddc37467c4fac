"""Layers scale activations or weights, whichever is cheaper: one function, under every transform."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from probly_torch.functional.linear import _scale_activations

FEW, MANY = 2, 24  # rows of a member, to the two sides of the rule for 5 and 7 features


def arguments(rows, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(3 * rows, 5), (7, 5), (3, 5), (3, 7), (3, 7)][: 5 if bias else 4]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def by_activations(x, *weights):
    y = _scale_activations(x.unflatten(0, (3, -1)), *weights, *[None] * (4 - len(weights)))
    return y.flatten(0, 1)


def test_the_rule_is_that_of_the_docstring_in_both():
    """The custom function, and the recomputation, are there for many rows and not for few."""
    for rows, expected in ((FEW, False), (MANY, True), (11, False), (12, True)):  # 12 * 12 >= 4 * 35
        y = pt.functional.batch_ensemble_linear(*arguments(rows))
        assert ("ScaledWeights" in str(y.grad_fn.next_functions[0][0]) + str(y.grad_fn)) == expected
        arrays = [a.detach().numpy() for a in arguments(rows)]
        arrays[1] = arrays[1].T
        jaxpr = jax.make_jaxpr(pf.functional.batch_ensemble_linear)(*arrays)
        assert ("remat" in str(jaxpr) or "checkpoint" in str(jaxpr)) == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_first_and_second_derivatives_forward_and_backward(rows, bias):
    function = pt.functional.batch_ensemble_linear
    leaves = arguments(rows, bias)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=False)


@pytest.mark.parametrize("bias", [True, False])
def test_orders_agree_under_transforms(bias):
    leaves = arguments(MANY, bias)
    function = pt.functional.batch_ensemble_linear

    def loss(f):
        return lambda *leaves: f(*leaves).pow(3).sum()

    numbers = tuple(range(len(leaves)))
    for ours, theirs in zip(
        grad(loss(function), numbers)(*leaves), grad(loss(by_activations), numbers)(*leaves), strict=True
    ):
        assert_close(ours.detach(), theirs.detach(), "float64")
    tangents = tuple(torch.ones_like(leaf).cumsum(0) for leaf in leaves)
    for f in (function, by_activations):
        assert_close(
            jvp(f, tuple(leaves), tangents)[1].detach(),
            jvp(by_activations, tuple(leaves), tangents)[1].detach(),
            "float64",
        )
    batched = torch.stack([leaves[0], 2 * leaves[0]])
    assert_close(
        vmap(lambda x: function(x, *leaves[1:]))(batched)[1].detach(),
        function(batched[1], *leaves[1:]).detach(),
        "float64",
    )
    hessians = [
        torch.func.hessian(lambda r, f=f: f(*leaves[:2], r, *leaves[3:]).pow(3).sum())(leaves[2])
        for f in (function, by_activations)
    ]
    assert_close(hessians[0].detach(), hessians[1].detach(), "float64")


def test_a_tangent_for_one_argument_alone():
    leaves = [leaf.detach() for leaf in arguments(MANY)]
    for i, leaf in enumerate(leaves):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(leaf, torch.ones_like(leaf)) if j == i else other for j, other in enumerate(leaves)
            ]
            ours, theirs = (
                forward_ad.unpack_dual(f(*dual)).tangent for f in (pt.functional.batch_ensemble_linear, by_activations)
            )
        assert_close(ours, theirs, "float64")


@pytest.mark.parametrize("frozen", range(5))
def test_a_gradient_for_all_but_one(frozen):
    leaves = arguments(MANY)
    leaves[frozen].requires_grad_(False)
    free = [leaf for leaf in leaves if leaf.requires_grad]
    ours, theirs = (
        torch.autograd.grad(f(*leaves).pow(3).sum(), free)
        for f in (pt.functional.batch_ensemble_linear, by_activations)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, "float64")


def test_many_rows_save_the_input_and_the_weights_alone():
    saved = []
    leaves = arguments(MANY, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pt.functional.batch_ensemble_linear(*leaves)
    own = {leaf.data_ptr() for leaf in leaves}
    assert saved
    assert all(tensor.data_ptr() in own for tensor in saved)


def test_many_rows_in_a_network_under_ensembles_and_autocast():
    layer = pt.BatchEnsembleLinear(torch.nn.Linear(5, 7), num_members=3)
    x = torch.randn(3 * MANY, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        for i in range(3):
            assert_close(
                y[i * MANY : (i + 1) * MANY].float().detach(),
                layer.member(i)(x[i * MANY : (i + 1) * MANY]).float().detach(),
                "bfloat16",
            )
    y.sum().backward()
    assert layer.r.grad.dtype == torch.float32
    parameters = dict(layer.named_parameters())
    per_sample = vmap(grad(lambda p, x: functional_call(layer, p, x).sum()), (None, 0))(
        parameters, torch.stack([x, 2 * x])
    )
    assert per_sample["r"].shape == (2, 3, 5)
    deep = pt.ensemble(layer, 4, reset=lambda p, rngs: pt.random.normal(rngs.params(), p.shape))
    assert_close(deep(x)[2].detach(), deep[2](x).detach(), "float32")


def test_flax_orders_agree_under_transforms():
    from probly_flax.functional.linear import _scale_activations as activations

    leaves = [leaf.detach().numpy() for leaf in arguments(MANY)]
    leaves[1] = leaves[1].T
    leaves = list(map(jax_of, leaves))
    numbers = tuple(range(5))

    def loss(f):
        return lambda *leaves: (f(*leaves) ** 3).sum()

    def reference(x, *weights):
        return activations(x.reshape(3, -1, 5), *weights, jax.lax.dot_general).reshape(-1, 7)

    function = pf.functional.batch_ensemble_linear
    # jax.jit around each: op by op, JAX compiles each op for each shape
    for transform in (lambda f: jax.grad(loss(f), numbers), jax.jit, lambda f: jax.jacfwd(f, numbers)):
        for ours, theirs in zip(
            jax.tree.leaves(jax.jit(transform(function))(*leaves)),
            jax.tree.leaves(jax.jit(transform(reference))(*leaves)),
            strict=True,
        ):
            assert_close(np.asarray(ours), np.asarray(theirs), "float64")
    hessians = [
        jax.jit(jax.hessian(lambda r, f=f: loss(f)(*leaves[:2], r, *leaves[3:])))(leaves[2])
        for f in (function, reference)
    ]
    assert_close(*hessians, "float64")
    batched = np.stack([leaves[0], 2 * np.asarray(leaves[0])])
    y = jax.jit(jax.vmap(lambda x: function(x, *leaves[1:])))(batched)
    assert_close(np.asarray(y)[1], function(jax_of(batched[1]), *leaves[1:]), "float64")


# The kernel has 12 numbers and a row 24, so 2 rows reach the rule's 4 * 12; the last case has too many members.
@pytest.mark.parametrize(("num_members", "rows", "one_by_one"), [(2, 1, False), (2, 2, True), (17, 2, False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_many_activations_run_member_by_member(num_members, rows, one_by_one, transposed):
    shapes = {"x": (num_members * rows, 2, 12), "weight": (2, 3, 2) if transposed else (3, 2, 2)}
    shapes |= {"r": (num_members, 2), "s": (num_members, 3), "bias": (num_members, 3)}
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]
    name = "batch_ensemble_conv_transpose" if transposed else "batch_ensemble_conv"
    with torch.profiler.profile() as profile:
        y = getattr(pt.functional, name)(*leaves)
    calls = sum(event.count for event in profile.key_averages() if event.key == "aten::convolution")
    assert calls == (num_members if one_by_one else 1)
    x, weight, *rest = (leaf.numpy() for leaf in leaves)
    options = {"transpose_kernel": True} if transposed else {}
    function = partial(getattr(pf.functional, name), **options)
    arguments = x.swapaxes(1, 2), weight.transpose(2, 1, 0), *rest
    assert str(jax.make_jaxpr(function)(*arguments)).count("conv_general_dilated[") == calls
    assert_close(y, np.asarray(jax.jit(function)(*arguments)).swapaxes(1, 2), "float64")
    per_row = vmap(lambda x: getattr(pt.functional, name)(x, *leaves[1:]))(leaves[0][None])[0]
    assert_close(y, per_row, "float64")
    batch = x[:rows]
    tiled = np.asarray(pf.functional.tile_members(jax_of(batch), num_members))
    shared = getattr(pt.functional, name)(leaves[0][:rows], *leaves[1:], shared=True)
    assert_close(shared, getattr(pt.functional, name)(torch.tensor(tiled), *leaves[1:]), "float64")
    arguments = arguments[1:]
    shared = jax.jit(partial(function, shared=True))(batch.swapaxes(1, 2), *arguments)
    assert_close(shared, jax.jit(function)(tiled.swapaxes(1, 2), *arguments), "float64")


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_batch_that_members_share_is_not_tiled(kind, rows):
    """A Sequential's first layer sees B rows and answers as for E*B of them; both sides of both rules."""
    if kind == "linear":
        x = torch.randn(rows, 5)
        ours = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(5, 7)), torch.nn.ReLU(), torch.nn.Linear(7, 2))
        rngs = nnx.Rngs(0)
        first = nnx.Sequential(nnx.Linear(5, 7, rngs=rngs))
        theirs = nnx.Sequential(first, nnx.relu, nnx.Linear(7, 2, rngs=rngs))
        arrays = jax_of(x.numpy())
    else:
        x = torch.randn(rows, 4, 3)
        ours = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 2, groups=2, padding=1, padding_mode="circular"))
        theirs = nnx.Sequential(
            nnx.Conv(4, 6, (2,), feature_group_count=2, padding=((1, 1),), rngs=nnx.Rngs(0)),
        )
        arrays = jax_of(x.swapaxes(1, 2).numpy())
    for model, batch, package in (
        (pt.batchensemble(ours, 3), x, pt),
        (pf.batchensemble(theirs, 3), arrays, pf),
    ):
        tiled = package.functional.tile_members(batch, 3)
        y, by_tiling = model(batch), model.network(tiled)
        for other in (
            package.functional.split_members(by_tiling, 3),
            model(package.functional.split_members(tiled, 3), in_axes=0),
        ):
            assert_close(*(a.detach() if package is pt else a for a in (y, other)), "float32")
        with pytest.raises(ValueError, match="expects inputs of shape"):
            model(batch.reshape(rows, -1, 1))
    model = pt.batchensemble(ours, 3)
    first = model.network[0] if kind == "conv" else model.network[0][0]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        first.shared_batch(x.requires_grad_())
    if rows == 40:  # for few, the scaled activations of all members are kept
        assert not any(t.untyped_storage().nbytes() == 3 * x.nbytes for t in saved)
    seen = []
    first.register_forward_hook(lambda layer, inputs, y: seen.append(len(inputs[0])))
    model(x)
    assert seen == [3 * rows]  # a hook sees what it saw without this


@pytest.mark.parametrize("package", [pt, pf], ids=["torch", "flax"])
def test_a_users_layer_may_take_a_batch_that_members_share(package):
    seen = []

    class Layer(torch.nn.Module if package is pt else nnx.Module):
        num_members = 3

        def member(self, i):
            return self

        def keep_members(self, indices):
            self.num_members = len(indices)

        def shared_batch(self, x):
            seen.append(tuple(x.shape))
            return package.tile_members(x, self.num_members)

    x = np.ones((4, 2), "float32")
    y = package.BatchEnsemble(Layer())(torch.tensor(x) if package is pt else jax_of(x))
    assert (seen, tuple(y.shape)) == ([(4, 2)], (3, 4, 2))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("package", [pt, pf], ids=["torch", "flax"])
def test_a_subclass_with_a_forward_of_its_own_needs_a_shared_batch_of_its_own(package, own):
    base, call = package.BatchEnsembleLinear, "forward" if package is pt else "__call__"
    methods = {call: lambda self, x: 2 * getattr(base, call)(self, x)}
    if own:
        methods["shared_batch"] = lambda self, x: 2 * base.shared_batch(self, x)
    plain = torch.nn.Linear(2, 3) if package is pt else nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    layer = type("Doubled", (base,), methods)(plain, num_members=3)
    x = np.ones((4, 2), "float32")
    x = torch.tensor(x) if package is pt else jax_of(x)
    y, expected = package.BatchEnsemble(layer)(x), package.split_members(layer(package.tile_members(x, 3)), 3)
    assert_close(*(a.detach() if package is pt else a for a in (y, expected)), "float32")
