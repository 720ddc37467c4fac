"""Deep ensembles against the limit and against a loop: `python -m benchmarks.deep_ensembles [--framework torch|flax]`.

The network is an MLP 2-H-H-2. The limit is the same ensemble by hand: stacked `torch.baddbmm`, or `jax.vmap` and optax
under one `jax.jit`. The loop calls, or trains, one member after the other. A step is forward, cross-entropy, backward
and Adam. Contenders take turns, and a ratio is a median time over the median of the limit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks._timing import LIMIT, Contenders, Table, main

CASES = ((3, 128, 128), (10, 128, 128), (30, 128, 128), (100, 64, 32), (10, 512, 256))
QUICK_CASES = ((3, 16, 8), (10, 16, 8))


def torch_contenders(num_members: int, hidden: int, batch: int) -> Iterator[tuple[str, Contenders]]:
    import torch
    from torch import Tensor, nn

    from probly_torch import ensemble
    from probly_torch.losses import member_cross_entropy

    class WithForward(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    def by_hand(x: Tensor) -> Tensor:
        h = torch.baddbmm(b1, x.expand(num_members, -1, -1), w1).relu()
        return torch.baddbmm(b3, torch.baddbmm(b2, h, w2).relu(), w3)

    def train(model: Callable[[Tensor], Tensor], parameters: Any, **adam: bool) -> Callable[[], None]:
        optimizer = torch.optim.Adam(parameters, lr=1e-3, **adam)

        def step() -> None:
            optimizer.zero_grad()
            logits = model(x)
            member_cross_entropy(logits if logits.ndim == 3 else logits[None], y).backward()
            optimizer.step()

        return step

    torch.manual_seed(0)
    x, y = torch.randn(batch, 2), torch.randint(0, 2, (batch,))
    layers = nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
    sequential, own = (ensemble(kind(*layers), num_members) for kind in (nn.Sequential, WithForward))
    models, members = {"Ensemble": sequential, "own forward": own}, list(sequential)
    stacked = [p.detach().mT.contiguous() if p.ndim == 3 else p.detach()[:, None].clone() for p in own.parameters()]
    w1, b1, w2, b2, w3, b3 = parameters = [tensor.requires_grad_() for tensor in stacked]
    torch.testing.assert_close(by_hand(x), own(x))
    forward = {LIMIT: by_hand, **models, "loop": lambda x: torch.stack([member(x) for member in members])}
    yield "forward", {name: torch.no_grad()(partial(model, x)) for name, model in forward.items()}
    for adam in ({}, {"foreach": True}, {"fused": True}):
        steps = {LIMIT: train(by_hand, parameters, **adam)}
        steps |= {name: train(model, model.parameters(), **adam) for name, model in models.items()}
        loop = [train(member, member.parameters(), **adam) for member in members]
        yield f"step, Adam({', '.join(adam)})", {**steps, "loop": lambda loop=loop: [step() for step in loop]}


def flax_contenders(num_members: int, hidden: int, batch: int) -> Iterator[tuple[str, Contenders]]:
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from probly_flax import ensemble
    from probly_flax.losses import member_cross_entropy

    def by_hand(params: Any, x: jax.Array) -> jax.Array:
        (w1, b1), (w2, b2), (w3, b3) = params
        return jax.nn.relu(jax.nn.relu(x @ w1 + b1) @ w2 + b2) @ w3 + b3

    def loss(model: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model(x)
        return member_cross_entropy(logits if logits.ndim == 3 else logits[None], y)

    def update(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    @jax.jit
    def limit_step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, moments = state
        grads = jax.grad(lambda params: loss(partial(limit, params), x, y))(params)
        updates, moments = adam.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    def with_optimizer(model: nnx.Module) -> tuple[nnx.Module, nnx.Optimizer]:
        return nnx.clone(model), nnx.Optimizer(model, adam, wrt=nnx.Param)

    def split_once(model: nnx.Module) -> Callable[..., nnx.State]:
        graph = nnx.graphdef(with_optimizer(model))

        def step(state: nnx.State, x: jax.Array, y: jax.Array) -> nnx.State:
            model, optimizer = nnx.merge(graph, state)
            update(model, optimizer, x, y)
            return nnx.state((model, optimizer))

        return jax.jit(step)

    def train(step: Callable[..., Any], state: Any) -> Callable[[], None]:
        def run() -> None:
            nonlocal state
            state = jax.block_until_ready(step(state, x, y))

        return run

    x, y = jax.random.normal(jax.random.key(0), (batch, 2)), jax.random.randint(jax.random.key(1), (batch,), 0, 2)
    adam, linear = optax.adam(1e-3), partial(nnx.Linear, rngs=nnx.Rngs(0))
    base = nnx.Sequential(linear(2, hidden), nnx.relu, linear(hidden, hidden), nnx.relu, linear(hidden, 2))
    model = ensemble(base, num_members)
    members = list(model)
    params = [(layer.kernel[...], layer.bias[...]) for layer in model.stacked.layers if isinstance(layer, nnx.Linear)]
    limit = jax.jit(jax.vmap(by_hand, in_axes=(0, None)))
    np.testing.assert_allclose(limit(params, x), model(x), rtol=1e-4, atol=1e-5)
    (graph, state), (member_graph, _) = nnx.split(model), nnx.split(members[0])
    split = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    split_member, states = jax.jit(lambda state, x: nnx.merge(member_graph, state)(x)), [nnx.state(m) for m in members]
    forward = {LIMIT: partial(limit, params, x), "split once": partial(split, state, x)}
    forward["nnx.jit"] = partial(nnx.jit(lambda model, x: model(x)), model, x)
    forward["loop"] = lambda: [split_member(state, x) for state in states]
    yield "forward", {name: lambda run=run: jax.block_until_ready(run()) for name, run in forward.items()}

    nnx_step, trained, member_step = nnx.jit(update), with_optimizer(model), split_once(members[0])
    loop = [train(member_step, nnx.state(with_optimizer(member))) for member in members]
    steps = {LIMIT: train(limit_step, (params, adam.init(params)))}
    steps["split once"] = train(split_once(model), nnx.state(with_optimizer(model)))
    steps["nnx.jit"] = lambda: jax.block_until_ready((nnx_step(*trained, x, y), nnx.state(trained)))
    yield "step", {**steps, "loop": lambda: [step() for step in loop]}


if __name__ == "__main__":
    frameworks = {"torch": torch_contenders, "flax": flax_contenders}
    main("benchmarks.deep_ensembles", __doc__, Table(("members", "H", "B"), CASES, QUICK_CASES, frameworks))
