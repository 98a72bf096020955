"""Adaptations that are killed and resumed: the same data, byte for byte, and no pair is scored twice."""

import os
import random
import resource
import signal
from collections import Counter

import pytest
import torch
from forked_calls import CONTEXT, exit_code_of
from small_adaptations import data_of, make_settings, write_collection

from modeling_querit import files
from modeling_querit.adaptation import pipeline
from modeling_querit.adaptation.corpus import detect_language
from modeling_querit.adaptation.manifest import Manifest
from modeling_querit.adaptation.teachers import CrossEncoderTeacher, FirstStageTeacher
from modeling_querit.cache import DiskCache
from modeling_querit.files import atomic_write

DATA_STAGES = pipeline.STAGE_NAMES[:4]

pytestmark = pytest.mark.slow


def log_scored_pairs(teacher, path):
    """Append each pair that a teacher class returns a score for to a file."""
    score = teacher.score

    def score_and_log(self, pairs):
        scores = score(self, pairs)
        with path.open("a") as log:
            log.writelines(f"{teacher.__name__}\t{query}\t{document['_id']}\n" for query, document in pairs)
            log.flush()
            os.fsync(log.fileno())
        return scores

    teacher.score = score_and_log


def adapt(settings, log, event, count):
    """Run the data stages in this process, which kills itself when an event happens for the `count`-th time."""
    torch.set_num_threads(1)
    for teacher in (CrossEncoderTeacher, FirstStageTeacher):
        log_scored_pairs(teacher, log)
    happened = Counter()

    def happens(name):
        happened[name] += 1
        if name == event and happened[name] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    add, record = DiskCache.add, Manifest.record

    def add_or_die(self, values):
        happens("before a batch is written")
        add(self, values)
        happens("after a batch is written")

    def record_or_die(self, *args):
        happens("before a stage is recorded")
        record(self, *args)
        happens("after a stage is recorded")

    class AtomicWriteOrDie:
        """Leaves a temporary file behind if it dies."""

        def __init__(self, target):
            self.inner = atomic_write(target)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *error):
            happens("before a file is renamed")
            return self.inner.__exit__(*error)

    DiskCache.add, Manifest.record, files.atomic_write = add_or_die, record_or_die, AtomicWriteOrDie
    pipeline.Adaptation(settings).run(DATA_STAGES)


def adapt_on_a_full_disk(settings, log, room, messages):
    """Run the data stages in this process, which can write no file larger than `room` bytes."""
    torch.set_num_threads(1)
    # The language identifier unpacks its model on first use.
    detect_language("There is room enough for a language model now.")
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        pipeline.Adaptation(settings).run(DATA_STAGES)
    except OSError as error:
        messages.put(str(error))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, saved_folders):
    """Settings, data and scored pairs of a run that was not killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_collection(folder / "collection")
    settings = make_settings(folder, saved_folders("qwen3"))
    assert exit_code_of(adapt, settings, folder / "log", None, 0) == 0
    return settings, data_of(settings.output_dir), (folder / "log").read_text().splitlines()


def test_no_pair_is_scored_twice(uninterrupted):
    _, _, scored = uninterrupted
    assert len(scored) == len(set(scored)) > 100


@pytest.mark.parametrize(
    ("event", "counts"),
    [
        ("after a batch is written", (1, 2, 4)),
        ("before a stage is recorded", (1, 2, 3, 4)),
        ("after a stage is recorded", (3,)),
        ("before a file is renamed", (1, 2, 3, 5, 7, 9)),
    ],
)
def test_a_killed_run_is_resumed(uninterrupted, tmp_path, event, counts):
    settings, data, scored = uninterrupted
    settings = settings.model_copy(update={"output_dir": tmp_path / "run"})
    # Killed again after it was resumed.
    chosen = random.Random(event).sample(counts, min(2, len(counts)))
    exit_codes = [exit_code_of(adapt, settings, tmp_path / "log", event, count) for count in chosen]
    assert exit_codes[0] == -signal.SIGKILL
    assert exit_code_of(adapt, settings, tmp_path / "log", None, 0) == 0
    assert data_of(settings.output_dir) == data
    assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(scored)


def test_only_a_batch_that_was_not_written_is_scored_again(uninterrupted, tmp_path):
    settings, data, scored = uninterrupted
    settings = settings.model_copy(update={"output_dir": tmp_path / "run"})
    assert exit_code_of(adapt, settings, tmp_path / "log", "before a batch is written", 3) == -signal.SIGKILL
    assert exit_code_of(adapt, settings, tmp_path / "log", None, 0) == 0
    assert data_of(settings.output_dir) == data
    scored_again = Counter((tmp_path / "log").read_text().splitlines()) - Counter(scored)
    assert 0 < len(scored_again) <= 16
    assert set(scored_again.values()) == {1}


@pytest.mark.parametrize("room", [2_000, 9_000])
def test_a_full_disk_loses_nothing(uninterrupted, tmp_path, room):
    settings, data, _ = uninterrupted
    settings = settings.model_copy(update={"output_dir": tmp_path / "run"})
    messages = CONTEXT.Queue()
    exit_code_of(adapt_on_a_full_disk, settings, tmp_path / "log", room, messages)
    assert "could not be written. Files written before are complete" in messages.get(timeout=60)
    assert not list(tmp_path.rglob("*.part"))
    assert exit_code_of(adapt, settings, tmp_path / "log", None, 0) == 0
    assert data_of(settings.output_dir) == data
