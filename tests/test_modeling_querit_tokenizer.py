"""The tokenizer is read with the weights: what happens to the folder afterwards changes nothing."""

import shutil

import pytest
import tiny
import torch

from modeling_querit import QueritForSequenceRanking, QueritProcessor


def spoil(folder):
    """Put another tokenizer in the place of one."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["book", "wrote"])
    QueritProcessor(tokenizer).save_pretrained(folder)


@pytest.fixture
def folder(saved_folders, tmp_path):
    return shutil.copytree(saved_folders("qwen3"), tmp_path / "model")


@pytest.fixture
def expected(models):
    return models("qwen3").predict(tiny.pairs()).tolist()


@pytest.mark.parametrize("change", [spoil, shutil.rmtree])
def test_a_folder_that_is_replaced_or_deleted_changes_no_score(folder, expected, tmp_path, change):
    model = QueritForSequenceRanking.from_pretrained(folder)
    change(folder)
    assert model.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = QueritForSequenceRanking.from_pretrained(tmp_path / "again")
    assert again.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_relative_name_is_read_where_it_was_loaded(folder, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = QueritForSequenceRanking.from_pretrained(folder.name)
    (tmp_path / "elsewhere").mkdir()
    spoil(shutil.copytree(folder, tmp_path / "elsewhere" / folder.name))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert model.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_repository_is_read_at_the_commit_of_the_weights(folder, expected, tmp_path):
    """From a cache as huggingface_hub writes it, which is gone when pairs are ranked."""
    repository = tmp_path / "cache" / "models--me--ranker"
    for commit, name in [("1" * 40, "main"), ("2" * 40, "v1")]:
        shutil.copytree(folder, repository / "snapshots" / commit / "sub")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    spoil(repository / "snapshots" / ("1" * 40) / "sub")
    model = QueritForSequenceRanking.from_pretrained(
        "me/ranker", subfolder="sub", revision="v1", cache_dir=tmp_path / "cache", local_files_only=True
    )
    shutil.rmtree(tmp_path / "cache")
    assert model.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("is_repository", [True, False])
def test_a_model_without_a_tokenizer_loads_and_says_what_it_lacks(folder, tmp_path, is_repository, models):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    arguments = {}
    if is_repository:
        repository = tmp_path / "cache" / "models--me--ranker"
        shutil.copytree(folder, repository / "snapshots" / ("1" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1" * 40)
        folder, arguments = "me/ranker", {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = QueritForSequenceRanking.from_pretrained(folder, **arguments)
    with pytest.raises(ValueError, match=r"has no tokenizer.*model\.processor = QueritProcessor"):
        model.rank(tiny.QUERY, tiny.DOCUMENTS)
    model.processor = models("qwen3").processor
    assert len(model.rank(tiny.QUERY, tiny.DOCUMENTS)) == len(tiny.DOCUMENTS)


def test_no_name_is_named():
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        QueritForSequenceRanking.from_pretrained(None)


# Exported models


@pytest.mark.slow
def test_an_exported_model_takes_any_batch_and_length(model):
    batch, sequence = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("sequence", min=4, max=256)
    ids = torch.randint(3, 500, (3, 20))
    shapes = {"input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}, "return_dict": None}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": False}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for size in ((1, 7), (3, 20), (5, 33)):
        ids = torch.randint(3, 500, size)
        ids[:, -1] = model.processor.cls_token_id
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        score = exported(input_ids=ids, attention_mask=mask, return_dict=False)[1]
        torch.testing.assert_close(score, model(input_ids=ids, attention_mask=mask).score, rtol=0, atol=1e-5)
