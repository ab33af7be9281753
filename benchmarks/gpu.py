"""Everything that is measured on a card, in one command: do the scripts run there, in how much memory, how fast.

    python benchmarks/gpu.py                        # 8 minutes at most; appends to benchmarks/results/gpu.json
    python benchmarks/gpu.py --minutes 20 --shape llama-3.2-1b --out results.json
    python benchmarks/gpu.py --steps decode sft     # some of it
    python benchmarks/gpu.py --dry_run              # all of it on the CPU, with a tiny model: does it still work?

No network: the weights are random (made on the card, written once), the tokenizer has a token for each byte, and rows
are as long as those in data/. Each step runs in a process of its own and ends in time, and what it found is in the file
at once; a step that fails or is not possible here says why, and the others go on.

MFU is the floating-point operations that the training needs, over seconds times the card's peak in dense bfloat16
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B). For each token a weight takes two operations forward, two backward
to the activations and two to itself (Kaplan et al. 2020, arXiv:2001.08361, section 2.1): 6 N for N trained weights, 4 N
for N frozen ones and 6 for each of an adapter's. The head counts where its logits are needed. Attention scores are left
out (with LoRA 8% more at 3B and 2,048 tokens), and what gradient checkpointing computes again; HFU has that, 2 N more.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from decode import time_decoding
from measure import clock_steps, environment, peak_memory
from ppo_memory import SHAPES, WAYS, compute, count_weights, make_models, run_way, write_prompts
from sft import write_answers

# TFLOP/s in dense bfloat16 with float32 sums, of NVIDIA's data sheets; the first name that the card's name contains
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H200": 989, "H100": 989, "A100": 312, "L40S": 362,
    "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
# What a 3B on a card should do: (step, figure): (at most or at least, value)
BARS = {
    ("memory/bf16 checkpointing", "peak_gb"): ("at most", 9.0),
    ("memory/4bit checkpointing", "peak_gb"): ("at most", 5.0),
    **{(f"memory/{way}", "off_by"): ("at most", 0.15) for way in ("bf16", "4bit")},
    **{(f"memory/{way} checkpointing", "off_by"): ("at most", 0.15) for way in ("bf16", "4bit")},
    ("speed/stock", "ours_to_stock"): ("at least", 3.0),
    ("decode", "ratio"): ("at most", 1.15),
    **{(f"sft/{kernels}", "mfu"): ("at least", 0.45) for kernels in ("sdpa", "flash", "liger")},
}
BARS_ARE_FOR = "llama-3.2-3b"
GB = 2**30 / 1e9  # of the bytes that peak_memory counts in


def sizes(dry_run):
    """How much of everything; tokens are those of a text."""
    return SimpleNamespace(
        prompt=32 if dry_run else 512,
        response=4 if dry_run else 128,
        accumulation=2 if dry_run else 8,
        memory_updates=1 if dry_run else 2,  # the second one samples beside AdamW's moments
        speed_updates=2,  # the first one loads and chooses kernels
        decoded=4 if dry_run else 48,
        batch=2,
        length=64 if dry_run else 2048,
        steps=3 if dry_run else 10,
        data_batch=4 if dry_run else 16,
        data_steps=3 if dry_run else 24,
        warm_up=1 if dry_run else 3,  # steps in which kernels are still loaded and chosen
    )


# ---- the steps; each notes figures by `note`, knows the earlier steps' by `found`, and runs in a process of its own ----


def look_around(args, note, found):
    """The card, its driver, and the versions, beside those of requirements.txt."""
    import torch
    from packaging.requirements import Requirement

    note(**environment(), cuda=torch.version.cuda, system=platform.platform())
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        note(memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9)
        note(peak_tflops=next((peak for part, peak in PEAKS.items() if part in name), None))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, stdout=subprocess.PIPE, text=True, encoding="utf-8", timeout=20).stdout
        note(driver=answer.strip().partition("\n")[0])
    outside = []
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.partition("#")[0].strip():
            needed = Requirement(line.partition("#")[0].strip())
            is_there = importlib.util.find_spec(needed.name)
            version = importlib.metadata.version(needed.name) if is_there else "none"
            if not is_there or not needed.specifier.contains(version, prereleases=True):
                outside.append(f"{needed.name} {version} in place of {needed.specifier}")
    note(requirements="met" if not outside else "not met: " + ", ".join(outside))


def note_peak(note):
    if peak := peak_memory()["peak_gpu_gb"]:
        note(peak_gb=peak * GB)


def smoke(args, note, found, flags):
    """The four scripts as a chain, with a tiny model: SFT, reward model, PPO on both, merge; seconds of each."""
    import training_reward_model
    import training_rl
    import training_sft

    folder, failures = args.folder / "smoke", []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make_models("tiny", folder)
    write_rows(folder)

    def try_out(name, script, **options):
        """The final checkpoint, or the base model where there is none: the next script has something to start from."""
        start, output = time.perf_counter(), folder / f"{name}_output"
        try:
            script.main(list_flags(output_dir=output, **options))
            note(**{f"{name}_seconds": time.perf_counter() - start})
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__} {error}")
        final = output / "final_checkpoint"
        return final if final.is_dir() else folder / "base"

    common = {"max_samples": 4, "prompt_format": "qa", **flags}
    trained = {"model_path": folder / "base", "max_steps": 2, "gradient_checkpointing": True, **common}
    batch = {"per_device_train_batch_size": 2}
    policy = try_out("sft", training_sft, dataset_name=folder / "rows.jsonl", batch_size=2, **trained)
    reward = try_out("reward", training_reward_model, dataset_name=folder / "pairs.jsonl", **batch, **trained)
    prompts = {"dataset_name": folder / "prompts_rl.jsonl", "total_episodes": 4, "response_length": 8}
    models = {"model_path": policy, "reward_model_path": reward}
    policy = try_out("ppo", training_rl, **models, **prompts, **batch, **common)
    if flags.get("use_lora"):
        adapter = policy if policy.name == "final_checkpoint" else folder / "policy"
        # Training may have put kernels for the card into the model's classes (liger-kernel); the merge computes on the CPU.
        flags = list_flags(adapter_path=adapter, output_dir=folder / "merge_output", verify=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, ROOT / "merge_with_lora.py", *flags]).returncode:
            failures.append("merge: see above")
        note(merge_seconds=time.perf_counter() - start)
    note_peak(note)
    if failures:
        raise RuntimeError("; ".join(failures))


def make_inputs(args, note, found):
    """Weights and rows for all the steps that come after."""
    make_models(args.shape, args.folder)
    write_rows(args.folder)
    count = args.sizes.batch * args.sizes.steps
    write_answers(args.folder / "rows_long.jsonl", count, args.sizes.length)
    answers = [json.loads(line)["response"] for line in read_lines(args.folder / "rows_long.jsonl")]
    half = args.sizes.length // 2 - len("Question: x\n\nAnswer: <end>")
    pairs = [{"prompt": "x", "chosen": text[:half], "rejected": text[-half:]} for text in answers]
    write_lines(args.folder / "pairs_long.jsonl", pairs)
    size = sum(path.stat().st_size for path in args.folder.glob("*/*.safetensors"))
    weights = count_weights(args.shape)
    note(written_gb=size / 1e9, weights=sum(weights.values()) - weights["adapter"])


def measure_memory(args, note, found, way):
    """The README's PPO command: the peak that ppo_memory.py predicts, and the one that was."""
    options = SimpleNamespace(
        shape=args.shape, batch=1, accumulation=args.sizes.accumulation, prompt=args.sizes.prompt,
        response=args.sizes.response, updates=args.sizes.memory_updates, float32=False, way=way, folder=args.folder,
    )  # fmt: skip
    predicted = compute(options, WAYS[way])["peak"]
    note(predicted_gb=predicted)
    write_prompts(args.folder / "prompts.jsonl", options.accumulation, options.prompt)  # where run_way looks
    result = run_way(options)
    if result["peak_gpu_gb"]:
        peak = result["peak_gpu_gb"] * GB
        note(peak_gb=peak, off_by=abs(predicted / peak - 1))


def measure_speed(args, note, found, side):
    """Episodes a second of one PPO trainer: prompts as long as those in data/rl, 8 episodes an update, as in the README."""
    import ppo

    options = SimpleNamespace(
        side=ROOT / "training_rl.py", model_path=str(args.folder / "base"), reward_model=str(args.folder / "base"),
        reward_adapter=str(args.folder / "reward"), folder=args.folder, data=str(args.folder / "prompts_rl.jsonl"),
        batch=1, accumulation=args.sizes.accumulation, episodes=args.sizes.speed_updates * args.sizes.accumulation,
        response_length=args.sizes.response, ppo_epochs=4, bf16=True,
    )  # fmt: skip
    result = ppo.run_stock(options) if side == "stock" else ppo.run_ours(options)
    speed = options.accumulation / result["update_seconds"]
    note(episodes_per_second=speed, **{name: result[name] for name in result if name.startswith(("rollout", "train"))})
    note_peak(note)
    ours = found.get("speed/ours", {}).get("episodes_per_second")
    if side == "stock" and ours:
        note(ours_to_stock=ours / speed)


def measure_decoding(args, note, found):
    """Tokens a second of eight answers at once, with the policy's adapter and without, and kernels launched for each."""
    options = SimpleNamespace(
        script=ROOT / "training_rl.py", shape=args.shape, prompt=32, response=args.sizes.decoded, batch=8, rounds=3,
        float32=False,
    )  # fmt: skip
    seconds, launches = time_decoding(options, args.folder)
    with_it, without = min(seconds["with the adapter"]), min(seconds["without"])
    tokens = options.batch * options.response
    note(tokens_per_second=tokens / with_it, tokens_per_second_without=tokens / without, ratio=with_it / without)
    if launches["without"]:
        note(launches_per_token=launches["with the adapter"], launches_per_token_without=launches["without"])


def watch_training(trainer_class):
    """A dict of what the next train() of a trainer does: `ends` of its steps (s), `batches` as count_tokens has them,
    `passes` of a step (the scripts take several on a CPU), `loss`."""
    train, seen = trainer_class.train, {"batches": []}

    def watched(self, **options):
        self.args.save_strategy = "no"
        collate = self.data_collator

        def counted(examples):
            batch = collate(examples)
            seen["batches"].append(count_tokens(batch, examples))
            return batch

        self.data_collator = counted
        seen.update(ends=clock_steps(self), passes=self.args.gradient_accumulation_steps)
        output = train(self, **options)
        seen["loss"] = output.metrics["train_loss"]
        return output

    trainer_class.train = watched
    return seen


def measure_training(args, note, found, stage, rows="long", lora=True, **flags):
    """Tokens a second and MFU of SFT or the reward model, after the first steps."""
    import trl

    import training_reward_model
    import training_sft

    sft = stage == "sft"
    script = training_sft if sft else training_reward_model
    script.publish = lambda *inputs: None  # what is saved is not measured here
    seen = watch_training(trl.SFTTrainer if sft else trl.RewardTrainer)
    size = args.sizes
    batch, count = (size.data_batch, size.data_steps) if rows == "data" else (size.batch, size.steps)
    name = ("rows" if sft else "pairs") + ("" if rows == "data" else "_long")
    options = {
        "model_path": args.folder / "base", "dataset_name": args.folder / f"{name}.jsonl", "prompt_format": "qa",
        "output_dir": args.folder / "training", "overwrite_output_dir": True, "bf16": True, "use_lora": lora,
        "per_device_train_batch_size": batch, "max_steps": count, "max_samples": batch * count,
        "max_length": 1024 if rows == "data" else size.length, **flags,
    }  # fmt: skip
    script.main(list_flags(**options))
    if not math.isfinite(seen["loss"]):
        raise ArithmeticError(f"the loss is {seen['loss']}")
    ends, first = seen["ends"], size.warm_up
    seconds, steps = ends[-1] - ends[first - 1], len(ends) - first
    counted = seen["batches"][first * seen["passes"] : len(ends) * seen["passes"]]
    total = {key: sum(batch[key] for batch in counted) for key in counted[0]}
    needed, again = count_operations(args.shape, total["computed"], total["logits"], lora)
    note(tokens_per_second=total["tokens"] / seconds, tokens_per_step=total["tokens"] / steps)
    if total["computed"] != total["tokens"]:
        note(computed_tokens_per_second=total["computed"] / seconds)  # what the texts of a pair begin with counts once
    note(seconds_per_step=seconds / steps, tflops=needed / seconds / 1e12)
    note_peak(note)
    machine = found["machine"]
    if machine.get("peak_tflops"):
        note(mfu=needed / seconds / 1e12 / machine["peak_tflops"])
        if "gradient_checkpointing" in flags:
            note(hfu=(needed + again) / seconds / 1e12 / machine["peak_tflops"])
    elif machine.get("card"):
        note(mfu=f"not known: {machine['card']} is not in PEAKS")


def count_tokens(batch, examples):
    """Of a batch: tokens of its texts, those that go through the model, and those that logits are computed for."""
    mask = batch.get("attention_mask")
    computed = int(batch["input_ids"].numel() if mask is None else mask.sum())
    if "labels" in batch:
        return {"tokens": computed, "computed": computed, "logits": int((batch["labels"] != -100).sum())}
    tokens = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in examples)
    return {"tokens": tokens, "computed": computed, "logits": 0}


def count_operations(shape, tokens, logits, lora):
    """Floating-point operations: (what training on so many tokens takes, what gradient checkpointing adds)."""
    weights = count_weights(shape)
    adapter = weights["adapter"] if lora else 0
    for_each = 4 if lora else 6
    needed = tokens * (for_each * weights["linear"] + 6 * adapter) + logits * for_each * weights["embeddings"]
    return needed, tokens * 2 * (weights["linear"] + adapter)


def measure_merge(args, note, found, way):
    """Seconds and memory of merging the policy's adapter into the base."""
    import merge

    result = getattr(merge, way)(args.folder, args.shape, adapter="policy")
    note(seconds_to_merge=result["seconds"], peak_resident_gb=peak_memory()["peak_rss_gb"] * GB)
    shutil.rmtree(args.folder / way)
    ours = found.get("merge/ours", {}).get("seconds_to_merge")
    if way == "peft" and ours:
        note(ours_to_peft=ours / result["seconds"])


@dataclasses.dataclass
class Step:
    name: str
    run: callable
    seconds: int  # at most
    options: dict = dataclasses.field(default_factory=dict)
    needs: tuple = ()  # modules, "card", "weights"
    bytes_a_weight: float = 0  # on the card, for weights, gradients and AdamW


def list_steps():
    """In the order of what is wanted first, should the time be short."""
    lora, quantized = {"bf16": True, "use_lora": True}, {"bf16": True, "use_lora": True, "load_in_4bit": True}
    made, flash, liger = ("weights",), ("weights", "card", "flash_attn"), ("weights", "card", "liger_kernel")
    bnb = ("weights", "bitsandbytes")
    flash_flags, liger_flags = {"attn_implementation": "flash_attention_2"}, {"set": "use_liger_kernel=true"}
    sft, reward = {"stage": "sft"}, {"stage": "reward"}
    full = {"lora": False, "gradient_checkpointing": True}
    return [
        Step("machine", look_around, 60),
        Step("smoke/bf16", smoke, 90, {"flags": lora}),
        Step("smoke/4bit", smoke, 90, {"flags": quantized}, ("bitsandbytes",)),
        Step("smoke/full", smoke, 90, {"flags": {"bf16": True}}),
        Step("weights", make_inputs, 150),
        Step("memory/bf16", measure_memory, 90, {"way": "as it is"}, made),
        Step("memory/bf16 checkpointing", measure_memory, 90, {"way": "checkpointing"}, made),
        Step("memory/4bit", measure_memory, 90, {"way": "4 bit"}, bnb),
        Step("memory/4bit checkpointing", measure_memory, 90, {"way": "4 bit, checkpointing"}, bnb),
        Step("speed/ours", measure_speed, 120, {"side": "ours"}, made),
        # policy and reward model 2 bytes, value model 2 + 2 + 4
        Step("speed/stock", measure_speed, 150, {"side": "stock"}, made, 12),
        Step("decode", measure_decoding, 90, {}, made),
        Step("sft/sdpa", measure_training, 90, sft, made),
        Step("sft/flash", measure_training, 90, sft | flash_flags, flash),
        Step("sft/liger", measure_training, 90, sft | liger_flags, liger),
        Step("sft/data", measure_training, 90, sft | {"rows": "data"}, made),
        Step("reward/sdpa", measure_training, 90, reward, made),
        Step("reward/flash", measure_training, 90, reward | flash_flags, flash),
        Step("reward/liger", measure_training, 90, reward | liger_flags, liger),
        Step("reward/data", measure_training, 90, reward | {"rows": "data"}, made),
        Step("merge/ours", measure_merge, 120, {"way": "merge"}, made),
        Step("merge/peft", measure_merge, 120, {"way": "peft"}, made),
        Step("sft/checkpointing", measure_training, 90, sft | {"gradient_checkpointing": True}, made),
        # float32: weights, gradients and AdamW's moments
        Step("sft/all weights", measure_training, 150, sft | full, made, 16),
    ]


# ---- files ----


def list_flags(**options):
    """Flags of a script; True: only the name."""
    given = {name: value for name, value in options.items() if value is not False}
    return [text for name, value in given.items() for text in ([f"--{name}"] + [str(value)] * (value is not True))]


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_rows(folder):
    """Rows as long as those in data/: every fourth letter, since a token of English is about four characters
    (help.openai.com, "What are tokens and how to count them?") and here is one."""
    sources = {"rows": "finetune/train.jsonl", "pairs": "reward/train.jsonl", "prompts_rl": "rl/prompts.jsonl"}
    for name, source in sources.items():
        rows = [json.loads(line) for line in read_lines(ROOT / "data" / source)]
        shortened = [{key: " ".join(text[::4].split()) or "a" for key, text in row.items()} for row in rows]
        write_lines(folder / f"{name}.jsonl", shortened)


def write_results(path, calls):
    """All calls, in place of what is there, in one go."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(calls, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


# ---- processes ----


def work(connection, args, log, modules):
    """What a step's process does: import what takes seconds, wait for a step, run it, send figures as they come."""
    errors = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for module in modules:
        with contextlib.suppress(ImportError):  # the step that needs it will say so
            importlib.import_module(module)
    step, found = connection.recv()
    step.run(args, lambda **figures: connection.send(figures), found, **step.options)
    connection.send(None)  # done


class Worker:
    """A process that is ready for one step: it starts, and imports, while an earlier step is still running."""

    modules = ("torch", "training_sft", "training_reward_model", "training_rl", "merge_with_lora")
    count = itertools.count()

    def __init__(self, context, args):
        self.log = args.folder / f"worker{next(self.count)}.log"
        self.connection, theirs = context.Pipe()
        values = (theirs, args, str(self.log), self.modules)
        self.process = context.Process(target=work, args=values, daemon=True)
        self.process.start()
        theirs.close()

    def run(self, step, found, seconds):
        """{status, seconds, figures}, and where it is not "done", why."""
        start, figures, done, over = time.perf_counter(), {}, False, False
        with contextlib.suppress(OSError):  # it did not get so far; its log says why
            self.connection.send((step, found))
        while not done and (left := start + seconds - time.perf_counter()) > 0:
            over = self.process.sentinel in wait([self.connection, self.process.sentinel], left)
            with contextlib.suppress(EOFError, OSError):
                while not done and self.connection.poll():
                    more = self.connection.recv()
                    figures.update(more or {})
                    done = more is None
            if over:
                break
        result = {"status": "done", "seconds": round(time.perf_counter() - start, 1), "figures": figures}
        if done:
            self.process.join(10)
        elif self.process.is_alive() and not over:
            result |= {"status": "timeout", "reason": f"not done after {seconds:.0f} s"}
        else:
            self.process.join()
            result |= {"status": "failed", "reason": f"exit code {self.process.exitcode}"}
        self.process.kill()
        self.process.join()
        if not done:
            text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
            lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
            result["last_lines"] = [line for line in lines if line][-40:]
        return result


def why_skipped(step, args, found):
    """Why a step is not possible here, or None."""
    machine = found.get("machine", {})
    for need in step.needs:
        if need == "card" and not machine.get("card"):
            return "no card"
        if need == "weights" and "weights" not in found:
            return "the step weights was not done"
        if need not in ("card", "weights") and not importlib.util.find_spec(need):
            return f"{need} is not installed"
    needed = 1.15 * step.bytes_a_weight * sum(count_weights(args.shape).values()) / 1e9  # and activations
    if machine.get("memory_gb") and needed > machine["memory_gb"]:
        return f"does not fit: {needed:.0f} GB, the card has {machine['memory_gb']:.0f}"
    return None


def judge(step, figures, args, card):
    """{figure: bar} of a step; `met` is None for what the bars are not for."""
    bars = {}
    for (name, figure), (kind, value) in BARS.items():
        if name == step and isinstance(figures.get(figure), float):
            met = figures[figure] <= value if kind == "at most" else figures[figure] >= value
            there = card and args.shape == BARS_ARE_FOR
            bars[figure] = {"kind": kind, "value": value, "met": met if there else None}
    return bars


def print_table(steps):
    print(f"\n{'step':27}{'figure':30}{'':>11}  bar")
    for name, result in steps.items():
        if result["status"] != "done":
            last = "".join(result.get("last_lines", [])[-1:])
            print(f"{name:27}{result['status']}: {result['reason']}  {last}"[:200])
        for figure, value in result.get("figures", {}).items() if name != "machine" else ():
            bar = result["bars"].get(figure)
            text = ""
            if bar:
                verdict = {True: "met", False: "MISSED", None: f"for {BARS_ARE_FOR} on a card"}[bar["met"]]
                text = f"  {bar['kind']} {bar['value']:g}: {verdict}"
            shown = value if isinstance(value, str) else f"{value:11,.4g}"
            print(f"{name:27}{figure:30}{shown}{text}")


def build_parser():
    names = [step.name for step in list_steps()]
    groups = list(dict.fromkeys(name.partition("/")[0] for name in names))
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="of the whole; what is not done by then is left out")
    add("--shape", choices=SHAPES, default=BARS_ARE_FOR, help="of the random weights")
    add("--out", type=Path, help="JSON file that the results are appended to (benchmarks/results/gpu.json)")
    add(
        "--steps",
        nargs="+",
        choices=list(dict.fromkeys([*groups, *names])),
        metavar="STEP",
        default=groups,
        help="what to do",
    )
    add("--step_seconds", type=float, default=math.inf, help="of a step at most; each has a limit of its own")
    add("--directory", default=tempfile.gettempdir(), help="where the models go (twice their size)")
    add("--dry_run", action="store_true", help="on the CPU with a tiny model")
    return parser


def choose_steps(names):
    """The steps of these names and groups, the card first, and the weights where one needs them."""
    steps = list_steps()
    chosen = [step for step in steps if {step.name, step.name.partition("/")[0]} & {*names}]
    needed = {need for step in chosen for need in step.needs} | {"machine"}
    return [step for step in steps if step in chosen or step.name in needed]


def run_steps(args, steps, call, save):
    """Run the steps, each in a process of its own, and put what they find into `call`."""
    # In a dry run processes are copies of one that has imported everything, where the system has that. CUDA minds it.
    copies = args.dry_run and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if copies else "spawn")
    if copies:
        context.set_forkserver_preload(["__main__", *Worker.modules])
    deadline, found, spare = time.perf_counter() + 60 * args.minutes, {}, Worker(context, args)
    for step in steps:
        left = deadline - time.perf_counter()
        reason = why_skipped(step, args, found) if left > 5 else f"no time left of --minutes {args.minutes:g}"
        if reason:
            result = {"status": "skipped", "reason": reason}
        else:
            worker, spare = spare, Worker(context, args)
            result = worker.run(step, found, min(step.seconds, args.step_seconds, left))
        if result["status"] == "done" or step.name == "machine":
            found[step.name] = result.get("figures", {})
        result["bars"] = judge(step.name, result.get("figures", {}), args, found["machine"].get("card"))
        call["steps"][step.name] = result
        save()
        print(f"{step.name:27}{result['status']:9}{result.get('reason') or result['seconds']}", flush=True)
        if step.name == "machine":
            print("\n".join(f"  {name}: {value}" for name, value in found["machine"].items()), flush=True)
            if not args.dry_run and not found["machine"].get("card"):
                sys.exit("error: torch sees no card; --dry_run runs the steps on the CPU")
    spare.process.kill()
    spare.process.join()


def main():
    args = build_parser().parse_args()
    steps = choose_steps(args.steps)
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a card that is there is left alone
        args.shape = "tiny"
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.sizes = sizes(args.dry_run)
    out = (args.out or ROOT / "benchmarks" / "results" / "gpu.json").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    calls = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    settings = {name: getattr(args, name) for name in ("minutes", "shape", "steps", "dry_run")}
    call = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "arguments": settings, "steps": {}}
    calls.append(call)
    with tempfile.TemporaryDirectory(dir=args.directory, ignore_cleanup_errors=True) as folder:
        args.folder = Path(folder).resolve()
        os.chdir(ROOT)  # from where a forkserver imports what it is to have
        os.environ["HF_DATASETS_CACHE"] = str(args.folder / "datasets")
        if args.dry_run and not args.out:
            out = args.folder / "gpu.json"  # it is no result
        try:
            run_steps(args, steps, call, lambda: write_results(out, calls))
        finally:
            print_table(call["steps"])
    print("" if args.dry_run and not args.out else f"written: {out}")
    left = [name for name, result in call["steps"].items() if result.get("reason", "").startswith("no time left")]
    if left:
        print(f"left out; --steps takes their names: {', '.join(left)}")
    statuses = {result["status"] for result in call["steps"].values()}
    sys.exit(1 if statuses & {"failed", "timeout"} else 0)


if __name__ == "__main__":
    main()
