"""benchmarks/gpu.py runs through on a CPU, and no step that fails or hangs keeps the others from their figures."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

LINEAR, HEAD, ADAPTER = 73_728, 32_768, 32_768  # weights of the tiny shape: 2 layers of 64 x 128, 512 tokens; rank 16
SCRIPTS = ("training_sft", "training_reward_model", "training_rl", "merge_with_lora")


def run_benchmark(root, folder, *flags, code):
    """({step: result} of the call, what it printed), with models in `folder`, which is left as it was."""
    out = folder.with_name("results.json")
    folder.mkdir()
    command = [sys.executable, root / "benchmarks" / "gpu.py", "--dry_run", "--out", out, "--directory", folder, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", env=os.environ)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(folder.iterdir()) == []
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_every_step_has_figures_or_a_reason(tmp_path):
    calls, printed = run_benchmark(ROOT, tmp_path / "models", code=0)
    steps, seen = calls[0]["steps"], set()
    for name, result in steps.items():
        seen.add(result["status"])
        if result["status"] == "skipped":
            assert result["reason"] in ("no card", "bitsandbytes is not installed")
        else:
            assert result["status"] == "done" and result["figures"], name
            assert all(value > 0 for value in result["figures"].values() if isinstance(value, float)), name
    assert "skipped" in seen and {"machine", "weights", "decode"} <= steps.keys()
    assert {"smoke", "memory", "speed", "sft", "reward", "merge"} <= {name.partition("/")[0] for name in steps}
    machine = steps["machine"]["figures"]
    assert machine["card"] is None and {"torch", "transformers", "trl"} <= machine["versions"].keys()
    assert {"sft_seconds", "reward_seconds", "ppo_seconds", "merge_seconds"} <= steps["smoke/bf16"]["figures"].keys()
    bar = steps["speed/stock"]["bars"]["ours_to_stock"]
    assert bar == {"kind": "at least", "value": 3.0, "met": None}  # it is for another model
    lines = printed.splitlines()
    assert any("ours_to_stock" in line and "at least 3" in line for line in lines)
    assert any(line.startswith("sft/flash") and "no card" in line for line in lines)

    trained = {name: steps[f"sft/{name}"]["figures"] for name in ("sdpa", "all weights")}
    operations = {name: figures["tflops"] * 1e12 * figures["seconds_per_step"] for name, figures in trained.items()}
    tokens, context = 2 * 64, 2 * len("Question: x\n\nAnswer:")  # two rows; logits where an answer's tokens follow
    assert [figures["tokens_per_step"] for figures in trained.values()] == [tokens, tokens]
    frozen = tokens * (4 * LINEAR + 6 * ADAPTER) + (tokens - context) * 4 * HEAD
    assert operations["sdpa"] == pytest.approx(frozen)
    assert operations["all weights"] == pytest.approx(tokens * 6 * LINEAR + (tokens - context) * 6 * HEAD)
    pairs = steps["reward/data"]["figures"]  # what both texts begin with is computed once
    assert pairs["computed_tokens_per_second"] < pairs["tokens_per_second"]


def test_a_step_that_fails_or_hangs_is_recorded_and_the_others_go_on(tmp_path):
    """The scripts are stand-ins: with LoRA SFT raises, in 4 bit PPO never ends."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks")
    shutil.copytree(ROOT / "data", root / "data")
    shutil.copy(ROOT / "requirements.txt", root)
    for name in SCRIPTS:
        (root / f"{name}.py").write_text("def main(flags):\n    pass\n", encoding="utf-8")
    with open(root / "benchmarks" / "ppo_memory.py", "a", encoding="utf-8") as file:
        file.write("\n\ndef make_models(*inputs):\n    pass\n")
    raises = "def main(flags):\n    if '--use_lora' in flags:\n        raise ValueError('no such kernel')\n"
    (root / "training_sft.py").write_text(raises, encoding="utf-8")
    hangs = "import time\n\n\ndef main(flags):\n    time.sleep(600 * ('--load_in_4bit' in flags))\n"
    (root / "training_rl.py").write_text(hangs, encoding="utf-8")
    (tmp_path / "results.json").write_text('[{"steps": {}}]', encoding="utf-8")
    flags = ["--steps", "smoke", "--step_seconds", "8"]
    calls, printed = run_benchmark(root, tmp_path / "models", *flags, code=1)
    assert calls[0] == {"steps": {}}  # of an earlier call
    failed, hung, fine = (calls[1]["steps"][f"smoke/{way}"] for way in ("bf16", "4bit", "full"))
    assert failed["status"] == "failed"
    assert failed["last_lines"][-1] == "RuntimeError: sft: ValueError no such kernel"
    assert any("in main" in line for line in failed["last_lines"])
    assert failed["figures"].keys() == {"reward_seconds", "ppo_seconds", "merge_seconds"}
    assert (hung["status"], hung["reason"]) == ("timeout", "not done after 8 s")
    assert hung["figures"].keys() == {"reward_seconds"}  # what it knew until then
    assert (fine["status"], fine["figures"].keys()) == ("done", {"sft_seconds", "reward_seconds", "ppo_seconds"})
    words = " ".join(printed.split())
    assert "smoke/bf16 failed: exit code 1 RuntimeError: sft: ValueError no such kernel" in words, printed
