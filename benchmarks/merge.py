"""Merging a LoRA adapter, side by side: merge_with_lora.py and PEFT's own way (load, merge_and_unload, save).

A random Llama in bfloat16 and an adapter of rank 16 on all its linear layers are made on the spot. Every way runs in a
process of its own, in turn and --repeat times, of which the fastest counts, from a warm page cache and with nothing left
to write from before. Seconds are those of the work, after the imports; "processor" is what other programs change least.

    python benchmarks/merge.py --directory /big/disk --sizes 1 3
"""

import argparse
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

SIZES = {  # billions of weights; tiny: to try this script
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    "1": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}


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
    model.save_pretrained(folder / "base", max_shard_size="50GB")
    model.name_or_path = str(folder / "base")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    model.save_pretrained(folder / "adapter")
    return {"parameters": sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)}


def time_work(function):
    start, processor = time.perf_counter(), time.process_time()
    function()
    return {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}


def peft(folder, size, adapter="adapter"):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work():
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, folder / adapter).merge_and_unload().save_pretrained(folder / "peft")

    return time_work(work)


def merge(folder, size, adapter="adapter"):
    import merge_with_lora

    flags = ["--adapter_path", str(folder / adapter), "--output_dir", str(folder / "merge")]
    return time_work(lambda: merge_with_lora.main(flags))


ROLES = {function.__name__: function for function in (make, peft, merge)}


def run_role(role, folder, size):
    """One way in a process of its own; returns what it reports."""
    shutil.rmtree(folder / role, ignore_errors=True)
    for path in folder.glob("*/*.safetensors"):
        with open(path, "rb") as file:
            while file.read(2**24):
                pass
    if hasattr(os, "sync"):
        os.sync()
    command = [sys.executable, str(HERE), "--role", role, "--directory", str(folder), "--sizes", size]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_size(size, parent, repeat):
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        results = {"make": run_role("make", Path(folder), size)}
        runs = [(way, run_role(way, Path(folder), size)) for _ in range(repeat) for way in ("peft", "merge")]
    print(
        f"\n{results['make']['parameters'] / 1e9:.2f}B weights, bfloat16\n         seconds  / PEFT  processor  peak GB"
    )
    for way in ("peft", "merge"):
        results[way] = one = min((result for name, result in runs if name == way), key=lambda result: result["seconds"])
        one["to_peft"] = one["seconds"] / results["peft"]["seconds"]
        one["all_seconds"] = [result["seconds"] for name, result in runs if name == way]
        figures = (
            f"{one['seconds']:8.1f} {one['to_peft']:7.2f} {one['processor_seconds']:10.1f} {one['peak_rss_gb']:8.2f}"
        )
        print(f"{way:7} {figures}")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the models go (3 times their size)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1"], help="billions of weights")
    parser.add_argument("--repeat", type=int, default=2, help="times that each way runs")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        result = ROLES[args.role](Path(args.directory), args.sizes[0])
        print("\n" + json.dumps({**result, **peak_memory()}))
        return
    sizes = {size: measure_size(size, args.directory, args.repeat) for size in args.sizes}
    if args.sizes != ["tiny"]:
        write_result("merge", {"environment": environment(), "sizes": sizes})


if __name__ == "__main__":
    main()
