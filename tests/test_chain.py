"""The stages in a row: the commands that the project started with, each script alone in its directory; and final
checkpoints of the scripts' earlier version, which load, are trained on and merge."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, make_adapter, make_model, run, write_rows
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

SCRIPTS = "training_sft|training_reward_model|training_rl|merge_with_lora"
SEED = SHARED.parent / "seed_readme.md"
SAMPLE = SHARED / "ultrafeedback_binarized_sample"


MODELS = ("meta-llama/Llama-3.2-3B-Instruct", "HuggingFaceTB/SmolLM3-3B")  # of the seed and of the README


def read_commands(path):
    """(script, arguments) of each command of ours in the code blocks of a Markdown file, bash or PowerShell."""
    commands = []
    for block in re.findall(r"^```(?:bash|powershell)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        block = re.sub(r"[\\`]\n\s*", " ", block).replace("\\", "/")
        found = [re.search(rf"({SCRIPTS})\.py (.*)", line) for line in block.splitlines()]
        commands += [(match[1], shlex.split(match[2])) for match in found if match]
    return commands


def shorten(commands, folder):
    """{script: arguments} of the first command of each script, with a tiny model, the sample, and fewer steps."""
    smaller = {
        **dict.fromkeys(MODELS, make_model(folder / "model", max_position_embeddings=2048)),
        "HuggingFaceH4/ultrafeedback_binarized": str(SAMPLE), "1000": "2", "4096": "8", "64": "8", "128": "8",
    }  # fmt: skip
    found = {}
    for script, arguments in commands:
        more = [] if script == "merge_with_lora" else ["--max_samples", "24"]
        found.setdefault(script, [*(smaller.get(argument, argument) for argument in arguments), *more])
    return found


def check_chain(commands, folder):
    """Every stage left a whole result, relative to one base, and started from what the one before had left."""
    outputs = {script: folder / argv[argv.index("--output_dir") + 1] for script, argv in commands.items()}
    records = {}
    for script, out in outputs.items():
        final = out if script == "merge_with_lora" else out / "final_checkpoint"
        records[script] = json.loads((final / "run.json").read_text(encoding="utf-8"))
        assert any(final.glob("*model.safetensors"))
    stages = {records[script]["base_model"] for script in records if script != "merge_with_lora"}
    assert len(stages) == 1
    parent = records["training_rl"]["parent"]
    assert (folder / parent).resolve() == (outputs["training_sft"] / "final_checkpoint").resolve()


needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of the data set is not here")


@needs_sample
def test_the_first_commands_of_the_project_run_as_written_from_lone_copies(tmp_path):
    """The seed's three commands, each script alone in a directory of its own."""
    if not SEED.is_file():
        pytest.skip("the document that the project started from is not here")
    commands = shorten(read_commands(SEED), tmp_path)
    for script, argv in commands.items():
        (tmp_path / script).mkdir()
        alone = shutil.copy(ROOT / f"{script}.py", tmp_path / script)
        done = subprocess.run([sys.executable, alone, *argv], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 0 and not re.search(r"Traceback|error:", done.stderr), done.stderr[-3000:]
    check_chain(commands, tmp_path)


@needs_sample
def test_the_chain_of_the_readme_runs(tmp_path, monkeypatch):
    """The first command of each of the four scripts, one after the other."""
    monkeypatch.chdir(tmp_path)
    commands = shorten(read_commands(ROOT / "README.md"), tmp_path)
    for script, argv in commands.items():
        run(importlib.import_module(script), *argv)
    check_chain(commands, tmp_path)


def old_record(stage, base):
    """run.json as the earlier version left it."""
    return {
        "stage": stage, "base_model": base, "base_hash": "0123456789abcdef", "parent": base, "prompt_format": "chat",
        "chat_template_hash": "0", "tokenizer_hash": "0", "dataset": {"name": "json", "subset": "data", "split": "train"},
        "arguments": {"use_lora": True, "skip_nonfinite": 0}, "versions": {"trl": "1.12.0", "torch": "2.13.0"}, "metrics": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def old(llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("old")
    policy, scorer = make_adapter(llama, place / "sft"), make_adapter(llama, place / "rm", "SEQ_CLS", seed=1)
    for folder, stage, style in ((policy, "sft", "chat"), (scorer, "reward", "qa")):  # in `chat` it is refused
        record = {**old_record(stage, llama), "prompt_format": style}
        Path(folder, "run.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [{"prompt": f"Why {i}?", "chosen": f"So {i}.", "rejected": f"No {i * i}"} for i in range(8)]
    return {"policy": policy, "scorer": scorer, "data": write_rows(place / "rows" / "train.jsonl", rows)}


def test_earlier_final_checkpoints_are_trained_on(old, sft, reward, rl, tmp_path):
    """SFT and the reward model go on from an earlier adapter, in its format; a rate of 0 changes nothing in it."""
    still = ["--dataset_name", old["data"], "--max_steps", 1, "--learning_rate", 0]
    for script, folder in ((sft, old["policy"]), (reward, old["scorer"])):
        out = tmp_path / script.__name__
        run(script, "--model_path", folder, *still, "--output_dir", out)
        before, after = (
            load_file(Path(place, "adapter_model.safetensors")) for place in (folder, out / "final_checkpoint")
        )
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        style = json.loads((out / "final_checkpoint" / "run.json").read_text())["prompt_format"]
        assert style == ("chat" if script is sft else "qa")


def test_earlier_final_checkpoints_go_through_ppo_and_merge(old, rl, merge, tmp_path):
    """PPO takes an earlier policy and reward model, and its adapter merges: one logit for another."""
    out, merged = tmp_path / "ppo", tmp_path / "merged"
    flags = ["--model_path", old["policy"], "--reward_model_path", old["scorer"], "--dataset_name", old["data"]]
    flags += [
        "--total_episodes",
        4,
        "--per_device_train_batch_size",
        2,
        "--response_length",
        4,
        "--learning_rate",
        1e-3,
    ]
    run(rl, *flags, "--output_dir", out)
    run(merge, "--adapter_path", out / "final_checkpoint", "--output_dir", merged)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        adapter = AutoPeftModelForCausalLM.from_pretrained(out / "final_checkpoint", dtype=torch.float64)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float64)(ids).logits
        start = AutoPeftModelForCausalLM.from_pretrained(old["policy"], dtype=torch.float64)(ids).logits
    rounding = 100 * torch.finfo(torch.float32).eps * adapter.abs().max()  # of the merged weights
    assert (found - adapter).abs().max() < rounding < (start - adapter).abs().max()
    value = AutoPeftModelForSequenceClassification.from_pretrained(out / "final_checkpoint" / "value", num_labels=1)
    assert value.get_base_model().score.weight.shape[0] == 1


@pytest.fixture
def more_tokens(llama, tmp_path):
    """A model whose tokenizer has nine tokens that it has no embeddings for."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(base)
    return base, len(tokenizer)


def test_a_chain_on_a_model_with_added_tokens(more_tokens, sft, reward, rl, merge, tmp_path):
    """SFT adds and trains them; reward model, PPO and merge go on from that, and plain libraries load what they leave."""
    base, tokens = more_tokens
    rows = [{"prompt": f"Why <extra{i}>?", "chosen": f"So <extra{i}>.", "rejected": f"No {i * i}"} for i in range(9)]
    data = ["--dataset_name", write_rows(tmp_path / "rows" / "train.jsonl", rows)]
    start, scorer, policy = (tmp_path / name / "final_checkpoint" for name in ("sft", "rm", "ppo"))
    run(sft, "--model_path", base, *data, "--max_steps", 2, "--output_dir", start.parent)
    more = ["--use_lora", "--max_steps", 2, "--learning_rate", 1e-3, "--output_dir", scorer.parent]
    run(reward, "--model_path", start, *data, *more)
    more = ["--use_lora", "--total_episodes", 4, "--per_device_train_batch_size", 2, "--response_length", 4]
    paths = ["--model_path", start, "--reward_model_path", scorer, "--output_dir", policy.parent]
    run(rl, *paths, *data, *more, "--learning_rate", 1e-3)
    run(merge, "--adapter_path", policy, "--output_dir", tmp_path / "merged")
    ids = torch.arange(tokens - 20, tokens)[None]
    with torch.no_grad():
        adapter = AutoPeftModelForCausalLM.from_pretrained(policy, dtype=torch.float64)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)(ids).logits
        scores = AutoPeftModelForSequenceClassification.from_pretrained(scorer, num_labels=1)(ids).logits
    assert adapter.shape[-1] == merged.shape[-1] == tokens and scores.isfinite().all()
    assert (merged - adapter).abs().max() < 100 * torch.finfo(torch.float32).eps * adapter.abs().max()


@pytest.mark.parametrize("stage", ["reward", "rl"])
def test_tokens_without_embeddings_are_named_before_weights_are_loaded(request, more_tokens, tmp_path, stage):
    rows = write_rows(
        tmp_path / "train.jsonl", [{"prompt": f"Why {i}?", "chosen": "a", "rejected": "b"} for i in range(4)]
    )
    flags = ["--model_path", more_tokens[0], "--dataset_name", rows, "--output_dir", tmp_path / "out", "--use_lora"]
    (tmp_path / "rules.py").write_text(
        "def none(prompts, responses):\n    return [0.0] * len(responses)\n", encoding="utf-8"
    )
    flags += ["--reward_function", f"{tmp_path / 'rules.py'}:none"] if stage == "rl" else []
    assert "but embeddings for" in run(request.getfixturevalue(stage), *flags, code=2)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_a_base_that_is_stored_in_4_bit_needs_lora(request, llama, tmp_path, stage):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = write_rows(
        tmp_path / "train.jsonl", [{"prompt": f"Why {i}?", "chosen": "a", "rejected": "b"} for i in range(4)]
    )
    (tmp_path / "rules.py").write_text(
        "def none(prompts, responses):\n    return [0.0] * len(responses)\n", encoding="utf-8"
    )
    flags = ["--model_path", base, "--dataset_name", rows, "--output_dir", tmp_path / "out"]
    flags += ["--reward_function", f"{tmp_path / 'rules.py'}:none"] if stage == "rl" else []
    assert "is stored in 4 or 8 bit: add --use_lora" in run(request.getfixturevalue(stage), *flags, code=2)[1]


@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_a_base_that_is_stored_in_4_bit_is_trained_on_as_it_is(request, tmp_path, stage):
    """Its config says how its weights are to be read; at a learning rate of 0 the model computes what the base does."""
    pytest.importorskip("bitsandbytes")
    plain, base = make_model(tmp_path / "plain", hidden_size=64, intermediate_size=128), tmp_path / "base"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    stored.save_pretrained(base)
    AutoTokenizer.from_pretrained(plain).save_pretrained(base)
    rows = write_rows(
        tmp_path / "train.jsonl", [{"prompt": f"Why {i}?", "chosen": "a", "rejected": "b"} for i in range(4)]
    )
    rules = tmp_path / "rules.py"
    rules.write_text("def none(prompts, responses):\n    return [0.0] * len(responses)\n", encoding="utf-8")
    flags = ["--model_path", base, "--dataset_name", rows, "--output_dir", tmp_path / "out", "--use_lora"]
    flags += ["--reward_function", f"{rules}:none"] if stage == "rl" else ["--max_steps", 1]
    script, seen = request.getfixturevalue(stage), []
    kind = "SequenceClassification" if stage == "reward" else "CausalLM"
    auto = getattr(script.transformers, f"AutoModelFor{kind}")
    original = auto.from_pretrained

    def load(*args, **kwargs):
        found = original(*args, **kwargs)
        seen.append(found[0] if isinstance(found, tuple) else found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "from_pretrained", load)
        run(script, *flags)
    name = "layers.0.mlp.up_proj"
    layer = seen[0].get_decoder().get_submodule(name)
    layer = getattr(layer, "base_layer", layer)
    assert type(layer).__name__ == "Linear4bit"
    inputs = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    wanted = stored.get_decoder().get_submodule(name)(inputs)
    assert torch.allclose(
        layer(inputs.to(wanted.dtype)).float(), wanted.float(), rtol=0.05, atol=0.05 * wanted.abs().max().item()
    )
