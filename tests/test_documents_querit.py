import dataclasses
from collections import UserDict
from types import MappingProxyType

import pytest
import tiny
from haystack import Document as HaystackDocument
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import Document as LlamaIndexDocument
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from rerankers import Document as RerankersDocument

from modeling_querit.documents_querit import document_content, document_id

TEXT = "Goethe finished Faust in 1831."
NODE = TextNode(text=TEXT, id_="n1", metadata={"author": "Goethe", "path": "/x"}, excluded_embed_metadata_keys=["path"])
# Each kind of document, what is scored of it, and its id.
KINDS = {
    "string": (TEXT, TEXT, None),
    "mapping": ({"text": TEXT}, TEXT, None),
    "title": ({"title": "Faust", "text": TEXT}, {"title": "Faust", "text": TEXT}, None),
    "no title": ({"title": None, "text": TEXT, "id": 7}, TEXT, 7),
    "BEIR": ({"_id": "d1", "title": "", "text": TEXT, "metadata": {}}, TEXT, "d1"),
    "two ids": ({"_id": "d1", "id": "other", "text": TEXT}, TEXT, "d1"),
    "row of a table": ({"_id": None, "id": 0, "text": TEXT}, TEXT, 0),
    "another mapping": (UserDict(id="d2", text=TEXT), TEXT, "d2"),
    "tuple": (("d3", TEXT), TEXT, "d3"),
    "list": ([4, TEXT], TEXT, 4),
    "item of a corpus": (
        ("d5", MappingProxyType({"title": "Faust", "text": TEXT})),
        {"title": "Faust", "text": TEXT},
        "d5",
    ),
    "LangChain": (LangChainDocument(page_content=TEXT, metadata={"title": "no"}, id="l1"), TEXT, "l1"),
    "LangChain without id": (LangChainDocument(page_content=TEXT), TEXT, None),
    "LlamaIndex node": (NODE, f"author: Goethe\n\n{TEXT}", "n1"),
    "LlamaIndex node with score": (NodeWithScore(node=NODE, score=0.5), f"author: Goethe\n\n{TEXT}", "n1"),
    "LlamaIndex document": (LlamaIndexDocument(text=TEXT, doc_id="n2"), TEXT, "n2"),
    "Haystack": (HaystackDocument(content=TEXT, id="h1", meta={"title": "no"}), TEXT, "h1"),
    "rerankers": (RerankersDocument(text=TEXT, doc_id=9), TEXT, 9),
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_id_of_each_kind(kind):
    document, content, identifier = KINDS[kind]
    assert document_content(document, 0) == content
    assert document_id(document) == identifier


def test_nodes_are_read_as_rerankers_of_llama_index_read_them():
    # SentenceTransformerRerank of llama-index-core scores this text.
    assert document_content(NODE, 0) == NODE.get_content(metadata_mode=MetadataMode.EMBED)


def test_all_kinds_rank_alike_and_come_back_as_they_were(models):
    model = models("deepseek_v3")
    documents, contents, identifiers = zip(*KINDS.values(), strict=True)
    expected = model.rank(tiny.QUERY, contents)
    ranking = model.rank(tiny.QUERY, iter(documents))
    assert [tuple(ranked)[:2] for ranked in ranking] == [tuple(ranked)[:2] for ranked in expected]
    assert all(document is documents[index] for index, _, document in ranking)
    assert [ranked.id for ranked in ranking] == [identifiers[ranked.index] for ranked in ranking]
    assert [ranked.id for ranked in model.rank(tiny.QUERY, documents, top_k=2)] == [r.id for r in ranking[:2]]
    predicted = model.predict([(tiny.QUERY, document) for document in documents])
    assert predicted.tolist() == model.predict([(tiny.QUERY, content) for content in contents]).tolist()


@dataclasses.dataclass
class Stranger:
    text: str = TEXT


@pytest.mark.parametrize(
    "document",
    [
        *(None, 7, b"bytes", [], {}, {"title": "only"}, {"content": TEXT}, ["x"], ("a", "b", "c"), Stranger()),
        # What searches of other libraries return: scores are no ids, and no texts.
        *((LangChainDocument(page_content=TEXT), 0.5), (TEXT, 0.5), (0.5, TEXT), (True, TEXT), (None, TEXT)),
        *({"text": None}, {"text": TEXT, "title": 3}, ("d1", {"text": 5}), HaystackDocument(content=None)),
        RerankersDocument(document_type="image", image_path="x.png"),
    ],
    ids=repr,
)
def test_what_has_no_text_is_an_error_that_says_which_and_what_is_accepted(models, document):
    with pytest.raises(TypeError, match=r"ocument 1 is .*: give a string, a mapping with a 'text'") as caught:
        models("deepseek_v3").rank(tiny.QUERY, [TEXT, document])
    assert "\n" not in str(caught.value)


@settings(max_examples=20)
@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(), x),
        max_leaves=4,
    )
)
def test_anything_is_a_document_or_a_type_error(document):
    try:
        content = document_content(document, 0)
    except TypeError:
        return
    assert isinstance(content, str) or (content["title"] and isinstance(content["text"], str))
    document_id(document)
