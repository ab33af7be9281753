"""training_reward_model.py against TRL's stock RewardTrainer: the same pairs, order, start and steps, in one run.

The stock side keeps RewardConfig's defaults, gradient checkpointing among them; ours has it in a run of its own. All
read the token ids that the script makes, and start from the same weights, so the losses have to agree. Each side runs
in a process of its own, the sides take turns; seconds are those inside train(), on the wall and of the processor.

    python benchmarks/reward.py --model_path runs/quickstart/model --data data/reward --gradient_checkpointing
    python benchmarks/reward.py --model_path runs/quickstart/model --data data/reward --shape llama-3.2-3b --bf16
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

LEARNING_RATE, SEED = 1e-4, 1
SHAPES = {  # random weights in the shape of a model, with the tokenizer of --model_path
    "llama-3.2-3b": {
        "num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
}  # fmt: skip


def make_model(shape, tokenizer, folder):
    """Write a random Llama of that shape in bfloat16 into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape], dtype="bfloat16")).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)


def data_flags(args):
    if Path(args.data).is_dir():
        return ["--dataset_name", "json", "--subset", args.data]
    return ["--dataset_name", args.data]


def run_ours(args):
    """The script's own main, with the clock on train()."""
    import training_reward_model as script

    train, result = script.RewardTrainer.train, {}

    def timed(self, **kwargs):
        start = time.process_time()
        output = train(self, **kwargs)
        result.update(output.metrics, processor=time.process_time() - start, history=self.state.log_history)
        # The stock side gets the same rows and pad token, see run_stock.
        self.train_dataset.save_to_disk(Path(args.folder) / "rows")
        self.processing_class.save_pretrained(Path(args.folder) / "tokenizer")
        return output

    script.RewardTrainer.train = timed
    flags = [
        "--model_path", args.model_path, *data_flags(args), "--output_dir", str(Path(args.folder) / "ours"),
        "--overwrite_output_dir", "--use_lora", "--per_device_train_batch_size", args.per_device_train_batch_size,
        "--max_steps", args.max_steps, "--max_length", args.max_length, "--learning_rate", LEARNING_RATE,
        "--logging_steps", 1, "--seed", SEED,
    ]  # fmt: skip
    flags += ["--bf16"] * args.bf16 + ["--gradient_checkpointing"] * (args.side == "checkpointing")
    script.main([str(flag) for flag in flags])
    return result


def run_stock(args):
    """RewardTrainer as its documentation wires it, on the rows of `run_ours`."""
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_path, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.01 * model.config.initializer_range)  # the script's start
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(Path(args.folder) / "stock"),
            per_device_train_batch_size=args.per_device_train_batch_size,
            max_steps=args.max_steps,
            max_length=args.max_length,
            learning_rate=LEARNING_RATE,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            seed=SEED,
        ),
        processing_class=AutoTokenizer.from_pretrained(Path(args.folder) / "tokenizer"),
        train_dataset=load_from_disk(Path(args.folder) / "rows"),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )
    start = time.process_time()
    metrics = trainer.train().metrics
    return {**metrics, "processor": time.process_time() - start, "history": trainer.state.log_history}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--data", required=True, help="folder or file of pairs, JSON Lines")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape in place of the model's")
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="ours with it, as a third side")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="times that each side runs")
    parser.add_argument("--side", choices=["ours", "checkpointing", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        metrics = run_stock(args) if args.side == "stock" else run_ours(args)
        steps = [entry for entry in metrics["history"] if "loss" in entry]
        result = {
            "seconds": metrics["train_runtime"],
            "processor_seconds": metrics["processor"],
            "pairs_per_second": args.max_steps * args.per_device_train_batch_size / metrics["train_runtime"],
            **peak_memory(),
            "losses": [entry["loss"] for entry in steps],
            "margins": [entry["margin"] for entry in steps],
        }
        print("\nRESULT " + json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = ["--model_path", args.model_path]
        if args.shape:
            from transformers import AutoTokenizer

            make_model(args.shape, AutoTokenizer.from_pretrained(args.model_path), Path(folder) / "model")
            model = ["--model_path", str(Path(folder) / "model")]
        runs = {"ours": [], **({"checkpointing": []} if args.gradient_checkpointing else {}), "stock": []}
        for _ in range(args.rounds):
            for side in runs:
                command = [sys.executable, __file__, *sys.argv[1:], *model, "--side", side, "--folder", folder]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout
                line = [line for line in output.splitlines() if line.startswith("RESULT ")][-1]
                runs[side].append(json.loads(line.removeprefix("RESULT ")))
    best = {side: min(results, key=lambda result: result["processor_seconds"]) for side, results in runs.items()}
    stock = best["stock"]
    names = [name for name in stock if stock[name] and name not in ("losses", "margins")]
    ratios = {side: {name: best[side][name] / stock[name] for name in names} for side in best if side != "stock"}
    print(
        f"\n{'':18}{'stock':>11}"
        + "".join(f"{side:>15}{'ratio':>8}" for side in ratios)
        + f"   (best of {args.rounds})"
    )
    for name in names:
        print(
            f"{name:18}{stock[name]:>11.3f}"
            + "".join(f"{best[side][name]:>15.3f}{ratios[side][name]:>8.2f}" for side in ratios)
        )
    for name in ("losses", "margins"):
        for step, value in enumerate(stock[name]):
            others = "".join(
                f"{best[side][name][step]:>15.6f}{best[side][name][step] - value:>8.0e}" for side in ratios
            )
            print(f"{name}, step {step + 1:<4}{value:>12.6f}{others}")
    settings = {name: value for name, value in vars(args).items() if name not in ("side", "folder")}
    write_result(
        f"reward_{args.shape}" if args.shape else "reward",
        {"settings": settings, "runs": runs, "best": best, "ratios": ratios, **environment()},
    )


if __name__ == "__main__":
    main()
