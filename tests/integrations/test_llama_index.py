import pytest
import tiny

QueritRerank = pytest.importorskip("modeling_querit.integrations.llama_index").QueritRerank


@pytest.mark.slow
def test_nodes_come_in_the_order_of_rank(saved_folders, models):
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [
        NodeWithScore(node=TextNode(text=text, id_=f"n{number}", metadata={"page": number}), score=0.5)
        for number, text in enumerate(tiny.STRINGS)
    ]
    rerank = QueritRerank(model=str(saved_folders("qwen3")), top_n=3)
    texts = [f"page: {number}\n\n{text}" for number, text in enumerate(tiny.STRINGS)]
    expected = models("qwen3").rank(tiny.QUERY, texts, top_k=3)
    ranked = rerank.postprocess_nodes(nodes, query_str=tiny.QUERY)
    assert [node.node_id for node in ranked] == [f"n{best.index}" for best in expected]
    assert [node.score for node in ranked] == pytest.approx([best.score for best in expected], abs=1e-6)
    assert [node.metadata["page"] for node in ranked] == [best.index for best in expected]
    assert {node.score for node in nodes} == {0.5}
    with pytest.raises(ValueError, match="no query"):
        rerank.postprocess_nodes(nodes)
