"""training_rl.py against TRL's stock PPOTrainer: the same prompts, model and settings, in one run.

Both start from the same base model with a new LoRA adapter as the policy and the same reward model: for ours a LoRA
adapter on the base, for the stock trainer (which cannot read one) its merged full model. Each side runs in a process
of its own; the sides take turns. Seconds are those inside train(), after loading.

    python benchmarks/ppo.py --model_path runs/quickstart/model --rounds 3
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import environment, peak_memory, write_result


def make_reward_model(model_path, folder):
    """A random LoRA reward model on `model_path`, and the same as one full model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        init_lora_weights=False,
    )
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.1)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "full")
    for name in ("adapter", "full"):
        tokenizer.save_pretrained(folder / name)


def run_ours(args):
    """training_rl.py's own main, with the clock on train()."""
    import time

    import training_rl

    seconds = {}
    train = training_rl.PPOTrainer.train

    def timed(self, **kwargs):
        self.args.save_strategy = "no"  # the stock trainer saves nothing either
        start = time.perf_counter()
        output = train(self, **kwargs)
        seconds["train"] = time.perf_counter() - start
        return output

    training_rl.PPOTrainer.train = timed
    training_rl.PPOTrainer.evaluate = lambda self: {}
    flags = [
        "--model_path", args.model_path, "--reward_model_path", str(Path(args.folder) / "adapter"), "--dataset_name", args.data,
        "--output_dir", str(Path(args.folder) / "ours"), "--overwrite_output_dir", "--use_lora", "--prompt_format", "chat",
        "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", args.accumulation,
        "--total_episodes", args.episodes, "--response_length", args.response_length, "--num_ppo_epochs", args.ppo_epochs,
        "--learning_rate", "1e-4", "--seed", "1", "--save_steps", "1000",
    ]  # fmt: skip
    training_rl.main([str(flag) for flag in flags] + (["--bf16"] if args.bf16 else []))
    return seconds["train"]


def run_stock(args):
    """trl.experimental.ppo as its example wires it: a pad token is added, the value model is trained in full."""
    import time

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    def load(cls, path, **kwargs):
        model = cls.from_pretrained(path, dtype=dtype, **kwargs)
        model.resize_token_embeddings(len(tokenizer))
        return model

    def tokenize(row):
        chat = [{"role": "user", "content": row["prompt"]}]
        return {"input_ids": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)}

    data = load_dataset("json", data_files=args.data, split="train")
    data = data.map(tokenize, remove_columns=data.column_names)
    config = PPOConfig(
        output_dir=str(Path(args.folder) / "stock"),
        per_device_train_batch_size=int(args.batch),
        gradient_accumulation_steps=int(args.accumulation),
        total_episodes=int(args.episodes),
        response_length=int(args.response_length),
        num_ppo_epochs=int(args.ppo_epochs),
        stop_token="eos",
        missing_eos_penalty=1.0,
        learning_rate=1e-4,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        seed=1,
    )
    full = str(Path(args.folder) / "full")
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, args.model_path),
        ref_model=None,
        reward_model=load(AutoModelForSequenceClassification, full, num_labels=1),
        value_model=load(AutoModelForSequenceClassification, full, num_labels=1),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--data", default=str(ROOT / "data" / "rl" / "prompts.jsonl"), help="JSON Lines with prompt")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="sequences per micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per update")
    parser.add_argument("--response_length", type=int, default=16)
    parser.add_argument("--ppo_epochs", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="times that each side runs")
    parser.add_argument("--side", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        seconds = {"ours": run_ours, "stock": run_stock}[args.side](args)
        print("\nRESULT " + json.dumps({"seconds": seconds, **peak_memory()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_reward_model(args.model_path, Path(folder))
        runs = {"stock": [], "ours": []}
        for _ in range(args.rounds):
            for side in runs:
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout
                line = [line for line in output.splitlines() if line.startswith("RESULT ")][-1]
                runs[side].append(json.loads(line.removeprefix("RESULT ")))
    best = {side: {key: min(run[key] for run in results) for key in results[0]} for side, results in runs.items()}
    for side in best.values():
        side["episodes_per_second"] = args.episodes / side["seconds"]
    ratios = {key: best["ours"][key] / best["stock"][key] for key in best["ours"] if best["stock"][key]}
    print(f"\n{'':22}{'stock':>10}{'ours':>10}{'ratio':>8}   (minimum of {args.rounds})")
    for key, ratio in ratios.items():
        print(f"{key:22}{best['stock'][key]:>10.2f}{best['ours'][key]:>10.2f}{ratio:>8.2f}")
    settings = {key: value for key, value in vars(args).items() if key not in ("side", "folder")}
    write_result("ppo", {"settings": settings, "runs": runs, "best": best, "ratios": ratios, **environment()})


if __name__ == "__main__":
    main()
