#!/usr/bin/env python3
"""Makes the golden values of the block formats, from ggml (through oracle.rs) and from the numpy package `gguf`.

    pip install gguf==0.19.0 numpy
    cargo new oracle && cp oracle.rs oracle/src/main.rs
    (cd oracle && cargo add llama-cpp-sys-2@=0.1.161 --no-default-features && cargo build)
    python3 make.py oracle/target/debug/oracle

Files, all little-endian:
    values.f32, importance.f32   four rows of 768 values, and the importance of the 768 columns
    T.quantized, T.weighted      ggml_quantize_chunk of values.f32 to type T, without and with importance.f32
    T.random, T.decoded          random blocks of T with finite scales, and their values (ggml's to_float)
    hashes.txt                   FNV-1a hashes per type: `decoded` of the values of T.quantized by to_float, `many` and
                                 `many_weighted` of what 96 rows of ordinary values are quantized to
The script fails when the numpy package does not agree with ggml, bit for bit, on everything that both can do.
"""

import pathlib
import subprocess
import sys

import gguf
import numpy as np

HERE = pathlib.Path(__file__).parent
WIDTH = 768
# Type: offsets of its half-precision scales in a block.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "Q8_K": [],
}


def values(rng):
    """Twelve super-blocks: ordinary weights first, then what breaks quantizers."""
    n = 256
    outlier = rng.normal(0, 0.02, n)
    outlier[77] = 4.0
    tiny = np.concatenate([rng.normal(0, 1e-12, n // 2), rng.normal(0, 1e-20, n // 2)])
    sparse = rng.normal(0, 1, n) * np.repeat(10.0 ** -np.arange(8), 32)
    sparse[rng.random(n) < 0.5] = 0
    return np.concatenate([
        rng.normal(0, 0.02, n),
        rng.laplace(0, 0.05, n),
        outlier,
        np.zeros(n),
        np.repeat([0.37, -1.25], n // 2),
        np.linspace(-1, 1, n),
        rng.normal(0, 1e-7, n),
        tiny,
        rng.normal(0, 1e4, n),
        rng.uniform(-2, -1, n),
        rng.uniform(0.5, 1, n),
        sparse,
    ]).astype(np.float32)


def many():
    """96 rows of sums of four numbers from a congruential generator, which the test makes again."""
    state, sums = 1, []
    for _ in range(96 * WIDTH):
        total = 0
        for _ in range(4):
            state = (state * 1664525 + 1013904223) % 2**32
            total += (state >> 8) - 2**23
        sums.append(total)
    return np.array(sums).astype(np.float32) * np.float32(2.0**-29)


def random_blocks(rng, name):
    """256 values in random blocks whose scales are ordinary numbers."""
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (256 // length, size), dtype=np.uint8)
    for at in SCALES[name]:
        blocks[:, at:at + 2] = rng.normal(0, 0.1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    if name == "Q8_K":
        blocks[:, :4] = np.float32([0.0123]).view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = [0, 1, 2, 100, 120, 127, 140, 250]
    return blocks


def fnv1a(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = (h ^ b) * 0x100000001B3 % 2**64
    return h


def check(what, ours, theirs):
    if ours.tobytes() != theirs:
        a, b = ours.view(np.uint8).ravel(), np.frombuffer(theirs, np.uint8)
        sys.exit(f"{what}: ggml and the numpy package differ in {np.count_nonzero(a != b)} of {len(b)} bytes")


def main():
    rng = np.random.default_rng(20240617)
    x = values(rng)
    importance = rng.chisquare(2, WIDTH).astype(np.float32)
    importance[::41] = 0
    (HERE / "values.f32").write_bytes(x.tobytes())
    (HERE / "many.f32").write_bytes(many().tobytes())
    (HERE / "importance.f32").write_bytes(importance.tobytes())
    for name in SCALES:
        (HERE / f"{name}.random").write_bytes(random_blocks(rng, name).tobytes())

    subprocess.run([sys.argv[1], HERE], check=True)

    def take(file):
        data = (HERE / file).read_bytes()
        (HERE / file).unlink()
        return data

    take("many.f32")
    hashes = []
    for name in [*SCALES, "F16", "BF16"]:
        kind = gguf.GGMLQuantizationType[name]
        quantized = (HERE / f"{name}.quantized").read_bytes()
        decoded = take(f"{name}.requantized")
        hashes.append(f"{name} decoded {fnv1a(decoded):016x}\n")
        for what in ["many", "many_weighted"]:
            hashes.append(f"{name} {what} {fnv1a(take(f'{name}.{what}')):016x}\n")
        if name == "Q8_K":  # which the package does not know
            continue
        check(f"{name} decode", gguf.dequantize(np.frombuffer(quantized, np.uint8), kind), decoded)
        if name in SCALES:
            blocks = np.frombuffer((HERE / f"{name}.random").read_bytes(), np.uint8)
            check(f"{name} decode random", gguf.dequantize(blocks, kind), (HERE / f"{name}.decoded").read_bytes())
        if name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
            check(f"{name} quantize", gguf.quantize(x, kind), quantized)
    (HERE / "hashes.txt").write_text("".join(hashes))


if __name__ == "__main__":
    main()
