"""Gradients of LoRA and DoRA adapters on a tiny model, by PEFT: writes peft_gradients.json beside this file.

    pip install torch transformers peft numpy
    python tests/data/peft_gradients.py

The model is `TinyConfig { layers: 2, ..TinyConfig::new("qwen2") }` of kinglet-models, whose weights follow from their
names; adapters start from hashes of their names too (kinglet_train::init), so that nothing but numbers is kept.
"""

import json
import pathlib

import numpy as np
import peft
import torch
import transformers

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
RANK, ALPHA = 4, 6.0
# Name of a map in the GGUF file -> module of a layer.
MAPS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def fnv1a(text):
    hash = 0xCBF29CE484222325
    for byte in text.encode():
        hash = ((hash ^ byte) * 0x100000001B3) & MASK
    return hash


def normals(name, count, deviation, mean=0.0):
    """Values of a tensor of the tiny model, seed 1."""
    state = ((fnv1a(name) ^ GAMMA) + GAMMA) & MASK
    out = np.empty(count, np.float32)
    for i in range(count):
        state = (state + GAMMA) & MASK
        z = mix(state)
        total = sum((z >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
        out[i] = np.float32(total - 131070) * np.float32(np.float32(1.7320508) / np.float32(65536))
    return torch.from_numpy(np.float32(mean) + np.float32(deviation) * out)


def uniform(name, shape, seed):
    """golden_init of kinglet-train."""
    stream = fnv1a(name) ^ seed
    count = int(np.prod(shape))
    numbers = [(mix((stream + (i + 1) * GAMMA) & MASK) >> 40) / (1 << 24) for i in range(count)]
    values = (2.0 * np.array(numbers) - 1.0) / np.sqrt(shape[-1])
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def tiny():
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e6,
        tie_word_embeddings=False, attn_implementation="eager", bos_token_id=None, eos_token_id=None,
    )
    model = transformers.Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        matrix = lambda w, name, by: w.copy_(normals(f"{name}.weight", w.numel(), by).reshape(w.shape))
        gain = lambda w, name: w.copy_(normals(f"{name}.weight", w.numel(), 0.1, 1.0))
        root = lambda w: np.float32(1.0) / np.sqrt(np.float32(w.shape[1]))
        matrix(model.model.embed_tokens.weight, "token_embd", 1.0)
        matrix(model.lm_head.weight, "output", root(model.lm_head.weight))
        gain(model.model.norm.weight, "output_norm")
        for i, layer in enumerate(model.model.layers):
            gain(layer.input_layernorm.weight, f"blk.{i}.attn_norm")
            gain(layer.post_attention_layernorm.weight, f"blk.{i}.ffn_norm")
            for name, module in MAPS.items():
                linear = layer.get_submodule(module)
                matrix(linear.weight, f"blk.{i}.{name}", root(linear.weight))
                if linear.bias is not None:
                    linear.bias.copy_(normals(f"blk.{i}.{name}.bias", linear.bias.numel(), 0.25))
    return model


def run(dora, ends=False):
    targets = [m.split(".")[1] for m in MAPS.values()] + (["embed_tokens", "lm_head"] if ends else [])
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=dora, lora_dropout=0.0)
    model = peft.get_peft_model(tiny(), config).eval()
    tensors = {}
    for i, layer in enumerate(model.base_model.model.model.layers):
        for name, module in MAPS.items():
            m = layer.get_submodule(module)
            key = f"blk.{i}.{name}.weight"
            tensors[f"{key}.lora_a"] = m.lora_A["default"].weight
            tensors[f"{key}.lora_b"] = m.lora_B["default"].weight
            if dora:
                tensors[f"{key}.lora_magnitude"] = m.lora_magnitude_vector["default"].weight
    if ends:
        # The embedding's halves the way the GGUF side has them: B is [vocab, rank].
        m = model.base_model.model.model.embed_tokens
        tensors["token_embd.weight.lora_a"] = m.lora_embedding_B["default"]
        tensors["token_embd.weight.lora_b"] = m.lora_embedding_A["default"]
        m = model.base_model.model.lm_head
        tensors["output.weight.lora_a"] = m.lora_A["default"].weight
        tensors["output.weight.lora_b"] = m.lora_B["default"].weight
    turn = lambda key, w: w.T if key.startswith("token_embd") else w
    norms = {}
    with torch.no_grad():
        for key, w in tensors.items():
            if key.endswith("magnitude"):
                # PEFT's own start: the lengths of the base's rows. Then moved, so that the ratio is not 1.
                norms[key] = float(w.double().sum())
                w.mul_(1.0 + 0.3 * uniform(key, tuple(w.shape), 7))
            else:
                turn(key, w).copy_(uniform(key, tuple(turn(key, w).shape), 7))
    tokens = torch.tensor([[(37 * t + 11 * t * t) % 256 for t in range(24)]])
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    described = {}
    for key, w in tensors.items():
        g = turn(key, w.grad).double().flatten()
        along = (g * uniform(f"{key}.direction", tuple(g.shape), 7).double()).sum()
        described[key] = {"norm": float(g.norm()), "along": float(along), "first": [float(v) for v in g[:3]]}
    return {"loss": float(loss.detach()), "sums_of_magnitudes": norms, "gradients": described}


def main():
    out = {
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "lora": run(False),
        "dora": run(True),
        "ends": run(False, ends=True),
    }
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(out["made_with"], out["lora"]["loss"], out["dora"]["loss"])


if __name__ == "__main__":
    main()
