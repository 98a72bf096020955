"""Models inside peft's: adapters of weights count, and learned prompts, which ranking would leave out, are refused."""

import copy

import peft
import pytest
import tiny
import torch

PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, token_dim=32, num_layers=2, num_attention_heads=2
    ),
    "p-tuning": peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=16),
}


@pytest.fixture
def base(models):
    return copy.deepcopy(models("qwen3"))


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_learned_prompt_is_not_left_out_silently(base, tmp_path, kind):
    expected = base.predict(tiny.pairs())
    adapted = peft.get_peft_model(base, copy.deepcopy(PROMPTS[kind]))
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for model in (adapted, loaded, torch.nn.ModuleList([loaded])[0]):
        for call in (
            lambda model=model: model.predict(tiny.pairs()),
            lambda model=model: model.rank(tiny.QUERY, tiny.DOCUMENTS),
            lambda model=model: next(model.predict_stream(tiny.pairs())),
        ):
            with pytest.raises(NotImplementedError, match=r"learned prompt of this [A-Z_]+ adapter"):
                call()
        assert torch.equal(model.get_base_model().predict(tiny.pairs()), expected)


def test_adapters_of_weights_count(base):
    expected = base.predict(tiny.pairs())
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.add_adapter("other", config)
    of_adapter = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        of_adapter[name] = adapted.train().predict(tiny.pairs())
        assert not torch.allclose(of_adapter[name], expected, atol=1e-3)
        inputs = adapted.processor([tiny.QUERY] * len(tiny.DOCUMENTS), tiny.DOCUMENTS)
        assert torch.allclose(adapted.eval()(**inputs).score.flatten(), of_adapter[name], atol=1e-5)
    assert not torch.allclose(of_adapter["default"], of_adapter["other"], atol=1e-3)
    with adapted.disable_adapter():
        assert torch.allclose(adapted.predict(tiny.pairs()), expected, atol=1e-6)
    assert torch.allclose(adapted.merge_and_unload().predict(tiny.pairs()), of_adapter["other"], atol=1e-5)
