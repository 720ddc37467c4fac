"""XLA's arithmetic on a CPU, from additions, multiplications and divisions only.

IEEE 754 fixes how those round, and nothing else: torch's square root, logarithm and the like round as the CPU, its
vector width and the place in the array have it. XLA contracts products and sums to fused multiply-adds, on every CPU
that has them. float16 and bfloat16 pass through float32, as in XLA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LN2 = (0.693147180369123816490, 1.90821492927058770002e-10)  # the first has 20 zero bits: its multiples are exact


def scalar(value: float, dtype: torch.dtype) -> float:
    """Rounds a number to a dtype."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Returns a * b + c, rounded once.

    In float16 and bfloat16 the product is rounded too, as XLA does without AVX512-FP16.
    """
    if a.dtype in (torch.float16, torch.bfloat16):
        return a * b + c
    b, c = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=a.dtype, device=a.device) for v in (b, c))
    if a.dtype == torch.float32:
        return (a.double() * b.double() + c.double()).float()  # the product is exact in float64
    product, product_error = _two_product(a, b)
    total, total_error = _two_sum(product, c)
    return total + (total_error + product_error)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a + b and its rounding error (Knuth 1969)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a * b and its rounding error (Dekker 1971)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a into two numbers of 26 bits that add up to it."""
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def divided(x: Tensor, divisor: float) -> Tensor:
    """Divides x by a constant.

    XLA multiplies by the constant's rounded reciprocal, except in bfloat16.
    """
    return x / divisor if x.dtype == torch.bfloat16 else x * scalar(1 / divisor, x.dtype)


def flushed(x: Tensor) -> Tensor:
    """Replaces numbers too small to be normal by zeros.

    Where x has half precision, normal means normal in float32.
    """
    tiny = torch.finfo(torch.promote_types(x.dtype, torch.float32)).tiny
    return torch.where(x.abs() < tiny, torch.zeros_like(x), x)


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Evaluates a polynomial by Horner's rule, highest power first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, coefficient)
    return value


def erf_inv(x: Tensor) -> Tensor:
    """Returns the inverse of erf: x times a polynomial in w = -log(1 - x**2), by ranges of w.

    Giles 2012, "Approximating the erfinv function".
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return erf_inv(x.float()).to(x.dtype)
    w = -log1p(x * -x)
    root = sqrt(w)
    if x.dtype == torch.float32:
        value = torch.where(w < 5.0, polynomial(_ERF_INV_32[0], w - 2.5), polynomial(_ERF_INV_32[1], root - 3.0))
    else:
        tail = torch.where(w < 16.0, polynomial(_ERF_INV_64[1], root - 3.25), polynomial(_ERF_INV_64[2], root - 5.0))
        value = torch.where(w < 6.25, polynomial(_ERF_INV_64[0], w - 3.125), tail)
    return torch.where(x.abs() == 1, x * math.inf, value * x)


def log1p(x: Tensor) -> Tensor:
    """Returns XLA's log1p: Cephes' rational function near 0, log(1 + x) elsewhere."""
    square = x * x
    ratio = polynomial(_LOG1P[0], x) / polynomial(_LOG1P[1], x)
    near = x + fma(square, -0.5, (x * square) * ratio)
    return torch.where(x.abs() < 0.41421356237309504880, near, log(x + 1))


def log(x: Tensor) -> Tensor:
    """Returns XLA's log of positive numbers.

    It is Cephes' logf in float32. In float64, where XLA calls the C library, it is right to 0.6 ULP.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return log(x.float()).to(x.dtype)
    fraction, exponent = torch.frexp(x)
    small = fraction < math.sqrt(0.5)
    power = torch.where(small, exponent - 1, exponent).to(x.dtype)
    f = torch.where(small, (fraction - 1) + fraction, fraction - 1)
    value = _log_32(f, power) if x.dtype == torch.float32 else _log_64(f, power)
    return torch.where(x == 0, -math.inf, value)


def _log_32(f: Tensor, power: Tensor) -> Tensor:
    square, cube = f * f, f * f * f
    a, b, c = (polynomial(_LOG_32[i : i + 3], f) for i in (0, 3, 6))
    value = fma(fma(fma(a, cube, b), cube, c), cube, power * -2.12194440e-4)
    return fma(power, 0.693359375, fma(square, -0.5, f) + value)


def _log_64(f: Tensor, power: Tensor) -> Tensor:
    """Returns log(1 + f) + power log(2), as fdlibm's log, with the rounding errors of its large terms added last."""
    s = f / (2 + f)
    z = s * s
    half_square, half_square_error = _two_product(0.5 * f, f)
    small = s * (half_square + z * _horner(_LOG_64, z)) + power * _LN2[1]
    near, near_error = _two_sum(f, -half_square)
    total, total_error = _two_sum(power * _LN2[0], near)
    return total + (total_error + (near_error - half_square_error + small))


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def sqrt(x: Tensor) -> Tensor:
    """Returns the correctly rounded square root, which torch's is not on every CPU."""
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    root = x.sqrt()
    return torch.where(root > 0, root + fma(-root, root, x) / (2 * root), root)


def erf(x: Tensor) -> Tensor:
    """Returns XLA's erf: a rational function in float32, the C library's in float64."""
    if x.dtype == torch.float64:
        return torch.tensor([math.erf(v) for v in x.flatten().tolist()], dtype=x.dtype, device=x.device).view(x.shape)
    c = x.float().clamp(-3.832506856900711, 3.832506856900711)
    return (c * polynomial(_ERF_32[0], c * c) / polynomial(_ERF_32[1], c * c)).to(x.dtype)


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
_LOG_64 = (
    1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
    2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01,
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
