"""What the README shows is so: its commands are ones that the scripts take, its Python runs, its links are there."""

import importlib
import re

import pytest
from conftest import ROOT, make_adapter, make_model, run, write_rows
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from test_chain import SCRIPTS, SEED, read_commands
from transformers import AutoModelForCausalLM, GenerationConfig

README = ROOT / "README.md"
COMMANDS = read_commands(README) + (read_commands(SEED) if SEED.is_file() else [])


def test_the_readme_shows_all_four_scripts():
    assert {script for script, _ in read_commands(README)} == set(SCRIPTS.split("|"))


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_a_command_parses(script, arguments):
    """Every command of the README, and of the document that the project started from, is one its script takes."""
    importlib.import_module(script).build_parser().parse_args(arguments)


def test_the_python_runs(rl, llama, tmp_path, monkeypatch):
    """The functions among the snippets are rewards that PPO takes; the other snippets run on what a chain leaves."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    make_adapter(llama, "checkpoints/ppo/final_checkpoint")
    make_adapter(llama, "checkpoints/rm/final_checkpoint", "SEQ_CLS")
    GenerationConfig(eos_token_id=[2]).save_pretrained("checkpoints/ppo/final_checkpoint")
    make_model("checkpoints/merged")
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"Why {i}?"} for i in range(4)])
    flags = ["--model_path", llama, "--dataset_name", data, "--total_episodes", 1, "--response_length", 4]
    classes = AutoModelForCausalLM, AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    for i, code in enumerate(blocks):
        names = {cls.__name__: cls for cls in classes}
        exec(code, names)
        for name in re.findall(r"^def (\w+)", code, re.M):
            (tmp_path / "rules.py").write_text(code, encoding="utf-8")
            run(rl, *flags, "--output_dir", tmp_path / f"{i}_{name}", "--reward_function", f"rules.py:{name}")
            assert names[name](["Why?"], ["Because."]) == [1.0]


def test_the_files_that_it_names_are_there():
    """Paths in backticks or links that look like files of this repository exist."""
    text = re.sub(r"^```.*?^```", "", README.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = set(re.findall(r"`((?:benchmarks|data|tests)/[\w./-]+)`|\]\((?!http)([\w./-]+)\)", text))
    assert [path for pair in named for path in pair if path and not (ROOT / path).exists()] == []
