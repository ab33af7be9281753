"""training_rl.py against TRL's stock PPOTrainer: the same prompts, model and settings, in one run.

All start from the same base model with a new LoRA adapter as the policy and the same reward model: for ours a LoRA
adapter on the base, for the stock trainer (which cannot read one) its merged full model. Each side runs in a process
of its own; the sides take turns. Seconds are those inside train(), after loading. With several --script, old and new
versions run side by side.

    python benchmarks/ppo.py --model_path runs/SmolLM2-135M-Instruct --rounds 3
    python benchmarks/ppo.py --model_path runs/SmolLM2-135M-Instruct --script ../old/training_rl.py --script training_rl.py
"""

import argparse
import tempfile
import time
from pathlib import Path

from measure import clock_steps, environment, load_script, peak_memory, report, run_child, write_result

ROOT = Path(__file__).resolve().parents[1]


def make_reward_model(model_path, folder):
    """A random LoRA reward model on `model_path`, and the same as one full model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.002)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "full")
    for name in ("adapter", "full"):
        tokenizer.save_pretrained(folder / name)


def time_train(trainer, train):
    """Seconds in train(), and those of an update after the first, in which kernels are still loaded and chosen."""
    ends, start = clock_steps(trainer), time.perf_counter()
    output = train()
    seconds = time.perf_counter() - start
    later = len(ends) - 1
    update_seconds = (ends[-1] - ends[0]) / later if later else seconds
    return output, {"seconds": seconds, "update_seconds": update_seconds}


def run_ours(args):
    """The script's own main; returns the seconds in train()."""
    script, seconds = load_script(args.side), {}
    train = script.PPOTrainer.train

    def timed(self, *inputs, **options):
        self.args.save_strategy = "no"  # the stock trainer saves nothing either
        output, found = time_train(self, lambda: train(self, *inputs, **options))
        seconds.update(found)
        last = [line for line in self.state.log_history if "speed/rollout_seconds" in line][-1]
        seconds.update({f"{part}_seconds": last[f"speed/{part}_seconds"] for part in ("rollout", "train")})
        return output

    script.PPOTrainer.train = timed
    script.PPOTrainer.evaluate = lambda self, *inputs, **options: {}
    flags = f"""--use_lora --overwrite_output_dir --prompt_format chat --learning_rate 1e-4 --seed 1 --save_steps 1000
        --per_device_train_batch_size {args.batch} --gradient_accumulation_steps {args.accumulation}
        --total_episodes {args.episodes} --response_length {args.response_length} --num_ppo_epochs {args.ppo_epochs}"""
    paths = ["--model_path", args.model_path, "--reward_model_path", args.reward_adapter]
    paths += ["--dataset_name", args.data, "--output_dir", f"{args.folder}/ours"]
    script.main([*paths, *flags.split(), *(["--bf16"] if args.bf16 else [])])
    return seconds


def build_stock(policy, reward, tokenizer, prompts, dtype, **settings):
    """trl.experimental.ppo as its example wires it: a pad token is added, the value model is trained in full.

    `prompts`: lists of ids; `settings`: fields of PPOConfig."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    def load(auto, path, **kwargs):
        model = auto.from_pretrained(path, dtype=dtype, **kwargs)
        model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
        return model

    off = {"save_strategy": "no", "num_sample_generations": 0, "report_to": []}
    use_cpu = not torch.cuda.is_available()
    config = PPOConfig(stop_token="eos", missing_eos_penalty=1.0, logging_steps=1, use_cpu=use_cpu, **off, **settings)
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, policy),
        ref_model=None,
        reward_model=load(AutoModelForSequenceClassification, reward, num_labels=1),
        value_model=load(AutoModelForSequenceClassification, reward, num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:4]}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def run_stock(args):
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    texts = load_dataset("json", data_files=args.data, split="train")["prompt"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    trainer = build_stock(
        args.model_path,
        args.reward_model,
        tokenizer,
        prompts,
        torch.bfloat16 if args.bf16 else torch.float32,
        output_dir=f"{args.folder}/stock",
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulation,
        total_episodes=args.episodes,
        response_length=args.response_length,
        num_ppo_epochs=args.ppo_epochs,
        learning_rate=1e-4,
        bf16=args.bf16,
        seed=1,
    )
    return time_train(trainer, trainer.train)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--script", action="append", help="a training_rl.py; may be repeated (the repository's)")
    parser.add_argument("--data", default=str(ROOT / "data" / "rl" / "prompts.jsonl"), help="JSON Lines with prompt")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="sequences per micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per update")
    parser.add_argument("--response_length", type=int, default=16)
    parser.add_argument("--ppo_epochs", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="times that each side runs")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        args.reward_adapter, args.reward_model = f"{args.folder}/adapter", f"{args.folder}/full"
        seconds = run_stock(args) if args.side == "stock" else run_ours(args)
        return report({**seconds, **peak_memory()})
    runs = {side: [] for side in ["stock", *(args.script or [str(ROOT / "training_rl.py")])]}
    with tempfile.TemporaryDirectory() as folder:
        make_reward_model(args.model_path, Path(folder))
        for _ in range(args.rounds):
            for side in runs:
                runs[side].append(run_child("--side", side, "--folder", folder))
    best = {side: {key: min(run[key] for run in found) for key in found[0]} for side, found in runs.items()}
    print(f"\nleast of {args.rounds}{'seconds':>12}{'ratio':>8}{'GB':>8}{'ratio':>8}")
    memory = "peak_gpu_gb" if best["stock"]["peak_gpu_gb"] else "peak_rss_gb"
    ratios = {}
    for side, found in best.items():
        ratios[side] = {key: found[key] / best["stock"][key] for key in ("seconds", memory)}
        pairs = "".join(f"{found[key]:>10.2f}{ratio:>8.2f}" for key, ratio in ratios[side].items())
        print(f"{pairs}   {side}")
    settings = {key: value for key, value in vars(args).items() if key not in ("side", "folder")}
    write_result("ppo", {"settings": settings, "runs": runs, "best": best, "ratios": ratios, **environment()})


if __name__ == "__main__":
    main()
