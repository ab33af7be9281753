"""Data in the forms of TRL and the hub, tools in chats, rewards that know the answer, and the best policy kept."""

import json
import re
from pathlib import Path

import pytest
import torch
import trl
from conftest import make_model, run, write_rows
from test_errors import ROWS, TRAINING, command, models, refuse  # noqa: F401 - fixtures
from transformers import AutoTokenizer

QUESTIONS = [f"Why is {i} even?" for i in range(6)]
GOOD, BAD = [f"Since {i} is twice {i // 2}." for i in range(6)], [f"No idea about {i}." for i in range(6)]


def turn(role, content):
    return {"role": role, "content": content}


def pairs(form):
    """The same six pairs in a form of the hub."""
    rows = []
    for question, good, bad in zip(QUESTIONS, GOOD, BAD):
        ask, better, worse = [turn("user", question)], [turn("assistant", good)], [turn("assistant", bad)]
        dialogue = f"\n\nHuman: {question}\n\nAssistant: "
        rows.append({
            "plain": {"prompt": question, "chosen": good, "rejected": bad},
            "explicit": {"prompt": ask, "chosen": better, "rejected": worse},
            "mixed": {"prompt": question, "chosen": better, "rejected": worse},
            "whole": {"prompt": question, "chosen": ask + better, "rejected": ask + worse},
            "implicit": {"chosen": ask + better, "rejected": ask + worse},
            "hh-rlhf": {"chosen": dialogue + good, "rejected": dialogue + bad},
            "strings": {"chosen": f"{question} {good}", "rejected": f"{question} {bad}"},
            "renamed": {"frage": question, "gut": good, "schlecht": bad},
        }[form])  # fmt: skip
    return rows


def texts(out):
    """What a dry run shows, without the names of files."""
    return out[out.index("--- row") :]


@pytest.mark.parametrize("form", ["explicit", "mixed", "whole", "implicit", "hh-rlhf", "strings", "renamed"])
def test_pairs_in_every_form_are_the_same_texts(reward, models, tmp_path, form):  # noqa: F811
    flags = ["--dry_run", "--columns", "prompt=frage", "chosen=gut", "rejected=schlecht"][
        : 5 if form == "renamed" else 1
    ]
    plain, _ = run(reward, *command("reward", models, tmp_path / "a", "--dry_run", rows=pairs("plain")))
    out, _ = run(reward, *command("reward", models, tmp_path / "b", *flags, rows=pairs(form)))
    assert texts(out) == texts(plain) and GOOD[0] in plain


@pytest.mark.parametrize(
    "form", ["completion", "messages", "conversations", "renamed", "hh-rlhf", "whole", "whole texts"]
)
def test_answers_in_every_form_are_the_same_texts(sft, models, tmp_path, form):  # noqa: F811
    rows, flags = [], ["--dry_run", "--prompt_format", "chat"]
    for question, good in zip(QUESTIONS, GOOD):
        rows.append({
            "completion": {"prompt": question, "completion": good},
            "messages": {"prompt": [turn("user", question)], "completion": [turn("assistant", good)]},
            "conversations": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": good}]},
            "renamed": {"instruction": question, "output": good, "prompt": "something else"},
            "hh-rlhf": {"prompt": f"\n\nHuman: {question}\n\nAssistant:", "completion": good},
            "whole": {"prompt": question, "chosen": [turn("user", question), turn("assistant", good)]},
            "whole texts": {"prompt": question, "chosen": f"\n\nHuman: {question}\n\nAssistant: {good}"},
        }[form])  # fmt: skip
    plain_rows = [{"prompt": question, "response": good} for question, good in zip(QUESTIONS, GOOD)]
    plain, _ = run(sft, *command("sft", models, tmp_path / "a", *flags, rows=plain_rows))
    flags += ["--columns", "prompt=instruction", "response=output"] if form == "renamed" else []
    flags = [flag for flag in flags if form not in ("messages", "conversations") or flag in ("--dry_run",)]
    out, _ = run(sft, *command("sft", models, tmp_path / "b", *flags, rows=rows))
    assert texts(out) == texts(plain) and "[[" + GOOD[0] in plain.replace("\n", "")


@pytest.mark.parametrize("stage", TRAINING)
def test_a_system_column_and_columns_that_are_not_there(request, refuse, models, tmp_path, stage):  # noqa: F811
    rows = [{**row, "system": f"Be brief {i}." if i else None} for i, row in enumerate(ROWS)]
    flags = ["--dry_run", "--prompt_format", "chat"]
    out, _ = run(request.getfixturevalue(stage), *command(stage, models, tmp_path, *flags, rows=rows))
    shown = [f"system\nBe brief {i}." in out for i in range(8)]
    assert any(shown) and not shown[0] and "None" not in texts(out)
    refuse(stage, "--columns prompt=frage.*chosen", "--columns", "prompt=frage")


def test_a_system_column_beside_chats_and_a_first_row_without_one(sft, models, tmp_path):  # noqa: F811
    """The prompt of a ShareGPT row; and a row that is left out does not choose the format of all."""
    rows = [{"conversations": None, "system": None}]
    rows += [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": good}], "system": "Be brief."}
        for question, good in zip(QUESTIONS * 2, GOOD * 2)
    ]
    out, _ = run(sft, *command("sft", models, tmp_path, "--dry_run", rows=rows))
    assert "format chat" in out and "system\nBe brief." in out and "not read" not in out


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "lamp <|im_end|>"}}}
CHAT = [
    turn("user", "What is a lamp?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "look_up", "content": "a thing that shines"},
    turn("assistant", "It shines."),
]


def test_tools_are_context(sft, tmp_path):
    """Calls and results go through a template that knows them and are not trained on; the answer is; what looks like a
    special token in an argument is text. A template that does not know tools leaves the row out."""
    base = Path(make_model(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [{"messages": [turn("user", f"Why {i}?"), turn("assistant", "So.")]} for i in range(12)]
    data = write_rows(tmp_path / "train.jsonl", [*rows, {"messages": CHAT}])
    flags = ["--model_path", base, "--dataset_name", data, "--dry_run", "--output_dir", tmp_path / "out"]
    _, err = run(sft, *flags)
    assert re.search(r"warning: .*1 of 13 rows left out \(row 12\).*leaves out text of turn 1", err)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(base)
    assert "left out" not in run(sft, *flags)[1]
    text = sft.PromptFormat(tokenizer, "chat")
    ids, mask = text.encode(sft.read_messages(CHAT, last="assistant"))
    trained = tokenizer.decode([token for token, is_trained in zip(ids, mask) if is_trained])
    assert trained == "It shines.<|im_end|>"
    assert "look_up" in tokenizer.decode(ids) and "a thing that shines" in tokenizer.decode(ids)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == tokenizer.decode(ids).count("<|im_end|>") - 1


@pytest.mark.parametrize("stage", TRAINING)
def test_many_rows_of_another_form_come_first(request, models, tmp_path, stage):  # noqa: F811
    """A data set is written by the thousand, and takes its types from the first of them: here rows that are left out, and
    for PPO chats that have no tool calls yet."""
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}] * 1100
    rows += [{"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No."} for i in range(10_000)]
    argv = command(stage, models, tmp_path, "--dry_run", rows=rows)
    out, err = run(request.getfixturevalue(stage), *argv)
    assert re.search(r"\b10000 (rows|of 11100 pairs|prompts)", out) and "1100" in out + err
    if stage == "rl":
        plain = [{"prompt": [turn("user", f"Why {i}?")]} for i in range(1100)]
        thoughtful = [
            {"prompt": [turn("user", "1?"), turn("assistant", "1.") | {"thinking": "so"}, turn("user", "2?")]}
        ]
        argv = command(stage, models, tmp_path / "chats", "--dry_run", rows=plain + thoughtful)
        assert "1101 prompts" in run(request.getfixturevalue(stage), *argv)[0]


def test_a_reward_function_file_that_does_not_run_is_one_line(refuse, tmp_path):  # noqa: F811
    """It may import what lies beside it."""
    for text, problem in (
        ("def (", "SyntaxError"),
        ("import nowhere_at_all", "nowhere_at_all"),
        ("1 / 0", "ZeroDivision"),
    ):
        (tmp_path / "broken.py").write_text(text, encoding="utf-8")
        refuse("rl", f"broken.py:score.*{problem}", "--reward_function", f"{tmp_path / 'broken.py'}:score")
    refuse("rl", "could not convert.*1.2.3", "--reward_function", f"{tmp_path / 'broken.py'}:score=1.2.3")
    (tmp_path / "beside_the_rule.py").write_text("VALUE = 1.0\n", encoding="utf-8")
    (tmp_path / "rule.py").write_text(
        "from beside_the_rule import VALUE\n\ndef score(prompts, responses):\n    return [VALUE] * len(responses)\n",
        encoding="utf-8",
    )
    refuse("rl", "nothing", "--reward_function", f"{tmp_path / 'rule.py'}:nothing")
    refuse("rl", "target_kl multiplies", "--target_kl", 3, "--kl_coef", 0)


RULES = """
seen = []

def exact(prompts, responses, answer):
    return [1.0 if right in response else 0.0 for response, right in zip(responses, answer)]

def rated(prompts, responses, messages, level=None, **columns):
    seen.append((prompts, messages, level, columns))
    return [2.0] * len(responses)

def absent(prompts, responses, solution):
    return [0.0] * len(responses)
"""


def test_rewards_that_know_the_answer(rl, refuse, models, tmp_path):  # noqa: F811
    """Functions get the columns that they name, as lists by name, with their weights; each one's mean is in the metrics; a
    column that is not there is refused; one with a default may be missing."""
    rules = tmp_path / "rules_of_columns.py"
    rules.write_text(RULES, encoding="utf-8")
    rows = [{"prompt": f"Why {i}?", "answer": "", "grade": i} for i in range(8)]
    refuse("rl", "absent.*solution.*train.jsonl", "--reward_function", f"{rules}:absent", rows=rows)
    refuse("rl", "WEIGHT", "--reward_function", f"{rules}:exact=much", rows=rows)
    flags = ["--reward_function", f"{rules}:exact=3", "--reward_function", f"{rules}:rated=-0.5"]
    argv = command("rl", models, tmp_path, *flags, "--total_episodes", 1, "--per_device_train_batch_size", 1, rows=rows)
    calls = []
    original = rl.RewardFunction.__call__

    def listen(function, batch, responses):
        calls.append((function.name, batch))
        return original(function, batch, responses)

    rl.RewardFunction.__call__ = listen
    try:
        run(rl, *argv)
    finally:
        rl.RewardFunction.__call__ = original
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (line,) = [json.loads(line) for line in lines if "objective/scores" in line]
    length = line["reward/length"]
    assert (line["reward/exact"], line["reward/rated"]) == (1.0, 2.0)
    assert line["objective/scores"] == pytest.approx(length + 3 * 1.0 - 0.5 * 2.0)
    rated = rl.RewardFunction(f"{rules}:rated")
    chat = json.dumps([turn("user", "Why?")])
    batch = [{"text": "Why?", "messages": chat, "column_answer": "a", "column_grade": 3}]
    assert rated(batch, ["So."]) == [2.0]
    prompts, messages, level, columns = rated.function.__globals__["seen"][-1]
    assert (prompts, messages, level) == (["Why?"], [[turn("user", "Why?")]], None)
    assert columns == {"answer": ["a"], "grade": [3]}


def test_the_best_policy_is_kept(rl, models, tmp_path):  # noqa: F811
    """best_checkpoint/ is the policy of the evaluation whose score less the price of the KL is highest; the end says which
    update that was; it loads as the final one does."""
    rules = tmp_path / "rules_of_time.py"
    rules.write_text(
        "calls = []\n\ndef peak(prompts, responses):\n    calls.append(0)\n"
        "    return [float(len(calls) == 6)] * len(responses)\n",
        encoding="utf-8",
    )
    argv = command("rl", models, tmp_path, "--use_lora", "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 9)
    argv[argv.index("--reward_function") + 1] = f"{rules}:peak"
    out, _ = run(rl, *argv)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = {line["step"]: line["eval_quality"] for line in lines if "eval_quality" in line}
    best = max(evaluations, key=evaluations.get)
    assert (
        best == 2 and evaluations[best] > 0.9
    )  # the sixth call: after one at the start, two updates, three evaluations
    assert re.search(rf"best_checkpoint is of update {best}:", out)
    assert rl.read_json(tmp_path / "out" / "best_checkpoint" / "run.json")["metrics"]["step"] == best
    kept, there = (
        tmp_path / "out" / name / "adapter_model.safetensors" for name in ("best_checkpoint", f"checkpoint-{best}")
    )
    assert kept.read_bytes() == there.read_bytes()
    assert rl.read_json(tmp_path / "out" / "best_checkpoint" / "run.json")["stage"] == "rl"
    prices = {
        line["step"]: line["objective/kl"] * line["objective/kl_coef"] for line in lines if "objective/kl" in line
    }
    scores = {line["step"]: line["eval_policy_score"] for line in lines if "eval_quality" in line}
    for step, quality in evaluations.items():
        assert torch.isclose(torch.tensor(quality), torch.tensor(scores[step] - prices[step]), atol=1e-6)


@pytest.mark.parametrize("stage", TRAINING)
@pytest.mark.parametrize("form", ["explicit", "whole", "own"])
def test_a_system_column_beside_lists_of_messages(request, models, tmp_path, stage, form):  # noqa: F811
    """It opens the chat, unless that has a system turn of its own."""
    rows = pairs("plain" if form == "whole" else "explicit")
    for row, whole in zip(rows, pairs("whole")):
        row["system"] = "Be brief."
        if form == "whole":
            row |= {"chosen": whole["chosen"], "rejected": whole["rejected"]}
        if form == "own":
            row["prompt"] = [turn("system", "Be kind."), *row["prompt"]]
    argv = command(stage, models, tmp_path, "--dry_run", "--prompt_format", "chat", rows=rows)
    out, _ = run(request.getfixturevalue(stage), *argv)
    assert texts(out).count("system\nBe ") == 2
    assert ("system\nBe kind." if form == "own" else "system\nBe brief.") in out


def test_a_system_column_beside_messages(sft, models, tmp_path):  # noqa: F811
    """The form of Anthropic and Bedrock."""
    rows = [
        {"system": "Be brief.", "messages": [turn("user", question), turn("assistant", "So.")]} for question in GOOD
    ]
    out, _ = run(sft, *command("sft", models, tmp_path, "--dry_run", rows=rows))
    assert texts(out).count("system\nBe brief.") == 2


@pytest.mark.parametrize("stage", TRAINING)
def test_tools_that_the_text_would_leave_out(refuse, stage):  # noqa: F811
    """Answers that call tools which no prompt describes teach a model to make them up."""
    tools = json.dumps([{"name": "look_up", "description": "Looks up.", "parameters": {}}])
    rows = [{**row, "chosen": f"look_up({i})", "tools": tools} for i, row in enumerate(ROWS)]
    refuse(stage, "the chat template leaves out the tools", "--prompt_format", "chat", rows=rows)
    refuse(stage, "tools need a chat template", "--prompt_format", "qa", rows=rows)


@pytest.mark.parametrize("stage", TRAINING)
@pytest.mark.parametrize("tools", ["[]", []])
def test_an_empty_list_of_tools_is_none(request, tmp_path, stage, tools):
    """Llama 3's template would tell of functions and name none."""
    base = Path(make_model(tmp_path / "base"))
    template = Path(trl.__file__).parent / "chat_templates" / "llama3_2.jinja"
    (base / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    rows = [{**row, "tools": tools} for row in ROWS]
    argv = command(stage, {"base": base}, tmp_path, "--dry_run", "--prompt_format", "chat", rows=rows)
    out, _ = run(request.getfixturevalue(stage), *argv)
    assert "Why " in texts(out) and "function" not in texts(out)


def test_tools_that_a_system_turn_describes(sft, models, tmp_path):  # noqa: F811
    """The form of NousResearch's Hermes: a template that knows no tools leaves nothing out."""
    chat = [turn("system", "Call look_up."), turn("user", "Why?"), turn("assistant", "look_up(1)")]
    rows = [{"messages": chat, "tools": json.dumps([{"name": "look_up", "parameters": {}}])}]
    out, _ = run(sft, *command("sft", models, tmp_path, "--dry_run", rows=rows))
    assert "Call look_up." in texts(out)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_thoughts_that_the_template_would_leave_out(refuse, stage):  # noqa: F811
    """Of a row that has thoughts its answer alone is not what it was brought for."""
    answers = [{**turn("assistant", f"So {i}."), "reasoning_content": "Let me see."} for i in range(4)]
    rows = [
        {"prompt": f"Why {i}?", "chosen": [answer], "rejected": [turn("assistant", "No.")]}
        for i, answer in enumerate(answers)
    ]
    refuse(stage, "leaves out the thoughts of turn 1", "--prompt_format", "chat", rows=rows)


@pytest.mark.parametrize("column", ["instruction", "input", "trajectory"])
def test_answers_whose_question_is_in_another_column(refuse, column):  # noqa: F811
    """Intel's orca pairs and UltraInteract: what the answers begin with, `Step 1:`, is not their question."""
    rows = [{column: f"Why {i}?", "chosen": f"Step 1: So {i}.", "rejected": f"Step 1: No {i}."} for i in range(8)]
    refuse("reward", f"--columns prompt={column} names the question", rows=rows)
    rows = [{"chosen": f"So {i}.", "rejected": f"No {i}."} for i in range(8)]
    refuse("reward", "--columns prompt=COLUMN names the question", rows=rows)


def test_texts_that_repeat_the_question_of_another_column(reward, models, tmp_path):  # noqa: F811
    """They are whole; what the hint above says would ask the question twice."""
    rows = [{"instruction": row["prompt"], **row} for row in pairs("plain")]
    for row in rows:
        question = row.pop("prompt")
        row |= {"input": "", **{side: f"{question} {row[side]}" for side in ("chosen", "rejected")}}
    out, _ = run(reward, *command("reward", models, tmp_path, "--dry_run", rows=rows))
    assert texts(out).count(QUESTIONS[0]) == 1 and "6 of 6 pairs kept" in out


def test_hints_do_not_guess(refuse):  # noqa: F811
    """A system prompt is no question, and which of two answers is better, their names do not say."""
    orca = [{"system_prompt": "Be brief.", "instruction": f"Why {i}?", "response": "So."} for i in range(4)]
    for stage in TRAINING:
        refuse(stage, "(NAME=COLUMN|prompt=COLUMN) renames", rows=orca)
    judged = [{"prompt": f"Why {i}?", "response_1": "So.", "response_2": "No.", "better": 2} for i in range(4)]
    refuse("reward", "--columns NAME=COLUMN renames", rows=judged)


@pytest.mark.parametrize("stage", TRAINING)
@pytest.mark.parametrize("name", ["table.xlsx", "table.tsv", "rows.txt"])
def test_a_file_of_another_kind(refuse, tmp_path, stage, name):  # noqa: F811
    (tmp_path / name).write_text("prompt\tchosen\n", encoding="utf-8")
    refuse(stage, rf"{name}: the kinds .* \.jsonl .*\.csv \.parquet", "--dataset_name", tmp_path / name)
