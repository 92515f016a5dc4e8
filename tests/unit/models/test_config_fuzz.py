"""Any entry of a config: a sentence, or the loss that transformers computes of the same directory; no traceback."""

import json
import os
import re

import torch
from conftest import SMALL
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from pipelines import build
from transformers import AutoConfig

from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.directory import load_config
from fft.models.in_process import loaded, loss_by_layers, loss_by_transformers, write_random_model
from fft.models.small import NEEDS, TOKENS, small_config
from fft.models.spec import ModelSpec
from fft.models.supported import FAMILIES, check_supported
from fft.weights import hf

#: How many directories are tried: `FFT_FUZZ=2000 pytest tests/unit/models/test_config_fuzz.py` for a long look.
EXAMPLES = int(os.environ.get("FFT_FUZZ", "100"))

ROTARY = {
    **{"rope_theta": [1e4, 5e5, 100, -1.0, 0, None, "big"], "factor": [1.0, 4.0, 0.5, 0, "2", None]},
    **{"original_max_position_embeddings": [4, 16, 512, None, 8.5], "partial_rotary_factor": [0.5, 1.0, 0.0, 3.0]},
    **{"low_freq_factor": [1.0, None], "high_freq_factor": [4.0, 1.0], "beta_fast": [32, 1.0], "beta_slow": [1, 64]},
    **{"short_factor": [[1.0] * 4, [1.0], "no"], "long_factor": [[2.0] * 4, None], "attention_factor": [0.7, None, -1]},
    **{"mscale": [0.7, 1.0], "mscale_all_dim": [1.0, 0.5], "truncate": [False, True], "unknown_factor": [3]},
}
KINDS = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "spiral", "", None, 7]
#: Entries by name: values that are right, that change what is computed, and that are nonsense.
ENTRIES = {
    "hidden_act": ["silu", "gelu", "relu", "gelu_pytorch_tanh", "xielu", "relu2", "nonsense", None, 3],
    "rms_norm_eps": [1e-6, 1e-2, 1.0, 0, -1.0, None, "small"],
    "attention_bias": [True, False, None, "yes"],
    "mlp_bias": [True, False],
    "use_bias": [True, False],
    "qkv_bias": [True, False],
    "tie_word_embeddings": [True, False, None, "no"],
    "head_dim": [4, 8, 16, 7, 0, None, "8"],
    "hidden_size": [32, 64, 40, 33, 0, -32, None],
    "num_attention_heads": [4, 2, 8, 3, 0, None, 4.0],
    "num_key_value_heads": [1, 2, 4, 3, 0, None],
    "num_hidden_layers": [1, 2, 3, 0, -1, None],
    "intermediate_size": [64, 48, 1, 0, -3, None],
    "vocab_size": [101, 128, 1, 0, None],
    "max_position_embeddings": [512, 16, 8, 1, 0, None],
    "pad_token_id": [0, 100, 101, -1, -500, None, [1]],
    "bos_token_id": [1, 5000, None],
    "eos_token_id": [2, [2, 3], 5000, None],
    "sliding_window": [None, 0, 4, 17, 64, -1, "wide"],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 28],
    "sliding_window_pattern": [1, 2, 4, "LLLG"],
    "layer_types": [
        None,
        [],
        ["full_attention"] * 3,
        ["sliding_attention", "full_attention", "sliding_attention"],
        ["full_attention"],
        ["chunked_attention"] * 3,
        ["linear_attention"] * 3,
        "full_attention",
    ],
    "attention_dropout": [0.0, 0.1, 1, None],
    "residual_dropout": [0.0, 0.1],
    "embedding_dropout": [0.0, 0.2],
    "resid_pdrop": [0.0, 0.1],
    "embd_pdrop": [0.0, 0.1],
    "hidden_dropout": [0.1],
    "classifier_dropout": [0.1],
    "embedding_multiplier": [1, 1.0, 2.0, 0, None, "2"],
    "logits_scaling": [1, 1.0, 8.0, 0, None],
    "logit_scale": [1.0, 0.5, None],
    "residual_multiplier": [1.0, 0.5],
    "attention_multiplier": [1.0, 0.25],
    "attn_logit_softcapping": [None, 50.0],
    "final_logit_softcapping": [None, 30.0, 0, "x"],
    "query_pre_attn_scalar": [64],
    "use_post_norm": [True, False],
    "clip_qkv": [None, 0.1, 8.0],
    "use_qk_norm": [True, False],
    "no_rope_layers": [[1, 0, 1], [0, 0, 0], [1], None],
    "no_rope_layer_interval": [1, 2, 4],
    "norm_epsilon": [1e-5, 0.1],
    "layer_norm_eps": [1e-5, 0.1],
    "norm_topk_prob": [True, False],
    "num_experts": [4, 2, 1, 0, None],
    "num_experts_per_tok": [2, 1, 5, 0],
    "decoder_sparse_step": [1, 2, 0],
    "mlp_only_layers": [[], [0], [0, 1, 2], [7]],
    "moe_intermediate_size": [32, 8, 0],
    "shared_expert_intermediate_size": [40, 8, 0],
    "router_aux_loss_coef": [0.0, 0.1, None],
    "output_router_logits": [True, False],
    "is_causal": [True, False, None],
    "use_bidirectional_attention": [True, False, None],
    "pretraining_tp": [1, 2],
    "partial_rotary_factor": [0.5, 1.0, 0.25, 0.0],
    "rope_theta": [1e4, 100.0, None],
    "dtype": ["float32", "bfloat16", "float64", "int8", "nonsense"],
    "torch_dtype": ["bfloat16", None],
    "chunk_size_feed_forward": [0, 4],
    "attn_implementation": ["sdpa", "nonsense"],
    "_attn_implementation": ["eager"],
    "architectures": [None, [], ["LlamaModel"], "LlamaForCausalLM"],
    "auto_map": [{"AutoModelForCausalLM": "modeling_mine.Mine"}],
    "text_config": [{}, {"hidden_size": 64}, None],
    "quantization_config": [None, {"quant_method": "gptq"}, "awq"],
    "use_cache": [True, False],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "initializer_range": [0.02, 0.0, None, -1],
    "invented_by_nobody": [1],
}

rotary = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(KINDS)}, optional={name: st.sampled_from(values) for name, values in ROTARY.items()}
)
entries = st.dictionaries(st.sampled_from(sorted(ENTRIES)), st.integers(0, 20), max_size=4).map(
    lambda chosen: {name: ENTRIES[name][index % len(ENTRIES[name])] for name, index in chosen.items()}
)
scaling = st.one_of(
    st.just({}),
    st.builds(lambda value: {"rope_parameters": value}, st.one_of(rotary, st.sampled_from([{}, None, "yarn"]))),
    st.builds(lambda value: {"rope_scaling": value}, rotary),
)


def directory(folder, family, changes):
    """A directory with these entries in its config and, where transformers can make them, weights of that shape."""
    whole = SMALL | TOKENS | {"head_dim": 8} | NEEDS.get(family, {}) | {"model_type": family} | changes
    if "rope_scaling" in changes or "rope_parameters" in changes:
        whole.setdefault("rope_theta", 1e4)
    try:
        made = AutoConfig.for_model(**{k: v for k, v in whole.items() if k != "quantization_config"})
        write_random_model(made, folder, 0)
    except Exception:  # no such model: with any weights, the config is to be refused
        write_random_model(small_config(family), folder, 0)
    (folder / "config.json").write_text(json.dumps(whole))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(family=st.sampled_from(FAMILIES), changes=entries, rope=scaling)
def test_a_config_is_refused_by_a_sentence_or_trains_as_transformers_does(family, changes, rope, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    directory(folder, family, changes | rope)
    try:
        config = load_config(str(folder), init=False)
        check_supported(config, 17)
        _, run = build(StageBuilder(ModelSpec(config, torch.float32), weights=hf.WeightReader(folder)))
        found = loss_by_layers(run, min(config.vocab_size, 101)).detach()
    except UserError as error:
        event(f"refused: {re.sub('[^ ]*/[^ ]*', 'FILE', str(error))[:60]}")
        return
    event("accepted")
    expected = loss_by_transformers(loaded(folder), min(config.vocab_size, 101)).detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
