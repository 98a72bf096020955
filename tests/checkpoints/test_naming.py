import pytest

from modeling_querit.checkpoints.naming import public_names


@pytest.fixture
def folders(tmp_path):
    """Makes folders, and gives their paths."""

    def make(*names):
        for name in names:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        return [str(tmp_path / name) for name in names]

    return make


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["runs/law", "runs/medicine"], ["law", "medicine"]),
        (["runs/law/model", "runs/medicine/model"], ["./law/model", "./medicine/model"]),
        (["runs/law/adapter", "runs/medicine"], ["./law/adapter", "medicine"]),
        (["a/runs/law", "b/runs/law", "c"], ["./a/runs/law", "./b/runs/law", "c"]),
        (["runs/law", "runs/law"], ["law", "law"]),
        (["runs/mini", "law"], ["./mini", "law"]),
    ],
)
def test_folders_are_told_apart_by_the_end_of_their_paths(folders, names, expected):
    assert public_names(folders(*names)) == expected


def test_other_names_stay_as_they_are(folders):
    assert public_names(["mini", "someone/law", *folders("law")]) == ["mini", "someone/law", "law"]


def test_a_name_is_that_of_the_folder_itself(folders, monkeypatch):
    (path,) = folders("runs/law")
    monkeypatch.chdir(path)
    assert public_names(["."]) == ["law"]
    assert public_names(["../law"]) == ["law"]


def test_the_root(folders):
    assert public_names(["/"]) == ["./"]
