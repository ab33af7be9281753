"""--shard_base in two gloo processes, in float64: each holds a share of the base, and all else is as under DDP and in one."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_adapter, make_model, run, write_rows
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPTS = {"sft": "training_sft", "reward": "training_reward_model"}
ROWS = [
    {"prompt": f"What is {i} {'and ' * (i % 5)}?", "chosen": f"It is {'so ' * i}", "rejected": f"{'no ' * (1 + i % 3)}"}
    for i in range(12)
]
LORA = "--use_lora --lora_r 4"
# Nine rows to train on, three to evaluate on: of both two processes have unequal numbers.
USUAL = "--gradient_checkpointing --lr_scheduler_type constant --save_total_limit 9"
USUAL += " --logging_steps 1 --save_steps 1 --eval_steps 2 --eval_split train[9:]"
SGD = "--set optim=sgd --learning_rate 0.5 --gradient_accumulation_steps"
ADAM = "--learning_rate 1e-3 --lora_dropout 0.1 --gradient_accumulation_steps 2 --shard_base"
DRIVER = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import accelerate, conftest, peft, pytest, torch, torch.distributed.tensor, transformers

patches = pytest.MonkeyPatch()
next(conftest.float64.__wrapped__(patches))
rank, get_peft_model, found = os.environ["RANK"], peft.get_peft_model, []

def watched(model, *args):  # (bytes of the base that are held here, of all)
    shares = [getattr(weight, "_local_tensor", weight) for weight in model.parameters()]
    found.append([sum(weight.nbytes for weight in those) for those in (shares, model.parameters())])
    return get_peft_model(model, *args)

init, together = accelerate.PartialState.__init__, transformers.Trainer._sync_replicated_trainable_parameters
full_tensor, gathered = torch.distributed.tensor.DTensor.full_tensor, []

def gather(self):
    gathered.append(self.numel())
    return full_tensor(self)

torch.distributed.tensor.DTensor.full_tensor = gather

def with_cards(self, *args, **kwargs):  # accelerate takes FSDP where it finds cards alone
    init(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == "MULTI_CPU":
        self._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU

peft.get_peft_model = watched
jobs = json.loads(Path("jobs.json").read_text())
for name, script, flags, copied in jobs:
    if copied and rank == "0":
        shutil.copytree(copied, Path(name, Path(copied).name))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    patches.setattr(accelerate.PartialState, "__init__", with_cards if name.endswith("fsdp") else init)
    if name.endswith("fsdp"):
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    sync = together if not name.endswith("apart") else lambda self, model: None
    patches.setattr(transformers.Trainer, "_sync_replicated_trainable_parameters", sync)
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            code = __import__(script).main(["--output_dir", name, *flags])
        except SystemExit as stop:
            code = stop.code
    result = {{"code": code, "error": error.getvalue(), "held": found[-1:], "gathered": gathered[:]}}
    gathered.clear()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    Path(f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
    torch.distributed.barrier()

def die(self, model):
    Path("died").write_text("now")
    os.kill(os.getpid(), 9)

if rank == "1":
    transformers.Trainer._clip_grad_norm = die
__import__(jobs[1][1]).main(["--output_dir", "killed", *jobs[1][2]])
"""


def command(stage, base, data, more):
    split = "--split" if stage == "sft" else "--train_split"
    return ["--model_path", base, "--dataset_name", data, split, "train[:9]", *USUAL.split(), *more.split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory, gpt2):
    """Where two processes have trained with each script: as under DDP; sharded; sharded with all that a checkpoint has to
    remember, whole and resumed after two of three steps; sharded without what keeps them together; all weights,
    under DDP and under FSDP2; and where the second one died at last."""
    place = tmp_path_factory.mktemp("place")
    base, data, jobs = make_model(place / "base"), write_rows(place / "rows.jsonl", ROWS), []
    AutoModelForCausalLM.from_pretrained(base).double().save_pretrained(base)  # under float64 a file is read as that
    adapter = make_adapter(base, place / "adapter", modules_to_save=["embed_tokens"])
    for stage, script in SCRIPTS.items():
        ways = {"ddp": f"{SGD} 2", "sharded": f"{SGD} 2 --shard_base", "whole": ADAM, "full": f"{SGD} 2"}
        ways |= {"resumed": f"{ADAM} --resume_from_checkpoint", "apart": ways["sharded"], "fsdp": f"{SGD} 2"}
        for way, more in ways.items():
            flags = command(stage, base, data, more if way in ("full", "fsdp") else f"{LORA} {more}")
            jobs.append((f"{stage}_{way}", script, flags, f"{stage}_whole/checkpoint-2" if way == "resumed" else None))
        for name, model in (("gpt2", gpt2), ("embeddings", adapter)):
            flags = command(stage, model, data, f"{SGD} 2 --use_lora --shard_base")
            jobs.append((f"{stage}_{name}", script, flags, None))
    (place / "jobs.json").write_text(json.dumps(jobs))
    (place / "driver.py").write_text(DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "driver.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with open(place / "log.txt", "w+", encoding="utf-8") as log:
        launcher = subprocess.Popen(start, cwd=place, env=environment, stdout=log, stderr=log)
        try:
            code = launcher.wait(600)  # seconds; where one process waits for the other it hangs
        finally:
            launcher.terminate()  # it ends its processes, too
    log = (place / "log.txt").read_text(encoding="utf-8")
    assert (place / "died").exists(), log[-5000:]
    end = {"code": code, "error": log, "seconds": time.time() - (place / "died").stat().st_mtime}
    (place / "end.json").write_text(json.dumps(end))
    return place


def results(place, name):
    return [json.loads((place / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def distance(some, others):
    assert some.keys() == others.keys()
    return max((weight - others[name]).abs().max().item() for name, weight in some.items())


def logged(folder):
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("speed/", "runtime", "per_second", "model_prep")
    return [{key: value for key, value in line.items() if not any(word in key for word in timed)} for line in lines]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_that_share_a_base_train_as_two_with_one_each_and_as_one(
    place, stage, float64, tmp_path, request
):
    """Adapters (and head) after each step, and evaluation, are the same to 1e-9; the last step pads an odd row."""
    run(
        request.getfixturevalue(stage),
        *command(stage, place / "base", place / "rows.jsonl", f"{LORA} {SGD} 4"),
        "--output_dir",
        tmp_path / "one",
    )
    for step in (1, 2, 3):
        ddp, sharded = (weights(place / f"{stage}_{how}" / f"checkpoint-{step}") for how in ("ddp", "sharded"))
        assert distance(ddp, sharded) < 1e-9
        if step < 3:  # one process takes the odd row alone, two take it twice
            one = weights(tmp_path / "one" / f"checkpoint-{step}")
            assert distance(one, sharded) < 1e-9
    assert {weight.dtype for weight in sharded.values()} == {torch.float64} and distance(one, sharded) > 1e-3
    for mine, other in zip(*(logged(place / f"{stage}_{how}") for how in ("ddp", "sharded")), strict=True):
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_each_process_holds_half_of_the_base(place, stage):
    """Counted in bytes, where adapters are put on it; no save gathers it, and under DDP each holds all."""
    for rank in (0, 1):
        assert results(place, f"{stage}_sharded")[rank]["gathered"] == ([32] if stage == "reward" else [])  # the head
        held, whole = results(place, f"{stage}_sharded")[rank]["held"][0]
        assert 0.49 * whole < held < 0.51 * whole
        assert results(place, f"{stage}_ddp")[rank]["held"] == [[whole, whole]]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_resumed_run_ends_as_one_that_was_not(place, stage):
    """AdamW, dropout and the order of rows: the same bytes, written by one process but for random states."""
    whole, resumed = place / f"{stage}_whole", place / f"{stage}_resumed"
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        assert (whole / "checkpoint-3" / name).read_bytes() == (resumed / "checkpoint-3" / name).read_bytes(), name
    losses = [[(line["loss"], line["grad_norm"]) for line in logged(out) if "loss" in line] for out in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert distance(*(weights(whole / f"checkpoint-{step}") for step in (2, 3))) > 1e-6


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_final_checkpoint_loads_alone_and_computes_what_that_of_ddp_does(place, stage, float64):
    """It holds the adapter and the head, and nothing of the base."""
    load, extra = AutoPeftModelForCausalLM.from_pretrained, {}
    if stage == "reward":
        load, extra = AutoPeftModelForSequenceClassification.from_pretrained, {"num_labels": 1, "pad_token_id": 0}
    folders = [place / f"{stage}_{how}" / "final_checkpoint" for how in ("sharded", "ddp")]
    ids = torch.arange(5, 25)[None]
    ours, theirs = (load(folder, dtype=torch.float64, **extra).eval()(ids).logits for folder in folders)
    assert (ours - theirs).abs().max() < 1e-9 < ours.abs().max()
    sharded, ddp = map(weights, folders)
    assert sharded.keys() == ddp.keys() and all("lora" in name or "score" in name for name in sharded)
    assert {path.name for path in folders[0].iterdir()} == {path.name for path in folders[1].iterdir()}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_processes_that_come_to_different_adapters_are_stopped(place, stage):
    """After the first step, in one line, before a checkpoint is written."""
    for result in results(place, f"{stage}_apart"):
        assert result["code"] == 2 and "error: --shard_base: adapters differ after step 1" in result["error"]
    assert not list((place / f"{stage}_apart").glob("checkpoint-*/adapter_model.safetensors"))


@pytest.mark.parametrize("stage", SCRIPTS)
def test_all_weights_are_trained_under_fsdp2_of_accelerate_as_under_ddp(place, stage):
    """The final checkpoint is whole; two processes on a CPU, of which accelerate is told that they have cards."""
    fsdp, ddp = (
        load_file(place / f"{stage}_{how}" / "final_checkpoint" / "model.safetensors") for how in ("fsdp", "full")
    )
    before, norm = load_file(place / "base" / "model.safetensors"), "model.norm.weight"
    assert distance(fsdp, ddp) < 1e-9 and distance({norm: fsdp[norm]}, {norm: before[norm]}) > 1e-3
    assert (place / f"{stage}_fsdp" / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()  # in pieces, as is FSDP2's way


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("kind, problem", [("gpt2", "gpt2"), ("embeddings", "embedding.* adapter")])
def test_a_model_that_cannot_be_shared_out_is_refused(place, stage, kind, problem):
    """In one line, in each process, before anything is loaded."""
    for result in results(place, f"{stage}_{kind}"):
        assert result["code"] == 2 and re.search(f"^error: --shard_base.*{problem}", result["error"], re.M)
        assert "Loading weights" not in result["error"]
    assert not (place / f"{stage}_{kind}").exists()


def test_a_process_that_is_killed_ends_the_other(place):
    """Within a minute, and the launcher names it; nothing is published."""
    end = json.loads((place / "end.json").read_text())
    assert end["code"] != 0 and end["seconds"] < 60 and re.search(r"exitcode *: -9", end["error"])
    assert not (place / "killed" / "final_checkpoint").exists()


PLENTY = {"torch": "2.8.0+cu128", "transformers": "5.23.0"}


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize(
    "flags, changed, problem",
    [
        ("--use_lora", {"processes": "1"}, "torchrun --nproc_per_node"),
        ("", {}, "--use_lora.*FSDP2"),
        ("--use_lora --load_in_4bit", {}, "--load_in_4bit.*--bf16"),
        ("--use_lora --load_in_8bit", {}, "--load_in_8bit.*--bf16"),
        ("--use_lora --fp16", {}, "--fp16.*--bf16"),
        ("--use_lora", {"torch": "2.7.1"}, "upgrade torch$"),
        ("--use_lora", {"transformers": "5.20.2"}, "upgrade transformers$"),
    ],
)
def test_what_cannot_share_a_base_is_refused_in_one_line(
    stage, flags, changed, problem, llama, tmp_path, monkeypatch, request
):
    """Before anything is loaded, and with what to do instead."""
    script, version = request.getfixturevalue(stage), importlib.metadata.version
    monkeypatch.setenv("WORLD_SIZE", changed.get("processes", "2"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: {**PLENTY, **changed}.get(name) or version(name))
    more = ["--shard_base", "--output_dir", tmp_path / "out", *flags.split()]
    _, error = run(script, *command(stage, llama, write_rows(tmp_path / "rows.jsonl", ROWS), "")[:6], *more, code=2)
    assert re.search(f"^error: --shard_base.*{problem}", error.strip(), re.M)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize(
    "flags, environment",
    [
        ("--use_lora", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        ("--use_lora --shard_base", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        ("", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}),
        ("", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
        ("--use_lora --shard_base", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    ],
)
def test_a_launcher_that_shares_out_in_another_way_is_refused(stage, flags, environment, llama, monkeypatch, request):
    """In one line that names what works."""
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    arguments = [*command(stage, llama, "rows", "")[:6], "--output_dir", "out", *flags.split()]
    _, error = run(request.getfixturevalue(stage), *arguments, code=2)
    assert error.count("error:") == 1 and "--shard_base" in error
