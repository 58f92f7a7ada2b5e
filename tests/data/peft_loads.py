"""Logits of tiny models with adapters that Kinglet has written, as PEFT loads them.

    pip install torch transformers peft numpy
    KINGLET_PEFT=python3 cargo test -p kinglet-tests peft_loads

The test calls this with a folder; `ARCH-NAME/` in it are adapters of PEFT for `TinyConfig { layers: 2, ..new(ARCH) }`. On
standard output goes what the test keeps in peft_loads.json: the logits behind the last of `TOKENS`. PEFT must use every
tensor of a file and find every one that it wants.
"""

import json
import pathlib
import sys
import warnings

import numpy as np
import peft
import torch
import transformers

from peft_gradients import normals

TOKENS = [(37 * t + 11 * t * t) % 256 for t in range(24)]
SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, attn_implementation="eager",
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
ENDS = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
GATE_UP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# Architecture -> configuration, maps and norms of a layer: name in the GGUF file -> module.
FAMILIES = {
    "llama": (
        lambda: transformers.LlamaConfig(**SIZES, rope_theta=1e4, tie_word_embeddings=False),
        {**QKV, **ENDS, **GATE_UP},
        NORMS,
    ),
    "qwen2": (
        lambda: transformers.Qwen2Config(**SIZES, rope_theta=1e6, tie_word_embeddings=False),
        {**QKV, **ENDS, **GATE_UP},
        NORMS,
    ),
    "gemma2": (
        lambda: transformers.Gemma2Config(
            **SIZES, head_dim=16, query_pre_attn_scalar=16, rope_theta=1e4, sliding_window=8, tie_word_embeddings=True,
        ),
        {**QKV, **ENDS, **GATE_UP},
        {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "glm4": (
        lambda: transformers.Glm4Config(
            **SIZES, head_dim=16, rope_theta=1e4, partial_rotary_factor=0.5, attention_bias=True,
            tie_word_embeddings=False,
        ),
        {**QKV, **ENDS, "ffn_up": "mlp.gate_up_proj"},
        {**NORMS, "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    ),
    "phi3": (
        lambda: transformers.Phi3Config(**SIZES, rope_theta=1e4, tie_word_embeddings=False),
        {"attn_qkv": "self_attn.qkv_proj", **ENDS, "ffn_up": "mlp.gate_up_proj"},
        NORMS,
    ),
}


def tiny(arch):
    """The tiny model of an architecture, as Hugging Face's library has it."""
    make, maps, norms = FAMILIES[arch]
    config = make()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    root = lambda w: np.float32(1.0) / np.sqrt(np.float32(w.shape[1]))
    # Gemma's gains are kept less 1; converters add it.
    less = 1.0 if arch.startswith("gemma") else 0.0

    def matrix(w, name, by):
        values = normals(f"{name}.weight", w.numel(), by).reshape(w.shape)
        if arch == "llama" and name.endswith(("attn_q", "attn_k")):
            # Converters interleave the halves of a head.
            heads = w.shape[0] // 16
            values = values.reshape(heads, 8, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        w.copy_(values)

    def gain(w, name):
        w.copy_(normals(f"{name}.weight", w.numel(), 0.1, 1.0) - less)

    with torch.no_grad():
        embedding, tied = model.model.embed_tokens.weight, config.tie_word_embeddings
        matrix(embedding, "token_embd", root(embedding) if tied else 1.0)
        if not tied:
            matrix(model.lm_head.weight, "output", root(model.lm_head.weight))
        gain(model.model.norm.weight, "output_norm")
        for i, layer in enumerate(model.model.layers):
            for name, module in norms.items():
                gain(layer.get_submodule(module).weight, f"blk.{i}.{name}")
            for name, module in maps.items():
                linear = layer.get_submodule(module)
                matrix(linear.weight, f"blk.{i}.{name}", root(linear.weight))
                if linear.bias is not None:
                    linear.bias.copy_(normals(f"blk.{i}.{name}.bias", linear.bias.numel(), 0.25))
    return model


def run(folder):
    model = tiny(folder.name.split("-")[0])
    tokens = torch.tensor([TOKENS])
    model = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder))
    with warnings.catch_warnings():
        # PEFT only warns of tensors that it wants and does not find.
        warnings.simplefilter("error")
        result = model.load_adapter(folder, "kinglet")
    assert not result.unexpected_keys, result.unexpected_keys
    assert not [k for k in result.missing_keys if "kinglet" in k], result.missing_keys
    model.set_adapter("kinglet")
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=tokens).logits[0, -1]
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits[0, -1]
    return {name: [float(f"{v:.6g}") for v in values] for name, values in (("base", base), ("adapted", logits))}


def main():
    folders = sorted(f for f in pathlib.Path(sys.argv[1]).iterdir() if f.is_dir())
    made_with = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(json.dumps({"made_with": made_with, "logits": {folder.name: run(folder) for folder in folders}}))


if __name__ == "__main__":
    main()
