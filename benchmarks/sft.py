"""training_sft.py against TRL's stock SFTTrainer: the same tokens, model, seed and number of optimizer steps.

The stock side keeps SFTConfig's defaults (padded batches in random order); gradient checkpointing is on on both sides.
Each side runs in a process of its own; the sides take turns. Seconds are those of Trainer.train(), after loading; the
processor's seconds tell more than the clock's where other programs run beside.

    python benchmarks/sft.py --model_path runs/quickstart/model --data data/finetune/train.jsonl
    python benchmarks/sft.py --model_path runs/quickstart/model --data data/finetune/train.jsonl --no_checkpointing
    python benchmarks/sft.py --shape llama-3.2-3b --bf16 --batch_size 2 --max_length 4096 --ours_only    # a GPU

`--shape` makes a random model of that shape and rows of --max_length random tokens.
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
from ppo_memory import SHAPES, make_models


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
    parser.add_argument("--full", action="store_true", help="train all weights in place of a LoRA adapter")
    parser.add_argument("--no_checkpointing", action="store_true", help="gradient checkpointing off on both sides")
    parser.add_argument("--ours_only", action="store_true")
    parser.add_argument("--script", type=Path, default=ROOT / "training_sft.py", help="another version of our side")
    parser.add_argument("--side", choices=["stock", "ours"], help=argparse.SUPPRESS)  # what a child process runs
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def write_answers(path, count, length):
    """`count` rows, each at least `length` tokens long, nearly all of them trained on: one letter is one token."""
    import torch

    letters = torch.randint(97, 123, (count, length), generator=torch.Generator().manual_seed(0))
    rows = [{"prompt": "x", "response": bytes(row.tolist()).decode()} for row in letters]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_ours(args):
    import importlib.util

    spec = importlib.util.spec_from_file_location("training_sft", args.script)
    training_sft = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training_sft)
    flags = {
        "model_path": args.model_path, "dataset_name": args.data, "output_dir": args.folder / "ours", "seed": 1,
        "batch_size": args.batch_size, "max_length": args.max_length, "max_steps": args.max_steps, "logging_steps": 1,
        "learning_rate": 2e-5,
        "max_samples": args.batch_size * args.max_steps,  # one pass over the same rows; the order is each side's own
    }  # fmt: skip
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))] + ["--overwrite_output_dir"]
    argv += ["--use_lora"] * (not args.full) + ["--bf16"] * args.bf16
    training_sft.main(argv + ["--gradient_checkpointing"] * (not args.no_checkpointing))


def run_stock(args):
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(args.folder / "stock"), per_device_train_batch_size=args.batch_size, max_steps=args.max_steps,
        max_length=args.max_length, bf16=args.bf16, gradient_checkpointing=not args.no_checkpointing, logging_steps=1,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[], seed=1,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(args.model_path),
        train_dataset=load_dataset("json", data_files=str(args.folder / "tokens.jsonl"), split="train"),
        peft_config=None if args.full else lora,
    ).train()


def run_child(args):
    """One side; leaves its figures, and our side the tokens that it trains on."""
    from trl import SFTTrainer

    train, result = SFTTrainer.train, {}

    def timed(self, *arguments, **kwargs):
        self.train_dataset.select_columns(["input_ids", "labels"]).to_json(args.folder / "tokens.jsonl")
        clock, processor = time.perf_counter(), time.process_time()
        done = train(self, *arguments, **kwargs)
        result["seconds"] = time.perf_counter() - clock
        result["processor_seconds"] = time.process_time() - processor
        result["losses"] = [line["loss"] for line in self.state.log_history if "loss" in line]
        return done

    SFTTrainer.train = timed
    run_stock(args) if args.side == "stock" else run_ours(args)
    (args.folder / f"{args.side}.json").write_text(json.dumps({**result, **peak_memory()}), encoding="utf-8")


def main():
    args = build_parser().parse_args()
    if args.side:
        return run_child(args)
    if not args.shape and not (args.model_path and args.data):
        sys.exit("error: --model_path and --data are needed, or --shape")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.shape:
            make_models(args.shape, folder, "bfloat16" if args.bf16 else "float32")
            write_answers(folder / "rows.jsonl", args.batch_size * args.max_steps, args.max_length)
            args.model_path, args.data = str(folder / "base"), str(folder / "rows.jsonl")
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder)]
        command += ["--model_path", args.model_path, "--data", args.data]
        runs = {"ours": [], "stock": []}
        for _ in range(args.rounds):
            for side in ["ours"] if args.ours_only else ["ours", "stock"]:
                subprocess.run([*command, "--side", side], check=True, stdout=subprocess.DEVNULL)
                runs[side].append(json.loads((folder / f"{side}.json").read_text(encoding="utf-8")))
        lines = (folder / "tokens.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [sum(label != -100 for label in json.loads(line)["labels"][1:]) for line in lines]
    table, rows = {}, args.batch_size * args.max_steps
    for side, results in runs.items():
        if results:
            best = min(results, key=lambda result: result["seconds"])
            per_row = sum(answers) / len(answers)
            speed = rows / best["seconds"]
            table[side] = {"rows_per_s": speed, "answer_tokens_per_s": speed * per_row, **best}
            print(f"{side:6}{speed:8.3f} rows/s{speed * per_row:9.1f} answer tokens/s{best['peak_rss_gb']:8.2f} GB resident"
                  f"{best['peak_gpu_gb']:8.2f} GB GPU   losses {[round(loss, 4) for loss in best['losses']]}")  # fmt: skip
    if len(table) == 2:
        stock, ours = table["stock"], table["ours"]
        memory = "peak_gpu_gb" if stock["peak_gpu_gb"] else "peak_rss_gb"
        table["ratio"] = {
            "rows_per_s": ours["rows_per_s"] / stock["rows_per_s"],
            "rows_per_processor_second": stock["processor_seconds"] / ours["processor_seconds"],
            "memory": ours[memory] / stock[memory],
        }
        print("ours / stock:", ", ".join(f"{name} {value:.2f}" for name, value in table["ratio"].items()))
    hidden = {"side", "folder", "script"}
    arguments = {name: value for name, value in vars(args).items() if name not in hidden}
    write_result("_".join(filter(None, ["sft", args.shape])), {**environment(), "arguments": arguments, **table})


if __name__ == "__main__":
    main()
