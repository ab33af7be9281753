"""The reward model script: pairs, the head, the adapter and its base, the report, and that no token is wasted wrongly."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, make_model, write_rows
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

PLACES = ["Paris", "France", "the sea", "red light", "the sky", "blue air", "a capital", "z", "the wind", "Answer"]
PAIRS = [
    {"question": f"Where is {a} of {b}?", "response_j": f"It is in {b}.", "response_k": "I do not know, who would ask?" * (1 + i % 3)}
    for i, (a, b) in enumerate((a, b) for a in PLACES for b in PLACES[:3])
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def run(reward, model, data, output, *flags):
    reward.main(
        ["--model_path", str(model), "--dataset_name", str(data), "--output_dir", str(output), *map(str, flags)]
    )
    return Path(output) / "final_checkpoint"


def metrics_of(output):
    return json.loads((Path(output) / "metrics.json").read_text(encoding="utf-8"))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encode(reward, model, rows, name="chat", **args):
    """Rows encoded as the script does it, and their format."""
    prompt_format = reward.PromptFormat(AutoTokenizer.from_pretrained(model), name)
    data = datasets.Dataset.from_list(rows)
    args = SimpleNamespace(**{"max_length": 512, **args})
    return *reward.encode_split(data, prompt_format, args, "rows"), prompt_format


def score_alone(model, rows, side):
    """Scores by the model's own forward, one text at a time."""
    with torch.no_grad():
        return [model(torch.tensor([row[f"{side}_ids"]])).logits.item() for row in rows]


def chat(*turns):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(turns), turns)]


# Rows


@pytest.mark.parametrize("name", ["chat", "qa"])
def test_both_texts_start_with_the_ids_of_the_prompt_and_end_with_eos_once(reward, llama, plain_llama, name):
    model = llama if name == "chat" else plain_llama
    rows, _, prompt_format = encode(reward, model, PAIRS[:3], name)
    tokenizer = prompt_format.tokenizer
    for row, pair in zip(rows, PAIRS):
        prompt, _ = prompt_format.encode([{"role": "user", "content": pair["question"]}], open_end=True)
        assert row["prompt_length"] == len(prompt)
        for side, column in (("chosen", "response_j"), ("rejected", "response_k")):
            ids = row[f"{side}_ids"]
            assert ids[: len(prompt)] == prompt
            space = "" if name == "chat" else " "
            assert tokenizer.decode(ids[len(prompt) :]) == space + pair[column] + tokenizer.eos_token
            assert ids[len(prompt) :].count(tokenizer.eos_token_id) == 1
    if name == "qa":
        assert (
            tokenizer.decode(rows[0]["chosen_ids"][:-1])
            == "Question: Where is Paris of Paris?\n\nAnswer: It is in Paris."
        )


def test_the_schemas_make_the_same_pairs(reward, llama):
    question, good, bad = "Where is it?", "In Paris.", "No idea"
    texts = {"prompt": question, "chosen": good, "rejected": bad}
    lists = {"prompt": question, "chosen": chat(question, good), "rejected": chat(question, bad)}
    letters = {"question": question, "response_j": good, "response_k": bad}
    first, *others = [encode(reward, llama, [row])[0][0] for row in (texts, lists, letters)]
    for other in others:
        assert (other["chosen_ids"], other["rejected_ids"]) == (first["chosen_ids"], first["rejected_ids"])


def test_the_context_of_a_chat_is_all_turns_before_the_last(reward, llama):
    turns = ("Where is it?", "In France.", "Where in France?")
    row = {"prompt": turns[0], "chosen": chat(*turns, "Paris."), "rejected": chat(*turns, "No idea")}
    rows, _, prompt_format = encode(reward, llama, [row])
    prompt = prompt_format.encode(chat(*turns), open_end=True)[0]
    assert rows[0]["chosen_ids"][: len(prompt)] == rows[0]["rejected_ids"][: len(prompt)] == prompt


def test_long_identical_and_repeated_pairs_are_left_out_and_counted(reward, llama, capsys):
    long = {"question": "q", "response_j": "short", "response_k": "word " * 400}
    same = {"question": "q", "response_j": "same", "response_k": "same"}
    rows, counts, _ = encode(reward, llama, [PAIRS[0], long, same, PAIRS[1], PAIRS[0]], max_length=100)
    assert rows["row"] == [0, 3]
    assert counts == {"rows": 2, "too_long": 1, "identical": 1, "duplicates": 1}
    assert (
        "2 of 5 pairs kept; left out: 1 longer than 100 tokens, 1 of two equal texts, 1 repeated"
        in capsys.readouterr().out
    )


def test_held_out_prompts_are_not_trained_on(reward, llama):
    rows, _, _ = encode(
        reward, llama, [{**pair, "response_k": f"{pair['response_k']}{i}"} for pair in PAIRS for i in range(2)]
    )
    train, held = reward.hold_out(rows, 0.2, seed=1)
    assert len(held) == 12 and len(train) == 48
    assert not set(train["prompt"]) & set(held["prompt"])
    assert held["row"] == reward.hold_out(rows, 0.2, seed=1)[1]["row"] != reward.hold_out(rows, 0.2, seed=2)[1]["row"]


# Batches without padding


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [True, False])
def test_shared_and_padded_batches_give_the_scores_and_gradients_of_the_stock_model(reward, tmp_path, kind, lora):
    path = make_model(tmp_path / "model", kind, chat=False)
    rows, _, prompt_format = encode(reward, path, PAIRS[:5], "qa")
    args = reward.build_parser().parse_args(
        ["--model_path", path, "--dataset_name", "x", "--output_dir", "x"] + ["--use_lora"] * lora
    )
    model = reward.load_reward_model(reward.locate_model(path, "--model_path"), args)
    for name, weight in model.named_parameters():  # a new adapter and head would change next to nothing
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(weight, std=0.5)
    classifier = model.get_base_model() if lora else model
    rows = list(rows)
    results = []
    for name, collate in (
        ("sdpa", reward.DataCollatorForPreference(pad_token_id=0)),
        ("pairs", reward.collate_shared),
    ):
        classifier.set_attn_implementation(name)
        chosen, rejected = model(**collate(rows)).logits.squeeze(-1).chunk(2)
        model.zero_grad()
        torch.nn.functional.logsigmoid(chosen - rejected).mean().backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        results.append((torch.cat([chosen, rejected]).detach(), gradients))
    (padded, padded_gradients), (shared, shared_gradients) = results
    classifier.set_attn_implementation("sdpa")
    del classifier.forward  # the stock one; without a pad token it reads the last token of a single text
    classifier.config.pad_token_id = None
    alone = torch.tensor(score_alone(model, rows, "chosen") + score_alone(model, rows, "rejected"))
    assert padded.std() > 0.1
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared_gradients, padded_gradients, atol=1e-5, rtol=1e-4)


def test_no_text_of_a_shared_batch_sees_another(reward, llama):
    rows = list(encode(reward, llama, PAIRS[:2])[0])
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, attn_implementation="pairs")
    model.forward = reward.types.MethodType(reward.score_texts, model)

    def scores(rows):
        with torch.no_grad():
            return model(**reward.collate_shared(rows)).logits.squeeze(-1)

    before = scores(rows)
    other = {**rows[0], "chosen_ids": rows[0]["chosen_ids"][:-3] + [9, 8, 7, 6, 5]}
    after = scores([other, rows[1]])
    assert abs(after[0] - before[0]) > 1e-3
    torch.testing.assert_close(after[1:], before[1:], atol=1e-6, rtol=0)


def test_a_model_with_another_attention_gets_padded_batches(reward, llama, capsys):
    rows, _, prompt_format = encode(reward, llama, PAIRS[:4])
    args = reward.build_parser().parse_args(["--model_path", llama, "--dataset_name", "x", "--output_dir", "x"])
    model = reward.load_reward_model(reward.locate_model(llama, "--model_path"), args)
    try:  # as in a model that does not hand `pairs` down: all texts see each other
        AttentionInterface.register(
            "pairs", lambda *inputs, pairs, **kwargs: reward.sdpa_attention_forward(*inputs, **kwargs)
        )
        collate = reward.pick_collator(model, rows, prompt_format.tokenizer, args)
    finally:
        AttentionInterface.register("pairs", reward.attend_pairs)
    assert "input_ids" in collate(list(rows)) and "pairs" not in collate(list(rows))
    assert model.config._attn_implementation == "sdpa"
    assert "batches are padded" in capsys.readouterr().out
    assert reward.pick_collator(model, rows, prompt_format.tokenizer, args) is reward.collate_shared


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_those_of_the_stock_trainer(reward, llama, pairs, tmp_path, checkpointing):
    """Same rows, order and start; learning rate and head large enough that the margins move."""
    flags = [
        "--use_lora",
        "--per_device_train_batch_size",
        4,
        "--max_steps",
        5,
        "--logging_steps",
        1,
        "--learning_rate",
        0.01,
    ]
    flags += ["--center_rewards_coefficient", 0.1] + ["--gradient_checkpointing"] * checkpointing
    run(reward, llama, pairs, tmp_path / "ours", *flags)
    ours = [line for line in lines_of(tmp_path / "ours" / "metrics.jsonl") if "loss" in line]

    rows = encode(reward, llama, PAIRS)[0].select_columns(["chosen_ids", "rejected_ids"])
    set_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.01 * model.config.initializer_range)
    config = RewardConfig(
        output_dir=str(tmp_path / "stock"), per_device_train_batch_size=4, max_steps=5, logging_steps=1, learning_rate=0.01,
        bf16=False, use_cpu=True, seed=42, report_to="none", save_strategy="no", center_rewards_coefficient=0.1,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = RewardTrainer(
        model, config, processing_class=AutoTokenizer.from_pretrained(tmp_path / "ours" / "final_checkpoint"),
        train_dataset=rows, peft_config=lora,
    )  # fmt: skip
    trainer.train()
    stock = [line for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(stock) == 5 and abs(stock[-1]["margin"]) > 0.1
    for mine, theirs in zip(ours, stock):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert mine["margin"] == pytest.approx(theirs["margin"], abs=2e-4)


# Training, saving and loading


@pytest.fixture(scope="module")
def trained(reward, llama, pairs, tmp_path_factory):
    """A LoRA reward model trained on the pairs, with the report on them."""
    output = tmp_path_factory.mktemp("trained") / "reward"
    before = (Path(llama) / "model.safetensors").read_bytes()
    run(
        reward, llama, pairs, output, "--use_lora", "--per_device_train_batch_size", 6, "--num_train_epochs", 6,
        "--learning_rate", 0.01, "--eval_split", "train",
    )  # fmt: skip
    assert (Path(llama) / "model.safetensors").read_bytes() == before
    return output


def test_chosen_outscores_rejected_after_training(trained):
    metrics = metrics_of(trained)
    assert metrics["accuracy_before"] <= 0.8
    assert metrics["accuracy"] == metrics["report"]["accuracy"] >= 0.95
    assert metrics["report"]["mean_margin"] > 1
    assert metrics["report"]["swapped"]["agreement"] == 1 and metrics["report"]["swapped"]["difference"] < 1e-4
    recorded = json.loads((trained / "final_checkpoint" / "run.json").read_text(encoding="utf-8"))
    assert recorded["stage"] == "reward" and recorded["metrics"]["accuracy"] == metrics["accuracy"]
    assert recorded["dataset"]["rows"] == recorded["dataset"]["eval"]["rows"] == len(PAIRS)


def test_the_adapter_is_relative_to_its_base_and_holds_the_head(trained, llama):
    config = json.loads((trained / "final_checkpoint" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["task_type"]) == (llama, "SEQ_CLS")
    weights = load_file(trained / "final_checkpoint" / "adapter_model.safetensors")
    assert [name for name in weights if "lora_" not in name] == ["base_model.model.score.weight"]
    assert not any("lora" in name and "score" in name for name in weights)


def test_an_adapter_loads_again_with_one_call(reward, trained, pairs, llama, tmp_path):
    run(reward, trained / "final_checkpoint", pairs, tmp_path / "eval", "--eval_only", "--eval_split", "train")
    scores = lines_of(tmp_path / "eval" / "scores.jsonl")
    assert [line["row"] for line in scores] == list(range(len(PAIRS)))
    reports = [metrics_of(path)["report"] for path in (tmp_path / "eval", trained)]
    for name in ("accuracy", "loss", "mean_margin", "calibration_error"):
        assert reports[0][name] == pytest.approx(reports[1][name], abs=1e-4)
    assert not (tmp_path / "eval" / "final_checkpoint").exists()

    rows = list(encode(reward, llama, PAIRS)[0])
    model = AutoPeftModelForSequenceClassification.from_pretrained(trained / "final_checkpoint", num_labels=1).eval()
    assert score_alone(model, rows, "chosen") == pytest.approx([line["score_chosen"] for line in scores], abs=1e-4)
    # A padded batch, with the pad token that the checkpoint's tokenizer has: it is not the EOS that ends a text.
    tokenizer = AutoTokenizer.from_pretrained(trained / "final_checkpoint")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer.pad({"input_ids": [row["rejected_ids"] for row in rows]}, return_tensors="pt")
    with torch.no_grad():
        padded = model(**batch).logits.squeeze(-1).tolist()
    assert padded == pytest.approx([line["score_rejected"] for line in scores], abs=1e-4)


def test_a_base_that_pads_with_eos_scores_the_eos_with_the_saved_pad_token(reward, pairs, tmp_path):
    """As SmolLM2: its config says that EOS is padding, so that transformers would read the token before it."""
    base = make_model(tmp_path / "base", pad_token_id=2)
    final = run(reward, base, pairs, tmp_path / "out", "--use_lora", "--max_steps", 2, "--learning_rate", 0.01)
    run(reward, final, pairs, tmp_path / "eval", "--eval_only", "--eval_split", "train")
    scores = [line["score_chosen"] for line in lines_of(tmp_path / "eval" / "scores.jsonl")]
    rows = list(encode(reward, final, PAIRS)[0])
    assert rows[0]["chosen_ids"][-1] == 2
    pad = AutoTokenizer.from_pretrained(final).pad_token_id
    load = AutoPeftModelForSequenceClassification.from_pretrained
    assert score_alone(load(final, num_labels=1, pad_token_id=pad), rows, "chosen") == pytest.approx(scores, abs=1e-4)
    assert score_alone(load(final, num_labels=1), rows, "chosen") != pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_full_model_loads_again_with_one_call(reward, request, pairs, tmp_path, kind):
    flags = ["--max_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", 0.001]
    final = run(reward, request.getfixturevalue(kind), pairs, tmp_path / "full", *flags)
    run(reward, final, pairs, tmp_path / "eval", "--eval_only", "--eval_split", "train")
    scores = lines_of(tmp_path / "eval" / "scores.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    rows = list(encode(reward, final, PAIRS, "chat" if kind == "llama" else "qa")[0])
    assert score_alone(model, rows, "chosen") == pytest.approx([line["score_chosen"] for line in scores], abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(final)
    batch = tokenizer.pad({"input_ids": [row["rejected_ids"] for row in rows]}, return_tensors="pt")
    with torch.no_grad():
        padded = model(**batch).logits.squeeze(-1).tolist()
    assert padded == pytest.approx([line["score_rejected"] for line in scores], abs=1e-4)


@pytest.fixture(scope="module")
def sft_adapter(llama, tmp_path_factory):
    """What an SFT run leaves: a LoRA adapter that changes the model, its tokenizer, and run.json."""
    folder = tmp_path_factory.mktemp("sft") / "final_checkpoint"
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    (folder / "run.json").write_text('{"stage": "sft", "prompt_format": "qa"}', encoding="utf-8")
    return folder


def test_an_sft_adapter_is_continued_on_its_base_in_its_format(reward, sft_adapter, llama, pairs, tmp_path):
    start = load_file(sft_adapter / "adapter_model.safetensors")
    flags = ["--max_steps", 1, "--per_device_train_batch_size", 4]
    still = run(reward, sft_adapter, pairs, tmp_path / "still", *flags, "--learning_rate", 0)
    moved = run(reward, sft_adapter, pairs, tmp_path / "moved", *flags, "--learning_rate", 0.01)
    config = json.loads((still / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (llama, 4, 8)
    assert set(config["target_modules"]) == {"q_proj", "v_proj"} and config["task_type"] == "SEQ_CLS"
    weights, trained = (load_file(folder / "adapter_model.safetensors") for folder in (still, moved))
    assert set(weights) == set(start) | {"base_model.model.score.weight"}
    assert all(torch.equal(weights[name], start[name]) for name in start)
    assert all(not torch.equal(trained[name], start[name]) for name in start)
    recorded = json.loads((still / "run.json").read_text(encoding="utf-8"))
    assert recorded["prompt_format"] == "qa" and recorded["parent"] == str(sft_adapter)


def test_a_reward_adapter_is_continued_with_its_head(reward, trained, pairs, tmp_path):
    flags = ["--max_steps", 1, "--per_device_train_batch_size", 4, "--learning_rate", 0]
    again = run(reward, trained / "final_checkpoint", pairs, tmp_path / "again", *flags)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (trained / "final_checkpoint", again))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    configs = [
        json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        for path in (trained / "final_checkpoint", again)
    ]
    assert configs[0]["modules_to_save"] == configs[1]["modules_to_save"]


def test_a_new_head_starts_near_zero_and_the_same_from_the_same_seed(reward, llama):
    def load(seed):
        flags = ["--model_path", llama, "--dataset_name", "x", "--output_dir", "x", "--seed", str(seed)]
        return reward.load_reward_model(
            reward.locate_model(llama, "--model_path"), reward.build_parser().parse_args(flags)
        )

    first, same, other = (load(seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert 0 < first.abs().max() < 0.01


def test_dropout_is_that_of_the_adapter_alone(reward, gpt2):
    flags = ["--model_path", gpt2, "--dataset_name", "x", "--output_dir", "x", "--use_lora", "--lora_dropout", "0.3"]
    model = reward.load_reward_model(reward.locate_model(gpt2, "--model_path"), reward.build_parser().parse_args(flags))
    rates = {
        ("lora" in name, module.p) for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)
    }
    assert rates == {(True, 0.3), (False, 0.0)}


@pytest.mark.parametrize("flags", [["--use_lora", "--lora_dropout", "0.2"], ["--gradient_checkpointing"]])
def test_a_resumed_run_equals_an_uninterrupted_one(reward, llama, pairs, tmp_path, flags):
    flags = [
        *flags,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
        "--max_steps",
        6,
        "--save_steps",
        3,
        "--learning_rate",
        0.003,
    ]
    whole = run(reward, llama, pairs, tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = run(reward, llama, pairs, tmp_path / "resumed", *flags, "--resume_from_checkpoint")
    name = "adapter_model.safetensors" if "--use_lora" in flags else "model.safetensors"
    first, second, third = (load_file(path / name) for path in (whole, resumed, tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("flags", [["--bf16", "--use_lora"], ["--bf16"], ["--use_lora", "--gradient_checkpointing"]])
def test_trained_weights_are_float32_and_move(reward, llama, pairs, tmp_path, flags):
    final = run(reward, llama, pairs, tmp_path / "out", *flags, "--max_steps", 2, "--per_device_train_batch_size", 4)
    weights = load_file(final / ("adapter_model.safetensors" if "--use_lora" in flags else "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_a_4_bit_base_trains_a_float32_adapter(reward, pairs, tmp_path, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes").nn.modules  # packed weights have no backward pass
    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb, "_convert_weight_packed_for_cpu", lambda *args: pytest.fail("the weights were packed"))
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    final = run(reward, model, pairs, tmp_path / "out", "--use_lora", "--load_in_4bit", "--max_steps", 2)
    weights = load_file(final / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert weights["base_model.model.score.weight"].shape == (1, 64)


def test_margins_of_the_data_enter_the_loss(reward, llama, tmp_path):
    rows = [{"prompt": p["question"], "chosen": p["response_j"], "rejected": p["response_k"], "score_chosen": 7.0, "score_rejected": 4.0} for p in PAIRS]  # fmt: skip
    data = write_rows(tmp_path / "graded.jsonl", rows)
    flags = ["--max_steps", 1, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--learning_rate", 0]
    run(reward, llama, data, tmp_path / "out", *flags, "--use_margin")
    run(reward, llama, data, tmp_path / "plain", *flags)
    loss, plain = (lines_of(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("out", "plain"))
    assert loss == pytest.approx(math.log(1 + math.exp(3)), abs=0.05)
    assert plain == pytest.approx(math.log(2), abs=0.05)


# The report


def test_report_on_scores_worked_out_by_hand(reward):
    margins = np.array([2.0, 2.0, 2.0, -2.0, 0.1, -0.1, 0.0, 3.0, 0.1, 0.1])
    report = reward.make_report(np.array([margins + 1, np.ones(10)]), [5, 5, -5, 5, -5, 5, 0, 5, -5, 5])
    assert report["accuracy"] == 0.7 and report["ties"] == 1
    # Wilson's interval for 7 of 10: (0.397, 0.892), e.g. Newcombe 1998, method 3
    assert report["accuracy_interval"] == pytest.approx([0.3968, 0.8922], abs=1e-4)
    assert report["mean_margin"] == pytest.approx(margins.mean())
    assert report["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    bias = report["length_bias"]
    assert (bias["chosen_longer"]["pairs"], bias["chosen_shorter"]["pairs"]) == (6, 3)
    assert bias["chosen_longer"]["accuracy"] == pytest.approx(4 / 6) and bias["chosen_shorter"]["accuracy"] == 1
    table = {row["from"]: row for row in report["reliability"] if row["pairs"]}
    confidence = {margin: 1 / (1 + math.exp(-margin)) for margin in (2.0, 0.1, 3.0)}
    assert sorted(table) == pytest.approx([0.5, 0.85, 0.95])
    low, middle, high = (table[key] for key in sorted(table))
    assert (low["pairs"], low["accuracy"]) == (5, 0.7)  # three right, one wrong, one tie
    assert (middle["pairs"], middle["accuracy"]) == (4, 0.75) and middle["confidence"] == pytest.approx(confidence[2.0])
    expected = (
        0.5 * abs((4 * confidence[0.1] + 0.5) / 5 - 0.7)
        + 0.4 * abs(confidence[2.0] - 0.75)
        + 0.1 * (1 - confidence[3.0])
    )
    assert report["calibration_error"] == pytest.approx(expected)


def test_report_without_spread_has_no_correlation_and_no_nan(reward):
    report = reward.make_report(np.array([[1.0, 1.0], [0.0, 0.0]]), [3, 3])
    assert report["length_bias"]["correlation"] is None and report["length_bias"]["chosen_shorter"]["accuracy"] is None
    assert report["accuracy_interval"][1] == pytest.approx(1)
    assert "NaN" not in json.dumps(report)


def test_scores_follow_the_order_of_the_rows_whatever_the_batches(reward, trained, llama):
    rows = list(encode(reward, llama, PAIRS)[0])
    flags = [
        "--model_path",
        str(trained / "final_checkpoint"),
        "--dataset_name",
        "x",
        "--output_dir",
        "x",
        "--use_lora",
        "--eval_only",
    ]
    args = reward.build_parser().parse_args(flags)
    model = reward.load_reward_model(reward.locate_model(args.model_path, "--model_path"), args)
    model.get_base_model().set_attn_implementation("pairs")
    many, few = (reward.score_pairs(model, rows, reward.collate_shared, args, tokens) for tokens in (4096, 1))
    assert np.abs(many - few).max() < 1e-4 < many.std()
    swapped = [{"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]
    assert np.abs(reward.score_pairs(model, swapped, reward.collate_shared, args)[::-1] - many).max() < 1e-4


def test_the_report_is_a_table_on_the_terminal(reward, trained, pairs, tmp_path, capsys):
    run(reward, trained / "final_checkpoint", pairs, tmp_path / "eval", "--eval_only", "--eval_fraction", 0.5)
    out = capsys.readouterr().out
    assert "report on 15 pairs" in out and "held out" in out
    for line in ("accuracy", "chosen is longer", "mean margin", "sides swapped", "calibration error"):
        assert f"  {line}" in out
    assert len(lines_of(tmp_path / "eval" / "scores.jsonl")) == 15


# What is refused


def test_dry_run_shows_the_data_and_loads_and_writes_nothing(reward, llama, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reward, "load_reward_model", lambda *args: pytest.fail("a model was loaded"))
    run(reward, llama, pairs, tmp_path / "out", "--dry_run", "--per_device_train_batch_size", 4)
    out = capsys.readouterr().out
    assert "schema question + response_j + response_k, format chat; 30 of 30 pairs kept" in out
    assert "8 steps of 4 pairs" in out
    assert (
        "<|im_start|>user\nWhere is Paris of Paris?<|im_end|>\n<|im_start|>assistant\n\n[[chosen: It is in Paris.<|im_end|>]]"
        in out
    )
    assert "[[rejected: I do not know, who would ask?<|im_end|>]]" in out
    assert not (tmp_path / "out").exists()


def test_token_counts_of_the_dry_run(reward, llama, pairs, tmp_path, capsys):
    run(reward, llama, pairs, tmp_path / "out", "--dry_run")
    rows = list(encode(reward, llama, PAIRS)[0])
    tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    common = sum(len(os.path.commonprefix([row["chosen_ids"], row["rejected_ids"]])) for row in rows)
    assert f"an epoch has 30 pairs, {tokens} tokens, {tokens - common} with" in capsys.readouterr().out


GOOD = PAIRS[0]
BAD_DATA = {
    "missing column": ([{"question": "q", "response_j": "a"}], "has the columns question, response_j; one of these is needed: prompt + chosen + rejected; question + response_j + response_k"),
    "null": ([GOOD, {**GOOD, "response_k": None}], "row 1: column response_k is null"),
    "empty text": ([GOOD, PAIRS[1], {**GOOD, "question": " "}], "row 2: column question is empty"),
    "roles": ([{"prompt": "q", "chosen": chat("q", "a")[::-1], "rejected": chat("q", "b")}], "row 0: column chosen turn 0 has the role 'assistant'"),
    "ends with a question": ([{"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b", "c")}], "row 0: column rejected ends with the role 'user'"),
    "another context": ([{"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("x", "b")}], "row 0: columns chosen and rejected differ before the last turn"),
    "all too long": ([{**GOOD, "response_j": "word " * 600}], "no pair is left to use"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_before_anything_is_written(reward, llama, tmp_path, case):
    rows, message = BAD_DATA[case]
    data = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(reward.UserError) as error:
        run(reward, llama, data, tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_data_set_is_refused(reward, llama, tmp_path):
    columns = ("question", "response_j", "response_k")
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    datasets.Dataset.from_dict({name: [] for name in columns}, features).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(reward.UserError, match="is empty|no data"):
        run(reward, llama, tmp_path / "empty.parquet", tmp_path / "out")


BAD_FLAGS = {
    "batch": (["--per_device_train_batch_size", 31], "--per_device_train_batch_size 31 is larger than the data set (30 pairs)"),
    "model": (["--model_path", "no/such/model"], "--model_path no/such/model does not exist"),
    "split": (["--eval_split", "validation[:10%]", "--eval_fraction", 0.1], "--eval_fraction holds out rows"),
    "margin": (["--use_margin"], "--use_margin: "),
    "nothing to evaluate on": (["--eval_only"], "--eval_only needs pairs to evaluate on"),
    "no head": (["--eval_only", "--eval_split", "train"], "has no score head; it should be a trained reward model"),
    "field": (["--set", "centre_rewards=1"], "RewardConfig has no such field"),
    "taken field": (["--set", "max_length=5"], "this field is set by a flag of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused_before_anything_is_written(reward, llama, pairs, tmp_path, case):
    flags, message = BAD_FLAGS[case]
    with pytest.raises(reward.UserError) as error:
        run(reward, llama, pairs, tmp_path / "out", *flags)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_sft_adapter_is_no_reward_model(reward, sft_adapter, pairs, tmp_path):
    with pytest.raises(reward.UserError, match="stage 'sft': it is not a reward model"):
        run(reward, sft_adapter, pairs, tmp_path / "out", "--eval_only", "--eval_split", "train")


def test_texts_longer_than_the_models_positions_are_refused(reward, pairs, tmp_path):
    model = make_model(tmp_path / "short", max_position_embeddings=32)
    with pytest.raises(reward.UserError, match="the model has 32 positions"):
        run(reward, model, pairs, tmp_path / "out")


def test_a_non_empty_output_dir_is_refused_and_kept(reward, llama, pairs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for flags in ([], ["--eval_only", "--eval_split", "train"]):
        with pytest.raises(reward.UserError, match="is not empty"):
            run(reward, llama, pairs, tmp_path, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_evaluation_leaves_the_checkpoints_in_its_output_dir(reward, trained, pairs, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(trained, output)
    run(
        reward,
        output / "final_checkpoint",
        pairs,
        output,
        "--eval_only",
        "--eval_split",
        "train",
        "--overwrite_output_dir",
    )
    assert list(output.glob("checkpoint-*")) and (output / "final_checkpoint" / "adapter_config.json").is_file()


def test_the_lone_file_runs_from_an_empty_directory(llama, pairs, tmp_path):
    shutil.copy(ROOT / "training_reward_model.py", tmp_path)
    command = [
        sys.executable, "training_reward_model.py", "--model_path", llama, "--dataset_name", pairs, "--output_dir", "out",
        "--use_lora", "--max_steps", "2", "--eval_fraction", "0.2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "final_checkpoint" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("chat_preferences", []),
        (
            "ultrafeedback_binarized_sample",
            ["--train_split", "train_prefs", "--eval_split", "test_prefs", "--use_margin"],
        ),
    ],
)
def test_real_preferences_are_read_whole(reward, llama, tmp_path, capsys, name, flags):
    model = make_model(tmp_path / "model", max_position_embeddings=65536)
    run(reward, model, SHARED / name, tmp_path / "out", "--dry_run", "--max_length", 65536, *flags)
    kept = [line for line in capsys.readouterr().out.splitlines() if "pairs kept" in line]
    assert len(kept) == (2 if "--eval_split" in flags else 1)
    assert all("left out: 0 longer than" in line for line in kept)
