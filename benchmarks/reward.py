"""training_reward_model.py against TRL's stock RewardTrainer: the same pairs, order, start and steps, in one run.

Both sides train a LoRA adapter with gradient checkpointing (RewardConfig's default; --no_checkpointing for neither), in
one precision. The stock side reads the rows that the script makes and starts from the same weights, so the losses have
to agree; then both score the evaluation pairs. Each side runs in a process of its own, the sides take turns; seconds are
those inside train(), on the wall and of the processor.

    python benchmarks/reward.py --model_path runs/quickstart/model --data data/reward --eval_data data/evaluation
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

SEED = 1


def run_ours(args, folder):
    """The script's own main, with the clock on train(); what the stock side needs stays in `folder`."""
    import torch

    import training_reward_model as script

    train, result = script.RewardTrainer.train, {}

    def timed(self, **kwargs):
        start = time.process_time()
        output = train(self, **kwargs)
        result.update(output.metrics, processor=time.process_time() - start, history=self.state.log_history)
        result.update(peak_memory())
        sampler = self._get_train_sampler()
        sampler.generator = torch.Generator().manual_seed(SEED)  # the order of the first epoch
        self.train_dataset.select(list(sampler)).save_to_disk(folder / "train_dataset")
        if self.eval_dataset is not None:
            self.eval_dataset.save_to_disk(folder / "eval_dataset")
        self.processing_class.save_pretrained(folder / "tokenizer")
        return output

    script.RewardTrainer.train = timed
    flags = [
        "--model_path",
        args.model_path,
        "--dataset_name",
        "json",
        "--subset",
        args.data,
        "--output_dir",
        folder / "ours",
    ]
    flags += ["--overwrite_output_dir", "--use_lora", "--max_length", args.max_length, "--max_steps", args.max_steps]
    flags += ["--per_device_train_batch_size", args.per_device_train_batch_size, "--learning_rate", args.learning_rate]
    flags += ["--logging_steps", 1, "--seed", SEED] + ["--bf16"] * args.bf16
    flags += ["--gradient_checkpointing"] * (not args.no_checkpointing)
    flags += ["--eval_subset", args.eval_data] if args.eval_data else []
    script.main([str(flag) for flag in flags])
    metrics = json.loads((folder / "ours" / "metrics.json").read_text(encoding="utf-8"))
    return {**result, "accuracy": metrics.get("accuracy")}


def run_stock(args, folder):
    """RewardTrainer as its documentation wires it, on the rows of `run_ours`."""
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_path, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.01 * model.config.initializer_range)  # the script's start
    config = RewardConfig(
        output_dir=str(folder / "stock"),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_checkpointing=not args.no_checkpointing,
        train_sampling_strategy="sequential",  # the rows are in the script's order
        max_steps=args.max_steps,
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        seed=SEED,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        train_dataset=load_from_disk(folder / "train_dataset"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    start = time.process_time()
    metrics = trainer.train().metrics
    result = {
        **metrics,
        "processor": time.process_time() - start,
        "history": trainer.state.log_history,
        **peak_memory(),
    }
    if (folder / "eval_dataset").is_dir():
        result["accuracy"] = trainer.evaluate(load_from_disk(folder / "eval_dataset"))["eval_accuracy"]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--data", required=True, help="folder of pairs to train on")
    parser.add_argument("--eval_data", help="folder of pairs to score at the end")
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--no_checkpointing", action="store_true", help="on neither side")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="times that each side runs")
    parser.add_argument("--side", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        metrics = run_ours(args, args.folder) if args.side == "ours" else run_stock(args, args.folder)
        result = {
            "seconds": metrics["train_runtime"],
            "processor_seconds": metrics["processor"],
            "pairs_per_second": args.max_steps * args.per_device_train_batch_size / metrics["train_runtime"],
            **{name: metrics[name] for name in ("peak_rss_gb", "peak_gpu_gb")},
            "accuracy": metrics.get("accuracy"),
            "losses": [entry["loss"] for entry in metrics["history"] if "loss" in entry],
        }
        print("\nRESULT " + json.dumps(result))
        return
    runs = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        for side in ["ours", "stock"] * args.rounds:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout
            line = [line for line in output.splitlines() if line.startswith("RESULT ")][-1]
            runs[side].append(json.loads(line.removeprefix("RESULT ")))
    ours, stock = (min(results, key=lambda result: result["processor_seconds"]) for results in runs.values())
    print(f"\n{'':18}{'stock':>11}{'ours':>11}{'ratio':>8}   (best of {args.rounds})")
    for name in ("seconds", "processor_seconds", "pairs_per_second", "peak_rss_gb", "peak_gpu_gb", "accuracy"):
        if stock[name]:
            print(f"{name:18}{stock[name]:>11.3f}{ours[name]:>11.3f}{ours[name] / stock[name]:>8.2f}")
    for step, (theirs, mine) in enumerate(zip(stock["losses"], ours["losses"]), 1):
        print(f"loss of step {step:<5}{theirs:>11.6f}{mine:>11.6f}{mine - theirs:>8.0e}")
    settings = {name: value for name, value in vars(args).items() if name not in ("side", "folder")}
    write_result(
        "reward", {"settings": settings, "runs": runs, "best": {"ours": ours, "stock": stock}, **environment()}
    )


if __name__ == "__main__":
    main()
