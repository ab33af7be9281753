"""One page from what the runs of these scripts left: did it work, the curves, the answers, what to try.

In: the --output_dir of any of the scripts, or a checkpoint in it; of runs that go on or were cut short, too.
Out: --output, one HTML file without scripts or links to elsewhere. What a run did not write is left out and named.

    python report.py checkpoints/sft checkpoints/rm checkpoints/ppo checkpoints/merged --output report.html
    python report.py checkpoints/ppo --watch
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["jinja2>=3.1", "matplotlib>=3.8", "numpy"]
# ///

import argparse
import contextlib
import datetime
import difflib
import io
import json
import math
import os
import re
import sys
import time
import types
from pathlib import Path
from statistics import fmean


def fail(message):
    """What a user can mend: one line on stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda message: fail(f"{message} (see {parser.prog} --help)")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="DIR", help="the --output_dir of a run, or a checkpoint in it")
    add("--output", type=Path, default="report.html", metavar="FILE", help="the page; an older one is replaced")
    add("--png", type=Path, metavar="DIR", help="write the figures there, too, for slides")
    add("--watch", action="store_true", help="rewrite the page until the runs are finished, or Ctrl-C")
    return parser


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    build_parser().parse_args()

try:
    import jinja2
    import matplotlib
    import numpy as np
except ImportError as error:
    fail(f"the page needs {error.name}: pip install jinja2 matplotlib")
from markupsafe import Markup, escape
from matplotlib.figure import Figure

SCRIPTS = {"sft": "training_sft", "reward": "training_reward_model", "rl": "training_rl", "merge": "merge_with_lora"}
TITLES = {"sft": "SFT", "reward": "Reward model", "rl": "PPO", "merge": "Merge"}
COLORS = {  # light and dark; figures are drawn in the light ones, for which the page puts its variables
    "paper": ("#f5f4f0", "#15171b"),
    "card": ("#fefefc", "#1d2025"),
    "line": ("#dcdad3", "#373b43"),
    "soft": ("#5b6270", "#a4aab6"),
    "ink": ("#20242c", "#e6e4df"),
    "blue": ("#2c62b0", "#82aef0"),
    "orange": ("#b0561a", "#eb9c62"),
    "green": ("#24774f", "#6fc79c"),
    "red": ("#b2352c", "#f08a80"),
}
CHECKPOINT = re.compile(r"(final|best)_checkpoint|checkpoint-\d+")  # the directories in a run that hold a model
PAPER, CARD, LINE, SOFT, INK, BLUE, ORANGE, GREEN, RED = (light for light, _ in COLORS.values())
PROMPTS, EARLIER, EPISODES, MISTAKES, PAIRS, CHARACTERS = 8, 5, 5, 10, 800, 1500  # shown at most
RELOAD = 10  # seconds, of a page that is watched
CURVES = {  # (title, unit, {name: key in metrics.jsonl})
    "sft": [
        ("Loss", "nats a token", {"training": "loss", "evaluation": "eval_loss"}),
        ("Learning rate", "", {"learning rate": "learning_rate"}),
        ("Gradient norm", "L2, before clipping", {"gradient norm": "grad_norm"}),
        ("Speed", "tokens a second", {"speed": "speed/tokens_per_second"}),
    ],
    "reward": [
        ("Loss", "nats a pair", {"training": "loss", "evaluation": "eval_loss"}),
        ("Accuracy in training", "share of pairs", {"training": "accuracy", "evaluation": "eval_accuracy"}),
    ],
    "rl": [
        ("Reward", "mean score", {"reward": "objective/scores"}),
        ("KL to the reference", "nats an answer", {"KL": "objective/kl"}),
        ("Entropy", "nats a token", {"entropy": "policy/entropy_avg"}),
        ("Length of the answers", "tokens", {"length": "response/length"}),
        ("Answers that end", "share", {"answers that end": "response/stop_rate"}),
        ("Clip fraction", "share of tokens", {"policy": "policy/clipfrac_avg", "value": "val/clipfrac_avg"}),
        ("Explained variance", "share", {"explained variance": "val/explained_variance"}),
        ("Value loss", "", {"value loss": "loss/value_avg"}),
    ],
}
matplotlib.rcParams.update({
    "figure.figsize": (5, 2.8), "figure.subplot.left": 0.125, "figure.subplot.right": 0.95,  # room for the widest numbers
    "figure.subplot.bottom": 0.19, "figure.subplot.top": 0.88, "svg.fonttype": "none", "font.size": 10.5,
    "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "grid.color": LINE, "grid.linewidth": 0.6,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 5),
})  # fmt: skip


# ---- what a run left ----


def read_lines(path):
    """The JSON objects in a file of JSON Lines; the last line may be half written."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:  # a text may hold what splitlines() splits at
        try:
            rows.append(json.loads(line.decode("utf-8", "replace")))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def read_json(path):
    """The JSON object in a file; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def load_run(path):
    """What a directory holds and, filled in later, what the page says of it; None where it holds no run."""
    in_a_run = CHECKPOINT.fullmatch(path.name) and (path.parent / "metrics.jsonl").is_file()
    folder = path.parent if in_a_run else path
    log = read_lines(folder / "metrics.jsonl")
    record = read_json(folder / "final_checkpoint" / "run.json") or read_json(folder / "run.json")
    metrics, step = record.get("metrics"), log[-1].get("step") if log else None
    finished = isinstance(metrics, dict) and (not log or metrics.get("step", step) == step)  # else of an earlier run
    if not finished:
        saved = max(folder.glob("checkpoint-*/run.json"), key=lambda file: file.stat().st_mtime, default=None)
        record, metrics = read_json(folder / "run.json") or (read_json(saved) if saved else {}), {}
    guesses = {"rl": "objective/kl", "reward": "margin", "sft": "loss"}  # before the first checkpoint
    logged = set().union(*log)
    stage = record.get("stage") or next((stage for stage, key in guesses.items() if key in logged), None)
    if stage not in SCRIPTS:
        return None
    written = max(file.stat().st_mtime for file in [*folder.glob("*.json*"), *folder.glob("*/run.json")])
    return types.SimpleNamespace(
        folder=folder, stage=stage, title=TITLES[stage], finished=finished, record=record, metrics=metrics, log=log,
        arguments=record.get("arguments", {}), dataset=record.get("dataset", {}), parent=record.get("parent"),
        samples=read_lines(folder / "samples.jsonl"), scores=read_lines(folder / "scores.jsonl"),
        written=f"{datetime.datetime.fromtimestamp(written):%Y-%m-%d %H:%M:%S}",
        sentence="Nothing is logged yet.", numbers=[], checks=[], improved=None, figures=[], texts={}, missing=[],
    )  # fmt: skip


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def column(lines, key, by="step"):
    """(x, values) of the lines that have `key`."""
    rows = [(line[by], line[key]) for line in lines if is_number(line.get(key)) and is_number(line.get(by))]
    return [x for x, _ in rows], [value for _, value in rows]


def ends(lines, key):
    """Means of the first and of the last fifth of the values, of 50 at most; NaN where there are none."""
    values = column(lines, key)[1] or [math.nan]
    part = max(1, min(50, len(values) // 5))
    return fmean(values[:part]), fmean(values[-part:])


def base_name(path):
    """The name of a run's directory or of a model, in a path of any system."""
    parts = str(path).replace("\\", "/").rstrip("/").split("/")
    return parts[-2] if CHECKPOINT.fullmatch(parts[-1]) and parts[1:] else parts[-1]


# ---- words ----


def show(value, unit=""):
    """A number as people write it; `%` makes a share a percentage, `s` picks seconds, minutes or hours."""
    if not is_number(value):
        return "–"
    if unit == "s":
        if value < 90:
            return f"{value:.0f} s"
        return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
    value = 100 * value if unit == "%" else value
    whole = unit == "%" or abs(value) >= 100 or value == round(value)
    text = f"{value:,.0f}" if whole else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}") + unit


def show_status(run):
    """Finished, and in which time; or how far it has come."""
    if run.finished:
        return f"finished, {show(run.metrics['train_runtime'], 's')}" if "train_runtime" in run.metrics else "finished"
    at = {name: value for line in run.log for name, value in line.items()}
    for name, total in (("step", "max_steps"), ("episode", "total_episodes"), ("epoch", "num_train_epochs")):
        if run.arguments.get(total):
            return f"not finished: {name} {show(at.get(name, 0))} of {show(run.arguments[total])}"
    return f"not finished: step {show(at.get('step', 0))}"


def show_command(run):
    """The command that makes the same run, with every flag that has a value."""
    words = ["python", f"{SCRIPTS[run.stage]}.py"]
    for name, value in run.arguments.items():
        is_unset = value is None or value is False or value == []
        if not is_unset and name not in ("episodes_per_update", "processes"):  # which are no flags
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *[str(word) for word in values if word is not True]]
    quoted = ['"' + word.replace('"', r"\"") + '"' for word in words]  # as a shell and cmd.exe both read it
    return " ".join(word if re.fullmatch(r"[\w./\\:=,+-]+", word) else quote for word, quote in zip(words, quoted))


def clip(text):
    """The beginning of a text; control characters as pictures of themselves, what HTML cannot hold as U+FFFD."""
    text = str(text)
    shown = re.sub(r"[\0-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text[:CHARACTERS])
    shown = re.sub(r"[\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", shown)
    return shown + (f" … and {len(text) - CHARACTERS:,} characters more" if len(text) > CHARACTERS else "")


def compare(old_title, old, new_title, new):
    """Two columns, (title, the text as a list of (piece, whether the other text lacks it))."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]+", clip(text)) for text in (old, new))
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    old = [("".join(old[start:end]), kind != "equal") for kind, start, end, _, _ in changes]
    new = [("".join(new[start:end]), kind != "equal") for kind, _, _, start, end in changes]
    return [(old_title, old), (new_title, new)]


def show_answers(sample):
    reference, policy = (show(sample.get(f"{name}_score")) for name in ("reference", "policy"))
    title = f"Policy, update {sample.get('step')}: {policy}"
    return compare(f"Reference: {reference}", sample.get("reference_answer", "–"), title, sample["policy_answer"])


def pick_answers(samples):
    """The fixed prompts' answers after the last update that was sampled, and after some before it, as blocks of the
    page: (prompt, columns, [columns of an earlier update])."""
    rows = {}
    for sample in samples:
        if "policy_answer" in sample:
            rows.setdefault(sample.get("row"), []).append(sample)
    for *before, last in list(rows.values())[:PROMPTS]:
        some = before[:: math.ceil(len(before) / EARLIER) or 1]
        yield last.get("prompt", "–"), show_answers(last), [show_answers(sample) for sample in some]


def show_episode(episode):
    title = f"{show(episode['score'])}, update {episode.get('step')}"
    title += "" if episode.get("ended", True) else ", cut"
    return episode.get("prompt", "–"), [(title, [(clip(episode["answer"]), False)])], []


def show_mistake(row):
    titles = [f"{side.title()}: {show(row[f'score_{side}'])}" for side in ("chosen", "rejected")]
    columns = compare(titles[0], row.get("chosen", "–"), titles[1], row.get("rejected", "–"))
    return f"Row {row.get('row')}: {row.get('prompt', '–')}", columns, []


# ---- figures ----


def new_axes(xlabel):
    axes = Figure().add_subplot(xlabel=xlabel)
    axes.locator_params(nbins=5, min_n_ticks=3)
    return axes


def add_figure(run, title, unit, axes):
    """The figure as SVG for the page; its texts stay texts, in the page's font."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=len(names), frameon=False, borderpad=0)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"{run.anchor} {title}"}):  # ids that no other figure of the page has
        axes.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    box = re.search(r'viewBox="[^"]*"', file.getvalue())[0]
    body = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", file.getvalue().partition("</metadata>")[2])  # alike in all figures
    svg = f'<svg {box} role="img" aria-label="{title}">{body}'
    for name, (light, _) in COLORS.items():
        svg = svg.replace(light, f"var(--{name})")
    run.figures.append((title, unit, svg, axes.figure))


def draw_curves(run, title, unit, keys):
    by = "episode" if run.stage == "rl" else "step"
    curves = {name: column(run.log, key, by) for name, key in keys.items()}
    if not any(y for _, y in curves.values()):
        run.missing.append(title.lower())
        return
    axes = new_axes(f"{by}s")
    for color, (name, (x, y)) in zip((BLUE, ORANGE), curves.items()):
        window = len(y) // 25
        if window > 1:  # the values pale, and their running mean
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            x, y = (np.convolve(values, np.ones(window) / window, "valid") for values in (x, y))
        if len(y):
            axes.plot(x, y, color=color, label=name, marker="o" * (len(y) < 20), markersize=3)
    if title == "Explained variance":
        axes.set_ylim(bottom=max(-1.5, axes.get_ylim()[0]))  # it has no lower end, and begins far down
    axes.locator_params(axis="x", integer=True)
    add_figure(run, title, unit, axes)


def draw_scores(run, margins, longer):
    """Margins, right and wrong apart, and against the difference in length."""
    edges = np.arange(-15, 16) / 15 * (abs(margins).max() or 1)
    some = np.arange(len(margins)) % math.ceil(len(margins) / PAIRS) == 0
    bars = new_axes("score of the chosen answer less that of the rejected")
    dots = new_axes("tokens by which the chosen answer is longer")
    for name, color, rows in (("wrong", RED, margins <= 0), ("right", GREEN, margins > 0)):
        bars.hist(margins[rows], edges, color=color, alpha=0.85, label=f"{name}: {rows.sum():,}")
        dots.scatter(longer[rows & some], margins[rows & some], 12, color, alpha=0.6, linewidth=0, label=name)
    dots.axvline(0, color=SOFT, linewidth=1, linestyle="--")
    add_figure(run, "Margins", "pairs", bars)
    add_figure(run, "Margin against length", "margin", dots)


# ---- what the stages say; `checks`: (whether to warn, what is seen, what to try) ----


def read_sft(run):
    first, last = ends(run.log, "loss")
    held_out = list(dict(zip(*column(run.log, "eval_loss"))).values())  # the last step may be evaluated twice
    guessed = ends(run.log, "mean_token_accuracy")
    if is_number(last):
        judged = first != last and run.log[-1].get("step", 0) >= 20  # fewer are too few to tell
        run.improved = last < first if judged else None
        fell, steps = "fell" if last < first else "did not fall", show(run.log[-1].get("step"))
        run.sentence = f"The loss {fell}: {show(first)} to {show(last)} nats a token in {steps} steps."
        run.numbers = [("loss", first != last and show(first), show(last))]
    if is_number(guessed[1]):
        run.numbers.append(("token accuracy", first != last and show(guessed[0], "%"), show(guessed[1], "%")))
    remedy = "another --learning_rate; --dry_run shows what is trained on"
    run.checks.append((run.improved is False, "The training loss does not fall.", remedy))
    if held_out:
        run.numbers.append(("loss on other rows", show(held_out[0]) if held_out[1:] else None, show(held_out[-1])))
    if len(held_out) > 1:
        run.improved = held_out[-1] < held_out[0]
    lengths = run.dataset.get("lengths")
    if lengths:
        axes = new_axes("tokens a row")
        axes.stairs(lengths["rows"], lengths["edges"], fill=True, color=BLUE, alpha=0.85)
        add_figure(run, "Row lengths", "rows", axes)
    else:
        run.missing.append("row lengths")


def read_reward(run):
    keys = ("score_chosen", "score_rejected", "length_chosen", "length_rejected")
    scores = [row for row in run.scores if all(is_number(row.get(key)) for key in keys)]
    if scores:
        chosen, rejected, *lengths = np.array([[row[key] for key in keys] for row in scores], float).T
        draw_scores(run, chosen - rejected, lengths[0] - lengths[1])
        worst = np.argsort(chosen - rejected, kind="stable")[:MISTAKES]
        run.texts["The most confident mistakes"] = [show_mistake(scores[i]) for i in worst if chosen[i] < rejected[i]]
    else:
        run.missing.append("margins and mistakes (no scores.jsonl)")
    report, before = run.metrics.get("report"), run.metrics.get("accuracy_before")
    if not report:
        run.numbers = [("accuracy in training", *[show(share, "%") for share in ends(run.log, "accuracy")])]
        tried = "was not tried on pairs that it was not trained on" if run.finished else "is tried on other pairs later"
        run.sentence = f"It {tried}."
        run.checks.append((run.finished, "Nobody knows how good it is.", "pairs of their own, with --eval_split"))
        return
    accuracy, (low, high), bias = report["accuracy"], report["accuracy_interval"], report["length_bias"]
    bins = report["reliability"]
    axes = new_axes("confidence")
    axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=1, linestyle="--")
    sizes = [20 + 300 * row["pairs"] / report["pairs"] for row in bins]
    x, y = ([row[key] for row in bins] for key in ("confidence", "accuracy"))
    axes.scatter(x, y, sizes, BLUE, linewidth=0, clip_on=False, zorder=3)
    add_figure(run, "Reliability", "share right (size of a dot: pairs)", axes)
    run.improved = low > 0.5
    run.sentence = f"It prefers the chosen answer in {show(accuracy, '%')} (95% interval {show(low, '%')} to "
    run.sentence += f"{show(high, '%')}) of {report['pairs']:,} pairs that it was not trained on."
    run.numbers = [
        ("accuracy", show(before, "%") if is_number(before) else None, show(accuracy, "%")),
        ("calibration error", None, show(report["calibration_error"])),
        ("correlation with length", None, show(bias["correlation"])),
    ]
    longer, shorter = bias["chosen_longer"], bias["chosen_shorter"]
    follows = report["pairs"] >= 20 and abs(bias["correlation"] or 0) > 0.5  # fewer are too few to tell
    if min(longer["pairs"], shorter["pairs"]) >= 10:
        follows = abs(longer["accuracy"] - shorter["accuracy"]) > 0.25
    run.checks += [
        (low <= 0.5, "It may be no better than chance.", "more pairs, more --max_steps, a higher --learning_rate"),
        (follows, f"It may follow length: it is right in {show(longer['accuracy'], '%')} of the {longer['pairs']} pairs "
         f"whose chosen answer is longer, in {show(shorter['accuracy'], '%')} of the {shorter['pairs']} where it is shorter.",
         "pairs whose longer answer is as often rejected, or fewer --max_steps"),
    ]  # fmt: skip


def read_rl(run):
    answers = list(pick_answers(run.samples))
    run.texts["Answers to fixed prompts (underlined: what the other answer lacks)"] = answers
    episodes = [sample for sample in run.samples if "answer" in sample and is_number(sample.get("score"))]
    episodes.sort(key=lambda episode: episode["score"])
    count = min(EPISODES, len(episodes) // 2)
    run.texts["Highest rewards"] = [show_episode(episode) for episode in episodes[::-1][:count]]
    run.texts["Lowest rewards"] = [show_episode(episode) for episode in episodes[:count]]
    run.missing += [name for name, some in (("answers to fixed prompts", answers), ("episodes", count)) if not some]
    updates = [line for line in run.log if is_number(line.get("objective/scores")) and is_number(line.get("step"))]
    if not updates:
        return
    reward, spread = ends(updates, "objective/scores"), ends(updates, "objective/scores_std")[1]
    kl, length, stops = (ends(updates, key) for key in ("objective/kl", "response/length", "response/stop_rate"))
    entropy, clipped = ends(updates, "policy/entropy_avg"), ends(updates, "policy/clipfrac_avg")
    halfway = ends(updates[: len(updates) // 2], "objective/kl")[1]
    growth = length[1] / length[0] if length[0] else math.nan
    explained = column(updates, "val/explained_variance")[1] or [math.nan]
    steps = run.arguments.get("num_ppo_epochs", 1) * run.arguments.get("num_mini_batches", 1)  # the first clips nothing
    stopped = run.metrics.get("stopped")
    # Two standard errors of the difference of the two means.
    episodes = updates[-1].get("episode", 1) / max(1, updates[-1]["step"]) * max(1, min(50, len(updates) // 5))
    noise = 2 * spread * math.sqrt(2 / episodes) if episodes >= 8 else math.inf
    rose = reward[1] > reward[0] + noise
    change = "rose" if rose else "changed no more than its noise"
    if reward[1] < reward[0] - noise:
        change = "fell"
    run.improved = rose if len(updates) >= 10 or run.finished and len(updates) > 3 and episodes >= 8 else None
    run.sentence = f"The reward {change}: {show(reward[0])} to {show(reward[1])}, at a KL of {show(kl[1])} nats "
    run.sentence += f"an answer. Answers have {show(length[1])} tokens, {show(length[0])} at first."
    run.numbers = [
        ("reward", show(reward[0]), show(reward[1])),
        ("answers that end", show(stops[0], "%"), show(stops[1], "%")),
        ("KL, nats an answer", None, show(kl[1])),
    ]
    before, after = (column(run.log, f"eval_{who}_score")[1][-1:] for who in ("reference", "policy"))
    if before and after:
        run.numbers.insert(1, ("reward, fixed prompts", show(before[0]), show(after[0])))
    run.checks += [
        (rose and after < before,
         "The greedy answers to the fixed prompts score less than the reference's.",
         "reading them below; more of them with --eval_split"),
        (stopped, f"It stopped early: {stopped}.",
         "the newest checkpoint below the limit, a higher --kl_coef, or a --target_kl"),
        (run.improved is False, f"The reward {change}.",
         "a higher --learning_rate, more --total_episodes, a lower --kl_coef, or --normalize_reward"),
        # At some ten nats scores and what people want were found to part (Gao et al. 2022, arXiv:2210.10760, figure 1).
        (kl[1] > 40 or kl[1] > max(10, 1.5 * halfway),
         f"The KL runs away: {show(kl[1])} nats an answer, {show(halfway)} halfway.",
         "--target_kl 6, a higher --kl_coef, a lower --learning_rate, or an end at --max_kl"),
        (rose and growth > 1.5, f"The reward rose while the answers grew to {show(growth)} times their length.",
         "reading some below; a lower --response_length, a higher --kl_coef"),
        (rose and growth < 0.6, f"The reward rose while the answers shrank to {show(growth, '%')} of their length.",
         "reading some below; where brevity is not what the pairs ask for, a higher --kl_coef"),
        (entropy[1] < 0.1 * entropy[0], f"The entropy is gone: {show(entropy[0])} to {show(entropy[1])} nats a token.",
         "a higher --kl_coef or --temperature, a lower --learning_rate"),
        (max(clipped) < 0.002 and steps > 1 and len(updates) > 3, "The clip fraction is 0: the policy hardly moves.",
         "a higher --learning_rate, or more --num_ppo_epochs"),
        (clipped[1] > 0.5, f"The clip fraction is {show(clipped[1])}: most of an update is cut off.",
         "a lower --learning_rate, fewer --num_ppo_epochs, or more --gradient_accumulation_steps"),
        (stops[1] < stops[0] - 0.1 or stops[1] < 0.5,
         f"{show(1 - stops[1], '%')} of the answers are cut, {show(1 - stops[0], '%')} at first.",
         "a larger --response_length or --missing_eos_penalty, or more SFT before"),
        (fmean(explained) < 0.05 and ends(updates, "val/explained_variance")[1] < 0.05 and len(updates) >= 10,
         f"The values explain nothing of the returns: explained variance {show(fmean(explained))} on average.",
         "more --gradient_accumulation_steps, a higher --vf_coef, or --normalize_reward"),
    ]  # fmt: skip
    axes = new_axes("KL, nats an answer")
    x, y = (column(updates, key)[1] for key in ("objective/kl", "objective/scores"))
    axes.plot(x, y, color=BLUE, alpha=0.35, linewidth=1)
    axes.plot(x[:1], y[:1], "o", color=ORANGE, label="first update")
    axes.plot(x[-1:], y[-1:], "o", color=BLUE, label="last update")
    add_figure(run, "Reward against KL", "mean score", axes)


def read_merge(run):
    found, run.improved = run.metrics, True
    what = TITLES.get(run.record.get("parent_stage"), run.parent)
    run.sentence = f"The adapter of {what} is part of the weights now; the model loads without PEFT."
    run.checks.append((not found, "The merge was not verified.", "--verify, with --overwrite_output_dir"))
    if found:
        share = found["distance"] / (found["adapter_changes"] or math.nan)
        error = "under 0.1%" if share < 0.001 else f"{share:.1%}"
        run.numbers = [("error of the merge", None, error)]
        run.sentence += f" Its logits differ from those of base and adapter by {error} of what the adapter changes."


# ---- the page ----

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
{% if reload %}<meta http-equiv="refresh" content="{{ reload }}">{% endif %}
<link rel="icon" href="data:,">
<title>{{ headline }}</title>
<style>
:root { {% for name, pair in colors.items() %}--{{ name }}: {{ pair[0] }}; {% endfor %} }
@media screen and (prefers-color-scheme: dark) {
  :root { {% for name, pair in colors.items() %}--{{ name }}: {{ pair[1] }}; {% endfor %} }
}
* { box-sizing: border-box; min-width: 0; margin: 0; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.015em; margin-bottom: .4rem; }
h2 { font-size: 1.4rem; margin-top: 3rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .75rem; }
h4, .soft, dt, summary { color: var(--soft); font-size: .875rem; }
a { color: var(--blue); text-underline-offset: .15em; }
code { font: .8125em ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; white-space: nowrap; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 16.5rem), 1fr)); margin-top: 1.25rem; }
.columns { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); margin-top: .6rem; }
.card, figure, .text { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1rem; break-inside: avoid; }
.card { border-top: 3px solid var(--soft); max-width: 36rem; }
.yes { border-top-color: var(--green); } .no { border-top-color: var(--red); }
.card h2 { font-size: 1.1rem; margin: 0; } .card h2 a { color: inherit; text-decoration: none; }
.numbers { display: grid; gap: .3rem; margin: .75rem 0; } .numbers .soft { font-weight: 400; }
.numbers div { display: flex; justify-content: space-between; align-items: baseline; gap: .75rem; }
.numbers dd { flex: none; font-weight: 650; font-variant-numeric: tabular-nums; }
.warning { border-left: 3px solid var(--orange); padding-left: .6rem; margin-top: .7rem; font-size: .9rem; }
.warning b { color: var(--orange); font-weight: 650; }
figcaption { font-weight: 600; margin-bottom: .4rem; } figcaption .soft { font-weight: 400; margin-left: .25rem; }
figure svg { display: block; width: 100%; height: auto; } figure text { font-family: inherit !important; }
.text + .text, .grid + .soft { margin-top: .75rem; }
.answer { white-space: pre-wrap; unicode-bidi: isolate; }
mark { background: none; color: inherit; border-bottom: 2px solid var(--orange); }
.columns > div + div mark { border-color: var(--blue); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
.facts code { white-space: pre-wrap; } .facts code code { font-size: 1em; white-space: nowrap; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print {
  :root { --paper: #fff; }
  body { max-width: none; padding: 0; font-size: .8rem; } h2, h3, .soft, summary { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
</style>
</head>
<body>
{% macro columns(pair) %}<div class="grid columns">{% for title, pieces in pair %}<div><h4>{{ title }}</h4>
<p class="answer" dir="auto">{% for piece, differs in pieces %}{% if differs and piece.strip() %}<mark>{{ piece }}</mark>
{%- else %}{{ piece }}{% endif %}{% endfor %}</p></div>{% endfor %}</div>{% endmacro %}
{% macro way(run) %}
{% if run.before %}{{ way(run.before) }}
{%- else %}<bdi>{{ (run.parent or run.record.base_model) | base_name | clip }}</bdi>{% endif %}
 → <a href="#{{ run.anchor }}">{{ run.title }}</a>
{%- if run.scored_by %} (scored by <a href="#{{ run.scored_by.anchor }}">{{ run.scored_by.title }}</a>){% endif %}
{% endmacro %}
<header>
<h1>{{ headline }}</h1>
{% for run in ends %}<p class="soft">{{ way(run) }}</p>{% endfor %}
{% for path in waiting %}<p class="soft">Not there yet: <bdi>{{ path | clip }}</bdi></p>{% endfor %}
</header>
<div class="grid cards">
{% for run in runs %}<section class="card {{ {True: 'yes', False: 'no'}.get(run.improved, '') }}">
<h2><a href="#{{ run.anchor }}">{{ run.title }}</a></h2>
<p class="soft"><bdi>{{ run.folder | base_name | clip }}</bdi>: {{ run.status }}</p>
<dl class="numbers">{% for name, before, after in run.numbers %}
<div><dt>{{ name }}</dt><dd>{% if before %}<span class="soft">{{ before }} →</span> {% endif %}{{ after }}</dd></div>
{% endfor %}</dl>
<p>{{ run.sentence | clip }}</p>
{% for seen, remedy in run.warnings %}<p class="warning"><b>{{ seen }}</b> Try {{ remedy | flags }}.</p>{% endfor %}
</section>{% endfor %}
</div>
{% for run in runs %}
<section id="{{ run.anchor }}">
<h2>{{ run.title }}</h2>
<p class="soft"><bdi>{{ run.folder | clip }}</bdi>, last written {{ run.written }}</p>
<details><summary>Command, versions, parents</summary><dl class="facts">
{% for name, value in run.facts.items() %}<dt>{{ name }}</dt><dd><bdi>{{ value | clip }}</bdi></dd>{% endfor %}
{% if run.arguments %}<dt>command</dt><dd><code>{{ run.command | clip | flags }}</code></dd>{% endif %}
</dl></details>
<div class="grid">
{% for title, unit, svg, _ in run.figures %}<figure>
<figcaption>{{ title }} <span class="soft">{{ unit }}</span></figcaption>{{ svg | safe }}</figure>{% endfor %}
</div>
{% for heading, blocks in run.texts.items() if blocks %}<h3>{{ heading }}</h3>
{% for prompt, pair, earlier in blocks %}<div class="text"><p class="answer soft" dir="auto">{{ prompt | clip }}</p>
{{ columns(pair) }}
{% if earlier %}<details><summary>At earlier updates</summary>
{% for pair in earlier %}{{ columns(pair) }}{% endfor %}</details>{% endif %}
</div>{% endfor %}{% endfor %}
{% if run.missing %}<p class="soft">Left out, for it was not written: {{ run.missing | join("; ") }}.</p>{% endif %}
</section>
{% endfor %}
</body>
</html>
"""


def fill_in(run):
    """What the page says of a run."""
    for curves in CURVES.get(run.stage, []) if run.log else []:
        draw_curves(run, *curves)
    {"sft": read_sft, "reward": read_reward, "rl": read_rl, "merge": read_merge}[run.stage](run)
    steps, losses = column(run.log, "eval_loss")
    if losses and losses[-1] > 1.02 * min(losses):
        low, step = show(min(losses)), show(steps[losses.index(min(losses))])
        seen = f"The evaluation loss rises: {low} at step {step}, {show(losses[-1])} at the end."
        run.checks.append((True, seen, "an end there (--max_steps), a lower --learning_rate, fewer --num_train_epochs"))
    run.warnings = [(seen, remedy) for holds, seen, remedy in run.checks if holds]
    run.status, run.command = show_status(run), show_command(run)
    facts = {"base model": run.record.get("base_model"), "goes on from": run.parent, "data": run.dataset.get("name")}
    run.facts = {name: value for name, value in (facts | run.record.get("versions", {})).items() if value}


def judge(runs, finished):
    """The page's headline."""
    failed, unknown = (" and ".join(run.title for run in runs if run.improved is is_) for is_ in (False, None))
    count = sum(len(run.warnings) for run in runs)
    things = f", with {count} thing{'s' * (count > 1)} to look at" if count else ""
    if not finished:
        return f"Not finished yet{things}"
    if failed:
        return f"Did it work? {failed} did not"
    return f"Did it work? Nobody can tell of {unknown}" if unknown else f"Did it work? Yes{things}"


def write_page(args, runs, waiting, finished, reload=None):
    """Write --output, and the figures to --png; `reload`: seconds after which a browser asks for it again."""
    named = {}  # runs by the names of their directories; those that the others go on from come first
    for number, run in enumerate(runs, 1):
        run.anchor = f"{run.stage}{number}"
        run.before = named.get(base_name(run.parent))
        run.scored_by = named.get(base_name(run.arguments.get("reward_model_path")))
        named[run.folder.resolve().name] = run
        fill_in(run)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    flags = lambda text: Markup(re.sub(r"(--\w+)", r"<code>\1</code>", str(escape(text))))  # noqa: E731
    environment.filters |= {"clip": clip, "base_name": base_name, "flags": flags}
    page = environment.from_string(TEMPLATE).render(
        runs=runs, waiting=waiting, headline=judge(runs, finished), reload=reload, colors=COLORS,
        ends=[run for run in reversed(runs) if all(other.before is not run for other in runs)],
    )  # fmt: skip
    draft = args.output.with_name(f"{args.output.name}.partial")
    draft.write_text(page, encoding="utf-8", errors="replace")
    os.replace(draft, args.output)
    for run in runs if args.png else []:
        for title, unit, _, figure in run.figures:
            figure.axes[0].set_title(f"{title}  {unit}", loc="left", pad=20)
            name = re.sub(r"\W+", "_", f"{run.anchor} {title}".lower())
            figure.savefig(args.png / f"{name}.png", dpi=220, facecolor=CARD, bbox_inches="tight")


def load_runs(paths):
    """(runs in the order of the stages, paths that hold none, whether all is finished)."""
    found = {path: load_run(path) for path in paths}
    runs = sorted(filter(None, found.values()), key=lambda run: list(SCRIPTS).index(run.stage))
    waiting = [path for path, run in found.items() if not run]
    return runs, waiting, not waiting and all(run.finished for run in runs)


def watch(args):
    """Rewrite the page, as one that reloads itself, when a run has written something; until all are finished."""
    shown = None
    while True:
        # Later on, a file that is being replaced; on Windows, a page that is being read.
        with contextlib.suppress(*[FileNotFoundError, PermissionError] if shown else []):
            runs, waiting, finished = load_runs(args.runs)
            if finished:
                return
            written = [(run.folder, run.written, run.finished) for run in runs]
            if written != shown:
                write_page(args, runs, waiting, finished, reload=RELOAD)
                shown = written
        time.sleep(RELOAD)


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        for folder in (args.output.parent, args.png or args.output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if args.watch:
            watch(args)
        runs, waiting, finished = load_runs(args.runs)
        if waiting:
            fail(f"{waiting[0]} should be the --output_dir of a run; it has no run.json or metrics.jsonl")
        write_page(args, runs, waiting, finished)
    except KeyboardInterrupt:
        write_page(args, *load_runs(args.runs))  # one that no longer reloads
        sys.exit(130)
    except OSError as error:
        fail(error)
    print(args.output)


if __name__ == "__main__":
    main()
