"""The chain on real preferences: SFT, a reward model, PPO on its scores, and a judge that PPO never saw.

SFT reads short preferred answers, so that answers end within --response_length. The reward model reads the pairs of one
half of the questions; the judge, another reward model with another seed, those of the other half. PPO learns from the
first; both score what is sampled for held-out questions before and after. Each stage is skipped if its final_checkpoint
is there. Best of N by the reward model, judged by the judge, says what there is to be learned, also without a PPO run
(--stages sft reward judge examine). The stage `stock` is TRL's PPOTrainer on the same models and prompts.

    python benchmarks/preferences.py --model_path runs/SmolLM2-135M-Instruct --output_dir runs/preferences --seed 0
    python benchmarks/preferences.py --model_path runs/SmolLM2-135M-Instruct --output_dir runs/preferences --seed 0 \
        --run no_clip --cliprange_value 1e9
    python benchmarks/preferences.py --model_path runs/SmolLM2-135M-Instruct --output_dir runs/preferences --seed 0 \
        --run stock --stages stock examine
    python benchmarks/preferences.py --stages draw    # one file and one picture of all results

Flags that it does not know are PPO's; --run names the PPO run that has them.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean, pstdev

from measure import environment, write_result

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from quickstart import LAYERS

STAGES = {
    "sft": """training_sft.py --model_path {model} --dataset_name json --subset {data}/sft --batch_size 8 --max_steps {sft_steps}
        --learning_rate 5e-4 --max_length {max_length} --prompt_format qa --seed 0 --use_lora --lora_target_modules {layers}""",
    "reward": """training_reward_model.py --model_path {model} --dataset_name json --subset {data}/reward
        --eval_subset {data}/evaluation --per_device_train_batch_size 8 --max_steps {reward_steps}
        --learning_rate 3e-4 --center_rewards_coefficient 0.01 --max_length {max_length} --prompt_format qa --seed 0
        --use_lora --lora_target_modules {layers}""",
    "ppo": """training_rl.py --model_path {out}/sft/final_checkpoint --reward_model_path {out}/reward/final_checkpoint
        --dataset_name json --subset {data}/prompts --max_prompt_length 48 --response_length {response_length}
        --per_device_train_batch_size 64 --total_episodes {episodes} --learning_rate 3e-4 --seed {seed} --use_lora""",
}
CURVES = {
    "reward": "objective/scores", "kl": "objective/kl", "length": "response/length", "stop_rate": "response/stop_rate",
    "explained_variance": "val/explained_variance", "clip_fraction": "policy/clipfrac_avg",
}  # fmt: skip


def read_lines(path):  # not splitlines(), which also parts a line at U+2028
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_pairs(data):
    """Rows {question, response_j, response_k} of all preferences in `data` that are about one question."""
    import pandas

    pairs = [row for path in sorted(data.glob("question_response_jk/*/*.jsonl")) for row in read_lines(path)]
    chats = read_lines(data / "chat_preferences" / "oasst_pairs.jsonl")
    for path in sorted(data.glob("ultrafeedback_binarized_sample/data/*_prefs-*.parquet")):
        rows = pandas.read_parquet(path)
        chats += rows[rows["score_chosen"] > rows["score_rejected"]].to_dict("records")
    for row in chats:
        if len(row["chosen"]) == 2:
            answers = {"response_j": row["chosen"][1]["content"], "response_k": row["rejected"][1]["content"]}
            pairs.append({"question": row["chosen"][0]["content"], **answers})
    return pairs


def prepare_data(args, folder):
    """The files of the stages: no question of the reward model is the judge's, and the held-out ones are of no stage."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    rows = read_pairs(Path(args.data))
    keys = ("question", "response_j", "response_k")
    sizes = [[len(tokenizer(row[key])["input_ids"]) for key in keys] for row in rows]
    pairs = [(row, size) for row, size in zip(rows, sizes) if 0 < min(size) and size[0] <= args.question_length]
    questions = sorted({row["question"] for row, _ in pairs})
    random.Random(0).shuffle(questions)
    prompts, questions = questions[: args.prompts], questions[args.prompts :]
    parts = {"evaluation": set(prompts), "reward": set(questions[::2]), "judge": set(questions[1::2])}
    comparable = [row for row, size in pairs if max(size[1:]) <= args.answer_length]
    for name, part in parts.items():
        split = "test" if name == "evaluation" else "train"
        write_lines(folder / name / f"{split}.jsonl", [row for row in comparable if row["question"] in part])
    write_lines(folder / "sft" / "train.jsonl", [
        {"question": row["question"], "response_j": row["response_j"]}
        for row, size in pairs if size[1] <= args.response_length - 4 and row["question"] not in parts["evaluation"]
    ])  # fmt: skip
    write_lines(folder / "prompts" / "train.jsonl", [{"prompt": question} for question in questions])
    write_lines(folder / "held_out.jsonl", [{"prompt": question} for question in prompts])


def fill_in(args, text, replaced=()):
    """The words of a stage's command."""
    values = {"out": args.output_dir, "data": Path(args.output_dir, "data").resolve(), "model": args.model_path}
    values["max_length"] = args.question_length + args.answer_length + 16  # and "Question: ... Answer: "
    words = [word.format(**{**vars(args), **values, "layers": LAYERS}) for word in text.split()]
    for old, new in replaced:
        words[words.index(old) + 1] = new(words[words.index(old) + 1])
    return words + (["--bf16"] if args.bf16 else [])


def run_stage(args, name, output, text, replaced=(), more=()):
    """Run a stage whose final_checkpoint is not there; one that was cut off goes on."""
    if (output / "final_checkpoint").is_dir():
        return print(f"{name}: done before")
    words = fill_in(args, text, replaced)
    resumes = ["--resume_from_checkpoint"] if any(output.glob("checkpoint-*/trainer_state.json")) else []
    command = [sys.executable, ROOT / words[0], *words[1:], "--output_dir", output, *more, *resumes]
    if not resumes:
        command.append("--overwrite_output_dir")
    print("\n> " + " ".join(map(str, command)), flush=True)
    subprocess.run(command, check=True)


def train_stock(args, folder, more):
    """TRL's PPOTrainer with the settings of the PPO stage; it cannot read adapters, so it gets them merged."""
    import torch
    from ppo import build_stock
    from transformers import AutoTokenizer

    import training_rl

    if (folder / "final_checkpoint").is_dir():
        return print("stock: done before")
    out = Path(args.output_dir)
    for stage in ("sft", "reward"):
        paths = ["--adapter_path", out / stage / "final_checkpoint", "--output_dir", folder / stage]
        command = [sys.executable, ROOT / "merge_with_lora.py", *paths, "--dtype", "float32", "--overwrite_output_dir"]
        subprocess.run(command, check=True)
    flags = [*fill_in(args, STAGES["ppo"])[1:], *more, "--output_dir", str(folder)]
    ours = training_rl.build_parser().parse_args(flags)
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    prompt_format, known = training_rl.PromptFormat(tokenizer, "qa"), len(tokenizer)
    texts = [row["prompt"] for row in read_lines(out / "data" / "prompts" / "train.jsonl")]
    prompts = [prompt_format.encode([{"role": "user", "content": text}], open_end=True)[0] for text in texts]
    same = ("total_episodes", "response_length", "temperature", "num_ppo_epochs", "num_mini_batches", "kl_coef", "seed",
            "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16")  # fmt: skip
    settings = {name: getattr(ours, name) for name in same}
    prompts = [ids for ids in prompts if len(ids) <= ours.max_prompt_length]
    trainer = build_stock(
        folder / "sft", folder / "reward", tokenizer, prompts, torch.float32, output_dir=str(folder), **settings
    )
    trainer.train()
    write_lines(folder / "metrics.jsonl", [{"step": line["step"], **line} for line in trainer.state.log_history])
    policy = trainer.policy_model.merge_and_unload()
    policy.resize_token_embeddings(known)  # without the padding token that the stock trainer needs
    policy.save_pretrained(folder / "final_checkpoint")


class Examiner:
    """Samples answers of policies to the held-out prompts, and scores them with both reward models."""

    def __init__(self, args):
        import torch
        from peft import AutoPeftModelForSequenceClassification
        from transformers import AutoTokenizer

        from training_sft import PromptFormat

        torch.set_grad_enabled(False)
        self.args, self.torch = args, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        sft = Path(args.output_dir, "sft", "final_checkpoint")
        self.tokenizer = AutoTokenizer.from_pretrained(sft, padding_side="left")
        self.prompt_format = PromptFormat(self.tokenizer, "qa")
        self.reference = self.load(sft)
        self.stops = self.prompt_format.stop_ids(self.reference.generation_config)
        load = AutoPeftModelForSequenceClassification.from_pretrained
        places = {name: Path(args.output_dir, name, "final_checkpoint") for name in ("reward", "judge")}
        self.scorers = {
            name: load(place, num_labels=1, dtype=torch.float32).to(self.device).eval()
            for name, place in places.items()
        }
        rows = read_lines(Path(args.output_dir, "data", "held_out.jsonl"))[: args.prompts]
        messages = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        self.prompts = [self.prompt_format.encode(turns, open_end=True)[0] for turns in messages]

    def load(self, folder):
        """A policy: an adapter with its base, or (the stock trainer's) a full model."""
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM

        is_adapter = (folder / "adapter_config.json").is_file()
        auto = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=self.torch.float32).to(self.device).eval()

    def examine(self, policy, samples=1):
        """One dict for each prompt and sample: scores, KL to the reference (nats), length (tokens), end, text."""
        torch, temperature = self.torch, 0.7  # PPO's default
        limits = {"max_new_tokens": self.args.response_length, "eos_token_id": self.stops, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(1)
        found = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt] * samples, device=self.device)
            sampling = {"do_sample": True, "temperature": temperature, "pad_token_id": self.stops[0]}
            rows = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits, **sampling).tolist()
            for row in rows:
                answer = row[len(prompt) :]
                end = next((i + 1 for i, token in enumerate(answer) if token in self.stops), len(answer))
                text = torch.tensor([prompt + answer[:end]], device=self.device)
                item = {"length": end, "ended": answer[end - 1] in self.stops, "kl": 0.0}
                item["text"] = self.tokenizer.decode(answer[:end], skip_special_tokens=True).strip()
                for name, scorer in self.scorers.items():
                    body = scorer.get_base_model()
                    item[name] = body.score(body.model(input_ids=text).last_hidden_state[0, -1]).item()
                if policy is not self.reference:
                    logits = (
                        model(input_ids=text).logits[0, len(prompt) - 1 : -1] for model in (policy, self.reference)
                    )
                    new, old = ((part / temperature).log_softmax(-1) for part in logits)
                    item["kl"] = (new.exp() * (new - old)).sum().item()  # over the vocabulary at each sampled token
                found.append(item)
        return found

    def summarize(self, answers):
        return {key: fmean(map(float, column)) for key, column in self.columns(answers).items()}

    def columns(self, answers):
        return {key: [answer[key] for answer in answers] for key in ("reward", "judge", "kl", "length", "ended")}


def draw(folder):
    """preferences.json and preferences.png of all runs whose results are in `folder`."""
    from matplotlib.figure import Figure

    runs = {path.stem.partition("-")[2]: path for path in sorted(folder.glob("preferences-*-*.json"))}
    runs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in runs.items()}
    (folder / "preferences.json").write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    titles = {"reward": "Score", "kl": "KL, nats an answer", "length": "Tokens an answer", "explained_variance": "Explained variance"}  # fmt: skip
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(titles)), titles.items()):
        for run, result in runs.items():
            values = result["curves"][name]
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=run.replace("-", ", seed "))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("update of 64 answers", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(folder / "preferences.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model_path", default="runs/SmolLM2-135M-Instruct", help="base model of all stages")
    parser.add_argument("--data", default=ROOT.parent / "shared" / "data", help="folder of question_response_jk/")
    parser.add_argument("--output_dir", default="runs/preferences", help="of all stages")
    parser.add_argument("--run", default="default", help="name of the PPO run and of the result")
    parser.add_argument("--seed", type=int, default=0, help="of PPO; the stages before have their own")
    parser.add_argument("--question_length", type=int, default=128, help="longest question, in tokens")
    parser.add_argument("--answer_length", type=int, default=250, help="longest answer of a pair, in tokens")
    parser.add_argument("--sft_steps", type=int, default=140, help="of 8 answers")
    parser.add_argument("--reward_steps", type=int, default=150, help="of 8 pairs")
    parser.add_argument("--response_length", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--episodes", type=int, default=1024, help="of PPO, 64 an update")
    parser.add_argument("--prompts", type=int, default=72, help="held-out questions, answered before and after")
    parser.add_argument("--bf16", action="store_true", help="all stages in bfloat16")
    stages = ["sft", "reward", "judge", "ppo", "examine"]
    choices = [*stages, "stock", "draw"]
    parser.add_argument(
        "--stages", nargs="+", choices=choices, default=stages, help="what to do; on a card side by side"
    )
    parser.add_argument("--samples", type=int, default=4, help="answers to each held-out question")
    parser.add_argument("--best_of", type=int, default=0, help="also judge the best of N by the reward model (0: no)")
    args, more = parser.parse_known_args()
    if args.stages == ["draw"]:
        return draw(ROOT / "benchmarks" / "results")
    folder = Path(args.output_dir)
    if not (folder / "data" / "held_out.jsonl").is_file():  # written last
        prepare_data(args, folder / "data")

    ppo = folder / f"ppo-{args.run}-{args.seed}"
    other_half = [("--subset", lambda path: path.replace("data/reward", "data/judge")), ("--seed", lambda _: "1")]
    inputs = {
        "sft": (folder / "sft", STAGES["sft"]),
        "reward": (folder / "reward", STAGES["reward"]),
        "judge": (folder / "judge", STAGES["reward"], other_half),
        "ppo": (ppo, STAGES["ppo"], (), more),
    }
    for name in args.stages:
        if name in inputs:
            run_stage(args, name, *inputs[name])
    if "stock" in args.stages:
        train_stock(args, ppo, more)
    if "examine" not in args.stages:
        return

    examiner = Examiner(args)
    answers = folder / f"answers-{max(args.samples, args.best_of)}.jsonl"  # of the reference: the same for all runs
    if not answers.is_file():
        write_lines(answers, examiner.examine(examiner.reference, max(args.samples, args.best_of)))
    before = read_lines(answers)
    spread = {name: pstdev(examiner.columns(before)[name]) for name in ("reward", "judge")}
    sets = {"before": before}
    if args.best_of:
        size = len(before) // len(examiner.prompts)
        groups = [before[i : i + args.best_of] for i in range(0, len(before), size)]
        sets["best_of"] = [max(group, key=lambda answer: answer["reward"]) for group in groups]
    has_policy = (ppo / "final_checkpoint").is_dir()
    if has_policy:
        sets["after"] = examiner.examine(examiner.load(ppo / "final_checkpoint"), args.samples)
    found = {name: examiner.summarize(answers) for name, answers in sets.items()}
    for figures in found.values():
        figures["judge_gain"] = (figures["judge"] - found["before"]["judge"]) / spread["judge"]
    lines = read_lines(ppo / "metrics.jsonl") if has_policy else []
    updates = [line for line in lines if CURVES["kl"] in line and CURVES["reward"] in line]
    result = {
        "settings": {key: str(value) for key, value in vars(args).items()}, "ppo_flags": more,
        "accuracy": {name: json.loads((folder / name / "metrics.json").read_text())["accuracy"] for name in spread},
        "spread": spread, "answers": found,
        "curves": {name: [line.get(key) for line in updates] for name, key in CURVES.items()},
        "samples": {name: [answer["text"] for answer in answers[:: len(answers) // 3]] for name, answers in sets.items()},
        **environment(),
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("accuracy", "spread", "answers")}, indent=1))
    write_result(f"preferences-{args.run}-{args.seed}", result)


if __name__ == "__main__":
    main()
