"""The table of known gaps: each is still there, and one that closes says so."""

import pytest

from parity_tests.suite.parity.gaps import KNOWN_GAPS, KnownGap


@pytest.mark.parametrize("gap", KNOWN_GAPS, ids=lambda gap: gap.name)
def test_the_gap_is_still_there(gap):
    gap.assert_there()


def test_names_are_unique():
    assert len({gap.name for gap in KNOWN_GAPS}) == len(KNOWN_GAPS)


def test_a_gap_that_closed_asks_to_be_removed():
    closed = KnownGap("zeros", "one is larger", lambda: False)
    with pytest.raises(AssertionError, match=r"zeros: expected to differ, as one is larger; got the same .* Remove"):
        closed.assert_there()
