"""Bad input: one line that says what is wrong, where, and what would be right; before anything slow, nothing written."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, make_model, make_tokenizer, write_rows
from safetensors import SafetensorError

GOOD = [{"prompt": f"Why {word}?", "response": f"So {word}."} for word in "abcd"]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def refuse(sft, tmp_path, llama, monkeypatch):
    """refuse(expected, *flags, rows=, model=) asserts that main() raises a one-line UserError and writes nothing."""

    def never(*args, **kwargs):
        raise AssertionError("weights were loaded before this was checked")

    def refuse(expected, *flags, rows=GOOD, model=llama, cheap=True, out=tmp_path / "out"):
        data = write_rows(tmp_path / "data" / "train.jsonl", rows)
        argv = ["--model_path", model, "--dataset_name", data, "--output_dir", out, "--max_steps", 1, *flags]
        if cheap:
            monkeypatch.setattr(sft.AutoModelForCausalLM, "from_pretrained", never)
        before = snapshot(out)
        with pytest.raises(sft.UserError) as error:
            sft.main(list(map(str, argv)))
        assert re.search(expected, " ".join(str(error.value).split()))  # one line, as run_as_script prints it
        assert snapshot(out) == before

    return refuse


def snapshot(path):
    return {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()} if path.exists() else None


def chat(*contents):
    roles = ("user", "assistant")
    return [{"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}]


# ---------------------------------------------------------------- data


def test_a_missing_column(refuse, tmp_path):
    refuse(
        r"train.jsonl \[train\] has the columns prompt, answer; one of these is needed: messages; question \+ response_j; "
        r"prompt \+ response; prompt \+ chosen",
        rows=[{"prompt": "a", "answer": "b"}],
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([*GOOD, {"prompt": "x", "response": ""}], r"train.jsonl \[train\], row 4: column response is empty; it should be text"),
        ([*GOOD, {"prompt": " \n", "response": "y"}], r"row 4: column prompt is empty; it should be text"),
        ([*GOOD, {"prompt": "x", "response": None}], r"row 4: column response is null; it should be text"),
        ([{"prompt": "x", "response": None}, *GOOD, {"response": "x"}], r"row 0: .* \(2 such rows\)"),
        ([{"prompt": 1, "response": 2}], r"row 0: column prompt is int; it should be text"),
        ([{"prompt": "x", "chosen": CHAT}], r"row 0: column chosen is list; it should be text"),
        (chat("a", "b") + chat("a", ""), r"row 1: column messages turn 1 \(assistant\) has an empty content"),
        (chat("a", "b") + chat("a", "b", None, "d"), r"row 1: column messages turn 2 \(user\) has no content"),
        (chat("a", "b") + chat("a"), r"row 1: column messages ends with the role 'user'; it should end with 'assistant'"),
        ([{"messages": CHAT}, {"messages": []}], r"row 1: column messages should be a list of {role, content}, not an empty one"),
        ([{"messages": CHAT}, {"messages": None}], r"row 1: column messages should be a list .* not NoneType"),
        ([{"messages": "hello"}], r"row 0: column messages should be a list .* not str"),
        ([{"messages": CHAT}, {"messages": CHAT[::-1]}], r"row 1: .* turn 0 has the role 'assistant' where 'user' should be"),
        ([{"messages": [CHAT[0], CHAT[0], CHAT[1]]}], r"row 0: .* turn 1 has the role 'user' where 'assistant' should be"),
        ([{"messages": [*CHAT, {"role": "system", "content": "x"}, CHAT[1]]}], r"turn 2 has the role 'system' where 'user'"),
        ([{"messages": [{"from": "human", "value": "x"}]}], r"row 0: .* turn 0 should have the keys role and content"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(refuse, rows, expected):
    refuse(expected, rows=rows)


def test_an_empty_data_set(refuse):
    refuse("train.jsonl", rows=[])


def test_rows_that_are_all_too_long(refuse):
    refuse(r"no row has an answer within --max_length 5 tokens", "--max_length", 5)


def test_a_batch_larger_than_the_data_set(refuse):
    refuse(r"--batch_size 5 is larger than the data set \(4 rows\)", "--batch_size", 5)


def test_a_split_that_does_not_exist(refuse, tmp_path):
    for name in ("train", "test"):
        write_rows(tmp_path / "both" / f"{name}.jsonl", GOOD)
    refuse("--split dev: .* has the splits train, test", "--dataset_name", tmp_path / "both", "--split", "dev")
    flags = ["--dataset_name", "json", "--subset", tmp_path / "both", "--eval_split", "dev"]
    refuse("--eval_split dev: .* has the splits train, test", *flags)


def test_a_data_set_that_does_not_exist(refuse, tmp_path):
    refuse("nowhere", "--dataset_name", tmp_path / "nowhere")
    refuse("--subset .*nowhere does not exist", "--dataset_name", "json", "--subset", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    refuse("notes.txt is not a .jsonl, .json, .parquet, .csv, .arrow file", "--dataset_name", tmp_path / "notes.txt")


def test_a_file_that_is_not_json(refuse, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp', encoding="utf-8")
    refuse("broken.jsonl cannot be read", "--dataset_name", tmp_path / "broken.jsonl")


# ---------------------------------------------------------------- models


def test_a_model_path_that_does_not_exist(refuse, tmp_path):
    refuse("--model_path ./nowhere/model does not exist; it should be", model="./nowhere/model")
    refuse("nobody/nothing-here", model="nobody/nothing-here")


def test_a_model_path_that_is_no_model(refuse, tmp_path):
    file = tmp_path / "weights.bin"
    file.write_text("x", encoding="utf-8")
    refuse("--model_path .*weights.bin is a file; it should be a model directory", model=file)
    make_model(tmp_path / "run" / "final_checkpoint")
    refuse("--model_path .*run holds neither config.json nor adapter_config.json; did you mean .*run.final_checkpoint", model=tmp_path / "run")  # fmt: skip


@pytest.fixture
def adapter(sft, tmp_path, llama):
    data = write_rows(tmp_path / "adapter_data" / "train.jsonl", GOOD)
    flags = [
        "--model_path",
        llama,
        "--dataset_name",
        data,
        "--use_lora",
        "--max_steps",
        1,
        "--output_dir",
        tmp_path / "a",
    ]
    sft.main(list(map(str, flags)))
    return tmp_path / "a" / "final_checkpoint"


def test_an_adapter_whose_base_is_missing_or_unnamed(refuse, adapter, llama):
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for base, expected in (
        ("/gone/base", "is an adapter for the base model /gone/base, which is not there; put the base model back or"),
        (None, "names no base model"),
    ):
        config["base_model_name_or_path"] = base
        (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        refuse(expected, model=adapter)
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    refuse("adapter_config.json cannot be read as JSON", model=adapter)


def test_flags_that_contradict_the_adapter(refuse, adapter):
    refuse("--lora_r 4: the adapter .* has 16; leave the flag out", "--lora_r", 4, model=adapter)
    refuse("--lora_alpha 4.0: the adapter .* has 32; leave", "--lora_alpha", 4, model=adapter)
    refuse("--lora_target_modules: the adapter .* has its own", "--lora_target_modules", "q_proj", model=adapter)


def test_an_adapter_that_does_not_fit_its_base(refuse, adapter, tmp_path):
    make_model(tmp_path / "small", num_hidden_layers=1)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(tmp_path / "small")
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    refuse("the adapter .* does not fit its base model: no place for .*layers.1", "--force", model=adapter, cheap=False)


def test_modules_that_are_not_there(refuse):
    refuse("nothing_proj", "--use_lora", "--lora_target_modules", "nothing_proj", cheap=False)


def test_a_tokenizer_without_eos_or_without_a_template(refuse, tmp_path, plain_llama):
    refuse("--prompt_format chat: this tokenizer has no chat template", "--prompt_format", "chat", model=plain_llama)
    copy = tmp_path / "no_eos"
    shutil.copytree(plain_llama, copy)
    tokenizer = make_tokenizer(chat=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copy)
    refuse("the tokenizer has no EOS token", model=copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_text("{}", encoding="utf-8")
    refuse("the tokenizer of .*no_eos cannot be loaded", model=copy)


def test_a_template_that_refuses_a_row(refuse, tmp_path, llama):
    copy = tmp_path / "strict"
    shutil.copytree(llama, copy)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for", "{% if messages|length > 2 %}{{ raise_exception('only one turn') }}{% endif %}{% for", 1
    )
    tokenizer.save_pretrained(copy)
    rows = chat("a", "b") + chat("a", "b", "c", "d")
    # Already the conversation that the template is tried on has three turns.
    refuse("the chat template refuses this conversation: only one turn", rows=rows, model=copy)


def test_more_tokens_than_positions(refuse, tmp_path, gpt2):
    long = [{"prompt": "Why?", "response": "word " * 400}]
    refuse(r"--max_length 1024: the model has 512 positions, a row has \d+ tokens", rows=long, model=gpt2)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
        (["--fp16"], "--fp16 needs a GPU; on a CPU use --bf16, or neither"),
        (["--load_in_4bit"], "--load_in_4bit needs --use_lora"),
        (["--load_in_8bit"], "--load_in_8bit needs --use_lora"),
        (["--use_lora", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--lr_scheduler_type", "zigzag"], "--lr_scheduler_type zigzag is not one of"),
        (["--max_length", "many"], "--max_length: invalid int value: 'many'"),
        (["--max_length", "1"], "--max_length: 1 is not between 2 and"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio: 1.5 is not between 0 and 1"),
        (["--seed", "-1"], "--seed: -1 is not between 0 and"),
        (["--prompt_format", "xml"], "--prompt_format: invalid choice: 'xml'"),
        (["--batch", "2"], "unrecognized arguments: --batch 2"),
        (["--set", "padding_side"], "--set padding_side should read FIELD=VALUE"),
        (["--set", "adam_beta=0.9"], "--set adam_beta: SFTConfig has no such field; near it: adam_beta"),
        (["--set", "learning_rate=1"], "--set learning_rate: this field is set by a flag of its own"),
        (["--set", "optim=nothing"], "SFTConfig: .*nothing"),
        (["--eval_fraction", "0.5", "--eval_split", "test"], "--eval_fraction .* excludes --eval_split"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere is not a complete checkpoint"),
    ],
)
def test_flags(refuse, flags, expected):
    refuse(expected, *flags)


def test_bf16_on_a_card_that_cannot(sft, refuse, monkeypatch):
    monkeypatch.setattr(sft.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sft.torch.cuda, "is_bf16_supported", lambda *args, **kwargs: False)
    monkeypatch.setattr(sft.torch.cuda, "get_device_name", lambda *args: "Card 1080")
    refuse("--bf16: Card 1080 cannot compute in bfloat16; use --fp16", "--bf16")


def test_another_trl(sft, refuse, monkeypatch):
    version = sft.importlib.metadata.version
    monkeypatch.setattr(sft.importlib.metadata, "version", lambda name: "1.13.0" if name == "trl" else version(name))
    refuse(r"needs trl 1.12.0, found 1.13.0: pip install trl==1.12.0")


def test_an_output_directory_that_holds_something(refuse, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x", encoding="utf-8")
    refuse("--output_dir .*out is not empty; name another, or pass --resume_from_checkpoint .* --overwrite_output_dir")
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    refuse("--output_dir .*file is a file; it should be a directory", out=file)


# ---------------------------------------------------------------- as a process


def start(tmp_path, *flags, rows=GOOD):
    data = write_rows(tmp_path / "data" / "train.jsonl", rows)
    command = [
        sys.executable,
        ROOT / "training_sft.py",
        "--dataset_name",
        data,
        "--output_dir",
        tmp_path / "out",
        *flags,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8")
    last = done.stderr.strip().splitlines()[-1]
    return SimpleNamespace(code=done.returncode, last=last, err=done.stderr, written=(tmp_path / "out").exists())


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, llama):
    done = start(tmp_path, "--model_path", llama, rows=[*GOOD, {"prompt": "x", "response": ""}])
    assert done.code == 2 and not done.written and "Traceback" not in done.err
    assert re.fullmatch(
        r"error: .*train.jsonl \[train\], row 4: column response is empty; it should be text", done.last
    )


def test_a_mistyped_flag_is_one_line_and_nothing_else(tmp_path, llama):
    done = start(tmp_path, "--model_path", llama, "--batchsize", "2")
    assert done.code == 2 and not done.written
    assert done.err == "error: unrecognized arguments: --batchsize 2 (see training_sft.py --help)\n"


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line(sft, capsys, error):
    def save():
        raise error

    with pytest.raises(SystemExit) as stop:
        sft.run_as_script(save)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: no space left to save") and said.count("\n") == 1


def test_a_defect_keeps_its_traceback(sft):
    with pytest.raises(RuntimeError, match="shapes"):
        sft.run_as_script(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))
