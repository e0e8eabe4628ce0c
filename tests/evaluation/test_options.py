"""The tree of a row's options: what is shared, what is read, and what happens where one option begins
another.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linchain_cli.data.encoding import common_prefix
from linchain_cli.evaluation.options import build_tree, tree_mask

END = 99
# The same examples every time, however slow the machine is.
STEADY = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


def spelled(tree, option):
    """The text that an option's steps spell: what leads to its first read, then each predicted token."""
    at = option[0][0]
    before = []
    while at >= 0:
        before.append(tree.tokens[at])
        at = tree.parents[at]
    return (*reversed(before), *(token for _, token in option))


def test_options_that_differ_in_their_last_token_need_no_further_token():
    tree = build_tree([[5, 6, 7, 1], [5, 6, 7, 2], [5, 6, 7, 3]])
    assert tree.tokens == (5, 6, 7)
    assert tree.options == (((2, 1),), ((2, 2),), ((2, 3),))
    assert tree.is_path and tree.reads == [2]


def test_branches_share_what_they_have_in_common():
    tree = build_tree([[5, 1, 2, 8], [5, 1, 3, 9], [5, 4, 2, 8]])
    assert tree.tokens == (5, 1, 2, 3, 4, 2)
    assert tree.parents == (-1, 0, 1, 1, 0, 4)
    assert tree.depths == [0, 1, 2, 2, 1, 2]
    assert not tree.is_path
    mask, positions = tree_mask([tree], 0, 7)
    assert positions[0].tolist() == [0, 1, 2, 2, 1, 2, 0]
    assert [row.nonzero().flatten().tolist() for row in mask[0, 0]] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [0, 4, 5], [6],
    ]  # fmt: skip


def test_an_option_that_begins_another_is_scored_to_its_end():
    tree = build_tree([[5, 1], [5, 1, 0]], END)
    assert tree.options == (((1, END),), ((1, 0), (2, END)))
    with pytest.raises(ValueError, match="end-of-text"):
        build_tree([[5, 1], [5, 1, 0]])


@pytest.mark.parametrize(
    ("sequences", "reason"), [([[5, 1], [5, 1]], "same tokens"), ([[1, 2], [3, 2]], "empty")]
)
def test_trees_that_cannot_be_built(sequences, reason):
    with pytest.raises(ValueError, match=reason):
        build_tree(sequences, END)


@STEADY
@given(TOKENS, st.lists(TOKENS, min_size=2, max_size=5, unique_by=tuple))
def test_steps_spell_the_options_and_paths_cover_them(prompt, answers):
    sequences = [[7, *prompt, *answer] for answer in answers]
    tree = build_tree(sequences, END)
    ended = any(option[-1][1] == END for option in tree.options)
    assert [list(spelled(tree, option)) for option in tree.options] == [s + [END] * ended for s in sequences]
    assert all(parent < index for index, parent in enumerate(tree.parents))
    covered = []
    for path, numbers in tree.paths():
        assert path.is_path
        for number, option in zip(numbers, path.options, strict=True):
            assert spelled(path, option) == spelled(tree, tree.options[number])
            covered.append(number)
    assert sorted(covered) == list(range(len(sequences)))


@STEADY
@given(st.lists(TOKENS, min_size=1, max_size=5))
def test_common_prefix_is_the_longest_one(sequences):
    length = common_prefix(sequences)
    assert len({tuple(sequence[:length]) for sequence in sequences}) == 1
    longer = {tuple(sequence[: length + 1]) for sequence in sequences}
    assert len(longer) > 1 or any(len(sequence) == length for sequence in sequences)
