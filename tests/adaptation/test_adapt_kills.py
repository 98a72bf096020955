"""Adaptations that are killed, and go on: the same data, byte for byte, and no pair is scored twice."""

import multiprocessing
import os
import random
import resource
import signal
from collections import Counter

import pytest
import torch
from small_adaptations import dataset_of, make_settings, write_collection

from modeling_querit.adaptation import pipeline
from modeling_querit.adaptation.corpus import language_of
from modeling_querit.adaptation.manifest import Manifest
from modeling_querit.adaptation.shards import Shards
from modeling_querit.adaptation.teachers import CrossEncoderTeacher, FirstStageTeacher
from modeling_querit.files import replacing

DATA = pipeline.STAGES[:4]


def counted(teacher, name, path):
    """Writes down each pair that a teacher returns a score for."""
    score = teacher.score

    def score_and_count(self, pairs):
        scores = score(self, pairs)
        with path.open("a") as lines:
            lines.writelines(f"{name}\t{query}\t{document['_id']}\n" for query, document in pairs)
            lines.flush()
            os.fsync(lines.fileno())
        return scores

    teacher.score = score_and_count


def adapt(settings, path, where, count):
    """One process; it dies at the so many-th time that it comes by a place."""
    torch.set_num_threads(1)
    for teacher in (CrossEncoderTeacher, FirstStageTeacher):
        counted(teacher, teacher.__name__, path)
    passed = Counter()

    def die_at(place):
        passed[place] += 1
        if place == where and passed[place] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    add, record = Shards.add, Manifest.record

    def add_and_die(self, values):
        die_at("before a batch is written")
        add(self, values)
        die_at("after a batch is written")

    def record_and_die(self, *args):
        die_at("before a stage is recorded")
        record(self, *args)
        die_at("after a stage is recorded")

    class Replacing:
        """Dies with a file written beside its place."""

        def __init__(self, target):
            self.inner = replacing(target)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *error):
            die_at("before a file is renamed")
            return self.inner.__exit__(*error)

    from modeling_querit import files

    Shards.add, Manifest.record, files.replacing = add_and_die, record_and_die, Replacing
    pipeline.Adaptation(settings).run(DATA)


def adapt_on_a_full_disk(settings, path, room, said):
    """One process that can write no file larger than `room`, as if there were no more of the disk."""
    torch.set_num_threads(1)
    # It unpacks its model on first use.
    language_of("There is room enough for a language model now.")
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        pipeline.Adaptation(settings).run(DATA)
    except OSError as error:
        said.put(str(error))


def run_process(*arguments, target=adapt):
    # Forked from a process that has imported everything and done nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_querit.adaptation.pipeline"])
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory, saved_folders):
    """An adaptation that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    write_collection(folder / "collection")
    settings = make_settings(folder, saved_folders("qwen3"))
    assert run_process(settings, folder / "calls", None, 0) == 0
    return settings, dataset_of(settings.output_dir), (folder / "calls").read_text().splitlines()


def test_nothing_is_scored_twice(whole):
    _, _, calls = whole
    assert len(calls) == len(set(calls)) > 100


@pytest.mark.parametrize(
    ("where", "counts"),
    [
        ("after a batch is written", (1, 2, 4)),
        ("before a stage is recorded", (1, 2, 3, 4)),
        ("after a stage is recorded", (3,)),
        ("before a file is renamed", (1, 2, 3, 5, 7, 9)),
    ],
)
def test_killed_and_gone_on(whole, tmp_path, where, counts):
    settings, data, calls = whole
    settings = settings.model_copy(update={"output_dir": tmp_path / "run"})
    # Each time from the start of what is left, so that several deaths follow each other.
    chosen = random.Random(where).sample(counts, min(2, len(counts)))
    deaths = [run_process(settings, tmp_path / "calls", where, count) for count in chosen]
    assert deaths[0] == -signal.SIGKILL
    assert run_process(settings, tmp_path / "calls", None, 0) == 0
    assert dataset_of(settings.output_dir) == data
    assert sorted((tmp_path / "calls").read_text().splitlines()) == sorted(calls)


def test_a_batch_that_was_not_written_is_the_only_one_scored_again(whole, tmp_path):
    settings, data, calls = whole
    settings = settings.model_copy(update={"output_dir": tmp_path / "run"})
    assert run_process(settings, tmp_path / "calls", "before a batch is written", 3) == -signal.SIGKILL
    assert run_process(settings, tmp_path / "calls", None, 0) == 0
    assert dataset_of(settings.output_dir) == data
    again = Counter((tmp_path / "calls").read_text().splitlines()) - Counter(calls)
    assert 0 < len(again) <= 16
    assert set(again.values()) == {1}


@pytest.mark.parametrize("room", [2_000, 9_000])
def test_a_full_disk_loses_nothing(whole, tmp_path, room):
    settings, data, _ = whole
    settings = settings.model_copy(update={"output_dir": tmp_path / "run"})
    said = multiprocessing.get_context("forkserver").Queue()
    run_process(settings, tmp_path / "calls", room, said, target=adapt_on_a_full_disk)
    assert "The disk is full: " in said.get(timeout=10)
    assert not list(tmp_path.rglob("*.part"))
    assert run_process(settings, tmp_path / "calls", None, 0) == 0
    assert dataset_of(settings.output_dir) == data
