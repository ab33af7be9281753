"""The page of report.py: what it shows of real runs, of broken ones and of hostile texts; and how a browser shows it."""

import html
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from conftest import ROOT, run, write_rows

pytest.importorskip("matplotlib")
import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")


class Page(HTMLParser):
    """The elements of a page, (tag, attributes), and its visible text by tag."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.texts, self.open = [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def text(self, tag=None):
        return " ".join(
            " ".join(text for name, text in self.texts if name in (tag or name) and name != "style").split()
        )


def write_run(folder, stage, log, metrics=None, samples=(), scores=(), finished=True, **record):
    """What a script leaves in `folder`; without `finished`, what an interrupted one leaves."""
    write_rows(folder / "metrics.jsonl", log)
    for name, rows in {"samples": samples, "scores": scores}.items():
        if rows:  # in ASCII: half a surrogate pair has no UTF-8
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    record = {"stage": stage, "base_model": "someone/model", "parent": "someone/model", "arguments": {}, **record}
    place = folder / ("final_checkpoint" if finished else "checkpoint-2") / "run.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(record | ({"metrics": metrics or {}} if finished else {})), encoding="utf-8")
    return folder


def ppo_log(count=20, **changes):
    """A run of PPO that went well; `changes`: {key: function of the progress, 0 to 1}."""
    curves = {
        "objective/scores": lambda at: 3 * at,
        "objective/scores_std": lambda at: 1.0,
        "objective/kl": lambda at: 8 * at,
        "policy/entropy_avg": lambda at: 2 - at,
        "policy/clipfrac_avg": lambda at: 0.1,
        "val/clipfrac_avg": lambda at: 0.05,
        "val/explained_variance": lambda at: at - 0.3,
        "loss/value_avg": lambda at: 1 - at,
        "response/length": lambda at: 40 - 4 * at,
        "response/stop_rate": lambda at: 0.7 + 0.2 * at,
    } | {key.replace("__", "/"): curve for key, curve in changes.items()}
    lines = [{"step": i + 1, "episode": 16 * (i + 1)} for i in range(count)]
    for i, line in enumerate(lines):
        line |= {key: curve(i / max(1, count - 1)) for key, curve in curves.items()}
    return [*lines, {"step": count, "train_runtime": 90.0, "train_loss": 0.1}]


def make_page(tmp_path, *folders, flags=()):
    run(report, *folders, "--output", tmp_path / "page" / "report.html", *flags)
    return Page(tmp_path / "page" / "report.html")


@pytest.fixture(scope="module")
def chain(llama, sft, reward, rl, merge, tmp_path_factory):
    """Directories of four real runs: SFT, reward model, PPO, merge."""
    out = tmp_path_factory.mktemp("chain")
    pairs = [{"prompt": f"Why {i}?", "chosen": f"Because {i}.", "rejected": "no " * (i % 4 + 1)} for i in range(16)]
    data = write_rows(out / "data" / "pairs.jsonl", pairs)
    common = ["--dataset_name", data, "--use_lora", "--prompt_format", "qa", "--logging_steps", 1]
    every = [*common, "--model_path", llama, "--max_steps", 4, "--learning_rate", 1e-2, "--eval_steps", 2]
    run(sft, *every, "--output_dir", out / "sft", "--split", "train[:12]", "--eval_split", "train[12:]")
    run(reward, *every, "--output_dir", out / "rm", "--train_split", "train[:8]", "--eval_split", "train[8:]")
    models = ["--model_path", out / "sft/final_checkpoint", "--reward_model_path", out / "rm/final_checkpoint"]
    lengths = ["--total_episodes", 8, "--per_device_train_batch_size", 2, "--response_length", 6, "--eval_steps", 2]
    run(rl, *common, *models, *lengths, "--output_dir", out / "ppo")
    run(merge, "--adapter_path", out / "ppo/final_checkpoint", "--output_dir", out / "merged", "--verify")
    return [out / name for name in ("sft", "rm", "ppo", "merged")]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are listed and not drawn, which takes most of a page's time."""
    monkeypatch.setattr(report, "new_axes", lambda *args: MagicMock(get_ylim=lambda: (0, 1)))
    monkeypatch.setattr(
        report, "add_figure", lambda run, title, unit, axes: run.figures.append((title, unit, "", None))
    )


# ---- real runs ----


def test_four_real_runs_make_one_page(chain, tmp_path):
    """Every curve that the scripts write the values of is drawn, and what they do not write yet is named."""
    page = make_page(tmp_path, *chain)
    assert [text for tag, text in page.texts if tag == "h2"] == ["SFT", "Reward model", "PPO", "Merge"]
    titles = [text.strip() for tag, text in page.texts if tag == "figcaption" and text.strip()]
    missing = " ".join(re.findall(r"Left out, for it was not written: (.*?)</p>", page.source)).lower()
    for title, _, _ in sum(report.CURVES.values(), []):
        assert title in titles or title.lower() in missing
    assert {"Loss", "Gradient norm", "Reward", "KL to the reference", "Explained variance", "Reliability"} < set(titles)
    assert page.source.count("<svg") == len(titles)
    answers = [json.loads(line) for line in open(chain[2] / "samples.jsonl", encoding="utf-8")]
    last = [line for line in answers if line["step"] == 4]
    assert all(report.clip(line["prompt"]) in page.text() for line in last)
    accuracy = json.loads((chain[1] / "metrics.json").read_text())["report"]
    assert f"{report.show(accuracy['accuracy'], '%')} (95% interval" in page.text()
    assert "of what the adapter changes" in page.text() and "torch" in page.text("dt")


def test_figures_that_share_a_page_share_no_names(chain, tmp_path):
    """Every id is there once, and what refers to one finds it."""
    page = make_page(tmp_path, chain[2], chain[2] / "final_checkpoint")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = set(re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", page.source))
    assert len(ids) == len(set(ids)) and {a or b for a, b in used} <= set(ids) and len(used) > 20


def test_the_chain_is_a_line_of_links(chain, tmp_path, undrawn):
    """In the order of the stages whatever the order of the arguments, with the reward model at what it scores."""
    page = make_page(tmp_path, *chain[::-1])
    header = page.source.partition("<header>")[2].partition("</header>")[0]
    lines = [" ".join(html.unescape(re.sub("<[^>]*>", "", line)).split()) for line in header.split("</p>")[:2]]
    assert lines[0].endswith("→ SFT → PPO (scored by Reward model) → Merge") and "Did it work?" in lines[0]
    assert lines[1].endswith("→ Reward model") and "PPO" not in lines[1]
    links = [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"]
    assert set(links) <= {attributes.get("id") for _, attributes in page.elements}


@pytest.mark.parametrize("index", range(4))
def test_the_command_on_the_page_makes_the_same_run(chain, index, tmp_path, undrawn):
    """Its script's own parser reads the arguments of run.json out of it."""
    page = make_page(tmp_path, chain[index])
    command = re.search(r"<code>(python .*)</code></dd>", page.source)[1]
    _, script, *words = shlex.split(html.unescape(re.sub("</?code>", "", command)))
    module = importlib.import_module(Path(script).stem)
    record = report.load_run(chain[index]).record["arguments"]
    parsed = vars(module.build_parser().parse_args(words))
    assert {name: record[name] for name in parsed} == json.loads(json.dumps(parsed))


def test_the_command_keeps_zeros_and_quotes(tmp_path, undrawn):
    arguments = {"kl_coef": 0.0, "seed": 0, "bf16": False, "use_lora": True, "max_samples": None, "eval_split": []}
    arguments |= {"dataset_name": "my data", "set": ['lr_scheduler_kwargs={"num_cycles": 2}', "optim=sgd"]}
    folder = write_run(tmp_path / "ppo", "rl", ppo_log(), arguments=arguments)
    command = re.search(r"<code>(python .*)</code></dd>", make_page(tmp_path, folder).source)[1]
    words = "python training_rl.py --kl_coef 0.0 --seed 0 --use_lora --dataset_name".split()
    words += ["my data", "--set", 'lr_scheduler_kwargs={"num_cycles": 2}', "optim=sgd"]
    assert shlex.split(html.unescape(re.sub("</?code>", "", command))) == words


def test_final_checkpoints_and_copies_are_as_good(chain, tmp_path, undrawn):
    """The final_checkpoint in the place of its run, and runs that were copied, file by file, to elsewhere."""
    page = make_page(tmp_path, chain[0], chain[2])
    assert make_page(tmp_path, chain[0] / "final_checkpoint", chain[2] / "final_checkpoint").source == page.source
    copies = [shutil.copytree(folder, tmp_path / "there" / folder.name) for folder in (chain[0], chain[2])]
    copied = make_page(tmp_path, *copies)
    assert copied.text("h1") == page.text("h1") and copied.source.count("<figure>") == page.source.count("<figure>") > 9
    alone = shutil.copytree(chain[0] / "final_checkpoint", tmp_path / "alone")
    assert "finished" in make_page(tmp_path, alone).text("p")


@pytest.mark.parametrize("name", ["final_checkpoint", "best_checkpoint", "checkpoint-2"])
def test_any_checkpoint_stands_for_its_run(chain, name, tmp_path, undrawn):
    ppo = shutil.copytree(chain[2], tmp_path / "ppo")
    if not (ppo / name).exists():
        shutil.copytree(ppo / "final_checkpoint", ppo / name)
    assert make_page(tmp_path, ppo / name).source == make_page(tmp_path, ppo).source


def test_pictures(chain, tmp_path):
    """--png writes every figure of the page as a picture of at least 900 pixels, with nothing cut off at its edges."""
    page = make_page(tmp_path, chain[2], flags=["--png", tmp_path / "png"])
    pictures = list((tmp_path / "png").iterdir())
    assert len(pictures) == page.source.count("<svg") > 5
    for picture in pictures:
        content = picture.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(content[16:20], "big") >= 900
        pixels = report.matplotlib.image.imread(picture)
        assert min(edge.min() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) > 0.9


# ---- what it says ----


def test_a_run_that_went_well_has_no_warning(tmp_path):
    page = make_page(tmp_path, write_run(tmp_path / "ppo", "rl", ppo_log()))
    assert page.text("h1") == "Did it work? Yes" and 'class="warning"' not in page.source
    assert "The reward rose: 0.237 to 2.76, at a KL of 7.37 nats an answer." in page.text()
    assert "episodes" in page.text("text") and "steps" not in page.text("text")


def test_a_run_that_has_just_begun_is_not_judged(tmp_path, undrawn):
    flat = ppo_log(100, objective__scores=lambda at: 0, val__explained_variance=lambda at: 0.5)
    page = make_page(tmp_path, write_run(tmp_path / "early", "rl", flat[:5], finished=False))
    assert page.text("h1") == "Not finished yet" and 'class="warning"' not in page.source
    page = make_page(tmp_path, write_run(tmp_path / "later", "rl", flat[:20], finished=False))
    assert page.text("h1") == "Not finished yet, with 1 thing to look at"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective__kl": lambda at: 30 * at**3}, "KL runs away"),
        ({"objective__kl": lambda at: 60}, "KL runs away"),
        ({"response__length": lambda at: 40 + 60 * at}, "grew to"),
        ({"response__length": lambda at: 40 - 35 * at}, "shrank to"),
        ({"policy__entropy_avg": lambda at: 2 * (1 - at) ** 3}, "entropy is gone"),
        ({"policy__clipfrac_avg": lambda at: 0}, "clip fraction is 0"),
        ({"policy__clipfrac_avg": lambda at: 0.7}, "clip fraction is 0.7"),
        ({"response__stop_rate": lambda at: 0.9 - 0.3 * at}, "answers are cut"),
        ({"val__explained_variance": lambda at: -0.5}, "explain nothing"),
        ({"val__explained_variance": lambda at: 0.3 if 0.2 < at < 0.3 else -at}, "explain nothing"),
        ({"objective__scores": lambda at: 0.01 * at}, "changed no more than its noise"),
        ({"objective__scores": lambda at: -3 * at}, "The reward fell"),
    ],
)
def test_known_failures_of_ppo_are_named(tmp_path, changes, said, undrawn):
    """Each by one warning of its own, with a flag to try."""
    folder = write_run(
        tmp_path / "ppo", "rl", ppo_log(**changes), arguments={"num_ppo_epochs": 4, "num_mini_batches": 1}
    )
    page = make_page(tmp_path, folder)
    warnings = re.findall(r'<p class="warning"><b>(.*?)</b>(.*?)</p>', page.source)
    assert len(warnings) == 1 and said in warnings[0][0] and "<code>--" in warnings[0][1]
    assert ("did not" in page.text("h1")) == ("scores" in str(changes))


def test_one_step_a_rollout_has_no_clip_fraction(tmp_path, undrawn):
    log = ppo_log(policy__clipfrac_avg=lambda at: 0)
    folder = write_run(tmp_path / "ppo", "rl", log, arguments={"num_ppo_epochs": 1, "num_mini_batches": 1})
    assert "clip fraction is 0" not in make_page(tmp_path, folder).text()


def test_a_run_that_max_kl_stopped_says_so(tmp_path, undrawn):
    metrics = {"stopped": "KL 9.10 nats is above --max_kl 9.0"}
    page = make_page(tmp_path, write_run(tmp_path / "ppo", "rl", ppo_log(), metrics))
    assert "stopped early: KL 9.10 nats is above --max_kl 9.0" in page.text("b")


def reward_metrics(accuracy=0.8, low=0.7, longer=(50, 0.8), shorter=(50, 0.8), correlation=0.1):
    sides = [{"pairs": pairs, "accuracy": share} for pairs, share in (longer, shorter)]
    bias = {"chosen_longer": sides[0], "chosen_shorter": sides[1], "correlation": correlation}
    bins = [{"from": 0.5, "confidence": 0.52, "pairs": 100, "accuracy": accuracy}]
    found = {"pairs": 100, "accuracy": accuracy, "accuracy_interval": [low, 0.9], "calibration_error": 0.05}
    return {"accuracy_before": 0.5, "report": found | {"reliability": bins, "length_bias": bias}}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (reward_metrics(), None),
        (reward_metrics(0.55, 0.45), "no better than chance"),
        (reward_metrics(longer=(50, 0.95), shorter=(50, 0.4)), "follow length"),
        (reward_metrics(longer=(97, 0.9), shorter=(3, 0.1), correlation=0.8), "follow length"),
        (reward_metrics(correlation=0.8), None),  # it is as right where the longer answer is the worse one
        ({}, "Nobody knows"),
    ],
)
def test_known_failures_of_a_reward_model_are_named(tmp_path, metrics, said, undrawn):
    log = [{"step": 1, "loss": 0.7, "accuracy": 0.5, "margin": 0.0}, {"step": 2, "train_loss": 0.7}]
    page = make_page(tmp_path, write_run(tmp_path / "rm", "reward", log, metrics))
    warnings = re.findall(r'<p class="warning"><b>(.*?)</b>', page.source)
    assert len(warnings) == bool(said) and all(said in warning for warning in warnings)


def test_a_rising_evaluation_loss_is_named_with_its_best_step(tmp_path, undrawn):
    log = [{"step": i, "loss": 3 - i / 10, "eval_loss": 2 + (i - 4) ** 2 / 10} for i in range(1, 9)]
    page = make_page(tmp_path, write_run(tmp_path / "sft", "sft", [*log, {"step": 8, "train_loss": 2.5}]))
    assert "The evaluation loss rises: 2 at step 4, 3.60 at the end." in page.text("b")


def test_what_has_no_figures_is_not_called_a_success(tmp_path, undrawn):
    """A run that logged once; rows of its own that get worse count for more than those that it is trained on."""
    log = [{"step": 1, "loss": 2.0}, {"step": 1, "train_loss": 2.0}]
    page = make_page(tmp_path, write_run(tmp_path / "one", "sft", log))
    assert page.text("h1") == "Did it work? Nobody can tell of SFT"
    log = [{"step": i, "loss": 3 - i / 10, "eval_loss": 2 + i / 10} for i in (1, 2, 3, 3)]
    page = make_page(tmp_path, write_run(tmp_path / "worse", "sft", log))
    assert page.text("h1") == "Did it work? SFT did not" and "The loss fell" in page.text("p")
    page = make_page(tmp_path, write_run(tmp_path / "once", "sft", log[2:]))
    numbers = page.source.partition('<dl class="numbers">')[2].partition("</dl>")[0]
    assert "tell" in page.text("h1") and "2.3" in numbers and "→" not in numbers


def test_every_flag_in_a_warning_exists():
    source = Path(report.__file__).read_text(encoding="utf-8")
    parsers = [importlib.import_module(name).build_parser() for name in (*report.SCRIPTS.values(), "report")]
    known = {option for parser in parsers for option in parser._option_string_actions}
    flags = set(re.findall(r'(?<=[ "(])--[a-z]\w+', source.partition("def read_sft")[2].partition("TEMPLATE")[0]))
    assert len(flags) > 10 and flags <= known


@pytest.mark.parametrize(("level", "wrong"), [(0.8, 8), (1.5, 15)])
def test_mistakes_margins_and_lengths(tmp_path, level, wrong):
    """Of the pairs that are wrong the ten most confident come first, with their texts; a tie is no mistake."""
    scores = [
        {"row": row, "score_chosen": row / 10, "score_rejected": level, "length_chosen": 9, "length_rejected": row}
        | {"prompt": f"prompt {row}", "chosen": f"chosen text {row}", "rejected": f"rejected text {row}"}
        for row in range(20)
    ]
    page = make_page(tmp_path, write_run(tmp_path / "rm", "reward", [], reward_metrics(), scores=scores))
    assert re.findall(r"Row (\d+): prompt", page.source) == [str(row) for row in range(min(10, wrong))]
    assert "<mark>chosen</mark> text 0" in page.source and "<mark>rejected</mark> text 0" in page.source
    assert {"Margins", "Margin against length"} <= {text.strip() for tag, text in page.texts if tag == "figcaption"}
    assert f"wrong: {wrong + 1}" in page.source and f"right: {19 - wrong}" in page.source


def test_answers_stand_side_by_side_and_episodes_by_reward(tmp_path, undrawn):
    """Words that the other answer lacks are marked; earlier updates are there, folded; highest and lowest rewards."""
    names = ("policy_answer", "policy_score", "reference_answer", "reference_score")
    samples = [
        {"step": step, "row": 0, "prompt": "Why?"}
        | dict(zip(names, (f"It is {step} red.", step, "It is 0 blue.", 0.5)))
        for step in (2, 4)
    ]
    episodes = [{"step": 1, "prompt": "p", "answer": f"scored {i}", "score": i, "ended": i > 0} for i in range(30)]
    page = make_page(tmp_path, write_run(tmp_path / "ppo", "rl", ppo_log(), samples=samples + episodes))
    assert (
        "It is <mark>4</mark> <mark>red</mark>." in page.source
        and "It is <mark>0</mark> <mark>blue</mark>." in page.source
    )
    folded = page.source.partition("At earlier updates")[2].partition("</details>")[0]
    assert "<mark>2</mark>" in folded and "<mark>4</mark>" not in folded
    shown = re.findall(r"scored (\d+)", page.source)
    assert shown == ["29", "28", "27", "26", "25", "0", "1", "2", "3", "4"] and "0, update 1, cut" in page.source


def test_rows_have_lengths_and_steps_a_speed(tmp_path, undrawn):
    log = [{"step": i, "loss": 3 - i / 10, "speed/tokens_per_second": 900.0 + i} for i in range(1, 5)]
    dataset = {"name": "json", "lengths": {"edges": [0, 10, 20], "rows": [3, 4]}}
    page = make_page(tmp_path, write_run(tmp_path / "sft", "sft", log, dataset=dataset))
    assert {"Speed", "Row lengths"} <= {text.strip() for tag, text in page.texts if tag == "figcaption"}
    assert "loss" in page.text("dt") and "token accuracy" not in page.text("dt")  # which is not in the log


# ---- hostile, broken and unfinished ----

HOSTILE = {
    "script": "</script><script>document.title = 'run'</script><img src=x onerror=alert(1)>{{ 7 * 7 }}",
    "long": "x" * 1_000_000,
    "control": "a\0b\x1b[31mc\x7fd\x85e\u2028f\ufffeg",
    "rtl": "\u202eevil \u05e9\u05dc\u05d5\u05dd",
    "surrogate": "\ud800half",
    "markup": "$\\frac{1}{0}$ <!-- --> & &amp; ]]>",
}


@pytest.fixture
def hostile(tmp_path):
    rows = [
        {"step": 1, "row": i, "policy_score": 1.0}
        | {"prompt": text, "policy_answer": text, "reference_answer": text[::-1]}
        for i, text in enumerate(HOSTILE.values())
    ]
    rows += [{"step": 1, "prompt": text, "answer": text, "score": 1.0} for text in HOSTILE.values()]
    rows[-1]["step"] = "\ud800<b>"
    names = {"base_model": "</style><script>1</script>", "parent": HOSTILE["script"]}
    return write_run(tmp_path / "<b>ppo", "rl", ppo_log(), samples=rows, **names)


def test_hostile_texts_are_texts(hostile, tmp_path):
    page = make_page(tmp_path, hostile)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "b"} and "document.title = 'run'" in page.text()
    assert page.text("h1") == "Did it work? Yes" and "{{ 7 * 7 }}" in page.text()
    assert len(page.source) < 500_000 and "998,500 characters more" in page.text()
    assert not re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe]", page.source)
    assert "a\u2400b\u241b[31mc" in page.text() and "\u05e9\u05dc\u05d5\u05dd" in page.text()
    isolated = [attributes for tag, attributes in page.elements if attributes.get("dir") == "auto"]
    assert len(isolated) >= 3 * len(HOSTILE)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page.source


def test_half_a_line_and_lines_that_are_none(tmp_path, undrawn):
    """A log that is being written, with values that are not finite, ends of lines in texts, and what is no object."""
    folder = write_run(tmp_path / "ppo", "rl", ppo_log())
    whole = make_page(tmp_path, folder).text("p")
    sample = {"step": 4, "row": 0, "prompt": "Why\u2028this\x85?", "policy_answer": "So\u2029it is."}
    sample["reference_answer"] = "No."
    (folder / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + "\n[1]\nnull\n", encoding="utf-8")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 20, "objective/scores": NaN, "objective/kl": Infinity, "response/length": "many"}\n')
        file.write(b'7\n\n\xff\xfe\n{"step": 21, "objective/scores": 3')
    os.utime(folder / "metrics.jsonl", (0, 0))
    page = make_page(tmp_path, folder)
    assert whole.split("last written")[0] == page.text("p").split("last written")[0] and "NaN" not in page.source
    assert "So\u2029it is." in re.sub("<[^>]*>", "", page.source)


def test_a_run_that_was_interrupted(tmp_path, undrawn):
    """It says how far the run came, and leaves out what it lacks."""
    arguments = {"total_episodes": 640, "output_dir": "ppo"}
    folder = write_run(tmp_path / "ppo", "rl", ppo_log()[:-1], finished=False, arguments=arguments)
    page = make_page(tmp_path, folder)
    assert page.text("h1") == "Not finished yet" and "not finished: episode 320 of 640" in page.text()
    assert "Left out, for it was not written: answers to fixed prompts; episodes." in page.text()
    shutil.rmtree(folder / "checkpoint-2")  # the stage follows from the log
    page = make_page(tmp_path, folder)
    assert "not finished: step 20" in page.text() and "PPO" in page.text("a") and "refresh" not in page.source


def test_a_run_in_the_place_of_a_finished_one_is_not_finished(tmp_path, undrawn):
    """PPO keeps the final checkpoint of the run before it until it has one of its own."""
    folder = write_run(tmp_path / "ppo", "rl", ppo_log(), {"step": 20, "train_runtime": 90.0})
    assert "finished, 2 min" in make_page(tmp_path, folder).text("p")
    write_rows(folder / "metrics.jsonl", [*ppo_log(20)[:7], {"step": 7, "train_runtime": 3.0, "train_loss": 0.1}])
    assert "not finished: step 7" in make_page(tmp_path, folder).text("p")


def test_a_report_without_training(tmp_path):
    """--eval_only leaves run.json, metrics.json and scores.jsonl alone."""
    (tmp_path / "rm").mkdir()
    record = {"stage": "reward", "metrics": reward_metrics()}
    (tmp_path / "rm" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    score = {"row": 3, "score_chosen": 0.0, "score_rejected": 1.5, "length_chosen": 4, "length_rejected": 5}
    write_rows(tmp_path / "rm" / "scores.jsonl", [score])
    page = make_page(tmp_path, tmp_path / "rm")
    assert page.text("h1") == "Did it work? Yes" and "Row 3" in page.text() and "80%" in page.text()


def test_a_checkpoint_before_the_first_line_of_the_log(tmp_path, undrawn):
    """--save_steps below --logging_steps."""
    folder = write_run(tmp_path / "ppo", "rl", [], finished=False)
    (folder / "metrics.jsonl").unlink()
    assert "not finished: step 0" in make_page(tmp_path, folder).text("p")


def test_a_run_that_goes_on_from_another_ones_best_checkpoint_is_linked_to_it(tmp_path, undrawn):
    ppo = write_run(tmp_path / "ppo", "rl", ppo_log())
    shutil.copytree(ppo / "final_checkpoint", ppo / "best_checkpoint")
    merged = write_run(tmp_path / "merged", "merge", [], parent=str(ppo / "best_checkpoint"))
    page = make_page(tmp_path, merged, ppo / "best_checkpoint")
    header = re.sub("<[^>]*>", "", page.source.partition("<header>")[2].partition("</header>")[0])
    assert "model → PPO → Merge" in " ".join(header.split()) and "Reward" in page.text("figcaption")


def test_what_is_mistyped_is_one_line(tmp_path, plain_llama, undrawn):
    for flags in ([tmp_path / "nowhere"], [plain_llama], [], ["--what", tmp_path]):
        out, err = run(report, *flags, "--output", tmp_path / "page.html", code=2)
        assert re.fullmatch("error: .*\n", err) and not out and not (tmp_path / "page.html").exists()
    folder = write_run(tmp_path / "ppo", "rl", ppo_log())
    for place in (tmp_path, folder / "metrics.jsonl" / "page.html"):  # a directory, and in a file
        assert re.fullmatch("error: .*\n", run(report, folder, "--output", place, code=2)[1])


# ---- alone, watching, at size ----


def test_it_runs_alone_from_a_copy_and_without_its_packages_says_how_to_get_them(tmp_path):
    """-S -I: Python without site-packages. With them, no torch is loaded."""
    shutil.copy(ROOT / "report.py", tmp_path)
    write_run(tmp_path / "ppo", "rl", ppo_log())
    bare = [sys.executable, "-S", "-I", "report.py"]
    done = subprocess.run([*bare, "ppo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch("error: .*pip install jinja2 matplotlib\n", done.stderr)
    done = subprocess.run([*bare, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--watch" in done.stdout
    code = "import sys, report; report.main(['ppo']); assert not {'torch', 'transformers', 'training_rl'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "report.html", done.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_packages_are_in_its_own_block():
    block = re.search(r"^# /// script\n(.*?)^# ///", (ROOT / "report.py").read_text(encoding="utf-8"), re.M | re.S)[1]
    assert '"jinja2>=' in block and '"matplotlib>=' in block and "torch" not in block


def test_watching_ends_with_the_run(tmp_path, monkeypatch, undrawn):
    """The page reloads itself while the run goes on, is written only when there is something new, and then is still."""
    page, folder = tmp_path / "page.html", tmp_path / "ppo"
    seen, steps = [], iter(["start", "nothing", "more", "finish"])

    def pass_time(seconds):
        seen.append((page.read_text(encoding="utf-8"), page.stat().st_mtime_ns))
        step = next(steps)
        if step == "start":
            write_rows(folder / "metrics.jsonl", ppo_log()[:5])
        elif step == "more":
            write_rows(folder / "metrics.jsonl", ppo_log()[:10])
            os.utime(folder / "metrics.jsonl", (2e9, 2e9))
        elif step == "finish":
            shutil.rmtree(folder)
            write_run(folder, "rl", ppo_log(), {"train_runtime": 90.0})

    monkeypatch.setattr(report.time, "sleep", pass_time)
    run(report, folder, "--watch", "--output", page)
    assert all('http-equiv="refresh"' in text for text, _ in seen)
    assert "Not there yet" in seen[0][0] and "step 5" in seen[1][0] and "step 10" in seen[3][0]
    assert seen[1] == seen[2] and seen[0][1] < seen[1][1] < seen[3][1]
    last = page.read_text(encoding="utf-8")
    assert "refresh" not in last and "Did it work? Yes" in last and not list(tmp_path.glob("*.partial"))


def test_ctrl_c_leaves_a_page_that_is_still(tmp_path, monkeypatch, undrawn):
    def stop(seconds):
        assert 'http-equiv="refresh"' in (tmp_path / "page.html").read_text(encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", stop)
    folder = write_run(tmp_path / "ppo", "rl", ppo_log()[:-1], finished=False)
    run(report, folder, "--watch", "--output", tmp_path / "page.html", code=130)
    assert "refresh" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """10,000 logged updates with noise, and one of them far off."""
    noise = random.Random(0).gauss
    curves = {key: lambda at: at + noise(0, 1) for key in ppo_log(1)[0] if "/" in key}
    curves["val/explained_variance"] = lambda at: at - 9.0 * (0.4999 < at < 0.50006)
    curves["loss/value_avg"] = lambda at: noise(0, 0.1) + 500 * (0.4999 < at < 0.50006)
    folder = tmp_path_factory.mktemp("long") / "ppo"
    return make_page(folder.parent, write_run(folder, "rl", ppo_log(10_000, **curves)))


def test_ten_thousand_steps_are_a_small_page_that_keeps_the_extremes(long_run):
    page = long_run
    assert len(page.source.encode()) < 2_500_000
    figure = page.source.partition("Value loss")[2].partition("</svg>")[0]
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke-opacity: 0.25', figure)
    heights = [float(y) for _, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", paths[0])]
    typical = sorted(heights)[len(heights) // 2]
    assert min(heights) < 50 < 130 < typical  # the one far off is drawn; y grows downwards


# ---- in a browser ----

PROBE = """
<script>
const hit = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const inside = (a, b) => a.left > b.left - 1 && a.right < b.right + 1 && a.top > b.top - 1 && a.bottom < b.bottom + 1;
const box = element => element.getBoundingClientRect();
const style = element => getComputedStyle(element);
const linear = value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
function luminance(color) {
  const [red, green, blue] = color.match(/[\\d.]+/g).slice(0, 3).map(value => linear(value / 255));
  return .2126 * red + .7152 * green + .0722 * blue;
}
function contrast(element, color) {
  while (style(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
  const [low, high] = [color, style(element).backgroundColor].map(luminance).sort((a, b) => a - b);
  return (high + .05) / (low + .05);
}
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(element => element.open = true);
  const found = {
    errors: failures, width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    title: document.title, texts: document.querySelectorAll("svg text").length,
    wide: [], cut: [], overlaps: [], pale: [],
  };
  for (const element of document.querySelectorAll("html, body *:not(svg *)")) {
    const blocks = style(element).display !== "inline";
    if (blocks && element.scrollWidth > element.clientWidth + 1) found.wide.push(element.outerHTML.slice(0, 80));
  }
  for (const group of document.querySelectorAll("svg, .numbers div")) {
    const parts = [...group.querySelectorAll("text, dt, dd")];
    parts.forEach((part, i) => {
      const name = group.ariaLabel + ": " + part.textContent;
      if (!inside(box(part), box(group))) found.cut.push(name);
      parts.slice(i + 1).filter(other => hit(box(part), box(other))).forEach(() => found.overlaps.push(name));
    });
  }
  for (const element of document.querySelectorAll("p, dt, dd, h1, h2, h3, h4, summary, mark, b, code, svg text")) {
    const color = element.tagName === "text" ? style(element).fill : style(element).color;
    if (contrast(element, color) < 4.5) found.pale.push(element.textContent.slice(0, 80));
  }
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
FAULTS = ("errors", "wide", "cut", "overlaps", "pale")  # what the probe looks for
FRAME = """<!doctype html><body style="margin: 0"><pre id="found"></pre>
<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>
<script>addEventListener("message", event => {{ found.textContent = event.data; }});</script>"""


def browse(folder, page, width, dark, probe=True):
    """(what the probe found in a copy of the page in a frame of that width, the browser's messages)."""
    folder.mkdir()
    text = page.read_text(encoding="utf-8")
    if probe:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        watch = "<script>const failures = []; onerror = message => failures.push(message);</script>"
        text = text.replace("<head>", f"<head>{watch}")
        text = text.replace("</body>", PROBE + "</body>")
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    command = f"""{CHROMIUM} --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --disable-quic --enable-logging=stderr --virtual-time-budget=8000
        --blink-settings=preferredColorScheme={0 if dark else 1} --window-size={max(width, 800)},900 --dump-dom""".split()
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # nothing leaves the machine
    done = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]
    return json.loads(html.unescape(found) or "{}"), done.stderr


@pytest.fixture(scope="module")
def shown(chain, tmp_path_factory):
    """A page with everything on it: the real chain, the warnings, long names, and hostile texts."""
    out = tmp_path_factory.mktemp("shown")
    rtl = [
        {"step": 2, "row": i, "prompt": text, "policy_answer": text, "reference_answer": "no"}
        for i, text in enumerate(HOSTILE.values())
    ]
    ppo = write_run(out / ("ppo_" * 30), "rl", ppo_log(60, objective__kl=lambda at: 40_000 * at**4), samples=rtl)
    scores = [
        {"row": i, "score_chosen": math.sin(i), "score_rejected": 0.2, "length_chosen": i, "length_rejected": 50}
        for i in range(99)
    ]
    rm = write_run(
        out / "rm", "reward", [{"step": 1, "loss": 1e-5, "margin": 0.0}], reward_metrics(0.5, 0.4), scores=scores
    )
    run(report, *chain, ppo, rm, "--output", out / "report.html")
    return out / "report.html"


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_whole(shown, width, dark, tmp_path):
    """Nothing is cut off, overlaps, or is too pale to read (WCAG: 4.5 to 1); no error, no script run."""
    found, _ = browse(tmp_path / "probe", shown, width, dark)
    assert (found["width"], found["dark"], found["title"]) == (width, dark, Page(shown).text("h1"))
    assert found["texts"] > 100
    assert [(name, found[name]) for name in FAULTS if found[name]] == []


@in_a_browser
def test_the_browser_would_have_seen_it(shown, tmp_path):
    """On a page with faults of every kind, each is found."""
    faults = ".numbers div { width: 30rem; } .numbers dt { margin-right: -9rem; flex: none; } .soft { color: #ccc; }"
    faults += "svg text { font-size: 40px !important; }</style><script>fault()</script>"
    other = tmp_path / "other.html"
    other.write_text(shown.read_text(encoding="utf-8").replace("</style>", faults, 1), encoding="utf-8")
    found, _ = browse(tmp_path / "probe", other, 390, False)
    assert [name for name in FAULTS if not found[name]] == []


@in_a_browser
def test_a_browser_has_nothing_to_say_of_the_page_as_it_is(shown, tmp_path):
    """Neither on its console nor to the network."""
    other = tmp_path / "other.html"
    other.write_text('<img src="http://example.com/image.png"><script>console.log(1)</script>', encoding="utf-8")
    found = {}
    for page in (shown, other):
        _, messages = browse(tmp_path / page.stem, page, 1280, False, probe=False)
        log = json.loads((tmp_path / page.stem / "net.json").read_text(encoding="utf-8"))
        asked = [event["params"] for event in log["events"] if "initiator" in event.get("params", {})]
        # the browser itself asks for things, too, and is no origin
        urls = {params["url"] for params in asked if params["initiator"] != "not an origin"}
        found[page] = ("CONSOLE" in messages, {url for url in urls if not url.startswith(("file:", "data:"))})
    assert found == {shown: (False, set()), other: (True, {"http://example.com/image.png"})}


@in_a_browser
def test_a_page_of_ten_thousand_steps_opens(long_run, tmp_path):
    found, _ = browse(tmp_path / "probe", long_run.path, 1280, False)
    assert found["errors"] == found["cut"] == found["overlaps"] == [] and found["texts"] > 50
