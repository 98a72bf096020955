import pytest
from small_adaptations import make_settings

from modeling_querit.adaptation.manifest import Dependencies, Manifest, fingerprint_of, summarize


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path, "model")


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "data" / "corpus.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    return path


def test_a_recorded_stage_has_finished_while_fingerprint_and_files_stay(tmp_path, written):
    manifest = Manifest(tmp_path)
    assert manifest.finished("corpus", "a") is None
    manifest.record("corpus", "a", [written], {"documents": 3}, 0.5, {})
    assert Manifest(tmp_path).finished("corpus", "a") == {"documents": 3}
    assert manifest.finished("corpus", "b") is None
    assert manifest.finished("queries", "a") is None
    written.write_text("[]\n")
    assert manifest.finished("corpus", "a") is None
    written.unlink()
    assert manifest.finished("corpus", "a") is None


@pytest.mark.parametrize("content", ["[]", "{", '{"stages": []}', "\x00"])
def test_a_damaged_manifest_is_named(tmp_path, written, content):
    manifest = Manifest(tmp_path)
    manifest.path.write_text(content)
    for use in (lambda: manifest.stages, lambda: manifest.record("corpus", "a", [written], {}, 0.5, {})):
        with pytest.raises(ValueError, match=r"manifest.json is damaged: remove it"):
            use()
    manifest.path.unlink()
    assert manifest.stages == {}


def test_the_fingerprint_covers_settings_inputs_and_dependencies(tmp_path, settings, written):
    dependencies = Dependencies(("candidates",), files=[written])
    fingerprint = fingerprint_of(settings, [written], dependencies)
    assert fingerprint_of(settings.model_copy(), [written], dependencies) == fingerprint
    other_section = make_settings(tmp_path, "model", queries={"round_trip": 3})
    assert fingerprint_of(other_section, [written], dependencies) == fingerprint
    model = tmp_path / "encoder"
    model.mkdir()
    (model / "config.json").write_text("{}")
    fingerprints = [
        fingerprint_of(make_settings(tmp_path, "model", candidates={"top": 2}), [written], dependencies),
        fingerprint_of(make_settings(tmp_path, "model", seed=1), [written], dependencies),
        fingerprint_of(settings, [], dependencies),
        fingerprint_of(settings, [written], Dependencies(("candidates",))),
        fingerprint_of(settings, [written], Dependencies(("candidates",), [str(model)], [written])),
        fingerprint_of(settings, [written], Dependencies(("candidates",), files=[written], values=("x",))),
    ]
    (model / "config.json").write_text("[]")
    fingerprints.append(fingerprint_of(settings, [written], Dependencies(("candidates",), [str(model)], [written])))
    written.write_text("[]\n")
    fingerprints.append(fingerprint_of(settings, [written], dependencies))
    assert len({fingerprint, *fingerprints}) == len(fingerprints) + 1


def test_files_that_do_not_exist_are_left_out_of_the_fingerprint(tmp_path, settings):
    missing = Dependencies(("candidates",), files=[tmp_path / "missing.trec"])
    assert fingerprint_of(settings, [], missing) == fingerprint_of(settings, [], Dependencies(("candidates",)))


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({}, ""),
        ({"already done": "", "queries": 1200}, "already done, queries 1,200"),
        ({"dropped": {}, "languages": {"en": 1, "de": 2}}, "languages (en 1, de 2)"),
    ],
)
def test_counts_are_summarized_in_a_line(counts, line):
    assert summarize(counts) == line
