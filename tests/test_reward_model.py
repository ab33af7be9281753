"""The reward model script: pairs, scores and gradients against the plain classifier, what is saved, and the report."""

import errno
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl
from conftest import SHARED, make_model, make_tokenizer, run, write_rows
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline, set_seed
from trl import RewardConfig, RewardTrainer

PLACES = ["Paris", "France", "the sea", "red light", "the sky", "blue air", "a capital", "z", "the wind", "Answer"]
PAIRS = [
    {"question": f"Where is {a} of {b}?", "response_j": f"It is in {b}.", "response_k": "I do not know, who would ask?" * (1 + i % 3)}
    for i, (a, b) in enumerate((a, b) for a in PLACES for b in PLACES[:3])
]  # fmt: skip
torch.storage._dtype_to_storage_type_map()  # made once, and not under the float64 fixture
SGD = ["--set", "optim=sgd", "--max_steps", 1, "--lr_scheduler_type", "constant", "--max_grad_norm", 0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def flags(model, data, output):
    return ["--model_path", model, "--dataset_name", data, "--output_dir", output]


def train(reward, model, data, output, *more):
    """Run the script; its final checkpoint."""
    run(reward, *flags(model, data, output), *more)
    return Path(output) / "final_checkpoint"


def evaluate(reward, model, data, output):
    """Scores (2, pairs) that --eval_only leaves, and its metrics.json."""
    run(reward, *flags(model, data, output), "--eval_only", "--eval_split", "train")
    lines = lines_of(Path(output) / "scores.jsonl")
    assert [line["row"] for line in lines] == list(range(len(lines)))
    scores = np.array([[line["score_chosen"], line["score_rejected"]] for line in lines]).T
    return scores, json.loads((Path(output) / "metrics.json").read_text(encoding="utf-8"))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights_of(folder):
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def encode(reward, model, rows, name="chat"):
    """Ids (chosen, rejected) of each row: of a chat those of the template's whole text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if name == "chat":
        write = tokenizer.apply_chat_template
        return [
            [write(chat(row["question"], row[side]), return_dict=False) for side in ("response_j", "response_k")]
            for row in rows
        ]
    prompt_format = reward.PromptFormat(tokenizer, name)
    return [
        [prompt_format.encode(chat(row["question"], row[side]))[0] for side in ("response_j", "response_k")]
        for row in rows
    ]


def chat(*turns):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(turns), turns)]


def score_alone(model, texts):
    """Scores by the model's own forward, one text at a time."""
    return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in texts])


# Rows


def test_all_schemas_make_the_same_pairs(reward, llama, tmp_path):
    question, good, bad = "Where is it?", "In Paris.", "No idea"
    rows = [
        {"prompt": question, "chosen": good, "rejected": bad},
        {"prompt": question, "chosen": chat(question, good), "rejected": chat(question, bad)},
        {"question": question, "response_j": good, "response_k": bad},
    ]
    shown = set()
    for i, row in enumerate(rows):
        out, _ = run(reward, *flags(llama, write_rows(tmp_path / f"{i}.jsonl", [row]), tmp_path / "out"), "--dry_run")
        shown.add(out[out.index("--- row 0") :])
    (text,) = shown
    assert "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n" in text
    assert "[[chosen: In Paris.<|im_end|>\n]]\n[[rejected: No idea<|im_end|>\n]]" in text


def test_a_chat_is_given_whole_and_without_a_template_as_question_and_answer(reward, llama, plain_llama, tmp_path):
    turns = ("Where is it?", "In France.", "Where in France?")
    row = {"prompt": turns[0], "chosen": chat(*turns, "Paris."), "rejected": chat(*turns, "No idea")}
    data = write_rows(tmp_path / "chat.jsonl", [row])
    out, _ = run(reward, *flags(llama, data, tmp_path / "out"), "--dry_run")
    assert "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["chosen"][:3]) in out
    out, _ = run(reward, *flags(plain_llama, data, tmp_path / "out"), "--dry_run")
    assert (
        "Question: Where is it?\n\nIn France.\n\nWhere in France?\n\nAnswer:\n[[chosen:  Paris.<|endoftext|>]]" in out
    )


def test_rows_that_are_left_out_are_counted_with_their_numbers(reward, llama, tmp_path):
    rows = [{**PAIRS[0], "question": f"Question {i}"} for i in range(20)]
    rows[3]["response_k"] = "word " * 400
    rows[5]["response_k"] = rows[5]["response_j"]
    rows[7]["question"] = None
    rows[8]["response_j"] = "  "
    rows[9] = rows[1]
    out, _ = run(reward, *flags(llama, write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out"), "--dry_run", "--max_length", 100)  # fmt: skip
    assert "15 of 20 pairs kept" in out
    for reason in ("1 longer than --max_length 100 (rows 3)", "1 of two equal texts (rows 5)", "1 equal to an earlier pair (rows 9)", "1 question + response_j should have text in turn 0 (user) (rows 7)"):  # fmt: skip
        assert reason in out
    rows[9] = {**PAIRS[0], "response_j": 5}
    _, error = run(reward, *flags(llama, write_rows(tmp_path / "b.jsonl", [{key: str(value) if value == 5 else value for key, value in row.items()} | {"response_j": None if i in (8, 9) else "x"} for i, row in enumerate(rows)]), tmp_path / "out"), code=2)  # fmt: skip
    assert (
        "3 of 20 rows are no pairs" in error
        and "2 question + response_j should have text in turn 1 (assistant) (rows 8, 9)" in error
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize("place", ["question_response_jk/reward", "chat_preferences", "ultrafeedback_binarized_sample"])
def test_real_pairs_are_trained_on_and_scored(reward, tmp_path, place):
    """Each schema as real data have it: every pair that is kept is scored, and the scores are finite."""
    base = make_model(tmp_path / "model", max_position_embeddings=4096)
    more = ["--max_samples", 24, "--max_length", 4096, "--max_steps", 1]
    splits = ["--train_split", "train_prefs", "--eval_split", "train_prefs"] if "ultra" in place else ["--eval_split", "train"]  # fmt: skip
    out, _ = run(reward, *flags(base, SHARED / place, tmp_path / "out"), *more, *splits)
    kept = {int(number) for number in re.findall(r"(\d+) of 24 pairs kept", out)}
    report = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["report"]
    assert kept == {report["pairs"]} and report["pairs"] > 12 and math.isfinite(report["loss"])


# Scores and gradients


TINY = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {  # class, its own settings, whether the two texts of a pair share a row
    "llama": ("Llama", {"attention_dropout": 0.5}, True),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
    "qwen3": ("Qwen3", {}, True),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "output_router_logits": True, "sliding_window": None}, True),
    "mistral": ("Mistral", {"sliding_window": 16}, False),
    "mistral, a wide window": ("Mistral", {"sliding_window": 512}, True),
    "gemma2": ("Gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}, False),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5}, None),
    "qwen3.5": ("Qwen3_5Text", {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}, False),
}  # fmt: skip


def make_classifier(directory, family):
    """A random classifier of that family, with a head that is no small one."""
    name, settings, _ = FAMILIES[family]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TINY, **settings, "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_each_text_alone(reward, float64, pairs, tmp_path, family):
    """Through the plain classifier, without dropout: in float64, to 1e-9 of the largest."""
    base = make_classifier(tmp_path / "base", family)
    scores, _ = evaluate(reward, base, pairs, tmp_path / "eval")
    out, _ = run(
        reward, *flags(base, pairs, tmp_path / "out"), *SGD, "--learning_rate", 1, "--per_device_train_batch_size", 30
    )
    if FAMILIES[family][2] is not None:
        assert ("each text of a pair has a row of its own" not in out) == FAMILIES[family][2]
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float64).eval()
    chosen, rejected = (score_alone(model, texts) for texts in zip(*encode(reward, base, PAIRS)))
    assert chosen.std() > 0.01
    assert scores == pytest.approx(torch.stack([chosen, rejected]).detach().numpy(), abs=1e-9)
    torch.nn.functional.logsigmoid(chosen - rejected).mean().backward()
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "final_checkpoint", dtype=torch.float64)  # fmt: skip
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, weight in trained.named_parameters():
        if name in gradients:
            step = weight - dict(model.named_parameters())[name]
            assert (step - gradients[name]).abs().max() < 1e-9 * largest, name
    before, after = (json.loads((tmp_path / path / "config.json").read_text()) for path in ("base", "out/final_checkpoint"))  # fmt: skip
    kept = [name for name in before if "drop" in name or "router" in name]
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}


def test_losses_are_those_of_the_stock_trainer(reward, float64, pairs, tmp_path):
    """Whole batches, so that the order of the pairs is none; a step size with which the margins move."""
    llama = make_model(tmp_path / "base")
    more = ["--max_steps", 3, "--logging_steps", 1, "--learning_rate", 0.01, "--center_rewards_coefficient", 0.1]
    final = train(reward, llama, pairs, tmp_path / "ours", "--use_lora", "--per_device_train_batch_size", 30, *more)
    ours = [line for line in lines_of(tmp_path / "ours" / "metrics.jsonl") if "loss" in line]
    rows = [dict(zip(("chosen_ids", "rejected_ids"), texts)) for texts in encode(reward, llama, PAIRS)]
    set_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float64)
    torch.nn.init.normal_(model.score.weight, std=0.01 * model.config.initializer_range)
    config = RewardConfig(
        output_dir=str(tmp_path / "stock"), per_device_train_batch_size=30, max_steps=3, logging_steps=1, learning_rate=0.01,
        bf16=False, use_cpu=True, seed=42, report_to="none", save_strategy="no", center_rewards_coefficient=0.1,
    )  # fmt: skip
    trainer = RewardTrainer(
        model,
        config,
        processing_class=AutoTokenizer.from_pretrained(final),
        train_dataset=reward.datasets.Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    trainer.train()
    stock = [line for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(stock) == 3 and abs(stock[-1]["margin"]) > 0.01
    for mine, theirs in zip(ours, stock):
        assert (mine["loss"], mine["margin"]) == pytest.approx((theirs["loss"], theirs["margin"]), abs=1e-9)


def test_the_longest_pair_comes_first(reward, llama, pairs, tmp_path):
    """So that too little memory shows in the first step."""
    train(reward, llama, pairs, tmp_path / "out", "--max_steps", 2, "--logging_steps", 1)
    first, second, *_ = lines_of(tmp_path / "out" / "metrics.jsonl")
    sizes = [len(a) + len(b) - len(os.path.commonprefix([a, b])) for a, b in encode(reward, llama, PAIRS)]
    assert first["num_tokens"] == max(sizes) and second["num_tokens"] - first["num_tokens"] in sizes


def test_each_epoch_has_an_order_of_its_own_which_a_resumed_run_meets_again(reward, llama, pairs, tmp_path):
    """The tokens of each step tell the pairs apart: all of them in each epoch, the same after the checkpoint."""
    more = [*flags(llama, pairs, tmp_path / "out"), "--num_train_epochs", 2, "--logging_steps", 1, "--save_steps", 40]
    run(reward, *more)

    def steps():
        return [line["loss"] for line in lines_of(tmp_path / "out" / "metrics.jsonl") if "loss" in line]

    losses = steps()
    tokens = [line["num_tokens"] for line in lines_of(tmp_path / "out" / "metrics.jsonl") if "loss" in line]
    sizes = np.diff([0, *tokens])
    assert len(sizes) == 60 and sorted(sizes[:30]) == sorted(sizes[30:]) and list(sizes[:30]) != list(sizes[30:])
    run(reward, *more, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-40", "--overwrite_output_dir")
    assert steps() == losses


def test_a_full_disk_is_one_line(reward, llama, pairs, tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reward, "publish", save)
    _, err = run(reward, *flags(llama, pairs, tmp_path / "out"), "--max_steps", 1, code=2)
    assert "error: no space left to save" in err


def test_a_finished_model_stays_until_the_new_one_is_complete(reward, llama, pairs, tmp_path, monkeypatch):
    """Resuming where only final_checkpoint/ is left starts from the beginning; what stops that run takes no model."""
    more = [*flags(llama, pairs, tmp_path / "out"), "--max_steps", 1]
    run(reward, *more)
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(reward.RewardTrainer, "training_step", stop)
    run(reward, *more, "--resume_from_checkpoint", code=130)
    assert (tmp_path / "out" / "final_checkpoint" / "model.safetensors").is_file()


def test_dropout_is_that_of_the_adapter_alone(reward, llama, pairs, tmp_path):
    losses = []
    for rate in (0, 0.9, 0.9):
        out = tmp_path / f"{rate}_{len(losses)}"
        train(reward, llama, pairs, out, "--use_lora", "--lora_dropout", rate, "--max_steps", 4, "--logging_steps", 1, "--learning_rate", 0.1)  # fmt: skip
        losses.append([line["loss"] for line in lines_of(out / "metrics.jsonl") if "loss" in line])
    assert losses[1] == losses[2] != losses[0]


def test_a_margin_in_the_data_enters_the_loss(reward, llama, tmp_path):
    data = write_rows(tmp_path / "graded.jsonl", [{**row, "margin": 3} for row in PAIRS])
    out, _ = run(reward, *flags(llama, data, tmp_path / "out"), "--max_steps", 1, "--logging_steps", 1, "--learning_rate", 0)  # fmt: skip
    assert "the column margin is used" in out
    assert lines_of(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(1 + math.exp(3)), abs=0.05)


def test_margins_of_every_kind_are_numbers(reward, llama, tmp_path):
    """Those of a CSV, which is text; whole ones to train on and broken ones to evaluate on. What is no number is refused,
    NaN left out."""
    graded = [{**row, "margin": i} for i, row in enumerate(PAIRS)]
    table = tmp_path / "table.csv"
    Dataset.from_list(graded).to_csv(table)
    out, _ = run(reward, *flags(llama, table, tmp_path / "out"), "--dry_run")
    assert "30 of 30 pairs kept" in out and "the column margin is used" in out
    write_rows(tmp_path / "whole" / "train.jsonl", graded)
    broken = [{**row, "margin": 0.5} for row in PAIRS[:-1]] + [{**PAIRS[-1], "margin": float("nan")}]
    write_rows(tmp_path / "broken" / "test.jsonl", broken)
    places = ["--subset", tmp_path / "whole", "--eval_subset", tmp_path / "broken", "--eval_split", "test"]
    out, _ = run(reward, *flags(llama, "json", tmp_path / "out"), *places, "--dry_run")
    assert "29 of 30 pairs kept" in out and "1 margin is no number (rows 29)" in out
    data = write_rows(tmp_path / "words.jsonl", [{**row, "margin": "much"} for row in PAIRS])
    _, error = run(reward, *flags(llama, data, tmp_path / "out"), "--dry_run", code=2)
    assert "the column margin should have numbers" in error


def test_the_question_of_a_chosen_and_a_rejected_text(reward, llama, tmp_path):
    """Under its other name, too: what two answers begin with is no question where there is one."""
    rows = [{"question": f"Why {i}?", "chosen": "It is so.", "rejected": "It is not."} for i in range(4)]
    out, _ = run(reward, *flags(llama, write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"), "--dry_run")
    assert "schema question + chosen + rejected" in out and "Why 0?" in out


def test_tools_beside_chats_are_read(reward, llama, tmp_path):
    """As in SFT and PPO: the template describes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    shutil.copytree(llama, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    rows = [{"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No.", "tools": json.dumps(tools)} for i in range(4)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    out, _ = run(reward, *flags(tmp_path / "model", data, tmp_path / "out"), "--dry_run")
    assert "look_up" in out and "not read" not in out


# What is saved


@pytest.fixture(scope="module")
def trained(reward, llama, pairs, tmp_path_factory):
    """A LoRA reward model trained on the pairs, with the report on them."""
    output = tmp_path_factory.mktemp("trained") / "reward"
    before = (Path(llama) / "model.safetensors").read_bytes()
    train(reward, llama, pairs, output, "--use_lora", "--per_device_train_batch_size", 6, "--num_train_epochs", 6, "--learning_rate", 0.01, "--eval_split", "train", "--save_steps", 10)  # fmt: skip
    assert (Path(llama) / "model.safetensors").read_bytes() == before
    return output


def test_chosen_outscores_rejected_after_training_and_the_figures_are_kept(trained, llama):
    metrics = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["accuracy_before"] <= 0.8 and metrics["accuracy"] == metrics["report"]["accuracy"] >= 0.95
    assert metrics["report"]["mean_margin"] > 1 and metrics["report"]["swapped"]["agreement"] == 1
    recorded = json.loads((trained / "final_checkpoint" / "run.json").read_text(encoding="utf-8"))
    assert (recorded["stage"], recorded["base_model"], recorded["versions"]["scripts"]) == ("reward", llama, 4)
    assert recorded["metrics"]["accuracy"] == metrics["accuracy"] and recorded["dataset"]["train"]["rows"] == len(PAIRS)
    card = (trained / "final_checkpoint" / "README.md").read_text(encoding="utf-8")
    assert f"`{llama}`" in card and "| accuracy | 1 |" in card and "reward-trainer" in card and "None" not in card
    assert sorted(path.name for path in trained.iterdir()) == ["checkpoint-20", "checkpoint-30", "final_checkpoint", "metrics.json", "metrics.jsonl", "scores.jsonl"]  # fmt: skip


def test_an_adapter_is_relative_to_its_base_and_loads_again_with_its_head(reward, trained, llama, pairs, tmp_path):
    final = trained / "final_checkpoint"
    config = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["task_type"]) == (llama, "SEQ_CLS")
    assert [name for name in weights_of(final) if "lora_" not in name] == ["base_model.model.score.weight"]
    scores, metrics = evaluate(reward, final, pairs, tmp_path / "eval")
    room = 1000 * torch.finfo(torch.float32).eps * abs(scores).max()
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id  # else a padded batch loses the EOS that ends a text
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        final, num_labels=1, pad_token_id=tokenizer.pad_token_id
    ).eval()
    with torch.no_grad():
        for side, texts in zip(scores, zip(*encode(reward, final, PAIRS))):
            assert score_alone(model, texts).tolist() == pytest.approx(side, abs=room)
            batch = tokenizer.pad({"input_ids": list(texts)}, return_tensors="pt")
            assert model(**batch).logits.squeeze(-1).tolist() == pytest.approx(side, abs=room)
    assert not (tmp_path / "eval" / "final_checkpoint").exists() and metrics["accuracy"] >= 0.95


@pytest.mark.parametrize(("kind", "pad"), [("llama", None), ("llama", 2), ("gpt2", None)])
def test_a_full_model_scores_its_last_token_when_it_is_loaded_again(reward, pairs, tmp_path, kind, pad):
    """Also where the config of the base says that its EOS is padding, as SmolLM2's does."""
    base = make_model(tmp_path / "base", kind, chat=kind == "llama", **({"pad_token_id": pad} if pad else {}))
    more = ["--max_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", 0.001]
    final = train(reward, base, pairs, tmp_path / "out", *more)
    scores, _ = evaluate(reward, final, pairs, tmp_path / "eval")
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    room = 1000 * torch.finfo(torch.float32).eps * abs(scores).max()
    with torch.no_grad():
        for side, texts in zip(scores, zip(*encode(reward, final, PAIRS, "chat" if kind == "llama" else "qa"))):
            assert score_alone(model, texts).tolist() == pytest.approx(side, abs=room)
            if kind == "llama":
                batch = tokenizer.pad({"input_ids": list(texts)}, return_tensors="pt")
                assert model(**batch).logits.squeeze(-1).tolist() == pytest.approx(side, abs=room)


@pytest.mark.parametrize(("kind", "lora"), [("llama", []), ("llama", ["--use_lora"]), ("gpt2", [])])
def test_everybody_reads_the_same_scores(reward, pairs, tmp_path, kind, lora):
    """`pipeline("text-classification")` on the template's whole text, or of a model without a template on the text."""
    base = make_model(tmp_path / "base", kind, chat=kind == "llama")
    final = train(reward, base, pairs, tmp_path / "out", "--max_steps", 3, "--learning_rate", 0.001, *lora)
    scores, _ = evaluate(reward, final, pairs, tmp_path / "eval")
    tokenizer = AutoTokenizer.from_pretrained(final)
    load = AutoPeftModelForSequenceClassification if lora else AutoModelForSequenceClassification
    classify = pipeline("text-classification", load.from_pretrained(final, num_labels=1), tokenizer=tokenizer)
    room = 1000 * torch.finfo(torch.float32).eps * abs(scores).max()
    for side, column in zip(scores, ("response_j", "response_k")):
        for row, score in zip(PAIRS, side):
            text = f"Question: {row['question']}\n\nAnswer: {row[column]}{tokenizer.eos_token}"
            if kind == "llama":
                text = tokenizer.apply_chat_template(chat(row["question"], row[column]), tokenize=False)
            assert classify(text, function_to_apply="none")[0]["score"] == pytest.approx(score, abs=room)


def test_a_reward_model_of_an_earlier_version_is_refused(reward, trained, pairs, tmp_path):
    """It read its scores at another token."""
    final = shutil.copytree(trained / "final_checkpoint", tmp_path / "old")
    record = json.loads((final / "run.json").read_text(encoding="utf-8"))
    del record["score_at"]
    (final / "run.json").write_text(json.dumps(record), encoding="utf-8")
    command = flags(final, pairs, tmp_path / "out")
    assert "train it again" in run(reward, *command, "--eval_only", "--eval_split", "train", code=2)[1]


@pytest.fixture(scope="module")
def sft_adapter(llama, tmp_path_factory):
    """What an SFT run leaves: a LoRA adapter that changes the model, its tokenizer, and run.json."""
    folder = tmp_path_factory.mktemp("sft") / "final_checkpoint"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    (folder / "run.json").write_text('{"stage": "sft", "prompt_format": "qa"}', encoding="utf-8")
    return folder


def test_an_sft_adapter_is_continued_on_its_base_in_its_format(reward, sft_adapter, llama, pairs, tmp_path):
    start = weights_of(sft_adapter)
    still = train(reward, sft_adapter, pairs, tmp_path / "still", "--max_steps", 1, "--learning_rate", 0)
    moved = train(reward, sft_adapter, pairs, tmp_path / "moved", "--max_steps", 1, "--learning_rate", 0.01)
    config = json.loads((still / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["r"], config["task_type"]) == (llama, 4, "SEQ_CLS")
    assert set(weights_of(still)) == set(start) | {"base_model.model.score.weight"}
    assert all(torch.equal(weights_of(still)[name], start[name]) for name in start)
    assert all(not torch.equal(weights_of(moved)[name], start[name]) for name in start)
    recorded = json.loads((still / "run.json").read_text(encoding="utf-8"))
    assert (recorded["prompt_format"], recorded["parent"]) == ("qa", str(sft_adapter))
    for more, message in ((["--lora_r", 8], "--lora_r: the adapter"), (["--eval_only", "--eval_split", "train"], "'sft'")):  # fmt: skip
        _, error = run(reward, *flags(sft_adapter, pairs, tmp_path / "no"), *more, code=2)
        assert message in error


def test_a_reward_adapter_is_continued_with_its_head_on_its_own_base_alone(reward, trained, pairs, tmp_path):
    final = trained / "final_checkpoint"
    again = train(reward, final, pairs, tmp_path / "again", "--max_steps", 1, "--learning_rate", 0)
    before, after = weights_of(final), weights_of(again)
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / "adapter_config.json").read_text(encoding="utf-8")) for path in (final, again)]
    assert configs[0]["modules_to_save"] == configs[1]["modules_to_save"]
    other = make_model(tmp_path / "other", seed=1)
    for base, message in ((other, "has other weights"), (tmp_path / "gone", "is not there")):
        copied = shutil.copytree(final, tmp_path / f"copy of {Path(base).name}")
        config = {**configs[0], "base_model_name_or_path": str(base)}
        (copied / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        _, error = run(reward, *flags(copied, pairs, tmp_path / "no"), code=2)
        assert message in error


def test_a_new_head_starts_near_zero_and_the_same_from_the_same_seed(reward, llama, pairs, tmp_path):
    def head(seed, name):
        more = ["--max_steps", 1, "--learning_rate", 0, "--seed", seed, "--use_lora"]
        return weights_of(train(reward, llama, pairs, tmp_path / name, *more))["base_model.model.score.weight"]

    first, same, other = head(1, "first"), head(1, "same"), head(2, "other")
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert 0 < first.abs().max() < 0.01


@pytest.mark.parametrize("more", [["--bf16", "--use_lora"], ["--bf16"], ["--load_in_4bit", "--use_lora"]])
def test_trained_weights_are_float32_and_move(reward, pairs, tmp_path, monkeypatch, more):
    """In 4 bit also on a processor where a pass in eval mode would pack the weights, which then have no gradients."""
    if "--load_in_4bit" in more:
        modules = pytest.importorskip("bitsandbytes").nn.modules
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
        monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", lambda *args: pytest.fail("weights were packed"))
    base = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    weights = weights_of(train(reward, base, pairs, tmp_path / "out", *more, "--max_steps", 2, "--eval_split", "train"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


# Stopping and going on


RESUMED = ["--use_lora", "--lora_dropout", 0.2, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_steps", 6, "--save_steps", 3, "--logging_steps", 1, "--learning_rate", 0.003]  # fmt: skip


@pytest.fixture(scope="module")
def whole(reward, llama, pairs, tmp_path_factory):
    """A run that nothing has interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(reward, llama, pairs, output, *RESUMED)
    return output


def steps_of(folder):
    return [(line["step"], line["loss"]) for line in lines_of(folder / "metrics.jsonl") if "loss" in line]


def test_ctrl_c_saves_a_checkpoint_to_go_on_from(reward, llama, pairs, whole, tmp_path, monkeypatch):
    step, calls = RewardTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 30:  # 8 pairs a step
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "training_step", interrupted)
        _, error = run(reward, *flags(llama, pairs, tmp_path / "out"), *RESUMED, code=130)
    assert "go on with" in error and not (tmp_path / "out" / "final_checkpoint").exists()
    final = train(reward, llama, pairs, tmp_path / "out", *RESUMED, "--resume_from_checkpoint")
    file = "adapter_model.safetensors"
    assert (final / file).read_bytes() == (whole / "final_checkpoint" / file).read_bytes()
    assert steps_of(tmp_path / "out") == steps_of(whole)


# The report


def test_the_report_says_what_follows_from_the_scores(reward, llama, pairs, trained, tmp_path):
    """An early checkpoint's scores, with rights and wrongs; the interval is Wilson's."""
    final = train(reward, llama, pairs, tmp_path / "out", "--max_steps", 1, "--learning_rate", 0)
    scores, metrics = evaluate(reward, final, pairs, tmp_path / "eval")
    report, margin = metrics["report"], scores[0] - scores[1]
    n, right = len(margin), margin > 0
    p, z = right.mean(), 1.96
    root = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert report["accuracy"] == pytest.approx(p) and 0 < p < 1
    interval = [(p + z**2 / (2 * n) + side) / (1 + z**2 / n) for side in (-root, root)]
    assert report["accuracy_interval"] == pytest.approx(interval)
    assert report["mean_margin"] == pytest.approx(margin.mean())
    assert report["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean())
    lengths = np.array([len(chosen) - len(rejected) for chosen, rejected in encode(reward, llama, PAIRS)])
    assert report["length_bias"]["chosen_shorter"] == pytest.approx({"pairs": (lengths < 0).sum(), "accuracy": right[lengths < 0].mean()})  # fmt: skip
    assert report["length_bias"]["correlation"] == pytest.approx(np.corrcoef(margin, lengths)[0, 1])
    confidence = 1 / (1 + np.exp(-abs(margin)))  # all in the first bin, so near is the new head to zero
    assert [row["pairs"] for row in report["reliability"]] == [n]
    assert report["calibration_error"] == pytest.approx(abs(confidence.mean() - p))
    assert report["swapped"]["agreement"] == 1


def test_the_report_is_printed_and_says_where_the_accuracy_may_be_chance(reward, llama, pairs, tmp_path):
    out, error = run(reward, *flags(llama, pairs, tmp_path / "out"), "--max_steps", 1, "--learning_rate", 0, "--eval_split", "train[:10]")  # fmt: skip
    assert "report on 10 pairs" in out
    for line in ("accuracy", "length_bias", "mean_margin", "swapped", "calibration_error"):
        assert f"\n  {line}" in out
    assert re.search(r"warning: accuracy 0\.\d+ \(0\.\d+ to 0\.\d+\) may be chance", error)


# What is refused


def test_dry_run_loads_and_writes_nothing(reward, llama, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "load_classifier", lambda *args: pytest.fail("a model was loaded"))
    out, _ = run(reward, *flags(llama, pairs, tmp_path / "out"), "--dry_run", "--per_device_train_batch_size", 4)
    tokens = sum(len(ids) for texts in encode(reward, llama, PAIRS) for ids in texts)
    assert "30 of 30 pairs kept" in out and f"8 steps of 4 pairs; an epoch has 30 pairs, {tokens} tokens" in out
    assert not (tmp_path / "out").exists()


GOOD = PAIRS[0]
BAD_DATA = {
    "missing column": ([{"question": "q", "response_j": "a"}], "one of these is needed: prompt + chosen + rejected; question + response_j + response_k"),
    "roles": ([{"prompt": "q", "chosen": chat("q", "a")[::-1], "rejected": chat("q", "b")}], "prompt + chosen should end with the role assistant"),
    "another context": ([{"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("x", "b")}], "differ before the last turn"),
    "all too long": ([{**GOOD, "response_j": "word " * 600}], "0 are left to use: 1 longer than --max_length"),
    "margin": ([{**GOOD, "margin": None}], "margin is no number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_in_one_line_before_anything_is_written(reward, llama, tmp_path, case):
    rows, message = BAD_DATA[case]
    _, error = run(reward, *flags(llama, write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out"), code=2)
    assert message in error and error.count("error: ") == 1 and not (tmp_path / "out").exists()


BAD_FLAGS = {
    "nothing to evaluate on": (["--eval_only"], "--eval_only need pairs"),
    "no head": (["--eval_only", "--eval_split", "train"], "has no score head"),
    "module": (["--use_lora", "--lora_target_modules", "nosuch"], "--lora_target_modules"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line_before_anything_is_written(reward, llama, pairs, tmp_path, case):
    more, message = BAD_FLAGS[case]
    _, error = run(reward, *flags(llama, pairs, tmp_path / "out"), *more, code=2)
    assert message in error and not (tmp_path / "out").exists()


def test_a_model_without_a_classifier_or_with_too_few_positions_is_refused(reward, pairs, tmp_path):
    mamba = transformers.Mamba2Config(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8)  # fmt: skip
    transformers.Mamba2ForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    _, error = run(reward, *flags(tmp_path / "mamba", pairs, tmp_path / "out"), code=2)
    assert "Mamba2ForCausalLM" in error and "--reward_function" in error and len(error.splitlines()[-1]) < 200
    _, error = run(reward, *flags(make_model(tmp_path / "short", max_position_embeddings=32), pairs, tmp_path / "out"), code=2)  # fmt: skip
    assert "the model has 32 positions" in error
