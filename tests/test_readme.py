"""Every command in the README is one that its script takes; the chain of its four commands runs on a tiny model."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, SHARED, make_model

SCRIPTS = "training_sft|training_reward_model|training_rl|merge_with_lora"


def read_commands(path):
    """(script, arguments) of each command of ours in the code blocks of a Markdown file, bash or PowerShell."""
    commands = []
    for block in re.findall(r"^```(?:bash|powershell)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        block = re.sub(r"[\\`]\n\s*", " ", block).replace("\\", "/")
        for line in block.splitlines():
            match = re.search(rf"({SCRIPTS})\.py (.*)", line)
            if match:
                commands.append((match[1], shlex.split(match[2])))
    return commands


def chain(commands):
    """The first command of each script."""
    found = {}
    for script, arguments in commands:
        found.setdefault(script, arguments)
    return found


README = read_commands(ROOT / "README.md")
SEED = SHARED.parent / "seed_readme.md"


def test_the_readme_shows_all_four_scripts_in_both_shells():
    assert {script for script, _ in README} == set(SCRIPTS.split("|"))
    assert len(README) >= 6


@pytest.mark.parametrize(("script", "arguments"), README)
def test_a_command_of_the_readme_parses(script, arguments):
    importlib.import_module(script).build_parser().parse_args(arguments)


def test_the_reward_of_the_readme_is_one(tmp_path):
    blocks = re.findall(r"^```python\n(def .*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (code,) = blocks
    (tmp_path / "rules.py").write_text(code, encoding="utf-8")
    rl = importlib.import_module("training_rl")
    score = rl.load_reward_function(f"{tmp_path / 'rules.py'}:is_brief")
    assert score([{"text": "Why?"}] * 2, ["Because.", "word " * 41]) == [1.0, 0.0]


@pytest.mark.skipif(not SEED.is_file(), reason="the document that the project started from is not here")
def test_the_first_commands_of_the_project_still_parse():
    commands = read_commands(SEED)
    assert [script for script, _ in commands] == ["training_sft", "training_reward_model", "training_rl"]
    for script, arguments in commands:
        importlib.import_module(script).build_parser().parse_args(arguments)


@pytest.mark.parametrize("source", ["readme", "seed"])
def test_the_chain_runs_on_a_tiny_model(source, tmp_path, monkeypatch):
    """The commands as written, with another model, the sample of the data set, and fewer steps."""
    sample = SHARED / "ultrafeedback_binarized_sample"
    if not sample.is_dir():
        pytest.skip("the sample of the data set is not here")
    commands = chain(README if source == "readme" else read_commands(SEED))
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model", max_position_embeddings=2048)
    smaller = {
        "meta-llama/Llama-3.2-3B-Instruct": model,
        "HuggingFaceH4/ultrafeedback_binarized": str(sample),
        "1000": "1",
        "1024": "8",
        "128": "8",
    }
    outputs = {}
    for script, arguments in commands.items():
        arguments = [smaller.get(argument, argument) for argument in arguments]
        extra = [] if script == "merge_with_lora" else ["--max_samples", "24"]
        importlib.import_module(script).main(arguments + extra)
        outputs[script] = tmp_path / arguments[arguments.index("--output_dir") + 1]
    for script, folder in outputs.items():
        final = folder if script == "merge_with_lora" else folder / "final_checkpoint"
        assert (final / "run.json").is_file()
        assert any(final.glob("*model.safetensors"))
