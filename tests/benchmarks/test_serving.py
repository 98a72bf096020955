"""The servers run in threads of this process, on one tiny model."""

import json
import threading
import time

import pytest
import uvicorn

from benchmarks import http_load, serving, serving_peer
from benchmarks.http_load import Server
from modeling_querit import QueritForSequenceRanking
from modeling_querit.serving.run import make_server
from modeling_querit.serving.settings import ServerSettings


def start(server, port):
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    return thread, Server(None, f"http://127.0.0.1:{port}")


@pytest.mark.slow
def test_servers_are_measured_in_turns(saved_folders, models, monkeypatch, tmp_path):
    pytest.importorskip("sentence_transformers")
    threads, servers = [], []

    def start_servers(stack, model, folder, vllm):
        ports = [http_load.free_port() for _ in range(2)]
        ours = make_server(QueritForSequenceRanking.from_pretrained(model), ServerSettings(cache_mb=0))
        ours.config.port = ports[0]
        theirs = uvicorn.Server(uvicorn.Config(serving_peer.make_app(model), port=ports[1], log_level="warning"))
        servers.extend([ours, theirs])
        started = [start(server, port) for server, port in zip(servers, ports, strict=True)]
        threads.extend(thread for thread, _ in started)
        return {serving.OURS: started[0][1], serving.PEER: started[1][1]}

    monkeypatch.setattr(serving, "start_servers", start_servers)
    path = tmp_path / "serving.json"
    arguments = ["--model", str(saved_folders("qwen3")), "--requests", "12", "--documents", "4", "--tokens", "8"]
    try:
        serving.main([*arguments, "--rounds", "2", "--connections", "4", "--json", str(path)])
    finally:
        for server in servers:
            server.should_exit = True
        for thread in threads:
            thread.join()
    results = json.loads(path.read_text())
    burst, steady = results["rows"]
    assert burst["workload"] == "burst"
    assert steady["workload"].startswith("Poisson")
    for row in results["rows"]:
        assert len(row["all_seconds_ours"]) == len(row["all_seconds_against"]) == 2
        assert row["p50_ours"] <= row["p95_ours"] <= row["p99_ours"]
        assert row["p95_ratio"] == pytest.approx(row["p95_against"] / row["p95_ours"])
    assert results["max_score_differences"][serving.PEER] < 0.05
