import asyncio
import itertools

import pytest

from benchmarks import http_load
from benchmarks.http_load import Answer


def test_poisson_arrivals_have_their_rate_and_their_seed():
    bodies = [{"query": str(number)} for number in range(2000)]
    arrivals = http_load.poisson(bodies, 50.0, seed=0)
    assert arrivals == http_load.poisson(bodies, 50.0, seed=0)
    assert arrivals[-1].at == pytest.approx(2000 / 50, rel=0.1)
    assert [arrival.body for arrival in arrivals] == bodies
    gaps = [second.at - first.at for first, second in itertools.pairwise(arrivals)]
    # Exponential gaps: as many below the mean as 1 - 1/e says.
    assert sum(gap < 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.03)


def test_percentiles():
    assert http_load.percentiles([float(number) for number in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


@pytest.mark.slow
def test_latencies_count_from_the_arrival():
    """A server that takes 0.1 s for a request, and one connection for three requests that arrive at once."""

    async def measure():
        async def answer(reader, writer):
            while (head := await reader.readuntil(b"\r\n\r\n")) is not None:
                length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"length" in line)
                await reader.readexactly(length)
                await asyncio.sleep(0.1)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        result = await http_load.send(f"http://127.0.0.1:{port}", http_load.bursts([{}] * 3), 1)
        server.close()
        return result

    answers, seconds = asyncio.run(measure())
    assert sorted(answer.seconds for answer in answers) == pytest.approx([0.1, 0.2, 0.3], abs=0.08)
    assert seconds >= 0.3


def test_scores_are_in_the_order_of_the_documents():
    results = [{"index": 1, "relevance_score": 0.5}, {"index": 0, "relevance_score": -0.5}]
    assert http_load.scores_of(Answer(200, 0.0, {"results": results})) == [-0.5, 0.5]
    with pytest.raises(RuntimeError, match="answered by 429"):
        http_load.scores_of(Answer(429, 0.0, {}))
