"""Merging a LoRA adapter, side by side: merge_with_lora.py, PEFT's merge, and a plain copy of the same bytes.

A random Llama of about 1B (and 3B) weights in bfloat16 and an adapter of rank 16 on all its linear layers are made on
the spot. Every way runs in a process of its own, from a warm page cache and with nothing left to write from before.
Seconds are those of the work, after the imports: "on disk", until fsync of every file has returned (copy and
merge_with_lora.py do that themselves, PEFT does not), and "processor", which other programs change least. Errors are
against the float32 sum, in units in the last place of bfloat16.

    python benchmarks/merge.py --directory /big/disk --sizes 1 3
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
from measure import environment, peak_memory, write_result

SIZES = {
    "1": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
SCALING = 2.0


def make(folder, size):
    """The base model and the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    for weight in model.parameters():
        weight.data.copy_(torch.empty_like(weight, dtype=torch.float32).uniform_(-0.04, 0.04))
    model.save_pretrained(folder / "base")
    lora = LoraConfig(r=16, lora_alpha=16 * SCALING, target_modules="all-linear", task_type="CAUSAL_LM")
    model.name_or_path = str(folder / "base")
    model = get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    model.save_pretrained(folder / "adapter")
    return {"parameters": sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)}


def flush(folder):
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def copy(folder, size):
    start, computed = time.perf_counter(), time.process_time()
    (folder / "copy").mkdir()
    for path in (folder / "base").iterdir():
        with open(path, "rb") as source, open(folder / "copy" / path.name, "wb") as target:
            while data := source.read(2**23):
                target.write(data)
            target.flush()
            os.fsync(target.fileno())
    return {"seconds_on_disk": time.perf_counter() - start, "processor_seconds": time.process_time() - computed}


def peft(folder, size):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start, computed = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    model.save_pretrained(folder / "peft")
    seconds = time.perf_counter() - start
    flush(folder / "peft")
    on_disk = time.perf_counter() - start
    return {"seconds": seconds, "seconds_on_disk": on_disk, "processor_seconds": time.process_time() - computed}


def merge(folder, size, output="merge", *flags):
    import merge_with_lora

    start, computed = time.perf_counter(), time.process_time()
    merge_with_lora.main(["--adapter_path", str(folder / "adapter"), "--output_dir", str(folder / output), *flags])
    return {"seconds_on_disk": time.perf_counter() - start, "processor_seconds": time.process_time() - computed}


def unverified(folder, size):
    return merge(folder, size, "unverified", "--no_verify")


def check(folder, size):
    """The largest error of the changed tensors, in units in the last place, and whether the others are the same."""
    import torch
    from safetensors import safe_open

    worst, same = {"peft": 0.0, "merge": 0.0}, {"peft": True, "merge": True}
    names = {name: folder / name / "model.safetensors" for name in ("base", "peft", "merge")}
    with contextlib.ExitStack() as stack:
        adapter = stack.enter_context(safe_open(folder / "adapter" / "adapter_model.safetensors", "pt"))
        base, *merged = (stack.enter_context(safe_open(path, "pt")) for path in names.values())
        factors = set(adapter.keys())
        for name in base.keys():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in factors:
                a, b = (adapter.get_tensor(f"{stem}.lora_{part}.weight") for part in "AB")
            rows = base.get_slice(name).get_shape()[0]
            for begin in range(0, rows, 256):
                weight = base.get_slice(name)[begin : begin + 256]
                for way, found in zip(worst, (file.get_slice(name)[begin : begin + 256] for file in merged)):
                    if f"{stem}.lora_A.weight" not in factors:
                        same[way] = same[way] and torch.equal(weight, found)
                        continue
                    exact = weight.float() + (b[begin : begin + 256] @ a) * SCALING
                    ulp = torch.ldexp(torch.ones(()), torch.frexp(exact)[1] - 8)  # bfloat16 has 8 significant bits
                    worst[way] = max(worst[way], ((found.float() - exact).abs() / ulp).max().item())
    return {"ulp": worst, "others_unchanged": same}


ROLES = {function.__name__: function for function in (make, copy, peft, merge, unverified, check)}


def run_role(role, folder, size):
    """One way in a process of its own; returns what it reports."""
    if role not in ("make", "check"):
        for path in [*(folder / "base").iterdir(), *(folder / "adapter").iterdir()]:
            with open(path, "rb") as file:
                while file.read(2**24):
                    pass
        if hasattr(os, "sync"):
            os.sync()
    command = [sys.executable, str(HERE), "--role", role, "--directory", str(folder), "--sizes", size]
    start = time.perf_counter()
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    for leftover in ("copy", "unverified"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    return {**json.loads(result.stdout.splitlines()[-1]), "seconds_of_the_process": time.perf_counter() - start}


def measure_size(size, parent, repeat):
    """Every way at 1B, in turn and `repeat` times, of which the fastest counts: other programs write to the disk too.
    At 3B only what shows that the memory does not grow."""
    ways = ("copy", "peft", "unverified", "merge") if size == "1" else ("copy", "merge")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        folder = Path(folder)
        results = {"make": run_role("make", folder, size)}
        for _ in range(repeat if size == "1" else 1):
            for way in ways:
                shutil.rmtree(folder / way, ignore_errors=True)
                one, best = run_role(way, folder, size), results.get(way)
                seconds = [*(best["all_seconds_on_disk"] if best else []), one["seconds_on_disk"]]
                results[way] = one if seconds[-1] == min(seconds) else best
                results[way]["all_seconds_on_disk"] = seconds
        if "peft" in ways:
            results["check"] = run_role("check", folder, size)
    print(f"\n{results['make']['parameters'] / 1e9:.2f}B weights, bfloat16")
    print(f"{'':18} {'s on disk':>9} {'/ copy':>7} {'/ PEFT':>7} {'processor s':>11} {'peak GB':>8} {'error, ulp':>11}")
    for way in ways:
        one = results[way]
        one["to_copy"] = one["seconds_on_disk"] / results["copy"]["seconds_on_disk"]
        figures = f"{one['seconds_on_disk']:9.1f} {one['to_copy']:7.2f}"
        if "peft" in ways:
            one["to_peft"] = one["seconds_on_disk"] / results["peft"]["seconds_on_disk"]
            one["to_peft_without_fsync"] = one["seconds_on_disk"] / results["peft"]["seconds"]
        figures += f" {one['to_peft']:7.2f}" if "to_peft" in one else " " * 8
        error = results.get("check", {}).get("ulp", {}).get(way)
        label = {"peft": "PEFT", "unverified": "merge --no_verify"}.get(way, way)
        figures += f" {one['processor_seconds']:11.1f}"
        print(f"{label:18} {figures} {one['peak_rss_gb']:8.2f} {'' if error is None else f'{error:11.4f}'}")
    if "peft" in ways:
        print(f"PEFT takes {results['peft']['seconds']:.1f} s until it returns, without fsync")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the models go (4 times their size)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1"], help="billions of weights")
    parser.add_argument("--repeat", type=int, default=2, help="times that each way runs at 1B")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        result = ROLES[args.role](Path(args.directory), args.sizes[0])
        print("\n" + json.dumps({**result, **peak_memory()}))
        return
    result = {
        "environment": environment(),
        "sizes": {size: measure_size(size, args.directory, args.repeat) for size in args.sizes},
    }
    write_result("merge", result)


if __name__ == "__main__":
    main()
