"""Packs: what goes into each, and what its segments continue."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.packing_querit import Pack, common_prefix, plan_packs

# Few different tokens, so that beginnings are shared by chance as well.
TOKENS = st.integers(0, 2)
BUDGETS = st.integers(1, 60)


@st.composite
def grouped(draw):
    """Token ids of pairs, and their groups: pairs that share prefixes or are equal."""
    input_ids, groups = [], []
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.lists(TOKENS, max_size=8))
        rests = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=8), min_size=1, max_size=6))
        groups.append(list(range(len(input_ids), len(input_ids) + len(rests))))
        input_ids += [begin + rest for rest in rests]
    order = draw(st.permutations(range(len(input_ids))))
    shuffled = [ids for _, ids in sorted(zip(order, input_ids, strict=True))]
    return shuffled, [[order[pair] for pair in group] for group in groups]


def lay_out(packs):
    """The (token, position)s of each pair that its scored position attends to."""
    seen, carried = {}, []
    for number, pack in enumerate(packs):
        assert pack.carried_length == len(carried)
        positions = list(range(len(pack)))
        assert [position for segment in pack.segments for position in positions[segment.positions]] == positions
        assert len(pack.input_ids) == len(pack.position_ids) == len(pack)
        # Of which segment a key is: states of a prefix are right only if they were computed as one.
        owners = [(number, index) for index, segment in enumerate(pack.segments) for _ in range(segment.length)]
        keys = carried + list(zip(pack.input_ids, pack.position_ids, owners, strict=True))
        pairs = iter(pack.pairs)
        for segment in pack.segments:
            prefix, own = (
                keys[segment.prefix],
                keys[segment.positions.start + len(carried) : segment.positions.stop + len(carried)],
            )
            assert segment.length == len(own) > 0
            assert segment.prefix_length == len(prefix)
            assert len({owner for *_, owner in prefix}) <= 1
            assert segment.is_scored or not prefix
            if segment.is_scored:
                pair = next(pairs)
                assert pair not in seen
                seen[pair] = [(token, position) for token, position, _ in prefix + own]
        assert not list(pairs)
        assert pack.scored_positions == [segment.positions.stop - 1 for segment in pack.segments if segment.is_scored]
        carried = keys[pack.carry_over]
    assert not carried
    return seen


def prefixes(pack):
    return [segment for segment in pack.segments if not segment.is_scored]


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [True, False])
@given(pairs=grouped(), batch_tokens=BUDGETS)
def test_every_pair_is_whole_and_there_once(pairs, batch_tokens, share_prefix):
    input_ids, groups = pairs
    seen = lay_out(plan_packs(input_ids, groups, batch_tokens, share_prefix))
    assert {pair: [token for token, _ in keys] for pair, keys in seen.items()} == dict(enumerate(input_ids))
    for keys in seen.values():
        assert [position for _, position in keys] == list(range(len(keys)))


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [True, False])
@given(pairs=grouped(), batch_tokens=BUDGETS)
def test_packs_keep_to_the_budget_and_are_full(pairs, batch_tokens, share_prefix):
    packs = list(plan_packs(*pairs, batch_tokens, share_prefix))
    for pack in packs:
        assert pack.pairs
        assert len(pack) <= batch_tokens or (len(pack.pairs) == 1 and len(prefixes(pack)) <= 1)
    for pack, following in pairwise(packs):
        # What comes first in a pack would not have fitted into the one before.
        assert len(pack) + following.scored_positions[0] + 1 > batch_tokens


@pytest.mark.slow
@given(pairs=grouped(), batch_tokens=BUDGETS)
def test_groups_stay_in_order(pairs, batch_tokens):
    input_ids, groups = pairs
    packs = plan_packs(input_ids, groups, batch_tokens)
    assert [pair for pack in packs for pair in pack.pairs] == [pair for group in groups for pair in group]


@pytest.mark.slow
@given(pairs=grouped(), batch_tokens=BUDGETS)
def test_a_prefix_is_computed_once_for_its_group(pairs, batch_tokens):
    input_ids, groups = pairs
    shared = [common_prefix([input_ids[pair] for pair in group]) for group in groups]
    packs = list(plan_packs(input_ids, groups, batch_tokens))
    computed = [pack.input_ids[segment.positions] for pack in packs for segment in prefixes(pack)]
    assert computed == [ids for ids in shared if ids]
    saved = sum(len(ids) * (len(group) - 1) for ids, group in zip(shared, groups, strict=True))
    assert sum(map(len, packs)) == sum(map(len, input_ids)) - saved


@pytest.mark.slow
@given(pairs=grouped(), batch_tokens=BUDGETS)
def test_nothing_is_shared_unless_asked_for(pairs, batch_tokens):
    for pack in plan_packs(*pairs, batch_tokens, share_prefix=False):
        assert all(segment.is_scored and segment.prefix_length == 0 for segment in pack.segments)
        assert pack.carried_length == 0
        assert pack.carry_over == slice(0, 0)


@pytest.mark.slow
@given(st.lists(st.lists(TOKENS, min_size=1, max_size=8), max_size=6))
def test_common_prefix(input_ids):
    prefix = common_prefix(input_ids)
    if len(input_ids) < 2:
        assert prefix == []
        return
    size = len(prefix)
    assert all(ids[:size] == prefix and len(ids) > size for ids in input_ids)
    # It could not be longer.
    assert len({tuple(ids[: size + 1]) for ids in input_ids}) > 1 or min(map(len, input_ids)) == size + 1


@pytest.mark.parametrize(
    ("input_ids", "prefix"),
    [
        ([], []),
        ([[1, 2, 3]], []),
        ([[1, 2, 3], [1, 2, 3]], [1, 2]),
        ([[1, 2, 3], [1, 2]], [1]),
        ([[1], [1, 2]], []),
        ([[1, 2], [3, 2]], []),
        ([[1, 2, 3], [1, 2, 4], [1, 2, 0, 5]], [1, 2]),
        ([(1, 2), (1, 3)], [1]),
        ([[1, 2], []], []),
    ],
)
def test_common_prefix_examples(input_ids, prefix):
    assert common_prefix(input_ids) == prefix


def test_identical_pairs_share_all_but_the_last_token():
    [pack] = plan_packs([[1, 2, 3]] * 3, [[0, 1, 2]], 100)
    assert pack.input_ids == [1, 2, 3, 3, 3]
    assert pack.position_ids == [0, 1, 2, 2, 2]
    assert pack.scored_positions == [2, 3, 4]


def test_a_group_of_one_has_no_prefix():
    [pack] = plan_packs([[1, 2, 3], [1, 2, 4]], [[0], [1]], 100)
    assert pack.input_ids == [1, 2, 3, 1, 2, 4]
    assert all(segment.is_scored and segment.prefix_length == 0 for segment in pack.segments)


def test_a_prefix_is_carried_through_several_packs():
    input_ids = [[1, 1, 1, 1, 1, pair, 9] for pair in range(2, 9)]
    packs = list(plan_packs(input_ids, [list(range(7))], 7))
    assert [pack.pairs for pack in packs] == [[0], [1, 2, 3], [4, 5, 6]]
    assert [pack.carried_length for pack in packs] == [0, 5, 5]
    # The keys of the prefix are at the front, first as positions of the pack and then as its prefix KV cache.
    assert [pack.carry_over for pack in packs] == [slice(0, 5), slice(0, 5), slice(0, 0)]
    assert all(segment.prefix == slice(0, 5) for pack in packs for segment in pack.segments if segment.is_scored)
    assert packs[1].position_ids == [5, 6, 5, 6, 5, 6]


def test_a_prefix_from_the_middle_of_a_pack_is_carried():
    input_ids = [[1, 1, 3], [1, 1, 4], [2, 2, 2, 5], [2, 2, 2, 6]]
    first, second = plan_packs(input_ids, [[0, 1], [2, 3]], 8)
    assert first.carry_over == slice(4, 7)
    assert (second.carried_length, second.input_ids, second.position_ids) == (3, [6], [3])


def test_a_pair_over_the_budget_is_a_pack_by_itself():
    packs = list(plan_packs([[1] * 50, [2, 3], [4, 5]], [[0], [1], [2]], 4))
    assert [pack.pairs for pack in packs] == [[0], [1, 2]]
    assert len(packs[0]) == 50


def test_nothing_to_plan():
    assert list(plan_packs([], [], 10)) == []
    assert len(Pack()) == 0
    assert Pack().scored_positions == []
