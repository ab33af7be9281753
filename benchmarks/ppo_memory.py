"""What training_rl.py needs on a GPU, computed from shapes: the plan for a model that is not at hand.

Prints, for LoRA PPO with all four roles on one base, the bytes of each part and the peak of each phase, in GB (1e9
bytes). Everything here is computed, nothing is measured; what it leaves out is the CUDA context (0.3 to 0.5 GB) and
what the allocator loses to fragments.

    python benchmarks/ppo_memory.py --shape llama-3.2-3b
    python benchmarks/ppo_memory.py --config runs/SmolLM2-135M-Instruct --batch 16 --prompt 64 --response 48
"""

import argparse
import json
from pathlib import Path

from measure import write_result

SHAPES = {
    "llama-3.2-1b": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "intermediate": 8192, "vocabulary": 128256},
    "llama-3.2-3b": {"layers": 28, "hidden": 3072, "heads": 24, "kv_heads": 8, "head_dim": 128, "intermediate": 8192, "vocabulary": 128256},
}  # fmt: skip


def read_shape(folder):
    """A shape from a Llama-like config.json (embeddings tied)."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return {
        "layers": config["num_hidden_layers"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or hidden // heads,
        "intermediate": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
    }


def estimate(shape, batch, accumulation, prompt, response, rank, width, bits=16, checkpointing=False):
    """Bytes by part and phase. `width`: bytes of a weight and of an activation (2: bfloat16, 4: float32)."""
    layers, hidden, inner, vocabulary = (shape[k] for k in ("layers", "hidden", "intermediate", "vocabulary"))
    query, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    linear = layers * (2 * hidden * query + 2 * hidden * kv + 3 * hidden * inner)
    rest = vocabulary * hidden + (2 * layers + 1) * hidden
    # NF4 with double quantization: 4 bits, 8 per 64 weights, 32 per 64 * 256 (Dettmers et al. 2023, arXiv:2305.14314)
    weight_bytes = {4: (4 + 8 / 64 + 32 / (64 * 256)) / 8, 8: 1.0}.get(bits, width)
    base = linear * weight_bytes + rest * width
    adapter = layers * rank * (2 * (hidden + query) + 2 * (hidden + kv) + 3 * (hidden + inner))
    parts = {
        "base weights": base,
        "four adapters (float32)": 4 * adapter * 4,
        "gradients of two": 2 * adapter * 4,
        "AdamW's moments of two": 2 * adapter * 8,
    }
    # Saved for backward, per token and layer, counted with autograd's saved-tensor hooks on a Llama with LoRA on all
    # linear layers: the norms' float32 inputs, each LoRA input, q, k, v and the output of attention, gate, up and their product.
    saved = (24 * hidden + 4 * inner * width + 2 * kv * width + 10 * rank * width) * layers
    if checkpointing:  # the input of every layer, and one layer at a time
        saved = saved / layers + hidden * width * layers
    tokens = min(batch * (prompt + response), max(hidden, prompt + response))  # a row of training_rl.py
    answers = tokens * response / (prompt + response)
    logits = answers * vocabulary
    phases = {
        "generation": 2 * layers * kv * (prompt + response) * batch * accumulation * width + batch * accumulation * vocabulary * 10,
        "scoring": tokens * (4 * inner + 8 * hidden) * width + logits * (width + 8),
        "policy update": tokens * saved + logits * (width + 16),
        "value update": tokens * saved,
    }  # fmt: skip
    return parts, phases


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--config", help="model directory, in place of --shape")
    parser.add_argument("--batch", type=int, default=1, help="--per_device_train_batch_size")
    parser.add_argument("--accumulation", type=int, default=8, help="--gradient_accumulation_steps")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    shape = read_shape(args.config) if args.config else SHAPES[args.shape]
    table = {}
    for name, bits, checkpointing in (
        ("bf16", 16, False),
        ("bf16, --gradient_checkpointing", 16, True),
        ("4 bit", 4, False),
        ("4 bit, --gradient_checkpointing", 4, True),
    ):
        sizes = (args.batch, args.accumulation, args.prompt, args.response, args.rank, 2)
        parts, phases = estimate(shape, *sizes, bits=bits, checkpointing=checkpointing)
        static = sum(parts.values())
        table[name] = {
            **{part: value / 1e9 for part, value in parts.items()},
            **{f"+ {phase}": value / 1e9 for phase, value in phases.items()},
            "peak": (static + max(phases.values())) / 1e9,
        }
    print("computed, GB (1e9 bytes)")
    print(f"{'':26}" + "".join(f"{name:>34}" for name in table))
    for line in next(iter(table.values())):
        print(f"{line:26}" + "".join(f"{column[line]:>34.2f}" for column in table.values()))
    write_result("ppo_memory_computed", {"computed": True, "arguments": vars(args), "shape": shape, "gb": table})


if __name__ == "__main__":
    main()
