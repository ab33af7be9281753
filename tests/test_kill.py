"""A run that is killed, and started again until it ends, leaves the bytes of one that was not; what stands in
final_checkpoint/ or a merge's output is whole; resuming takes what is of this run alone."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_adapter, run, write_rows
from safetensors.torch import load_file

SCRIPTS = {"sft": "training_sft", "reward": "training_reward_model", "rl": "training_rl", "merge": "merge_with_lora"}
KILLS = 2  # of each script
STEPS = 8
MODES = {  # flags with which a run has much to remember
    "sft": "--use_lora --lora_dropout 0.1 --eval_split train[:4] --eval_steps 3 --gradient_accumulation_steps 2",
    "reward": "--use_lora --lora_dropout 0.1 --eval_split train[:4] --eval_steps 3",
    "rl": "--eval_steps 3 --target_kl 0.1 --normalize_reward --lr_scheduler_type cosine",
}
COUNTED = (
    "speed/",
    "eval_runtime",
    "eval_model_prep",
    "eval_samples_per",
    "eval_steps_per",
    "num_tokens",
    "eval_num_tokens",
)


def command(stage, base, adapter, place, out, steps=STEPS):
    """A run of `steps` steps with a checkpoint at every second one."""
    if stage == "merge":
        return ["--adapter_path", adapter, "--output_dir", out, "--max_shard_size", "100KB"]
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No idea {i * i}"} for i in range(16)]
    flags = ["--dataset_name", write_rows(place / "rows.jsonl", rows), "--output_dir", out, "--logging_steps", 1]
    flags += ["--save_steps", 2, "--learning_rate", 1e-3, "--per_device_train_batch_size", 2, *MODES[stage].split()]
    if stage == "rl":
        (place / "rules.py").write_text(
            "def length(prompts, responses):\n    return [len(text) / 9 for text in responses]\n"
        )
        flags += ["--reward_function", f"{place / 'rules.py'}:length", "--response_length", 4, "--num_ppo_epochs", 1]
        return ["--model_path", adapter, "--total_episodes", 2 * steps, *flags]
    return ["--model_path", base, "--max_steps", steps, *flags]


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    return make_adapter(llama, tmp_path_factory.mktemp("adapter"))


def logged(out):
    """metrics.jsonl without times, without what is counted from a start, and without the line on the whole run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if not key.startswith(COUNTED)} for line in lines]


def outcome(final):
    """The bytes of all weights, and the metrics beside them."""
    assert (final / "run.json").is_file() and (final / "tokenizer.json").is_file()
    weights = {path.name: path.read_bytes() for path in sorted(final.rglob("*.safetensors"))}
    assert weights
    return weights, logged(final.parent) if (final.parent / "metrics.jsonl").is_file() else None


def check_final(final):
    """Where the result is there, it is a whole one."""
    if final.exists():
        for path in final.rglob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        assert sum(len(load_file(path)) for path in final.rglob("*.safetensors")) > 0 and (final / "run.json").is_file()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_killed_and_started_again_it_leaves_the_same_bytes(stage, llama, adapter, tmp_path):
    """SIGKILL at random moments of training and saving; the run goes on from its newest checkpoint to the same weights
    and the same log lines, none of them twice."""
    out, final = tmp_path / "out", tmp_path / "out" if stage == "merge" else tmp_path / "out" / "final_checkpoint"
    argv = command(stage, llama, adapter, tmp_path, out)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def start(*more):
        script = [sys.executable, ROOT / f"{SCRIPTS[stage]}.py", *argv, *more]
        with open(tmp_path / "log", "w", encoding="utf-8") as log:
            return subprocess.Popen(list(map(str, script)), stdout=log, stderr=subprocess.STDOUT, env=environment)

    def end(process):
        assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text(encoding="utf-8")[-2000:]
        check_final(final)

    begun = time.monotonic()
    process, starting = start(), None
    while process.poll() is None:
        if starting is None and any(tmp_path.glob("out*/*")):
            starting = time.monotonic() - begun
        time.sleep(0.002)
    end(process)
    writing = time.monotonic() - begun - starting
    whole = outcome(final)
    shutil.rmtree(out)

    chance = random.Random(f"7 {stage}")
    for _ in range(KILLS):
        again = ["--overwrite_output_dir"] if stage == "merge" else ["--resume_from_checkpoint"]
        seen = set(tmp_path.glob("out*/*"))
        process = start(*(again if out.exists() else []))
        while process.poll() is None and set(tmp_path.glob("out*/*")) <= seen:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.7 * writing / KILLS)
        process.kill()
        process.wait()
        check_final(final)
    end(start(*(again if out.exists() else [])))
    assert outcome(final) == whole


@pytest.fixture(params=["sft", "reward", "rl"])
def finished(request, llama, adapter, tmp_path):
    """(script, command, output directory) of a run of five steps with checkpoints at 4 and 5."""
    script, out = request.getfixturevalue(request.param), tmp_path / "out"
    argv = command(request.param, llama, adapter, tmp_path, out, steps=5)
    run(script, *argv)
    return script, argv, out


def test_a_run_that_had_taken_its_last_step_takes_no_other(finished):
    """Killed between its last step and final_checkpoint/, with half a log line on disk, it is only finished: the same
    bytes, the evaluation at the end logged once."""
    script, argv, out = finished
    before = outcome(out / "final_checkpoint")
    shutil.rmtree(out / "final_checkpoint")
    with open(out / "metrics.jsonl", "ab") as file:
        file.write('{"step": 5, "text": "caf\u00e9'.encode()[:-1])
    run(script, *argv, "--resume_from_checkpoint")
    assert outcome(out / "final_checkpoint") == before
    assert not list(out.glob("checkpoint-[6-9]"))


def test_checkpoints_that_cannot_be_gone_on_with(finished):
    """One that was never completed is passed over; one of another stage, or of an earlier version of the script, is
    refused in one line."""
    script, argv, out = finished
    shutil.rmtree(out / "final_checkpoint")
    (out / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5, "max_', encoding="utf-8")
    record = out / "checkpoint-4" / "run.json"
    kept = json.loads(record.read_text(encoding="utf-8"))
    for changed in ({**kept, "stage": "other"}, {**kept, "versions": {"trl": "1.12.0"}}):
        record.write_text(json.dumps(changed), encoding="utf-8")
        assert "checkpoint-4" in run(script, *argv, "--resume_from_checkpoint", code=2)[1]
    record.write_text(json.dumps(kept), encoding="utf-8")
    run(script, *argv, "--resume_from_checkpoint")
    assert [line["step"] for line in logged(out) if "loss" in line or "loss/policy_avg" in line] == [1, 2, 3, 4, 5]


def test_a_later_checkpoint_is_not_dropped_unasked(finished):
    """Going back to an earlier checkpoint would overwrite what came after it: only with --overwrite_output_dir."""
    script, argv, out = finished
    back = ["--resume_from_checkpoint", out / "checkpoint-4"]
    assert "--overwrite_output_dir" in run(script, *argv, *back, code=2)[1]
    assert (out / "checkpoint-5" / "trainer_state.json").is_file()
    stale = out / "checkpoint-5" / "stale"
    stale.touch()
    run(script, *argv, *back, "--overwrite_output_dir")
    assert (out / "checkpoint-5" / "trainer_state.json").is_file() and not stale.exists()


def test_overwriting_replaces_this_runs_files_alone(finished):
    """--overwrite_output_dir takes checkpoints, final_checkpoint/ and metrics, and leaves what else lies there."""
    script, argv, out = finished
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(out / "checkpoint-5", out / "checkpoint-77")
    run(script, *argv, "--overwrite_output_dir")
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine" and not (out / "checkpoint-77").exists()
    steps = [line["step"] for line in logged(out) if "loss" in line or "loss/policy_avg" in line]
    assert steps == [1, 2, 3, 4, 5]
