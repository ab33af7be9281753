"""What the scripts survive: SIGKILL at any moment, and rows, command lines and checkpoints that nobody meant.

kill         SFT, reward model, PPO and merge are killed at random moments, most of them while they train or save, and
             started again until they end: the weights and the loss lines are those of an uninterrupted run, byte for
             byte. That run is made twice, which must also give the same bytes.
rows         any text, type, nesting and encoding as a data set, with --dry_run
flags        any values for any flags, with --dry_run (merge: without)
checkpoints  directories with missing, cut, swapped and changed files, beside pickles that would write a file if loaded

In the last three every outcome has to be a run or one line that says what is wrong, with nothing written outside
--output_dir and no pickle loaded. Everything runs on the CPU, on models of 60,000 weights.

    python benchmarks/trust.py
    python benchmarks/trust.py --parts rows flags --cases 200
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}

from conftest import make_model, write_rows  # first: it sets the environment that the libraries read when imported
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from measure import environment, write_result

SCRIPTS = {
    "sft": "training_sft",
    "reward": "training_reward_model",
    "ppo": "training_rl",
    "merge": "merge_with_lora",
}
PARTS = ["kill", "rows", "flags", "checkpoints"]


def make_world(folder):
    """What the stages before leave behind, made by the scripts themselves: models, adapters, checkpoints to resume."""
    folder = Path(folder).resolve()
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No idea {i * i}"} for i in range(16)]
    world = {"folder": folder, "data": write_rows(folder / "rows.jsonl", rows)}
    world["base"] = make_model(folder / "base")
    world["sft"] = world["reward"] = world["base"]
    for stage in ("sft", "reward", "ppo"):
        argv = command(stage, world, folder / f"{stage}_run", "--use_lora", "--save_steps", 1)
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(SCRIPTS[stage]).main(argv)
        world[stage] = str(folder / f"{stage}_run" / "final_checkpoint")
        world[f"{stage}_checkpoint"] = str(folder / f"{stage}_run" / "checkpoint-1")
    (folder / "cwd").mkdir()  # where a case works that names a relative --output_dir
    (folder / "cwd" / "notes.txt").touch()  # not empty, so not to be replaced by a model either
    os.chdir(folder / "cwd")
    return world


def command(stage, world, out, *flags):
    """Two short steps of the stage; later flags win."""
    if stage == "merge":
        return [*map(str, ["--adapter_path", world["sft"], "--output_dir", out, *flags])]
    argv = ["--model_path", world["sft" if stage == "ppo" else "base"], "--dataset_name", world["data"]]
    argv += ["--output_dir", out, "--logging_steps", 1, "--learning_rate", 1e-3]
    if stage == "ppo":
        argv += ["--reward_model_path", world["reward"], "--per_device_train_batch_size", 2, "--response_length", 4]
        argv += ["--total_episodes", 4, "--num_ppo_epochs", 1]
    else:
        argv += ["--max_steps", 2]
    return [*map(str, [*argv, *flags])]


# ---------------------------------------------------------------- one case in this process


def list_files(folder, out):
    """{path: (size, time)} of everything in `folder` that is not in `out` or one of its drafts."""
    own = {out, *(out.with_name(f"{out.name}{end}") for end in (".partial", ".old"))}
    paths = (path for path in folder.rglob("*") if not own & {path, *path.parents})
    return {path: (path.stat().st_size, path.stat().st_mtime_ns if path.is_file() else 0) for path in paths}


def run_case(stage, argv, sandbox, out, script=None):
    """(failure or None, exit code, what stderr shows last) of the script as its user runs it.

    stdout takes only what a Windows pipe takes (code page 1252), as print() meets it there."""
    from accelerate.state import AcceleratorState

    script = script or importlib.import_module(SCRIPTS[stage])
    before, environ, code, failure = list_files(sandbox, out), dict(os.environ), 0, None
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            script.run_as_script(lambda: script.main(argv))
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == ROOT]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
        failure = f"{type(error).__name__} in {place}: {' '.join(str(error).split())[:200]}"
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one for its life, a case its own
    os.environ.clear()
    os.environ.update(environ)
    stderr.seek(0)
    lines = stderr.read().strip().splitlines() or [""]
    if code and not (code == 2 and lines[-1].startswith("error: ") and len(lines[-1]) > 10):
        failure = f"exit code {code} without one line that says why: {lines[-1][:200]}"
    after = list_files(sandbox, out)
    if changed := [str(path) for path in {**before, **after} if before.get(path) != after.get(path)]:
        failure = f"written outside --output_dir: {changed[:3]}"
    return failure, code, lines[-1]


def hunt(name, strategy, check, cases, first_seed, failures=None):
    """Run `check(case)` on `cases` cases; it returns what is wrong, or None, and the exit code.

    Without a list `failures` to gather them in, the first one is raised. Returns how many cases there were, and how
    many of them were runs, not errors: with few, the checks behind the first ones were not reached."""
    total = runs = 0
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @seed(first_seed)
    @settings(max_examples=cases, phases=[Phase.generate], **options)  # to make a case small takes minutes
    @given(strategy)
    def run(case):
        nonlocal total, runs
        failure, code = check(case)
        total, runs = total + 1, runs + (not code)
        if failure and failures is None:
            raise AssertionError(f"{name}: {failure}\n{case!r}")
        if failure:
            failures.append((name, failure, repr(case)))

    run()
    return total, runs


# ---------------------------------------------------------------- rows

WILD = st.text(st.characters(), max_size=12)  # also surrogates that stand alone, which JSON can write
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | WILD
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WILD, inner, max_size=3), max_leaves=6
)
TEXT = st.text(max_size=30).map("x{}".format)
TEXTS = {name: st.text(max_size=30).map(f"{name} {{}}".format) for name in ("chosen", "rejected", "response_j")}
CHAT = st.lists(TEXT, min_size=1, max_size=5).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
ODD_CHAT = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | VALUE, "content": TEXT | VALUE},
        optional={"name": VALUE},
    ),
    max_size=4,
)
COLUMNS = {  # the last ones fit no script, or another
    "sft": [("messages",), ("prompt", "chosen"), ("prompt", "response"), ("question", "response_j")],
    "reward": [("prompt", "chosen", "rejected"), ("question", "response_j", "response_k")],
    "ppo": [("prompt",), ("question",), ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")],
}
MISFITS = [(), ("messages",), ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")]
CODECS = ["utf-8"] * 24 + ["utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis"]
SUFFIXES = ["jsonl"] * 24 + ["json", "csv", "parquet", "arrow"]
ROW_FLAGS = {
    "sft": ["--packing", "--train_on_prompt", "--eval_fraction=0.5", "--max_length=9"],
    "reward": ["--use_margin", "--eval_fraction=0.5", "--max_length=20"],
    "ppo": ["--max_prompt_length=20", "--eval_split=train"],
}


@st.composite
def data_files(draw, stage):
    """(flags, suffix, bytes): most often rows with one kind of value per column, at times damaged."""
    columns = {}
    for name in [*draw(st.sampled_from(COLUMNS[stage] * 3 + MISFITS)), *draw(st.lists(WILD, max_size=1))]:
        fitting = CHAT if name == "messages" else st.floats(0, 10) if "score" in name else TEXTS.get(name, TEXT)
        columns[name] = draw(st.sampled_from([fitting] * 24 + [CHAT, ODD_CHAT, VALUE, SCALAR]))
    whole = st.fixed_dictionaries(columns)
    row = draw(st.sampled_from([whole] * 9 + [whole | st.fixed_dictionaries({}, optional=columns), whole | VALUE]))
    escaped = draw(st.booleans())
    text = "\n".join(json.dumps(value, ensure_ascii=escaped) for value in draw(st.lists(row, min_size=1, max_size=4)))
    codec = draw(st.sampled_from(CODECS))
    data = bytearray(text.encode(codec, "surrogatepass" if codec.startswith("utf") else "replace"))
    harm = draw(st.sampled_from(["none"] * 12 + ["cut", "noise"]))
    if harm == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif harm == "noise":
        place = draw(st.integers(0, len(data)))
        data[place:place] = draw(st.binary(max_size=8))
    flags = draw(st.lists(st.sampled_from([*ROW_FLAGS[stage], "--prompt_format=qa", "--max_samples=2"]), max_size=2))
    return flags, draw(st.sampled_from(SUFFIXES)), bytes(data)


def check_rows(stage, world):
    def check(case):
        flags, suffix, data = case
        path, out = world["folder"] / f"hostile.{suffix}", world["folder"] / "out"
        path.write_bytes(data)
        argv = command(stage, world, out, "--dataset_name", path, "--dry_run", *flags)
        failure, code, _ = run_case(stage, argv, world["folder"], out)
        path.unlink()
        return failure or ("a dry run wrote" if out.exists() else None), code

    return check


# ---------------------------------------------------------------- flags

ODD = ["", " ", "-1", "0", "1", "2", "1e400", "1e308", "nan", "inf", "-inf", "9" * 30, "--x", "..", "%s", "{}", "null"]
# No separators: a data set called / would be searched, and a merge into it is not to be tried on this machine.
ARGUMENT = st.sampled_from(ODD) | st.text(st.characters(codec="utf-8", exclude_characters="\0/\\"), max_size=12)


@st.composite
def command_lines(draw, stage):
    """Up to four flags of the script, with values that fit, and values that do not."""
    script = importlib.import_module(SCRIPTS[stage])
    actions = [action for action in script.build_parser()._actions if action.dest != "help"]
    configs = {"sft": "SFTConfig", "reward": "RewardConfig"}
    config = script.trl_ppo.PPOConfig if stage == "ppo" else getattr(script, configs.get(stage, ""), None)
    argv = []
    for action in draw(st.lists(st.sampled_from(actions), min_size=1, max_size=4)):
        flag = draw(st.sampled_from(action.option_strings))
        if action.nargs == 0:
            argv.append(flag)
            continue
        fitting = st.sampled_from(action.choices) if action.choices else ARGUMENT
        if action.type:
            fitting = st.integers(-1, 70).map(str) | st.floats(0, 1).map(str)
        if action.dest == "set":
            name = st.sampled_from(sorted(config.__dataclass_fields__)) | ARGUMENT
            value = ARGUMENT | VALUE.map(json.dumps) | st.sampled_from(["true", "0.1", "cpu", "no", "epoch", "auto"])
            fitting = st.builds("{}={}".format, name, value)
        value = fitting | fitting | ARGUMENT
        if action.nargs in ("+", "?"):
            argv += [
                flag,
                *draw(st.lists(value, min_size=action.nargs == "+", max_size=2 if action.nargs == "+" else 1)),
            ]
        else:
            argv.append(f"{flag}={draw(value)}")
    return argv


def check_flags(stage, world):
    def check(extra):
        out = world["folder"] / "out"
        argv = command(stage, world, out, "--no_verify" if stage == "merge" else "--dry_run", *extra)
        named = [text.partition("=")[2] for text in extra if text.startswith("--output_dir=")]
        out = (Path.cwd() / named[-1]).resolve() if named else out
        existed = out.exists()
        failure, code, _ = run_case(stage, argv, world["folder"], out)
        if stage != "merge" and not existed and out.exists():
            failure = failure or "a dry run wrote"
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        return failure, code

    return check


# ---------------------------------------------------------------- checkpoints

PICKLES = "pytorch_model.bin adapter_model.bin optimizer.pt scheduler.pt scaler.pt rng_state.pth training_args.bin before_update.pt"
TARGETS = [  # stage, the flag that gets the directory, the directory
    ("sft", "--model_path", "base"),
    ("sft", "--model_path", "sft"),
    ("sft", "--resume_from_checkpoint", "sft_checkpoint"),
    ("reward", "--model_path", "base"),
    ("reward", "--model_path", "reward"),
    ("reward", "--resume_from_checkpoint", "reward_checkpoint"),
    ("ppo", "--model_path", "base"),
    ("ppo", "--model_path", "sft"),
    ("ppo", "--reward_model_path", "reward"),
    ("ppo", "--value_model_path", "reward"),
    ("ppo", "--resume_from_checkpoint", "ppo_checkpoint"),
    ("merge", "--adapter_path", "sft"),
    ("merge", "--adapter_path", "reward"),
    ("merge", "--base_model_path", "base"),
]
PLACES = ["../evil", "../../evil", "../../../evil", "sandbox/evil", "~/evil", "..", ".", "nobody/nothing"]
# Numbers stay small: a model of 10**9 layers is a model, and this machine's memory is not what is tried here.
NODE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 600) | st.floats() | WILD | st.sampled_from(PLACES),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WILD, inner, max_size=2),
    max_leaves=3,
)
CHANGES = st.one_of(
    st.tuples(st.sampled_from(["drop", "empty", "directory", "random"]), st.integers(0, 99), st.none()),
    st.tuples(st.just("cut"), st.integers(0, 99), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.integers(0, 99), st.floats(0, 1)),
    st.tuples(st.just("swap"), st.integers(0, 99), st.integers(0, 99)),
    *[st.tuples(st.just("json"), st.integers(0, 99), st.tuples(st.integers(0, 999), NODE))] * 4,
    st.tuples(st.sampled_from(["only pickles", "index", "template", "base path"]), st.integers(0, 0), st.sampled_from(PLACES)),
)  # fmt: skip


class Bomb:
    """Makes the file `path` where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def nodes(value):
    """(container, key) of everything in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for key, inner in pairs for pair in [(value, key), *nodes(inner)]]


def damage(folder, change):
    """Apply one of CHANGES to a directory."""
    kind, index, value = change
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    if kind in ("json", "base path"):
        files = [path for path in files if path.suffix == ".json"]
    if not files:
        return
    path = files[index % len(files)]
    data = bytearray(path.read_bytes())
    if kind in ("drop", "directory"):
        path.unlink()
        if kind == "directory":
            path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "random":
        path.write_bytes(random.Random(index).randbytes(300))
    elif kind == "cut":
        path.write_bytes(data[: int(value * len(data))])
    elif kind == "flip" and data:
        data[int(value * (len(data) - 1))] ^= 255
        path.write_bytes(data)
    elif kind == "swap":
        path.write_bytes(files[value % len(files)].read_bytes())
    elif kind == "json":
        with contextlib.suppress(ValueError):  # damaged by the change before
            loaded = json.loads(data)
            if places := nodes(loaded):
                container, key = places[value[0] % len(places)]
                container[key] = value[1]
                path.write_text(json.dumps(loaded), encoding="utf-8")
    elif kind == "only pickles":
        for path in weights:
            path.unlink()
    elif kind == "index":
        for path in weights:
            index = {"metadata": {}, "weight_map": {"lm_head.weight": f"{value}.safetensors"}}
            path.with_name(f"{path.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
            path.unlink()
    elif kind == "template" and (folder / "tokenizer_config.json").is_file():
        # Where they are saved, each template becomes a file of its own, with its name.
        template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
        templates = [{"name": name, "template": template} for name in ("default", value, f"/{value}")]
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = folder / "tokenizer_config.json"
        with contextlib.suppress(ValueError):
            text = json.dumps({**json.loads(config.read_bytes()), "chat_template": templates})
            config.write_text(text, encoding="utf-8")
    elif kind == "base path":
        for path in files:
            with contextlib.suppress(ValueError):
                loaded = json.loads(path.read_bytes())
                if isinstance(loaded, dict) and {"base_model_name_or_path", "_name_or_path"} & set(loaded):
                    loaded |= {"base_model_name_or_path": value, "_name_or_path": value}
                    path.write_text(json.dumps(loaded), encoding="utf-8")


def directories(stage):
    """(target, changes, whether a checkpoint to resume from is in --output_dir, whether pickles lie beside)."""
    targets = st.sampled_from([target[1:] for target in TARGETS if target[0] == stage])
    return st.tuples(targets, st.lists(CHANGES, min_size=1, max_size=2), st.booleans(), st.booleans())


def check_directory(stage, world):
    import torch

    def check(case):
        (flag, name), changes, inside, planted = case
        folder = world["folder"]
        out, victim, bomb = folder / "out", folder / "victim", folder / "bomb"
        resume = flag == "--resume_from_checkpoint"
        victim = out / "checkpoint-1" if resume and inside else victim
        shutil.copytree(world[name], victim)
        for change in changes:
            damage(victim, change)
        for file in PICKLES.split() if planted else ():
            if not (victim / file).exists():
                torch.save(Bomb(bomb), victim / file)  # a whole file of the format, but for what it does
        extra = [] if stage == "merge" else ["--use_lora"]
        extra += ["--resume_from_checkpoint", *([] if inside else [victim])] if resume else [flag, victim]
        failure, code, _ = run_case(stage, command(stage, world, out, *extra), folder, out)
        if bomb.exists():
            failure = "a pickle was loaded"
            bomb.unlink()
        for path in (out, folder / "victim"):
            shutil.rmtree(path, ignore_errors=True)
        return failure, code

    return check


# ---------------------------------------------------------------- kill

STEPS, SAVE = 24, 2  # optimizer steps of a run, and between two checkpoints
ROUND = 5  # kills of one run, before it may end
MODES = {  # the runs that are killed in turns
    "sft": ["--gradient_accumulation_steps=2", "--use_lora --eval_fraction=0.2 --eval_steps=5"],
    "reward": ["--use_lora --eval_fraction=0.2 --eval_steps=5", ""],
    "ppo": ["--eval_steps=5 --target_kl=0.1", "--normalize_reward --max_kl=1000 --lr_scheduler_type=cosine"],
    "merge": ["--max_shard_size=100KB", "--dtype=bfloat16"],
}


class Run:
    """A stage as a process that is started, killed and started again in one directory."""

    def __init__(self, stage, world, mode, place, needed=()):
        place.mkdir(exist_ok=True)
        self.stage, self.out, self.cache = stage, place / "out", place / "cache"
        self.final = self.out if stage == "merge" else self.out / "final_checkpoint"
        flags = MODES[stage][mode].split()
        if stage != "merge":
            flags += ["--save_steps", SAVE, "--save_total_limit", 2, "--seed", 3]
            flags += ["--total_episodes", 2 * STEPS] if stage == "ppo" else ["--max_steps", STEPS]
        self.argv = command(stage, world, self.out, *flags)
        self.needed = set(needed) - {"run.json"}  # which comes after the file that makes a checkpoint complete

    def start(self):
        again = "--overwrite_output_dir" if self.stage == "merge" else "--resume_from_checkpoint"
        argv = [*self.argv, *([again] if self.out.exists() else [])]
        with open(self.cache.with_suffix(".log"), "w", encoding="utf-8") as log:
            script = [sys.executable, str(ROOT / f"{SCRIPTS[self.stage]}.py"), *argv]
            environ = {**os.environ, "HF_DATASETS_CACHE": str(self.cache), "PYTHONIOENCODING": "utf-8"}
            self.before, self.begun = self.files(), time.monotonic()
            self.process = subprocess.Popen(script, stdout=log, stderr=subprocess.STDOUT, env=environ)

    def end(self):
        """Wait for the end, which should be a good one."""
        if self.process.wait(timeout=600):
            raise AssertionError(self.cache.with_suffix(".log").read_text(encoding="utf-8")[-600:])
        self.check_final()

    def files(self):
        """The times of what is in the output directory, and beside it while it is made; None in the middle of a move."""
        with contextlib.suppress(FileNotFoundError):
            places = [*self.out.parent.glob("out*"), *self.out.glob("*")]
            return {(path, path.stat().st_mtime_ns) for path in places}

    def wait_until(self, condition):
        """Seconds from the start until the process has begun to write and the condition holds, or it has ended."""
        while self.process.poll() is None and not (self.files() != self.before and condition()):
            if time.monotonic() - self.begun > 600:
                self.process.kill()
                raise AssertionError("the run hangs")
            time.sleep(0.002)
        return time.monotonic() - self.begun

    def checkpoints(self):
        """{N: file names} of every checkpoint-N, complete or not."""
        found = [path for path in self.out.glob("checkpoint-*") if path.name[11:].isdigit()]
        return {int(path.name[11:]): {file.name for file in path.iterdir()} for path in found}

    def newest(self):
        return max(
            (int(path.name[11:]) for path in self.out.glob("checkpoint-*") if path.name[11:].isdigit()), default=0
        )

    def check_final(self):
        """Where the result is there, it is a whole one."""
        from safetensors.torch import load_file

        if not self.final.exists():
            return
        names = {path.name for path in self.final.iterdir()}
        assert names & {"config.json", "adapter_config.json"} and {"run.json", "tokenizer.json"} <= names, names
        for path in self.final.rglob("*.json"):
            value = json.loads(path.read_text(encoding="utf-8"))
            assert not path.name.endswith(".index.json") or set(value["weight_map"].values()) <= names
        assert [load_file(path) for path in self.final.rglob("*.safetensors")], "no weights"

    def hit(self):
        """What a kill hit, by what it left; raises where something half done is, or would be taken for whole."""
        import training_sft

        self.check_final()
        draft = self.final.with_name(f"{self.final.name}.partial").exists()
        if self.stage == "merge":
            return "saving" if draft else "finished" if self.final.exists() else "starting"
        complete = [path for path, step in training_sft.find_checkpoints(self.out).items() if step is not None]
        picked, found = next(iter(complete), None), self.checkpoints()
        if picked:
            lacking = self.needed - found[int(picked.name[11:])]
            assert not lacking, f"{picked.name} would be picked up and lacks {lacking}"
        if self.final.exists():
            return "finished"
        if draft or len(found) > 2 or any(self.needed - names for names in found.values()):
            return "saving"
        return "training" if found else "starting"

    def outcome(self):
        """The bytes of all weights, and the metrics of each step but for times and what is counted from a start."""
        paths = sorted(self.final.rglob("*.safetensors"))
        weights = {str(path.relative_to(self.final)): path.read_bytes() for path in paths}
        if self.stage == "merge":
            return weights, None
        lines = map(json.loads, (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        counted = ("speed/", "eval_runtime", "eval_samples_per", "eval_steps_per", "num_tokens", "eval_num_tokens")
        lines = [line for line in lines if "train_runtime" not in line]
        lines = [{key: value for key, value in line.items() if not key.startswith(counted)} for line in lines]
        steps = [line["step"] for line in lines if "loss" in line or "loss/policy" in line]
        assert steps == list(range(1, STEPS + 1)), f"steps in metrics.jsonl: {steps}"
        return weights, lines


def kill_stage(stage, world, kills, chance, failures):
    """Kill a stage `kills` times; returns the row of the table."""
    counts, done, number, begun = (
        dict.fromkeys(("starting", "training", "saving", "finished"), 0),
        0,
        0,
        time.monotonic(),
    )
    folder, whole, seconds, needed = world["folder"].parent / "kill", {}, {}, {}
    folder.mkdir(exist_ok=True)
    for mode in range(min(2, math.ceil(kills / ROUND))):
        for name in ("whole", "again"):
            run = Run(stage, world, mode, folder / f"{stage}_{mode}_{name}")
            run.start()
            startup = run.wait_until(lambda: True)
            seconds[mode] = startup, run.wait_until(run.final.exists) - startup
            run.end()
            needed[mode] = run.checkpoints().get(STEPS, ())
            if mode in whole and run.outcome() != whole[mode]:
                failures.append((f"kill {stage}", "two runs of one command differ", MODES[stage][mode]))
            whole[mode] = run.outcome()
    while done < kills and number < 4 * kills:
        mode, number = number % 2 if len(whole) > 1 else 0, number + 1
        # A merge replaces what the round before has left, so that this is killed too.
        place = folder / (f"{stage}_{mode}" if stage == "merge" else f"{stage}_{mode}_{number}")
        run = Run(stage, world, mode, place, needed[mode])
        startup, rest = seconds[mode]
        try:
            # Before anything is written, at the beginning, or from a checkpoint on.
            for target in sorted(chance.sample(range(-SAVE, STEPS + 1, SAVE), min(ROUND, kills - done))):
                run.start()
                if target < 0:
                    time.sleep(chance.random() * startup)
                else:
                    run.wait_until(lambda: stage == "merge" or run.newest() >= target)
                    # Soon after the checkpoint's directory has appeared, more often than not: while it is filled.
                    time.sleep(
                        chance.random() * rest if stage == "merge" else chance.random() ** 3 * rest * SAVE / STEPS
                    )
                if run.process.poll() is not None:
                    break  # it came to its end before
                run.process.kill()
                run.process.wait()
                done += 1
                hit = run.hit()
                counts["starting" if target < 0 else hit] += 1
            else:
                run.start()
            run.end()
            if run.outcome() != whole[mode]:
                raise AssertionError("the weights or metrics differ from those of a run that was not killed")
        except (AssertionError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            failures.append((f"kill {stage}", f"{type(error).__name__}: {error}", f"round {number}: {run.argv}"))
    return {"cases": done, **counts, "seconds": time.monotonic() - begun}


# ---------------------------------------------------------------- all of it


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--stages", nargs="+", choices=SCRIPTS, default=[*SCRIPTS])
    parser.add_argument("--kills", type=int, default=20, help="of each script")
    parser.add_argument("--cases", type=int, default=2000, help="of rows, flags and checkpoints together")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_hunts(args, world, failures):
    """Half of the cases are rows, three tenths flags, a fifth (each of which trains) checkpoints."""
    share = {part: weight for part, weight in zip(PARTS[1:], (5, 3, 2)) if part in args.parts}
    for part in share:
        for stage in [stage for stage in args.stages if part != "rows" or stage != "merge"]:
            number = math.ceil(args.cases * share[part] / sum(share.values()) / (3 if part == "rows" else 4))
            begun = time.monotonic()
            strategy, check = HUNTS[part]
            total, runs = hunt(f"{part} {stage}", strategy(stage), check(stage, world), number, args.seed, failures)
            yield f"{part} {stage}", {"cases": total, "runs": runs, "seconds": time.monotonic() - begun}


HUNTS = {
    "rows": (data_files, check_rows),
    "flags": (command_lines, check_flags),
    "checkpoints": (directories, check_directory),
}


def main():
    import datasets

    args = build_parser().parse_args()
    table, failures = {}, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        world = make_world(Path(folder) / "sandbox")
        if "kill" in args.parts:
            for stage in args.stages:
                table[f"kill {stage}"] = kill_stage(
                    stage, world, args.kills, random.Random(f"{args.seed} {stage}"), failures
                )
        table |= dict(run_hunts(args, world, failures))
        os.chdir(ROOT)  # Windows removes no directory that a process is in
    for name, row in table.items():
        row["failures"] = sum(failure[0] == name for failure in failures)
        figures = ", ".join(f"{key} {value:.0f}" for key, value in row.items())
        print(f"{name:20} {figures}")
    kinds = {}
    for name, failure, case in failures:
        kinds.setdefault((name, failure[:100]), []).append((failure, case))
    for (name, _), found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        failure, case = min(found, key=lambda pair: len(pair[1]))
        print(f"\n{len(found)} of {name}: {failure}\n    {case[:1000]}")
    environment_ = {**environment(), "arguments": vars(args)}
    write_result(
        "trust", {**environment_, "table": table, "failures": [list(map(str, failure)) for failure in failures]}
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
