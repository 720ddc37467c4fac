"""Functions and classes that the generated source brings along, since nnx has none of the kind."""

from __future__ import annotations

HELPERS = {
    "adaptive_pool": '''
def adaptive_pool(x, sizes, reduce):
    """Bin i of n reduces from floor(i * length / n) to ceil((i + 1) * length / n), along each spatial axis."""
    for axis, n in enumerate(sizes, start=1):
        length = x.shape[axis]
        bins = [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
        x = jnp.stack([reduce(jax.lax.slice_in_dim(x, *ends, axis=axis), axis=axis) for ends in bins], axis=axis)
    return x
''',
    "attention": '''
def attention(query, key, value, mask=None, is_causal=False, dropout_rng=None, dropout_rate=0.0, **options):
    """Softmax in the dtype of the queries, where nnx takes it in float32; a mask of floats is added."""
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / math.sqrt(query.shape[-1])
    if is_causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf) if mask.dtype == bool else logits + mask
    weights = nnx.softmax(logits)
    if dropout_rng is not None:
        keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)
''',
    "scaled_dot_product_attention": '''
def scaled_dot_product_attention(query, key, value, mask=None, is_causal=False, scale=None):
    """Attention with the heads before the length; a mask of floats is added."""
    logits = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf) if mask.dtype == bool else logits + mask
    return nnx.softmax(logits) @ value
''',
    "resize_linear": '''
def resize_linear(x, sizes, align_corners):
    """Linear interpolation along each spatial axis, between the two nearest."""
    for axis, n in enumerate(sizes, start=1):
        length = x.shape[axis]
        at = jnp.arange(n, dtype=x.dtype)
        at = at * ((length - 1) / max(n - 1, 1)) if align_corners else (at + 0.5) * (length / n) - 0.5
        at = jnp.clip(at, 0, length - 1)
        low = jnp.floor(at).astype(int)
        weight = (at - low).reshape(-1, *[1] * (x.ndim - axis - 1))
        left, right = jnp.take(x, low, axis=axis), jnp.take(x, jnp.minimum(low + 1, length - 1), axis=axis)
        x = left * (1 - weight) + right * weight
    return x
''',
    "resize_nearest": '''
def resize_nearest(x, sizes):
    """Position i of n takes floor(i * length / n), along each spatial axis."""
    for axis, n in enumerate(sizes, start=1):
        x = jnp.take(x, jnp.arange(n) * x.shape[axis] // n, axis=axis)
    return x
''',
    "pool_padding": '''
def pool_padding(x, window, strides, padding):
    """Padding with which the last window of each axis counts even if it is cut off."""
    pairs = []
    for n, k, s, p in zip(x.shape[1:], window, strides, padding):
        windows = -(-(n + 2 * p - k) // s) + 1
        windows -= (windows - 1) * s >= n + p  # one must begin inside
        pairs.append((p, max((windows - 1) * s + k - n - p, 0)))
    return pairs
''',
    "pixel_shuffle": '''
def pixel_shuffle(x, factor):
    """Channels become blocks of factor x factor pixels."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, c // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, h * factor, w * factor, c // factor**2)
''',
    "Buffer": '''
class Buffer(nnx.Variable):
    """State that is not trained."""
''',
    "PReLU": '''
class PReLU(nnx.Module):
    """A slope for each channel."""

    def __init__(self, num_parameters, *, param_dtype=jnp.float32):
        self.weight = nnx.Param(jnp.full((num_parameters,), 0.25, param_dtype))

    def __call__(self, x):
        return jnp.where(x >= 0, x, self.weight[...] * x)
''',
    "GRUCell": '''
class GRUCell(nnx.GRUCell):
    """nnx.GRUCell with a bias of the state's own, which n needs: the reset gate scales it."""

    def __init__(self, in_features, hidden_features, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(in_features, hidden_features, param_dtype=param_dtype, rngs=rngs)
        self.dense_h = nnx.Linear(hidden_features, 3 * hidden_features, param_dtype=param_dtype, rngs=rngs)
''',
    "Stack": '''
class Stack(nnx.Module):
    """Recurrent layers on top of each other; returns the last carries of all layers and directions, and the outputs."""

    def __init__(self, *layers, dropout=None):
        self.layers = nnx.List(layers)
        self.dropout = dropout

    def __call__(self, x, initial_carry=None):
        last = []
        for i, layer in enumerate(self.layers):
            if i > 0 and self.dropout is not None:
                x = self.dropout(x)
            first = None
            if initial_carry is not None:
                n = 2 if isinstance(layer, nnx.Bidirectional) else 1
                own = range(len(last), len(last) + n)
                first = tuple(jax.tree.map(lambda carry, j=j: carry[j], initial_carry) for j in own)
                first = first if n == 2 else first[0]
            carry, x = layer(x, initial_carry=first, return_carry=True)
            last += carry if isinstance(layer, nnx.Bidirectional) else [carry]
        return jax.tree.map(lambda *carries: jnp.stack(carries), *last), x
''',
}
