"""Inputs whose rows, axes or members are not those that are expected."""

from functools import cache

from parity_tests.suite.sentences.frameworks import FLAX, TORCH, deep, model, network
from parity_tests.suite.sentences.harness import Row
from parity_tests.suite.sentences.layers import layer


@cache
def plain(f):
    return layer(f)


def images(shape, next_step, framework):
    """Returns a row of images that are given to a network of three channels."""
    layout = "[num_members*B, in_channels, H, W] (channels first)"
    if framework is FLAX:
        layout = "[num_members*B, H, W, in_channels] (channels last)"
    sentence = f"inputs of shape {layout} with num_members=3, in_channels=3; got ... {next_step}"
    return Row(lambda f: model(f, "cnn")(f.zeros(*shape)), ValueError, sentence, (framework,))


CHANNELS = "build the layer from one of as many channels: Conv(4, ...)."
ROWS = {
    "channels last in torch": images((2, 6, 7, 3), "If axis -1 holds the channels, move it: x.movedim(-1, 1).", TORCH),
    "channels first in Flax": images(
        (2, 3, 6, 7), "If axis 1 holds the channels, move it: jnp.moveaxis(x, 1, -1).", FLAX
    ),
    "four channels in torch": images((2, 4, 6, 7), CHANNELS, TORCH),
    "four channels in Flax": images((2, 6, 7, 4), CHANNELS, FLAX),
    "one image in torch": images((3, 6, 7), "call tile_members(x[None], 3).", TORCH),
    "one image in Flax": images((6, 7, 3), "call tile_members(x[None], 3).", FLAX),
    "flat images in torch": images((2, 18), "Give it these axes: x.reshape(-1, 3, H, W).", TORCH),
    "flat images in Flax": images((2, 18), "Give it these axes: x.reshape(-1, H, W, 3).", FLAX),
    "rows that do not divide": Row(  # the sentence in full
        lambda f: plain(f)(f.zeros(30, 16)),
        ValueError,
        "BatchEnsembleLinear expects inputs of shape [num_members*B, ..., in_features] with num_members=4, "
        "in_features=16; got (30, 16), whose 30 rows do not divide by 4. To give every member the same batch, call "
        "tile_members(x, 4).",
    ),
    "one row": Row(lambda f: plain(f)(f.zeros(1, 16)), ValueError, "call tile_members(x, 4)."),
    "wrong last axis": Row(lambda f: plain(f)(f.zeros(8, 15)), ValueError, "in_features=15."),
    "rank 1": Row(lambda f: plain(f)(f.zeros(16)), ValueError, "call tile_members(x[None], 4)."),
    "a scalar as rows": Row(
        lambda f: f.package.functional.batch_ensemble_linear(f.zeros(), f.zeros(3, 3), f.zeros(2, 3), f.zeros(2, 3)),
        ValueError,
        "call tile_members(x[None], 2).",
    ),
    "tile a scalar": Row(lambda f: f.package.tile_members(f.zeros(), 2), ValueError, "Add the axis: x[None]."),
    "tile to none": Row(lambda f: f.package.tile_members(f.zeros(3), 0), ValueError, "Pass num_members=4."),
    "split unevenly": Row(lambda f: f.package.split_members(f.zeros(7, 2), 3), ValueError, "given tile_members(x, 3)."),
    "in_axes 1": Row(lambda f: deep(f)(f.zeros(3, 5, 5), in_axes=1), ValueError, "model(x, in_axes=0)."),
    "batch each of the wrong count": Row(
        lambda f: deep(f)(f.zeros(5, 2, 5), in_axes=0), ValueError, "leave in_axes out: model(x)."
    ),
    "chunk_size 0": Row(lambda f: f.package.ensemble(network(f), 3, chunk_size=0), ValueError, "Pass chunk_size=1."),
    "MLP, features": Row(lambda f: model(f, "mlp")(f.zeros(4, 6)), ValueError, "a Linear layer with in_features=6."),
    "MLP, rows": Row(lambda f: model(f, "mlp").network(f.zeros(4, 5)), ValueError, "call tile_members(x, 3)."),
    "MLP, one input": Row(lambda f: model(f, "mlp")(f.zeros(5)), ValueError, "call tile_members(x[None], 3)."),
    "MLP, members": Row(
        lambda f: model(f, "mlp")(f.zeros(4, 2, 5), in_axes=0), ValueError, "leave in_axes out: model(x)."
    ),
    "MLP, no input": Row(lambda f: model(f, "mlp")(), TypeError, "Pass the arrays themselves: model(x)."),
    "LSTM, rows": Row(
        lambda f: model(f, "lstm").network(f.zeros(4, 5, dtype="int32")), ValueError, "call tile_members(x, 3)."
    ),
    "LSTM, one sequence": Row(
        lambda f: model(f, "lstm")(f.zeros(5, dtype="int32")), ValueError, "call tile_members(x[None], 3)."
    ),
    "LSTM, no tokens": Row(lambda f: model(f, "lstm")(f.zeros(2, 5)), TypeError, "for one-hot vectors, x.argmax(-1)."),
    "encoder, features": Row(
        lambda f: model(f, "encoder")(f.zeros(2, 5, 6)),
        ValueError,
        "build the layer from one whose query has 6 features.",
    ),
    "encoder, rows": Row(
        lambda f: model(f, "encoder").network(f.zeros(4, 5, 8)), ValueError, "call tile_members(query, 3)."
    ),
    "encoder, one mask for all rows": Row(
        lambda f: model(f, "encoder")(f.zeros(2, 5, 8), mask=f.zeros(5, 5)), ValueError, "mask.expand(len(x), -1, -1)."
    ),
}
