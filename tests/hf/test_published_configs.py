"""The config.json files that people have are read, and mean the models that they come with.

What the files say is written down here as far as it is read. The numbers of parameters are those that
transformers counts in its own model of each (of Baichuan2 in a LLaMA of its sizes).
"""

import json
import math

import pytest
import transformers

from hf import families
from storage.errors import InputError

LLAMA_2 = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA_1 = {key: value for key, value in LLAMA_2.items() if key not in ("num_key_value_heads", "rope_scaling")}
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256, "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_31 = LLAMA_3 | {
    "max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": SCALED,
    "eos_token_id": [128001, 128008, 128009],
}  # fmt: skip
LLAMA_32 = LLAMA_31 | {"tie_word_embeddings": True, "rope_scaling": SCALED | {"factor": 32.0}}
MISTRAL = {
    "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def qwen(hidden, mlp, layers, heads, kv_heads, vocab_size, tied=False, **more):
    """Return the config.json of a Qwen2 or Qwen2.5."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab_size}
    return sizes | {
        "model_type": "qwen2", "hidden_act": "silu", "max_position_embeddings": 32768,
        "max_window_layers": 21, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768,
        "use_sliding_window": False, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    } | more  # fmt: skip


PHI = {
    "model_type": "phi", "hidden_act": "gelu_new", "hidden_size": 2048, "intermediate_size": 8192,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 24, "num_key_value_heads": None, "partial_rotary_factor": 0.5, "qk_layernorm": False,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16",
    "vocab_size": 51200, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPTJ_6B = {
    "model_type": "gptj", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_embd": 4096,
    "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048, "rotary": True, "rotary_dim": 64,
    "tie_word_embeddings": False, "vocab_size": 50400, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936, "bos_token_id": 151643,
    "eos_token_id": 151645,
}  # fmt: skip
FACTORS = {  # the numbers are not those of the files
    "type": "longrope", "short_factor": [1.0 + i / 48 for i in range(48)],
    "long_factor": [1.0 + i for i in range(48)],
}  # fmt: skip
PHI_3 = {
    "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_scaling": FACTORS, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32064, "bos_token_id": 1, "eos_token_id": 32000,
}  # fmt: skip
PHI_4 = PHI_3 | {
    "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
    "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384, "rope_scaling": None, "rope_theta": 250000,
    "sliding_window": None, "vocab_size": 100352,
}  # fmt: skip
PHI_4_MINI = PHI_3 | {
    "attention_bias": False, "lm_head_bias": False, "mlp_bias": False, "num_attention_heads": 24,
    "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
    "vocab_size": 200064, "eos_token_id": 199999,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0,
    "sliding_window": None, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 128256,
    "bos_token_id": 128000, "eos_token_id": 128012,
}  # fmt: skip
OLMO_2 = LLAMA_2 | {
    "model_type": "olmo2", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 500000,
    "vocab_size": 100352, "bos_token_id": None, "eos_token_id": 100257,
}  # fmt: skip
GRANITE_33 = {
    "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
    "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vocab_size": 49159, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
PYTHIA = {
    "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 8192,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 16,
    "num_hidden_layers": 24, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_parallel_residual": True, "vocab_size": 50304, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
BAICHUAN2_7B = LLAMA_1 | {"model_type": "baichuan", "rms_norm_eps": 1e-6, "vocab_size": 125696}
QWEN_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

PUBLISHED = {  # name: (config.json, parameters, window in tokens)
    "LLaMA 7B": (LLAMA_1 | {"max_position_embeddings": 2048}, 6_738_415_616, 2048),
    "Llama 2 7B": (LLAMA_2, 6_738_415_616, 4096),
    "Llama 3 8B": (LLAMA_3, 8_030_261_248, 8192),
    "Llama 3.1 8B": (LLAMA_31, 8_030_261_248, 131072),
    "Llama 3.2 1B": (
        LLAMA_32 | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        1_235_814_400,
        131072,
    ),
    "Mistral 7B v0.2": (MISTRAL, 7_241_732_096, 32768),
    "Mistral 7B v0.3": (MISTRAL | {"vocab_size": 32768}, 7_248_023_552, 32768),
    "Qwen2.5 0.5B": (qwen(896, 4864, 24, 14, 2, 151936, tied=True), 494_032_768, 32768),
    "Qwen2.5 7B": (qwen(3584, 18944, 28, 28, 4, 152064, sliding_window=131072), 7_615_616_512, 32768),
    "Qwen2.5 7B, its YaRN": (
        qwen(3584, 18944, 28, 28, 4, 152064, rope_scaling=QWEN_YARN),
        7_615_616_512,
        131072,
    ),
    "Qwen2.5 72B": (qwen(8192, 29568, 80, 64, 8, 152064, max_window_layers=70), 72_706_203_648, 32768),
    "Phi-1.5": (PHI, 1_418_270_720, 2048),
    "Phi-2": (
        PHI
        | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
        | {"num_key_value_heads": 32, "partial_rotary_factor": 0.4, "bos_token_id": 50256},
        2_779_683_840,
        2048,
    ),
    "GPT-J 6B": (GPTJ_6B, 6_050_882_784, 2048),
    "Baichuan2 7B": (BAICHUAN2_7B, 7_505_973_248, 4096),
    "Qwen3 0.6B": (QWEN3, 596_049_920, 40960),
    "Phi-3 mini 128k": (PHI_3, 3_821_079_552, 131072),
    "Phi-4": (PHI_4, 14_659_507_200, 16384),
    "Phi-4 mini": (PHI_4_MINI, 3_836_021_760, 131072),
    "SmolLM3 3B": (SMOLLM3, 3_075_098_624, 65536),
    "OLMo 2 7B": (OLMO_2, 7_298_617_344, 4096),
    "Granite 3.3 2B": (GRANITE_33, 2_533_539_840, 131072),
    "Pythia 1.4B": (PYTHIA, 1_414_647_808, 2048),
}


def read(folder, config_json):
    (folder / "config.json").write_text(json.dumps(config_json))
    return families.read_config(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(tmp_path, name):
    config_json, parameters, window = PUBLISHED[name]
    config = read(tmp_path, config_json)
    assert sum(p.numel() for p in families.stored_parameters(config).values()) == parameters
    assert config.max_position_embeddings == window
    written = families.as_written(config)
    again = read(tmp_path, families.hf_config(written))
    if again.rope_scaling and again.rope_scaling["rope_type"] == "longrope":
        # The factor on cos and sin is spelled out, since loaders derive it in different ways.
        expected = math.sqrt(1 + math.log(32) / math.log(4096))
        for key in ("attention_factor", "short_mscale", "long_mscale"):
            assert again.rope_scaling.pop(key) == pytest.approx(expected, rel=1e-12)
    assert again == written


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "Baichuan2 7B"])
def test_transformers_5_writes_it_as_the_same_model(tmp_path, name):
    """Alone, and beside the old keys, which tools that change a file leave there."""
    config_json, _, _ = PUBLISHED[name]
    config = read(tmp_path, config_json)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert families.read_config(tmp_path) == config
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert read(tmp_path, config_json | rewritten) == config


def test_mistral_7b_v01_slides(tmp_path):
    with pytest.raises(InputError, match="sliding_window 4096 in use.*take another model"):
        read(tmp_path, MISTRAL | {"sliding_window": 4096, "rope_theta": 10000.0})
