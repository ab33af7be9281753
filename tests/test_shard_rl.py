"""PPO's --shard_base in two gloo processes, in float64: each holds a share of the base, and all else is as under DDP."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import conftest
import pytest
import test_rl
import torch
from conftest import ROOT, make_model, run
from test_rl import (
    SGD,
    adapters,
    command,
    distance,
    load_policy,
    load_scorer,
    make_chain,
    read_lines,
    read_updates,
    starts,
    train,
)
from test_rl_resume import assert_same_run

chain, choose = test_rl.chain, test_rl.choose

DRIVER = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, pytest, torch, torch.distributed.tensor
patches = pytest.MonkeyPatch()
next(conftest.float64.__wrapped__(patches))
import training_rl as rl
from test_rl import choose_response

rank, trainer, seen = os.environ["RANK"], rl.PPOTrainer, {{}}
full_tensor, report_roles = torch.distributed.tensor.DTensor.full_tensor, rl.report_roles
stop_ids, find_checkpoint = rl.PromptFormat.stop_ids, rl.find_checkpoint
generate, make_groups, accumulate = trainer.generate, trainer.make_groups, trainer.accumulate_gradients

def find_together(args):  # from the second run on nothing else waits until all have looked into --output_dir
    found = find_checkpoint(args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return found

def gather(self):
    seen["gathered"].append(self.numel())
    return full_tensor(self)

def report(roles):  # before the first pass: bytes of the base that are held here, of all
    base = [p for name, p in roles.models.named_parameters() if "lora_" not in name]
    seen["held"] = [sum(p.nbytes for p in those) for those in ([getattr(p, "_local_tensor", p) for p in base], base)]
    report_roles(roles)

def sampled(self, role, rows, sample=True):
    responses = generate(self, role, rows, sample)
    seen["longest"].append(max(map(len, responses)))
    return responses

def chosen(self, role, rows, sample=True):
    return [choose_response(row["prompt_ids"]) for row in rows] if sample else generate(self, role, rows, sample)

def counted(self, rows, responses):
    groups = make_groups(self, rows, responses)
    seen["groups"].append(len(groups))
    return groups

def apart(self, model, mini_batch):
    found = accumulate(self, model, mini_batch)
    next(p for p in model.parameters() if p.grad is not None).grad.add_(int(rank))
    return found

torch.distributed.tensor.DTensor.full_tensor = gather
rl.report_roles, trainer.make_groups, rl.find_checkpoint = report, counted, find_together
for name, mode, flags, copied in json.loads(Path("jobs.json").read_text()):
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if copied and rank == "0":
        shutil.copytree(*copied[:2], ignore=shutil.ignore_patterns(*copied[2:]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    seen.update(gathered=[], groups=[], longest=[])
    trainer.generate = chosen if "chosen" in mode else sampled
    stops = (lambda *args: list(range(2, 300, 4))) if "short" in mode else stop_ids
    patches.setattr(rl.PromptFormat, "stop_ids", stops)
    trainer.accumulate_gradients = apart if "apart" in mode else accumulate
    memory = SimpleNamespace(available=0 if "shares" in mode else 10**12)
    patches.setattr(rl, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = rl.main(flags)
        except SystemExit as stop:
            code = stop.code
    Path(f"{{name}}.{{rank}}.json").write_text(json.dumps({{"code": code, "out": out.getvalue(), "error": error.getvalue(), **seen}}))
    print(name, code, error.getvalue()[-3000:] if code else "", flush=True)
"""


FIXED = f"{SGD} --learning_rate 0.1 --total_episodes 12 --whiten_rewards --save_steps 1 --save_total_limit 9"
FIXED += " --per_device_train_batch_size 2 --gradient_accumulation_steps"
SAMPLED = "--total_episodes 12 --per_device_train_batch_size 2 --save_steps 2 --eval_steps 2 --normalize_reward"
WIDE = f"{SGD} --learning_rate 0.1 --total_episodes 48 --per_device_train_batch_size 2 --gradient_accumulation_steps 4"
TIED = "--use_lora --gradient_checkpointing --reward_function RULES:tokens --total_episodes 8"
JOBS = {  # name: chain, driver's modes, flags
    "ddp": ("exact", "chosen", f"{FIXED} 1"),
    "sharded": ("exact", "chosen", f"{FIXED} 1 --shard_base"),
    "ddp_sampled": ("exact", "short", SAMPLED),
    "sharded_sampled": ("exact", "short", f"{SAMPLED} --shard_base"),
    "shares_sampled": ("exact", "short shares", f"{SAMPLED} --shard_base"),
    "resumed": ("exact", "short shares", f"{SAMPLED} --shard_base --resume_from_checkpoint"),
    "ddp_wide": ("wide", "chosen", WIDE),
    "sharded_wide": ("wide", "chosen", f"{WIDE} --shard_base"),
    "ddp_tied": ("tied", "", TIED),
    "sharded_tied": ("tied", "", f"{TIED} --shard_base"),
    "apart": ("exact", "chosen apart", f"{FIXED} 1 --shard_base"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where two processes did all JOBS, one after the other."""
    place = tmp_path_factory.mktemp("place")
    patches, jobs, chains = pytest.MonkeyPatch(), [], {}
    doubles = conftest.float64.__wrapped__(patches)
    next(doubles)
    for kind, sizes in {"exact": {}, "wide": {"hidden_size": 256}, "tied": {"tie_word_embeddings": True}}.items():
        (place / kind).mkdir()
        chains[kind] = make_chain(make_model(place / kind / "base", **sizes), place / kind)
    next(doubles, None)
    patches.undo()
    for name, (kind, mode, flags) in JOBS.items():
        which = {"model": "base", "reward": None} if kind == "tied" else {}
        without = ["final_checkpoint", "checkpoint-3", "metrics.json"]
        copied = [str(place / "shares_sampled"), str(place / name), *without] if name == "resumed" else None
        jobs.append((name, mode, command(chains[kind], place / name, flags, **which), copied))
    (place / "jobs.json").write_text(json.dumps(jobs))
    (place / "chains.json").write_text(json.dumps(chains))
    (place / "driver.py").write_text(DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "driver.py"]
    with open(place / "log.txt", "w+", encoding="utf-8") as log:
        launcher = subprocess.Popen(
            start, cwd=place, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stdout=log, stderr=log
        )
        try:
            code = launcher.wait(600)  # seconds; where one process waits for the other it hangs
        finally:
            launcher.terminate()  # it ends its processes, too
    assert code == 0, (place / "log.txt").read_text(encoding="utf-8")[-5000:]
    return place


def results(place, name):
    return [json.loads((place / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def final(place, name):
    return adapters(place / name / "final_checkpoint")


def test_two_processes_that_share_a_base_train_as_two_with_one_each_and_as_one(place, rl, float64, choose, tmp_path):
    """With answers fixed, policy and value model after each update are the same to 1e-9, and the metrics."""
    choose()
    chain = json.loads((place / "chains.json").read_text())["exact"]
    train(rl, chain, tmp_path, f"{FIXED} 2")
    for step in (1, 2, 3):
        one, ddp, sharded = (
            adapters(out / f"checkpoint-{step}") for out in (tmp_path, place / "ddp", place / "sharded")
        )
        assert distance(ddp, sharded) < 1e-9 and distance(one, sharded) < 1e-9
    assert {tensor.dtype for tensor in sharded.values()} == {torch.float64}
    moved = starts(chain)
    assert all((sharded[name] != moved[name]).any() for name in moved) and distance(sharded, moved) > 1e-3
    for mine, other in zip(read_updates(tmp_path), read_updates(place / "sharded"), strict=True):
        for key in set(mine) - {"epoch"}:
            if not key.startswith("speed/"):
                assert mine[key] == pytest.approx(other[key], rel=1e-9, abs=1e-9), key


@pytest.mark.parametrize("way", ["sharded", "shares"])
def test_processes_that_sample_by_their_own_seeds_sample_as_under_ddp(place, way):
    """With the base whole while they generate and in shares, where the answers of one end before the other's: the same
    answers, evaluations and weights."""
    assert distance(final(place, "ddp_sampled"), final(place, f"{way}_sampled")) < 1e-9
    ours, theirs = (read_lines(place / f"{name}_sampled" / "samples.jsonl") for name in (way, "ddp"))
    texts = [
        [(line["prompt"], line.get("answer"), line.get("policy_answer")) for line in lines] for lines in (ours, theirs)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 3 * 2 + 2 * 8
    first, second = (result["longest"] for result in results(place, f"{way}_sampled"))
    assert len(first) == len(second) and first != second
    said = results(place, f"{way}_sampled")[0]["out"]
    assert f"generation with the base {'whole' if way == 'sharded' else 'in shares'}" in said


def test_a_resumed_run_ends_as_one_that_was_not(place):
    """AdamW, sampling, evaluations and --normalize_reward, to the byte; random states of both processes too."""
    whole, resumed = place / "shares_sampled", place / "resumed"
    assert_same_run(resumed, whole, 3)
    for rank in (0, 1):
        name = f"checkpoint-3/rng_state_{rank}.pth"
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_texts_of_unequal_lengths_keep_processes_in_step(place):
    """Where texts share passes each process has its own number of them; that of the slower one is made by both."""
    counts = [
        list(zip(*(result["groups"] for result in results(place, f"{name}_wide")))) for name in ("ddp", "sharded")
    ]
    assert any(first != second for first, second in counts[0]), counts
    assert counts[1] == [(max(pair), max(pair)) for pair in counts[0]]
    assert distance(final(place, "ddp_wide"), final(place, "sharded_wide")) < 1e-9


def test_a_head_that_is_the_embeddings_and_checkpointed_layers(place):
    """As under DDP; a new adapter starts the same, and a reward function in place of the model."""
    assert distance(final(place, "ddp_tied"), final(place, "sharded_tied")) < 1e-9


def test_each_process_holds_half_of_the_base(place):
    """In bytes, when all four roles are on it; and no save gathers it."""
    for result in results(place, "sharded"):
        held, whole = result["held"]
        assert 0.49 * whole < held < 0.51 * whole and not result["gathered"]
    assert all(held == whole for held, whole in (result["held"] for result in results(place, "ddp")))


def test_a_final_checkpoint_loads_alone_and_computes_what_that_of_ddp_does(place, float64):
    """The policy as the value model, with one call each; the same files, with nothing of the base."""
    folders, ids = [place / name / "final_checkpoint" for name in ("sharded", "ddp")], torch.arange(40, 60)[None]
    for load, part in ((load_policy, "."), (load_scorer, "value")):
        ours, theirs = (load(folder / part)(ids).logits for folder in folders)
        assert (ours - theirs).abs().max() < 1e-9 < ours.abs().max()
        assert sorted(path.name for path in (folders[0] / part).iterdir()) == sorted(
            path.name for path in (folders[1] / part).iterdir()
        )
    assert all("lora" in name or "score" in name for name in adapters(folders[0]))
    for number in (1, 2, 3):
        files = [
            {path.name for path in (place / name / f"checkpoint-{number}").iterdir()} for name in ("sharded", "ddp")
        ]
        assert files[0] == files[1]


def test_processes_that_come_to_different_adapters_are_stopped(place):
    """After the first update, in one line, before a checkpoint is written."""
    for result in results(place, "apart"):
        assert result["code"] == 2 and "error: --shard_base: adapters differ after step 1" in result["error"]
    assert not list((place / "apart").glob("checkpoint-*"))


PLENTY = {"torch": "2.8.0+cu128", "transformers": "5.23.0"}


@pytest.mark.parametrize(
    "flags, changed, problem",
    [
        ("", {"processes": "1"}, "torchrun --nproc_per_node"),
        ("", {"model": "base"}, "--use_lora"),
        ("--use_lora --load_in_4bit", {}, "--load_in_4bit.*--bf16"),
        ("--use_lora --load_in_8bit", {}, "--load_in_8bit.*--bf16"),
        ("--use_lora --fp16", {}, "--fp16.*--bf16"),
        ("", {"torch": "2.7.1"}, "upgrade torch$"),
        ("", {"transformers": "5.20.2"}, "upgrade transformers$"),
        ("--use_lora", {"reward": "full_rm"}, "--reward_model_path.*LoRA adapter on the policy's base"),
        ("--use_lora --reward_function RULES:tokens", {"model": "gpt2", "reward": None}, "gpt2"),
        ("--set fsdp=full_shard", {}, "--shard_base.*FSDP"),
        ("--set fsdp_config=a.json", {}, "--shard_base.*FSDP"),
        ("--set deepspeed=zero3.json", {}, "--shard_base.*DeepSpeed"),
    ],
)
def test_what_cannot_share_a_base_is_refused_in_one_line(
    rl, chain, gpt2, tmp_path, monkeypatch, flags, changed, problem
):
    """Before anything is loaded, and with what to do instead."""
    version = importlib.metadata.version
    monkeypatch.setenv("WORLD_SIZE", changed.get("processes", "2"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: {**PLENTY, **changed}.get(name) or version(name))
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *args, **kwargs: pytest.fail("loads"))
    which = {"model": changed.get("model", "sft"), "reward": changed.get("reward", "rm")}
    flags = f"--shard_base --per_device_train_batch_size 2 {flags}"
    error = run(rl, *command({**chain, "gpt2": gpt2}, tmp_path / "out", flags, **which), code=2)[1]
    assert re.search(f"^error: .*{problem}", error, re.M) and error.count("error: ") == 1
    assert not (tmp_path / "out").exists()
