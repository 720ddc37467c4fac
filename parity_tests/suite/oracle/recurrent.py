"""The oracle of recurrent layers: float64 NumPy, one member, one row, one step at a time.

Weights have torch's names and layouts. Each function returns its outputs by name and, for a cotangent of each, the
gradients by its inputs. It shares no code with either package.
"""

from __future__ import annotations

import numpy as np


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lstm_step(x, h, c, w):
    a = w["weight_ih"] @ x + w["bias_ih"] + w["weight_hh"] @ h + w["bias_hh"]
    i, f, g, o = np.split(a, 4)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    new_c = f * c + i * g
    m = o * np.tanh(new_c)
    new_h = w["weight_hr"] @ m if "weight_hr" in w else m
    return new_h, new_c, (x, h, c, i, f, g, o, new_c, m)


def lstm_step_backward(g_h, g_c, tape, w, grads):
    """Returns gradients by x, h and c. Those by the weights are added to grads."""
    x, h, c, i, f, g, o, new_c, m = tape
    g_m = g_h
    if "weight_hr" in w:
        grads["weight_hr"] += np.outer(g_h, m)
        g_m = w["weight_hr"].T @ g_h
    t = np.tanh(new_c)
    g_c = g_c + g_m * o * (1 - t**2)
    g_a = np.concatenate([g_c * g * i * (1 - i), g_c * c * f * (1 - f), g_c * i * (1 - g**2), g_m * t * o * (1 - o)])
    grads["weight_ih"] += np.outer(g_a, x)
    grads["weight_hh"] += np.outer(g_a, h)
    grads["bias_ih"] += g_a
    grads["bias_hh"] += g_a
    return w["weight_ih"].T @ g_a, w["weight_hh"].T @ g_a, g_c * f


def gru_step(x, h, c, w):
    """Takes a step of a GRU. It has no c, which is passed on."""
    a, d = w["weight_ih"] @ x + w["bias_ih"], w["weight_hh"] @ h + w["bias_hh"]
    (a_r, a_z, a_n), (d_r, d_z, d_n) = np.split(a, 3), np.split(d, 3)
    r, z = sigmoid(a_r + d_r), sigmoid(a_z + d_z)
    n = np.tanh(a_n + r * d_n)
    return (1 - z) * n + z * h, c, (x, h, r, z, n, d_n)


def gru_step_backward(g_h, g_c, tape, w, grads):
    x, h, r, z, n, d_n = tape
    g_n = g_h * (1 - z) * (1 - n**2)
    g_r, g_z = g_n * d_n * r * (1 - r), g_h * (h - n) * z * (1 - z)
    g_a, g_d = np.concatenate([g_r, g_z, g_n]), np.concatenate([g_r, g_z, g_n * r])
    grads["weight_ih"] += np.outer(g_a, x)
    grads["weight_hh"] += np.outer(g_d, h)
    grads["bias_ih"] += g_a
    grads["bias_hh"] += g_d
    return w["weight_ih"].T @ g_a, w["weight_hh"].T @ g_d + g_h * z, g_c


STEPS = {"LSTM": (lstm_step, lstm_step_backward), "GRU": (gru_step, gru_step_backward)}


def folded(parameters, i, place, gates):
    """Returns member i's own weights of one layer and direction: W * s_i r_i^T, and b_i, or zeros."""
    w = {}
    for kind in ("ih", "hh", "hr"):
        if f"weight_{kind}{place}" in parameters:
            r, s = parameters[f"r_{kind}{place}"][i], parameters[f"s_{kind}{place}"][i]
            w[f"weight_{kind}"] = parameters[f"weight_{kind}{place}"] * np.outer(s, r)
    for kind in ("ih", "hh"):
        name = f"bias_{kind}{place}"
        w[f"bias_{kind}"] = parameters[name][i] if name in parameters else np.zeros(gates)
    return w


def unfold(own, parameters, i, place, grads):
    """Adds the gradients by member i's own weights to those by W, r, s and b."""
    for kind in ("ih", "hh", "hr"):
        if f"weight_{kind}{place}" not in parameters:
            continue
        weight, r, s = (parameters[f"{name}_{kind}{place}"] for name in ("weight", "r", "s"))
        g = own[f"weight_{kind}"]
        grads[f"weight_{kind}{place}"] += g * np.outer(s[i], r[i])
        grads[f"r_{kind}{place}"][i] += (g * weight * s[i][:, None]).sum(0)
        grads[f"s_{kind}{place}"][i] += (g * weight * r[i]).sum(1)
        if f"bias_{kind}{place}" in parameters:
            grads[f"bias_{kind}{place}"][i] += own[f"bias_{kind}"]


def one_row(kind, x, h_0, c_0, weights, g_y, g_h, g_c):
    """Runs one sequence (T, in) through layers of directions: weights[layer][direction].

    Returns outputs, and all gradients.
    """
    step, step_backward = STEPS[kind]
    steps, directions = len(x), len(weights[0])
    h_n, c_n = np.zeros(h_0.shape), np.zeros(c_0.shape)
    tapes, layer_inputs = {}, x
    for layer, ways in enumerate(weights):
        outputs = [[None] * directions for _ in range(steps)]
        for way, w in enumerate(ways):
            h, c = h_0[layer * directions + way], c_0[layer * directions + way]
            for t in range(steps) if way == 0 else reversed(range(steps)):
                h, c, tapes[layer, way, t] = step(layer_inputs[t], h, c, w)
                outputs[t][way] = h
            h_n[layer * directions + way], c_n[layer * directions + way] = h, c
        layer_inputs = np.array([np.concatenate(both) for both in outputs])
    y = layer_inputs

    g_h_0, g_c_0 = np.zeros(h_0.shape), np.zeros(c_0.shape)
    own = [[{name: np.zeros(v.shape) for name, v in w.items()} for w in ways] for ways in weights]
    for layer in reversed(range(len(weights))):
        g_inputs = 0.0
        size = g_y.shape[1] // directions
        for way, w in enumerate(weights[layer]):
            at = layer * directions + way
            back_h, back_c = g_h[at], g_c[at]
            g_own_inputs = [None] * steps
            for t in reversed(range(steps)) if way == 0 else range(steps):
                back_h = back_h + g_y[t, way * size : (way + 1) * size]
                g_own_inputs[t], back_h, back_c = step_backward(
                    back_h, back_c, tapes[layer, way, t], w, own[layer][way]
                )
            g_h_0[at], g_c_0[at] = back_h, back_c
            g_inputs = g_inputs + np.array(g_own_inputs)
        g_y = g_inputs
    return y, h_n, c_n, g_y, g_h_0, g_c_0, own


def recurrent(kind, g, x, parameters, num_members, num_layers=1, bidirectional=False, h_0=None, c_0=None):
    """Runs a batch-first layer on x (E*B, T, in), states (D*num_layers, E*B, size), g by name of the outputs."""
    places = [[f"_l{n}{way}" for way in (("", "_reverse") if bidirectional else ("",))] for n in range(num_layers)]
    return _members(kind, g, x, parameters, num_members, places, h_0, c_0)


def cell(kind, g, x, parameters, num_members, h_0=None, c_0=None):
    """Runs one step: x (E*B, in), states (E*B, hidden)."""
    h_0, c_0 = (None if v is None else v[None] for v in (h_0, c_0))
    g = {"output": g["output"][:, None], "h_n": g["h_n"][None], "c_n": g["c_n"][None]}
    outputs, grads = _members(kind, g, x[:, None], parameters, num_members, [[""]], h_0, c_0)
    outputs = {"output": outputs["output"][:, 0], "h_n": outputs["h_n"][0], "c_n": outputs["c_n"][0]}
    grads |= {"x": grads["x"][:, 0], "h_0": grads["h_0"][0], "c_0": grads["c_0"][0]}
    return outputs, grads


def _members(kind, g, x, parameters, num_members, places, h_0, c_0):
    rows = len(x)
    count = len(places) * len(places[0])
    gates, hidden = parameters["weight_hh" + places[0][0]].shape
    cells = gates // 4 if kind == "LSTM" else hidden
    h_0 = np.zeros((count, rows, hidden)) if h_0 is None else h_0
    c_0 = np.zeros((count, rows, cells)) if c_0 is None else c_0
    y = np.zeros(g["output"].shape)
    h_n, c_n = np.zeros(h_0.shape), np.zeros(c_0.shape)
    grads = {name: np.zeros(v.shape) for name, v in {"x": x, "h_0": h_0, "c_0": c_0, **parameters}.items()}
    for i in range(num_members):
        weights = [[folded(parameters, i, place, gates) for place in ways] for ways in places]
        for row in range(i * rows // num_members, (i + 1) * rows // num_members):
            results = one_row(
                kind,
                x[row],
                h_0[:, row],
                c_0[:, row],
                weights,
                g["output"][row],
                g["h_n"][:, row],
                g["c_n"][:, row],
            )
            y[row], h_n[:, row], c_n[:, row] = results[:3]
            grads["x"][row], grads["h_0"][:, row], grads["c_0"][:, row] = results[3:6]
            for ways, own_ways in zip(places, results[6], strict=True):
                for place, own in zip(ways, own_ways, strict=True):
                    unfold(own, parameters, i, place, grads)
    return {"output": y, "h_n": h_n, "c_n": c_n}, grads
