import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit import QueritProcessor
from modeling_querit.multi_process_querit import check_devices, plan_chunks

# Queries of one and of many documents, and a query of two.
PAIRS = [
    *tiny.pairs() * 20,
    *((f"query {index % 3}", f"{index} " * (index % 40)) for index in range(60)),
    *((f"alone {index}", "a fox") for index in range(40)),
]


@pytest.fixture(scope="module")
def model(models):
    """A model of one's own, since its pool would notice changes."""
    return copy.deepcopy(models("deepseek_v3"))


@pytest.fixture(scope="module")
def pool(model):
    model.processor = QueritProcessor(tiny.make_tokenizer())
    with model.start_multi_process_pool(["cpu", "cpu"]) as pool:
        yield pool


# Chunks


@given(
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(0, 50)), max_size=300),
    st.integers(1, 8),
)
def test_every_pair_is_in_one_chunk_and_small_queries_stay_whole(pairs, workers):
    queries, lengths = [query for query, _ in pairs], [length for _, length in pairs]
    chunks = plan_chunks(queries, lengths, workers)
    assert sorted(pair for chunk in chunks for pair in chunk) == list(range(len(pairs)))
    size = max(1, min(64, -(-len(pairs) // (2 * workers))))
    assert all(0 < len(chunk) <= size for chunk in chunks)
    for query, count in Counter(queries).items():
        if count <= size:
            assert sum(query in {queries[pair] for pair in chunk} for chunk in chunks) == 1


def test_documents_of_one_query_are_dealt_out_by_length():
    lengths = list(range(100))
    chunks = plan_chunks(["q"] * 100, lengths, 2)
    work = [sum(lengths[pair] for pair in chunk) for chunk in chunks]
    assert len(chunks) == 4
    assert max(work) - min(work) < 100


# Scores


@pytest.mark.slow
def test_processes_give_the_same_scores(model, pool):
    expected = model.predict(PAIRS)
    assert torch.allclose(model.predict(PAIRS, pool=pool), expected, rtol=0, atol=1e-6)
    assert list(model.predict_stream(iter(PAIRS), pool=pool)) == pytest.approx(expected.tolist(), abs=1e-6)
    assert model.predict([], pool=pool).tolist() == []
    options = {"instruction": tiny.INSTRUCTION, "max_length": 64, "batch_tokens": 128}
    assert torch.allclose(
        model.predict(PAIRS, pool=pool, **options), model.predict(PAIRS, **options), rtol=0, atol=1e-6
    )


@pytest.mark.slow
def test_rank_shares_the_documents_of_a_query(model, pool):
    documents = [(f"d{index}", document) for index, document in enumerate(tiny.STRINGS)]
    expected = model.rank(tiny.QUERY, documents, top_k=3)
    ranking = model.rank(tiny.QUERY, documents, top_k=3, pool=pool)
    assert [(ranked.id, ranked.document) for ranked in ranking] == [(ranked.id, ranked.document) for ranked in expected]
    assert [ranked.score for ranked in ranking] == pytest.approx([ranked.score for ranked in expected], abs=1e-6)


@pytest.mark.slow
def test_threads_may_share_a_pool(model, pool):
    results = {}
    threads = [
        threading.Thread(target=lambda part=part: results.update({part: model.predict(PAIRS[part::3], pool=pool)}))
        for part in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = model.predict(PAIRS)
    for part in range(3):
        assert torch.allclose(results[part], expected[part::3], rtol=0, atol=1e-6)


# Errors


@pytest.mark.slow
def test_errors_of_a_worker_are_raised_as_they_are_and_the_pool_goes_on(model, pool):
    with pytest.raises(ValueError, match="The instruction takes") as caught:
        model.predict(PAIRS, "a long instruction " * 50, max_length=32, pool=pool)
    assert "In a worker process on cpu" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="document 70 is int 3"):
        model.predict([*PAIRS[:70], ("q", {"text": 3})], pool=pool)
    assert model.predict(PAIRS[:3], pool=pool).tolist() == pytest.approx(model.predict(PAIRS[:3]).tolist(), abs=1e-6)


@pytest.mark.slow
def test_a_pool_is_for_one_model_as_it_is(models, model, pool):
    with pytest.raises(ValueError, match="that of another model"):
        models("qwen3").predict(PAIRS, pool=pool)
    with pytest.raises(ValueError, match="give one of them"):
        model.predict(PAIRS, device=["cpu"], pool=pool)
    processor, model.processor = model.processor, QueritProcessor(tiny.make_tokenizer())
    with pytest.raises(ValueError, match="has changed since its pool was started"):
        model.predict(PAIRS, pool=pool)
    model.processor = processor
    model.predict(PAIRS[:1], pool=pool)


@pytest.mark.parametrize(
    ("device", "error"), [("cpu", TypeError), ([], ValueError), (["cqu"], ValueError), ([0], TypeError), (3, TypeError)]
)
def test_devices_that_are_none_are_named_at_once(models, device, error):
    with pytest.raises(error, match=r"device is .*give a list with the device of each process"):
        models("deepseek_v3").rank(tiny.QUERY, tiny.DOCUMENTS, device=device)
    with pytest.raises(error):
        check_devices(device)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that cannot be used")
def test_a_device_that_cannot_be_used_is_named(models):
    with pytest.raises(RuntimeError, match=r"on cuda:0 cannot use it: .*CUDA"):
        models("deepseek_v3").rank(tiny.QUERY, tiny.DOCUMENTS, device=["cuda:0"])


@pytest.mark.slow
def test_whoever_scores_in_a_pool_that_is_closed_gets_an_error(models):
    """In the midst, in the queue behind another thread, and in a stream that was begun before."""
    model = models("deepseek_v3")
    pool = model.start_multi_process_pool(["cpu"])
    stream = model.predict_stream(PAIRS, pool=pool)
    is_scoring, errors = threading.Event(), []

    def pairs():
        for pair in PAIRS * 100:
            yield pair
            is_scoring.set()

    def score():
        try:
            model.predict(pairs(), pool=pool)
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=score, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    is_scoring.wait()
    pool.close()
    pool.close()
    for thread in threads:
        thread.join(30)
    assert errors == ["The pool was closed before all pairs had their scores: start a new one."] * 3
    with pytest.raises(RuntimeError, match="The pool was closed"):
        next(stream)


def test_what_cannot_be_sent_is_an_error(models):
    model = copy.deepcopy(models("deepseek_v3"))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be sent to other processes"):
        model.predict(PAIRS, device=["cpu"])


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_ends_the_pool(models):
    model = copy.deepcopy(models("deepseek_v3")).train()
    with torch.no_grad():
        model.score.bias.add_(0.1)
    pool = model.start_multi_process_pool(["cpu"])
    # The workers hold the weights of now, and the model's own stay as they are.
    assert torch.allclose(model.predict(PAIRS, pool=pool), model.predict(PAIRS), rtol=0, atol=1e-6)
    assert model.training
    assert not any(parameter.is_shared() for parameter in model.parameters())
    [process] = pool.processes

    def pairs():
        yield from PAIRS * 2
        os.kill(process.pid, signal.SIGKILL)
        yield from PAIRS * 2

    with pytest.raises(RuntimeError, match=r"worker process \d+ on cpu ended with exit code -9, perhaps for lack of"):
        model.predict(pairs(), pool=pool)
    with pytest.raises(ValueError, match="pool is closed"):
        model.predict(PAIRS, pool=pool)


# A script


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_script_with_remote_code_computes_in_a_process_and_leaves_no_process_at_ctrl_c(
    saved_folders, models, tmp_path
):
    """The package is not importable: workers find the code where the script has it from."""
    folder = saved_folders("deepseek_v3")
    script = Path(__file__).with_name("parallel_script.py")
    command = [sys.executable, "-P", script, folder, json.dumps(PAIRS[:40])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    # A group of its own, all of which Ctrl-C reaches.
    with subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed = json.loads(process.stdout.readline())
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert printed["module"].startswith("transformers_modules.")
    assert printed["scores"] == pytest.approx(models("deepseek_v3").predict(PAIRS[:40]).tolist(), abs=1e-6)
    assert process.returncode != 0
    # The script ends with a traceback, as scripts do; its worker has nothing to say.
    assert "KeyboardInterrupt" in err
    assert "SpawnProcess" not in err
    deadline = time.monotonic() + 10
    while any(map(is_running, printed["pids"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, printed["pids"]))
