"""The quickstart: the rule, the commands it shows, what a second run does again, and the whole chain on a tiny model."""

import functools
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, make_model

import quickstart

KEYS = [
    "sft_loss", "reward_accuracy_before", "reward_accuracy_after", "reward_before", "reward_after", "rule_score_before",
    "rule_score_after", "length_before", "length_after", "kl", "seconds", "seed", "samples",
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The Volga takes first place. It flows some 3,530 kilometres to the Caspian Sea.", True),
        ("A marathon is 42.195 kilometres long.", True),
        ("  Is it rude? Most people think so.\n", True),
        ("St. Patrick's Day is on 17 March. Dr. Watson and Mr. Holmes never kept it.", True),
        ("The saying is “time flies, as they put it.”", True),
        (" ".join(["word"] * 39).capitalize() + " end.", True),
        (" ".join(["word"] * 40).capitalize() + " end.", False),  # 41 words
        ("One sentence is here. A second one is here. A third is too many.", False),
        ("The ball rolls and brings the", False),
        ("the ball rolls and brings the ink out.", False),
        ("the Volga", False),
        ("Shale.", False),
        ("1. soft\n2. easy to solder\n3. lasts long.", False),
        ("", False),
    ],
)
def test_the_rule(answer, right):
    assert quickstart.follows_rule(answer) is right


def test_help_answers_at_once_and_needs_no_packages(tmp_path):
    shutil.copy(ROOT / "quickstart.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "-I", "quickstart.py", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=5
    )
    assert done.returncode == 0 and "--output_dir" in done.stdout and "--evaluate" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.py"]


@pytest.mark.parametrize("model_path", [quickstart.MODEL.as_posix(), "someone/another-model"])
def test_every_stage_is_a_command_that_its_script_takes(model_path):
    chain = quickstart.stages(model_path, Path("runs/quickstart"), 7, ["--bf16"])
    assert [name for name, _, _ in chain] == ["sft", "reward", "ppo", "merge"]
    parsed = {}
    for name, script, flags in chain:
        parser = importlib.import_module(script.removesuffix(".py")).build_parser()
        parsed[name] = parser.parse_args([str(flag) for flag in flags])
    assert {parsed[name].seed for name in ("sft", "reward", "ppo")} == {7}
    assert Path(parsed["ppo"].model_path) == Path(parsed["sft"].output_dir) / "final_checkpoint"
    assert Path(parsed["ppo"].reward_model_path) == Path(parsed["reward"].output_dir) / "final_checkpoint"
    assert Path(parsed["merge"].adapter_path) == Path(parsed["ppo"].output_dir) / "final_checkpoint"
    assert parsed["sft"].model_path == parsed["reward"].model_path == model_path
    own = model_path == quickstart.MODEL.as_posix()
    assert (parsed["sft"].lora_target_modules is not None) is own  # layer numbers are those of the embedded model
    # The answers that are compared are sampled as PPO samples them.
    assert parsed["ppo"].temperature == quickstart.TEMPERATURE
    assert parsed["ppo"].response_length == quickstart.RESPONSE_LENGTH


def test_commands_are_shown_as_they_can_be_pasted(capfd):
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", r".*\.(1[5-9]|2\d)\..*_proj", "c"]
    printed = quickstart.run(*words, capture=True)
    assert printed == str(words[3:])
    shown = capfd.readouterr().out.strip().removeprefix("> ").removeprefix("& ")
    if os.name == "posix":
        assert shlex.split(shown) == words
    assert f'"{words[4]}"' in shown and "`" not in shown and "$" not in shown  # what PowerShell would take apart


@pytest.mark.parametrize("code", [2, 130, 3])
def test_a_command_that_fails_ends_it(code, capfd):
    with pytest.raises(SystemExit) as stop:
        quickstart.run(sys.executable, "-c", f"import sys; print('error: so', file=sys.stderr); sys.exit({code})")
    errors = capfd.readouterr().err.strip().splitlines()
    assert errors == ["error: so"]
    # Codes 2 and 130 are those of the scripts, which have said why; any other is explained.
    assert stop.value.code == code if code != 3 else "exit code 3" in stop.value.code


@pytest.mark.skipif(os.name != "posix", reason="sends the signal that Ctrl-C sends on POSIX")
def test_ctrl_c_leaves_the_stage_time_to_save(tmp_path):
    stage = """if 1:
        import pathlib, sys, time
        try:
            pathlib.Path("started").touch()
            time.sleep(30)
        except KeyboardInterrupt:
            time.sleep(1)  # longer than subprocess.run would wait before it kills
            pathlib.Path("saved").touch()
            sys.exit(130)
    """
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import quickstart; quickstart.run(sys.executable, '-c', {stage!r})"
    allow = functools.partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True, preexec_fn=allow)
    deadline = time.time() + 30
    while not (tmp_path / "started").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "saved").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place with the files that quickstart.py reads, to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    for name in ("requirements.txt", "constraints.txt", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    return tmp_path


def test_the_environment_is_made_once_and_a_user_s_own_keeps_its_versions(folder, monkeypatch):
    commands = []

    def run(*command):
        commands.append([str(word) for word in command])
        quickstart.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        quickstart.PYTHON.touch()

    monkeypatch.setattr(quickstart, "run", run)
    quickstart.make_environment()
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert "constraints.txt" in commands[1]
    quickstart.make_environment()
    assert len(commands) == 2
    with open("constraints.txt", "a", encoding="utf-8") as file:
        file.write("more==1\n")
    quickstart.make_environment()
    assert commands[2:] == commands[:2]

    (quickstart.VENV / "quickstart.json").unlink()  # as if the user had made it
    quickstart.make_environment()
    assert len(commands) == 5 and "requirements.txt" in commands[4] and "constraints.txt" not in commands[4]

    def fail(*command):
        raise SystemExit(1)

    shutil.rmtree(quickstart.VENV)
    monkeypatch.setattr(quickstart, "run", fail)
    with pytest.raises(SystemExit):
        quickstart.make_environment()
    monkeypatch.setattr(quickstart, "run", run)
    quickstart.make_environment()  # an installation that broke off is done over, as ours
    assert [command[1:3] for command in commands[5:]] == [["-m", "venv"], ["-m", "pip"]]
    assert "constraints.txt" in commands[6]


def test_a_second_run_does_again_what_has_changed(folder, monkeypatch):
    done = []
    metrics = {"train_loss": 1.0, "accuracy_before": 0.5, "accuracy": 0.9, "objective/kl": 2.0}

    def run(*command, capture=False):
        if capture:
            return "False"
        words = [str(word) for word in command]
        done.append(Path(words[1]).stem)
        output_dir = Path(words[words.index("--output_dir") + 1])
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        (output_dir / "evaluation.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(quickstart, "run", run)
    scripts = ["training_sft", "training_reward_model", "training_rl", "merge_with_lora"]

    def chain(seed=1):
        done.clear()
        summary = quickstart.run_chain("a/model", Path("out"), seed)
        assert done.pop() == "quickstart"  # the evaluation is made each time
        assert list(summary["seconds"]) == ["sft", "reward", "ppo", "merge", "evaluation"]
        return list(done)

    assert chain() == scripts
    assert chain() == []
    with open("data/rl/prompts.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "Why?"}\n')
    assert chain() == scripts[2:]
    with open("training_sft.py", "a", encoding="utf-8") as file:
        file.write("\n")
    assert chain() == scripts  # what was built on the old SFT model too
    assert chain(seed=2) == scripts

    def stop_at_ppo(*command, capture=False):
        if "training_rl.py" in command:
            raise SystemExit(2)
        return run(*command, capture=capture)

    monkeypatch.setattr(quickstart, "run", stop_at_ppo)
    with pytest.raises(SystemExit):
        chain(seed=3)
    monkeypatch.setattr(quickstart, "run", run)
    assert chain(seed=3) == scripts[2:]


def test_the_chain_on_a_tiny_model(folder, monkeypatch, capfd):
    """Every stage and the evaluation for real, cut short; in process, where .venv would be used."""
    model = make_model(folder / "model", num_hidden_layers=2)
    short = {
        "training_sft.py": ["--max_samples", "8", "--max_steps", "1", "--batch_size", "2"],
        "training_reward_model.py": ["--max_samples", "8", "--max_steps", "1", "--max_length", "512"],
        "training_rl.py": ["--max_samples", "16", "--total_episodes", "16", "--max_prompt_length", "400"],
        "merge_with_lora.py": [],
    }

    def run(*command, capture=False):
        if capture:
            return "False"
        script, flags = command[1], [str(flag) for flag in command[2:]]
        if script == "quickstart.py":
            quickstart.evaluate(Path(flags[flags.index("--output_dir") + 1]), int(flags[flags.index("--seed") + 1]))
        else:
            importlib.import_module(script.removesuffix(".py")).main(flags + short[script])

    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(quickstart, "PROMPTS", 6)
    monkeypatch.setattr(quickstart, "RESPONSE_LENGTH", 8)
    summary = quickstart.run_chain(model, Path("out"), 5)
    quickstart.show(summary, Path("out"))
    printed = capfd.readouterr().out

    assert sorted(json.loads(Path("out/summary.json").read_text(encoding="utf-8"))) == sorted(KEYS)
    assert summary["seed"] == 5
    assert 0 <= summary["reward_accuracy_after"] <= 1 and 0 <= summary["rule_score_after"] <= 1
    assert summary["sft_loss"] > 0 and summary["length_before"] > 0
    assert [set(sample) for sample in summary["samples"]] == [{"prompt", "before", "after"}] * 5
    questions = [json.loads(line)["prompt"] for line in Path("data/evaluation/test.jsonl").open(encoding="utf-8")]
    assert [sample["prompt"] for sample in summary["samples"]] == questions[:5]
    assert all(sample["prompt"] in printed for sample in summary["samples"])
    assert re.search(r"sft +\d+ s +1 steps", printed) and re.search(r"update +1 +reward", printed)

    # The same again gives the same figures, and another seed's sampling does not.
    figures = json.loads(Path("out/evaluation.json").read_text(encoding="utf-8"))
    quickstart.evaluate(Path("out"), 5)
    assert json.loads(Path("out/evaluation.json").read_text(encoding="utf-8")) == figures
    quickstart.evaluate(Path("out"), 6)
    assert json.loads(Path("out/evaluation.json").read_text(encoding="utf-8"))["samples"] != figures["samples"]
