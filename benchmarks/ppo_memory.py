"""What PPO needs on one card, by flags: computed from shapes for a model that is not at hand, and measured on a card.

Takes the README's PPO command (LoRA, four roles on one base) with 8 answers an update for random weights of a shape. Prints the
bytes of each part in GB (1e9 bytes), computed; what that leaves out is the CUDA context (0.3 to 0.5 GB) and what the
allocator loses to fragments. With a GPU, or --measure, it also makes the weights, runs the command each way in a
process of its own, and prints peak memory and the seconds of an update.

    python benchmarks/ppo_memory.py --shape llama-3.2-3b
    python benchmarks/ppo_memory.py --shape smollm2-135m --measure --float32
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import environment, peak_memory, report, run_child, write_result

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
# layers, hidden, heads, key/value heads, intermediate, vocabulary; embeddings tied
SHAPES = {
    "tiny": (2, 64, 4, 2, 128, 512),
    "smollm2-135m": (30, 576, 9, 3, 1536, 49152),
    "llama-3.2-1b": (16, 2048, 32, 8, 8192, 128256),
    "llama-3.2-3b": (28, 3072, 24, 8, 8192, 128256),
}
WAYS = {
    "as it is": [],
    "checkpointing": ["--gradient_checkpointing"],
    "4 bit": ["--load_in_4bit"],
    "4 bit, checkpointing": ["--load_in_4bit", "--gradient_checkpointing"],
}
RANK = 16
CHAT = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# NF4 with double quantization: 4 bits, 8 per 64 weights, 32 per 64 * 256 (Dettmers et al. 2023, arXiv:2305.14314)
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def count_weights(shape):
    """Weights of a Llama of this shape: in the linear layers, the embeddings (which are the head, too), the norms, and an
    adapter on all linear layers."""
    layers, hidden, heads, kv_heads, inner, vocabulary = SHAPES[shape]
    kv = hidden // heads * kv_heads
    return {
        "linear": layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner),
        "embeddings": vocabulary * hidden,
        "norms": layers * 2 * hidden + hidden,
        "adapter": layers * RANK * (4 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner)),
    }


def compute(args, flags):
    """{part: GB} of a Llama of this shape, with an adapter for each of the four roles."""
    layers, hidden, heads, kv_heads, inner, vocabulary = SHAPES[args.shape]
    weights = count_weights(args.shape)
    linear, adapter = weights["linear"], weights["adapter"]
    others = weights["embeddings"] + weights["norms"]
    width = 4 if args.float32 else 2  # bytes of a weight and of an activation
    kv = hidden // heads * kv_heads
    texts = args.prompt + args.response
    tokens = min(args.batch * texts, max(hidden, texts))  # of a pass, see PPOTrainer.make_groups
    # A layer's autograd graph keeps of each token 4 hidden, 4 intermediate and 2 key/value vectors, and the inputs of
    # its two norms in float32.
    layer = tokens * (width * (4 * hidden + 4 * inner + 2 * kv) + 8 * hidden)
    activations = layers * layer
    if "--gradient_checkpointing" in flags:
        activations = layer + layers * tokens * hidden * width
    logits = tokens * args.response // texts * vocabulary * (2 * width + 12)
    cached = min(args.batch * args.accumulation, 64) * texts * layers * 2 * kv * width
    parts = {
        "base weights": linear * (NF4_BYTES if "--load_in_4bit" in flags else width) + others * width,
        "four adapters": 4 * 4 * adapter,
        "gradients of two": 2 * 4 * adapter,
        "AdamW of two": 2 * 8 * adapter,
        "activations": activations,
        "logits": logits,
        "more for generation": max(0, cached - activations - logits),  # its keys and values are freed before the update
    }
    return {**{part: size / 1e9 for part, size in parts.items()}, "peak": sum(parts.values()) / 1e9}


def make_tokenizer():
    """One token for each byte, and two that open and end a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<|end|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def make_models(shape, folder, dtype="bfloat16"):
    """In `folder`: `base`, random weights of a shape, and on it `policy` and `reward`, adapters that change something."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = LlamaConfig(
        **dict(zip((*names, "vocab_size"), SHAPES[shape])),
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=0,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on which 3B take minutes
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size="50GB")
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    classifier.model = model.model  # the same weights: nothing is made or read twice
    classifier.score = torch.nn.Linear(config.hidden_size, 1, bias=False, device=device, dtype=dtype)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    for name, base, kind in (("policy", model, "CAUSAL_LM"), ("reward", classifier, "SEQ_CLS")):
        base.name_or_path = str(folder / "base")
        adapted = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type=kind))
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                weight.data.normal_(0, 0.002)
        adapted.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        adapted.unload()


def write_prompts(path, count, length):
    """`count` prompts, each of `length` tokens with what the scripts put around it."""
    letters = length - len("Question: \n\nAnswer:")
    rows = [{"prompt": chr(97 + i % 26) * letters} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_way(args):
    """The peak of updates by the script's own main; an epoch more of an update takes time, and no more memory."""
    import training_rl

    training_rl.PPOTrainer.evaluate = lambda self, *inputs, **options: {}  # takes time, and no more than a rollout does
    flags = f"""--overwrite_output_dir --use_lora --per_device_train_batch_size {args.batch}
        --num_ppo_epochs 1 --gradient_accumulation_steps {args.accumulation}
        --total_episodes {args.updates * args.batch * args.accumulation}
        --response_length {args.response} --max_prompt_length {args.prompt} --prompt_format qa""".split()
    paths = ["--model_path", f"{args.folder}/policy", "--reward_model_path", f"{args.folder}/reward"]
    paths += ["--dataset_name", f"{args.folder}/prompts.jsonl", "--output_dir", f"{args.folder}/out"]
    training_rl.main([*paths, *flags, *WAYS[args.way], *([] if args.float32 else ["--bf16"])])
    return peak_memory()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--batch", type=int, default=1, help="--per_device_train_batch_size")
    parser.add_argument("--accumulation", type=int, default=8, help="--gradient_accumulation_steps")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="without --bf16")
    parser.add_argument("--measure", action="store_true", help="run it here also without a GPU")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to measure")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return report(run_way(args))
    table = {way: compute(args, flags) for way, flags in WAYS.items()}
    print(f"computed from shapes, GB (1e9 bytes)\n{'':20}" + "".join(f"{way:>22}" for way in table))
    for part in table["as it is"]:
        print(f"{part:20}" + "".join(f"{column[part]:>22.2f}" for column in table.values()))
    settings = {key: value for key, value in vars(args).items() if key not in ("way", "folder")}
    result, where = {"arguments": settings, "computed_gb": table}, environment()
    if not where["card"] and not args.measure:
        return write_result("ppo_memory_computed", result)
    result["measured"] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_models(args.shape, Path(folder), "float32" if args.float32 else "bfloat16")
        write_prompts(Path(folder, "prompts.jsonl"), args.batch * args.accumulation, args.prompt)
        for way in args.ways:
            found = result["measured"][way] = run_child("--way", way, "--folder", folder)
            peak = (found["peak_gpu_gb"] or found["peak_rss_gb"]) * 2**30 / 1e9
            print(f"{way}: {peak:.2f} GB", flush=True)
    write_result("ppo_memory", {**result, **where})


if __name__ == "__main__":
    main()
