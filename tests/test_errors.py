"""What a user mistypes or mislays is one line that says so, exit code 2, before a weight is loaded; nothing is
overwritten. And what several scripts share has one name, one type and one default."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_adapter, make_model, make_tokenizer, run, write_rows
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

SCRIPTS = {"sft": "training_sft", "reward": "training_reward_model", "rl": "training_rl", "merge": "merge_with_lora"}
TRAINING = ["sft", "reward", "rl"]
ROWS = [{"prompt": f"Why {i}?", "chosen": f"So {i}.", "rejected": f"No {i * i}"} for i in range(8)]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="session")
def models(tmp_path_factory, llama):
    """A base, and adapters for it as SFT and the reward model leave them."""
    place = tmp_path_factory.mktemp("models")
    found = {"base": llama, "policy": make_adapter(llama, place / "policy")}
    found["scorer"] = make_adapter(llama, place / "scorer", "SEQ_CLS", seed=1)
    for name, stage in (("policy", "sft"), ("scorer", "reward")):
        (Path(found[name]) / "run.json").write_text(json.dumps({"stage": stage, "prompt_format": "chat"}))
    return found


def command(stage, models, place, *flags, rows=ROWS):
    """A short run of the stage; later flags win."""
    if stage == "merge":
        return ["--adapter_path", models["policy"], "--output_dir", place / "out", *flags]
    found = ["--model_path", models["base"], "--dataset_name", write_rows(place / "data" / "train.jsonl", rows)]
    if stage == "rl":
        rules = place / "rules.py"
        rules.write_text("def length(prompts, responses):\n    return [float(len(text)) for text in responses]\n")
        found += ["--reward_function", f"{rules}:length", "--total_episodes", 4, "--response_length", 4]
    else:
        found += ["--max_steps", 4]
    return [*found, "--logging_steps", 1, "--output_dir", place / "out", *flags]


def snapshot(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def refuse(request, models, tmp_path, monkeypatch):
    """refuse(stage, expected, *flags) asserts one line with `expected`, that no weight is loaded, nothing written."""

    def never(*args, **kwargs):
        raise AssertionError("weights were loaded before this was checked")

    def refuse(stage, expected, *flags, rows=ROWS, out=None):
        argv = command(stage, models, tmp_path, *flags, rows=rows)
        before = snapshot(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "from_pretrained", never)
            _, err = run(request.getfixturevalue(stage), *argv, code=2)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and re.search(expected, lines[0]), err[-600:]
        assert snapshot(tmp_path) == before

    return refuse


# ---------------------------------------------------------------- flags


FLAGS = [
    (["--bf16", "--fp16"], "--fp16"),
    (["--fp16"], "--fp16"),  # needs a GPU
    (["--load_in_4bit"], "--use_lora"),
    (["--load_in_8bit"], "--use_lora"),
    (["--use_lora", "--load_in_4bit", "--load_in_8bit"], "--load_in_4bit.*--load_in_8bit"),
    (["--lr_scheduler_type", "zigzag"], "zigzag"),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr.*lr_scheduler_kwargs"),
    (["--warmup_ratio", "1.5"], "--warmup_ratio.*1.5"),
    (["--seed", "-1"], "--seed.*-1"),
    (["--save_steps", "many"], "--save_steps.*many"),
    (["--prompt_format", "xml"], "--prompt_format.*xml"),
    (["--report_to", "paper"], "--report_to.*paper"),
    (["--output", "elsewhere"], "--output"),  # no prefixes
    (["--set", "padding_side"], "--set padding_side"),
    (["--set", "adam_beta=0.9"], "adam_beta"),
    (["--set", "learning_rate=1"], "learning_rate"),  # has a flag
    (["--set", "optim=nothing"], "nothing"),
    (["--set", "fsdp=full_shard"], "accelerate launch"),
    (["--set", "deepspeed=zero3.json"], "accelerate launch"),
    (["--resume_from_checkpoint", "nowhere"], "nowhere"),
    (["--dataset_name", "nowhere/at/all"], "nowhere/at/all"),
    (["--dataset_name", "json", "--subset", "nowhere"], "nowhere"),
    (["--eval_split", "dev[:5]", "--dataset_name", "{both}"], "dev.*test.*train|dev.*train.*test"),
    (["--model_path", "./nowhere/model"], "--model_path.*nowhere"),
    (["--model_path", "nobody/nothing-here"], "nobody/nothing-here"),
    (["--model_path", "{file}"], "--model_path.*weights.bin"),
    (["--model_path", "{empty}"], "--model_path.*empty"),
    (["--model_path", "{bare}"], "--model_path.*bare.*(no weights|safetensors)"),
    (["--model_path", "{lost}"], "/gone/base"),
    (["--model_path", "{policy}", "--lora_r", "8"], "--lora_r"),
    (["--model_path", "{policy}", "--lora_alpha", "3"], "--lora_alpha"),
    (["--model_path", "{policy}", "--lora_target_modules", "q_proj"], "--lora_target_modules"),
    (["--prompt_format", "chat", "--model_path", "{plain}"], "--prompt_format"),
    (["--output_dir", "{file}"], "--output_dir.*is a file"),
    (["--output_dir", "{file}/out"], "--output_dir.*weights.bin is a file"),
    (["--set", "save_strategy=epoch"], "save_strategy"),
    (["--output_dir", "{used}"], "--output_dir.*--overwrite_output_dir"),
    *((flags, flags[0]) for flags in (
        ["--streaming"], ["--eval_fraction", "0.5"], ["--use_margin"], ["--skip_nonfinite", "1"], ["--force"],
        ["--value_model_path", "{scorer}"],
    )),
]  # fmt: skip


@pytest.fixture
def places(models, plain_llama, tmp_path):
    """What the flags above name in braces."""
    found = {**models, "plain": plain_llama, "both": tmp_path / "both", "used": tmp_path / "used"}
    found |= {"file": tmp_path / "weights.bin", "empty": tmp_path / "empty", "lost": tmp_path / "lost"}
    found["file"].write_text("x", encoding="utf-8")
    for name in ("empty", "used"):
        found[name].mkdir()
        (found[name] / "precious.txt").write_text("x", encoding="utf-8")
    for name in ("train", "test"):
        write_rows(found["both"] / f"{name}.jsonl", ROWS)
    found["bare"] = tmp_path / "bare"
    shutil.copytree(models["base"], found["bare"], ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(models["policy"], found["lost"])
    config = json.loads((found["lost"] / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "/gone/base"
    (found["lost"] / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return found


@pytest.mark.parametrize("stage", TRAINING)
@pytest.mark.parametrize(
    ("flags", "expected"), FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_flags_that_cannot_be(refuse, places, stage, flags, expected):
    """Each mistake is refused by each training script, in a line that names it."""
    refuse(stage, expected, *(flag.format(**places) for flag in flags))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--adapter_path", "./nowhere"], "--adapter_path.*nowhere"),
        (["--adapter_path", "{base}"], "adapter"),
        (["--adapter_path", "{lost}"], "/gone/base"),
        (["--base_model_path", "./nowhere"], "--base_model_path.*nowhere"),
        (["--base_model_path", "{policy}"], "--base_model_path"),
        (["--dtype", "int3"], "--dtype.*int3"),
        (["--max_shard_size", "big"], "--max_shard_size"),
        (["--output_dir", "{file}"], "--output_dir"),
        (["--output_dir", "{used}"], "--output_dir.*--overwrite_output_dir"),
        (["--out", "x"], "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_a_merge_that_cannot_be(refuse, places, flags, expected):
    """The same holds for the merge, before it reads a tensor."""
    refuse("merge", expected, *(flag.format(**places) for flag in flags))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--reward_function", "{file}"], "--reward_function"),
        (["--reward_function", "{rules}:nothing"], "nothing"),
        (["--reward_model_path", "{policy}"], "--reward_model_path"),
        (["--model_path", "{scorer}"], "--model_path"),
        (["--num_mini_batches", "3"], "--num_mini_batches"),
        (["--max_prompt_length", "1"], "--max_prompt_length"),
        (["--gradient_accumulation_steps", "99"], "prompts"),
        (["--response_length", "1000"], "--response_length"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_ppo_that_cannot_be(refuse, places, tmp_path, flags, expected):
    """A reward that is none, a checkpoint of another stage, episodes that do not fit the batch, prompts or model."""
    refuse("rl", expected, *(flag.format(**places, rules=tmp_path / "rules.py") for flag in flags))


def test_ppo_needs_a_reward(rl, models, tmp_path):
    """Without a reward model or a reward function there is nothing to learn from."""
    argv = command("rl", models, tmp_path)
    at = argv.index("--reward_function")
    assert "--reward_function" in run(rl, *argv[:at], *argv[at + 2 :], code=2)[1]


def test_what_scripts_share_has_one_name_type_and_default(request):
    """A flag that several scripts have means the same in each, but for what the stages are."""
    own = {"logging_steps", "save_steps", "output_dir", "help"}  # PPO's steps are whole updates
    seen = {}
    for stage in TRAINING:
        for action in request.getfixturevalue(stage).build_parser()._actions:
            value = (
                action.type("2" if action.dest == "max_length" else "1") if action.type else None
            )  # an int or a float, however the script checks its range
            kind = type(value), action.default, action.nargs, action.choices, action.required, type(action).__name__
            if action.dest not in own:
                assert seen.setdefault(action.dest, kind) == kind, f"{stage}: --{action.dest}"
    assert len(seen) > 50


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("stage", TRAINING)
def test_a_missing_column_is_named_with_those_that_are_there(refuse, stage):
    refuse(stage, r"train.jsonl.*colour.*(messages|prompt)", rows=[{"colour": "a", "size": "b"}] * 8)


BAD = {
    "sft": [{"prompt": "x", "chosen": ""}, {"prompt": "x", "chosen": None}],
    "reward": [{"prompt": "x", "chosen": "y", "rejected": " "}, {"prompt": None, "chosen": "y", "rejected": "z"}],
    "rl": [{"prompt": " \n"}, {"prompt": None}],
}


@pytest.mark.parametrize(("stage", "row"), [(stage, row) for stage in BAD for row in BAD[stage]])
def test_bad_rows_are_left_out_and_named_or_too_many(request, refuse, models, tmp_path, stage, row):
    """Up to a tenth of the rows may be empty, null or misshapen: left out, counted, the first three named."""
    good = [{"prompt": f"Why {i}?", "chosen": f"So {i}.", "rejected": f"No {i * i}"} for i in range(40)]
    why = "|".join(column for column, value in row.items() if not (value or "").strip())
    refuse(stage, rf"train.jsonl.*\b1\b.*row.*({why}).*|train.jsonl.*row.*\b8\b.*({why})", rows=[*good[:8], row])
    rows = [{**good[0], **row}, *good[:37], {**good[1], **row}]
    argv = command(stage, models, tmp_path, "--dry_run", rows=rows)
    out, err = run(request.getfixturevalue(stage), *argv)
    (line,) = [line for line in (out + err).splitlines() if re.search(r"row.*\b0\b.*\b38\b", line)]
    assert re.search(rf"\b2\b.*({why})|({why}).*\b2\b", line)


@pytest.mark.parametrize(
    "messages",
    [[], CHAT[:1], CHAT[::-1], [CHAT[0], {"role": "assistant", "content": " "}]],
)  # fmt: skip
def test_conversations_that_are_none(refuse, messages):
    """A chat takes turns, has texts, and ends with the assistant's."""
    refuse("sft", r"train.jsonl.*messages", rows=[{"messages": CHAT}, {"messages": messages}])


@pytest.mark.parametrize("stage", TRAINING)
def test_rows_that_are_all_too_long(refuse, stage):
    flag = "--max_prompt_length" if stage == "rl" else "--max_length"
    refuse(stage, f"{flag} 2", flag, 2)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("stage", TRAINING)
def test_a_tokenizer_without_an_end(refuse, plain_llama, tmp_path, stage):
    """A model whose answers could never end is refused."""
    copy = tmp_path / "no_eos"
    shutil.copytree(plain_llama, copy)
    tokenizer = make_tokenizer(chat=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copy)
    refuse(stage, "EOS", "--model_path", copy)


@pytest.mark.parametrize("stage", [*TRAINING, "merge"])
def test_an_adapter_whose_base_was_trained_in_place(refuse, request, sft, models, tmp_path, stage):
    """An adapter belongs to the weights that it was trained on: another model under the same path is refused."""
    base, out = tmp_path / "base", tmp_path / "first"
    make_model(base, seed=5)
    data = write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    run(sft, "--model_path", base, "--dataset_name", data, "--use_lora", "--max_steps", 1, "--output_dir", out)
    make_model(base, seed=6)
    flag = "--adapter_path" if stage == "merge" else "--model_path"
    refuse(stage, "base", flag, out / "final_checkpoint")


@pytest.mark.parametrize("stage", TRAINING)
def test_what_is_not_finite_does_not_reach_the_weights(request, models, tmp_path, stage):
    """A NaN in the base, or in a reward, stops the run with the step in one line; no weight that was saved holds one."""
    flags, rows = ["--use_lora", "--save_steps", 1, "--prompt_format", "qa"], list(ROWS)
    if stage == "rl":
        rules = tmp_path / "nan.py"
        rules.write_text(
            "calls = []\n\ndef score(prompts, responses):\n    calls.append(0)\n"
            "    return [float('nan') if len(calls) == 4 else 1.0] * len(responses)\n"
        )
        flags += ["--reward_function", f"{rules}:score", "--total_episodes", 8]
    else:
        poisoned = tmp_path / "poisoned"
        shutil.copytree(models["base"], poisoned)
        weights = load_file(poisoned / "model.safetensors")
        token = make_tokenizer()("~", add_special_tokens=False)["input_ids"][0]
        weights["model.embed_tokens.weight"][token] = math.nan
        save_file(weights, poisoned / "model.safetensors", {"format": "pt"})
        rows[3] = {**rows[3], "chosen": "So ~"}
        flags += ["--model_path", poisoned, "--max_steps", 8]
    argv = command(stage, models, tmp_path, *flags, rows=rows)
    _, err = run(request.getfixturevalue(stage), *argv, code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(r"(step|update) \d", line)
    assert not (tmp_path / "out" / "final_checkpoint").exists()
    for file in (tmp_path / "out").glob("checkpoint-*/*.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(file).values())


@pytest.mark.parametrize("stage", TRAINING)
def test_no_memory_left_is_one_line_with_what_helps(request, models, tmp_path, monkeypatch, stage):
    """torch's error becomes one line that names flags, and --gradient_checkpointing among them."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\n(more lines)")

    monkeypatch.setattr(torch.nn.Linear, "forward", full)
    _, err = run(request.getfixturevalue(stage), *command(stage, models, tmp_path, "--use_lora"), code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "--gradient_checkpointing" in line


# ---------------------------------------------------------------- as processes


def start(stage, *flags, path=None):
    argv = [sys.executable, ROOT / f"{SCRIPTS[stage]}.py", *flags]
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else None
    return subprocess.run(list(map(str, argv)), capture_output=True, text=True, encoding="utf-8", env=environment)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_help_mistakes_and_another_trl_answer_before_the_slow_imports(stage, tmp_path):
    """With a torch that cannot be imported the script still shows its help, refuses a flag, and names the trl it needs."""
    (tmp_path / "torch.py").write_text("raise ImportError('slow')", encoding="utf-8")
    done = start(stage, "--help", path=tmp_path)
    assert done.returncode == 0 and "--output_dir" in done.stdout and "default" in done.stdout
    done = start(stage, "--outputdir", "x", path=tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"error: .*--help.*\n", done.stderr)
    if stage != "merge":
        (tmp_path / "trl-1.13.0.dist-info").mkdir()
        (tmp_path / "trl-1.13.0.dist-info" / "METADATA").write_text("Name: trl\nVersion: 1.13.0\n", encoding="utf-8")
        done = start(stage, "--model_path", "x", "--dataset_name", "x", "--output_dir", "x", path=tmp_path)
        assert done.returncode == 2 and re.fullmatch(r"error: .*1\.12\.0.*1\.13\.0.*pip install.*\n", done.stderr)
