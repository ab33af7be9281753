"""The memory that the training scripts foresee against the memory that they take: one short run for each setting.

Every run is a process of its own; the estimate is the line that the script prints before it loads a weight, the
measured figure the peak resident memory of that process (on a GPU: the peak of CUDA's allocator). Texts are about
400 tokens long, so that activations count. Linux's malloc is told to give back at once what is freed, as the allocator
of a GPU would use it again: left alone it held 1.1 to 1.8 times as much here.

    python benchmarks/memory.py --model_path runs/SmolLM2-135M-Instruct
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import environment, peak_memory, write_result

SCRIPTS = {"sft": "training_sft", "reward": "training_reward_model", "ppo": "training_rl"}
SETTINGS = ["--use_lora", "--use_lora --gradient_checkpointing", "--use_lora --bf16", "", "--bf16"]


def make_inputs(folder, model_path):
    """Rows of about 400 tokens for the three scripts, and an untrained reward model as an adapter on the same base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    lines = (ROOT / "data" / "finetune" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [row["response"] for row in map(json.loads, lines) if "response" in row]
    rows = {"sft": [], "reward": [], "ppo": []}
    for i in range(16):
        first, second = " ".join(answers[5 * i : 5 * i + 5]), " ".join(answers[5 * i + 5 : 5 * i + 8])
        rows["sft"].append({"prompt": first, "response": second})
        rows["reward"].append({"prompt": first, "chosen": second, "rejected": second[::-1][:300]})
        rows["ppo"].append({"prompt": " ".join(first.split()[:200])})
    for name, found in rows.items():
        (folder / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / name / "train.jsonl").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)
    config = LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(folder / "scorer")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder / "scorer")


def run_one(script, flags):
    """In the process of the run: the script's own main, then the peak."""
    __import__(SCRIPTS[script]).main(flags)
    print("\nRESULT " + json.dumps(peak_memory()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--batch", type=int, default=2, help="rows, pairs or episodes per micro-batch")
    args = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder, args.model_path)
        for script in args.scripts:
            for setting in SETTINGS:
                batch = "--batch_size" if script == "sft" else "--per_device_train_batch_size"
                flags = ["--model_path", args.model_path, "--dataset_name", "json", "--subset", str(folder / script)]
                flags += ["--output_dir", str(folder / "out"), "--overwrite_output_dir", batch, str(args.batch)]
                flags += ["--prompt_format", "qa", *setting.split()]
                if script == "ppo":
                    flags += [
                        "--total_episodes",
                        str(3 * args.batch),
                        "--response_length",
                        "64",
                        "--num_ppo_epochs",
                        "2",
                    ]
                    flags += ["--reward_model_path", str(folder / "scorer")]
                else:
                    flags += ["--max_steps", "3", "--max_length", "1024"]
                code = (
                    f"import sys; sys.path[:0] = {sys.path[:2]!r}; import memory; memory.run_one({script!r}, {flags!r})"
                )
                command = [sys.executable, "-c", code]
                environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ).stdout
                foreseen = float(re.search(r"memory: about ([\d.]+) GB", output)[1])
                peak = json.loads(output.split("RESULT ")[-1])
                measured = (peak["peak_gpu_gb"] or peak["peak_rss_gb"]) * 2**30 / 1e9
                row = {
                    "script": script,
                    "flags": setting or "(full fine-tuning)",
                    "foreseen": foreseen,
                    "measured": measured,
                }
                table.append({**row, "ratio": foreseen / measured})
                print(
                    f"{script:7} {row['flags']:38} {foreseen:6.2f} {measured:6.2f} {foreseen / measured:6.2f}",
                    flush=True,
                )
    print(f"\nGB (1e9 bytes)\n{'':46} {'foreseen':>8} {'measured':>8} {'ratio':>6}")
    for row in table:
        print(f"{row['script']:7} {row['flags']:38} {row['foreseen']:8.2f} {row['measured']:8.2f} {row['ratio']:6.2f}")
    write_result("memory", {"settings": vars(args), "table": table, **environment()})


if __name__ == "__main__":
    main()
