"""What the README shows is so: its commands are ones that the scripts take, its Python runs, its links are there."""

import importlib
import json
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, make_adapter, make_model, run, write_rows
from test_chain import SCRIPTS, SEED, read_commands
from transformers import GenerationConfig

README = ROOT / "README.md"
COMMANDS = read_commands(README) + (read_commands(SEED) if SEED.is_file() else [])


def test_the_readme_shows_all_four_scripts():
    assert {script for script, _ in read_commands(README)} == set(SCRIPTS.split("|"))


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_a_command_parses(script, arguments):
    """Every command of the README, and of the document that the project started from, is one its script takes."""
    importlib.import_module(script).build_parser().parse_args(arguments)


def test_powershell_says_the_same_as_bash():
    """The four commands stand in both shells with the same arguments; in PowerShell a line goes on by a backtick at its
    end, paths are Windows', and nothing is bash's alone."""
    blocks = re.findall(r"^```(bash|powershell)\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    chains = {shell: text for shell, text in blocks if "merge_with_lora.py" in text}
    words = {}
    for shell, text in chains.items():
        joined = re.sub(r"[\\`]\n\s*", " ", text).replace("\\", "/")
        words[shell] = [line.split()[1:] for line in joined.splitlines() if line]
    assert len(words["bash"]) == 4 and words["powershell"] == words["bash"]
    for _, text in [block for block in blocks if block[0] == "powershell"]:
        for line in text.splitlines():
            assert re.match(r"(\.\\\.venv\\Scripts\\python|python|  --\w+) |$", line), line
            assert not re.search(r"&&|\\$|\$\(|<<|/bin/|^export |~/", line), line
            assert line.count("`") == line.endswith(" `")


@pytest.mark.parametrize(("name", "machines"), [("ddp_8_cards", 1), ("ddp_two_machines", 2)])
def test_the_launchers_files_are_ones(name, machines):
    config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == (
        "MULTI_GPU",
        machines,
        8 * machines,
    )


def test_the_python_runs(rl, sft, reward, llama, tmp_path, monkeypatch):
    """The functions among the snippets are rewards that PPO takes; the other snippets run on what a chain leaves, and on
    files in the form of Alpaca, ShareGPT and HelpSteer, whose conversions the scripts read."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    make_adapter(llama, "checkpoints/ppo/final_checkpoint")
    make_adapter(llama, "checkpoints/rm/final_checkpoint", "SEQ_CLS")
    GenerationConfig(eos_token_id=[2]).save_pretrained("checkpoints/ppo/final_checkpoint")
    make_model("checkpoints/merged")
    alpaca = [{"instruction": "Add.", "input": f"1 + {i}", "output": f"{1 + i}"} for i in range(3)]
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    Path("alpaca.json").write_text(json.dumps(alpaca), encoding="utf-8")
    Path("sharegpt.json").write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")
    judged = [
        {"prompt": f"{i}?", "response_1": "One.", "response_2": "Two.", "preference_strength": i} for i in (-2, 0, 3)
    ]
    Path("helpsteer.json").write_text(json.dumps(judged), encoding="utf-8")
    prompts = [json.loads(line) for line in (ROOT / "data/rl/prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "answer": i} for i, row in enumerate(prompts[:4])])
    flags = ["--model_path", llama, "--dataset_name", data, "--total_episodes", 1, "--response_length", 4]
    for i, code in enumerate(blocks):
        names = {}
        exec(code, names)
        for name in re.findall(r"^def (\w+)", code, re.M):
            (tmp_path / "rules.py").write_text(code, encoding="utf-8")
            run(rl, *flags, "--output_dir", tmp_path / f"{i}_{name}", "--reward_function", f"rules.py:{name}")
    assert names["is_brief"](["Why?"] * 2, ["So.", "So " * 41]) == [1.0, 0.0]
    assert names["is_right"](["6 * 7?"] * 3, ["It is 42.", "40 and 2", "no"], ["42"] * 3) == [1.0, 0.0, 0.0]
    for folder, text in (("data_alpaca", "Add.\n\n1 + 2\n\nAnswer:[[ 3"), ("data_chats", "Be kind.")):
        out, _ = run(sft, "--model_path", llama, "--dataset_name", folder, "--output_dir", "x", "--dry_run")
        assert text in out or text.replace("1 + 2", "1 + 1").replace("[[ 3", "[[ 2") in out
    dry = ["--model_path", llama, "--output_dir", "x", "--dry_run"]
    out, _ = run(reward, *dry, "--dataset_name", "data_pairs")
    assert "2 of 2 pairs kept" in out and re.search(r"-2\?.*chosen: One.*3\?.*chosen: Two", out, re.S)
    rules = ["--reward_function", "rules.py:is_brief", "--total_episodes", 1, "--per_device_train_batch_size", 1]
    out, _ = run(rl, *dry, *rules, "--gradient_accumulation_steps", 1, "--dataset_name", "data_prompts")
    assert "1 prompts" in out and "user\nHi" in out


def test_the_files_that_it_names_are_there():
    """Paths in backticks or links that look like files of this repository exist."""
    text = re.sub(r"^```.*?^```", "", README.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = set(re.findall(r"`((?:benchmarks|configs|data|tests)/[\w./-]+)`|\]\((?!http)([\w./-]+)\)", text))
    assert [path for pair in named for path in pair if path and not (ROOT / path).exists()] == []
