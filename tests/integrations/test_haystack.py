import pytest
import tiny

QueritRanker = pytest.importorskip("modeling_querit.integrations.haystack").QueritRanker


@pytest.mark.slow
def test_documents_come_in_the_order_of_rank_in_a_pipeline(saved_folders, models):
    from haystack import Document, Pipeline

    documents = [
        Document(id=f"d{number}", content=text, meta={"n": number}) for number, text in enumerate(tiny.STRINGS)
    ]
    pipeline = Pipeline()
    pipeline.add_component("ranker", QueritRanker(model=str(saved_folders("qwen3")), top_k=3))
    # As Haystack stores pipelines.
    pipeline = Pipeline.loads(pipeline.dumps(), allowed_modules=["modeling_querit.integrations.haystack"])
    expected = models("qwen3").rank(tiny.QUERY, tiny.STRINGS)
    for top_k, number in [(None, 3), (5, 5)]:
        inputs = {"query": tiny.QUERY, "documents": documents, "top_k": top_k}
        ranked = pipeline.run({"ranker": inputs})["ranker"]["documents"]
        assert [(document.id, document.meta["n"]) for document in ranked] == [
            (f"d{best.index}", best.index) for best in expected[:number]
        ]
        assert [document.score for document in ranked] == pytest.approx(
            [best.score for best in expected[:number]], abs=1e-6
        )
    assert {document.score for document in documents} == {None}
