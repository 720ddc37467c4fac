"""Random numbers: the twin of `jax.random` with its default threefry keys, and of `flax.nnx.Rngs`.

The same key gives the same bits in both frameworks, so that layers drawn from the same seed start equal.
A key is a tensor of two words, `[..., 2]`, equal to `jax.random.key_data(key)`: int64 because uint32 has
neither arithmetic nor pickling in torch. Draws are made on the key's device.

JAX's default dtypes are 64 bits under `jax_enable_x64`, and torch's follow `torch.set_default_dtype`: name the dtype
where the bits matter. Twin of jax 0.10 with `jax_threefry_partitionable=True` (its default). The bits are those of
Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probly_torch._checks import MAX_SEED, check_seed, index, type_name

__all__ = [
    "RngStream",
    "Rngs",
    "bernoulli",
    "bits",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "split",
    "truncated_normal",
    "uniform",
]

_WORD = 0xFFFFFFFF  # the low 32 bits: words are kept in int64, where sums and shifts do not overflow
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
_UINTS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}


def key(seed: int) -> Tensor:
    """A key from a seed of 32 bits: `[2]`, equal to `jax.random.key_data(jax.random.key(seed))`.

    Raises:
        ValueError: for a seed that JAX would keep only in part, depending on `jax_enable_x64`.

    Example:
        >>> key(7)
        tensor([0, 7])
    """
    return torch.tensor([0, check_seed("key", seed)], device="cpu")


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and 32 bits of data, such as a step or a member's number.

    Shape:
        key `[..., 2]`, data an int or `[...]`. Returns `[..., 2]`.

    Example:
        >>> fold_in(key(0), 3).tolist() == fold_in(key(0), torch.tensor(3)).tolist()
        True
    """
    _check_key("fold_in", key)
    if not isinstance(data, Tensor):
        number = index(data)
        if number is None or not 0 <= number < MAX_SEED:
            raise ValueError(f"fold_in expects data from 0 to 2**32 - 1; got {data!r}. Pass data % 2**32.")
        data = torch.tensor(number, device=key.device)
    words = data.to(torch.int64) & _WORD
    return torch.stack(_threefry(key[..., 0], key[..., 1], torch.zeros_like(words), words), -1)


def split(key: Tensor, num: int | Sequence[int] = 2) -> Tensor:
    """New keys from one key: `[num, 2]`, or `[*num, 2]`.

    Example:
        >>> split(key(0), 3).shape
        torch.Size([3, 2])
    """
    _check_key("split", key, single=True)
    return torch.stack(_counted(key, (num,) if isinstance(num, int) else tuple(num)), -1)


def bits(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.uint32) -> Tensor:
    """Uniform random bits as unsigned integers of 8, 16, 32 or 64 bits.

    Example:
        >>> bits(key(0), (2,))
        tensor([4070199207, 4202968722], dtype=torch.uint32)
    """
    _check_key("bits", key, single=True)
    if dtype not in _UINTS.values():
        raise TypeError(f"bits expects an unsigned integer dtype; got {dtype}. Pass dtype=torch.uint32.")
    high, low = _counted(key, tuple(shape))
    if dtype == torch.uint64:
        return ((high << 32) | low).view(torch.uint64)
    return ((high ^ low) & torch.iinfo(dtype).max).to(dtype)


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    minval: float = 0.0,
    maxval: float = 1.0,
) -> Tensor:
    """Uniform numbers in [minval, maxval), by default of torch's default dtype.

    Example:
        >>> uniform(key(0), (2,))
        tensor([0.9477, 0.9786])
    """
    _check_key("uniform", key, single=True)
    dtype = _float_dtype("uniform", dtype)
    lo, hi = (torch.tensor(v, dtype=dtype, device=key.device) for v in (minval, maxval))
    return torch.maximum(lo, _fma(_unit(key, shape, dtype), hi - lo, lo))


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal numbers, by inversion: sqrt(2) * erf_inv(u) of u uniform in (-1, 1).

    Equal to JAX's on a CPU: float32 bit for bit, float64 to 2 ULP but for one number in a million, which is
    3 ULP off where XLA's logarithm and torch's round apart.

    Example:
        >>> normal(key(0), (2,))
        tensor([1.6226, 2.0253])
    """
    dtype = _float_dtype("normal", dtype)
    below, zero = torch.tensor([-1.0, 0.0], dtype=dtype, device="cpu")
    lo = torch.nextafter(below, zero).item()
    return _sqrt2(dtype) * _erf_inv(uniform(key, shape, dtype, lo, 1.0))


def truncated_normal(
    key: Tensor,
    lower: float,
    upper: float,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal numbers conditioned on the open interval (lower, upper).

    Example:
        >>> truncated_normal(key(0), -2.0, 2.0, (3,)).abs().max() < 2
        tensor(True)
    """
    dtype = _float_dtype("truncated_normal", dtype)
    lo, hi = torch.tensor([lower, upper], dtype=dtype, device="cpu")
    if not lo < hi:
        raise ValueError(f"truncated_normal expects lower < upper; got {lower}, {upper}. Pass lower=-2.0, upper=2.0.")
    a, b = (_erf(v / _sqrt2(dtype)).item() for v in (lo, hi))
    infinity = torch.tensor(math.inf, dtype=dtype, device="cpu")
    draws = _sqrt2(dtype) * _erf_inv(uniform(key, shape or (), dtype, a, b))
    return draws.clamp(torch.nextafter(lo, infinity).item(), torch.nextafter(hi, -infinity).item())


def bernoulli(
    key: Tensor,
    p: float | Tensor = 0.5,
    shape: Sequence[int] | None = None,
    mode: str = "low",
) -> Tensor:
    """True with probability p: `shape`, by default the shape of p.

    mode="high" draws twice the bits, for p below 1e-7.

    Example:
        >>> bernoulli(key(0), 0.25, (4,))
        tensor([False, False, False, False])
    """
    _check_key("bernoulli", key, single=True)
    if mode not in ("low", "high"):
        raise ValueError(f"bernoulli expects mode to be 'low' or 'high'; got {mode!r}. Pass mode='low'.")
    p = torch.as_tensor(p, device=key.device)
    if not p.is_floating_point():
        raise TypeError(f"bernoulli expects a floating p; got {p.dtype}. Pass a float, p=0.5.")
    shape = tuple(p.shape if shape is None else shape)
    if mode == "low":
        return _unit(key, shape, p.dtype) < p
    coarse, fine = _unit(key, (2, *shape), p.dtype)
    return fine * 2.0 ** -_MANTISSA[p.dtype] < p - coarse


def permutation(key: Tensor, x: int | Tensor, axis: int = 0, independent: bool = False) -> Tensor:
    """A random permutation of `range(x)`, or of the slices of x along an axis.

    independent=True shuffles each vector along the axis on its own.

    Example:
        >>> permutation(key(0), 5)
        tensor([0, 1, 4, 3, 2])
    """
    _check_key("permutation", key, single=True)
    number = None if isinstance(x, Tensor) and x.ndim else index(x.item() if isinstance(x, Tensor) else x)
    if number is not None:
        return _shuffle(key, torch.arange(number, device=key.device), 0)
    if not isinstance(x, Tensor) or not x.ndim:
        raise TypeError(f"permutation expects an int or a tensor with an axis; got {type_name(x)}. Pass x=10.")
    if independent or x.ndim == 1:
        return _shuffle(key, x, axis)
    return x.index_select(axis, _shuffle(key, torch.arange(x.shape[axis], device=key.device), 0).to(x.device))


class RngStream:
    """A key and a count: each call folds the count into the key and adds one.

    Both are tensors, so a stream is copied, pickled, compiled and moved like any other state. A stream made
    by `split(n)` holds n keys and gives n at each call, what each of n lanes of `nnx.vmap` gets.

    Example:
        >>> stream = RngStream(0, tag="params")
        >>> stream().tolist() == fold_in(key(0), 0).tolist(), int(stream.count)
        (True, 1)
    """

    def __init__(self, key: int | Tensor, *, tag: str) -> None:
        self.tag = tag
        self.key = key.clone() if isinstance(key, Tensor) else globals()["key"](key)
        _check_key("RngStream", self.key)
        self.count = torch.zeros(self.key.shape[:-1], dtype=torch.int64, device=self.key.device)

    def __call__(self) -> Tensor:
        """The next key."""
        key = fold_in(self.key, self.count)
        self.count.add_(1)
        return key

    def split(self, k: int | Sequence[int]) -> RngStream:
        """A stream of `[*k, 2]` keys, split from this stream's next key."""
        return RngStream(split(self(), k), tag=self.tag)

    def fork(self, *, split: int | Sequence[int] | None = None) -> RngStream:
        """A stream with a key of its own, this stream's next one, split if asked."""
        return RngStream(self(), tag=self.tag) if split is None else self.split(split)

    def to(self, device: torch.device | str) -> RngStream:
        """Moves key and count, in place."""
        self.key, self.count = self.key.to(device), self.count.to(device)
        return self


class Rngs:
    """Named streams of keys: the twin of `flax.nnx.Rngs`.

    `Rngs(0, params=1)` has the streams `default` and `params`; `rngs.params()` gives the next key of that
    stream, `rngs()` and every other name the next of `default`.

    Args:
        default: seed, key or stream of `default`; or a mapping of names to them.
        rngs: seed, key or stream of each other name.

    Example:
        >>> rngs = Rngs(0, params=1)
        >>> rngs.params().tolist() == fold_in(key(1), 0).tolist()
        True
        >>> [rngs.dropout().tolist(), rngs().tolist()] == [fold_in(key(0), 0).tolist(), fold_in(key(0), 1).tolist()]
        True
    """

    def __init__(
        self,
        default: int | Tensor | RngStream | Mapping[str, int | Tensor | RngStream] | None = None,
        **rngs: int | Tensor | RngStream,
    ) -> None:
        if isinstance(default, Mapping):
            rngs = {**default, **rngs}
        elif default is not None:
            rngs["default"] = default
        for tag, value in rngs.items():
            setattr(self, tag, RngStream(value.key if isinstance(value, RngStream) else value, tag=tag))

    def _stream(self, name: str, error: type[Exception]) -> RngStream:
        streams = vars(self)
        if name not in streams and "default" not in streams:
            raise error(
                f"Rngs expects a stream named {name!r} or 'default'; got {sorted(streams)}. Build it with Rngs(0), "
                f"or Rngs({name}=0)."
            )
        return streams.get(name) or streams["default"]

    def __getattr__(self, name: str) -> RngStream:
        if name.startswith("__") and name.endswith("__"):  # copy and pickle ask for these
            raise AttributeError(name)
        return self._stream(name, AttributeError)

    def __getitem__(self, name: str) -> RngStream:
        return self._stream(name, KeyError)

    def __call__(self) -> Tensor:
        """The next key of `default`."""
        return self.default()

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))

    def __contains__(self, name: object) -> bool:
        return name in vars(self)

    def items(self) -> Iterator[tuple[str, RngStream]]:
        """Pairs of name and stream."""
        return iter(vars(self).items())

    def _map(self, make: Callable[[RngStream], RngStream]) -> Rngs:
        new = Rngs()
        for name, stream in self.items():
            setattr(new, name, make(stream))
        return new

    def split(self, k: int | Sequence[int]) -> Rngs:
        """Streams of k keys each, one for each of k members."""
        return self._map(lambda stream: stream.split(k))

    def fork(self, *, split: int | Sequence[int] | None = None) -> Rngs:
        """Streams with keys of their own, each split into `split` keys if asked."""
        return self._map(lambda stream: stream.fork(split=split))

    def to(self, device: torch.device | str) -> Rngs:
        """Moves every stream, in place."""
        for _, stream in self.items():
            stream.to(device)
        return self


def as_rngs(what: str, rngs: Any) -> Rngs:
    """`rngs` itself, or the Rngs of a seed."""
    return rngs if isinstance(rngs, Rngs) else Rngs(check_seed(what, rngs))


def draw_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision weights are drawn in float32 and rounded: JAX's own draws of them have 7 or 10 random bits."""
    return torch.promote_types(dtype, torch.float32)


def lecun_normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`jax.nn.initializers.lecun_normal` for a kernel `(..., in, out)`: truncated normal, variance 1 / (... in)."""
    variance, truncation = torch.tensor([1 / math.prod(shape[:-1]), 0.87962566103423978], dtype=dtype, device="cpu")
    std = (variance.sqrt() / truncation).item()
    return truncated_normal(key, -2.0, 2.0, shape, dtype) * std


def _check_key(what: str, key: Any, single: bool = False) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape[-1:] != (2,) or (single and key.ndim != 1):
        got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else type_name(key)
        raise TypeError(f"{what} expects a key, int64 words of shape [2]; got {got}. Make one: key(0), or Rngs(0)().")


def _float_dtype(what: str, dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in _BITS:
        raise TypeError(f"{what} expects a floating dtype of 16, 32 or 64 bits; got {dtype}. Pass dtype=torch.float32.")
    return dtype


def _threefry(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32, 20 rounds: five groups of four rotations, a key injected after each."""
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = (x0 + keys[0]) & _WORD, (x1 + keys[1]) & _WORD
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _WORD
            x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & _WORD) ^ x0
        x0 = (x0 + keys[(group + 1) % 3]) & _WORD
        x1 = (x1 + keys[(group + 2) % 3] + group + 1) & _WORD
    return x0, x1


def _counted(key: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The two words of each counter 0, 1, 2, ... laid out in `shape`."""
    counts = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    return _threefry(key[0], key[1], counts >> 32, counts & _WORD)


def _shuffle(key: Tensor, x: Tensor, axis: int) -> Tensor:
    """Sorts by random words until ties are unlikely, as jax.random.permutation does."""
    rounds = math.ceil(3 * math.log(max(1, x.numel())) / math.log(_WORD))
    for _ in range(rounds):
        key, subkey = split(key)
        high, low = _counted(subkey, tuple(x.shape))
        order = torch.sort(high ^ low, dim=axis, stable=True).indices
        x = x.gather(axis, order.to(x.device))
    return x


def _unit(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uniform multiples of 2**-mantissa in [0, 1): random mantissas under a fixed exponent."""
    high, low = _counted(key, tuple(shape))
    mantissa = _MANTISSA[dtype]
    if dtype == torch.float64:
        random_bits = (high << 20) | (low >> 12)
    else:
        width = 8 if mantissa < 8 else _BITS[dtype]
        random_bits = ((high ^ low) & ((1 << width) - 1)) >> (width - mantissa)
    return random_bits.to(dtype) * 2.0**-mantissa


def _sqrt2(dtype: torch.dtype) -> float:
    return torch.tensor(math.sqrt(2.0), dtype=dtype, device="cpu").item()


# The rest reproduces XLA's arithmetic on a CPU, where products and sums contract to fused multiply-adds.
# float16 and bfloat16 pass through float32, as there.


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c, rounded once; bfloat16 rounds the product too, as in XLA."""
    if a.dtype == torch.bfloat16:
        return a * b + c
    b, c = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=a.dtype, device=a.device) for v in (b, c))
    if a.dtype != torch.float64:
        return (a.double() * b.double() + c.double()).to(a.dtype)  # the product is exact in float64
    product, total = a * b, a * b + c
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    product_error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    virtual = total - product
    return total + (((product - (total - virtual)) + (c - virtual)) + product_error)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of 26 bits that add up to a (Dekker 1971)."""
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule, highest power first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _erf_inv(x: Tensor) -> Tensor:
    """Giles 2012, "Approximating the erfinv function": a polynomial in w = -log(1 - x**2), by ranges of w."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return _erf_inv(x.float()).to(x.dtype)
    w = -_log1p(x * -x)
    if x.dtype == torch.float32:
        center, tail = _polynomial(_ERF_INV_32[0], w - 2.5), _polynomial(_ERF_INV_32[1], _sqrt(w) - 3.0)
        value = torch.where(w < 5.0, center, tail)
    else:
        center = _polynomial(_ERF_INV_64[0], w - 3.125)
        tail = _polynomial(_ERF_INV_64[1], _sqrt(w) - 3.25)
        far_tail = _polynomial(_ERF_INV_64[2], _sqrt(w) - 5.0)
        value = torch.where(w < 6.25, center, torch.where(w < 16.0, tail, far_tail))
    return torch.where(x.abs() == 1, x * math.inf, value * x)


def _log1p(x: Tensor) -> Tensor:
    """XLA's log1p: Cephes' rational function near 0, log(1 + x) elsewhere."""
    square = x * x
    ratio = _polynomial(_LOG1P[0], x) / _polynomial(_LOG1P[1], x)
    near = x + _fma(square, -0.5, (x * square) * ratio)
    return torch.where(x.abs() < 0.41421356237309504880, near, _log(x + 1))


def _log(x: Tensor) -> Tensor:
    """XLA's float32 log (Cephes' logf); torch's for float64."""
    if x.dtype == torch.float64:
        return x.log()
    fraction, exponent = torch.frexp(x)
    small = fraction < math.sqrt(0.5)
    power = torch.where(small, exponent - 1, exponent).to(x.dtype)
    f = torch.where(small, (fraction - 1) + fraction, fraction - 1)
    square, cube = f * f, f * f * f
    a, b, c = (_polynomial(_LOG_32[i : i + 3], f) for i in (0, 3, 6))
    value = _fma(_fma(_fma(a, cube, b), cube, c), cube, power * -2.12194440e-4)
    return _fma(power, 0.693359375, _fma(square, -0.5, f) + value)


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root, which torch's is not on every CPU."""
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    root = x.sqrt()
    return torch.where(root > 0, root + _fma(-root, root, x) / (2 * root), root)


def _erf(x: Tensor) -> Tensor:
    """XLA's erf of one number."""
    if x.dtype == torch.float64:
        return torch.tensor(math.erf(x.item()), dtype=x.dtype, device="cpu")
    c = x.float().clamp(-3.832506856900711, 3.832506856900711)
    return (c * _polynomial(_ERF_32[0], c * c) / _polynomial(_ERF_32[1], c * c)).to(x.dtype)


# fmt: off
_ERF_INV_32 = (
    (
        2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
        -0.00417768164, 0.246640727, 1.50140941,
    ),
    (
        -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
        1.00167406, 2.83297682,
    ),
)
_ERF_INV_64 = (
    (
        -3.6444120640178196996e-21, -1.685059138182016589e-19, 1.2858480715256400167e-18, 1.115787767802518096e-17,
        -1.333171662854620906e-16, 2.0972767875968561637e-17, 6.6376381343583238325e-15, -4.0545662729752068639e-14,
        -8.1519341976054721522e-14, 2.6335093153082322977e-12, -1.2975133253453532498e-11,
        -5.4154120542946279317e-11, 1.051212273321532285e-09, -4.1126339803469836976e-09, -2.9070369957882005086e-08,
        4.2347877827932403518e-07, -1.3654692000834678645e-06, -1.3882523362786468719e-05, 0.0001867342080340571352,
        -0.00074070253416626697512, -0.0060336708714301490533, 0.24015818242558961693, 1.6536545626831027356,
    ),
    (
        2.2137376921775787049e-09, 9.0756561938885390979e-08, -2.7517406297064545428e-07, 1.8239629214389227755e-08,
        1.5027403968909827627e-06, -4.013867526981545969e-06, 2.9234449089955446044e-06, 1.2475304481671778723e-05,
        -4.7318229009055733981e-05, 6.8284851459573175448e-05, 2.4031110387097893999e-05, -0.0003550375203628474796,
        0.00095328937973738049703, -0.0016882755560235047313, 0.0024914420961078508066, -0.0037512085075692412107,
        0.005370914553590063617, 1.0052589676941592334, 3.0838856104922207635,
    ),
    (
        -2.7109920616438573243e-11, -2.5556418169965252055e-10, 1.5076572693500548083e-09,
        -3.7894654401267369937e-09, 7.6157012080783393804e-09, -1.4960026627149240478e-08, 2.9147953450901080826e-08,
        -6.7711997758452339498e-08, 2.2900482228026654717e-07, -9.9298272942317002539e-07, 4.5260625972231537039e-06,
        -1.9681778105531670567e-05, 7.5995277030017761139e-05, -0.00021503011930044477347,
        -0.00013871931833623122026, 1.0103004648645343977, 4.8499064014085844221,
    ),
)
_LOG1P = (
    (
        4.5270000862445199635215e-5, 4.9854102823193375972212e-1, 6.5787325942061044846969e0,
        2.9911919328553073277375e1, 6.0949667980987787057556e1, 5.7112963590585538103336e1,
        2.0039553499201281259648e1,
    ),
    (
        1.0, 1.5062909083469192043167e1, 8.3047565967967209469434e1, 2.2176239823732856465394e2,
        3.0909872225312059774938e2, 2.1642788614495947685003e2, 6.0118660497603843919306e1,
    ),
)
_LOG_32 = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)
_ERF_32 = (
    (
        0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084,
    ),
    (
        -1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667,
        0.11098505178285362, 0.49746925110067538, 1.0,
    ),
)
# fmt: on
