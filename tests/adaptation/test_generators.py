import json
import shutil

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_adaptations import make_documents
from transformers import Qwen3ForCausalLM
from werkzeug import Response

from modeling_querit.adaptation.generators import EndpointGenerator, TransformersGenerator, first_line
from modeling_querit.adaptation.prompts import STYLES, QueryRequest

CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
REQUESTS = [QueryRequest(document, style, "en") for document, style in zip(make_documents(4), STYLES, strict=True)]
LONG = QueryRequest({"_id": "long", "title": "", "text": "a red fox " * 100_000}, "title", "en")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models with a chat template and without one."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny.make_text_config("qwen3", max_position_embeddings=2048))
    # A random model generates one of them soon.
    model.generation_config.eos_token_id = list(range(0, model.config.vocab_size, 4))
    folders = {}
    for name, template in (("chat", CHAT), ("plain", None)):
        folders[name] = tmp_path_factory.mktemp("writers") / name
        model.save_pretrained(folders[name])
        tiny.make_tokenizer(chat_template=template).save_pretrained(folders[name])
    return folders


@pytest.fixture(params=["chat", "plain"])
def folder(request, folders):
    return str(folders[request.param])


def make_writer(folder, **options):
    return TransformersGenerator(str(folder), **{"max_new_tokens": 8, "batch_size": 4} | options)


# -- Models on this machine


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_generation_is_reproducible(folder, temperature):
    writer = make_writer(folder, temperature=temperature)
    first = writer.generate(REQUESTS)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert writer.generate(REQUESTS) == first
    assert torch.get_rng_state().equal(state)
    assert make_writer(folder, temperature=temperature).generate(REQUESTS) == first
    assert any(first)
    assert all("\n" not in query for query in first)


@pytest.mark.slow
def test_sampling_depends_on_the_seed(folder):
    answers = {
        tuple(make_writer(folder, seed=seed, temperature=temperature).generate(REQUESTS))
        for seed in (0, 1)
        for temperature in (0, 1.5)
    }
    # Greedy decoding has no seed.
    assert len(answers) == 3


def test_a_batch_generates_what_single_requests_do(folder):
    writer = make_writer(folder, temperature=0)
    assert [writer.generate([request])[0] for request in REQUESTS] == writer.generate(REQUESTS)


def test_the_query_is_what_transformers_generates(folders):
    writer = make_writer(folders["plain"], temperature=0)
    model = Qwen3ForCausalLM.from_pretrained(folders["plain"]).eval()
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer("Document: fox and river 0. " + REQUESTS[0].document["text"] + "\nQuestion:", return_tensors="pt")
    with torch.inference_mode():
        written = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert writer.generate(REQUESTS[:1]) == [first_line(text.lstrip("\n"))]


def test_an_answer_without_an_end_is_empty(folders, tmp_path):
    """The model would go on where max_new_tokens ends it."""
    shutil.copytree(folders["plain"], tmp_path / "endless")
    path = tmp_path / "endless" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    assert any(make_writer(folders["plain"]).generate(REQUESTS))
    assert make_writer(tmp_path / "endless").generate(REQUESTS) == [""] * 4


def test_prompts_follow_the_chat_template_or_the_shots(folders):
    shots = [("A hen.", "Who lays eggs?")]
    writer = make_writer(folders["plain"], shots=shots)
    assert writer.prompt_of(REQUESTS[0]).startswith("Document: A hen.\nQuestion: Who lays eggs?\n\nDocument: fox and")
    writer = make_writer(folders["chat"], template="Write a $field.")
    prompt = writer.prompt_of(REQUESTS[0])
    assert prompt.startswith("[user]Write a question.\n\nDocument:\nTitle: fox and river 0\nThe fox")
    assert prompt.endswith("[assistant]<think></think>")


def test_long_documents_are_truncated(folder):
    writer = make_writer(folder, max_chars=100)
    prompt = writer.prompt_of(LONG)
    assert prompt.count("fox") == 10
    assert len(writer.generate([LONG, *REQUESTS])) == 5


def test_a_tokenizer_without_padding_token_works(folders, tmp_path):
    Qwen3ForCausalLM.from_pretrained(folders["plain"]).save_pretrained(tmp_path)
    tiny.make_tokenizer(pad_token=None).save_pretrained(tmp_path)
    assert len(make_writer(tmp_path).generate(REQUESTS)) == 4


def test_any_document_can_be_requested(folder):
    texts = ["", "...", "知らない人が書いた本", "كيف؟", "a\x00b", "<pad>[CLS]<|im_end|>", "👩‍👩‍👧"]
    requests = [QueryRequest({"_id": "x", "title": text, "text": text}, "claim", "und", (text,)) for text in texts]
    assert all(isinstance(query, str) for query in make_writer(folder).generate(requests))


def test_the_identity_covers_model_prompt_and_sampling(folders, tmp_path):
    plain = make_writer(folders["plain"])
    assert json.dumps(plain.identity) == json.dumps(make_writer(folders["plain"]).identity)
    others = [
        {"template": "Write."},
        {"shots": [("a", "b")]},
        {"max_chars": 5},
        {"max_new_tokens": 9},
        {"temperature": 0},
        {"temperature": 0.8},
        {"top_p": 0.5},
        {"batch_size": 2},
        {"seed": 1},
    ]
    identities = [json.dumps(make_writer(folders["plain"], **other).identity) for other in others]
    identities += [json.dumps(plain.identity), json.dumps(make_writer(folders["chat"]).identity)]
    torch.manual_seed(1)
    Qwen3ForCausalLM(tiny.make_text_config("qwen3")).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    identities.append(json.dumps(make_writer(tmp_path).identity))
    assert len(set(identities)) == len(others) + 3


# -- Servers


def answer_of(content):
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def make_client(httpserver):
    def make(**options):
        url = httpserver.url_for("/v1")
        return EndpointGenerator(url, "writer", **{"attempts": 2, "backoff": 0.001, "concurrency": 4} | options)

    return make


def payloads(httpserver):
    return [json.loads(request.get_data()) for request, _ in httpserver.log]


def test_requests_have_the_form_of_the_api(httpserver, make_client, monkeypatch):
    monkeypatch.setenv("WRITER_KEY", "secret")
    httpserver.expect_request("/v1/chat/completions", method="POST").respond_with_json(answer_of('"Who?"\nSure!'))
    writer = make_client(
        temperature=0.2,
        max_tokens=7,
        max_chars=9,
        template="Write.",
        api_key_variable="WRITER_KEY",
        extra_body={"top_k": 5},
    )
    assert writer.generate([LONG]) == ["Who?"]
    ((request, _),) = httpserver.log
    assert request.headers["Authorization"] == "Bearer secret"
    payload = json.loads(request.get_data())
    assert isinstance(payload.pop("seed"), int)
    assert payload == {
        "model": "writer",
        "max_tokens": 7,
        "temperature": 0.2,
        "top_k": 5,
        "messages": [{"role": "user", "content": "Write.\n\nDocument:\na red fox"}],
    }


def test_without_a_key_there_is_no_header(httpserver, make_client, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    httpserver.expect_request("/v1/chat/completions").respond_with_json(answer_of("Who?"))
    make_client().generate(REQUESTS[:1])
    assert "Authorization" not in httpserver.log[0][0].headers


def test_seeds_differ_between_requests_and_not_between_runs(httpserver, make_client):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(answer_of("Who?"))

    def seeds(seed):
        httpserver.clear_log()
        make_client(seed=seed).generate(REQUESTS)
        return {payload["messages"][0]["content"]: payload["seed"] for payload in payloads(httpserver)}

    first = seeds(0)
    assert len(set(first.values())) == 4
    assert seeds(0) == first
    assert not set(seeds(1).values()) & set(first.values())


def test_queries_come_in_the_order_of_the_requests(httpserver, make_client):
    def echo(request):
        return Response(json.dumps(answer_of(request.get_json()["messages"][0]["content"][-9:])))

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(echo)
    requests = [QueryRequest({"_id": str(n), "title": "", "text": f"number {n:02}"}, "title", "en") for n in range(30)]
    assert make_client().generate(requests) == [f"number {n:02}" for n in range(30)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "", "no JSON", "null", "[]", "{}", '{"choices": []}', '{"choices": null}', '{"choices": [{"message": null}]}',
        json.dumps(answer_of(None)), json.dumps(answer_of(["a"])), json.dumps(answer_of("Who?"))[:-4], "\x00\xff",
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_malformed_answer_gives_no_query(httpserver, make_client, body):
    def answer(request):
        return Response(body if "number 1 " in request.get_json()["messages"][0]["content"] else good)

    good = json.dumps(answer_of("Who?"))
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    assert make_client().generate(REQUESTS) == ["Who?", None, "Who?", "Who?"]
    # With its second attempt.
    assert len(httpserver.log) == 5


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_gives_no_query(httpserver, make_client, status):
    def answer(request):
        is_bad = "number 1 " in request.get_json()["messages"][0]["content"]
        return Response("too long", status) if is_bad else Response(json.dumps(answer_of("Who?")))

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    assert make_client().generate(REQUESTS) == ["Who?", None, "Who?", "Who?"]
    assert len(httpserver.log) == 4


@pytest.mark.parametrize(
    ("content", "reason", "expected"),
    [
        ("Who wrote the fir", "length", ""),
        ("Who wrote it?\nGoethe wr", "length", "Who wrote it?"),
        ("Who wrote it", "stop", "Who wrote it"),
    ],
)
def test_a_truncated_query_is_empty(httpserver, make_client, content, reason, expected):
    answer = answer_of(content)
    answer["choices"][0]["finish_reason"] = reason
    httpserver.expect_request("/v1/chat/completions").respond_with_json(answer)
    assert make_client().generate(REQUESTS[:1]) == [expected]


def test_a_malformed_answer_is_retried(httpserver, make_client):
    httpserver.expect_ordered_request("/v1/chat/completions").respond_with_data("{")
    httpserver.expect_ordered_request("/v1/chat/completions").respond_with_json(answer_of("Who?"))
    assert make_client().generate(REQUESTS[:1]) == ["Who?"]


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_server_that_refuses_everything_ends_the_run(httpserver, make_client, status):
    httpserver.expect_request("/v1/chat/completions").respond_with_data("not for you", status=status)
    with pytest.raises(ValueError, match=f"answered {status}: not for you"):
        make_client(attempts=6, concurrency=1).generate(REQUESTS * 20)
    # A few more may be under way at the first refusal, but none is retried, and not all are sent.
    assert len(httpserver.log) < 40


@pytest.mark.parametrize("content", ["Who \ud800 wrote it?", "Who\x00 wrote it?", "Who\x1b wrote\x07 it?"])
def test_answers_are_cleaned_so_that_they_can_be_cached(httpserver, make_client, content):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(answer_of(content))
    assert make_client().generate(REQUESTS[:1]) == ["Who wrote it?"]


def test_the_identity_of_a_server_is_not_its_url(make_client):
    same = [EndpointGenerator("http://here/v1", "writer").identity, EndpointGenerator("http://b/", "writer").identity]
    assert same[0] == same[1] == make_client().identity
    others = [
        {"template": "Write."},
        {"version": "2"},
        {"max_chars": 5},
        {"max_tokens": 9},
        {"temperature": 0},
        {"seed": 1},
        {"extra_body": {"top_k": 5}},
    ]
    identities = {json.dumps(make_client(**other).identity) for other in others}
    assert len(identities | {json.dumps(same[0])}) == len(others) + 1
    assert make_client(batch_size=3, concurrency=1).identity == same[0]


# -- First lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('\n**Question:** "Who wrote Faust?"\nI hope this helps!', "Who wrote Faust?"),
        ("Who wrote Faust?", "Who wrote Faust?"),
        ("- Who wrote Faust?\n- Who sold his soul?", "Who wrote Faust?"),
        ("* Who wrote Faust?", "Who wrote Faust?"),
        ("# Faust", "Faust"),
        ("„Wer schrieb Faust?“", "Wer schrieb Faust?"),
        ("«Кто написал Фауста?»", "Кто написал Фауста?"),
        ("search: faust author", "faust author"),
        ("Goethe: a life", "Goethe: a life"),
        ("12:30 is noon", "12:30 is noon"),
        ('Who wrote "Faust"', 'Who wrote "Faust"'),
        ("<think>\nHm.\n</think>\n\nWho wrote Faust?", "Who wrote Faust?"),
        ("Hm.</think>Who?", "Who?"),
        # The answer was cut off while the model was reasoning.
        ("<think>Okay, the user wants a question", ""),
        ("<think>\nOkay, the user wants a question", ""),
        ("---\nWho?", "Who?"),
        ("", ""),
        (" \n\t\n", ""),
        ('""', ""),
        ("誰がファウストを書いたか", "誰がファウストを書いたか"),
    ],
)
def test_the_first_line_is_cleaned(text, expected):
    assert first_line(text) == expected


@given(st.text(st.characters()) | st.text('"*-#: \nQuestion</think>„“', max_size=40))
def test_the_first_line_of_anything_is_one_line(text):
    line = first_line(text)
    assert len(line.splitlines()) <= 1
    assert line == line.strip()
