"""A library that lacks one collective, division, weight, fold-in or donation fails a test."""

import datetime

import mutations
import pytest

SLICES = 30


@pytest.mark.slow
def test_every_thirtieth_mutation_is_caught():
    # All of them, by `python tests/mutations.py`, take ten minutes, and more beside other work; thirty days try each.
    first = datetime.datetime.now(datetime.UTC).date().toordinal() % SLICES
    print(f"mutations[{first}::{SLICES}]; `python tests/mutations.py 'NAME'` runs one again")
    outcomes = mutations.run_mutations(first=first, every=SLICES)
    assert len(outcomes) == len(range(first, len(mutations.MUTATIONS), SLICES))
    assert [outcome.mutation.name for outcome in outcomes if not outcome.caught] == [], (
        f"of mutations[{first}::{SLICES}]"
    )


def test_each_mutation_applies_to_the_library_as_it_is():
    for mutation in mutations.MUTATIONS:
        text = (mutations.ROOT / "jaxpar" / mutation.file).read_text()
        assert text.count(mutation.old) == 1, mutation.name
