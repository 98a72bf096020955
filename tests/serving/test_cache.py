from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.serving.cache import ScoreCache, pair_key


def key(number):
    return number.to_bytes(16, "little")


def test_the_least_recently_used_scores_go_first():
    cache = ScoreCache(1)
    cache.put(key(0), 0.5)
    number = 0
    while len(cache) == number + 1:
        number += 1
        cache.put(key(number), 0.25)
        assert cache.get(key(0)) == 0.5
    assert cache.get(key(1)) is None
    assert cache.get(key(number)) == 0.25


def test_a_cache_of_no_size_keeps_nothing():
    cache = ScoreCache(0)
    cache.put(key(1), 0.5)
    assert cache.get(key(1)) is None


texts = st.text(max_size=4)
documents = texts | st.fixed_dictionaries({"text": texts, "title": texts})
options = st.tuples(st.none() | texts, st.none() | st.integers(1, 3))


@given(st.tuples(texts, documents), st.tuples(texts, documents), options, options)
def test_keys_are_equal_only_for_what_the_model_reads_alike(first, second, first_options, second_options):
    from modeling_querit.pair_encoding_querit import document_text

    def read(pair, options):
        return pair[0], document_text(pair[1]), options

    is_alike = read(first, first_options) == read(second, second_options)
    assert (pair_key(first, *first_options) == pair_key(second, *second_options)) == is_alike


def test_the_border_between_query_and_document_counts():
    assert pair_key(("ab", "c"), None, None) != pair_key(("a", "bc"), None, None)
