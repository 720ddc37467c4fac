"""Networks as people write them in torch, small: what the port has to carry over."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def randomized(network: nn.Module) -> nn.Module:
    """Draws random parameters and statistics.

    Those of a fresh network hide faults: zero biases, unit scales, variance 1.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.ndim > 1:
                values *= 1.5 / math.sqrt(tensor[0].numel())
            elif "var" in name:
                values = 0.5 + values.abs()
            elif "weight" in name:
                values = 1 + values / 4
            tensor.copy_(values / 4 if "bias" in name else values)
    return network


class LeNet(nn.Module):
    """LeCun et al. 1998, with what was found since."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 5, padding=2)
        self.conv2 = nn.Conv2d(3, 5, 5)
        self.fc1 = nn.Linear(5 * 3 * 2, 11)
        self.fc2 = nn.Linear(11, 7)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), kernel_size=2, stride=(2, 3))
        x = x.view(x.size(0), -1)
        x = F.dropout(F.relu(self.fc1(x)), p=0.5, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class VGG(nn.Module):
    """Simonyan and Zisserman 2015: everything in nn.Sequential."""

    def __init__(self, widths=(3, "M", 5, 5, "M", 7)):
        super().__init__()
        layers, channels = [], 3
        for width in widths:
            if width == "M":
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 3))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * 6, 11), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(11, 5)
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)))


class BasicBlock(nn.Module):
    """He et al. 2016."""

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """He et al. 2016."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        return self.relu(out + identity)


class ResNet(nn.Module):
    """He et al. 2016, as in torchvision, narrower."""

    def __init__(self, block, layers, width=2, num_classes=5):
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, width, layers[0])
        self.layer2 = self._make_layer(block, width * 2, layers[1], stride=2)
        self.layer3 = self._make_layer(block, width * 3, layers[2], stride=2)
        self.layer4 = self._make_layer(block, width * 4, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width * 4 * block.expansion, num_classes)

    def _make_layer(self, block, planes, blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * block.expansion
        return nn.Sequential(*layers, *(block(self.inplanes, planes) for _ in range(1, blocks)))

    def _forward_impl(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x):
        return self._forward_impl(x)


class DenseLayer(nn.Module):
    """Huang et al. 2017."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1)

    def forward(self, features):
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    """Huang et al. 2017: each layer sees all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.block = nn.ModuleList(DenseLayer(4 + 3 * i, 3) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 6, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.block:
            features.append(layer(features))
        x = self.transition(torch.cat(features, dim=1))
        return self.head(x.mean([2, 3]))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self, inp, oup, stride, expand_ratio):
        super().__init__()
        hidden = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden, eps=1e-3, momentum=0.03),
            nn.Hardswish(inplace=True),
            SqueezeExcite(hidden),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class SqueezeExcite(nn.Module):
    """Hu et al. 2018, by way of a linear layer."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        b, c, _, _ = x.shape
        scale = x.mean((2, 3)).view(b, c)
        return x * F.hardsigmoid(self.fc(scale))[:, :, None, None]


class MobileNet(nn.Module):
    """Sandler et al. 2018: depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.blocks = nn.Sequential(
            InvertedResidual(4, 4, 1, 2), InvertedResidual(4, 6, 2, 3), InvertedResidual(6, 6, 1, 2)
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).squeeze(-1).squeeze(-1))


class DoubleConv(nn.Sequential):
    """A class of nn.Sequential without a forward of its own."""

    def __init__(self, channels, features):
        super().__init__(
            nn.Conv2d(channels, features, 3, padding=1),
            nn.GroupNorm(1, features),
            nn.GELU(),
            nn.Conv2d(features, features, 3, padding=1),
            nn.InstanceNorm2d(features, affine=True),
            nn.SiLU(),
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015: pads what does not fit, as the sizes of the image make it."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.bottom = DoubleConv(3, 3), DoubleConv(3, 5), DoubleConv(5, 7)
        self.up2, self.conv2 = nn.ConvTranspose2d(7, 5, 2, stride=2), DoubleConv(10, 5)
        self.up1, self.conv1 = nn.ConvTranspose2d(5, 3, 3, stride=2, padding=1, output_padding=1), DoubleConv(6, 3)
        self.out = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x1 = self.down1(x)
        x2 = self.down2(F.max_pool2d(x1, 2))
        x = self.bottom(F.avg_pool2d(x2, 2))
        x = self._join(self.up2(x), x2)
        x = self.conv2(x)
        x = self.conv1(self._join(self.up1(x), x1))
        return self.out(x) + F.interpolate(x2[:, :2], size=x1.shape[2:], mode="bilinear", align_corners=False)

    def _join(self, x, skip):
        dh, dw = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        return torch.cat([skip, F.pad(x, [dw // 2, dw - dw // 2, dh // 2, dh - dh // 2])], dim=1)


class Attention(nn.Module):
    """As in timm: one projection for queries, keys and values."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x):
        B, N, C = x.shape  # noqa: N806
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class ViTBlock(nn.Module):
    """Dosovitskiy et al. 2021."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(3 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021."""

    def __init__(self, dim=6, depth=3):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 5, stride=5)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 7, dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, 2) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        return self.head(self.norm(x)[:, 0])


class BERT(nn.Module):
    """Devlin et al. 2019, on torch's own encoder."""

    def __init__(self, dim=6, depth=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, dim, padding_idx=0), nn.Embedding(11, dim)
        self.register_buffer("position_ids", torch.arange(11)[None], persistent=False)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        layer = nn.TransformerEncoderLayer(dim, 3, 2 * dim, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.pooler = nn.Linear(dim, dim)

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.positions(self.position_ids[:, : input_ids.size(1)])
        x = self.encoder(self.norm(x), src_key_padding_mask=input_ids == 0)
        return x, torch.tanh(self.pooler(x[:, 0]))


class Classifier(nn.Module):
    """Words to a class, by the last state of an LSTM."""

    def __init__(self, cell=nn.LSTM, **options):
        super().__init__()
        self.embedding = nn.Embedding(13, 5)
        self.rnn = cell(5, 4, batch_first=True, **options)
        self.fc = nn.Linear(4 * (1 + self.rnn.bidirectional), 3)

    def forward(self, ids):
        out, state = self.rnn(self.embedding(ids))
        h = state[0] if isinstance(self.rnn, nn.LSTM) else state
        h = torch.cat([h[-2], h[-1]], dim=1) if self.rnn.bidirectional else h[-1]
        return self.fc(h), self.fc(out.max(dim=1).values)


def mlp() -> nn.Module:
    """Makes the smallest network."""
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7), nn.Softplus(), nn.Linear(7, 3))


def images(*shape: int) -> Tensor:
    """Draws random images."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tokens(rows: int, length: int) -> Tensor:
    """Draws random ids. The rows end in padding."""
    ids = torch.randint(1, 13, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, -2:] = 0
    return ids


NETWORKS = {
    "MLP": (mlp, images(4, 5)),
    "LeNet": (LeNet, images(3, 1, 21, 20)),
    "VGG": (VGG, images(2, 3, 13, 10)),
    "ResNet-18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2)), images(2, 3, 33, 30)),
    "ResNet-50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), images(2, 3, 32, 32)),
    "DenseNet": (DenseNet, images(2, 3, 9, 11)),
    "MobileNet": (MobileNet, images(2, 3, 12, 9)),
    "UNet": (UNet, images(2, 3, 13, 10)),
    "ViT": (ViT, images(3, 3, 17, 12)),
    "BERT": (BERT, tokens(3, 7)),
    "LSTM": (Classifier, tokens(3, 7)),
    "GRU": (lambda: Classifier(nn.GRU, bidirectional=True), tokens(3, 7)),
    "stacked LSTM": (lambda: Classifier(nn.LSTM, num_layers=2, dropout=0.2, bidirectional=True), tokens(3, 6)),
    "RNN": (lambda: Classifier(nn.RNN, num_layers=3, nonlinearity="relu"), tokens(2, 5)),
}
