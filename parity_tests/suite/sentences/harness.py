"""Asserts that bad input gets the same error with the same sentence from both packages, ending with the next step.

Every sentence is "*what* expects *requirement*; got *value*. *Next step, as code.*"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from parity_tests.suite.sentences.frameworks import FLAX, TORCH, Framework

FORM = re.compile(r"(--)?[\w.]+(\(.+?\))? expects [^;]+(;[^;]+)*?; got .+?(\. |\n)[A-Z\"'`].+\.", re.DOTALL)
CODE = re.compile(r"[\w)]\(|\(\w+, |\w=|==|\w\.\w|\[.*\]|\w_\w|\d")  # a call, a pair, an argument, ..., a number
BAD_ENGLISH = re.compile(r"but for|of which|has not\b|got some\b|Pass such as|such as[.;]")


class Row(NamedTuple):
    """Bad input, and what is said about it.

    Attributes:
        call: gives the input to the package of the framework that it is called with.
        error: the type of the error.
        sentence: how the sentence ends; " ... " stands for anything.
        frameworks: those that have what is called.
    """

    call: Callable[[Framework], Any]
    error: type[Exception]
    sentence: str
    frameworks: tuple[Framework, ...] = (TORCH, FLAX)


def rows_of(*tables: ModuleType) -> Mapping[str, Row]:
    """Returns the rows of tables by the name of the table and of the row."""
    return {f"{table.__name__.rpartition('.')[2]}: {name}": row for table in tables for name, row in table.ROWS.items()}


def sentence_of(call: Callable[[], Any], error: type[Exception]) -> str:
    """Returns the sentence of the error that a call raises. It has the form of all sentences."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    text = str(raised.value)
    assert FORM.fullmatch(text), text
    value_and_next_step = text.rpartition("; got ")[2]
    assert CODE.search(re.split(r"\. |\n", value_and_next_step, maxsplit=1)[1]), f"no next step as code: {text}"
    assert not BAD_ENGLISH.search(text), text
    return text


def assert_same_sentence(
    call: Callable[[Framework], Any],
    error: type[Exception],
    sentence: str,
    frameworks: tuple[Framework, ...] = (TORCH, FLAX),
) -> None:
    """Asserts that bad input gets this sentence from each package, as `Row` has it."""
    texts = [sentence_of(lambda f=f: call(f), error) for f in frameworks]  # type: ignore[misc]
    assert texts[1:] in ([], texts[:1])
    parts = [re.escape(part) for part in sentence.split(" ... ")]
    assert re.search(".*".join(parts) + r"\Z", texts[0], re.DOTALL), texts[0]
