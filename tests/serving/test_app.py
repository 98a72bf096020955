"""The routes: what the clients of Jina, Cohere, vLLM and TEI send and get, and what is refused in words."""

import json
import socket
import time

import httpx
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

JSON = {"content-type": "application/json"}
RERANK = ["/rerank", "/v1/rerank", "/v2/rerank"]


@pytest.fixture(scope="module")
def ranking(served_model):
    return served_model.rank(tiny.QUERY, tiny.DOCUMENTS)


def body(**more):
    return {"query": tiny.QUERY, "documents": tiny.DOCUMENTS} | more


@pytest.mark.parametrize("path", RERANK)
def test_documents_come_back_in_the_order_of_rank(client, ranking, path):
    answer = client.post(path, json=body(model="tiny")).json()
    assert [result["index"] for result in answer["results"]] == [ranked.index for ranked in ranking]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == pytest.approx([ranked.score for ranked in ranking], abs=1e-5)
    assert answer["model"] == "tiny"


def test_usage_counts_the_tokens_of_all_pairs(client, served_model):
    encoded = served_model.processor.encode([tiny.QUERY] * len(tiny.DOCUMENTS), tiny.DOCUMENTS)
    answer = client.post("/rerank", json=body()).json()
    assert answer["usage"]["total_tokens"] == sum(len(pair.input_ids) for pair in encoded)


def test_top_n_and_documents(client, ranking):
    first = ranking[0].document
    whole = {"text": first} if isinstance(first, str) else first
    (result,) = client.post("/rerank", json=body(top_n=1)).json()["results"]
    assert result["document"] == whole
    (result,) = client.post("/v2/rerank", json=body(top_n=1)).json()["results"]
    assert "document" not in result
    (result,) = client.post("/v2/rerank", json=body(top_n=1, return_documents=True)).json()["results"]
    assert result["document"] == whole


def test_documents_keep_what_belongs_to_them(client):
    document = {"text": "a novel", "title": None, "id": 2**70, "tags": [None, "ü"]}
    (result,) = client.post("/rerank", json=body(documents=[document])).json()["results"]
    assert result["document"] == document


def test_the_shape_of_tei(client, ranking):
    answer = client.post("/rerank", json={"query": tiny.QUERY, "texts": tiny.STRINGS, "return_text": True}).json()
    assert [(result["index"], result["text"]) for result in answer] == [
        (ranked.index, tiny.STRINGS[ranked.index]) for ranked in ranking
    ]
    assert [result["score"] for result in answer] == pytest.approx([ranked.score for ranked in ranking], abs=1e-5)
    assert "text" not in client.post("/rerank", json={"query": "q", "texts": ["a"]}).json()[0]


def test_the_instruction_is_the_requests(client, served_model):
    expected = served_model.predict(tiny.pairs(), tiny.INSTRUCTION).tolist()
    answer = client.post(
        "/score", json={"text_1": tiny.QUERY, "text_2": tiny.DOCUMENTS, "instruction": tiny.INSTRUCTION}
    )
    assert [item["score"] for item in answer.json()["data"]] == pytest.approx(expected, abs=1e-5)


def test_scores_come_in_the_order_of_the_pairs(client, served_model):
    queries = [tiny.QUERY, "another", "a third"]
    answer = client.post("/score", json={"text_1": queries, "text_2": tiny.DOCUMENTS[:3]}).json()
    expected = served_model.predict(list(zip(queries, tiny.DOCUMENTS[:3], strict=True))).tolist()
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected, abs=1e-5)


def test_state(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", tiny.MAX_LENGTH)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    paths = client.get("/openapi.json").json()["paths"]
    assert {*RERANK, "/score", "/v1/models", "/health", "/ready", "/metrics"} <= paths.keys()
    assert paths["/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 422, "The body is missing."),
        (b"{", 400, "not valid JSON: EOF while parsing"),
        (b"[" * 5000, 400, "recursion limit"),
        (b"\xff", 400, "not valid JSON"),
        (b'{"query": "\\ud800", "documents": ["a"]}', 400, "not valid JSON: unexpected end of hex escape"),
        (b'{"query": "a", "documents": ["\\udc00"]}', 400, "not valid JSON"),
        (b'{"query": "a", "documents": ["a"], "top_n": NaN}', 400, "not valid JSON"),
        (b'{"query": "a", "documents": ["a"], "top_n": 1e999}', 422, "top_n"),
        (b"null", 422, "The body: input should be a valid dictionary"),
        (b'{"query": null, "documents": ["a"]}', 422, "query: input should be a valid string."),
        (b'{"query": "a", "documents": ["a", 3]}', 422, "documents[1]: a document is a text, or an object"),
        (b'{"query": "a", "documents": []}', 422, "documents: list should have at least 1 item"),
        (b'{"query": "a", "documents": ["a"], "topn": 3}', 422, "topn: there is no such field."),
        (b'{"query": "a"}', 422, "give the documents as 'documents' or as 'texts'"),
        (b'{"query": "a", "documents": ["a"], "model": "gpt"}', 404, "name tiny, or leave out model"),
        (b'{"query": "a", "documents": ["a"], "max_tokens_per_doc": 9}', 422, "truncate_prompt_tokens"),
        (b'{"query": "a", "documents": ["a"], "truncate_prompt_tokens": 3}', 422, "shorten the instruction"),
        (b'{"query": "a", "documents": ["a"], "truncate_prompt_tokens": 0}', 422, "give an integer of at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(client, content, status, words):
    response = client.post("/rerank", content=content, headers=JSON)
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert error["code"] == status


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("text_2", ["a", 3], "text_2[1]: a document"),
        ("text_2", 3, "text_2: a document"),
        ("text_1", [3], "text_1[0]: "),
    ],
)
def test_the_place_of_a_wrong_text_of_a_pair_is_named(client, field, value, place):
    response = client.post("/score", json={"text_1": "q", "text_2": "a"} | {field: value})
    assert response.status_code == 422
    assert response.json()["error"]["message"].startswith(place)


def metric(address, name):
    lines = httpx.get(address + "/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


@pytest.mark.slow
def test_whoever_goes_away_is_not_scored_for(served_model, serve):
    documents = [f"{number} {tiny.LONG_DOCUMENT}" for number in range(500)]
    content = json.dumps({"query": tiny.QUERY, "documents": documents}).encode()
    head = (
        f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with serve(served_model) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + content)
            while not metric(address, "querit_pairs_total"):
                time.sleep(0.01)
        while metric(address, "querit_queue_pairs"):
            time.sleep(0.01)
        assert 0 < metric(address, "querit_pairs_total") < len(documents)
        assert httpx.post(address + "/rerank", json=body()).status_code == 200


@pytest.mark.slow
def test_limits(served_model, serve):
    with serve(served_model, max_documents=2, max_chars=30) as address:
        response = httpx.post(address + "/rerank", json={"query": "q", "documents": ["a"] * 3})
        assert (response.status_code, response.json()["error"]["message"]) == (
            413,
            "3 documents are more than 2: send fewer at once.",
        )
        response = httpx.post(address + "/rerank", json={"query": "q", "documents": ["a" * 15, {"text": "b" * 15}]})
        assert response.status_code == 413
        assert "31 characters are more than 30" in response.json()["error"]["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    ["query", "documents", "texts", "top_n", "instruction", "model", "text_1", "text_2", "truncate"]
)


@pytest.mark.slow
@given(
    path=st.sampled_from([*RERANK, "/score"]),
    sent=st.dictionaries(fields, json_values, max_size=3),
    is_valid=st.booleans(),
)
def test_nothing_that_is_sent_is_a_fault_of_the_server(client, path, sent, is_valid):
    valid = {"text_1": "q", "text_2": ["a"]} if path == "/score" else {"query": "q", "documents": ["a"]}
    content = json.dumps((valid if is_valid else {}) | sent).encode()
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code in (200, 400, 404, 413, 422), (content, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"].endswith(".")


@pytest.mark.slow
def test_the_client_of_cohere(address, ranking):
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2("any-key", base_url=address)
    answer = client.rerank(model="tiny", query=tiny.QUERY, documents=tiny.STRINGS, top_n=2)
    assert [result.index for result in answer.results] == [ranked.index for ranked in ranking[:2]]
    with pytest.raises(cohere.NotFoundError, match="name tiny"):
        client.rerank(model="another", query="q", documents=["a"])


@pytest.mark.parametrize("provider", ["cohere", "jina", "text-embeddings-inference"])
def test_the_client_of_rerankers(address, ranking, provider):
    from rerankers.models.api_rankers import APIRanker

    ranker = APIRanker("tiny", "any-key", provider, url=f"{address}/v1/rerank")
    results = ranker.rank(tiny.QUERY, tiny.STRINGS).results
    assert [result.document.doc_id for result in results] == [ranked.index for ranked in ranking]
    assert [result.score for result in results] == pytest.approx([ranked.score for ranked in ranking], abs=1e-5)
