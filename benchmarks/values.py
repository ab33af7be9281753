"""What PPO's values explain, by place in the answer: training_rl.py run with the flags given, and one line an update.

The variance of the returns over all tokens is that between answers (of each answer's mean) plus that within answers.
Explained variance is 1 - var(return - value) / var(return), over the tokens of a range of places, counted from the
answer's start; `bias` is the mean of value - return there.

    python benchmarks/values.py --model_path runs/preferences/sft/final_checkpoint \
        --reward_model_path runs/preferences/reward/final_checkpoint --output_dir runs/values ... (flags of training_rl.py)
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from measure import environment, write_result

import training_rl

PLACES = (0, 1, 8, 16, 32, 64, 1 << 30)  # tokens


def explain(returns, values):
    """Count, explained variance and bias of a set of tokens; None where there is nothing to explain."""
    if len(returns) < 2 or not returns.var() > 0:
        return None
    error = values - returns
    found = {"tokens": len(returns), "explained": 1 - error.var().item() / returns.var().item()}
    return {**found, "bias": error.mean().item(), "variance": returns.var().item()}


def describe_values(rollout):
    """Figures of one rollout: variances between and within answers, and what is explained where."""
    import torch

    states, returns, values = rollout.states, rollout.returns, rollout.values
    counts = states.sum(1)
    means = (returns * states).sum(1) / counts
    overall = returns[states].mean()
    places = torch.arange(states.shape[1], device=states.device).expand_as(states)
    found = {
        "between": ((means - overall).square() * counts).sum().item() / counts.sum().item(),
        "within": ((returns - means[:, None])[states].square().mean()).item(),
        "all": explain(returns[states], values[states]),
        "answers": explain(means, (values * states).sum(1) / counts),
    }
    for low, high in zip(PLACES, PLACES[1:]):
        chosen = states & (places >= low) & (places < high)
        found[f"from {low}"] = explain(returns[chosen], values[chosen])
    return found


def main():
    updates, estimate = [], training_rl.PPOTrainer.estimate_advantages

    def recorded(self, rollout, batches):
        estimate(self, rollout, batches)
        updates.append(describe_values(rollout))
        shown = {name: part["explained"] for name, part in updates[-1].items() if isinstance(part, dict)}
        spread = f"variance between answers {updates[-1]['between']:.3f}, within {updates[-1]['within']:.3f}"
        print(f"update {len(updates)}: {spread}; explained", {name: round(value, 2) for name, value in shown.items()})

    training_rl.PPOTrainer.estimate_advantages = recorded
    training_rl.main(sys.argv[1:])
    write_result("values", {"ppo_flags": sys.argv[1:], "updates": updates, **environment()})


if __name__ == "__main__":
    main()
