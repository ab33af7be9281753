"""A resumed run is the run that it goes on with: all of its weights, under the names that transformers gives them on disk,
and the same flags; what cannot be resumed is refused, and nothing of another run is dropped unasked."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import make_tokenizer, run
from test_errors import TRAINING, command, models, refuse, snapshot  # noqa: F401 - fixtures

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 400,
}
FAMILIES = {
    "gpt_neox": {"use_cache": True, **SIZES},  # its head is saved as embed_out
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, **SIZES},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", TRAINING)
def test_weights_that_are_saved_under_other_names_are_taken_back(request, models, tmp_path, stage, family):  # noqa: F811
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**FAMILIES[family], initializer_range=0.1, pad_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    script = request.getfixturevalue(stage)
    flags = ["--model_path", tmp_path / "base", "--save_steps", 2, "--save_total_limit", 9, "--learning_rate", 1e-3]
    argv = command(stage, models, tmp_path, *flags)
    run(script, *argv)
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out, whole)
    for name in ("final_checkpoint", "checkpoint-4"):
        shutil.rmtree(out / name)
    run(script, *argv, "--resume_from_checkpoint")
    for path in whole.glob("final_checkpoint/**/*.safetensors"):
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes(), path.name
    (changed,) = (whole / "final_checkpoint").glob("*.safetensors")
    assert changed.read_bytes() != (whole / "checkpoint-2" / changed.name).read_bytes()


@pytest.fixture
def finished(request, models, tmp_path):  # noqa: F811
    """finished(stage, *flags) is the directory of a run of four steps."""

    def finished(stage, *flags):
        run(request.getfixturevalue(stage), *command(stage, models, tmp_path, "--save_steps", 2, *flags))
        return tmp_path / "out"

    return finished


@pytest.mark.parametrize("stage", TRAINING)
def test_what_would_be_another_run_is_refused(refuse, finished, tmp_path, stage):  # noqa: F811
    """Adapters of other shapes or scales, a weight decay that the optimizer's state would overrule, other rows by another
    number of processes; a checkpoint that is taken to the directory of another run."""
    out = finished(stage, "--use_lora", "--lora_r", 4)
    resume = ["--use_lora", "--lora_r", 4, "--resume_from_checkpoint"]
    refuse(stage, r"--lora_r 8 \(was 4\)", *resume, "--lora_r", 8)
    refuse(stage, r"--lora_alpha 64.0 \(was None\)", *resume, "--lora_alpha", 64)
    refuse(stage, r"--lora_target_modules .*q_proj", *resume, "--lora_target_modules", "q_proj")
    refuse(stage, r"--weight_decay 0.1 \(was 0.0\)", *resume, "--weight_decay", 0.1)
    shutil.copytree(out, tmp_path / "other")
    other = ["--resume_from_checkpoint", tmp_path / "other" / "checkpoint-2"]
    refuse(stage, "out holds another run; --overwrite_output_dir drops it", *resume[:-1], *other)
    record = out / "checkpoint-4" / "run.json"
    run_of_two = json.loads(record.read_text(encoding="utf-8"))
    run_of_two["arguments"]["processes"] = 2
    record.write_text(json.dumps(run_of_two), encoding="utf-8")
    refuse(stage, r"--processes 1 \(was 2\)", *resume)


@pytest.mark.parametrize("stage", TRAINING)
def test_the_model_that_a_run_begins_with_is_not_overwritten_by_it(request, refuse, finished, stage):  # noqa: F811
    out = finished(stage, "--use_lora")
    flags = ["--model_path", out / "final_checkpoint", "--overwrite_output_dir"]
    if stage == "rl":
        run_file = out / "final_checkpoint" / "run.json"
        run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"stage": "sft"}))
    refuse(stage, "--model_path .*final_checkpoint lies in --output_dir", *flags)


@pytest.mark.parametrize("stage", TRAINING)
def test_only_checkpoints_of_trainer_give_way(request, models, finished, tmp_path, stage):  # noqa: F811
    """A resumed run drops incomplete checkpoints, and no file or directory that only begins as they do."""
    out = finished(stage, "--use_lora")
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-best" / "mine").write_text("x")
    (out / "checkpoint-3.pt").write_text("x")
    (out / "checkpoint-9").mkdir()
    more = ["--total_episodes", 6] if stage == "rl" else ["--max_steps", 6]
    argv = command(stage, models, tmp_path, "--use_lora", "--resume_from_checkpoint", *more)
    run(request.getfixturevalue(stage), *argv)
    assert (out / "checkpoint-best" / "mine").is_file() and (out / "checkpoint-3.pt").is_file()
    assert not (out / "checkpoint-9").exists()


def test_the_price_of_the_kl_is_that_of_the_flag(rl, models, finished, tmp_path):  # noqa: F811
    """README's remedy, a higher --kl_coef, works on a resumed run, where --target_kl does not adapt it."""
    out = finished("rl", "--use_lora")
    argv = command("rl", models, tmp_path, "--use_lora", "--resume_from_checkpoint", "--total_episodes", 6)
    printed, _ = run(rl, *argv, "--kl_coef", 0.5)
    assert "--kl_coef 0.5 (was 0.05)" in printed
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    prices = [line["objective/kl_coef"] for line in lines if "objective/kl_coef" in line]
    assert prices == [0.05] * 4 + [0.5] * 2


def test_the_best_policy_of_steps_that_are_dropped_goes_with_them(rl, models, tmp_path):  # noqa: F811
    """And the price of the KL is in the unit of the score, also where the reward is normalized."""
    rules = tmp_path / "rules_that_rise.py"
    rules.write_text(
        "calls = []\ndef rise(prompts, responses):\n    calls.append(0)\n    return [100.0 * len(calls)] * len(responses)\n"
    )
    flags = ["--use_lora", "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 9]
    argv = command("rl", models, tmp_path, *flags)
    argv[argv.index("--reward_function") + 1] = f"{rules}:rise"
    run(rl, *argv)
    best = tmp_path / "out" / "best_checkpoint" / "run.json"
    assert json.loads(best.read_text())["metrics"]["step"] == 4
    again = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2", "--overwrite_output_dir"]
    out, _ = run(rl, *argv, *again, "--total_episodes", 3)
    metrics = json.loads(best.read_text())["metrics"]
    assert metrics["step"] == 3 and "best_checkpoint is of update 3" in out
    trainer = type("trainer", (), {"state": None, "latest": {"objective/kl": 2.0}, "args": None})()
    trainer.ppo_state = {"kl_coef": 0.5, "reward_std": 10.0}
    trainer.state = type("state", (), {"log_history": [], "global_step": 1})
    trainer.args = type("args", (), {"output_dir": str(tmp_path / "none")})
    trainer.is_world_process_zero = lambda: False
    figures = {"eval_policy_score": 3.0}
    rl.PPOTrainer.keep_best(trainer, figures)
    assert figures["eval_quality"] == 3.0 - 0.5 * 2.0 * 10.0
