"""Every public function and class is compared: by a subject of its name, or by a test in the table of compared.py."""

import inspect
import sys

import pytest
import torch

import probly_flax
import probly_torch.metrics
from parity_tests.suite.parity.compared import PACKAGES, TESTS, calls, name_of_test, public
from parity_tests.suite.subjects.all import ALL

COMPARED = {twins.public_name: twins for twins in reversed(ALL)}
ELSEWHERE = set().union(*TESTS.values())


def uncompared():
    everything = {(package.__name__, name) for package in PACKAGES for name in public(package)}
    return {(package, name) for package, name in everything - ELSEWHERE if name not in COMPARED}


def test_every_public_name_is_compared():
    assert not uncompared(), "add a subject, see CONTRIBUTING.md"


def test_a_new_name_has_to_be(monkeypatch):
    monkeypatch.setattr(probly_flax.uncertainty, "surprise", lambda probs: probs, raising=False)
    monkeypatch.setattr(probly_flax.uncertainty, "__all__", [*probly_flax.uncertainty.__all__, "surprise"])
    assert uncompared() == {("probly_flax", "surprise")}


def test_the_table_has_no_name_that_is_gone_or_has_a_subject():
    assert not ELSEWHERE - {(package.__name__, name) for package in PACKAGES for name in public(package)}
    assert not {name for _, name in ELSEWHERE} & COMPARED.keys()
    assert not COMPARED.keys() - public(probly_torch).keys()


def test_the_tests_of_the_table_are_in_the_files_that_are_collected(request):
    if request.config.getoption("keyword") or any("::" in each for each in request.config.args):
        pytest.skip("only some tests of a file are collected")
    names = {name_of_test(item) for item in request.session.items if hasattr(item, "module")}
    files = {name.partition(".")[0] for name in names}
    assert not {name for name in TESTS if name.partition(".")[0] in files} - names


def test_what_is_only_made_or_only_run_in_one_package_is_seen():
    logits = torch.zeros(1, 2, 3)
    with calls() as called:
        probly_torch.metrics.NLL()
        probly_torch.metrics.Accuracy().update(logits, torch.zeros(2, dtype=int))
        probly_torch.uncertainty.mean_probs(logits)
    assert {("probly_torch", "Accuracy"), ("probly_torch", "mean_probs")} <= called
    assert ("probly_torch", "NLL") not in called
    assert {package for package, _ in called} == {"probly_torch"}


@pytest.mark.parametrize("name", COMPARED)
def test_the_subject_runs_what_it_is_named_after(name):
    item, called = public(probly_torch)[name], set()
    function = item.forward if inspect.isclass(item) else item
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        COMPARED[name].torch(COMPARED[name].draw(0, "float32"), "float32")
    finally:
        sys.setprofile(None)
    assert function.__code__ in called
