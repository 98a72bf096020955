from prometheus_client.parser import text_string_to_metric_families

from modeling_querit.serving.metrics import Metrics


def read(metrics):
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def test_two_servers_count_for_themselves():
    first, second = Metrics(), Metrics()
    first.count_request("/rerank", 200, 0.02)
    first.count_step(pairs=3, tokens=100, fill=0.5)
    first.watch_queue(lambda: 7)
    samples = read(first)
    assert samples["querit_requests_total", ("route", "/rerank"), ("status", "200")] == 1
    assert samples["querit_request_seconds_bucket", ("le", "0.01"), ("route", "/rerank")] == 0
    assert samples["querit_request_seconds_bucket", ("le", "0.025"), ("route", "/rerank")] == 1
    assert samples["querit_pairs_total",] == 3
    assert samples["querit_tokens_total",] == 100
    assert samples["querit_queue_pairs",] == 7
    assert read(second)["querit_pairs_total",] == 0
