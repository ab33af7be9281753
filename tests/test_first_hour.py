"""What a new user meets: hints at mistakes, words where silence would cost a run, progress that tells."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, make_adapter, make_tokenizer, run, write_rows
from test_errors import ROWS, SCRIPTS, TRAINING, command, models, refuse, snapshot, start  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM, JetMoeConfig

NUMBER = r"-?\d[\d.e+-]*"


@pytest.mark.parametrize("stage", SCRIPTS)
def test_hyphens_and_the_other_scripts_names_are_accepted(request, stage):
    """--output-dir is --output_dir, with and without `=`; values keep their hyphens; batch size and split have two names."""
    parse = request.getfixturevalue(stage).build_parser().parse_args
    if stage == "merge":
        args = parse(["--adapter-path", "a-b", "--output-dir=c-d=e-f"])
        assert (args.adapter_path, args.output_dir) == ("a-b", "c-d=e-f")
        return
    base = ["--model-path", "a-b", "--dataset-name=c-d", "--output_dir", "e-f"]
    one = parse([*base, "--batch-size", "3", "--split", "x-y"])
    other = parse([*base, "--per_device_train_batch_size", "3", "--train-split=x-y"])
    assert one == other and (one.model_path, one.dataset_name) == ("a-b", "c-d")
    assert 3 in vars(one).values() and "x-y" in vars(one).values()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_mistyped_flag_meets_its_neighbour(refuse, stage):  # noqa: F811
    refuse(stage, "--output_dri: is --output_dir meant", "--output_dri", "x")


@pytest.mark.parametrize("stage", TRAINING)
def test_lora_flags_without_lora(refuse, stage):  # noqa: F811
    """They would have no effect, and all weights would be trained."""
    for flags in (["--lora_r", 8], ["--lora_alpha", 8], ["--lora_dropout", 0], ["--lora_target_modules", "q_proj"]):
        refuse(stage, f"{flags[0]} without --use_lora", *flags)


@pytest.mark.parametrize("stage", TRAINING)
def test_a_column_and_a_line_that_are_nearly_right(refuse, tmp_path, stage):  # noqa: F811
    """A mistyped column meets its neighbour; a line that is no JSON is named with its number."""
    refuse(stage, r"--columns .*prompt=promt.* renames", rows=[{"promt": "a", "chose": "b", "rejected": "c"}] * 4)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + '\n{"prompt": "a", \n' + json.dumps(ROWS[1]) + "\n", encoding="utf-8")
    refuse(stage, r"broken.jsonl, line 2: ", "--dataset_name", broken)


@pytest.mark.parametrize("stage", TRAINING)
def test_what_the_model_does_not_have(refuse, tmp_path, stage):  # noqa: F811
    """A wrong LoRA target lists those that exist, also where others of the names are right, which PEFT would pass over."""
    there = "q_porj.* down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    refuse(stage, there, "--use_lora", "--lora_target_modules", "q_proj", "q_porj")
    refuse(stage, r"--lora_target_modules \*_proj: nothing to repeat", "--use_lora", "--lora_target_modules", "*_proj")
    refuse(stage, "--attn_implementation zigzag", "--attn_implementation", "zigzag")
    config = JetMoeConfig(hidden_size=16, num_hidden_layers=1, num_key_value_heads=1, kv_channels=8, vocab_size=300)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    refuse(stage, "has none for JetMoe", "--gradient_checkpointing", "--model_path", tmp_path / "model")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_path_that_is_not_there_answers_before_the_slow_imports(tmp_path, stage):
    (tmp_path / "torch.py").write_text("raise ImportError('slow')", encoding="utf-8")
    flag = "--adapter_path" if stage == "merge" else "--model_path"
    data = [] if stage == "merge" else ["--dataset_name", "a/b"]
    rewarded = ["--reward_model_path", "a/b"] if stage == "rl" else []
    for path in ("./nowhere", "../nowhere", "/no/where", "a/b/c", "C:\\nowhere"):
        done = start(stage, flag, path, "--output_dir", tmp_path / "x", *data, *rewarded, path=tmp_path)
        assert done.returncode == 2 and done.stderr == f"error: {flag} {path} does not exist\n"
    done = start(stage, flag, "a/b", "--output_dir", tmp_path / "x", *data, *rewarded, path=tmp_path)
    assert "slow" in done.stderr  # a/b may be on the hub


@pytest.mark.parametrize("stage", TRAINING)
def test_progress_and_a_finished_run(request, models, tmp_path, stage):  # noqa: F811
    """Log lines from the first step on, aligned, numbers as numbers; the bar tells the figures. Resuming a finished run,
    which may be named by its directory, changes nothing, unless more is asked for."""
    script, lora = request.getfixturevalue(stage), ["--use_lora", "--logging_steps", 3]
    if stage == "rl":
        lora = ["--use_lora"]
    out, err = run(script, *command(stage, models, tmp_path, *lora))
    word = "update" if stage == "rl" else "step"
    lines = [line for line in out.splitlines() if re.match(rf"{word} +\d+ of 4 ", line)]
    assert lines[0].split()[1] == "1" and len(lines) == (4 if stage == "rl" else 2)
    names = {"sft": "loss", "reward": "loss", "rl": "stop_rate"}
    assert all(re.search(rf" {names[stage]} +{NUMBER}( |$)", line) for line in lines)
    assert len({line.index(names[stage]) for line in lines}) == 1
    assert re.search(rf"{names[stage]}[ =]{NUMBER}", err)  # on the bar
    before = snapshot(tmp_path / "out")
    go_on = [*lora, "--resume_from_checkpoint", tmp_path / "out", "--learning_rate", 1e-4]
    out, _ = run(script, *command(stage, models, tmp_path, *go_on))
    assert "finished" in out and snapshot(tmp_path / "out") == before
    more = ["--total_episodes", 6] if stage == "rl" else ["--max_steps", 6]
    run(script, *command(stage, models, tmp_path, *go_on, *more))
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["step"] == 6


@pytest.mark.parametrize("stage", TRAINING)
def test_a_long_step_shows_that_it_goes_on(request, models, tmp_path, monkeypatch, stage):  # noqa: F811
    """Within a step the bar is drawn again after each pass that ends more than 5 s after the last time."""
    script, clock, drawn = request.getfixturevalue(stage), iter(range(0, 10**6, 10)), []
    monkeypatch.setattr(script.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(script.tqdm, "refresh", lambda bar, **kwargs: drawn.append(bar.n))
    accumulated = ["--total_episodes", 4] if stage == "rl" else ["--max_steps", 1]
    run(script, *command(stage, models, tmp_path, "--gradient_accumulation_steps", 4, "--use_lora", *accumulated))
    assert drawn.count(0) >= 3  # before the first step is done


@pytest.mark.parametrize("stage", TRAINING)
def test_words_where_silence_would_cost_a_run(request, models, tmp_path, stage):  # noqa: F811
    """A learning rate that breaks models, and data of which most is left out, are warned of before any training; where
    rows are cut or left out for their length, the lengths that would keep 95% and 99% are named."""
    long = {"prompt": "why " * 30, "chosen": "so " * 30, "rejected": "no " * 30}
    rows = ROWS[:3] + [{**long, "prompt": f"{i} {long['prompt']}"} for i in range(5)]
    limit = "--max_prompt_length" if stage == "rl" else "--max_length"
    flags = ["--dry_run", "--learning_rate", 0.02, limit, 40, "--prompt_format", "chat"]
    if stage == "sft":
        rows = ROWS[:3] + [ROWS[0]] * 5
    out, err = run(request.getfixturevalue(stage), *command(stage, models, tmp_path, *flags, rows=rows))
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert any("0.02" in line for line in warnings) and any("half" in line for line in warnings)
    if stage != "sft":
        assert re.search(rf"{limit} \d\d+ keeps 95% of the \w+, \d\d+ 99%", out)


def test_cut_rows_and_the_marks_of_a_dry_run_are_explained(sft, models, tmp_path):  # noqa: F811
    rows = [{"prompt": f"Why {i}?", "response": "so " * (i + 1)} for i in range(100)]
    flags = ["--dry_run", "--max_length", 30, "--dataset_name", write_rows(tmp_path / "train.jsonl", rows)]
    out, _ = run(sft, *command("sft", models, tmp_path, *flags))
    cut, most, nearly_all = map(
        int, re.search(r"(\d+) of them cut.*EOS.*--max_length (\d+) .*95%.* (\d+) 99%", out, re.S).groups()
    )
    run_again = [*flags, "--max_length"]
    assert cut > 50
    assert "5 of them cut" in run(sft, *command("sft", models, tmp_path, *run_again, most))[0]
    assert "1 of them cut" in run(sft, *command("sft", models, tmp_path, *run_again, nearly_all))[0]
    assert re.search(r"\[\[\.\.\.\]\] is what the loss", out)
    assert "--prompt_format chat" in out  # the model has a template, the rows are question and answer


def test_formats_of_policy_and_reward_model_that_differ(rl, models, tmp_path):  # noqa: F811
    policy = make_adapter(models["base"], tmp_path / "policy")
    Path(policy, "run.json").write_text(json.dumps({"stage": "sft", "prompt_format": "qa"}), encoding="utf-8")
    scorer = make_adapter(models["base"], tmp_path / "scorer", "SEQ_CLS")
    record = {"stage": "reward", "prompt_format": "chat", "score_at": "end"}
    Path(scorer, "run.json").write_text(json.dumps(record), encoding="utf-8")
    flags = ["--model_path", policy, "--reward_model_path", scorer, "--dry_run"]
    out, _ = run(rl, *command("rl", models, tmp_path, *flags))
    assert "the reward model was trained with the format chat, not qa" in out


def test_a_reward_function_that_raises_is_named_with_its_line(rl, models, tmp_path):  # noqa: F811
    rules = tmp_path / "broken.py"
    rules.write_text("def score(prompts, responses):\n    return [1 / 0]\n", encoding="utf-8")
    _, err = run(rl, *command("rl", models, tmp_path, "--reward_function", f"{rules}:score"), code=2)
    assert re.search(r"^error: --reward_function .*ZeroDivisionError.*broken.py, line 2\)\nTraceback", err, re.M)


@pytest.mark.parametrize("stage", TRAINING)
def test_a_final_checkpoint_in_use_keeps_the_new_one_beside_it(request, models, tmp_path, monkeypatch, stage):  # noqa: F811
    """On Windows a directory that another program has open cannot be replaced. The next run does so, and is not told that
    all is finished; what a killed run left of a still older one is not in its way."""
    script, replace = request.getfixturevalue(stage), os.replace
    run(script, *command(stage, models, tmp_path, "--use_lora"))
    before = snapshot(tmp_path / "out" / "final_checkpoint")
    write_rows(tmp_path / "out" / "final_checkpoint.old" / "left", ROWS)

    def in_use(source, target):
        if Path(source).name == "final_checkpoint":
            raise PermissionError(13, "in use", str(source))
        replace(source, target)

    more = ["--total_episodes", 6] if stage == "rl" else ["--max_steps", 6]
    argv = command(stage, models, tmp_path, "--use_lora", "--resume_from_checkpoint", *more)
    with monkeypatch.context() as patch:
        patch.setattr(script.os, "replace", in_use)
        patch.setattr(script.time, "sleep", lambda seconds: None)
        _, err = run(script, *argv, code=2)
    assert re.search(r"error: .*final_checkpoint is in use by another program.*final_checkpoint.partial", err)
    assert snapshot(tmp_path / "out" / "final_checkpoint") == before
    assert (tmp_path / "out" / "final_checkpoint.partial" / "adapter_model.safetensors").is_file()
    out, _ = run(script, *argv)
    assert "finished" not in out and len(list((tmp_path / "out").glob("final_checkpoint*"))) == 1
    name = "adapter_model.safetensors"
    final, last = (tmp_path / "out" / place / name for place in ("final_checkpoint", "checkpoint-6"))
    assert final.read_bytes() == last.read_bytes()
    assert "finished" in run(script, *argv)[0]


@pytest.mark.parametrize("stage", TRAINING)
def test_a_virus_scanner_that_reads_what_was_just_written_is_waited_for(
    request,
    models,  # noqa: F811
    tmp_path,
    monkeypatch,
    stage,
):
    """On Windows a directory cannot be renamed while a file in it is open."""
    script, replace, waits = request.getfixturevalue(stage), os.replace, []

    def scanned(source, target):
        if Path(source).name == "final_checkpoint.partial" and len(waits) < 3:
            raise PermissionError(13, "in use", str(source))
        replace(source, target)

    monkeypatch.setattr(script.os, "replace", scanned)
    monkeypatch.setattr(script.time, "sleep", waits.append)
    run(script, *command(stage, models, tmp_path, "--use_lora"))
    assert len(waits) == 3 and [path.name for path in (tmp_path / "out").glob("final*")] == ["final_checkpoint"]


def test_a_best_checkpoint_in_use_does_not_end_the_run(rl, models, tmp_path, monkeypatch):  # noqa: F811
    replace = os.replace

    def in_use(source, target):
        if Path(source).name == "best_checkpoint":
            raise PermissionError(13, "in use", str(source))
        replace(source, target)

    monkeypatch.setattr(rl.PPOTrainer, "keep_best", lambda self, metrics: self.publish("best_checkpoint", metrics))
    monkeypatch.setattr(rl.os, "replace", in_use)
    monkeypatch.setattr(rl.time, "sleep", lambda seconds: None)
    _, err = run(rl, *command("rl", models, tmp_path, "--use_lora", "--eval_steps", 2))
    assert re.search("warning: .*best_checkpoint is in use .*best_checkpoint.partial", err)
    assert (tmp_path / "out" / "final_checkpoint" / "run.json").is_file()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux what is open")
@pytest.mark.parametrize("stage", TRAINING)
def test_nothing_is_replaced_while_this_process_has_it_open(request, models, tmp_path, monkeypatch, stage):  # noqa: F811
    """Windows refuses that; of samples.jsonl it would let the first lines be all."""
    script, replace = request.getfixturevalue(stage), os.replace

    def refused(source, target):
        held = {os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()}
        held |= {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if " /" in line}
        for path in map(os.path.realpath, (source, target)):
            if any(f"{file}/".startswith(f"{path}/") for file in held):
                raise PermissionError(13, "in use", path)
        replace(source, target)

    monkeypatch.setattr(script.os, "replace", refused)
    run(script, *command(stage, models, tmp_path, "--use_lora"))
    assert (tmp_path / "out" / "final_checkpoint").is_dir()
    if stage == "rl":
        lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines if "answer" in line} == {1, 2, 3, 4}
        assert {line["step"] for line in lines if "answer" not in line} == {4}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("stage", TRAINING)
def test_ctrl_c_saves_also_where_it_ends_the_reader_of_the_output(models, tmp_path, stage):  # noqa: F811
    """`python training_sft.py ... 2>&1 | tee log`: the same Ctrl-C ends tee."""
    long = ["--total_episodes", 5000] if stage == "rl" else ["--num_train_epochs", 5000, "--max_steps", 5000]
    argv = [sys.executable, ROOT / f"{SCRIPTS[stage]}.py", *command(stage, models, tmp_path, "--use_lora", *long)]
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.set_blocking(process.stdout.fileno(), False)
    log = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):  # its first step is done
        process.stdout.read()
        time.sleep(0.02)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize("stage", TRAINING)
def test_a_file_that_is_not_utf8_is_named_with_its_line(refuse, tmp_path, stage):  # noqa: F811
    """As open(path, "w") writes on Windows. A byte order mark, which PowerShell writes, does no harm."""
    text = "".join(json.dumps({**row, "prompt": f"Wozu {row['prompt']}"}) + "\r\n" for row in ROWS)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.replace("Wozu Why 5", "Für was 5").encode("cp1252"))
    refuse(stage, r"rows.jsonl, line 6: .*utf-8", "--dataset_name", path)
    path.write_bytes(f"{text}\r\n{{".encode("utf-8-sig"))
    refuse(stage, r"rows.jsonl, line 10: ", "--dataset_name", path)
