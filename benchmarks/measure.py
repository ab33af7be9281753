"""What the benchmarks share: peak memory, a process for each side, the environment, and where results go."""

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path


def peak_memory():
    """Peak resident memory of this process and peak GPU memory, in GB (2**30 bytes; 0 without a GPU)."""
    import torch

    if sys.platform == "win32":
        import psutil

        resident = psutil.Process().memory_info().peak_wset
    else:
        import resource

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"peak_rss_gb": resident / 2**30, "peak_gpu_gb": gpu / 2**30}


def clock_steps(trainer):
    """A list that gets the time (s) at which each of the trainer's steps ends, with all that it left to the card."""
    import torch
    import transformers

    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *inputs, **options):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    return ends


def run_child(*flags):
    """Run the calling benchmark once more in a process of its own, with `flags` after its flags; what it reported."""
    command = [sys.executable, *sys.argv, *map(str, flags)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout
    line = [line for line in output.splitlines() if line.startswith("RESULT ")][-1]
    return json.loads(line.removeprefix("RESULT "))


def report(result):
    """In that process: hand `result` to run_child."""
    print("\nRESULT " + json.dumps(result))


def load_script(path):
    """The module in the file `path`, whose folder need not be this repository's."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def environment():
    """Versions and hardware, for the record."""
    import torch

    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)},
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "card": card,
    }


def write_result(name, result):
    """Write `result` to benchmarks/results/NAME.json (NAME_gpu.json where a GPU was used)."""
    folder = Path(__file__).resolve().parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}{'_gpu' if result.get('card') else ''}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")
