import json
import math
import shutil

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)
from werkzeug import Response

from modeling_querit.adaptation.endpoint import Unavailable
from modeling_querit.adaptation.teachers import (
    CausalLMTeacher,
    CrossEncoderTeacher,
    EndpointTeacher,
    FirstStageTeacher,
    document_text,
    pair_key,
)
from modeling_querit.retrieval.bm25 import BM25

QUERIES = [tiny.QUERY, "nobody asked"]
DOCUMENTS = [
    {"_id": str(n), "title": "", "text": document} if isinstance(document, str) else {"_id": str(n), **document}
    for n, document in enumerate(tiny.DOCUMENTS)
]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
# No token reaches across the special tokens on both sides of the document.
PROMPT = "{instruction}\nQuery: {query}<|im_end|>{document}<|im_end|>Content:"


# Cross-encoders


@pytest.mark.parametrize("options", [{}, {"max_length": 40}, {"instruction": "Find the author."}])
def test_a_querit_teacher_scores_as_the_model_does(saved_folder, model, options):
    # The model takes titles and texts as fields.
    expected = model.predict([(query, dict(document)) for query, document in PAIRS], **options)
    teacher = CrossEncoderTeacher(str(saved_folder), **options)
    assert teacher.score(PAIRS) == pytest.approx(expected.tolist(), abs=1e-6)
    assert all(isinstance(score, float) for score in teacher.score(PAIRS[:2]))


@pytest.fixture(scope="module")
def other_reranker(tokenizer, tmp_path_factory):
    """A reranker of another library."""
    folder = tmp_path_factory.mktemp("rerankers") / "llama"
    torch.manual_seed(0)
    config = tiny.make_text_config("llama", num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("max_length", [None, 8])
def test_other_rerankers_score_as_in_sentence_transformers(other_reranker, max_length):
    library = pytest.importorskip("sentence_transformers")
    model = library.CrossEncoder(str(other_reranker), max_length=max_length)
    expected = model.predict([(query, document_text(document)) for query, document in PAIRS])
    teacher = CrossEncoderTeacher(str(other_reranker), library="sentence-transformers", max_length=max_length)
    assert teacher.score(PAIRS) == pytest.approx(expected.tolist(), abs=1e-5)
    json.dumps(teacher.score(PAIRS[:1]))


def test_a_querit_model_scores_the_same_in_sentence_transformers(saved_folders, models):
    pytest.importorskip("sentence_transformers")
    folder = saved_folders("qwen3")
    expected = models("qwen3").predict([(query, document_text(document)) for query, document in PAIRS])
    teacher = CrossEncoderTeacher(str(folder), library="sentence-transformers")
    assert teacher.score(PAIRS) == pytest.approx(expected.tolist(), abs=1e-5)


def test_invalid_options_of_a_cross_encoder_are_refused():
    with pytest.raises(ValueError, match="library is 'keras': choose querit or"):
        CrossEncoderTeacher("x", library="keras")
    with pytest.raises(ValueError, match="instruction is for"):
        CrossEncoderTeacher("x", library="sentence-transformers", instruction="Find it.")
    with pytest.raises(ValueError, match="dtype is 'half': choose auto"):
        CrossEncoderTeacher("x", dtype="half")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["querit", "sentence-transformers"])
def test_cross_encoders_compute_in_the_dtype_of_the_options(saved_folders, library):
    folder = str(saved_folders("qwen3"))
    exact, rounded = (CrossEncoderTeacher(folder, library=library, dtype=dtype) for dtype in ("auto", "bfloat16"))
    scores = rounded.score(PAIRS)
    assert scores != exact.score(PAIRS)
    assert scores == pytest.approx(exact.score(PAIRS), abs=0.05)


@pytest.mark.parametrize(
    "options",
    [{"max_length": 40}, {"instruction": "Find it."}, {"library": "sentence-transformers"}, {"dtype": "bfloat16"}],
)
def test_the_identity_of_a_cross_encoder_covers_its_options(saved_folders, options):
    folder = str(saved_folders("qwen3"))
    identity = CrossEncoderTeacher(folder).identity
    assert CrossEncoderTeacher(folder, **options).identity != identity
    assert CrossEncoderTeacher(folder, batch_size=3).identity == identity


# Causal language models


def save_causal_lm(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal_lms(tokenizer, tmp_path_factory):
    """Rotary positions, and learned absolute ones."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=512, n_positions=512, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=1
    )
    models = {"qwen3": Qwen3ForCausalLM(tiny.make_text_config("qwen3")), "gpt2": GPT2LMHeadModel(gpt2)}
    folder = tmp_path_factory.mktemp("causal")
    return {name: save_causal_lm(folder / name, model, tokenizer) for name, model in models.items()}


@pytest.fixture
def causal_lm(causal_lms):
    return str(causal_lms["qwen3"])


def make_teacher(folder, **options):
    # One token each in the tiny tokenizer.
    return CausalLMTeacher(str(folder), **{"prompt": PROMPT, "yes": "y", "no": "n", "max_length": 512} | options)


@torch.inference_mode()
def logit_difference(folder, ids, yes="y", no="n"):
    """Logit difference after one sequence, without padding or batch."""
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0, -1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return float(logits[tokenizer.convert_tokens_to_ids(yes)] - logits[tokenizer.convert_tokens_to_ids(no)])


def prompt_of(teacher, query, document):
    text = teacher.prompt.replace("{document}", document_text(document))
    return text.replace("{instruction}", teacher.instruction).replace("{query}", query)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_batch_scores_as_single_pairs_do(causal_lms, name):
    """Pairs of different lengths."""
    teacher = make_teacher(causal_lms[name])
    tokenizer = AutoTokenizer.from_pretrained(causal_lms[name])
    alone = [logit_difference(causal_lms[name], tokenizer(prompt_of(teacher, *pair)).input_ids) for pair in PAIRS]
    assert max(alone) - min(alone) > 0.5
    assert teacher.score(PAIRS) == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, "Query: {query} Content: {document} ?"])
def test_the_prompt_is_encoded_as_one_text(causal_lm, prompt):
    """No token boundary is forced where the document begins and ends."""
    teacher = make_teacher(causal_lm, prompt=prompt or CausalLMTeacher("x").prompt)
    tokenizer = AutoTokenizer.from_pretrained(causal_lm)
    alone = [logit_difference(causal_lm, tokenizer(prompt_of(teacher, *pair)).input_ids) for pair in PAIRS]
    assert teacher.score(PAIRS) == pytest.approx(alone, abs=1e-4)


def test_a_long_document_is_truncated_and_the_rest_of_the_prompt_stays(causal_lm):
    teacher = make_teacher(causal_lm, max_length=100)
    tokenizer = AutoTokenizer.from_pretrained(causal_lm)
    document = {"_id": "long", "title": "", "text": tiny.LONG_DOCUMENT}
    before, after = prompt_of(teacher, tiny.QUERY, {"text": "\0"}).split("\0")
    head, middle, tail = (tokenizer(text).input_ids for text in (before, tiny.LONG_DOCUMENT, after))
    ids = head + middle[: 100 - len(head) - len(tail)] + tail
    assert len(ids) == 100
    score = logit_difference(causal_lm, ids)
    assert teacher.score([(tiny.QUERY, document)]) == pytest.approx([score], abs=1e-4)
    # Among others too, and where there is no room at all.
    assert teacher.score([PAIRS[0], (tiny.QUERY, document)])[1] == pytest.approx(score, abs=1e-4)
    nothing = make_teacher(causal_lm, max_length=3).score([(tiny.QUERY, document)])
    assert nothing == pytest.approx([logit_difference(causal_lm, head + tail)], abs=1e-4)


def test_braces_in_queries_and_documents_are_text(causal_lm):
    pair = ("what is {document}", {"title": "", "text": "{query} and {instruction}"})
    text = "I\nQuery: what is {document}<|im_end|>{query} and {instruction}<|im_end|>Content:"
    ids = AutoTokenizer.from_pretrained(causal_lm)(text).input_ids
    score = logit_difference(causal_lm, ids)
    assert make_teacher(causal_lm, instruction="I").score([pair]) == pytest.approx([score], abs=1e-4)


def test_the_bos_token_of_a_tokenizer_is_kept(causal_lm, tmp_path):
    """As Llama 3 and Gemma have it."""
    tokenizer = tiny.make_tokenizer(bos_token="[CLS]")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="<|im_end|>", pad_token="<pad>"
    )
    folder = shutil.copytree(causal_lm, tmp_path / "lm")
    tokenizer.save_pretrained(folder)
    teacher = make_teacher(folder)
    ids = AutoTokenizer.from_pretrained(folder)(prompt_of(teacher, *PAIRS[0])).input_ids
    assert ids[0] == 2
    assert teacher.score(PAIRS[:1]) == pytest.approx([logit_difference(folder, ids)], abs=1e-4)


def test_a_tokenizer_without_padding_token_works(causal_lm, tmp_path):
    folder = shutil.copytree(causal_lm, tmp_path / "lm")
    tiny.make_tokenizer(pad_token=None).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    assert make_teacher(folder).score(PAIRS) == pytest.approx(make_teacher(causal_lm).score(PAIRS), abs=1e-4)


def test_invalid_prompts_and_answers_are_refused(causal_lm):
    for prompt, missing in (("{document}", "{query}"), ("{query}", "{document}")):
        with pytest.raises(ValueError, match=f"prompt has no {missing}"):
            CausalLMTeacher("x", prompt=prompt)
    with pytest.raises(ValueError, match=r"'maybe' is \d tokens of"):
        make_teacher(causal_lm, yes="maybe").score(PAIRS[:1])


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": PROMPT + " "},
        {"instruction": "Find it."},
        {"yes": "o"},
        {"no": "o"},
        {"yes": "n", "no": "y"},
        {"max_length": 99},
    ],
)
def test_the_identity_of_a_causal_lm_covers_its_options(causal_lm, options):
    identity = make_teacher(causal_lm).identity
    assert make_teacher(causal_lm, **options).identity != identity
    assert make_teacher(causal_lm, batch_size=3).identity == identity
    assert json.loads(json.dumps(identity))


def test_the_identity_of_a_causal_lm_covers_its_weights(causal_lm, tmp_path):
    folder = shutil.copytree(causal_lm, tmp_path / "lm")
    identity = make_teacher(causal_lm).identity
    # Not their folder.
    assert make_teacher(folder).identity == identity
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert make_teacher(folder).identity != identity


def test_different_pairs_have_different_keys(causal_lm):
    teacher, document = make_teacher(causal_lm), {"_id": "1", "title": "a", "text": "b"}
    key = pair_key(teacher, ("q", document))
    assert pair_key(teacher, ("q", document | {"_id": "2", "language": "en"})) == key
    others = [
        pair_key(teacher, ("q a", document)),
        pair_key(teacher, ("q", document | {"title": "a b"})),
        pair_key(teacher, ("q", {"_id": "1", "title": "", "text": "a b"})),
        pair_key(make_teacher(causal_lm, max_length=9), ("q", document)),
    ]
    assert len({key, *others}) == 5


# First stages


class Stage:
    identity = ["bm25", "1"]

    def __init__(self):
        self.index = BM25({document["_id"]: document for document in DOCUMENTS})
        self.calls = []

    def scores(self, query, documents):
        self.calls.append((query, documents))
        return self.index.scores(query, documents)


def test_a_first_stage_scores_as_a_teacher():
    stage = Stage()
    teacher = FirstStageTeacher(stage)
    pairs = [PAIRS[7], PAIRS[1], PAIRS[0], PAIRS[2]]
    assert teacher.score(pairs) == [stage.index.scores(query, [document["_id"]])[0] for query, document in pairs]
    assert stage.calls == [(QUERIES[1], ["1"]), (QUERIES[0], ["1", "0", "2"])]
    assert teacher.identity == ["first-stage", ["bm25", "1"]]
    assert teacher.score([]) == []


# Servers


@pytest.fixture(scope="module")
def running():
    with pytest.importorskip("pytest_httpserver").HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def served(running):
    """The answer of the server, which a test may replace, and the payloads that it has received."""
    running.clear()
    served = {"payloads": [], "answer": lambda payload: results_of(map(score_of, payload["documents"]))}

    def answer(request):
        payload = request.get_json()
        served["payloads"].append(payload)
        body = served["answer"](payload)
        return body if isinstance(body, Response) else Response(body, content_type="application/json")

    running.expect_request("/v1/rerank", method="POST").respond_with_handler(answer)
    served["url"] = running.url_for("/v1")
    return served


def score_of(text):
    return len(text) / 7


def results_of(scores):
    """Best first, as servers answer."""
    results = [{"index": n, "relevance_score": score} for n, score in enumerate(scores)]
    return json.dumps({"results": sorted(results, key=lambda result: -result["relevance_score"])})


def make_client(served, **options):
    return EndpointTeacher(served["url"], "m", **{"backoff": 0.001, "attempts": 2, "timeout": 5.0} | options)


def test_results_are_put_in_the_order_of_the_documents(served):
    scores = make_client(served).score(PAIRS)
    assert scores == [score_of(document_text(document)) for _, document in PAIRS]
    counts = {payload["query"]: len(payload["documents"]) for payload in served["payloads"]}
    assert counts == dict.fromkeys(QUERIES, len(DOCUMENTS))
    assert all(payload["model"] == "m" and payload["top_n"] == len(DOCUMENTS) for payload in served["payloads"])


def test_scores_may_be_integers(served):
    served["answer"] = lambda payload: results_of([3, 1, -2])
    assert make_client(served).score(PAIRS[:3]) == [3.0, 1.0, -2.0]


def test_documents_are_truncated(served):
    make_client(served, max_chars=5).score(PAIRS[:2])
    assert served["payloads"][0]["documents"] == ["a nov", "The b"]


GOOD = {"index": 0, "relevance_score": 0.5}
WRONG = {
    "too few": [GOOD],
    "too many": [GOOD, GOOD | {"index": 1}, GOOD | {"index": 2}],
    "none": [],
    "one twice": [GOOD, GOOD],
    "one twice, and all": [GOOD, GOOD, GOOD | {"index": 1}],
    "from 1": [GOOD | {"index": 1}, GOOD | {"index": 2}],
    "below 0": [GOOD, GOOD | {"index": -1}],
    "index in words": [GOOD | {"index": "0"}, GOOD | {"index": "1"}],
    "no index": [GOOD, {"relevance_score": 0.1}],
    "no score": [GOOD, {"index": 1}],
    "NaN": [GOOD, {"index": 1, "relevance_score": math.nan}],
    "infinite": [GOOD, {"index": 1, "relevance_score": -math.inf}],
    "beyond floats": [GOOD, {"index": 1, "relevance_score": 10**400}],
    "null": [GOOD, {"index": 1, "relevance_score": None}],
    "a string": [GOOD, {"index": 1, "relevance_score": "0.7"}],
    "a list": [GOOD, {"index": 1, "relevance_score": [0.7]}],
    "true": [GOOD, {"index": 1, "relevance_score": True}],
    "not objects": [0.5, 0.7],
    "strings": ["index", "index"],
    "nulls": [None, None],
    "an object": {"0": 0.5, "1": 0.7},
    "nothing": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("results", WRONG.values(), ids=WRONG)
def test_malformed_answers_give_no_scores(served, results):
    served["answer"] = lambda payload: json.dumps({"results": results})
    teacher = make_client(served)
    assert teacher.score(PAIRS[:2]) == [None, None]
    assert len(served["payloads"]) == 2
    assert teacher.endpoint.retries == {"malformed": 1}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([0, 1, 0.5]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["index", "relevance_score", "results", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@pytest.mark.slow
@given(json_values | st.fixed_dictionaries({"results": st.lists(json_values, min_size=2, max_size=2)}))
def test_any_answer_gives_each_pair_a_score_or_none(served, answer):
    served["answer"] = lambda payload: json.dumps(answer)
    scores = make_client(served, attempts=1).score(PAIRS[:2])
    assert scores == [None, None] or all(isinstance(score, float) and math.isfinite(score) for score in scores)
    assert len(scores) == 2


def test_a_malformed_answer_affects_only_its_query(served):
    good = served["answer"]
    served["answer"] = lambda payload: '{"results": ' if payload["query"] == QUERIES[0] else good(payload)
    scores = make_client(served).score(PAIRS)
    assert scores[: len(DOCUMENTS)] == [None] * len(DOCUMENTS)
    assert scores[len(DOCUMENTS) :] == [score_of(document_text(document)) for document in DOCUMENTS]


def test_a_refused_request_affects_only_its_query(served):
    good = served["answer"]
    served["answer"] = lambda payload: Response("too long", 400) if payload["query"] == QUERIES[1] else good(payload)
    teacher = make_client(served, extra_body={"truncate_prompt_tokens": 9})
    scores = teacher.score(PAIRS)
    assert scores[: len(DOCUMENTS)] == [score_of(document_text(document)) for document in DOCUMENTS]
    assert scores[len(DOCUMENTS) :] == [None] * len(DOCUMENTS)
    assert served["payloads"][0]["truncate_prompt_tokens"] == 9


def test_a_server_in_trouble_ends_the_run(served):
    served["answer"] = lambda payload: Response("no memory", 500)
    with pytest.raises(Unavailable, match=r"/v1/rerank answered 500: no memory"):
        make_client(served).score(PAIRS)
    served["answer"] = lambda payload: Response("no key", 401)
    with pytest.raises(ValueError, match="answered 401: no key"):
        make_client(served).score(PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"model": "n"}, {"version": "2"}, {"max_chars": 9}, {"extra_body": {"a": 1}}])
def test_the_identity_of_a_server_is_its_model_not_its_url(options):
    identity = EndpointTeacher("http://here/v1", "m").identity
    assert EndpointTeacher("http://here/v1", **{"model": "m"} | options).identity != identity
    assert EndpointTeacher("https://there/v2/", "m", concurrency=2, batch_size=3).identity == identity
