"""The PPO script's life: interrupted, killed and resumed; two processes; a lone file in a subprocess."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest
import test_rl
import torch
from conftest import ROOT, run
from test_rl import adapters, command, distance, load_policy, load_scorer, read_lines, read_updates, starts, train

chain, choose = test_rl.chain, test_rl.choose
TIMED = ("speed/", "train_runtime", "train_samples", "train_steps")  # what differs between two runs of one command


def newest(out):
    """The number of the last checkpoint."""
    return max((int(path.name[11:]) for path in out.glob("checkpoint-*[0-9]")), default=0)


def assert_same_run(ours, theirs, step):
    """The same files to the byte: final weights, optimizer, scheduler, adaptive state; the same metrics and samples."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        for part in (".", "value"):
            pair = [place / "final_checkpoint" / part / name for place in (ours, theirs)]
            assert pair[0].exists() == pair[1].exists()
            assert not pair[0].exists() or pair[0].read_bytes() == pair[1].read_bytes(), f"{part}/{name}"
    mine, other = (
        torch.load(place / f"checkpoint-{step}" / "optimizer.pt", weights_only=True) for place in (ours, theirs)
    )
    assert mine["state"].keys() == other["state"].keys() and mine["param_groups"] == other["param_groups"]
    for index, state in mine["state"].items():
        assert all(torch.equal(tensor, other["state"][index][name]) for name, tensor in state.items())
    for name in ("ppo_state.json", "scheduler.pt"):
        files = [place / f"checkpoint-{step}" / name for place in (ours, theirs)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    lines = [
        [
            {key: value for key, value in line.items() if not key.startswith(TIMED)}
            for line in read_lines(place / "metrics.jsonl")
            if "train_runtime" not in line
        ]
        for place in (ours, theirs)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, other in zip(*lines):
        assert mine == other
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text()


FLAGS = "--total_episodes 28 --max_samples 10 --save_steps 2 --eval_steps 3 --save_total_limit 9 "
MODES = {
    "lora": (FLAGS + "--num_mini_batches 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2", {}),
    "adaptive": (FLAGS + "--target_kl 0.01 --normalize_reward --whiten_rewards --lr_scheduler_type cosine", {}),
    "full": (FLAGS + "--warmup_ratio 0.3", {"model": "base", "reward": "full_rm"}),
    "rule": (FLAGS + "--reward_function RULES:tokens --max_kl 1000", {"reward": None}),
}


def leave(whole, part, *without):
    """A copy of a run that was killed at some point."""
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("final_checkpoint", "metrics.json", *without))


def test_a_finished_policy_stays_until_the_new_one_is_complete(rl, chain, tmp_path, monkeypatch):
    """Resuming where no checkpoint-N/ is left starts from the beginning; what stops that run takes no policy."""
    flags = "--total_episodes 4 --max_samples 4 --save_steps 9"
    train(rl, chain, tmp_path, flags)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(rl.PPOTrainer, "training_step", stop)
    run(rl, *command(chain, tmp_path, f"{flags} --resume_from_checkpoint"), code=130)
    assert (tmp_path / "final_checkpoint" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_an_uninterrupted_one(rl, chain, tmp_path, mode):
    """From every checkpoint, also in the second pass over the data, to the byte; metrics and samples without doubled
    lines."""
    flags, which = MODES[mode]
    whole = tmp_path / "whole"
    train(rl, chain, whole, flags, **which)
    for step in (2, 6):
        part = tmp_path / f"from_{step}"
        leave(whole, part, *(f"checkpoint-{later}" for later in (4, 6, 7) if later > step))
        train(rl, chain, part, flags + " --resume_from_checkpoint", **which)
        assert_same_run(part, whole, 7)


def test_what_was_cut_off_is_passed_over_and_what_is_done_is_only_finished(rl, chain, tmp_path):
    """Killed while a checkpoint was written: the run goes on from the one before. Killed between the last checkpoint
    and the end, in the middle of a pass over the data: no step more. A checkpoint of an earlier version is refused."""
    whole = tmp_path / "whole"
    train(rl, chain, whole, FLAGS)
    part = tmp_path / "cut"
    leave(whole, part)
    (part / "checkpoint-7" / "trainer_state.json").unlink()
    (part / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6, "max_')
    with open(part / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    train(rl, chain, part, FLAGS + " --resume_from_checkpoint")
    assert_same_run(part, whole, 7)
    part = tmp_path / "done"
    leave(whole, part)
    train(rl, chain, part, FLAGS + "--resume_from_checkpoint")
    assert_same_run(part, whole, 7)
    ours, theirs = (json.loads((place / "metrics.json").read_text()) for place in (part, whole))
    for key in theirs:
        assert key.startswith(TIMED) or key in ("train_loss", "total_flos") or ours[key] == theirs[key], key
    part = tmp_path / "old"
    leave(whole, part)
    record = json.loads((part / "checkpoint-7" / "run.json").read_text())
    del record["versions"]["scripts"]
    (part / "checkpoint-7" / "run.json").write_text(json.dumps(record))
    _, errors = run(rl, *command(chain, part, FLAGS + "--resume_from_checkpoint"), code=2)
    assert "checkpoint-7 is of the stage 'rl', or of an earlier version" in errors


def test_ctrl_c_saves_and_the_run_goes_on(rl, chain, tmp_path, monkeypatch):
    """The first Ctrl-C ends the run after its update, with a checkpoint and exit code 130."""
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import os, signal\nseen = []\n"
        "def score(prompts, responses):\n"
        "    before = len(seen)\n"
        "    seen.extend(prompts)\n"
        "    if before < 7 <= len(seen) and os.environ.get('INTERRUPT'):  # two on trial, then the second update\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return [len(response) / 10 for response in responses]\n"
    )
    flags = f"--total_episodes 16 --save_steps 4 --reward_function {rule}:score"
    train(rl, chain, tmp_path / "whole", flags, reward=None)
    monkeypatch.setenv("INTERRUPT", "1")
    run(rl, *command(chain, tmp_path / "part", flags, reward=None), code=130)
    monkeypatch.delenv("INTERRUPT")
    assert [path.name for path in (tmp_path / "part").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "part" / "final_checkpoint").exists()
    train(rl, chain, tmp_path / "part", flags + " --resume_from_checkpoint", reward=None)
    assert_same_run(tmp_path / "part", tmp_path / "whole", 4)


@pytest.fixture
def lone(tmp_path):
    """A directory with nothing but a copy of the script."""
    place = tmp_path / "lone"
    place.mkdir()
    shutil.copy(ROOT / "training_rl.py", place)
    return place


def test_a_killed_process_resumes_to_the_same_bytes(rl, chain, tmp_path, lone):
    """SIGKILL at random moments, also while a checkpoint is written, then the same command with
    --resume_from_checkpoint; the script is a lone file in an empty directory."""
    flags = (
        "--total_episodes 120 --save_steps 1 --eval_steps 4 --target_kl 0.01 --normalize_reward --save_total_limit 3"
    )
    train(rl, chain, tmp_path / "whole", flags)
    out, log = lone / "out", open(lone / "log.txt", "a")
    arguments = [sys.executable, "training_rl.py", *command(chain, out, flags + " --resume_from_checkpoint")]
    chance, reached = random.Random(time.time_ns()), []
    for target in (chance.randrange(2, 7), chance.randrange(9, 16)):
        process = subprocess.Popen(arguments, cwd=lone, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and newest(out) < target:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.2)
        assert process.poll() is None, (lone / "log.txt").read_text()
        process.kill()
        process.wait()
        reached.append(newest(out))
    assert not (out / "final_checkpoint").exists() and 2 <= reached[0] < reached[1] < 30
    done = subprocess.run(arguments, cwd=lone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(out, tmp_path / "whole", 30)


def test_a_mistyped_flag_is_one_line_and_exit_code_2(chain, lone):
    """As a user sees it: no traceback, nothing written."""
    arguments = command(chain, lone / "out", "--num_mini_batches 0")
    done = subprocess.run([sys.executable, "training_rl.py", *arguments], cwd=lone, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: argument --num_mini_batches: 0 should be at least 1")
    assert not (lone / "out").exists()


DRIVER = """
import json, os, shutil, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import training_rl as rl
from test_rl import choose_response

original, find_checkpoint = rl.PPOTrainer.generate, rl.find_checkpoint

def find_together(args):  # from the second run on nothing else waits until all have looked into --output_dir
    found = find_checkpoint(args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return found

rl.find_checkpoint = find_together

def by_prompt(self, role, rows, sample=True):
    return [choose_response(row["prompt_ids"]) for row in rows] if sample else original(self, role, rows, sample)

def recorded(self, role, rows, sample=True):
    responses = original(self, role, rows, sample)
    with open(Path(self.args.output_dir) / f"rank_{{self.args.process_index}}.jsonl", "a") as file:
        file.write(json.dumps([[row["prompt_ids"] for row in rows], responses, sample]) + "\\n")
    return responses

for name, arguments in json.loads(Path("commands.json").read_text()):
    if name == "copy":
        if os.environ["RANK"] == "0":
            shutil.copytree(*arguments[:2], ignore=shutil.ignore_patterns(*arguments[2:]))
        torch.distributed.barrier()
        continue
    rl.PPOTrainer.generate = {{"by_prompt": by_prompt, "recorded": recorded, "plain": original}}[name]
    rl.main(arguments)
"""


def launch(place, commands):
    """Run commands of the script in two processes."""
    (place / "driver.py").write_text(DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    (place / "commands.json").write_text(json.dumps(commands))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "driver.py"]
    return subprocess.run(start, cwd=place, capture_output=True, text=True)


def test_two_processes_of_two_equal_one_of_four(rl, chain, tmp_path, choose):
    """The gradients, counts, moments and metrics of both processes enter; both save, full fine-tuning too; a resumed
    pair of processes ends as an uninterrupted one; the two sample answers of their own."""
    flags = "--set optim=sgd --learning_rate 0.1 --total_episodes 12 --save_steps 2 --num_ppo_epochs 2 --whiten_rewards"
    flags += " --per_device_train_batch_size"
    full = "--per_device_train_batch_size 2 --normalize_reward --save_steps 1 --total_episodes 8 --save_total_limit 9"
    choose()
    train(rl, chain, tmp_path / "one", flags + " 4")
    commands = []
    for name, mode, last, own, some in (
        ("two", "by_prompt", 3, flags + " 2", {}),
        ("full", "recorded", 2, full, {"model": "base", "reward": "full_rm"}),
    ):
        whole, part = tmp_path / name, tmp_path / f"{name}_resumed"
        commands.append((mode, command(chain, whole, own, **some)))
        commands.append(("copy", [str(whole), str(part), "final_checkpoint", f"checkpoint-{last}", "metrics.json"]))
        commands.append((mode, command(chain, part, own + " --resume_from_checkpoint", **some)))
    done = launch(tmp_path, commands)
    assert done.returncode == 0, done.stderr[-5000:]
    one, two = (adapters(tmp_path / name / "final_checkpoint") for name in ("one", "two"))
    steps = distance(one, starts(chain))
    # sums of thousands of float32 numbers in another order
    assert distance(one, two) < 1e4 * torch.finfo(torch.float32).eps * steps and steps > 1e-3
    ours, theirs = (read_updates(tmp_path / name) for name in ("one", "two"))
    assert [update["episode"] for update in theirs] == [4, 8, 12]
    for mine, other in zip(ours, theirs):
        for key in mine:
            if not key.startswith(("speed/", "epoch")):
                assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    samples = [read_lines(tmp_path / name / "samples.jsonl") for name in ("one", "two")]
    assert [sum("policy_answer" in line for line in lines) for lines in samples] == [8, 8]

    ranks = [[line for line in read_lines(tmp_path / "full" / f"rank_{rank}.jsonl") if line[2]] for rank in (0, 1)]
    assert ranks[0][0][0] == ranks[1][0][0] and ranks[0][0][1] != ranks[1][0][1]  # the reference's answers
    for mine, other in zip(ranks[0][1:], ranks[1][1:]):
        assert not [prompt for prompt in mine[0] if prompt in other[0]]
    assert load_policy(tmp_path / "full" / "final_checkpoint")
    assert load_scorer(tmp_path / "full" / "final_checkpoint" / "value")
    assert_same_run(tmp_path / "two_resumed", tmp_path / "two", 3)
    assert_same_run(tmp_path / "full_resumed", tmp_path / "full", 2)


def test_a_reward_that_is_not_finite_in_one_process_stops_both(chain, tmp_path):
    """Both end at once with exit code 2, before the next step."""
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import os\ncalls = []\n"
        "def score(prompts, responses):\n"
        "    calls.append(prompts)  # the trial, the first update, the second\n"
        "    bad = len(calls) == 3 and os.environ['RANK'] == '1'\n"
        "    return [float('nan') if bad else 0.0] * len(responses)\n"
    )
    flags = f"--reward_function {rule}:score --per_device_train_batch_size 2 --total_episodes 16 --save_steps 1"
    done = launch(tmp_path, [("plain", command(chain, tmp_path / "out", flags, reward=None))])
    assert done.returncode != 0
    assert "error: a reward is NaN or infinite in update 2; the last good checkpoint:" in done.stderr
    assert newest(tmp_path / "out") == 1 and not (tmp_path / "out" / "final_checkpoint").exists()
