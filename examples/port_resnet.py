"""Port a ResNet: PyTorch to Flax NNX by machine, and the proof that it is the same function.

    python -m examples.port_resnet             a ResNet-18 on images of 128 x 128
    python -m examples.port_resnet --fast      a narrow one on small images, to see that everything runs

The network is written as people write them, and has random parameters and statistics: those of a fresh network hide
faults, such as zero biases that are swapped. `to_flax_source` writes its twin as source code and `save_weights` its
weights; both are read again. What comes out is a table and a figure of how far the twin is from the network in
float32 and in float64, block by block, in the outputs, and in the gradient of the images: rounding, and no more.
"""

from __future__ import annotations

import argparse
import copy
import math
import runpy
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.syntax import Syntax
from rich.table import Table
from torch import nn

import probly_flax
import probly_torch
from probly_torch.port import port, to_flax_source

LINES = 30  # of the source, to look at


class Block(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = None
        if stride != 1 or channels != out_channels:
            conv = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + identity)


class ResNet18(nn.Module):
    """He et al. 2016, 64 channels wide."""

    def __init__(self, width: int = 64, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(Block(4 * width, 8 * width, 2), Block(8 * width, 8 * width, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


BLOCKS = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
LAYERS = ["conv1", "bn1", *BLOCKS, "fc"]  # in which to compare, by depth
GRADIENT = "gradient of the images"


def randomize(network: nn.Module) -> None:
    """Random parameters and statistics, of a size that keeps activations in range."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(std=math.sqrt(2 / module.weight[0].numel()))
            if isinstance(module, nn.Linear):
                module.bias.normal_()
            if isinstance(module, nn.BatchNorm2d):
                for positive in (module.weight, module.running_var):
                    positive.uniform_(0.5, 1.5)
                for centered in (module.bias, module.running_mean):
                    centered.normal_(std=0.3)


def run_torch(network: nn.Module, images: np.ndarray, weighting: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of the layers, and the gradient of the weighted outputs; channels last, as in Flax."""
    found = {}

    def keep(name: str, output: torch.Tensor) -> None:
        found[name] = np.moveaxis(output.detach().numpy(), 1, -1).copy()  # before ReLU overwrites it

    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in LAYERS
    ]
    x = torch.from_numpy(images).requires_grad_()
    (network(x) * torch.from_numpy(weighting)).sum().backward()
    for hook in hooks:
        hook.remove()
    keep(GRADIENT, x.grad)
    return found


def run_flax(model: nnx.Module, images: np.ndarray, weighting: np.ndarray) -> dict[str, np.ndarray]:
    """The same of the twin, whose layers have the same names."""

    @nnx.jit
    def gradient_and_outputs(model: nnx.Module, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        def loss(model: nnx.Module, x: jax.Array) -> tuple[jax.Array, nnx.State]:
            logits, outputs = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
            return (logits * weighting).sum(), outputs

        return nnx.grad(loss, argnums=1, has_aux=True)(model, x)

    gradient, outputs = gradient_and_outputs(model, np.moveaxis(images, 1, -1))
    flat = nnx.to_flat_state(outputs)
    found = {".".join(map(str, path[:-1])).replace(".layers", ""): np.array(value[0]) for path, value in flat}
    return {name: found[name] for name in LAYERS} | {GRADIENT: np.array(gradient)}


def distances(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference in each array, in units of its largest value."""
    return {name: float(np.abs(a - theirs[name]).max() / np.abs(a).max()) for name, a in ours.items()}


def compare_written(network: nn.Module, images: np.ndarray, weighting: np.ndarray, out: Path) -> dict[str, float]:
    """Builds the twin from the files, as anyone would who has them."""
    twin_class = runpy.run_path(str(out / "model.py"))["ResNet18"]
    twin = nnx.eval_shape(lambda: twin_class(rngs=nnx.Rngs(0)))  # without values, which the file has
    probly_flax.load_weights(twin, out / "weights.safetensors")
    twin.eval()
    return distances(run_torch(network, images, weighting), run_flax(twin, images, weighting))


def compare_live(network: nn.Module, images: np.ndarray, weighting: np.ndarray) -> dict[str, float]:
    """In float64, with the twin that `port` returns, which has proven it once already."""
    network = copy.deepcopy(network).double()
    images, weighting = images.astype(np.float64), weighting.astype(np.float64)
    with jax.enable_x64(True):
        twin = port(network, torch.from_numpy(images))
        return distances(run_torch(network, images, weighting), run_flax(twin, images, weighting))


def print_table(results: dict[str, dict[str, float]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("output of")
    for dtype in results:
        table.add_column(dtype, justify="right")
    for name in (*LAYERS, GRADIENT):
        table.add_row(name, *(f"{result[name]:.1e}" for result in results.values()), end_section=name == LAYERS[-1])
    Console(width=120).print(table)  # whole in a file too, for which rich takes a width of 80


def plot(results: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for (dtype, result), color in zip(results.items(), ("#D55E00", "#0072B2"), strict=True):
        values = [result[name] or np.nan for name in LAYERS]  # equal outputs leave a gap
        panel.plot(LAYERS, values, "o-", color=color, label=dtype)
        panel.axhline(
            np.finfo(dtype).eps / 2, color=color, linewidth=0.8, linestyle=":", label=f"one rounding, {dtype}"
        )
    panel.set(yscale="log", xlabel="layer, by depth", ylabel="largest difference, of the largest value")
    panel.set(title="ResNet-18: how far Flax is from torch")
    panel.tick_params("x", rotation=45)
    panel.legend(fontsize="small", loc="center right")
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Returns how far the twin is from the network, by dtype and layer."""
    parser = argparse.ArgumentParser(description="A ResNet-18 from PyTorch to Flax by machine, and the proof.")
    parser.add_argument("--fast", action="store_true", help="8 channels and images of 33 x 34 instead of 64, 129 x 128")
    parser.add_argument("--seed", type=int, default=42, help="of the parameters, the statistics and the images")
    parser.add_argument(
        "--out", type=Path, default=Path("out/port_resnet"), help="folder of source, weights and figure"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    network = ResNet18(width=8, num_classes=11) if args.fast else ResNet18()
    randomize(network.eval())
    x = torch.randn(2, 3, *((33, 34) if args.fast else (129, 128)))
    images, weighting = x.numpy(), torch.randn(network(x).shape).numpy()

    source = to_flax_source(network, x)
    (args.out / "model.py").write_text(source)
    probly_torch.save_weights(network, args.out / "weights.safetensors")
    lines = source.splitlines()
    Console(width=120).print(Syntax("\n".join(lines[:LINES]), "python", background_color="default"))
    print(f"... and {len(lines) - LINES} lines more.")

    results = {}
    for dtype in track(("float32", "float64"), "Comparing", console=Console(stderr=True)):
        if dtype == "float32":
            results[dtype] = compare_written(network, images, weighting, args.out)
        else:
            results[dtype] = compare_live(network, images, weighting)
    print_table(results)
    print("The largest difference between torch and Flax in each, in units of its largest value.")
    plot(results).savefig(args.out / "differences.png", dpi=150)
    print(f"\nSource, weights and the figure are in {args.out}.")
    return results


if __name__ == "__main__":
    main()
