"""What the adapter of the policy costs while it samples: answers of one length generated with and without it.

Both ways are training_rl.py's own `PPOTrainer.generate`, in turns, on random weights of a given shape: the policy with
its adapter, and its base alone. Seconds are the least of all rounds, on a CPU those of the processor.

    python benchmarks/decode.py --shape llama-3.2-3b
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

from measure import environment, load_script, write_result
from ppo_memory import SHAPES, make_models, write_prompts

ROOT = Path(__file__).resolve().parents[1]
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
RULE = "def nothing(prompts, responses):\n    return [0.0] * len(responses)\n"


class Done(Exception):
    """Both ways are timed: the run need not go on."""


def count_launches(function):
    """Kernels (a graph of them counts as one) that a function starts on the card; 0 without a card."""
    import torch

    if not torch.cuda.is_available():
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key.startswith(LAUNCHES))


def time_decoding(args, folder):
    """({way: seconds of each round}, {way: kernels launched for a token}) of the model in `folder`."""
    import torch

    script, seconds, launches = load_script(args.script), {"with the adapter": [], "without": []}, {}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def time_both(self, *inputs, **options):
        rows = [self.train_dataset[i] for i in range(args.batch)]
        self.stop_ids = [SHAPES[args.shape][-1]]  # no token: all are as long
        roles = {"with the adapter": self.roles.policy, "without": dataclasses.replace(self.roles.policy, adapter=None)}
        for _ in range(args.rounds):
            for name, role in roles.items():
                start = clock()
                answers = self.generate(role, rows)
                seconds[name].append(clock() - start)
                assert all(len(answer) == args.response for answer in answers)
        self.args.response_length = 4  # of tens of thousands of launches the profiler's tables take minutes
        for name, role in roles.items():
            launches[name] = count_launches(lambda: self.generate(role, rows)) / self.args.response_length
        raise Done

    script.PPOTrainer.train = time_both
    write_prompts(folder / "prompts_decode.jsonl", args.batch, args.prompt)
    (folder / "rules.py").write_text(RULE, encoding="utf-8")
    flags = f"""--use_lora --prompt_format qa --per_device_train_batch_size {args.batch} --total_episodes {args.batch}
        --max_prompt_length {args.prompt} --response_length {args.response} --overwrite_output_dir""".split()
    paths = ["--model_path", f"{folder}/base", "--reward_function", f"{folder}/rules.py:nothing"]
    paths += ["--dataset_name", f"{folder}/prompts_decode.jsonl", "--output_dir", f"{folder}/decode"]
    try:
        script.main([*paths, *flags, *([] if args.float32 else ["--bf16"])])
    except Done:
        pass
    return seconds, launches


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--script", default=ROOT / "training_rl.py", help="a training_rl.py (the repository's)")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of the random weights")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--response", type=int, default=32, help="tokens")
    parser.add_argument("--batch", type=int, default=8, help="answers at once")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--float32", action="store_true", help="in place of bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        make_models(args.shape, Path(folder), "float32" if args.float32 else "bfloat16")
        seconds, launches = time_decoding(args, Path(folder))
    least = {name: min(values) for name, values in seconds.items()}
    for name, value in least.items():
        print(f"{name:18} {value:8.2f} s {args.batch * args.response / value:8.1f} tokens/s")
    ratio = least["with the adapter"] / least["without"]
    print(f"{'ratio':18} {ratio:8.2f}")
    settings = {key: str(value) for key, value in vars(args).items()}
    figures = {"settings": settings, "seconds": seconds, "launches_per_token": launches}
    write_result(f"decode_{args.shape}", {**figures, "ratio": ratio, **environment()})


if __name__ == "__main__":
    main()
