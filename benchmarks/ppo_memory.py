"""What PPO needs on one card: the plan for a model that is not at hand, and on a card the measurement.

Takes the README's PPO command (LoRA, all four roles on one base) for random weights of a given shape. Always prints the
bytes of each part as training_rl.py foresees them from shapes alone, in GB (1e9 bytes), marked as computed; what that
leaves out is the CUDA context (0.3 to 0.5 GB) and what the allocator loses to fragments. With a GPU, or --measure, it
also makes the weights, runs the command, and prints peak memory and seconds of every phase.

    python benchmarks/ppo_memory.py --shape llama-3.2-3b
    python benchmarks/ppo_memory.py --shape smollm2-135m --measure --float32
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from measure import environment, peak_memory, write_result
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import training_rl

# layers, hidden, heads, key/value heads, intermediate, vocabulary; embeddings tied
SHAPES = {
    "smollm2-135m": (30, 576, 9, 3, 1536, 49152),
    "llama-3.2-1b": (16, 2048, 32, 8, 8192, 128256),
    "llama-3.2-3b": (28, 3072, 24, 8, 8192, 128256),
}
WAYS = {
    "as it is": [],
    "checkpointing": ["gradient_checkpointing"],
    "4 bit": ["load_in_4bit"],
    "4 bit, checkpointing": ["load_in_4bit", "gradient_checkpointing"],
}


def make_config(shape):
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    values = dict(zip((*names, "vocab_size"), SHAPES[shape]))
    return LlamaConfig(**values, tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0)


def compute(args):
    """{way: {part: GB}}, by the script's own estimate."""
    tokens = args.prompt + args.response
    tokens = min(args.batch * tokens, max(SHAPES[args.shape][1], tokens))  # a row of training_rl.py
    logits = tokens * args.response // (args.prompt + args.response)
    table = {}
    for way, flags in WAYS.items():
        off = dict.fromkeys(
            ("fp16", "load_in_8bit", "load_in_4bit", "gradient_checkpointing", "trust_remote_code"), False
        )
        options = argparse.Namespace(
            **{**off, "bf16": not args.float32, "use_lora": True, **dict.fromkeys(flags, True)}
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        sizes = (make_config(args.shape), lora, tokens, logits)
        cached = min(args.batch * args.accumulation, 64) * (args.prompt + args.response)
        roles = {"trained_roles": 2, "frozen_roles": 2, "cached": cached}
        parts, _ = training_rl.estimate_memory(options, AutoModelForCausalLM, *sizes, **roles)
        table[way] = {**{part: size / 1e9 for part, size in parts.items()}, "peak": sum(parts.values()) / 1e9}
    return table


def make_models(args, folder):
    """Random weights, an adapter for the policy and one for the reward model, and prompts of exactly --prompt tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    dtype = torch.float32 if args.float32 else torch.bfloat16
    AutoModelForCausalLM.from_config(make_config(args.shape), dtype=dtype).save_pretrained(folder / "base")
    for name, auto, kind in (
        ("policy", AutoModelForCausalLM, "CAUSAL_LM"),
        ("reward", AutoModelForSequenceClassification, "SEQ_CLS"),
    ):
        model = auto.from_pretrained(folder / "base", dtype=dtype, **({"num_labels": 1} if kind == "SEQ_CLS" else {}))
        head = {"modules_to_save": ["score"]} if kind == "SEQ_CLS" else {}
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=kind, **head)
        get_peft_model(model, lora).save_pretrained(folder / name)
    for name in ("base", "policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    prompt_format = training_rl.PromptFormat(tokenizer, "qa")
    around = len(prompt_format.encode([{"role": "user", "content": ""}], open_end=True)[0])
    rows = [
        {"prompt": chr(97 + i % 26) + "x" * (args.prompt - around - 1)} for i in range(args.batch * args.accumulation)
    ]
    (folder / "data").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "train.jsonl").write_text(text, encoding="utf-8")


def measure(args, folder, flags):
    """Peak memory (GB) and seconds of each phase of two updates; the second one counts for the seconds."""
    phases, cuda = {}, torch.cuda.is_available()

    def watch(name):
        function = getattr(training_rl.PPOTrainer, name)

        def watched(self, *inputs, **options):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            result = function(self, *inputs, **options)
            if cuda:
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()["peak_rss_gb"] * 2**30
            before = phases.get(name, {}).get("peak_gb", 0)
            phases[name] = {"seconds": time.perf_counter() - start, "peak_gb": max(peak / 1e9, before)}
            return result

        setattr(training_rl.PPOTrainer, name, watched)
        return function

    kept = {name: watch(name) for name in ("generate", "roll_out", "optimize")}
    kept["evaluate"] = training_rl.PPOTrainer.evaluate
    training_rl.PPOTrainer.evaluate = lambda self: {}
    command = ["--model_path", folder / "policy", "--reward_model_path", folder / "reward", "--dataset_name", "json"]
    command += ["--subset", folder / "data", "--output_dir", folder / "out", "--overwrite_output_dir", "--use_lora"]
    command += ["--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", args.accumulation]
    command += ["--total_episodes", 2 * args.batch * args.accumulation, "--response_length", args.response]
    command += [
        "--max_prompt_length",
        args.prompt,
        "--prompt_format",
        "qa",
        "--force",
        *(f"--{flag}" for flag in flags),
    ]
    training_rl.main([*map(str, command), *([] if args.float32 else ["--bf16"])])
    for name, function in kept.items():
        setattr(training_rl.PPOTrainer, name, function)
    phases["roll_out"]["seconds"] -= phases["generate"]["seconds"]
    names = {"generate": "generation", "roll_out": "scoring", "optimize": "update"}
    found = {names[name]: phase for name, phase in phases.items()}
    return {**found, "peak": {"peak_gb": max(phase["peak_gb"] for phase in phases.values())}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--batch", type=int, default=1, help="--per_device_train_batch_size")
    parser.add_argument("--accumulation", type=int, default=8, help="--gradient_accumulation_steps")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens")
    parser.add_argument("--float32", action="store_true", help="without --bf16")
    parser.add_argument("--measure", action="store_true", help="run it here also without a GPU")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to measure")
    args = parser.parse_args()
    table = compute(args)
    print(f"computed from shapes, GB (1e9 bytes)\n{'':20}" + "".join(f"{way:>22}" for way in table))
    for part in table["as it is"]:
        print(f"{part:20}" + "".join(f"{column[part]:>22.2f}" for column in table.values()))
    result = {"arguments": vars(args), "computed_gb": table}
    name = "ppo_memory_computed"
    if torch.cuda.is_available() or args.measure:
        name, result["measured"] = "ppo_memory", {}
        with tempfile.TemporaryDirectory() as folder:
            make_models(args, Path(folder))
            for way in args.ways:
                found = result["measured"][way] = measure(args, Path(folder), WAYS[way])
                print(f"\nmeasured, {way}; computed {table[way]['peak']:.2f} GB")
                for phase, values in found.items():
                    seconds = f"{values['seconds']:8.1f} s" if "seconds" in values else ""
                    print(f"  {phase:12} {values['peak_gb']:8.2f} GB {seconds}")
        result |= environment()
    write_result(name, result)


if __name__ == "__main__":
    main()
