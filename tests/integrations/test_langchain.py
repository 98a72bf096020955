import asyncio

import pytest
import tiny

QueritReranker = pytest.importorskip("modeling_querit.integrations.langchain").QueritReranker


@pytest.fixture(scope="module")
def documents():
    from langchain_core.documents import Document

    return [
        Document(id=f"d{number}", page_content=text, metadata={"n": number}) for number, text in enumerate(tiny.STRINGS)
    ]


@pytest.mark.slow
def test_documents_come_in_the_order_of_rank(saved_folders, models, documents):
    reranker = QueritReranker(model=str(saved_folders("qwen3")), top_n=3)
    expected = models("qwen3").rank(tiny.QUERY, tiny.STRINGS, top_k=3)
    for ranked in (
        reranker.compress_documents(documents, tiny.QUERY),
        asyncio.run(reranker.acompress_documents(documents, tiny.QUERY)),
    ):
        assert [(document.id, document.metadata["n"]) for document in ranked] == [
            (f"d{best.index}", best.index) for best in expected
        ]
        scores = [document.metadata["relevance_score"] for document in ranked]
        assert scores == pytest.approx([best.score for best in expected], abs=1e-6)
    assert all(set(document.metadata) == {"n"} for document in documents)
    assert reranker.compress_documents([], tiny.QUERY) == []


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValueError, match="top_k"):
        QueritReranker(top_k=3)
