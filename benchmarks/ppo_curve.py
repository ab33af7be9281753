"""The learning curve of the quickstart's PPO stage: training_rl.py against TRL's stock PPOTrainer, over several seeds.

Both start from the quickstart's SFT model and reward model and see the same prompts for the same number of episodes.
Ours reads the two adapters as they are; the stock trainer cannot, so it gets them merged into full models, a pad token
of its own, a new LoRA adapter as the policy and a value model that it trains in full. At the end both policies answer
the questions that no stage was trained on, and one and the same code measures the mean score of the reward model and
the KL to the SFT model (k1, nats an answer, at the sampling temperature).

    python quickstart.py
    python benchmarks/ppo_curve.py --run runs/quickstart --seeds 0 1 2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import environment, write_result

from quickstart import PROMPTS, RESPONSE_LENGTH, TEMPERATURE, follows_rule

EPISODES, BATCH, EPOCHS, KL_COEF, PENALTY = 192, 16, 2, 0.05, 1.0  # as in quickstart.py
KEYS = ("objective/scores", "objective/kl")


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def train_ours(args, folder):
    """training_rl.py's own main; returns (curve, policy model)."""
    import torch
    from peft import AutoPeftModelForCausalLM

    import training_rl

    flags = [
        "--model_path", f"{args.run}/sft/final_checkpoint", "--reward_model_path", f"{args.run}/reward/final_checkpoint",
        "--dataset_name", "json", "--subset", str(ROOT / "data" / "rl"), "--output_dir", str(folder / "ppo"),
        "--max_prompt_length", 64, "--response_length", RESPONSE_LENGTH, "--temperature", TEMPERATURE,
        "--per_device_train_batch_size", BATCH, "--total_episodes", EPISODES, "--num_ppo_epochs", EPOCHS,
        "--kl_coef", KL_COEF, "--missing_eos_penalty", PENALTY, "--learning_rate", args.learning_rate, "--bf16",
        "--seed", args.seed,
    ]  # fmt: skip
    training_rl.main([str(flag) for flag in flags])
    lines = [line for line in read_lines(folder / "ppo" / "metrics.jsonl") if "val/ratio" in line]
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "ppo" / "final_checkpoint", dtype=torch.float32)
    return [{key: line[key] for key in KEYS} for line in {line["step"]: line for line in lines}.values()], model


def train_stock(args, folder):
    """trl.experimental.ppo on merged full models; returns (curve, policy model)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    import training_rl

    merged = Path(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(merged / "sft", padding_side="left")
    prompt_format = training_rl.PromptFormat(tokenizer, "qa")
    prompts = [row["prompt"] for row in read_lines(ROOT / "data" / "rl" / "prompts.jsonl")]
    ids = [prompt_format.encode([{"role": "user", "content": text}], open_end=True)[0] for text in prompts]
    ids = [prompt for prompt in ids if len(prompt) <= 64]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    def load(cls, path, **kwargs):
        model = cls.from_pretrained(path, dtype=torch.float32, **kwargs)
        model.resize_token_embeddings(len(tokenizer))
        return model

    config = PPOConfig(
        output_dir=str(folder / "stock"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        total_episodes=EPISODES,
        response_length=RESPONSE_LENGTH,
        temperature=TEMPERATURE,
        num_ppo_epochs=EPOCHS,
        kl_coef=KL_COEF,
        stop_token="eos",
        missing_eos_penalty=PENALTY,
        learning_rate=float(args.learning_rate),
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        seed=args.seed,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, merged / "sft"),
        ref_model=None,
        reward_model=load(AutoModelForSequenceClassification, merged / "reward", num_labels=1),
        value_model=load(AutoModelForSequenceClassification, merged / "reward", num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[:4]}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "objective/scores" in line]
    return [{key: line[key] for key in KEYS} for line in lines], trainer.policy_model


def measure(args, policy):
    """Reward, KL, stop rate and rule score of answers sampled for the questions that no stage was trained on.

    `kl` is that of the sampled tokens; `kl_summed`, over the whole vocabulary at each of them, has the same expectation
    and less noise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    import training_rl

    merged = Path(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(merged / "sft")
    prompt_format = training_rl.PromptFormat(tokenizer, "qa")
    reference = AutoModelForCausalLM.from_pretrained(merged / "sft", dtype=torch.float32).eval()
    scorer = AutoModelForSequenceClassification.from_pretrained(merged / "reward", num_labels=1, dtype=torch.float32)
    questions = [row["prompt"] for row in read_lines(ROOT / "data" / "evaluation" / "test.jsonl")][:PROMPTS]
    stops, policy = prompt_format.stop_ids(reference.generation_config), policy.float().eval()
    torch.manual_seed(args.seed)
    found = {"reward": [], "kl": [], "kl_summed": [], "stop_rate": [], "rule_score": []}
    for question in questions:
        prompt = prompt_format.encode([{"role": "user", "content": question}], open_end=True)[0]
        ids = torch.tensor([prompt], device=policy.device)
        with torch.no_grad():
            sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
            out = policy.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **sampling,
                max_new_tokens=RESPONSE_LENGTH,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
            answer, vocabulary = out[0, len(prompt) :], len(tokenizer)

            def logprobs(model):
                logits = model.to(out.device)(input_ids=out).logits[0, len(prompt) - 1 : -1, :vocabulary]
                return (logits.float() / TEMPERATURE).log_softmax(-1)

            ours, theirs = logprobs(policy), logprobs(reference)
            found["kl"].append((ours - theirs).gather(1, answer[:, None]).sum().item())
            found["kl_summed"].append((ours.exp() * (ours - theirs)).sum().item())
            hidden = scorer.to(out.device).model(input_ids=out).last_hidden_state[0, -1]
            found["reward"].append(scorer.score(hidden).item())
        found["stop_rate"].append(answer[-1].item() in stops)
        found["rule_score"].append(follows_rule(tokenizer.decode(answer, skip_special_tokens=True)))
    return {name: sum(values) / len(values) for name, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", default="runs/quickstart", help="output of quickstart.py: its sft/ and reward/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning_rate", default="3e-4", help="of both sides; the quickstart's by default")
    parser.add_argument("--sides", nargs="+", default=["stock", "ours"], choices=["stock", "ours"])
    parser.add_argument("--name", default="ppo_curve", help="of the file in benchmarks/results/")
    parser.add_argument("--side", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            curve, policy = {"ours": train_ours, "stock": train_stock}[args.side](args, Path(folder))
            print("\nRESULT " + json.dumps({"seed": args.seed, "final": measure(args, policy), "curve": curve}))
        return
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("sft", "reward"):
            command = [
                sys.executable,
                ROOT / "merge_with_lora.py",
                "--adapter_path",
                f"{args.run}/{stage}/final_checkpoint",
            ]
            subprocess.run([*command, "--output_dir", Path(folder) / stage, "--dtype", "float32"], check=True)
        runs = {side: [] for side in args.sides}
        for seed in args.seeds:
            for side in args.sides:
                flags = ["--side", side, "--seed", str(seed), "--folder", folder]
                command = [sys.executable, __file__, *sys.argv[1:], *flags]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout
                line = [line for line in output.splitlines() if line.startswith("RESULT ")][-1]
                runs[side].append(json.loads(line.removeprefix("RESULT ")))
                print(f"{side:6} seed {seed}: {runs[side][-1]['final']}", flush=True)
    print(f"\n{'mean reward of a rollout, by update':38}" + "".join(f"{side:>10}" for side in runs))
    for i in range(EPISODES // BATCH):
        means = [sum(run["curve"][i][KEYS[0]] for run in found) / len(found) for found in runs.values()]
        print(f"{i + 1:>38}" + "".join(f"{mean:>10.2f}" for mean in means))
    for key in ("reward", "kl", "kl_summed", "stop_rate", "rule_score"):
        means = [sum(run["final"][key] for run in found) / len(found) for found in runs.values()]
        print(f"{'final ' + key + ', questions not trained on':38}" + "".join(f"{mean:>10.2f}" for mean in means))
    settings = {key: value for key, value in vars(args).items() if key not in ("side", "seed", "folder", "name")}
    write_result(args.name, {"settings": settings, "runs": runs, **environment()})


if __name__ == "__main__":
    main()
