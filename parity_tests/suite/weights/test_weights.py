"""One file for both packages and for plain torch: round trips are bit for bit, and nothing is half-loaded."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.suite.networks.twins import FlaxHeads, TorchHeads
from parity_tests.suite.subjects.subject import without_draws

WRAPPERS = {
    "network": (lambda net: net, lambda net: net),
    "Ensemble": (lambda net: pt.ensemble(net, 3), lambda net: pf.ensemble(net, 3)),
    "BatchEnsemble": (lambda net: pt.batchensemble(net, 3), lambda net: pf.batchensemble(net, 3)),
    "layer": (
        lambda net: pt.BatchEnsembleLinear(net.heads["main"], num_members=3),
        lambda net: pf.BatchEnsembleLinear(net.heads["main"], num_members=3),
    ),
}


def pair(wrapper="network", dtype="float32"):
    ours, theirs = WRAPPERS[wrapper]
    return ours(TorchHeads(getattr(torch, dtype))), without_draws(
        lambda: theirs(FlaxHeads(nnx.Rngs(0), jnp.dtype(dtype)))
    )


def randomize(model):
    """Draws distinct values in every tensor, so that no two could be exchanged unseen."""
    with torch.no_grad():
        for i, (_, p) in enumerate(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_torch_to_file_to_flax_to_file_to_torch_is_bit_for_bit(wrapper, dtype, tmp_path):
    ours, theirs = pair(wrapper, dtype)
    randomize(ours)
    pt.save_weights(ours, tmp_path / "torch.safetensors")
    pf.load_weights(theirs, tmp_path / "torch.safetensors")
    pf.save_weights(theirs, tmp_path / "flax.safetensors")
    for load in (
        lambda model: pt.load_weights(model, tmp_path / "flax.safetensors"),
        lambda model: model.load_state_dict(safetensors.torch.load_file(tmp_path / "flax.safetensors")),
    ):
        back = pair(wrapper, dtype)[0]
        load(back)
        for name, value in ours.state_dict().items():
            assert torch.equal(back.state_dict()[name], value), name
            assert back.state_dict()[name].dtype == getattr(torch, dtype)
    a, b = pt.to_arrays(ours), pf.to_arrays(theirs)
    assert a.keys() == b.keys() == ours.state_dict().keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_loading_writes_into_the_parameters_that_are_there():
    ours, theirs = pair()
    parameters, variable = list(ours.parameters()), theirs.body.layers[0].kernel
    pt.load_arrays(ours, {name: array + 1 for name, array in pt.to_arrays(ours).items()})
    pf.load_arrays(theirs, pt.to_arrays(ours))
    assert all(p is q for p, q in zip(parameters, ours.parameters(), strict=True))
    assert variable is theirs.body.layers[0].kernel
    assert not ours.body[0].weight.is_leaf or ours.body[0].weight.requires_grad


def test_arrays_are_copies():
    ours, theirs = pair()
    for array in pt.to_arrays(ours).values():
        array[...] = 7
    assert not any((p == 7).all() for p in ours.parameters())
    arrays = pt.to_arrays(ours)
    pt.load_arrays(ours, arrays)
    pf.load_arrays(theirs, arrays)
    for array in arrays.values():
        array[...] = 7
    assert not any((p == 7).all() for p in ours.parameters())
    assert not (theirs.body.layers[0].kernel[...] == 7).any()


def test_views_of_any_layout_are_written_as_what_they_show(tmp_path):
    ours, _ = pair()
    with torch.no_grad():
        ours.body[2].weight.data = torch.arange(36.0).reshape(6, 6).T
    pt.save_weights(ours, tmp_path / "w.safetensors")
    loaded = safetensors.numpy.load_file(tmp_path / "w.safetensors")["body.2.weight"]
    np.testing.assert_array_equal(loaded, np.arange(36.0, dtype="float32").reshape(6, 6).T)


def test_an_abstract_flax_model_is_loaded(tmp_path):
    ours, theirs = pair()
    abstract = nnx.eval_shape(lambda: FlaxHeads(nnx.Rngs(0)))
    pf.load_arrays(abstract, pt.to_arrays(ours))
    pf.load_arrays(theirs, pt.to_arrays(ours))
    x = jnp.ones((2, 4), "float32")
    np.testing.assert_array_equal(abstract(x), theirs(x))


def test_files_have_the_rights_that_the_umask_gives(tmp_path):
    old = os.umask(0o022)
    try:
        pt.save_weights(pair()[0], tmp_path / "w.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644


def test_loading_does_not_tie_arrays_to_a_device():
    ours, theirs = pair()
    pf.load_arrays(theirs, pt.to_arrays(ours))
    assert not theirs.body.layers[0].kernel[...].committed


def test_float64_is_not_made_float32_where_jax_has_no_64_bits():
    ours, theirs = pair(dtype="float64")
    before = theirs.body.layers[0].kernel[...]
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"under jax.enable_x64\(True\)"):
        pf.load_arrays(theirs, pt.to_arrays(ours))
    assert (theirs.body.layers[0].kernel[...] == before).all()


def test_a_file_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    pt.save_weights(nn.Linear(2, 2), path)
    sentences = []
    for package, model in zip((pt, pf), pair(), strict=True):
        with pytest.raises(ValueError, match=r"missing: body\.0\.weight") as raised:
            package.load_weights(model, path)
        sentences.append(str(raised.value))
    assert sentences[0] == sentences[1]
    assert str(path) in sentences[0]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    ours, _ = pair()
    path = tmp_path / "w.safetensors"
    pt.save_weights(ours, path)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pt.save_weights(pair()[0], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
