#!/usr/bin/env python3
"""Teach smollm2 the questions and answers of a trade, and count the facts it has learned.

Needs Python 3 with pip, and `kinglet` built in release mode; everything else it fetches. Run from the repository:

    python3 docs/training/faq.py WORK_FOLDER [--threads 2]

The data are the 503 English pairs of the PyPI package `zaragoza-construction-faq` 1.2.1 (Swedish building law and
practice, CC-BY-4.0). One pair in ten is held out. Measured before and after: the loss of the held-out answers (by `kinglet
train`), and exact facts in greedy answers, to as many questions that were taught and to those held out. A fact is a number (`10`, `25,000`, `9 kap`) or an abbreviation in
capitals (`PBL`, `BBR`) that stands in the reference answer and not in the question; it is recalled if it stands in the
model's answer as well.
"""

import argparse, json, re, subprocess, sys, zipfile
from pathlib import Path

KINGLET = Path("target/release/kinglet")
PACKAGE = "zaragoza-construction-faq==1.2.1"
FACT = re.compile(r"\d[\d,.:]*\d|\d|\b[A-ZÅÄÖ]{2,}\b")


def pairs(folder):
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
    wheel = next(folder.glob("zaragoza_construction_faq-*.whl"))
    with zipfile.ZipFile(wheel) as z:
        lines = z.read("zaragoza_construction_faq/data/faq-en.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def facts(pair):
    return set(FACT.findall(pair["a"])) - set(FACT.findall(pair["q"]))


def recall(held_out, extra):
    found = wanted = some = 0
    for pair in held_out:
        command = [KINGLET, "run", "smollm2", pair["q"], "--temperature", "0", "-n", "160", *extra]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        there, here = facts(pair), set(FACT.findall(answer))
        found += len(there & here)
        wanted += len(there)
        some += bool(there & here)
    return {"facts": wanted, "recalled": found, "share": found / wanted, "answers_with_a_fact": some}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", default="2")
    args, more = parser.parse_known_args()  # what is left are arguments for `kinglet train`
    args.folder.mkdir(parents=True, exist_ok=True)
    data = pairs(args.folder)
    held_out = [pair for i, pair in enumerate(data) if i % 10 == 9]
    kept = [pair for i, pair in enumerate(data) if i % 10 != 9]
    for name, some in [("train", kept), ("held-out", held_out)]:
        examples = [{"instruction": p["q"], "output": p["a"]} for p in some]
        lines = [json.dumps(example, ensure_ascii=False) for example in examples]
        (args.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    out = args.folder / "adapter"
    command = [KINGLET, "train", "--model", "smollm2", "--data", args.folder / "train.jsonl",
               "--validation", args.folder / "held-out.jsonl", "--output", out, "--resume",
               "--threads", args.threads, "--json", *more]
    trained = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(trained)["result"]
    taught = [pair for i, pair in enumerate(data) if i % 10 == 4]
    asked = {"taught": taught, "held out": held_out}
    before = {name: recall(some, []) for name, some in asked.items()}
    after = {name: recall(some, ["--adapter", str(out)]) for name, some in asked.items()}
    summary = {"pairs": len(data), "held_out": len(held_out), "validation_loss": result["validation"],
               "perplexity": result["forgetting"], "tokens": result["tokens"], "seconds": result["seconds"],
               "before": before, "after": after}
    (args.folder / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
