"""What the scripts share about going on with a run: where it had ended already, and what it must not touch."""

import json
import shutil

import pytest
from conftest import write_rows
from safetensors.torch import load_file

FLAGS = "--use_lora --max_steps 5 --save_steps 5 --learning_rate 1e-2 --lr_scheduler_type constant".split()


@pytest.fixture(params=["sft", "reward"])
def stage(request, llama, tmp_path):
    """(script, command): five steps of two rows in a data set of sixteen, so that they end in the middle of a pass."""
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}.", "rejected": f"bad {i * i}"} for i in range(16)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    command = ["--model_path", llama, "--dataset_name", "json", "--subset", str(tmp_path / "data"), *FLAGS]
    command += ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out")]
    return request.getfixturevalue(request.param), command


def test_a_run_that_had_taken_its_last_step_takes_no_other(stage, tmp_path):
    script, command = stage
    script.main(command)
    final = tmp_path / "out" / "final_checkpoint"
    before = load_file(final / "adapter_model.safetensors")
    shutil.rmtree(final)
    script.main([*command, "--resume_from_checkpoint"])
    after = load_file(final / "adapter_model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]


def test_a_later_checkpoint_is_not_dropped_unasked(stage, tmp_path):
    script, command = stage
    command[command.index("--save_steps") + 1] = "2"
    script.main(command)  # leaves checkpoint-4 and checkpoint-5
    out = tmp_path / "out"
    resume = ["--resume_from_checkpoint", str(out / "checkpoint-4")]
    with pytest.raises(script.UserError, match="checkpoint-5 is later; --overwrite_output_dir drops it"):
        script.main([*command, *resume])
    assert (out / "checkpoint-5" / "trainer_state.json").is_file()
    script.main([*command, *resume, "--overwrite_output_dir"])
    assert json.loads((out / "checkpoint-5" / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 5


def test_a_checkpoint_of_another_stage_is_refused(stage, tmp_path):
    script, command = stage
    script.main(command)
    record = tmp_path / "out" / "checkpoint-5" / "run.json"
    record.write_text(json.dumps({"stage": "rl"}), encoding="utf-8")
    with pytest.raises(script.UserError, match="checkpoint-5 is of the stage 'rl'"):
        script.main([*command, "--resume_from_checkpoint"])


def test_a_metrics_line_that_was_cut_off_is_dropped(stage, tmp_path):
    script, command = stage
    script.main([*command, "--logging_steps", "1"])
    shutil.rmtree(tmp_path / "out" / "final_checkpoint")
    metrics = tmp_path / "out" / "metrics.jsonl"

    def steps():
        """Without the line about the whole run, which is about one call of train()."""
        rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
        return [row["step"] for row in rows if "train_runtime" not in row]

    before = steps()
    with open(metrics, "a", encoding="utf-8") as file:
        file.write('{"step": 5, "text": "ends like an object}')
    script.main([*command, "--resume_from_checkpoint"])
    assert steps() == before == [1, 2, 3, 4, 5]


def test_an_error_while_publishing_leaves_nothing(sft, tmp_path):
    with pytest.raises(ZeroDivisionError), sft.publish(tmp_path / "final") as draft:
        (draft / "half").touch()
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_what_was_logged_after_the_last_save_is_not_there_twice(sft, llama, tmp_path):
    """Killed between the evaluation at the end and final_checkpoint/: the evaluation is made again, and logged once."""
    write_rows(tmp_path / "data" / "train.jsonl", [{"prompt": f"q {i}", "response": f"a {i}."} for i in range(16)])
    command = ["--model_path", llama, "--dataset_name", "json", "--subset", str(tmp_path / "data"), *FLAGS]
    command += ["--output_dir", str(tmp_path / "out"), "--eval_fraction", "0.25", "--logging_steps", "1"]

    def logged():
        lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [(row["step"], "eval_loss" in row) for row in map(json.loads, lines) if "train_runtime" not in row]

    sft.main(command)
    before = logged()
    assert before == [(step, False) for step in range(1, 6)] + [(5, True)]
    shutil.rmtree(tmp_path / "out" / "final_checkpoint")
    sft.main([*command, "--resume_from_checkpoint"])
    assert logged() == before


def test_flags_that_change_on_the_way(stage, tmp_path, capsys):
    """The learning rate stands in the optimizer's state, and stays; how often to log does not."""
    script, command = stage
    command[command.index("--save_steps") + 1] = "2"
    script.main([*command, "--logging_steps", "100"])
    changed = ["--learning_rate", "5", "--logging_steps", "1", "--overwrite_output_dir"]
    script.main([*command, *changed, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-4")])
    assert "--learning_rate 5.0: not used, the checkpoint goes on with 0.01" in capsys.readouterr().out
    run = json.loads((tmp_path / "out" / "final_checkpoint" / "run.json").read_text(encoding="utf-8"))
    assert run["arguments"]["learning_rate"] == 0.01
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "loss" in row] == [5]
