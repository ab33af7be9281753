"""What a model of a given shape takes on several cards: memory of each, and seconds of a step, with DDP and sharded.

    python benchmarks/plan.py --shape llama-3.1-70b --cards 16 --card_memory 80

Computed for bfloat16, a LoRA adapter of rank 16 on all linear layers, and gradient checkpointing. Sharded is --shard_base:
a card keeps its share of the base and gathers a layer while it computes the one before; embeddings and head come with the
root. Computing hides gathering, so a step takes the longer of the two, and after it the sum of the adapters' gradients.
Each card sends (n - 1) / n of what is gathered, twice that of what is summed up (Patarasuk and Yuan 2009, ring).
"""

import argparse
import json

from ppo_memory import SHAPES, count_weights

SHAPES.update({
    "llama-3.1-8b": (32, 4096, 32, 8, 14336, 128256),
    "llama-3.1-70b": (80, 8192, 64, 8, 28672, 128256),
})  # fmt: skip
UNTIED = ("llama-3.1-8b", "llama-3.1-70b")  # the head has weights of its own
WIDTH = 2  # bytes of a frozen weight, and of an activation
CONTEXT = 0.5  # GB that CUDA takes for itself
SCRIPTS = {"sft": (1, 1), "reward": (1, 1), "ppo": (4, 2)}  # adapters there are, and those that are trained


def count_base(shape):
    """Weights of the base: (those of a layer, those of the root)."""
    weights = count_weights(shape)
    return weights["linear"] / SHAPES[shape][0], weights["embeddings"] * (2 if shape in UNTIED else 1)


def plan_memory(args, script, cards):
    """{part: GB} of a card, one of `cards` that share the base (1: DDP, where each has all of it)."""
    layers, hidden, heads, kv_heads, inner, vocabulary = SHAPES[args.shape]
    layer, root = count_base(args.shape)
    there, trained = SCRIPTS[script]
    texts = args.prompt + args.response
    tokens = args.batch * texts * (2 if script == "reward" else 1)  # a pair has two
    # What a layer's autograd graph keeps of a token, see ppo_memory.py, and each layer's input.
    graph = WIDTH * (4 * hidden + 4 * inner + 2 * hidden // heads * kv_heads) + 8 * hidden
    logits = {"sft": tokens, "reward": 0, "ppo": args.batch * args.response}[script]
    parts = {
        "base": (layers * layer + root) * WIDTH / cards,
        "gathered": (2 * layer + root) * WIDTH * (1 - 1 / cards),
        "adapters": count_weights(args.shape)["adapter"] * (4 * there + 12 * trained),  # gradient, AdamW's two moments
        "activations": tokens * (graph + layers * hidden * WIDTH),
        "logits": logits * vocabulary * (2 * WIDTH + 12),
    }
    return {**{name: size / 1e9 for name, size in parts.items()}, "CUDA": CONTEXT}


def plan_seconds(args, script, cards, whole_rollout):
    """Seconds of an optimizer step; of PPO, those of a rollout and its update of one epoch."""
    layer, root = count_base(args.shape)
    weights = SHAPES[args.shape][0] * layer
    link = args.link if args.cards <= args.cards_per_machine else args.network
    tokens = args.batch * (args.prompt + args.response) * (2 if script == "reward" else 1)
    # Operations of a pass: 2 a weight and token forward, as many to go back and to compute again (checkpointing).
    forward = 2 * weights * tokens / (args.tflops * 1e12)
    gather = (weights + root) * WIDTH * (1 - 1 / cards) / (link * 1e9)  # 0 under DDP
    trained = SCRIPTS[script][1]
    seconds = trained * args.accumulation * (max(forward, gather) + max(2 * forward, gather))
    seconds += 2 * 4 * trained * count_weights(args.shape)["adapter"] * (1 - 1 / args.cards) / (link * 1e9)
    if script == "ppo":
        # A token reads all weights once for the texts of the rollout together; then 4 roles read each text.
        token = (weights + root) * WIDTH / (args.memory_bandwidth * 1e9)
        writing = args.response * (token if whole_rollout else max(token, gather))
        seconds += writing + (gather if whole_rollout else 0) + 4 * args.accumulation * max(forward, gather)
    return seconds


def plan(args):
    """{"ddp" and "sharded": {script: memory by part, its sum, whether it fits, seconds of a step}}."""
    found = {}
    for way, cards in (("ddp", 1), ("sharded", args.cards)):
        for script in SCRIPTS:
            memory = plan_memory(args, script, cards)
            total = sum(memory.values())
            layer, root = count_base(args.shape)
            whole = cards == 1 or (SHAPES[args.shape][0] * layer + root) * WIDTH / 1e9 + total < args.card_memory
            seconds = plan_seconds(args, script, cards, whole)
            found.setdefault(way, {})[script] = {
                "memory_gb": memory, "total_gb": total, "fits": total <= args.card_memory, "step_seconds": seconds,
                **({"rollout": "base whole" if whole else "base sharded"} if script == "ppo" else {}),
            }  # fmt: skip
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-3.1-70b", help="of the model")
    add("--cards", type=int, default=16, help="in all")
    add("--cards_per_machine", type=int, default=8, help="more than these talk over the network")
    add("--card_memory", type=float, default=80.0, help="GB (1e9 bytes) of a card")
    add("--link", type=float, default=300.0, help="GB/s that a card sends to others of its machine")
    add("--network", type=float, default=40.0, help="GB/s that a card sends to other machines")
    add("--memory_bandwidth", type=float, default=3000.0, help="GB/s of a card's own memory")
    add("--tflops", type=float, default=400.0, help="TFLOP/s that matrix products reach, not the card's peak")
    add("--batch", type=int, default=1, help="--per_device_train_batch_size")
    add("--accumulation", type=int, default=8, help="--gradient_accumulation_steps")
    add("--prompt", type=int, default=512, help="tokens")
    add("--response", type=int, default=128, help="tokens")
    args = parser.parse_args()
    found = plan(args)
    print(f"{args.shape}, {args.cards} cards of {args.card_memory:g} GB; GB a card, and seconds of a step")
    rows = [(way, script, result) for way, scripts in found.items() for script, result in scripts.items()]
    parts = list(rows[0][2]["memory_gb"])
    print(f"{'':17}" + "".join(f"{part:>12}" for part in (*parts, "in all", "fits", "s a step")))
    for way, script, result in rows:
        figures = [*result["memory_gb"].values(), result["total_gb"]]
        fits = "yes" if result["fits"] else "no"
        seconds = f"{result['step_seconds']:.2f}" if result["fits"] else "-"
        line = "".join(f"{figure:12.2f}" for figure in figures) + f"{fits:>12}{seconds:>12}"
        print(f"{way + ' ' + script:17}{line}  {result.get('rollout', '') if result['fits'] else ''}".rstrip())
    print(json.dumps({"arguments": vars(args), "plan": found}))


if __name__ == "__main__":
    main()
