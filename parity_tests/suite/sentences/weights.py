"""Arrays that are not those of the model."""

import numpy as np

from parity_tests.suite.sentences.frameworks import network
from parity_tests.suite.sentences.harness import Row

ROWS = {
    "lists as weights": Row(
        lambda f: f.package.load_arrays(network(f), {"0.weight": [1.0]}), TypeError, "Pass to_arrays(model)."
    ),
    "arrays of another model": Row(
        lambda f: f.package.load_arrays(
            network(f), {"0.wieght": np.zeros((3, 4), "float32"), "0.bias": np.zeros(2, "float64")}
        ),
        ValueError,
        "build the model that these arrays come from.",
    ),
    "a checkpoint": Row(
        lambda f: f.package.load_arrays(network(f), {"epoch": 1, "state_dict": {}}),
        TypeError,
        r'load_arrays(model, checkpoint["state_dict"], rename={r"^model\.": ""}).',
    ),
    "arrays with a prefix": Row(
        lambda f: f.package.load_arrays(
            network(f), {f"module.{name}": array for name, array in f.package.to_arrays(network(f)).items()}
        ),
        ValueError,
        r"Pass rename={'^module\\.': ''}.",
    ),
    "names that become one": Row(
        lambda f: f.package.load_arrays(network(f), f.package.to_arrays(network(f)), rename={r"^\d": "0"}),
        ValueError,
        "'other'}.",
    ),
    "ignore that matches nothing": Row(
        lambda f: f.package.load_arrays(network(f), f.package.to_arrays(network(f)), ignore="head.*"),
        ValueError,
        "Leave them out: ignore=[].",
    ),
    "flatten of no Linear layer": Row(
        lambda f: f.package.to_arrays(network(f), flatten={"fc1": (64, 7, 7)}),
        ValueError,
        'Pass flatten={"0": (channels, height, width)}.',
    ),
    "float64 into float32": Row(
        lambda f: f.package.load_arrays(
            network(f), {n: a.astype("float64") for n, a in f.package.to_arrays(network(f)).items()}
        ),
        ValueError,
        "pass cast=True.",
    ),
}
