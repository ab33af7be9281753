"""training_sft.py: the tokens it trains on, the gradient of a step, what a run leaves, and how it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SHARED, make_model, make_tokenizer, write_rows
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

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


@pytest.fixture
def run(sft, tmp_path, monkeypatch):
    """run(rows, model, *flags) -> the trainer, after main() with the rows as data set; output in tmp_path / `out`."""
    made = []

    init = sft.SFTTrainer.__init__

    def remember(self, **kwargs):
        init(self, **kwargs)
        made.append(self)

    monkeypatch.setattr(sft.SFTTrainer, "__init__", remember)

    def run(rows, model, *flags, out="out"):
        data = write_rows(tmp_path / "data" / "train.jsonl", rows)
        settings = ["--model_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / out)]
        sft.main([*settings, "--max_steps", "2", "--batch_size", "2", "--logging_steps", "1", *map(str, flags)])
        return made[-1] if made else None

    return run


def weights(directory):
    """All weights in a checkpoint directory, by name."""
    name = "adapter_model.safetensors" if (directory / "adapter_model.safetensors").is_file() else "model.safetensors"
    return load_file(directory / name)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained_text(trainer, row=0):
    """What row `row` trains on, and everything, as text."""
    data = trainer.train_dataset[row]
    trained = [label for label in data["labels"] if label != -100]
    return trainer.processing_class.decode(trained), trainer.processing_class.decode(data["input_ids"])


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who?", "response": "Me."},
        {"question": "Who?", "response_j": "Me.", "response_k": "You."},
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
    ],
)
def test_pairs_train_on_the_answer_and_eos(run, plain_llama, row):
    trainer = run([row] * 1 + [{**row, **{name: row[name] + " Yes." for name in row}}], plain_llama)
    trained, whole = trained_text(trainer)
    assert whole == "Question: Who?\n\nAnswer: Me.<|endoftext|>"
    assert trained == " Me.<|endoftext|>"
    ids = trainer.train_dataset[0]["input_ids"]
    assert ids.count(trainer.processing_class.eos_token_id) == 1 and ids[-1] == trainer.processing_class.eos_token_id


def test_chats_train_on_every_assistant_turn(run, llama):
    trained, whole = trained_text(run(CHATS, llama))
    assert trained == "a!<|im_end|>a a!\nDone.<|im_end|>"
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay a.<|im_end|>\n")


def test_messages_come_before_pairs_and_qa_can_be_asked_for(run, llama, capsys):
    rows = [{**chat, "prompt": "x", "response": "y"} for chat in CHATS]
    trained, whole = trained_text(run(rows, llama, "--prompt_format", "qa"))
    assert "schema messages, format qa" in capsys.readouterr().out
    assert whole == "Question: Be brief.\n\nSay a.\n\na!\n\nAnd again?\n\nAnswer: a a!\nDone.<|im_end|>"
    assert trained == " a a!\nDone.<|im_end|>"


def test_messages_without_a_template_become_question_and_answer(run, plain_llama):
    trained, whole = trained_text(run(CHATS, plain_llama))
    assert (
        whole.endswith("\n\nAnd again?\n\nAnswer: a a!\nDone.<|endoftext|>") and trained == " a a!\nDone.<|endoftext|>"
    )


def test_train_on_prompt_trains_on_everything(run, llama):
    trained, whole = trained_text(run(CHATS, llama, "--train_on_prompt"))
    assert trained == whole


def test_rows_are_cut_dropped_and_counted(run, tmp_path, plain_llama, capsys):
    long = {"prompt": "b", "response": "word " * 50}
    hopeless = {"prompt": "word " * 50, "response": "b"}
    trainer = run([PAIRS[0], PAIRS[1], PAIRS[0], long, hopeless, PAIRS[1]], plain_llama, "--max_length", 32)
    out = capsys.readouterr().out
    assert (
        "3 rows kept, 1 of them cut to 32 tokens; dropped: 2 equal to an earlier row, 1 with no answer within 32" in out
    )
    assert len(trainer.train_dataset) == 3 and max(map(len, trainer.train_dataset["input_ids"])) == 32
    counts = json.loads((tmp_path / "out" / "final_checkpoint" / "run.json").read_text(encoding="utf-8"))["dataset"]
    assert {name: counts[name] for name in ("rows", "cut", "duplicates", "unanswered")} == {
        "rows": 3, "cut": 1, "duplicates": 2, "unanswered": 1,
    }  # fmt: skip


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--load_in_4bit"], ["--load_in_8bit", "--bf16"]], ids="-".join)
@pytest.mark.parametrize("batch", [[], ["--packing"], ["--gradient_checkpointing"]], ids="-".join)
def test_an_adapter_is_trained_in_float32_whatever_the_base_is_in(run, tmp_path, llama, precision, batch):
    """SFTTrainer makes it bfloat16 on a quantized base, where small steps round to nothing."""
    trainer = run(CHATS, llama, "--use_lora", "--learning_rate", 1e-2, *precision, *batch)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    adapter = weights(tmp_path / "out" / "final_checkpoint")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_4_bit_weights_keep_their_gradients_after_an_evaluation(run, tmp_path, llama):
    """In eval mode bitsandbytes packs them for a kernel of the CPU that has no backward pass."""
    flags = ["--use_lora", "--load_in_4bit", "--eval_fraction", 0.25, "--max_steps", 3, "--set", "optim=sgd"]
    run(CHATS, llama, *flags, "--learning_rate", 0.1, "--eval_steps", 1, out="often")
    run(CHATS, llama, *flags, "--learning_rate", 0.1, out="end")
    often, end = (weights(tmp_path / name / "final_checkpoint") for name in ("often", "end"))
    assert same(often, end)
    assert all(tensor.any() for name, tensor in often.items() if "lora_B" in name)


def test_two_processes_of_two_rows_take_the_step_of_one_of_four(sft, tmp_path, llama):
    data = write_rows(tmp_path / "train.jsonl", CHATS)
    flags = ["--model_path", llama, "--dataset_name", data, "--eval_fraction", "0.25", "--max_steps", "2"]
    flags += ["--set", "optim=sgd", "--learning_rate", "1e-2", "--logging_steps", "1", "--eval_steps", "1"]
    sft.main([*flags, "--output_dir", str(tmp_path / "one"), "--batch_size", "2"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = [str(ROOT / "training_sft.py"), *flags, "--output_dir", str(tmp_path / "two"), "--batch_size", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *two], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("memory: about") == 1  # the first process talks
    one, two = ([json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")] for out in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & mine.keys():
            assert other[key] == pytest.approx(mine[key], rel=1e-4), key


# ---------------------------------------------------------------- the gradient of a step


def padded_gradient(model_path, rows):
    """The gradient of the mean loss of all trained tokens, from one right-padded batch in plain PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values, fill):
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

    ids, labels = pad([row["input_ids"] for row in rows], 0), pad([row["labels"] for row in rows], -100)
    mask = pad([[1] * len(row["input_ids"]) for row in rows], 0)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


STEP = [
    "--set",
    "optim=sgd",
    "--learning_rate",
    1,
    "--lr_scheduler_type",
    "constant",
    "--max_grad_norm",
    0,
    "--max_steps",
    1,
]


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        (["--batch_size", 8], "row by row"),
        (["--batch_size", 8], "long answers"),
        (["--batch_size", 8], "gpu"),
        (["--batch_size", 2, "--gradient_accumulation_steps", 4], "row by row"),
        (["--batch_size", 2, "--gradient_accumulation_steps", 4], "gpu"),
        (["--batch_size", 8, "--gradient_checkpointing"], "row by row"),
        (["--batch_size", 1, "--packing", "--max_length", 512], "row by row"),
        (["--batch_size", 8, "--train_on_prompt"], "row by row"),
        (["--batch_size", 8, "--train_on_prompt"], "gpu"),
    ],
)
def test_a_step_is_that_of_the_padded_batch(sft, run, tmp_path, plain_llama, monkeypatch, flags, how):
    """However the eight rows are laid out, each trained token counts the same and no row sees another.

    "gpu" is the layout of a GPU: the rows of a batch one after the other in one row."""
    if how == "long answers":
        monkeypatch.setattr(sft.RowTrainer, "LOGITS", 400 * 40)  # 3 rows are longer than 40 tokens, 5 are not
    if how == "gpu":
        monkeypatch.setattr(sft.torch.accelerator, "is_available", lambda: True)
        make = sft.make_config
        monkeypatch.setattr(sft, "make_config", lambda *args, **own: make(*args, **{**own, "use_cpu": True}))
    trainer = run(PAIRS, plain_llama, *STEP, *flags)
    assert trainer.args.per_device_train_batch_size == (flags[1] if how == "gpu" else 1)
    if how == "long answers":
        lengths = sorted(sum(label != -100 for label in row) for row in trainer.train_dataset["labels"])
        assert (
            lengths[0] * len(trainer.processing_class)
            < sft.RowTrainer.LOGITS
            < lengths[-1] * len(trainer.processing_class)
        )
    assert trainer.state.global_step == 1
    if "--packing" in flags:
        assert len(trainer.train_dataset) == 1 and len(trainer.train_dataset[0]["seq_lengths"]) == 8
    rows = sft.datasets.Dataset.from_list(PAIRS).map(
        lambda row: dict(zip(("input_ids", "labels"), reference_row(sft, trainer, row, "--train_on_prompt" in flags)))
    )
    loss, gradient = padded_gradient(plain_llama, rows)
    before, after = AutoModelForCausalLM.from_pretrained(plain_llama), trainer.model
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        torch.testing.assert_close(old - new, gradient[name], rtol=1e-4, atol=2e-6, msg=name)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def reference_row(sft, trainer, row, everything):
    tokenizer = trainer.processing_class
    prompt = tokenizer(f"Question: {row['prompt']}\n\nAnswer:")["input_ids"]
    answer = tokenizer(f" {row['response']}")["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, (prompt if everything else [-100] * len(prompt)) + answer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_example_sees_another_in_a_flattened_row(run, plain_llama, gpt2, kind):
    """Other tokens in one example leave the loss and the gradient of its neighbour as they are, bit for bit."""
    trainer = run(PAIRS, plain_llama, "--max_steps", 1)
    first, second = trainer.train_dataset[0], trainer.train_dataset[5]
    changed = {**second, "input_ids": [(token + 7) % 300 for token in second["input_ids"]]}
    model = AutoModelForCausalLM.from_pretrained(
        plain_llama if kind == "llama" else gpt2
    )  # from_pretrained: no dropout
    weight = (
        model.model.layers[0].self_attn.q_proj.weight if kind == "llama" else model.transformer.h[0].attn.c_attn.weight
    )

    def gradient(*examples, look_at):
        hidden = [{**example, "labels": [-100] * len(example["labels"])} for example in examples]
        hidden[look_at] = examples[look_at]
        batch = trainer.data_collator(hidden)
        assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss  # with a cache there would be no mask per example
        loss.backward()
        return loss.item(), weight.grad.clone()

    for order, look_at in (((first, second), 0), ((second, first), 1)):
        loss, grad = gradient(*order, look_at=look_at)
        other = tuple(changed if example is second else example for example in order)
        other_loss, other_grad = gradient(*other, look_at=look_at)
        assert loss == other_loss and torch.equal(grad, other_grad)
    assert gradient(first, second, look_at=1)[0] != gradient(first, changed, look_at=1)[0]


def test_checkpointing_turns_on_where_memory_is_short_and_changes_nothing(
    sft, run, tmp_path, plain_llama, monkeypatch, capsys
):
    trainer = run(PAIRS, plain_llama, "--use_lora", out="plenty")
    said = capsys.readouterr().out
    assert not trainer.args.gradient_checkpointing and "gradient checkpointing is on" not in said
    available = [0]
    monkeypatch.setattr(sft.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available[0]}))
    for free in range(100_000, 10_000_000, 10_000):  # just too little: it has to help
        available[0] = free
        try:
            trainer = run(PAIRS, plain_llama, "--use_lora", out="short")
            break
        except sft.UserError as error:
            assert "GB of memory" in str(error)
    assert trainer.args.gradient_checkpointing and trainer.model.base_model.model.is_gradient_checkpointing
    assert "gradient checkpointing is on: without it 0.0 GB are needed" in capsys.readouterr().out
    one, other = (weights(tmp_path / out / "final_checkpoint") for out in ("plenty", "short"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- what is trained and what is left


def test_full_training_leaves_a_model_that_loads_with_one_call(run, tmp_path, llama):
    trainer = run(CHATS, llama)
    final = tmp_path / "out" / "final_checkpoint"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer("Say a.", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits)
    start = AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(llama).chat_template
    run_json = json.loads((final / "run.json").read_text(encoding="utf-8"))
    assert run_json["stage"] == "sft" and run_json["prompt_format"] == "chat" and run_json["base_model"] == llama
    assert (
        run_json["metrics"]["train_loss"] == json.loads((tmp_path / "out" / "metrics.json").read_text())["train_loss"]
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2]


def test_lora_trains_the_adapter_alone_and_it_is_relative_to_the_base(run, tmp_path, llama):
    trainer = run(CHATS, llama, "--use_lora", "--lora_r", 4)
    final = tmp_path / "out" / "final_checkpoint"
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    config = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == llama and config["r"] == 4 and config["task_type"] == "CAUSAL_LM"
    assert not (final / "model.safetensors").exists()
    assert all(weight.abs().sum() > 0 for weight in weights(final).values())  # B starts at zero
    model = AutoPeftModelForCausalLM.from_pretrained(final)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits)
    with model.disable_adapter():
        base = AutoModelForCausalLM.from_pretrained(llama)
        torch.testing.assert_close(model(ids).logits, base(ids).logits)


def test_bf16_keeps_trained_weights_in_float32(run, llama):
    full = run(CHATS, llama, "--bf16", out="full")
    assert {weight.dtype for weight in full.model.parameters()} == {torch.float32}
    lora = run(CHATS, llama, "--bf16", "--use_lora", out="lora")
    kinds = {(weight.requires_grad, weight.dtype) for weight in lora.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert lora.args.bf16 and all(line["loss"] > 0 for line in lora.state.log_history if "loss" in line)


def test_an_adapter_is_continued_not_stacked(run, tmp_path, llama):
    run(CHATS, llama, "--use_lora", "--lora_r", 4, out="first")
    first = tmp_path / "first" / "final_checkpoint"
    run(CHATS, str(first), "--learning_rate", 0, out="still")  # --use_lora follows from the adapter
    assert same(weights(first), weights(tmp_path / "still" / "final_checkpoint"))
    run(CHATS, str(first), out="second")
    second = tmp_path / "second" / "final_checkpoint"
    assert not same(weights(first), weights(second)) and weights(first).keys() == weights(second).keys()
    config = json.loads((second / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == llama and config["r"] == 4
    assert json.loads((second / "run.json").read_text(encoding="utf-8"))["parent"] == str(first)
    AutoPeftModelForCausalLM.from_pretrained(second)


def test_the_loss_goes_down(run, plain_llama):
    trainer = run(PAIRS, plain_llama, "--max_steps", 12, "--batch_size", 4, "--learning_rate", 0.02)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("how", ["split", "fraction"])
def test_evaluation(sft, run, tmp_path, plain_llama, how):
    other = [{"prompt": f"Why {word}?", "response": f"So {word}."} for word in "xyz"]
    if how == "split":
        data = write_rows(tmp_path / "evaluation" / "test.jsonl", other)
        # Same loader, other folder: the single file of a folder is the split.
        write_rows(tmp_path / "train" / "train.jsonl", PAIRS)
        flags = ["--dataset_name", "json", "--subset", str(tmp_path / "train")]
        flags += ["--eval_subset", str(tmp_path / "evaluation"), "--eval_split", "test", "--eval_steps", 1]
        assert data
    else:
        flags = ["--eval_fraction", 0.25]
    trainer = run(PAIRS, plain_llama, *flags)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    rows = trainer.eval_dataset
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_checkpoint")(ids).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100).item())
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    if how == "split":
        assert len(rows) == 3 and len(trainer.train_dataset) == 8
        lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines if "eval_loss" in line] == [1, 2, 2]
    else:
        assert len(rows) == 2 and len(trainer.train_dataset) == 6
        assert not {tuple(row) for row in rows["input_ids"]} & {
            tuple(row) for row in trainer.train_dataset["input_ids"]
        }


# ---------------------------------------------------------------- the life of a run

LIFE = ["--use_lora", "--lora_dropout", 0.2, "--max_steps", 6, "--save_steps", 2, "--batch_size", 2]


def losses_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_the_same_run_twice_gives_the_same_weights_and_another_seed_does_not(run, tmp_path, llama):
    for out, seed in (("one", 1), ("two", 1), ("three", 2)):
        run(CHATS, llama, *LIFE, "--seed", seed, out=out)
    one, two, three = (weights(tmp_path / out / "final_checkpoint") for out in ("one", "two", "three"))
    assert same(one, two) and not same(one, three)


@pytest.mark.parametrize("lora", [True, False])
def test_interrupted_and_resumed_equals_uninterrupted(sft, run, tmp_path, llama, monkeypatch, capsys, lora):
    flags = LIFE if lora else LIFE[3:]
    run(CHATS, llama, *flags, out="whole")
    on_step_end = sft.RunCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.interrupt(signal.SIGINT, None)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(sft.RunCallback, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(CHATS, llama, *flags, out="cut")
    monkeypatch.setattr(sft.RunCallback, "on_step_end", on_step_end)
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "final_checkpoint").exists() and (tmp_path / "cut" / "checkpoint-3").is_dir()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-2", ignore_errors=True)
    run(CHATS, llama, *flags, "--resume_from_checkpoint", out="cut")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert same(weights(whole / "final_checkpoint"), weights(cut / "final_checkpoint"))
    assert losses_of(whole) == losses_of(cut) and [step for step, _ in losses_of(whole)] == [1, 2, 3, 4, 5, 6]


def test_a_broken_checkpoint_is_passed_over(run, tmp_path, llama, capsys):
    run(CHATS, llama, *LIFE, out="run")
    done = weights(tmp_path / "run" / "final_checkpoint")
    shutil.rmtree(tmp_path / "run" / "final_checkpoint")
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").unlink()
    capsys.readouterr()
    run(CHATS, llama, *LIFE, "--resume_from_checkpoint", out="run")
    assert "was never completed: passed over" in capsys.readouterr().out
    assert same(done, weights(tmp_path / "run" / "final_checkpoint"))


def test_overwriting_replaces_the_earlier_run(run, tmp_path, llama):
    run(CHATS, llama, *LIFE)
    run(CHATS, llama, "--max_steps", 1, "--overwrite_output_dir")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]
    assert (out / "final_checkpoint" / "model.safetensors").is_file()
    assert not (out / "final_checkpoint" / "adapter_config.json").exists()
    assert [step for step, _ in losses_of(out)] == [1]


def test_dry_run_shows_the_data_and_loads_and_writes_nothing(sft, run, tmp_path, llama, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(sft, "load_model", never)
    assert run(CHATS + CHATS[:1], llama, "--dry_run", "--num_train_epochs", 2, "--batch_size", 3) is None
    out = capsys.readouterr().out
    assert "schema messages, format chat; 8 rows kept" in out and "dropped: 1 equal to an earlier row" in out
    assert "2 steps, 3 rows each; an epoch has 8, " in out  # run() asks for --max_steps 2
    assert "<|im_start|>assistant\n[[a!<|im_end|>]]\n<|im_start|>user\nAnd again?<|im_end|>" in out
    assert "[[e e!\nDone.<|im_end|>]]" in out  # the second row shown is one from the middle
    histogram = [line.split() for line in out.splitlines() if " tokens " in line and "#" in line]
    assert sum(int(line[4]) for line in histogram) == 8
    assert out.endswith("nothing was loaded or written\n") and not (tmp_path / "out").exists()


def test_steps_of_epochs_are_counted_as_they_are_taken(sft, tmp_path, llama, capsys):
    data = write_rows(tmp_path / "train.jsonl", CHATS)
    flags = ["--model_path", llama, "--dataset_name", data, "--batch_size", "3", "--num_train_epochs", "2"]
    sft.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert "6 steps, 3 rows each" in capsys.readouterr().out
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 6 and state["epoch"] == 2
    sft.main(
        [*flags, "--output_dir", str(tmp_path / "packed"), "--packing", "--max_length", "400", "--batch_size", "1"]
    )
    steps = int(capsys.readouterr().out.split(" steps, 1 packed rows each")[0].split()[-1])
    assert (tmp_path / "packed" / f"checkpoint-{steps}").is_dir() and steps < 16


def test_a_dry_run_colours_what_is_trained_on_on_a_terminal(sft, run, llama, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run(CHATS, llama, "--dry_run")
    assert "assistant\n\033[32ma!<|im_end|>\033[0m\n" in capsys.readouterr().out


def test_an_earlier_turn_that_the_template_rewrites_is_reported(run, tmp_path, llama, capsys):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import templates

    copy = tmp_path / "model"
    shutil.copytree(llama, copy)
    templates.make_tokenizer("qwen3").save_pretrained(copy)
    run(CHATS, str(copy), "--dry_run")
    assert "in 8 rows the chat template rewrites earlier turns: these are context only" in capsys.readouterr().out


# ---------------------------------------------------------------- as a process


def command(*flags):
    return [sys.executable, str(ROOT / "training_sft.py"), *map(str, flags)]


def test_the_file_runs_alone_from_an_empty_directory(tmp_path, llama):
    shutil.copy(ROOT / "training_sft.py", tmp_path / "training_sft.py")
    write_rows(tmp_path / "data" / "finetune" / "train.jsonl", CHATS)
    flags = ["--model_path", llama, "--dataset_name", "json", "--subset", "data/finetune", "--split", "train"]
    flags += ["--output_dir", "runs/sft", "--use_lora", "--batch_size", "2", "--max_steps", "2"]
    done = subprocess.run([sys.executable, "training_sft.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"saved {os.path.join('runs', 'sft', 'final_checkpoint')}\n")
    assert (tmp_path / "runs" / "sft" / "final_checkpoint" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"training_sft.py", "data", "runs"}


def test_help_answers_before_the_slow_imports():
    start = time.monotonic()
    done = subprocess.run(command("--help"), capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and "--eval_fraction" in text and "(default: 1024)" in text
    assert time.monotonic() - start < 5


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(sft, tmp_path, llama):
    data = write_rows(tmp_path / "train.jsonl", CHATS)
    out = tmp_path / "out"
    flags = ["--model_path", llama, "--dataset_name", data, "--output_dir", out, "--use_lora", "--logging_steps", 1]
    process = subprocess.Popen(
        command(*flags, "--max_steps", 100000), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    for _ in range(600):
        if (out / "metrics.jsonl").is_file():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"saving a checkpoint" in err and b"--resume_from_checkpoint" in err and b"Traceback" not in err
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    sft.main([str(flag) for flag in flags] + ["--max_steps", str(step + 1), "--resume_from_checkpoint"])
    assert losses_of(out)[-1][0] == step + 1 and (out / "final_checkpoint").is_dir()


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
def test_real_data(sft, tmp_path, llama, capsys, flags, schema):
    out = tmp_path / "out"
    argv = [
        "--model_path",
        llama,
        "--output_dir",
        out,
        "--max_length",
        300,
        "--max_steps",
        1,
        "--logging_steps",
        1,
        "--dataset_name",
        *flags,
    ]
    sft.main([str(flag) for flag in argv] + ["--max_samples", "60"])
    assert f"schema {schema}, format" in capsys.readouterr().out
    assert losses_of(out)[0][1] > 0


def test_the_seed_projects_command_line_parses(sft):
    line = (
        "--model_path meta-llama/Llama-3.2-3B-Instruct --dataset_name HuggingFaceH4/ultrafeedback_binarized --split train_sft "
        "--output_dir ./checkpoints/sft_llama3b_ultrafeedback --bf16 --use_lora --batch_size 1 "
        "--gradient_accumulation_steps 8 --max_steps 1000"
    )
    args = sft.build_parser().parse_args(line.split())
    assert (args.split, args.batch_size, args.max_steps, args.bf16) == ("train_sft", 1, 1000, True)
    alias = sft.build_parser().parse_args(line.replace("--batch_size", "--per_device_train_batch_size").split())
    assert alias.batch_size == 1


def test_gpt2_trains_too(run, gpt2, tmp_path):
    run(PAIRS, gpt2, "--use_lora")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "final_checkpoint")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tied"), chat=False, tie_word_embeddings=True)


def test_tied_embeddings_survive_saving(run, tied, tmp_path):
    trainer = run(PAIRS, tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_checkpoint")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)


def test_a_model_whose_layers_mix_examples_in_a_row_is_refused(sft, run, tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(chat=False)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(sft.UserError, match="examples that share a row see each other; leave --packing out"):
        run(PAIRS, str(tmp_path / "mamba"), "--packing", "--max_length", 64, out="mixed")
    run(PAIRS, str(tmp_path / "mamba"), out="apart")  # on a CPU row by row


def test_an_adapter_on_the_head_is_trained(run, tmp_path, plain_llama):
    run(PAIRS, plain_llama, "--use_lora", "--lora_target_modules", "q_proj", "lm_head", "--learning_rate", 1e-2)
    found = weights(tmp_path / "out" / "final_checkpoint")
    assert any("lm_head.lora_B" in name and tensor.any() for name, tensor in found.items())
