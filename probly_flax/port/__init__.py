"""Weights of torch for a Flax network, from the command line.

    python -m probly_flax.port weights.safetensors --into mypkg.model:build --out ported/

In code, that is `load_weights`. Whole networks are translated by `probly_torch.port`.
"""

__all__: list[str] = []
