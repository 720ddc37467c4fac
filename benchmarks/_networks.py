"""Two networks to convert, in both frameworks: a ResNet-18 for small images (He et al. 2016), a Transformer encoder."""

from typing import Any


def torch_networks(width: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """By name: the network, and the shape of one input."""
    from torch import Tensor, nn
    from torch.nn.functional import relu

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.shortcut = nn.Sequential()
            if stride > 1 or inputs != outputs:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
            return relu(y + self.shortcut(x))

    widths = [width * factor for factor in (1, 1, 2, 4, 8)]
    blocks = [
        Block(i if first else o, o, stride if first else 1)
        for i, o, stride in zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        for first in (True, False)
    ]
    stem = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    resnet = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    layer = nn.TransformerEncoderLayer(2 * width, 4, 8 * width, dropout=0.0, batch_first=True)
    return {"ResNet-18": (resnet, (3, 32, 32)), "Transformer": (nn.TransformerEncoder(layer, 4), (64, 2 * width))}


def flax_networks(width: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    import jax
    from flax import nnx

    rngs = nnx.Rngs(0)

    def conv(inputs: int, outputs: int, size: int, stride: int) -> nnx.Conv:
        padding = size // 2
        return nnx.Conv(inputs, outputs, (size, size), stride, padding=padding, use_bias=False, rngs=rngs)

    class Block(nnx.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nnx.BatchNorm(outputs, rngs=rngs)
            self.conv2, self.bn2 = conv(outputs, outputs, 3, 1), nnx.BatchNorm(outputs, rngs=rngs)
            self.shortcut = nnx.Sequential()
            if stride > 1 or inputs != outputs:
                self.shortcut = nnx.Sequential(conv(inputs, outputs, 1, stride), nnx.BatchNorm(outputs, rngs=rngs))

        def __call__(self, x: jax.Array) -> jax.Array:
            y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
            return nnx.relu(y + self.shortcut(x))

    class EncoderLayer(nnx.Module):
        def __init__(self, size: int) -> None:
            self.attention = nnx.MultiHeadAttention(4, size, decode=False, rngs=rngs)
            self.norm1, self.norm2 = nnx.LayerNorm(size, rngs=rngs), nnx.LayerNorm(size, rngs=rngs)
            self.linear1, self.linear2 = nnx.Linear(size, 4 * size, rngs=rngs), nnx.Linear(4 * size, size, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))

    widths = [width * factor for factor in (1, 1, 2, 4, 8)]
    blocks = [
        Block(i if first else o, o, stride if first else 1)
        for i, o, stride in zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        for first in (True, False)
    ]
    stem = conv(3, width, 3, 1), nnx.BatchNorm(width, rngs=rngs), nnx.relu
    resnet = nnx.Sequential(*stem, *blocks, lambda x: x.mean((1, 2)), nnx.Linear(widths[-1], 10, rngs=rngs))
    encoder = nnx.Sequential(*(EncoderLayer(2 * width) for _ in range(4)))
    return {"ResNet-18": (resnet, (32, 32, 3)), "Transformer": (encoder, (64, 2 * width))}
