"""The quickstart: the rule, the commands it shows, what a second run does again, and the whole chain on a tiny model."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_model

import quickstart


def test_the_rule_asks_for_one_or_two_complete_sentences_of_at_most_40_words():
    right = [
        "The Volga takes first place. It flows some 3,530 kilometres to the Caspian Sea.",
        "St. Patrick's Day is on 17 March. Dr. Watson and Mr. Holmes never kept it.",
        "The saying is “time flies, as they put it.”\n",
        " ".join(["word"] * 39).capitalize() + " end.",
    ]
    wrong = [
        " ".join(["word"] * 40).capitalize() + " end.",
        "One sentence is here. A second one is here. A third is too many.",
        "The ball rolls and brings the",
        "the ball rolls and brings the ink out.",
        "Shale.",
        "1. soft\n2. easy to solder\n3. lasts long.",
        "",
    ]
    assert [answer for answer in right + wrong if quickstart.follows_rule(answer)] == right


def test_answers_that_the_console_cannot_show_do_not_hide_the_table(tmp_path):
    """A pipe on Windows knows few characters."""
    for name, figures in {
        "sft": {"train_loss": 1.0}, "reward": {"accuracy_before": 0.5, "accuracy": 1.0}, "ppo": {"objective/kl": 1.0},
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        quickstart.write(tmp_path / name / "metrics.json", figures)
    found = {key + side: 1.0 for key in quickstart.TABLE for side in ("_before", "_after")}
    samples = [{"prompt": "Why?", "before": "a \u2192 b", "after": "\ufffd"}]
    quickstart.write(tmp_path / "evaluation.json", {**found, "samples": samples})
    code = "import quickstart, pathlib, sys; quickstart.show({}, pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    printed = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert b"a ? b" in printed.stdout and b"words an answer" in printed.stdout


def test_help_needs_no_packages(tmp_path):
    """-S and -I: Python without site-packages, from a copy that lies alone."""
    shutil.copy(ROOT / "quickstart.py", tmp_path)
    command = [sys.executable, "-S", "-I", "quickstart.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--output_dir" in done.stdout and "--step" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.py"]


def test_layers_are_named_for_the_embedded_model_alone_and_paths_may_have_spaces():
    own, other = (
        quickstart.stages(model, Path("my runs"), 7, ["--bf16"])
        for model in (quickstart.MODEL.as_posix(), "someone/another-model")
    )
    assert [name for name, command in own.items() if quickstart.LAYERS in command] == ["sft", "reward"]
    assert [name for name, command in own.items() if "--bf16" in command and "7" in command] == ["sft", "reward", "ppo"]
    assert not any(quickstart.LAYERS in command for command in other.values())
    assert {"my runs/sft/final_checkpoint", "my runs/reward/final_checkpoint"} < set(own["ppo"])


def test_commands_are_shown_as_they_can_be_pasted(capfd):
    """In bash, and in PowerShell, which reads backticks and dollars in quotes."""
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", quickstart.LAYERS, "c"]
    assert quickstart.run(*words, capture=True).strip() == str(words[3:])
    shown = capfd.readouterr().out.strip().removeprefix("> ").removeprefix("& ")
    if os.name == "posix":
        assert shlex.split(shown) == words
    assert f'"{quickstart.LAYERS}"' in shown and "`" not in shown and "$" not in shown


@pytest.mark.parametrize("code", [2, 130, 3])
def test_a_command_that_fails_ends_it(code, capfd):
    """2 and 130 are codes of the scripts, which have said why; any other is explained."""
    with pytest.raises(SystemExit) as stop:
        quickstart.run(sys.executable, "-c", f"import sys; print('error: so', file=sys.stderr); sys.exit({code})")
    assert capfd.readouterr().err.strip().splitlines() == ["error: so"]
    assert stop.value.code == code if code != 3 else "exit code 3" in stop.value.code


@pytest.mark.skipif(os.name != "posix", reason="sends the signal that Ctrl-C sends on POSIX")
def test_ctrl_c_leaves_the_stage_time_to_save(tmp_path):
    stage = """if 1:
        import sys, time
        try:
            print("started", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(1)  # longer than subprocess.run would wait before it kills
            print("saved", flush=True)
            sys.exit(130)
    """
    code = f"""if 1:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        sys.path.insert(0, {str(ROOT)!r})
        import quickstart
        quickstart.run(sys.executable, "-c", {stage!r})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    while process.stdout.readline() != "started\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 130


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
    commands, note = [], quickstart.VENV / "quickstart.json"

    def run(*command):
        assert note.is_file() or quickstart.PYTHON.exists()  # what breaks off from here on is known as ours
        commands.append((command[2], "constraints.txt" in command))
        quickstart.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        quickstart.PYTHON.touch()

    def make():
        commands.clear()
        quickstart.make_environment()
        return list(commands)

    monkeypatch.setattr(quickstart, "run", run)
    ours = [("venv", False), ("pip", True)]
    assert make() == ours
    assert make() == []
    Path("constraints.txt").write_text("other==1\n", encoding="utf-8")
    assert make() == ours
    note.write_text('""', encoding="utf-8")  # as an installation that broke off leaves it
    assert make() == ours
    note.unlink()  # as if the user had made .venv
    assert make() == [("pip", False)]


def test_a_second_run_does_again_what_has_changed(folder, monkeypatch):
    done, fails = [], []

    def run(*command, capture=False):
        if capture:
            return "False\n"
        if command[1] in fails:
            raise SystemExit(2)
        done.append(command[1])
        Path("out", outputs[scripts.index(command[1])]).mkdir(parents=True, exist_ok=True)

    def chain(seed):
        done.clear()
        quickstart.run_chain("a/model", Path("out"), seed)
        return list(done)

    def change(path):
        Path(path).write_text("\n", encoding="utf-8")

    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(quickstart, "show", lambda seconds, output_dir: None)
    scripts = [
        "training_sft.py",
        "training_reward_model.py",
        "training_rl.py",
        "merge_with_lora.py",
        "quickstart.py",
        "report.py",
    ]
    outputs = ["sft", "reward", "ppo", "merged", "evaluation.json", "report.html"]
    assert chain(1) == scripts
    assert chain(1) == []
    shutil.rmtree("out/ppo")
    assert chain(1) == scripts[2:3]  # with the same result
    change("data/rl/prompts.jsonl")
    assert chain(1) == scripts[2:]
    change("training_sft.py")
    assert chain(1) == scripts  # what was built on the old SFT model too
    fails.append("training_rl.py")
    with pytest.raises(SystemExit):
        chain(2)
    fails.clear()
    assert chain(2) == scripts[2:]


def test_the_chain_on_a_tiny_model(folder, monkeypatch, capfd):
    """Every stage and the evaluation for real, cut short; in process, where .venv would be used."""
    model = make_model(folder / "model", num_hidden_layers=2)
    short = {
        "training_sft.py": ["--max_samples", "8", "--max_steps", "1", "--batch_size", "2"],
        "training_reward_model.py": ["--max_samples", "8", "--max_steps", "1", "--max_length", "512"],
        "training_rl.py": ["--total_episodes", "16", "--max_prompt_length", "400", "--response_length", "8"],
        "merge_with_lora.py": [],
        "report.py": [],
    }

    def run(python, script, *flags, capture=False):
        if capture:
            return "False\n"
        if script == "quickstart.py":
            return quickstart.evaluate(Path(flags[flags.index("--output_dir") + 1]))
        importlib.import_module(script.removesuffix(".py")).main([*flags, *short[script]])

    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(quickstart, "PROMPTS", 6)
    quickstart.run_chain(model, Path("out"), 5)
    printed = capfd.readouterr().out
    summary = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))

    found = summary["evaluation"]
    assert found["seed"] == 5 and found["length_before"] > 0 and 0 <= found["rule_score_after"] <= 1
    questions = [json.loads(line)["prompt"] for line in Path("data/evaluation/test.jsonl").open(encoding="utf-8")]
    assert [sample["prompt"] for sample in found["samples"]] == questions[:5]
    assert all(sample["after"] in printed for sample in found["samples"])
    assert re.search(r"accuracy of the reward model +[\d.]+ +[\d.]+\nmean reward +[-\d.]+ +[-\d.]+\n", printed)
    assert list(summary["seconds"]) == ["sft", "reward", "ppo", "merge", "evaluation", "report"]
    assert "<html" in Path("out/report.html").read_text(encoding="utf-8") and "report.html" in printed

    quickstart.evaluate(Path("out"))  # the same again gives the same figures
    assert json.loads(Path("out/evaluation.json").read_text(encoding="utf-8")) == found
