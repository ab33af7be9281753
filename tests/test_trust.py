"""Runs that stop before harm is done: NaN, too little memory or disk, a chain that does not fit, damaged checkpoints."""

import json
import math
import shutil
from collections import namedtuple

import pytest
import torch
from conftest import make_model, make_tokenizer, write_rows
from safetensors.torch import load_file, save_file

FLAGS = "--use_lora --max_steps 8 --save_steps 3 --logging_steps 1 --learning_rate 1e-3 --prompt_format qa".split()


@pytest.fixture(params=["sft", "reward"])
def stage(request, llama, tmp_path):
    """(script, command): eight steps over sixteen rows, two at a time."""
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}.", "rejected": f"bad {i * i}"} for i in range(16)]
    rows[11]["chosen"] = "good ~"  # the one row with this character
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    command = ["--model_path", llama, "--dataset_name", "json", "--subset", str(tmp_path / "data"), *FLAGS]
    command += ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out")]
    return request.getfixturevalue(request.param), command


def poison(command, tmp_path):
    """The command on a copy of its model whose embedding of `~` is NaN."""
    from transformers import AutoTokenizer

    model = tmp_path / "poisoned"
    shutil.copytree(command[1], model)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(model)("~")["input_ids"][-1]] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return ["--model_path", str(model), *command[2:]]


def test_the_first_loss_that_is_not_finite_stops_the_run_and_names_its_row(stage, tmp_path):
    script, command = stage
    with pytest.raises(script.UserError, match=r"loss of the data rows 11 is not finite, in step \d; the last"):
        script.main(poison(command, tmp_path))
    assert not (tmp_path / "out" / "final_checkpoint").exists()
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())


def test_skip_nonfinite_leaves_that_step_out_and_no_other(stage, tmp_path, capsys):
    script, command = stage
    script.main([*poison(command, tmp_path), "--skip_nonfinite", "1"])
    assert "rows 11 is not finite" in capsys.readouterr().err
    weights = load_file(tmp_path / "out" / "final_checkpoint" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    norms = [json.loads(line)["grad_norm"] for line in lines if "grad_norm" in line]
    assert len(norms) == 8 and sum(norm == 0 for norm in norms) == 1
    assert all(math.isfinite(json.loads(line)["loss"]) for line in lines if '"loss"' in line)


def test_more_than_skip_nonfinite_such_steps_stop_the_run(stage, tmp_path):
    script, command = stage
    command = poison([*command, "--skip_nonfinite", "1", "--num_train_epochs", "2"], tmp_path)
    command[command.index("--max_steps") + 1] = "16"
    with pytest.raises(script.UserError, match="rows 11 is not finite"):
        script.main(command)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(stage, tmp_path, monkeypatch):
    script, command = stage
    trainer = script.GuardedTrainer if not hasattr(script, "RowTrainer") else script.RowTrainer
    step = trainer.training_step

    def overflow(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 4:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(trainer, "training_step", overflow)
    with pytest.raises(script.UserError, match="gradient of the data rows .* is not finite, in step 5; the last"):
        script.main(command)
    weights = load_file(tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def have_free(monkeypatch, script, memory=2**40, disk=2**50):
    monkeypatch.setattr(script.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(memory))
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: namedtuple("Disk", "free")(disk))


def test_too_little_memory_is_said_before_a_weight_is_loaded(stage, tmp_path, monkeypatch):
    script, command = stage
    have_free(monkeypatch, script, memory=1000)
    monkeypatch.setattr(script, "load_model", None)
    helps = r"what helps: --bf16, --load_in_4bit, shorter texts, smaller batches; --force"
    with pytest.raises(script.UserError, match=f"needs about 0.0 GB of memory, 0.0 GB are free; {helps}"):
        script.main(command)
    assert not (tmp_path / "out").exists()


def test_force_goes_on_with_too_little_memory(stage, tmp_path, monkeypatch):
    script, command = stage
    have_free(monkeypatch, script, memory=1000)
    script.main([*command, "--force"])
    assert (tmp_path / "out" / "final_checkpoint").is_dir()


def test_too_little_disk_is_said_before_a_weight_is_loaded(stage, tmp_path, monkeypatch):
    script, command = stage
    have_free(monkeypatch, script, disk=1000)
    monkeypatch.setattr(script, "load_model", None)
    with pytest.raises(script.UserError, match=r"3 checkpoints and the final one take .* see --save_total_limit"):
        script.main(command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut weights", "cut optimizer", "no optimizer", "cut random state"])
def test_a_damaged_checkpoint_is_refused(stage, tmp_path, damage):
    script, command = stage
    script.main(command)
    checkpoint = tmp_path / "out" / "checkpoint-8"
    kind, name = damage.split(" ", 1)
    path = checkpoint / {"weights": "adapter_model.safetensors", "optimizer": "optimizer.pt"}.get(name, "rng_state.pth")
    path.unlink() if kind == "no" else path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        script.UserError, match="holds no optimizer state" if kind == "no" else f"{path.name} is damaged"
    ):
        script.main([*command, "--resume_from_checkpoint"])


def write_run(folder, **values):
    path = folder / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**run, **values}), encoding="utf-8")


@pytest.fixture(scope="module")
def scorer(llama, tmp_path_factory):
    """A reward model's full checkpoint, as its stage would leave it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture
def ppo(llama, scorer, tmp_path):
    """(command, reward model): PPO without training, up to the checks of its chain."""
    write_rows(tmp_path / "data" / "train.jsonl", [{"prompt": f"q {i}"} for i in range(4)])
    reward_model = tmp_path / "reward"
    shutil.copytree(scorer, reward_model)
    write_run(reward_model, stage="reward", prompt_format="chat")
    command = ["--model_path", llama, "--reward_model_path", str(reward_model), "--dataset_name", "json"]
    command += ["--subset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--dry_run", "--use_lora"]
    return command, reward_model


def test_a_reward_model_no_better_than_chance_is_refused(rl, ppo, capsys):
    command, reward_model = ppo
    rl.main(command)
    assert "no evaluation on record" in capsys.readouterr().out
    report = {"accuracy": 0.48, "accuracy_interval": [0.4, 0.56], "pairs": 100}
    write_run(reward_model, metrics={"report": report})
    with pytest.raises(rl.UserError, match="0.480 of 100 pairs .* not above chance: PPO would follow noise"):
        rl.main(command)
    rl.main([*command, "--force"])
    write_run(reward_model, metrics={"report": {**report, "accuracy": 0.55, "accuracy_interval": [0.45, 0.64]}})
    capsys.readouterr()
    rl.main(command)
    assert "not above chance" in capsys.readouterr().out
    write_run(reward_model, metrics={"report": {**report, "accuracy": 0.8, "accuracy_interval": [0.7, 0.9]}})
    rl.main(command)
    assert "chance" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--model_path", "--reward_model_path"])
def test_the_checkpoint_of_another_stage_is_refused(rl, ppo, llama, tmp_path, flag):
    command, reward_model = ppo
    shutil.copytree(llama, tmp_path / "policy")
    write_run(tmp_path / "policy", stage="merge", parent_stage="sft")
    wrong = {"--model_path": reward_model, "--reward_model_path": tmp_path / "policy"}[flag]
    says = {"--model_path": "stage 'reward': it is a reward", "--reward_model_path": "stage 'sft': it is not a reward"}
    command[command.index(flag) + 1] = str(wrong)
    with pytest.raises(rl.UserError, match=f"{flag} .* {says[flag]} model"):
        rl.main(command)


def test_a_reward_model_with_another_template_is_named(rl, ppo, capsys):
    command, reward_model = ppo
    template = (reward_model / "chat_template.jinja").read_text(encoding="utf-8")
    (reward_model / "chat_template.jinja").write_text(
        template.replace("'<|im_end|>'", "' <|im_end|>'"), encoding="utf-8"
    )
    rl.main(command)
    assert "trained with another chat template" in capsys.readouterr().out
    write_run(reward_model, prompt_format="qa")
    rl.main(command)
    assert "trained with another prompt format" in capsys.readouterr().out


def test_a_value_model_with_another_tokenizer_is_refused(rl, ppo, tmp_path):
    command, _ = ppo
    other = make_model(tmp_path / "other")
    make_tokenizer(vocab_size=300).save_pretrained(other)
    with pytest.raises(rl.UserError, match="another tokenizer than the policy"):
        rl.main([*command, "--value_model_path", other])


@pytest.mark.parametrize("skips", [0, 1])
def test_ppo_stops_at_a_reward_that_is_not_finite_or_leaves_that_update_out(rl, ppo, tmp_path, skips, capsys):
    command, _ = ppo
    rule = tmp_path / "rule.py"
    rule.write_text(
        "calls = []\n\ndef score(prompts, responses):\n    calls.append(0)\n"  # the first call is the trial before anything is loaded
        "    return [float('nan') if len(calls) == 3 else 1.0] * len(responses)\n",
        encoding="utf-8",
    )
    command = [flag for flag in command if flag != "--dry_run"]
    at = command.index("--reward_model_path")
    command[at : at + 2] = ["--reward_function", f"{rule}:score"]
    command += "--total_episodes 4 --response_length 4 --max_prompt_length 64 --save_steps 1".split()
    command += ["--skip_nonfinite", str(skips)]
    if not skips:
        with pytest.raises(rl.UserError, match=r"reward in the prompt rows \d is not finite, in step 2; the last"):
            rl.main(command)
        assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").is_file()
        return
    rl.main(command)
    assert "left out (1 of --skip_nonfinite 1)" in capsys.readouterr().err
    steps = [load_file(tmp_path / "out" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (3, 4)]
    assert all(weight.isfinite().all() for step in steps for weight in step.values())


def test_streaming_trains_on_the_same_rows_and_resumes_exactly(stage, tmp_path, capsys):
    """The rows that are kept are those of a run that reads everything; a run that was cut in two ends the same."""
    script, command = stage
    write_rows(
        tmp_path / "data" / "train.jsonl",
        [{"prompt": f"q {i % 12}", "chosen": "yes", "rejected": "no"} for i in range(24)],
    )
    command = [*command, "--streaming", "--max_length", "128"]
    script.main([*command, "--dry_run"])
    assert "the first" in capsys.readouterr().out
    script.main(command)
    out = tmp_path / "out"
    whole = load_file(out / "final_checkpoint" / "adapter_model.safetensors")
    for later in ("checkpoint-6", "checkpoint-8", "final_checkpoint"):
        shutil.rmtree(out / later, ignore_errors=True)
    command[command.index("--output_dir") + 1] = str(tmp_path / "again")
    command[command.index("--save_steps") + 1] = "4"
    script.main(command)
    shutil.rmtree(tmp_path / "again" / "checkpoint-8")
    shutil.rmtree(tmp_path / "again" / "final_checkpoint")
    script.main([*command, "--resume_from_checkpoint"])
    again = load_file(tmp_path / "again" / "final_checkpoint" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(script.UserError, match="--streaming .*needs? .*--max_steps"):
        script.main([flag for flag in command if flag not in ("--max_steps", "8")])


def test_streaming_leaves_out_what_a_run_that_reads_everything_leaves_out(stage, tmp_path):
    script, command = stage
    rows = [{"prompt": f"q {i % 12}", "chosen": "yes " * (1 + 200 * (i == 3)), "rejected": "no"} for i in range(24)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    seen, trainer = {}, script.GuardedTrainer
    for name, more in (("all", []), ("stream", ["--streaming"])):

        class Stop(Exception):
            pass

        def look(self, *args, train_dataset, found=seen, name=name, **kwargs):
            found[name] = sorted(json.dumps({k: v for k, v in row.items() if k != "row"}) for row in train_dataset)
            raise Stop

        for cls in {trainer, getattr(script, "RowTrainer", trainer)}:
            cls.__init__ = look
        try:
            with pytest.raises(Stop):
                script.main([*command, *more, "--max_length", "60", "--overwrite_output_dir"])
        finally:
            for cls in {trainer, getattr(script, "RowTrainer", trainer)}:
                del cls.__init__
    assert seen["all"] == seen["stream"] and 0 < len(seen["all"]) <= 13


def test_a_bad_row_of_a_stream_is_named(stage, tmp_path):
    script, command = stage
    rows = [{"prompt": f"q {i}", "chosen": "yes" if i != 5 else "", "rejected": "no"} for i in range(8)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    with pytest.raises(script.UserError, match="row 5 of its file: column chosen is empty"):
        script.main([*command, "--streaming", "--max_length", "128"])


def test_a_sample_that_was_cut_inside_a_character_does_not_stop_the_resume(stage, tmp_path):
    script, command = stage
    script.main(command)
    shutil.rmtree(tmp_path / "out" / "final_checkpoint")
    with open(tmp_path / "out" / "metrics.jsonl", "ab") as file:
        file.write('{"step": 8, "text": "caf\xe9'.encode()[:-1])
    script.main([*command, "--resume_from_checkpoint"])
    assert (tmp_path / "out" / "final_checkpoint").is_dir()
