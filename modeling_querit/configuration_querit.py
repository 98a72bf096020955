"""Configuration of Querit rerankers: a decoder (`text_config`) under a two-logit ranking head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .calibration_querit import check_calibration

AUTO_MAP = {
    "AutoConfig": "configuration_querit.QueritConfig",
    "AutoModel": "modeling_querit.QueritForSequenceRanking",
    "AutoModelForSequenceClassification": "modeling_querit.QueritForSequenceClassification",
}
CUSTOM_PIPELINES = {
    "text-classification": {
        "impl": "pipeline_querit.QueritPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}
# p1 - p0 = tanh((z1 - z0) / 2): the activation that turns the classifier's logit into the published score.
# sentence-transformers and vLLM read it from the config.
ACTIVATION = "torch.nn.modules.activation.Tanh"

# vLLM has a routing bias in a DeepSeek-V3 layer only if the config names these two.
_DEEPSEEK_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# Keys of a published config that describe the whole model rather than its backbone.
_NOT_OF_THE_BACKBONE = ("architectures", "auto_map", "num_labels", "id2label", "label2id", "transformers_version")


class QueritConfig(PreTrainedConfig):
    """Configuration of [`QueritForSequenceRanking`] and [`QueritForSequenceClassification`].

    Args:
        text_config (`PreTrainedConfig | dict`, *optional*):
            The backbone: the configuration of any decoder known to transformers; `deepseek_v3` (the architecture of
            A0.4B) and `qwen3` (of 4B) are supported best. A dict needs its `model_type`.
            Defaults to `Qwen3Config()`.
        margin_scale (`float`, *optional*, defaults to 0.8):
            Margin of the pairwise hinge loss per unit of label difference, above 0.
        calibration (`dict`, *optional*):
            What turns scores into probabilities of relevance, from `querit calibrate`; see `probability_function`.
        **kwargs:
            Common arguments of `PreTrainedConfig`. `num_labels` is 1: the model gives one score per pair.

    Raises:
        ValueError: if `text_config` names no `model_type` that transformers knows, or the margin is not above 0.

    Example:
        ```python
        >>> from transformers import Qwen3Config
        >>> QueritConfig(text_config=Qwen3Config(num_hidden_layers=2)).get_text_config().num_hidden_layers
        2
        ```
    """

    model_type = "querit"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        margin_scale: float = 0.8,
        calibration: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.text_config = _as_config(text_config)
        if not margin_scale > 0:
            raise ValueError(f"margin_scale is {margin_scale}: the hinge loss needs a margin above 0.")
        self.margin_scale = margin_scale
        if calibration is not None:
            check_calibration(calibration)
        self.calibration = calibration
        kwargs.setdefault("num_labels", 1)
        kwargs.setdefault("pad_token_id", self.text_config.pad_token_id)
        kwargs.setdefault("sentence_transformers", {"activation_fn": ACTIVATION})
        # The sub-config says whether its own weights are tied; the ranking model has no second embedding matrix.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read and check the config; a published one (`qwen3`, ...) becomes the `text_config`.

        Raises:
            FileNotFoundError: if a folder has no `config.json`.
            ValueError: if it describes no model; the message names file and key.
        """
        # Here, since it imports torch, which a config alone does not need.
        from .validation_querit import CONFIG_FILE, check_builds, check_config, read_json_object

        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        place = folder / CONFIG_FILE if folder.is_dir() else f"{pretrained_model_name_or_path}: {CONFIG_FILE}"
        if folder.is_dir():
            check_config(read_json_object(folder / CONFIG_FILE), place)
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_config(config_dict, place)
        if config_dict["model_type"] != cls.model_type:
            config_dict = _wrap_published(config_dict)
        check_builds(cls, config_dict, place)
        return config_dict, kwargs

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write `config.json`, which names the classes in the code files beside it."""
        # Assigned anew each time: after loading from a repository the entries contain that repository's name.
        self.auto_map = dict(AUTO_MAP)
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        # One folder, whichever of the two classes held the weights.
        self.architectures = ["QueritForSequenceRanking"]
        # A local folder means nothing to others who load the config.
        self.text_config._name_or_path = ""
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def a0_4b(cls, **kwargs: Any) -> QueritConfig:
        """Querit-Reranker-A0.4B: 128 experts, 4 active per token; 4,919,636,992 parameters in the backbone."""
        text_config = {
            "model_type": "deepseek_v3",
            "vocab_size": 128_816,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "first_k_dense_replace": 1,
            "intermediate_size": 5120,
            "moe_intermediate_size": 512,
            "n_routed_experts": 128,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 4096,
        }
        return cls(text_config=text_config, **kwargs)

    @classmethod
    def qwen3_4b(cls, **kwargs: Any) -> QueritConfig:
        """Querit-Reranker-4B, from Qwen3-Embedding-4B: 4,021,782,018 parameters with the head."""
        text_config = {
            "model_type": "qwen3",
            "vocab_size": 151_666,
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": True,
        }
        return cls(text_config=text_config, **kwargs)


def _as_config(text_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if text_config is None:
        text_config = {"model_type": "qwen3"}
    if isinstance(text_config, dict):
        text_config = dict(text_config)
        model_type = text_config.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"text_config has model_type {model_type!r}, which this transformers does not know; "
                "name a causal decoder such as 'qwen3' or 'deepseek_v3'."
            )
        text_config = CONFIG_MAPPING[model_type](**text_config)
    if text_config.model_type == "deepseek_v3":
        for name, value in _DEEPSEEK_ROUTING.items():
            if getattr(text_config, name, None) is None:
                setattr(text_config, name, value)
    return text_config


def _wrap_published(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Wrap a published config.json (flat, `architectures: ["MLQwen3Model"]`, no auto_map) as a QueritConfig's dict."""
    text_config = {key: value for key, value in config_dict.items() if key not in _NOT_OF_THE_BACKBONE}
    dtype = text_config.pop("dtype", text_config.pop("torch_dtype", None))
    quantized = {name: text_config.pop(name) for name in ("quantization_config",) if name in text_config}
    return quantized | {
        "model_type": QueritConfig.model_type,
        "text_config": text_config,
        "pad_token_id": text_config.get("pad_token_id"),
        "dtype": dtype,
    }
