"""training_sft.py against TRL's stock SFTTrainer: the same tokens, model, seed and number of optimizer steps.

The stock side keeps SFTConfig's defaults (padded batches, gradient checkpointing on). Each side runs in a process of
its own; the sides take turns. Seconds are those of Trainer.train(), after loading; the processor's seconds tell more
than the clock's where other programs run beside.

    python benchmarks/sft.py --model_path runs/quickstart/model --data data/finetune/train.jsonl
    python benchmarks/sft.py --model_path runs/quickstart/model --data data/finetune/train.jsonl --gradient_checkpointing
    python benchmarks/sft.py --shape llama-3.2-3b --bf16 --batch_size 2 --max_length 4096 --ours_only    # a GPU

`--shape` makes a random model of that shape and rows of exactly --max_length random tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import environment, peak_memory, write_result

SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (32, 64, 2, 4, 2, 400),
}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", help="model directory")
    parser.add_argument("--shape", choices=SHAPES, help="a random model of this shape in place of --model_path")
    parser.add_argument("--data", help="JSON Lines file in one of the schemas of training_sft.py")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--load_in_4bit", action="store_true", help="our side only")
    parser.add_argument("--full", action="store_true", help="train all weights in place of a LoRA adapter")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on our side too")
    parser.add_argument("--ours_only", action="store_true")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU in bf16 (H100: 989, A100: 312)")
    parser.add_argument("--side", choices=["stock", "ours"], help=argparse.SUPPRESS)  # what a child process runs
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def make_inputs(args, folder):
    """The model, if it is to be random, and the tokens that both sides train on."""
    import torch

    import training_sft as sft

    if args.shape:
        from transformers import AutoModelForCausalLM, LlamaConfig

        sys.path.append(str(ROOT / "tests"))
        from conftest import make_tokenizer

        hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=max(args.max_length, 512),
            tie_word_embeddings=True,
            dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )
        tokenizer = make_tokenizer(chat=False)
        config.eos_token_id = tokenizer.eos_token_id
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        words = torch.randint(
            97, 123, (args.batch_size * args.max_steps, args.max_length), generator=torch.manual_seed(0)
        )
        rows = [{"prompt": "x", "response": bytes(row.tolist()).decode()} for row in words]
        args.model_path, args.data = str(folder / "model"), str(folder / "rows.jsonl")
        Path(args.data).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = ours_argv(args, folder)
    options = sft.build_parser().parse_args(argv)
    data = sft.load_split(options, args.data, None, "train", "--split")
    tokenizer = sft.load_tokenizer(sft.locate_model(args.model_path, "--model_path"), options)
    schema = sft.pick_schema(data, sft.SCHEMAS, args.data)
    prompt_format = sft.pick_format("auto", "chat" if schema == ("messages",) else "qa", None, tokenizer)
    rows, _ = sft.encode_split(data, schema, prompt_format, options, args.data)
    rows.select_columns(["input_ids", "labels"]).to_json(folder / "tokens.jsonl")
    answers = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
    return sum(map(len, rows["input_ids"])) / len(rows), sum(answers) / len(rows)


def ours_argv(args, folder):
    flags = {
        "model_path": args.model_path, "dataset_name": args.data, "output_dir": folder / "ours", "seed": 1,
        "batch_size": args.batch_size, "max_length": args.max_length, "max_steps": args.max_steps, "logging_steps": 1,
        "learning_rate": 2e-5,
    }  # fmt: skip
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    wanted = {
        "--use_lora": not args.full,
        "--bf16": args.bf16,
        "--load_in_4bit": args.load_in_4bit,
        "--gradient_checkpointing": args.gradient_checkpointing,
        "--overwrite_output_dir": True,
    }
    return argv + [flag for flag, on in wanted.items() if on]


def run_ours(args):
    import training_sft

    training_sft.main(ours_argv(args, args.folder))
    lines = (args.folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run_stock(args):
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(args.folder / "stock"),
            per_device_train_batch_size=args.batch_size,
            max_steps=args.max_steps,
            max_length=args.max_length,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            seed=1,
        ),
        processing_class=AutoTokenizer.from_pretrained(args.model_path),
        train_dataset=load_dataset("json", data_files=str(args.folder / "tokens.jsonl"), split="train"),
        peft_config=None
        if args.full
        else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer.state.log_history


def run_child(args):
    from trl import SFTTrainer

    processor, train = [], SFTTrainer.train

    def timed(self, *arguments, **kwargs):
        start = time.process_time()
        result = train(self, *arguments, **kwargs)
        processor.append(time.process_time() - start)
        return result

    SFTTrainer.train = timed
    history = run_stock(args) if args.side == "stock" else run_ours(args)
    result = {
        "seconds": next(line["train_runtime"] for line in history if "train_runtime" in line),
        "processor_seconds": processor[0],
        "losses": [float(line["loss"]) for line in history if "loss" in line],
        **peak_memory(),
    }
    (args.folder / f"{args.side}.json").write_text(json.dumps(result), encoding="utf-8")


def main():
    args = build_parser().parse_args()
    if args.side:
        return run_child(args)
    if not args.shape and not (args.model_path and args.data):
        sys.exit("error: --model_path and --data are needed, or --shape")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokens_per_row, answers_per_row = make_inputs(args, folder)
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder)]
        command += ["--model_path", args.model_path, "--data", args.data]
        runs = {"stock": [], "ours": []}
        for _ in range(args.rounds):
            for side in ["ours"] if args.ours_only else ["stock", "ours"]:
                subprocess.run([*command, "--side", side], check=True, stdout=subprocess.DEVNULL)
                runs[side].append(json.loads((folder / f"{side}.json").read_text(encoding="utf-8")))
    rows = args.batch_size * args.max_steps
    table = {}
    for side, results in runs.items():
        if results:
            best = min(results, key=lambda result: result["seconds"])
            table[side] = {
                "rows_per_s": rows / best["seconds"],
                "answer_tokens_per_s": rows * answers_per_row / best["seconds"],
                "tokens_per_s": rows * tokens_per_row / best["seconds"],
                **{
                    name: best[name]
                    for name in ("seconds", "processor_seconds", "peak_rss_gb", "peak_gpu_gb", "losses")
                },
            }
            print(f"{side:6}{table[side]['rows_per_s']:8.3f} rows/s{table[side]['answer_tokens_per_s']:9.1f} answer tokens/s"
                  f"{best['peak_rss_gb']:8.2f} GB resident{best['peak_gpu_gb']:8.2f} GB GPU   losses {best['losses']}")  # fmt: skip
    if len(table) == 2:
        stock, ours = table["stock"], table["ours"]
        memory = "peak_gpu_gb" if stock["peak_gpu_gb"] else "peak_rss_gb"
        ratio = {
            "rows_per_s": ours["rows_per_s"] / stock["rows_per_s"],
            "rows_per_processor_second": stock["processor_seconds"] / ours["processor_seconds"],
            "memory": ours[memory] / stock[memory],
            "largest_loss_difference": max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"])),
        }
        print(f"ours / stock: rows/s {ratio['rows_per_s']:.2f} (by the processor's time "
              f"{ratio['rows_per_processor_second']:.2f}), memory {ratio['memory']:.2f}; "
              f"largest difference of a loss {ratio['largest_loss_difference']:.1e}")  # fmt: skip
        table["ratio"] = ratio
    if args.shape:
        hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
        layer = hidden * hidden * (2 + 2 * kv_heads / heads) + 3 * hidden * intermediate
        # Forward and the gradient of the activations (4 operations a weight and token; 6 with the weights' own
        # gradient), and causal attention: 2 products of which half is needed, forward once and backward twice.
        per_token = (6 if args.full else 4) * (
            layers * layer + vocabulary * hidden
        ) + 6 * layers * hidden * args.max_length
        used = per_token * table["ours"]["tokens_per_s"] / 1e12
        table["ours"]["model_flops_utilisation"] = used / args.peak_tflops
        print(f"model FLOPs utilisation {used / args.peak_tflops:.1%} of {args.peak_tflops:.0f} TFLOP/s")
    arguments = {name: value for name, value in vars(args).items() if name not in ("side", "folder")}
    name = (
        "sft"
        + ("_gradient_checkpointing" if args.gradient_checkpointing else "")
        + (f"_{args.shape}" if args.shape else "")
    )
    write_result(name, {**environment(), "arguments": arguments, **table})


if __name__ == "__main__":
    main()
