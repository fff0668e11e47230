"""A library that lacks one collective, division, weight, fold-in or donation fails a test."""

import mutations
import pytest


@pytest.mark.slow
def test_every_thirtieth_mutation_is_caught():
    # All of them, by `python tests/mutations.py`, take ten minutes, and more beside other work.
    outcomes = mutations.run_mutations(every=30)
    assert len(outcomes) == -(-len(mutations.MUTATIONS) // 30)
    assert [outcome.mutation.name for outcome in outcomes if not outcome.caught] == []


def test_each_mutation_applies_to_the_library_as_it_is():
    for mutation in mutations.MUTATIONS:
        text = (mutations.ROOT / "jaxpar" / mutation.file).read_text()
        assert text.count(mutation.old) == 1, mutation.name
