#!/usr/bin/env python3
"""The same training steps as `train` times, in PyTorch with PEFT.

    python3 -m venv venv && venv/bin/pip install torch transformers peft gguf accelerate
    venv/bin/python benches/peers/peft.py --model MODEL.gguf --dtype fp32 --threads 2

Weights come from the same GGUF file, dequantized by transformers; adapters of rank r on all seven linear maps of every
layer, alpha = 2 r, no dropout; AdamW; sequences of the same text. A step is forward, backward and the optimizer. Prints
one JSON object with tokens per second (median, and every step), peak resident memory and losses.

`--dtype bf16` computes under autocast, over weights in fp32, as PEFT users do on a CPU; `bf16-weights` also keeps the
frozen weights in bf16.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="GGUF file")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=256)
parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--dtype", choices=["fp32", "bf16", "bf16-weights"], default="fp32")
parser.add_argument("--checkpointing", action="store_true", help="compute layers twice, to save memory")
parser.add_argument("--text", default=pathlib.Path(__file__).parents[2] / "tests/data/handbook.txt")
args = parser.parse_args()

del sys.path[0]  # this directory, where `peft` would be this file

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(args.threads)
torch.manual_seed(0)
path = pathlib.Path(args.model).resolve()
load = dict(gguf_file=path.name, local_files_only=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **load)
dtype = torch.bfloat16 if args.dtype == "bf16-weights" else torch.float32
model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **load)
model.config.use_cache = False
config = peft.LoraConfig(
    r=args.rank,
    lora_alpha=2 * args.rank,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
if args.checkpointing:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)

text = pathlib.Path(args.text).read_text()
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
size = args.batch * args.seq
needed = (args.steps + 1) * size
ids = (ids * (needed // len(ids) + 1))[:needed]

speeds, losses = [], []
for step in range(args.steps + 1):
    tokens = torch.tensor(ids[step * size : (step + 1) * size]).view(args.batch, args.seq)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype != "fp32"):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step:
        speeds.append(size / (time.perf_counter() - start))

status = pathlib.Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
print(
    json.dumps(
        {
            "peer": f"torch {torch.__version__}, peft {peft.__version__}",
            "model": path.name,
            "dtype": args.dtype,
            "checkpointing": args.checkpointing,
            "rank": args.rank,
            "batch": args.batch,
            "seq": args.seq,
            "threads": args.threads,
            "trained_parameters": sum(p.numel() for p in trained),
            "tokens_per_second": statistics.median(speeds),
            "samples": speeds,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "peak_bytes": peak * 1024,
        }
    )
)
