"""What the adapter of the policy costs while it samples: the same answers' length generated with and without it.

Both ways run training_rl.py's own `PPOTrainer.generate`, in turns, on one model; seconds are the least of all rounds, on a
CPU those of the processor.

    python benchmarks/decode.py --model_path runs/quickstart/model --bf16
    python benchmarks/decode.py --model_path runs/quickstart/model --bf16 --shape llama-3.2-3b
"""

import argparse
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import environment, write_result
from reward import SHAPES, make_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights in this shape in place of the model's")
    parser.add_argument("--prompt_length", type=int, default=32)
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    import torch
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import training_rl

    dtype, tokenizer = torch.bfloat16 if args.bf16 else torch.float32, AutoTokenizer.from_pretrained(args.model_path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if args.shape:
            make_model(args.shape, tokenizer, folder)
        model = AutoModelForCausalLM.from_pretrained(folder if args.shape else args.model_path, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    training_rl.keep_input_dtype(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    model.to(accelerator.device)
    settings = {"response_length": args.response_length, "temperature": 1.0, "local_rollout_forward_batch_size": 64}
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(**settings),
        stop_ids=torch.tensor([model.config.vocab_size], device=accelerator.device),  # never: all answers are as long
        tokenizer=tokenizer,
        accelerator=accelerator,
        device=accelerator.device,
    )
    prompts = torch.randint(0, model.config.vocab_size, (args.batch, args.prompt_length)).tolist()
    roles = {"with the adapter": training_rl.Role(model, "default"), "without": training_rl.Role(model)}
    seconds, clock = {name: [] for name in roles}, time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(args.rounds):
        for name, role in roles.items():
            start = clock()
            answers = training_rl.PPOTrainer.generate(trainer, role, prompts)
            seconds[name].append(clock() - start)
            assert all(len(answer) == args.response_length for answer in answers)
    least = {name: min(values) for name, values in seconds.items()}
    ratio = least["with the adapter"] / least["without"]
    for name, value in least.items():
        print(f"{name:18} {value:8.2f} s {args.batch * args.response_length / value:8.1f} tokens/s")
    print(f"{'ratio':18} {ratio:8.2f}")
    write_result(
        "decode" + (f"_{args.shape}" if args.shape else ""),
        {"settings": vars(args), "seconds": seconds, "ratio": ratio, **environment()},
    )


if __name__ == "__main__":
    main()
