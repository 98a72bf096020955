"""Cases with their results, as the Spaces of other metrics have them."""

test_cases = [
    {
        "predictions": [0.9, 0.1],
        "references": [0, 1],
        "query_ids": ["q", "q"],
        "result": {"ndcg_at_10": 0.6309297535714575, "mrr_at_10": 0.5, "map": 0.5, "queries": 1},
    },
    {
        "predictions": [0.3, 0.2, 0.8, 0.1],
        "references": [2, 0, 0, 1],
        "query_ids": ["a", "a", "b", "b"],
        "result": {"ndcg_at_10": 0.8154648767857288, "mrr_at_10": 0.75, "map": 0.75, "queries": 2},
    },
    {
        "predictions": [0.5, 0.5],
        "references": [1, 0],
        "query_ids": ["tied", "tied"],
        "result": {"ndcg_at_10": 0.6309297535714575, "mrr_at_10": 0.5, "map": 0.5, "queries": 1},
    },
]
