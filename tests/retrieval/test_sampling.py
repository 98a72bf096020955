import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.retrieval.sampling import Bands

RANKED = list(range(100))
OTHERS = list(range(1000, 1100))


def test_the_next_band_makes_up_for_one_that_is_too_small():
    bands = Bands(top=3, middle=2, random=1, top_depth=10, depth=50)
    drawn = bands.draw(RANKED[:1], OTHERS, random.Random(0))
    assert drawn[0] == 0
    assert len(drawn) == 6
    assert set(drawn[1:]) <= set(OTHERS)
    assert bands.draw([1, 2], [], random.Random(0)) in ([1, 2], [2, 1])


@pytest.mark.parametrize("numbers", [{"top": 0, "random": 0}, {"top": -1}, {"top": 3, "middle": -1}])
def test_bands_that_draw_nothing_are_refused(numbers):
    with pytest.raises(ValueError, match="ask for at least one"):
        Bands(**numbers)


@pytest.mark.parametrize("depths", [{"top_depth": 0}, {"top_depth": 101}, {"depth": 29}])
def test_depths_out_of_order_are_refused(depths):
    with pytest.raises(ValueError, match="0 < top_depth <= depth"):
        Bands(**depths)


@given(
    st.tuples(*[st.integers(0, 4)] * 3).filter(any),
    st.integers(1, 8),
    st.integers(0, 8),
    st.integers(0, 30),
    st.integers(0, 10),
    st.integers(0, 99),
)
def test_documents_are_drawn_from_each_band(counts, top_depth, more_depth, ranked, others, seed):
    bands = Bands(*counts, top_depth, top_depth + more_depth)
    ranking, unranked = list(range(ranked)), [100 + n for n in range(others)]
    drawn = bands.draw(ranking, unranked, random.Random(seed))
    assert len(set(drawn)) == len(drawn) <= bands.size
    assert set(drawn) <= {*ranking, *unranked}
    if ranked >= bands.depth + bands.size and more_depth >= bands.middle and top_depth >= bands.top:
        from_top = [rank for rank in drawn if rank < top_depth]
        from_middle = [rank for rank in drawn if top_depth <= rank < bands.depth]
        assert [len(from_top), len(from_middle), len(drawn)] == [bands.top, bands.middle, bands.size]
