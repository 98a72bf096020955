import json

import pytest
from small_adaptations import data_of, lines_of, make_documents, make_settings, manifest_of, write_collection

from modeling_querit.adaptation.pipeline import STAGE_NAMES, Adaptation
from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.adaptation.stages import STAGES
from modeling_querit.files import write_jsonl

DATA_STAGES, ALL_BUT_REPORT = STAGE_NAMES[:4], STAGE_NAMES[:5]


@pytest.fixture(scope="module")
def model(saved_folders):
    """Folder of a tiny reranker."""
    return saved_folders("qwen3")


@pytest.fixture
def settings(tmp_path, model):
    write_collection(tmp_path / "collection")
    return make_settings(tmp_path, model)


def test_a_stage_reads_what_earlier_stages_write():
    written = set()
    for stage in STAGES:
        assert set(stage.reads) <= written
        written |= set(stage.writes)
    assert len(written) == sum(len(stage.writes) for stage in STAGES)


def test_a_stage_depends_on_settings_that_exist():
    for stage in STAGES:
        assert set(stage.sections) <= set(AdaptSettings.model_fields)


def test_truncated_documents_are_counted(settings, tmp_path, model):
    Adaptation(make_settings(tmp_path, model, corpus={"max_chars": 100})).run(["corpus"])
    counts = manifest_of(tmp_path / "run")["stages"]["corpus"]["counts"]
    texts = [document["text"] for document in make_documents()]
    assert counts["truncated"] == sum(len(text) > 100 for text in texts) > 0


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "0 documents"), ([{"_id": "a", "text": "one alone"}], "1 documents"), ([{"_id": 1}], "no text 1")],
)
def test_fewer_than_two_documents_are_refused(tmp_path, model, documents, message):
    write_jsonl(documents, tmp_path / "collection.jsonl")
    settings = make_settings(tmp_path, model, corpus={"source": str(tmp_path / "collection.jsonl")})
    with pytest.raises(ValueError, match=message):
        Adaptation(settings).run()
    assert not (tmp_path / "run" / "data").exists()


def test_two_documents_are_enough(tmp_path, model):
    write_jsonl(make_documents(2), tmp_path / "collection.jsonl")
    settings = make_settings(tmp_path, model, corpus={"source": str(tmp_path / "collection.jsonl")})
    Adaptation(settings).run(DATA_STAGES)
    assert all(len(row["documents"]) == 2 for row in lines_of(tmp_path / "run" / "data" / "train.jsonl"))


@pytest.mark.slow
def test_judgements_are_not_read_before_the_report(settings, tmp_path):
    Adaptation(settings).run(DATA_STAGES)
    before = data_of(settings.output_dir)
    for name in ("qrels/test.tsv", "queries.jsonl"):
        (tmp_path / "collection" / name).unlink()
    Adaptation(settings.model_copy(update={"output_dir": tmp_path / "again"})).run(DATA_STAGES)
    assert data_of(tmp_path / "again") == before


def test_dropped_queries_can_be_read_where_none_is_left(settings, tmp_path, model):
    with pytest.raises(ValueError, match=r"No query is left of 24: short 24\. They are in .*dropped_queries.jsonl"):
        Adaptation(make_settings(tmp_path, model, queries={"min_tokens": 30, "max_tokens": 40})).run(DATA_STAGES)
    assert len(lines_of(tmp_path / "run" / "data" / "dropped_queries.jsonl")) == 24


def test_a_damaged_file_is_named(settings):
    Adaptation(settings).run(["corpus", "queries"])
    queries = settings.output_dir / "data" / "queries.jsonl"
    queries.write_text(queries.read_text()[:-5])
    with pytest.raises(ValueError, match=r"queries\.jsonl, line \d+: .* Remove the file"):
        Adaptation(settings).run(["candidates"])


@pytest.mark.slow
def test_the_report_needs_all_stages_in_the_manifest(settings):
    Adaptation(settings).run(ALL_BUT_REPORT)
    manifest = manifest_of(settings.output_dir)
    del manifest["stages"]["queries"]
    (settings.output_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest.json has no stage queries: run it before the report"):
        Adaptation(settings).run(["report"])
