import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.reranking.shards import Shards, ShardWriter, shard_path

SCORES = {0: [0.5, -1.0], 1: [0.1], 2: [], 3: [1 / 3] * 4}


def write(folder, process, blocks):
    writer = ShardWriter(shard_path(folder, process))
    for block in blocks:
        writer.add(block, SCORES[block])
    writer.close()


def read(folder):
    shards = Shards(folder, len(SCORES))
    found = {block: shards.scores(block) for block in SCORES if shards.is_scored(block)}
    shards.close()
    return found


def test_scores_of_all_processes_are_read(tmp_path):
    write(tmp_path, 0, [3, 1])
    write(tmp_path, 1, [0])
    assert read(tmp_path) == {block: SCORES[block] for block in (0, 1, 3)}


@given(st.data())
def test_a_shard_that_ends_anywhere_is_continued(tmp_path, data):
    path = shard_path(tmp_path, 0)
    path.unlink(missing_ok=True)
    write(tmp_path, 0, [0, 1, 2])
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    # What was never written may read as zeros after a power failure.
    path.write_bytes(content[:cut] + data.draw(st.sampled_from([b"", b"\0\0", b"\0\n\0\n"])))
    complete = content[:cut].count(b"\n")
    assert read(tmp_path) == {block: SCORES[block] for block in range(complete)}
    write(tmp_path, 0, range(complete, 4))
    assert read(tmp_path) == SCORES


def test_a_disk_without_room_is_named_and_continued_later(tmp_path):
    resource = pytest.importorskip("resource")
    write(tmp_path, 0, [0])
    room = shard_path(tmp_path, 0).stat().st_size + 10
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(OSError, match=r"scores-00000\.jsonl could not be written.*run the same command again"):
            write(tmp_path, 0, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(tmp_path) == {0: SCORES[0]}
    write(tmp_path, 0, [1, 2, 3])
    assert read(tmp_path) == SCORES
