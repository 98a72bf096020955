"""Settings from YAML, mappings and flags, and the checks that need nothing but the settings."""

import os

import pytest

from modeling_querit.training.arguments import changed_settings, parse, settings_from_mapping

QUIET = {"report_to": "none", "use_cpu": True}


def make_settings(tmp_path, **mapping):
    mapping = {"train": ["rows.jsonl"], "output_dir": str(tmp_path / "out")} | QUIET | mapping
    return settings_from_mapping(mapping, "my settings")


def test_a_mapping_and_flags_give_the_same_settings(tmp_path):
    mapping = {
        "model": "mini",
        "losses": ["listwise_kl", "pointwise_bce"],
        "loss_weights": [1, 0.5],
        "teacher_weights": {"bm25": 2},
        "calibration": {"bm25": "rank"},
        "warmup_steps": 30,
        "save_strategy": "no",
        "packing": False,
    }
    flags = ["--train", "rows.jsonl", "--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu", "True"]
    flags += ["--model", "mini", "--losses", "listwise_kl", "pointwise_bce", "--loss_weights", "1", "0.5"]
    flags += ["--teacher_weights", '{"bm25": 2}', "--calibration", '{"bm25": "rank"}', "--warmup_steps", "30"]
    flags += ["--save_strategy", "no", "--no_packing"]
    assert make_settings(tmp_path, **mapping) == parse(flags)


def test_flags_win_over_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: mini\ntrain: rows.jsonl\nmax_steps: 7\nlora_rank: 4\noutput_dir: {tmp_path}/out\n")
    settings = parse([str(config), "--max_steps", "9", "--use_cpu", "True"])
    assert (settings.training_args.max_steps, settings.model_args.lora_rank) == (9, 4)
    assert settings.data_args.train == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        # YAML reads the word no as False.
        ("learning_rate", "1e-5", 1e-5),
        ("save_strategy", False, "no"),
        ("losses", "ranknet", ["ranknet"]),
        ("run_name", 2024, "2024"),
        ("head_learning_rate", None, None),
        ("liger_kernel_config", {"rope": False}, {"rope": False}),
    ],
)
def test_values_become_the_type_of_their_setting(tmp_path, name, value, expected):
    assert getattr(make_settings(tmp_path, **{name: value}).training_args, name) == expected


def test_a_tilde_is_the_home_folder(tmp_path):
    settings = make_settings(tmp_path, model="~/model", train=["~/rows.jsonl"])
    assert settings.model_args.model == os.path.expanduser("~/model")
    assert settings.data_args.train == [os.path.expanduser("~/rows.jsonl")]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"modle": "mini"}, "my settings: 'modle' is not a setting"),
        ({"max_steps": "many"}, "my settings: max_steps is 'many': .*valid integer"),
        ({"bf16": "perhaps"}, "my settings: bf16 is 'perhaps': .*valid boolean"),
        (
            {"train_sampling_strategy": "shuffled"},
            "my settings: train_sampling_strategy is 'shuffled': choose from random",
        ),
        ({"lr_scheduler_type": "falling"}, "my settings: falling is not a valid SchedulerType"),
        ({"freeze": "head"}, "my settings: freeze is 'head': choose router or experts"),
        ({"train": []}, "my settings: There is nothing to train on"),
        ({"lr_scheduler_kwargs": "3.5"}, "my settings: lr_scheduler_kwargs is '3.5', which linear does not take"),
        ({"lr_scheduler_kwargs": {"a": 1}}, r"lr_scheduler_kwargs is \{'a': 1\}, which linear .*argument 'a'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs is .*, which cosine_with_min_lr .*min_lr"),
        ({"torch_compile_mode": "fast"}, "my settings: These settings cannot be used: .*mode=fast"),
        ({"torch_compile_backend": "fast"}, "my settings: These settings cannot be used: .*fast"),
        ({"accelerator_config": "/dev/zero"}, "my settings: These settings cannot be used: /dev/zero is a device"),
        ({"fsdp": True, "fsdp_config": "/dev/zero"}, "my settings: .*/dev/zero is a device"),
        ({"calibration": "{bm25"}, "my settings: calibration is '{bm25'"),
        ({"teacher_weights": "[1]"}, r"my settings: teacher_weights is '\[1\]': .*valid dictionary|give JSON such as"),
    ],
)
def test_a_wrong_setting_is_named_with_its_origin(tmp_path, mapping, message):
    with pytest.raises(ValueError, match=message):
        make_settings(tmp_path, **mapping)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--modle", "mini"], "'--modle' is not a setting"), (["--max_steps", "many"], "invalid int value: 'many'")],
)
def test_a_wrong_flag_is_named_in_one_sentence(flags, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse(["--train", "rows.jsonl", *flags])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"bias_update_rate": 0.1, "lora_rank": 2}, "an adapter does not hold"),
        ({"limit": -1}, "limit is -1: it has to be at least 1"),
        ({"max_length": 0}, "max_length is 0: it has to be at least 1"),
        ({"losses": ["ranknet", "ranknet"]}, "name each once, and weight it by loss_weights"),
        ({"save_only_model": True, "resume": True}, "keeps no optimizer state"),
        ({"top": 0, "random": 0}, "draws no document"),
        ({"margin_scale": -1}, "margin_scale is -1.0: it has to be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"streaming": True}, "streaming needs --max_steps"),
        ({"validation": ["x.jsonl"]}, "nothing says when: add --eval_strategy"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs --validation"),
        (
            {"validation": ["x.jsonl"], "eval_strategy": "epoch", "metric_for_best_model": "ndcg@10"},
            "metric_for_best_model is 'ndcg@10': choose loss, ndcg_at_10",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, mapping, message):
    with pytest.raises(ValueError, match=message):
        make_settings(tmp_path, **mapping)
    assert not (tmp_path / "out").exists()


def test_a_collection_is_not_streamed(tmp_path):
    with pytest.raises(ValueError, match="a BEIR folder is mined as a whole"):
        make_settings(tmp_path, train=[str(tmp_path)], streaming=True, max_steps=2)


def test_the_output_folder_may_not_be_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        make_settings(tmp_path)


def test_recorded_settings_are_those_that_differ_from_their_defaults(tmp_path):
    settings = make_settings(tmp_path, learning_rate=1e-4, hub_token="hf_secret", limit=7)
    changed = changed_settings(settings.training_args)
    assert changed["learning_rate"] == 1e-4
    assert not {"hub_token", "losses"} & changed.keys()
    assert changed_settings(settings.data_args) == {"train": ["rows.jsonl"], "limit": 7}
