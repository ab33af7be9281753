"""Input that nobody meant: a part of benchmarks/trust.py, and whether that sees what it looks for."""

import json
import os
import pickle
import sys
import types

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import trust


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models and adapters in a directory of their own, which is also the working directory."""
    before = os.getcwd()
    yield trust.make_world(tmp_path_factory.mktemp("hostile") / "sandbox")
    os.chdir(before)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_rows(world, stage):
    trust.hunt(f"rows {stage}", trust.data_files(stage), trust.check_rows(stage, world), 50, 0)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "merge"])
def test_flags(world, stage):
    cases = 5 if stage == "merge" else 50  # it has no dry run
    trust.hunt(f"flags {stage}", trust.command_lines(stage), trust.check_flags(stage, world), cases, 0)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "merge"])
def test_checkpoints(world, stage):
    trust.hunt(f"checkpoints {stage}", trust.directories(stage), trust.check_directory(stage, world), 8, 0)


@pytest.fixture
def failure_of(world, merge, monkeypatch):
    """What the harness says about a merge whose main() is `function`."""

    def failure_of(function):
        script = types.SimpleNamespace(run_as_script=merge.run_as_script, main=function)
        out = world["folder"] / "out"
        return trust.run_case("merge", [], world["folder"], out, script)[0]

    return failure_of


def test_it_sees_tracebacks_and_unclear_ends(failure_of, merge):
    def user_error(argv):
        raise merge.UserError("first line\nsecond line")

    def type_error(argv):
        raise TypeError("not for users")

    assert failure_of(lambda argv: None) is None
    assert failure_of(user_error) is None  # run_as_script makes it one line
    assert failure_of(type_error).startswith("TypeError")
    assert "exit code 1 without one line" in failure_of(lambda argv: sys.exit(1))
    assert failure_of(lambda argv: sys.exit("error: text, but exit code 1"))
    assert failure_of(lambda argv: print("error: \n\nthe reason", file=sys.stderr) or sys.exit(2))


def test_it_sees_what_is_written_elsewhere(failure_of, world):
    evil = world["folder"] / "evil"
    assert "evil" in failure_of(lambda argv: evil.touch())
    assert "evil" in failure_of(lambda argv: evil.unlink())
    assert "rows.jsonl" in failure_of(lambda argv: (world["folder"] / "rows.jsonl").touch())
    assert failure_of(lambda argv: (world["folder"] / "out.partial").mkdir()) is None
    (world["folder"] / "out.partial").rmdir()


def test_it_sees_a_pickle_that_is_loaded(world, sft, monkeypatch):
    load = sft.torch.load
    files = sorted(path.name for path in trust.Path(world["sft_checkpoint"]).iterdir())
    drop = ("drop", files.index("rng_state.pth"), None)  # so that one of the pickles takes its place
    case = (("--resume_from_checkpoint", "sft_checkpoint"), [drop], False, True)
    check = trust.check_directory("sft", world)
    assert check(case) == (None, 2)
    monkeypatch.setattr(sft.torch, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False}))
    assert check(case)[0] == "a pickle was loaded"


def test_it_sees_a_result_that_is_not_whole(world, tmp_path):
    run = trust.Run("sft", world, 1, tmp_path)
    run.check_final()  # not there: that is fine
    whole = trust.Path(world["sft"])
    trust.shutil.copytree(whole, run.final)
    run.check_final()
    for name in ("run.json", "adapter_config.json", "adapter_model.safetensors"):
        data = (whole / name).read_bytes()
        (run.final / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(Exception, match="(?i)json|char|line|safetensors|header|incomplete|buffer"):
            run.check_final()
        (run.final / name).write_bytes(data)


def test_it_sees_a_checkpoint_that_would_be_taken_for_whole(world, tmp_path):
    needed = [path.name for path in trust.Path(world["sft_checkpoint"]).iterdir()]
    run = trust.Run("sft", world, 1, tmp_path, needed)
    checkpoint = run.out / "checkpoint-7"
    trust.shutil.copytree(world["sft_checkpoint"], checkpoint)
    assert run.hit() == "training"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    (checkpoint / "trainer_state.json").unlink()
    assert run.hit() == "saving"
    (checkpoint / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(AssertionError, match="checkpoint-7 would be picked up and lacks {'optimizer.pt'}"):
        run.hit()


def test_the_pickles_would_write(tmp_path):
    pickle.loads(pickle.dumps(trust.Bomb(tmp_path / "bomb")))
    assert (tmp_path / "bomb").exists()
