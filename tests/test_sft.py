"""training_sft.py: the tokens it trains on, the gradient of a step, what a run leaves, and how it goes on."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, make_adapter, make_model, make_tokenizer, run, write_rows
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

PAIRS = [
    {"prompt": f"What is {word}?", "response": f"It is the word {word}" + ", again" * i}
    for i, word in enumerate("abcdefgh")
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Say {word}."},
            {"role": "assistant", "content": f"{word}!"},
            {"role": "user", "content": "And again?"},
            {"role": "assistant", "content": f"{word} {word}!\nDone."},
        ]
    }
    for word in "abcdefgh"
]
# One step of gradient descent whose length is the learning rate: the weights show the gradient.
STEP = ["--set", "optim=sgd", "--learning_rate", 1, "--lr_scheduler_type", "constant", "--max_grad_norm", 0, "--max_steps", 1]  # fmt: skip


@pytest.fixture
def train(sft, tmp_path):
    """train(rows, model, *flags, out="out", code=0) -> (stdout, stderr) of a run of two steps with these rows."""

    def train(rows, model, *flags, out="out", code=0):
        data = write_rows(tmp_path / "data" / "train.jsonl", rows)
        settings = ["--model_path", model, "--dataset_name", data, "--output_dir", tmp_path / out]
        settings += ["--max_steps", 2, "--batch_size", 2, "--logging_steps", 1]
        return run(sft, *settings, *flags, code=code)

    return train


def weights(directory):
    """All weights in a checkpoint directory, by name."""
    name = "adapter_model.safetensors" if (directory / "adapter_model.safetensors").is_file() else "model.safetensors"
    return load_file(directory / name)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(directory):
    return [(line["step"], line["loss"]) for line in read_lines(directory) if "loss" in line]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who?", "response": "Me."},
        {"question": "Who?", "response_j": "Me.", "response_k": "You."},
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
    ],
)
def test_pairs_train_on_the_answer_and_eos(train, plain_llama, row):
    out, _ = train([row, {**row, "prompt": "Why?", "question": "Why?"}], plain_llama, "--dry_run")
    assert "Question: Who?\n\nAnswer:[[ Me.<|endoftext|>]]\n" in out
    assert out.endswith("nothing was loaded or written\n")


def test_chats_train_on_every_assistant_turn(train, llama, tmp_path):
    out, _ = train(CHATS, llama, "--dry_run")
    assert "schema messages, format chat" in out and not (tmp_path / "out").exists()
    assert (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay a.<|im_end|>\n<|im_start|>assistant\n[[a!<|im_end|>]]\n"
        in out
    )
    assert "[[e e!\nDone.<|im_end|>]]" in out  # the second row shown is one from the middle


def test_messages_come_before_pairs_and_qa_can_be_asked_for(train, llama):
    out, _ = train(
        [{**chat, "prompt": "x", "response": "y"} for chat in CHATS], llama, "--prompt_format", "qa", "--dry_run"
    )
    assert "schema messages, format qa" in out
    assert "Question: Be brief.\n\nSay a.\n\na!\n\nAnd again?\n\nAnswer:[[ a a!\nDone.<|im_end|>]]" in out


def test_messages_without_a_template_become_question_and_answer(train, plain_llama):
    assert "And again?\n\nAnswer:[[ a a!\nDone.<|endoftext|>]]" in train(CHATS, plain_llama, "--dry_run")[0]


def test_train_on_prompt_trains_on_everything(train, llama):
    """All but the first token, which follows nothing."""
    assert "<|im_start|>[[system\nBe brief." in train(CHATS, llama, "--train_on_prompt", "--dry_run")[0]


def test_rows_are_cut_dropped_and_counted(train, tmp_path, plain_llama):
    long = {"prompt": "b", "response": "word " * 50}
    hopeless = {"prompt": "word " * 50, "response": "b"}
    out = "".join(train([PAIRS[0], PAIRS[1], PAIRS[0], long, hopeless, PAIRS[1]], plain_llama, "--max_length", 32))
    assert "2 of 6 rows left out (row 2, 5): equal to an earlier row" in out
    assert "1 of 6 rows left out (row 4): no answer within --max_length 32 tokens" in out
    assert "3 rows kept, 1 of them cut to 32 tokens" in out
    counts = read(tmp_path / "out" / "final_checkpoint" / "run.json")["dataset"]
    assert (counts["rows"], counts["cut"]) == (3, 1)
    assert counts["left_out"] == {"equal to an earlier row": 2, "no answer within --max_length 32 tokens": 1}


def test_a_tenth_of_the_rows_may_be_misshapen(train, plain_llama):
    good = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(18)]
    bad = [{"prompt": "x", "response": None}, {"prompt": " ", "response": "y"}]
    out = "".join(train(good + bad, plain_llama, "--dry_run"))
    assert "1 of 20 rows left out (row 18): column response is empty" in out
    assert "1 of 20 rows left out (row 19): column prompt is empty" in out and "18 rows kept" in out
    _, error = train(good[1:] + bad, plain_llama, "--dry_run", code=2)
    assert "1 of 19 rows left out (row 17): column response" in error


# ---------------------------------------------------------------- the gradient of a step


def encoded(model_path, rows, everything=False):
    """(ids, labels) of each row, as text cut before the answer's space reads."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    found = []
    for row in rows:
        prompt = tokenizer(f"Question: {row['prompt']}\n\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['response']}")["input_ids"] + [tokenizer.eos_token_id]
        found.append((prompt + answer, (prompt if everything else [-100] * len(prompt)) + answer))
    return found


def expected_step(model_path, rows):
    """(loss, weights after the step): the mean loss of all trained tokens, every row alone through the plain model."""
    model = AutoModelForCausalLM.from_pretrained(model_path).double()
    total, count = 0, sum(label != -100 for _, labels in rows for label in labels[1:])
    for ids, labels in rows:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / count
    total.backward()
    return total.item(), {name: weight.data - weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size", 8],
        ["--batch_size", 2, "--gradient_accumulation_steps", 4],
        ["--batch_size", 8, "--gradient_checkpointing"],
        ["--batch_size", 1, "--packing", "--max_length", 512],
        ["--batch_size", 8, "--train_on_prompt"],
        ["--batch_size", 8, "--set", "loss_type=chunked_nll"],
    ],
    ids=lambda flags: "".join(map(str, flags)),
)
def test_each_answer_token_counts_the_same_and_no_row_sees_another(train, tmp_path, float64, kind, flags):
    """However the eight rows of a step are laid out, it is the step of every row alone."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    path = make_model(tmp_path / "model", kind=kind, chat=False, **dropout)
    train(PAIRS, path, *STEP, *flags)
    loss, wanted = expected_step(path, encoded(path, PAIRS, "--train_on_prompt" in flags))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_checkpoint", dtype=torch.float64)
    for name, weight in found.named_parameters():
        assert (weight - wanted[name]).abs().max() < 1e-9, name
    assert losses(tmp_path / "out") == [(1, pytest.approx(loss, rel=1e-9))]


def test_logits_are_computed_where_the_next_token_is_trained_on_alone(sft, train, plain_llama, monkeypatch):
    """Every row of logits has its label; none is computed for the tokens of prompts."""
    seen, compute_loss = [], sft.SFTTrainer.compute_loss

    def watched(self, model, inputs, return_outputs=False, **kwargs):
        trained = (inputs["labels"][:, 1:] != -100).any(dim=0).sum().item()
        loss, outputs = compute_loss(self, model, inputs, return_outputs=True, **kwargs)
        seen.append((outputs.logits.shape[1], trained, inputs["input_ids"].shape[1]))
        return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(sft.SFTTrainer, "compute_loss", watched)
    train(PAIRS, plain_llama)
    assert seen and all(computed == trained < whole for computed, trained, whole in seen)


def test_two_processes_take_the_step_of_one(sft, tmp_path, llama):
    """A batch of two rows in one process, and of one row in each of two: the same losses, gradients and evaluation."""
    data = write_rows(tmp_path / "train.jsonl", CHATS)
    flags = ["--model_path", llama, "--dataset_name", data, "--split", "train[:6]", "--eval_split", "train[6:]"]
    flags += ["--set", "optim=sgd", "--learning_rate", "1e-2", "--logging_steps", "1", "--eval_steps", "1", "--max_steps", "2"]  # fmt: skip
    run(sft, *flags, "--output_dir", tmp_path / "one", "--batch_size", 2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = [str(ROOT / "training_sft.py"), *flags, "--output_dir", str(tmp_path / "two"), "--batch_size", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *two], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rows kept") == 2  # the first process talks
    for mine, other in zip(read_lines(tmp_path / "one"), read_lines(tmp_path / "two"), strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & mine.keys():
            assert other[key] == pytest.approx(mine[key], rel=1e4 * torch.finfo(torch.float32).eps), key


def test_the_longest_row_goes_first(train, tmp_path, plain_llama):
    """Too little memory shows in the first step."""
    train(PAIRS, plain_llama, "--batch_size", 1)
    longest = max(len(ids) for ids, _ in encoded(plain_llama, PAIRS))
    assert read_lines(tmp_path / "out")[0]["num_tokens"] == longest


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(sft, train, tmp_path, llama, monkeypatch, kind):
    """The run stops in one line that names the step and the last good checkpoint."""
    training_step = sft.SFTTrainer.training_step

    def poison(self, model, *args):
        loss = training_step(self, model, *args)
        if self.state.global_step == 1:
            next(weight for weight in model.parameters() if weight.requires_grad).grad.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(sft.SFTTrainer, "training_step", poison)
    _, error = train(CHATS, llama, "--save_steps", 1, *["--use_lora"] * (kind == "lora"), code=2)
    assert re.search(
        r"error: the gradient is NaN or infinite in step 2; the last good checkpoint: .*checkpoint-1\n", error
    )
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out" / "checkpoint-1").values())
    assert not (tmp_path / "out" / "final_checkpoint").exists()


# ---------------------------------------------------------------- what is trained and what is left


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--load_in_4bit"], ["--load_in_8bit", "--bf16"]], ids="-".join)
@pytest.mark.parametrize("batch", [["--packing"], ["--gradient_checkpointing"]], ids="-".join)
def test_an_adapter_is_trained_in_float32_whatever_the_base_is_in(train, tmp_path, llama, precision, batch):
    """SFTTrainer makes it bfloat16 on a quantized base, where small steps round to nothing."""
    train(CHATS, llama, "--use_lora", "--learning_rate", 1e-2, *precision, *batch)
    adapter = weights(tmp_path / "out" / "final_checkpoint")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapter.values())


def test_4_bit_weights_keep_their_gradients_after_an_evaluation(train, tmp_path, llama):
    """In eval mode bitsandbytes packs them for a kernel of the CPU that has no backward pass."""
    flags = ["--use_lora", "--load_in_4bit", "--split", "train[:6]", "--eval_split", "train[6:]", "--max_steps", 3]
    train(CHATS, llama, *flags, "--learning_rate", 0.1, "--eval_steps", 1, out="often")
    train(CHATS, llama, *flags, "--learning_rate", 0.1, out="end")
    often, end = (weights(tmp_path / name / "final_checkpoint") for name in ("often", "end"))
    assert same(often, end)
    assert all(tensor.any() for name, tensor in often.items() if "lora_B" in name)


def test_full_training_leaves_a_model_that_loads_with_one_call(train, tmp_path, llama):
    train(CHATS, llama)
    out, final = tmp_path / "out", tmp_path / "out" / "final_checkpoint"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert not torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(llama).lm_head.weight)
    assert same(weights(final), weights(out / "checkpoint-2"))
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(llama).chat_template
    found = read(final / "run.json")
    assert (found["stage"], found["prompt_format"], found["base_model"]) == ("sft", "chat", llama)
    assert found["metrics"]["train_loss"] == read(out / "metrics.json")["train_loss"]
    assert [line["step"] for line in read_lines(out)] == [1, 2, 2]
    card = (final / "README.md").read_text(encoding="utf-8")
    assert f"`{llama}`" in card and "None" not in card
    assert "SFT" in card and f"| train_loss | {found['metrics']['train_loss']} |" in card
    assert {path.suffix for path in final.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}  # no pickle


def test_lora_trains_the_adapter_alone_and_it_is_relative_to_the_base(train, tmp_path, llama):
    train(CHATS, llama, "--use_lora", "--lora_r", 4)
    final = tmp_path / "out" / "final_checkpoint"
    config = read(final / "adapter_config.json")
    assert config["base_model_name_or_path"] == llama and config["r"] == 4 and config["task_type"] == "CAUSAL_LM"
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(names)
    assert not (final / "model.safetensors").exists()
    assert len(weights(final)) == 2 * 2 * len(names)
    assert all(tensor.abs().sum() > 0 for tensor in weights(final).values())  # B starts at zero
    model = AutoPeftModelForCausalLM.from_pretrained(final)
    with model.disable_adapter():
        ids = torch.arange(10)[None]
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(llama)(ids).logits)


def test_an_adapter_is_continued_not_stacked(train, tmp_path, llama):
    train(CHATS, llama, "--use_lora", "--lora_r", 4, out="first")
    first = tmp_path / "first" / "final_checkpoint"
    train(CHATS, first, "--learning_rate", 0, out="still")  # --use_lora follows from the adapter
    assert same(weights(first), weights(tmp_path / "still" / "final_checkpoint"))
    train(CHATS, first, out="second")
    second = tmp_path / "second" / "final_checkpoint"
    assert not same(weights(first), weights(second)) and weights(first).keys() == weights(second).keys()
    config = read(second / "adapter_config.json")
    assert config["base_model_name_or_path"] == llama and config["r"] == 4
    assert read(second / "run.json")["parent"] == str(first)
    for flags in (["--lora_r", 8], ["--lora_alpha", 3], ["--lora_target_modules", "q_proj"]):
        assert "leave the flag out" in train(CHATS, first, *flags, code=2)[1]


def test_an_adapter_whose_base_was_trained_in_place_is_refused(train, tmp_path):
    base = make_model(tmp_path / "base")
    train(CHATS, base, "--use_lora")
    make_model(tmp_path / "base", seed=1)
    _, error = train(CHATS, tmp_path / "out" / "final_checkpoint", out="next", code=2)
    assert "is not the one that this adapter was trained on" in error
    shutil.rmtree(tmp_path / "base")
    _, error = train(CHATS, tmp_path / "out" / "final_checkpoint", out="next", code=2)
    assert f"base model {base}, which is not there" in error


def test_the_loss_goes_down(train, tmp_path, plain_llama):
    train(PAIRS, plain_llama, "--max_steps", 12, "--batch_size", 4, "--learning_rate", 0.02)
    found = [loss for _, loss in losses(tmp_path / "out")]
    assert found[-1] < 0.5 * found[0]


def test_the_evaluation_is_the_mean_over_the_answers_tokens(train, tmp_path, float64):
    model = make_model(tmp_path / "model", chat=False)
    other = [{"prompt": f"Why {word}?", "response": f"So {word}."} for word in "xyz"]
    write_rows(tmp_path / "evaluation" / "test.jsonl", other)
    write_rows(tmp_path / "train" / "train.jsonl", PAIRS)
    flags = ["--dataset_name", "json", "--subset", tmp_path / "train", "--eval_subset", tmp_path / "evaluation"]
    _, error = train(PAIRS, model, *flags, "--eval_split", "validation", "--eval_steps", 1)
    assert "evaluation has one split, 'test': used for --eval_split validation" in error
    final = tmp_path / "out" / "final_checkpoint"
    mean = [expected_step(final, [row])[0] for row in encoded(model, other)]
    assert read(tmp_path / "out" / "metrics.json")["eval_loss"] == pytest.approx(sum(mean) / 3, rel=1e-9)
    assert [line["step"] for line in read_lines(tmp_path / "out") if "eval_loss" in line] == [1, 2, 2]


def test_tied_embeddings_survive_saving(train, tmp_path):
    train(PAIRS, make_model(tmp_path / "tied", chat=False, tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_checkpoint")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_on_the_head_is_trained(train, tmp_path, plain_llama):
    train(PAIRS, plain_llama, "--use_lora", "--lora_target_modules", "q_proj", "lm_head", "--learning_rate", 1e-2)
    found = weights(tmp_path / "out" / "final_checkpoint")
    assert any("lm_head.lora_B" in name and tensor.any() for name, tensor in found.items())


# ---------------------------------------------------------------- other kinds of models


@pytest.fixture
def save(tmp_path):
    """save(model class, config class, **fields) -> the directory of a tiny random model of this kind."""

    def save(model_class, config_class, **fields):
        torch.manual_seed(0)
        tokenizer = make_tokenizer(chat=False)
        model_class(config_class(vocab_size=len(tokenizer), hidden_size=32, **fields)).save_pretrained(
            tmp_path / "model"
        )
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize(
    "kind",
    [(MambaForCausalLM, MambaConfig, {"num_hidden_layers": 2, "state_size": 8}), (BloomForCausalLM, BloomConfig, {"n_layer": 2, "n_head": 4})],
    ids=["Mamba", "Bloom"],
)  # fmt: skip
def test_a_model_whose_layers_mix_examples_in_a_row_is_not_packed(train, save, kind):
    model_class, config_class, fields = kind
    model = save(model_class, config_class, **fields)
    _, error = train(PAIRS, model, "--packing", "--max_length", 64, out="mixed", code=2)
    assert "examples that share a row see each other" in error
    train(PAIRS, model, "--use_lora", out="apart")


EXPERTS = {
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip


def test_the_auxiliary_loss_counts_once_per_step_and_leaves_the_saved_config_alone(
    train, save, tmp_path, float64, monkeypatch
):
    """Eight rows in one step weigh the mean of their router losses with the coefficient once."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *args: False)  # no float64
    model = save(MixtralForCausalLM, MixtralConfig, num_local_experts=4, **EXPERTS)
    flags = [*STEP, "--batch_size", 8, "--set", "router_aux_loss_coef=0.5"]
    train(PAIRS, model, *flags)
    reference = AutoModelForCausalLM.from_pretrained(model).double()
    rows = encoded(model, PAIRS)
    count = sum(label != -100 for _, labels in rows for label in labels[1:])
    for ids, labels in rows:
        found = reference(torch.tensor([ids]), use_cache=False, output_router_logits=True)
        loss = (
            torch.nn.functional.cross_entropy(found.logits[0, :-1], torch.tensor(labels[1:]), reduction="sum") / count
        )
        (loss + 0.5 * found.aux_loss / len(rows)).backward()
    final = tmp_path / "out" / "final_checkpoint"
    trained = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float64)
    for (name, weight), before in zip(trained.named_parameters(), reference.parameters(), strict=True):
        assert (weight - (before.data - before.grad)).abs().max() < 1e-9, name
    before, after = read(model / "config.json"), read(final / "config.json")
    names = ("output_router_logits", "router_aux_loss_coef")
    assert [before.get(name) for name in names] == [after.get(name) for name in names]


def test_a_mixture_of_experts_whose_loss_trl_cannot_compute_is_trained_without_it(train, save):
    fields = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    fields |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = save(DeepseekV3ForCausalLM, DeepseekV3Config, **{**EXPERTS, **fields, "num_key_value_heads": 4})
    out, _ = train(PAIRS, model, "--use_lora")
    assert "the auxiliary loss of this mixture of experts is left out" in out


# ---------------------------------------------------------------- the life of a run

LIFE = ["--use_lora", "--lora_dropout", 0.2, "--max_steps", 6, "--save_steps", 2, "--batch_size", 2]


def test_the_same_run_twice_gives_the_same_weights_and_another_seed_does_not(train, tmp_path, llama):
    for out, seed in (("one", 1), ("two", 1), ("three", 2)):
        train(CHATS, llama, *LIFE, "--seed", seed, out=out)
    one, two, three = (weights(tmp_path / out / "final_checkpoint") for out in ("one", "two", "three"))
    assert same(one, two) and not same(one, three)


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("lora", [True, False])
def test_interrupted_and_resumed_equals_uninterrupted(sft, train, tmp_path, llama, monkeypatch, lora, stop):
    """In the middle of a pass over the data, between two passes, and after the last step."""
    flags = LIFE if lora else LIFE[3:]
    train(CHATS, llama, *flags, out="whole")
    training_step = sft.SFTTrainer.training_step

    def interrupt(self, *args):
        if self.state.global_step == stop - 1:
            signal.raise_signal(signal.SIGINT) if self.is_in_train and signal.getsignal(
                signal.SIGINT
            ) is not signal.default_int_handler else None
        return training_step(self, *args)

    monkeypatch.setattr(sft.SFTTrainer, "training_step", interrupt)
    _, error = train(CHATS, llama, *flags, out="cut", code=130)
    monkeypatch.setattr(sft.SFTTrainer, "training_step", training_step)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert "--resume_from_checkpoint" in error
    assert not (cut / "final_checkpoint").exists() and (cut / f"checkpoint-{stop}").is_dir()
    train(CHATS, llama, *flags, "--resume_from_checkpoint", out="cut")
    assert same(weights(whole / "final_checkpoint"), weights(cut / "final_checkpoint"))
    assert losses(whole) == losses(cut) and [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]


def test_two_questions_in_a_row_and_tools_are_trained_on(train, llama):
    """Tools reach the template (this one leaves them out), two questions stay two; the odd row is left out, the rest is not."""
    rows = [{**row, "tools": json.dumps([{"type": "function", "function": {"name": "f"}}])} for row in CHATS]
    turns = rows[0]["messages"]
    rows += [{**rows[0], "messages": [*turns[:2], *turns[1:]]}, {**rows[0], "messages": turns[:1]}]
    out = "".join(train(rows, llama, "--dry_run"))
    assert f"{len(CHATS) + 1} rows kept" in out and f"1 of {len(rows)} rows left out" in out


@pytest.mark.parametrize("name", ["a.csv", "run [v2]/b.csv", "c.jsonl.gz", "d [x]/train.jsonl", "late.jsonl"])
def test_files_as_they_are(sft, tmp_path, plain_llama, name):
    """Values are text as in the file, whatever is in its name, and whenever a column's type shows."""
    answers = ["NA", "007", "2020-01-01", "None", "True", "1.50"]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".csv":
        path.write_text(
            "question,response_j\n" + "".join(f"q{i},{a}\n" for i, a in enumerate(answers)), encoding="utf-8"
        )
    else:
        rows = [{"question": f"q{i}", "response_j": a} for i, a in enumerate(answers)]
        if name == "late.jsonl":
            rows = [{**row, "note": "x" * 4_000_000, "more": None if i < 5 else "text"} for i, row in enumerate(rows)]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    place = path.parent if "[" in path.parent.name else path
    flags = ["--model_path", plain_llama, "--dataset_name", place, "--output_dir", tmp_path / "out", "--max_steps", 1]
    rows = []
    show = sft.show_rows
    try:
        sft.show_rows = lambda kept, tokenizer: rows.extend(tokenizer.decode(row["input_ids"]) for row in kept)
        run(sft, *flags, "--dry_run")
    finally:
        sft.show_rows = show
    assert [row.partition("Answer: ")[2].removesuffix("<|endoftext|>") for row in rows] == answers


@pytest.mark.parametrize(
    "more", [{"temperature": 0.9, "top_p": 0.6}, {"min_p": 0.1}, {"early_stopping": True}], ids=str
)
def test_a_generation_config_that_cannot_be_saved(train, tmp_path, plain_llama, more):
    """Llama 2 as shipped, with a temperature without sampling: transformers refuses to save it after training."""
    base = Path(shutil.copytree(plain_llama, tmp_path / "base"))
    config = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    config |= {"do_sample": False, **more}
    (base / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    train(PAIRS, base)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_checkpoint").generation_config
    assert not any(getattr(saved, name) == value for name, value in more.items())
    assert config["eos_token_id"] in saved.eos_token_id


def test_a_classifier_is_no_policy(train, tmp_path, plain_llama):
    """Whoever made it: its language model's head would be random, or its adapter a classifier's for ever."""
    make_adapter(plain_llama, tmp_path / "adapter", "SEQ_CLS")
    AutoModelForSequenceClassification.from_pretrained(plain_llama, num_labels=1).save_pretrained(tmp_path / "full")
    for name in ("adapter", "full"):
        assert "is a reward model" in train(PAIRS, tmp_path / name, code=2)[1]


def test_tokens_without_embeddings(train, tmp_path, plain_llama):
    """They are added where all weights are trained; else that is said before any weight is loaded."""
    base = Path(shutil.copytree(plain_llama, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(base)
    assert "the new ones would not be trained" in train(PAIRS, base, "--use_lora", code=2)[1]
    train([*PAIRS, {"prompt": "<extra8>", "response": "<extra7>"}], base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_checkpoint")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


@pytest.mark.parametrize("more", [5, -3])
def test_an_adapter_with_embeddings_of_its_own_size_is_continued(train, tmp_path, plain_llama, more):
    """As PEFT users do by hand: the base's embeddings take the adapter's size first."""
    base = make_model(tmp_path / "base", chat=False, vocab_size=len(AutoTokenizer.from_pretrained(plain_llama)) + 3)
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = model.config.vocab_size + more
    model.resize_token_embeddings(rows, mean_resizing=False)
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    train(PAIRS, tmp_path / "adapter", "--bf16")
    saved = weights(tmp_path / "out" / "final_checkpoint")
    trained = [weight for name, weight in saved.items() if re.search(r"lora_|(embed_tokens|lm_head)\.weight$", name)]
    assert len(trained) == 6 and all(weight.dtype == torch.float32 for weight in trained)
    shapes = {name: weight.shape[0] for name, weight in weights(tmp_path / "out" / "final_checkpoint").items()}
    assert [size for name, size in shapes.items() if "embed_tokens" in name or "lm_head" in name] == [rows] * 6


def test_every_reader_stops_where_a_turn_ends(train, tmp_path, llama):
    """The base's EOS is another token: tokenizer, config and generation config of what was trained name the turn's end."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|im_start|>"})
    tokenizer.save_pretrained(base)
    train(CHATS, base)
    final = tmp_path / "out" / "final_checkpoint"
    assert AutoTokenizer.from_pretrained(final).eos_token_id == end
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.eos_token_id == end and end in model.generation_config.eos_token_id


def test_resuming_with_other_data_or_batches_is_refused(train, tmp_path, llama):
    """It would be neither run; another learning rate is said, more steps are what resuming is for."""
    train(CHATS, llama)
    for flags in (
        ["--batch_size", 4],
        ["--gradient_accumulation_steps", 3],
        ["--max_length", 64],
        ["--max_samples", 4],
    ):
        assert f"{flags[0]} {flags[1]} (was" in train(CHATS, llama, "--resume_from_checkpoint", *flags, code=2)[1]
    out = train(CHATS, llama, "--resume_from_checkpoint", "--max_steps", 3, "--learning_rate", 1e-4)[0]
    assert "resuming with other flags than before: --learning_rate 0.0001" in out
    assert losses(tmp_path / "out")[-1][0] == 3
    log = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [line["learning_rate"] for line in map(json.loads, log) if "learning_rate" in line]
    assert rates[-1] == pytest.approx(1e-4 / 3)  # of three steps at the new rate; the finished run had come to 0


def test_an_incomplete_checkpoint_is_passed_over(train, tmp_path, llama):
    train(CHATS, llama, *LIFE)
    done = weights(tmp_path / "out" / "final_checkpoint")
    shutil.rmtree(tmp_path / "out" / "final_checkpoint")
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").unlink()
    train(CHATS, llama, *LIFE, "--resume_from_checkpoint")
    assert same(done, weights(tmp_path / "out" / "final_checkpoint"))


def test_a_checkpoint_of_an_earlier_version_is_refused(train, tmp_path, llama):
    train(CHATS, llama, *LIFE)
    path = tmp_path / "out" / "checkpoint-6" / "run.json"
    path.write_text(json.dumps({**read(path), "versions": {"trl": "1.12.0"}}), encoding="utf-8")
    assert "earlier version of this script" in train(CHATS, llama, *LIFE, "--resume_from_checkpoint", code=2)[1]


def test_overwriting_replaces_the_earlier_run_and_nothing_else(train, tmp_path, llama):
    train(CHATS, llama, *LIFE)
    out = tmp_path / "out"
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert "is not empty" in train(CHATS, llama, code=2)[1]
    train(CHATS, llama, "--max_steps", 1, "--overwrite_output_dir")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]
    assert (out / "final_checkpoint" / "model.safetensors").is_file() and (out / "notes.txt").is_file()
    assert not (out / "final_checkpoint" / "adapter_config.json").exists()
    assert [step for step, _ in losses(out)] == [1]


def test_a_model_beyond_the_memory_is_warned_of(train, sft, llama, monkeypatch):
    assert "warning:" not in "".join(train(CHATS, llama, "--dry_run"))
    memory = type("Memory", (), {"available": 10_000})
    monkeypatch.setattr(sft.psutil, "virtual_memory", lambda: memory)
    assert "warning: weights and optimizer alone take" in train(CHATS, llama, "--dry_run")[1]


def test_too_little_memory_is_one_line_with_what_helps(sft, train, llama, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sft.SFTTrainer, "training_step", fail)
    _, error = train(CHATS, llama, "--use_lora", code=2)
    assert "error: no memory left; what helps, the most first: --gradient_checkpointing --bf16 --load_in_4bit" in error


# ---------------------------------------------------------------- as a process


def test_the_file_runs_alone_from_an_empty_directory(tmp_path, llama):
    shutil.copy(ROOT / "training_sft.py", tmp_path / "training_sft.py")
    write_rows(tmp_path / "data" / "finetune" / "train.jsonl", CHATS)
    flags = ["--model_path", llama, "--dataset_name", "json", "--subset", "data/finetune", "--split", "train"]
    flags += ["--output_dir", "runs/sft", "--use_lora", "--batch_size", "2", "--max_steps", "2"]
    done = subprocess.run([sys.executable, "training_sft.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"\nsaved {os.path.join('runs', 'sft', 'final_checkpoint')} (adapter, " in done.stdout
    assert (tmp_path / "runs" / "sft" / "final_checkpoint" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"training_sft.py", "data", "runs"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_stopped_process_leaves_a_checkpoint_that_goes_on_to_the_same_bytes(sft, tmp_path, llama, name):
    data, out = write_rows(tmp_path / "train.jsonl", CHATS), tmp_path / "out"
    flags = ["--model_path", llama, "--dataset_name", data, "--use_lora", "--lora_dropout", "0.1", "--max_steps", "300"]
    flags += ["--save_steps", "20", "--logging_steps", "1"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "training_sft.py"), *flags, "--output_dir", str(out)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (out / "checkpoint-20" / "trainer_state.json").is_file():
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    error = process.communicate()[1].decode()
    assert process.returncode == (130 if name == "SIGINT" else -signal.SIGKILL), error[-2000:]
    assert not (out / "final_checkpoint").exists()
    run(sft, *flags, "--output_dir", out, "--resume_from_checkpoint")
    run(sft, *flags, "--output_dir", tmp_path / "whole")
    assert same(weights(out / "final_checkpoint"), weights(tmp_path / "whole" / "final_checkpoint"))
    assert losses(out) == losses(tmp_path / "whole")


# ---------------------------------------------------------------- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    ("flags", "schema"),
    [
        (["json", "--subset", SHARED / "prompt_response" / "finetune"], "prompt + response"),
        (["json", "--subset", SHARED / "question_response_jk" / "reward"], "question + response_j"),
        (["json", "--subset", SHARED / "chat_messages"], "messages"),
        (["json", "--subset", SHARED / "chat_preferences"], "messages"),
        ([SHARED / "ultrafeedback_binarized_sample", "--split", "train_sft"], "messages"),
    ],
)
def test_real_data(sft, tmp_path, llama, flags, schema):
    settings = ["--model_path", llama, "--output_dir", tmp_path / "out", "--max_length", 300, "--max_samples", 60]
    out, _ = run(sft, *settings, "--dataset_name", *flags, "--dry_run")
    assert f"schema {schema}, format" in out
