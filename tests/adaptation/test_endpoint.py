import socket
import threading
import time
from itertools import pairwise

import pytest
from pyrate_limiter import Rate
from werkzeug import Response

from modeling_querit.adaptation import endpoint as module
from modeling_querit.adaptation.endpoint import Endpoint, Malformed, Refused, Unavailable

HTTPServer = pytest.importorskip("pytest_httpserver").HTTPServer

OK = '{"answer": 42}'


@pytest.fixture(scope="module")
def running():
    # Stopping a server takes half a second.
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def server(running):
    running.clear()
    return running


class Served:
    """A route that gives answers in turn, and then the last one again; it logs payloads, times and headers."""

    def __init__(self, server, *answers):
        self.url, self.answers = server.url_for("/route"), answers
        self.payloads, self.times, self.headers = [], [], []
        self._lock = threading.Lock()
        server.expect_request("/route", method="POST").respond_with_handler(self._answer)

    def _answer(self, request):
        with self._lock:
            index = min(len(self.payloads), len(self.answers) - 1)
            self.payloads.append(request.get_json())
            self.times.append(time.monotonic())
            self.headers.append(request.headers)
        answer = self.answers[index]
        # A Response is callable too.
        if not isinstance(answer, str | bytes | Response):
            answer = answer(request)
        return answer if isinstance(answer, Response) else Response(answer, content_type="application/json")


def status(code, **headers):
    return Response("sorry", code, headers)


def make_endpoint(url, **options):
    return Endpoint(url, **{"backoff": 0.001, "timeout": 5.0} | options)


def answer_of(answer):
    return answer["answer"] + 0


def test_answers_are_parsed(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    served = Served(server, OK)
    endpoint = make_endpoint(served.url, api_key_variable="A_KEY")
    assert endpoint.post({"q": "日本"}, answer_of) == 42
    assert served.payloads == [{"q": "日本"}]
    assert served.headers[0]["Authorization"] == "Bearer secret"
    assert endpoint.retries == {}


def test_no_key_is_sent_without_a_variable(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    served = Served(server, OK)
    make_endpoint(served.url).post({}, answer_of)
    assert "Authorization" not in served.headers[0]


def test_a_server_that_is_down_is_unavailable():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    endpoint = make_endpoint(f"http://localhost:{port}/route", attempts=3)
    with pytest.raises(Unavailable, match=f"localhost:{port}/route could not be reached"):
        endpoint.post({}, answer_of)
    assert endpoint.retries == {"unavailable": 2}


def test_a_server_is_there_whatever_it_answers(server):
    make_endpoint(server.url_for("/nowhere")).check()
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    with pytest.raises(Unavailable, match=f"localhost:{port}/route could not be reached.*; start the server"):
        make_endpoint(f"http://localhost:{port}/route").check()


def test_the_first_retry_is_reported(server, caplog):
    endpoint = make_endpoint(Served(server, status(503), status(503), OK).url)
    assert endpoint.post({}, answer_of) == 42
    (message,) = (record.getMessage() for record in caplog.records if record.name == module.logger.name)
    assert message.endswith("/route answered 503: sorry Trying again, for up to 10 times.")


def slowly(request):
    time.sleep(0.6)
    return OK


@pytest.mark.slow
def test_a_slow_answer_is_retried(server):
    served = Served(server, slowly, OK)
    endpoint = make_endpoint(served.url, timeout=0.2)
    assert endpoint.post({}, answer_of) == 42
    assert endpoint.retries == {"unavailable": 1}
    server.clear()
    with pytest.raises(Unavailable, match="did not answer in time"):
        make_endpoint(Served(server, slowly).url, timeout=0.2, attempts=1).post({}, answer_of)


@pytest.mark.slow
def test_the_timeout_holds_for_the_whole_answer(server):
    def drip(request):
        def pieces():
            for character in OK:
                time.sleep(0.1)
                yield character

        return Response(pieces(), content_type="application/json")

    served = Served(server, drip)
    with pytest.raises(Unavailable, match="in time"):
        make_endpoint(served.url, timeout=0.4, attempts=1).post({}, answer_of)


@pytest.mark.slow
@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504])
def test_transient_errors_are_retried(server, code):
    served = Served(server, status(code), status(code), OK)
    endpoint = make_endpoint(served.url)
    assert endpoint.post({"q": 1}, answer_of) == 42
    assert served.payloads == [{"q": 1}] * 3
    assert endpoint.retries == {"unavailable": 2}


def test_attempts_are_limited(server):
    served = Served(server, status(500))
    with pytest.raises(Unavailable, match="answered 500: sorry"):
        make_endpoint(served.url, attempts=4).post({}, answer_of)
    assert len(served.payloads) == 4


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_permanent_errors_are_not_retried(server, code):
    served = Served(server, status(code))
    endpoint = make_endpoint(served.url)
    with pytest.raises(ValueError, match=f"answered {code}: sorry"):
        endpoint.post({}, answer_of)
    assert len(served.payloads) == 1
    assert endpoint.retries == {}


def test_a_server_that_refuses_everything_ends_the_run(server):
    """One query may be too long; if all are refused, something else is wrong."""
    served = Served(server, status(400))
    new, known = make_endpoint(served.url), make_endpoint(served.url)
    known.mark_as_working()
    kinds = []
    for endpoint in (new, known):
        for _ in range(12):
            with pytest.raises(ValueError, match="answered 400") as caught:
                endpoint.post({}, answer_of)
            kinds.append(type(caught.value))
    assert kinds == [Refused] * 8 + [ValueError] * 4 + [Refused] * 12


@pytest.mark.slow
def test_retry_after_is_respected(server):
    served = Served(server, status(429, **{"Retry-After": "0.4"}), OK)
    make_endpoint(served.url).post({}, answer_of)
    assert 0.4 <= served.times[1] - served.times[0] < 2


def test_retry_after_takes_precedence_over_back_off(server):
    served = Served(server, status(429, **{"Retry-After": "0"}), OK)
    with pytest.raises(Unavailable) as caught:
        make_endpoint(served.url, attempts=1).post({}, answer_of)
    assert caught.value.wait == 0
    for _ in range(5):
        served.payloads.clear()
        served.times.clear()
        make_endpoint(served.url, backoff=1.0).post({}, answer_of)
        assert served.times[1] - served.times[0] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("86400", 60),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("1.2.3", None),
        ("nan", None),
        ("²", None),
        ("Wed, 21 Oct 2037 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_seconds(server, value, seconds):
    served = Served(server, status(503, **{"Retry-After": value}))
    with pytest.raises(Unavailable) as caught:
        make_endpoint(served.url, attempts=1).post({}, answer_of)
    assert caught.value.wait == seconds


def test_a_broken_connection_is_retried(server):
    # Fewer bytes than announced.
    served = Served(server, Response(OK[:5], headers={"Content-Length": "500"}), OK)
    endpoint = make_endpoint(served.url)
    assert endpoint.post({}, answer_of) == 42
    assert len(served.payloads) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        OK[:7],
        "",
        "<html>Welcome</html>",
        b"\xff\xfe\xfa",
        "[]",
        "null",
        "3",
        '"answer"',
        '{"answers": 42}',
        '{"answer": null}',
        '{"answer": [42]}',
        "[" * 100_000,
    ],
    ids=lambda answer: repr(answer[:16]),
)
def test_malformed_answers_are_retried(server, answer):
    endpoint = make_endpoint(Served(server, answer, OK).url)
    assert endpoint.post({}, answer_of) == 42
    assert endpoint.retries == {"malformed": 1}
    server.clear()
    served = Served(server, answer)
    with pytest.raises(Malformed, match=served.url):
        make_endpoint(served.url, attempts=2).post({}, answer_of)
    assert len(served.payloads) == 2


def test_requests_run_concurrently_up_to_the_limit(server):
    lock, all_here, under_way, most = threading.Lock(), threading.Barrier(4, timeout=3), [], []

    def together(request):
        with lock:
            under_way.append(1)
            most.append(len(under_way))
        # Breaks, and answers 500, unless four requests are here at the same time.
        all_here.wait()
        time.sleep(0.05)
        with lock:
            under_way.pop()
        return OK

    served = Served(server, together)
    endpoint = make_endpoint(served.url, concurrency=4, attempts=1)
    answers = list(endpoint.map(lambda item: endpoint.post({"item": item}, answer_of), range(12)))
    assert answers == [42] * 12
    assert max(most) == 4


def test_results_are_in_the_order_of_the_items(server):
    def later_is_faster(request):
        item = request.get_json()["item"]
        time.sleep(0.02 * (8 - item))
        return f'{{"answer": {item * 10}}}'

    endpoint = make_endpoint(Served(server, later_is_faster).url, concurrency=8)
    answers = endpoint.map(lambda item: endpoint.post({"item": item}, answer_of), range(8))
    assert list(answers) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert list(endpoint.map(answer_of, [])) == []


@pytest.mark.slow
def test_the_rate_limit_holds(server, monkeypatch):
    """A minute takes half a second here."""
    monkeypatch.setattr(module, "Rate", lambda count, _: Rate(count, 500))
    served = Served(server, OK)
    endpoint = make_endpoint(served.url, requests_per_minute=3, concurrency=9)
    assert list(endpoint.map(lambda _: endpoint.post({}, answer_of), range(9))) == [42] * 9
    times = sorted(served.times)
    # Four in a row take a minute, less the time on the way to the server.
    assert all(after - before > 0.4 for before, after in zip(times, times[3:], strict=False))
    assert times[-1] - times[0] < 3


@pytest.mark.slow
def test_retries_count_towards_the_rate_limit(server, monkeypatch):
    monkeypatch.setattr(module, "Rate", lambda count, _: Rate(count, 300))
    served = Served(server, status(500), status(500), OK)
    make_endpoint(served.url, requests_per_minute=1).post({}, answer_of)
    assert all(after - before > 0.2 for before, after in pairwise(served.times))


def test_a_failing_item_ends_the_map(server):
    served = Served(server, status(401))
    endpoint = make_endpoint(served.url, concurrency=2)

    def ask(item):
        # The first is refused while the others wait to be sent.
        time.sleep(0.05 * (item > 0))
        return endpoint.post({"item": item}, answer_of)

    with pytest.raises(ValueError, match="answered 401"):
        list(endpoint.map(ask, range(50)))
    assert len(served.payloads) <= 4


@pytest.mark.slow
def test_a_failing_item_ends_the_map_while_another_is_under_way(server):
    def refuse_but_the_first(request):
        if request.get_json()["item"] == 0:
            time.sleep(0.6)
            return OK
        return status(401)

    served = Served(server, refuse_but_the_first)
    endpoint = make_endpoint(served.url, concurrency=2)
    with pytest.raises(ValueError, match="answered 401"):
        list(endpoint.map(lambda item: endpoint.post({"item": item}, answer_of), range(50)))
    assert len(served.payloads) <= 4


def test_a_single_request_that_never_succeeds_is_refused(server):
    def fail_for_one(request):
        return status(500) if request.get_json()["item"] == 3 else OK

    endpoint = make_endpoint(Served(server, fail_for_one).url, attempts=2)
    assert endpoint.post({"item": 0}, answer_of) == 42
    with pytest.raises(Refused, match="answered 500"):
        endpoint.post({"item": 3}, answer_of)
    assert endpoint.post({"item": 4}, answer_of) == 42


def test_a_server_that_goes_away_ends_the_run(server):
    endpoint = make_endpoint(Served(server, OK, status(500)).url, attempts=1)
    endpoint.post({}, answer_of)
    for _ in range(7):
        with pytest.raises(Refused, match="answered 500"):
            endpoint.post({}, answer_of)
    with pytest.raises(Unavailable, match="answered 500"):
        endpoint.post({}, answer_of)


def test_a_server_with_only_malformed_answers_ends_the_run(server):
    endpoint = make_endpoint(Served(server, "[]").url, attempts=1)
    for _ in range(7):
        with pytest.raises(Malformed):
            endpoint.post({}, answer_of)
    with pytest.raises(ValueError, match="So was every answer before it"):
        endpoint.post({}, answer_of)


def test_waiting_retries_stop_when_another_item_fails(server):
    def refuse_one(request):
        return status(401) if request.get_json()["item"] == 1 else status(500)

    endpoint = make_endpoint(Served(server, refuse_one).url, backoff=60.0, concurrency=2)
    start = time.monotonic()
    with pytest.raises(ValueError, match="answered 401"):
        endpoint.map(lambda item: endpoint.post({"item": item}, answer_of), range(2))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("key", ["ab\nc", "schlüssel"])
def test_invalid_keys_are_refused(monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ValueError, match="'SOME_KEY', which holds no API key") as caught:
        Endpoint("http://localhost", api_key_variable="SOME_KEY")
    assert key not in str(caught.value)


def test_white_space_around_a_key_is_removed(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "abc\n")
    served = Served(server, OK)
    make_endpoint(served.url, api_key_variable="SOME_KEY").post({}, answer_of)
    assert served.headers[0]["Authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, "has to begin with http"),
        ({"url": "ftp://localhost"}, "has to begin with http"),
        ({"url": 80}, "(?s)url.*valid string"),
        ({"concurrency": 0}, "(?s)concurrency.*greater than 0"),
        ({"concurrency": "many"}, "(?s)concurrency.*valid integer"),
        ({"attempts": 0}, "(?s)attempts.*greater than 0"),
        ({"requests_per_minute": 0}, "(?s)requests_per_minute.*greater than 0"),
        ({"requests_per_minute": -5}, "(?s)requests_per_minute.*greater than 0"),
        ({"timeout": -1}, "(?s)timeout.*greater than 0"),
        ({"timeout": float("inf")}, "(?s)timeout.*finite"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"url": "http://localhost"} | options)
