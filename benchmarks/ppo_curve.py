"""The learning curve of the quickstart's PPO stage: training_rl.py against TRL's stock PPOTrainer, over several seeds.

Both start from the quickstart's SFT model and reward model and see the same prompts for the same number of episodes.
Ours reads the two adapters as they are; the stock trainer cannot, so it gets them merged into full models, a pad token
of its own, a new LoRA adapter as the policy and a value model that it trains in full. At the end both policies answer
the questions that no stage was trained on, and one and the same code measures the mean score of the reward model and
the KL to the SFT model (nats an answer, at the sampling temperature).

    python quickstart.py
    python benchmarks/ppo_curve.py --run runs/quickstart --seeds 0 1 2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import environment, report, run_child, write_result
from ppo import build_stock

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from quickstart import PROMPTS, follows_rule, stages

KEYS = ("objective/scores", "objective/kl")


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def stage_flags(args, folder):
    """The flags of the quickstart's PPO stage, for this seed and with outputs in `folder`."""
    _, *flags = stages(args.run, Path(args.run), args.seed, ["--bf16"])["ppo"]
    flags[flags.index("data/rl")] = str(ROOT / "data" / "rl")
    return [*flags, "--output_dir", str(folder / "ppo"), "--learning_rate", args.learning_rate]


def train_ours(args, folder):
    """training_rl.py's own main; returns (log lines, policy model)."""
    import torch
    from peft import AutoPeftModelForCausalLM

    import training_rl

    training_rl.main(stage_flags(args, folder))
    policy = AutoPeftModelForCausalLM.from_pretrained(folder / "ppo" / "final_checkpoint", dtype=torch.float32)
    return read_lines(folder / "ppo" / "metrics.jsonl"), policy


def train_stock(args, folder):
    """trl.experimental.ppo on merged full models; returns (log lines, policy model)."""
    import torch
    from transformers import AutoTokenizer

    import training_rl

    ours, sft = training_rl.build_parser().parse_args(stage_flags(args, folder)), Path(args.folder, "sft")
    tokenizer = AutoTokenizer.from_pretrained(sft)
    prompt_format = training_rl.PromptFormat(tokenizer, "qa")
    texts = [row["prompt"] for row in read_lines(ROOT / "data" / "rl" / "prompts.jsonl")]
    prompts = [prompt_format.encode([{"role": "user", "content": text}], open_end=True)[0] for text in texts]
    names = ("total_episodes", "response_length", "temperature", "num_ppo_epochs", "kl_coef", "learning_rate", "seed")
    trainer = build_stock(
        sft,
        Path(args.folder, "reward"),
        tokenizer,
        [ids for ids in prompts if len(ids) <= ours.max_prompt_length],
        torch.float32,
        output_dir=str(folder / "stock"),
        per_device_train_batch_size=ours.per_device_train_batch_size,
        gradient_accumulation_steps=1,
        bf16=True,
        **{name: getattr(ours, name) for name in names},
    )
    trainer.train()
    return trainer.state.log_history, trainer.policy_model


def measure(args, policy):
    """Reward, KL, stop rate and rule score of answers sampled for the questions that no stage was trained on.

    `kl` is that of the sampled tokens; `kl_summed`, over the whole vocabulary at each of them, has the same expectation
    and less noise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    import training_rl

    sft, reward = Path(args.folder, "sft"), Path(args.folder, "reward")
    ours = training_rl.build_parser().parse_args(stage_flags(args, sft))
    tokenizer = AutoTokenizer.from_pretrained(sft)
    prompt_format = training_rl.PromptFormat(tokenizer, "qa")
    policy = policy.float().eval()
    reference = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32).to(policy.device).eval()
    scorer = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32)
    scorer = scorer.to(policy.device).eval()
    stops = prompt_format.stop_ids(reference.generation_config)
    sampling = {"do_sample": True, "temperature": ours.temperature, "top_k": 0, "top_p": 1.0}
    limits = {"max_new_tokens": ours.response_length, "eos_token_id": stops, "pad_token_id": stops[0]}
    # The stock trainer's pad token is one that the reference does not have.
    limits["suppress_tokens"] = list(range(len(tokenizer), policy.get_input_embeddings().num_embeddings)) or None
    torch.manual_seed(args.seed)
    torch.set_grad_enabled(False)
    found = {"reward": [], "kl": [], "kl_summed": [], "stop_rate": [], "rule_score": []}
    for row in read_lines(ROOT / "data" / "evaluation" / "test.jsonl")[:PROMPTS]:
        prompt = prompt_format.encode([{"role": "user", "content": row["prompt"]}], open_end=True)[0]
        ids = torch.tensor([prompt], device=policy.device)
        out = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling, **limits)
        answer = out[0, len(prompt) :]

        def logprobs(model):
            logits = model(input_ids=out).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
            return (logits / ours.temperature).log_softmax(-1)

        new, old = logprobs(policy), logprobs(reference)
        found["kl"].append((new - old).gather(1, answer[:, None]).sum().item())
        found["kl_summed"].append((new.exp() * (new - old)).sum().item())
        found["reward"].append(scorer.score(scorer.model(input_ids=out).last_hidden_state[0, -1]).item())
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
            lines, policy = {"ours": train_ours, "stock": train_stock}[args.side](args, Path(folder))
            lines = [line for line in lines if "val/ratio" in line]
            curve = [{key: line[key] for key in KEYS} for line in lines]
            return report({"seed": args.seed, "final": measure(args, policy), "curve": curve})
    runs = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("sft", "reward"):
            adapter = ["--adapter_path", f"{args.run}/{stage}/final_checkpoint", "--dtype", "float32"]
            command = [sys.executable, ROOT / "merge_with_lora.py", *adapter, "--output_dir", Path(folder) / stage]
            subprocess.run(command, check=True)
        for seed in args.seeds:
            for side in args.sides:
                runs[side].append(run_child("--side", side, "--seed", seed, "--folder", folder))
                print(f"{side:6} seed {seed}: {runs[side][-1]['final']}", flush=True)
    print(f"\n{'mean reward of a rollout, by update':38}" + "".join(f"{side:>10}" for side in runs))
    for update in range(min(len(run["curve"]) for found in runs.values() for run in found)):
        means = [sum(run["curve"][update][KEYS[0]] for run in found) / len(found) for found in runs.values()]
        print(f"{update + 1:>38}" + "".join(f"{mean:>10.2f}" for mean in means))
    for key in ("reward", "kl", "kl_summed", "stop_rate", "rule_score"):
        means = [sum(run["final"][key] for run in found) / len(found) for found in runs.values()]
        print(f"{'final ' + key + ', questions not trained on':38}" + "".join(f"{mean:>10.2f}" for mean in means))
    settings = {key: value for key, value in vars(args).items() if key not in ("side", "seed", "folder", "name")}
    write_result(args.name, {"settings": settings, "runs": runs, **environment()})


if __name__ == "__main__":
    main()
