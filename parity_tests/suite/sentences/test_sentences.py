"""Bad input: the same kind of error with the same sentence from both packages, ending with the next step as code."""

import numpy as np
import pytest

from parity_tests.suite.sentences import ensembles, judging, layers, optimizers, plots, random, rows, training, weights
from parity_tests.suite.sentences.frameworks import FLAX, TORCH, network
from parity_tests.suite.sentences.harness import assert_same_sentence, rows_of, sentence_of

ROWS = rows_of(ensembles, judging, layers, optimizers, plots, random, rows, training, weights)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # before an update, as the row asks for
@pytest.mark.parametrize("name", ROWS)
def test_the_same_sentence_in_both(name):
    assert_same_sentence(*ROWS[name])


@pytest.mark.parametrize("f", [TORCH, FLAX], ids=["torch", "flax"])
def test_every_problem_of_a_file_at_once_and_nothing_loaded(f):
    model = network(f)
    before = f.package.to_arrays(model)
    arrays = {name: array + 1 for name, array in before.items()} | {"extra": np.zeros(1, "float32")}
    arrays["0.wieght"] = arrays.pop("0.weight")
    arrays["1.bias"] = arrays["1.bias"].astype("float64")
    arrays["0.bias"] = arrays["0.bias"][:2]
    first, *lines, _ = sentence_of(lambda: f.package.load_arrays(model, arrays), ValueError).splitlines()
    assert "got 5 differences and loaded nothing" in first
    assert {line.strip() for line in lines} == {
        "missing: 0.weight (rename 0.wieght?)",
        "unexpected: 0.wieght",
        "unexpected: extra",
        "shape: 0.bias is (3,) here, (2,) there",
        "dtype: 1.bias is float32 here, float64 there",
    }
    for name, array in f.package.to_arrays(model).items():
        np.testing.assert_array_equal(array, before[name])


BAD_SENTENCES = {
    "no requirement": "f got 3. Pass x=4.",
    "no value": "f expects x above 3. Pass x=4.",
    "no next step": "f expects x above 3; got 3.",
    "a next step without code": "f expects x above three; got three. Pass a larger one.",
    "no end": "f expects x above 3; got 3. Pass x=4",
    "bad English": "f expects x above 3; got some. Pass x=4.",
}


@pytest.mark.parametrize("name", BAD_SENTENCES)
def test_a_sentence_of_another_form_is_seen(name):
    def refuse(f):
        raise ValueError(BAD_SENTENCES[name])

    with pytest.raises(AssertionError):
        assert_same_sentence(refuse, ValueError, "", (TORCH,))


def test_other_words_in_one_package_and_other_words_than_the_row_has_are_seen():
    def refuse(f):
        raise ValueError(f"f expects x above 3; got {3 if f is TORCH else 2}. Pass x=4.")

    assert_same_sentence(refuse, ValueError, "expects ... got 3. Pass x=4.", (TORCH,))
    for sentence, frameworks in (("Pass x=4.", (TORCH, FLAX)), ("Pass x=5.", (TORCH,)), ("Pass", (TORCH,))):
        with pytest.raises(AssertionError):
            assert_same_sentence(refuse, ValueError, sentence, frameworks)
    with pytest.raises(AssertionError):
        assert_same_sentence(refuse, Exception, "Pass x=4.", (TORCH,))
