"""A folder's scores in a fresh process that cannot import this package."""

import shutil
import sys

import pytest
import tiny
from safetensors.torch import save_file

from modeling_querit.release.reference_scores import REFERENCE_FILE, compute_reference, find_score_problems

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def reference(saved_folders):
    return compute_reference(saved_folders("deepseek_v3"))


@pytest.fixture(autouse=True)
def python(forked_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", forked_python)


@pytest.fixture
def folder(saved_folders, tmp_path):
    return shutil.copytree(saved_folders("deepseek_v3"), tmp_path / "reranker")


@pytest.mark.slow
def test_a_fresh_process_gives_the_reference_scores(folder, reference):
    assert find_score_problems(folder, reference) == []


@pytest.mark.slow
def test_weights_that_have_changed_are_found(folder, reference):
    tensors = tiny.read_tensors(folder)
    tensors["score.bias"] = tensors["score.bias"] + tensors["score.bias"].new_tensor([0.0, 0.3])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    problems = find_score_problems(folder, reference)
    assert [problem.split(" ")[0] for problem in problems] == ["AutoModel", "CrossEncoder"]
    assert all(f"for pair 0 of {REFERENCE_FILE}" in problem for problem in problems)


@pytest.mark.slow
def test_code_that_needs_the_package_is_found(folder, reference):
    code = (folder / "modeling_querit.py").read_text()
    (folder / "modeling_querit.py").write_text(f"import modeling_querit.files\n{code}")
    with pytest.raises(ValueError, match=r"does not load where this package is not installed"):
        find_score_problems(folder, reference)
