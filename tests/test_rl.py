"""The PPO script: one test for each defect of the stock trainer, numbered as in the list that the project started from."""

import importlib.util
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, write_rows
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

STOP = 2  # <|im_end|>: EOS, pad and the end of a chat turn at once
RULES = """
def tokens(prompts, responses):
    return [len(response.split()) / 4 for response in responses]

def empty_is_best(prompts, responses):
    return [1.0 if not response else -1.0 for response in responses]

def hundred(prompts, responses):
    return [100.0 if len(response) % 2 else -100.0 for response in responses]

def prompt_digits(prompts, responses):
    return [float(''.join(c for c in prompt if c.isdigit())) for prompt in prompts]

def nothing(prompts, responses):
    return [0.0 for response in responses]

def not_a_number(prompts, responses):
    return [float('nan')] * len(responses)

def too_few(prompts, responses):
    return []
"""


def make_adapter(base, directory, kind, seed):
    """A random LoRA adapter with its tokenizer: CAUSAL_LM (an SFT checkpoint) or SEQ_CLS (a reward model)."""
    torch.manual_seed(seed)
    lora = LoraConfig(task_type=kind, r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    if kind == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        lora.modules_to_save = ["score"]
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return str(directory)


def make_classifier(base, directory, seed=3):
    """A full reward model with its tokenizer."""
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def chain(llama, tmp_path_factory):
    """What the stages before PPO leave behind."""
    place = tmp_path_factory.mktemp("chain")
    (place / "rules.py").write_text(RULES, encoding="utf-8")
    write_rows(place / "rl" / "rl.jsonl", [{"prompt": f"What is {'very ' * (i % 4)}{i}?"} for i in range(24)])
    return {
        "base": llama,
        "sft": make_adapter(llama, place / "sft", "CAUSAL_LM", 1),
        "rm": make_adapter(llama, place / "rm", "SEQ_CLS", 2),
        "rules": str(place / "rules.py"),
        "data": str(place / "rl"),
        "place": place,
    }


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def wide(chain, request):
    """A chain of models that are wide enough for four episodes to share a pass (hidden size = tokens of a pass)."""
    place, size = chain["place"] / f"wide_{request.param}", "hidden_size" if request.param == "llama" else "n_embd"
    base = make_model(place / "base", kind=request.param, chat=request.param == "llama", **{size: 256})
    kinds = {"sft": "CAUSAL_LM", "rm": "SEQ_CLS"}
    return {**chain, "base": base, **{name: make_adapter(base, place / name, kinds[name], 1) for name in kinds}}


@pytest.fixture(scope="session")
def full_rm(chain):
    """A full reward model of the policy's family."""
    return make_classifier(chain["base"], chain["place"] / "full_rm")


def command(chain, out, flags, model="sft", reward="rm"):
    """The command line; later flags win over the small sizes given here."""
    paths = ["--model_path", chain.get(model, model)]
    paths += ["--reward_model_path", chain.get(reward, reward)] if reward else []
    small = (
        "--per_device_train_batch_size 4 --total_episodes 8 --response_length 8 --num_ppo_epochs 2 --learning_rate 1e-3"
    )
    data = ["--dataset_name", "json", "--subset", chain["data"]]
    return [*paths, *data, "--output_dir", str(out), *small.split(), *flags.split()]


def run(rl, chain, out, flags="", **which):
    """Run the script; returns the metrics of its updates."""
    rl.main(command(chain, out, flags, **which))
    return read_updates(out)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_updates(out):
    return [line for line in read_lines(out / "metrics.jsonl") if "objective/scores" in line]


def choose_response(prompt):
    """A response that depends on the prompt alone: 1 to 8 tokens, about half of them ending with EOS."""
    chance = random.Random(str(prompt))
    response = [chance.randrange(3, 300) for _ in range(chance.randrange(1, 8))]
    return response + [STOP] if chance.random() < 0.5 else response + [7] * (8 - len(response))


def fix_responses(monkeypatch, rl, choose=choose_response):
    """Sampled responses become `choose(prompt)`; returns the list of batches of prompts that were asked for."""
    original, asked = rl.PPOTrainer.generate, []

    def generate(self, role, prompts, sample=True):
        if not sample:
            return original(self, role, prompts, sample)
        asked.append(prompts)
        return [choose(prompt) for prompt in prompts]

    monkeypatch.setattr(rl.PPOTrainer, "generate", generate)
    return asked


def prompts_of(rl, chain):
    """The token ids of all prompts."""
    tokenizer = AutoTokenizer.from_pretrained(chain["base"])
    encoder = rl.PromptFormat(tokenizer, "chat" if tokenizer.chat_template else "qa")
    texts = [row["prompt"] for row in read_lines(Path(chain["data"]) / "rl.jsonl")]
    return [encoder.encode([{"role": "user", "content": text}], open_end=True)[0] for text in texts]


def spy_roles(monkeypatch, rl, change=None):
    """A dict that will hold the roles and copies of all their weights as they were at the start."""
    original, seen = rl.build_roles, {}

    def build_roles(*args, **kwargs):
        roles = original(*args, **kwargs)
        if change:
            change(roles)
        seen.update(roles=roles, start={name: p.detach().clone() for name, p in roles.named_parameters()})
        return roles

    monkeypatch.setattr(rl, "build_roles", build_roles)
    return seen


def spy_rollouts(monkeypatch, rl):
    """A list that will hold the micro-batches of each update."""
    original, seen = rl.PPOTrainer.roll_out, []

    def roll_out(self, rows):
        seen.append(original(self, rows))
        return seen[-1]

    monkeypatch.setattr(rl.PPOTrainer, "roll_out", roll_out)
    return seen


def kinds(names):
    """Parameter names by the role that they belong to: base, default (the policy), reference, reward, value, heads."""
    found = {}
    for name in names:
        adapter = next(
            (key for key in ("default", "ppo_reference", "ppo_reward", "ppo_value") if f".{key}." in name), None
        )
        found.setdefault("heads" if name.startswith("heads.") else adapter or "base", []).append(name)
    return found


def adapters(directory):
    return load_file(directory / "adapter_model.safetensors"), load_file(
        directory / "value" / "adapter_model.safetensors"
    )


def assert_close(ours, theirs, atol):
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@torch.no_grad()
def logits_of(directory, ids):
    """Logits of one unpadded sequence, with one call of PEFT or transformers."""
    adapter = (Path(directory) / "adapter_config.json").is_file()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(directory)
    return model.eval()(torch.tensor([ids])).logits[0]


def logprobs_of(directory, prompt, response, temperature=0.7):
    """Log-probabilities of the response's tokens and the entropies there, of one unpadded sequence."""
    logits = logits_of(directory, prompt + response)[len(prompt) - 1 : -1] / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def load_scorer(directory):
    if (Path(directory) / "adapter_config.json").is_file():
        return AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1).base_model.model.eval()
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()


@torch.no_grad()
def scalars_of(scorer, ids):
    """The head on every position of one unpadded sequence."""
    return scorer.score(scorer.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]


# ---- the project's own flow: SFT adapter -> PPO with LoRA ----


def test_the_sft_adapter_is_continued_and_is_the_reference(rl, chain, tmp_path, monkeypatch):
    """Items 1 and 3: policy and reference start as the SFT adapter, so that the first KL is 0."""
    seen, ids = spy_roles(monkeypatch, rl), list(range(40, 60))
    updates = run(rl, chain, tmp_path / "out")
    sft = logits_of(chain["sft"], ids)
    assert (sft - logits_of(chain["base"], ids)).abs().max() > 0.1
    with torch.no_grad(), seen["roles"].reference.active() as model:
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0], sft, atol=1e-6, rtol=0)
    for name in kinds(seen["start"])["default"]:
        twin = name.replace(".default.", ".ppo_reference.")
        assert torch.equal(seen["start"][name], seen["start"][twin]), name
    assert updates[0]["objective/kl"] == 0.0
    assert updates[1]["objective/kl"] != 0.0


def test_an_adapter_directory_is_trained_without_use_lora(rl, chain, tmp_path):
    """Items 2 and 11: --model_path and the value model are adapters, and all of both is trained."""
    run(rl, chain, tmp_path / "out")
    policy, value = adapters(tmp_path / "out" / "final_checkpoint")
    sft, rm = (load_file(Path(chain[name]) / "adapter_model.safetensors") for name in ("sft", "rm"))
    assert policy.keys() == sft.keys() and value.keys() == rm.keys()
    assert all((policy[name] != sft[name]).any() for name in sft)
    assert all((value[name] != rm[name]).any() for name in rm)


def test_the_saved_adapter_reloads_to_the_trained_logits(rl, chain, tmp_path, monkeypatch):
    """Item 4: one PEFT call, on the base model that the SFT adapter stood on."""
    seen, ids = spy_roles(monkeypatch, rl), list(range(40, 60))
    run(rl, chain, tmp_path / "out")
    final = tmp_path / "out" / "final_checkpoint"
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == chain["base"]
    with torch.no_grad(), seen["roles"].policy.active() as model:
        trained = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(final, ids), trained, atol=1e-6, rtol=0)
    assert (trained - logits_of(chain["sft"], ids)).abs().max() > 1e-3


def test_the_saved_value_model_is_a_reward_model_checkpoint(rl, chain, tmp_path, monkeypatch):
    """Items 5 and 23: value/ loads with one PEFT call and is taken by --value_model_path and --reward_model_path."""
    seen, ids = spy_roles(monkeypatch, rl), list(range(40, 60))
    run(rl, chain, tmp_path / "out")
    value, directory = seen["roles"].value, str(tmp_path / "out" / "final_checkpoint" / "value")
    with torch.no_grad(), value.active() as model:
        trained = value.head(model.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
    torch.testing.assert_close(scalars_of(load_scorer(directory), ids), trained, atol=1e-6, rtol=0)
    run(rl, chain, tmp_path / "again", f"--value_model_path {directory} --total_episodes 4", reward=directory)
    start = {name: seen["start"][name] for name in kinds(seen["start"])["ppo_value"]}
    saved = load_file(Path(directory) / "adapter_model.safetensors")
    assert len(start) == len(saved) - 1
    for name, tensor in start.items():
        assert torch.equal(tensor, saved[name.split("models.0.")[-1].replace(".ppo_value.", ".")]), name
    assert torch.equal(seen["start"]["heads.1.weight"], saved["base_model.model.score.weight"])


def test_scores_are_read_at_the_last_token_of_the_response(rl, wide, tmp_path, monkeypatch):
    """Items 5, 17 and 20: reward adapter, EOS or none, four episodes in a pass; the same as one by one by hand."""
    asked, batches = fix_responses(monkeypatch, rl), spy_rollouts(monkeypatch, rl)
    updates = run(rl, wide, tmp_path / "out", "--total_episodes 12")
    scorer = load_scorer(wide["rm"])
    for prompts, update in zip(asked, updates):
        by_hand = [scalars_of(scorer, prompt + choose_response(prompt))[-1].item() for prompt in prompts]
        assert update["objective/scores"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    ended = [choose_response(prompt)[-1] == STOP for prompts in asked for prompt in prompts]
    assert any(ended) and not all(ended) and [len(group) for group in batches] == [1, 1, 1]


# ---- optimisation ----


def test_the_gradient_norm_is_clipped_at_every_optimizer_step(rl, chain, tmp_path):
    """Item 6: with plain gradient descent a step is no longer than learning rate x max_grad_norm."""

    def distance(name, norm):
        flags = (
            f"--set optim=sgd --learning_rate 1 --lr_scheduler_type constant --max_grad_norm {norm} --total_episodes 4"
        )
        update = run(rl, chain, tmp_path / name, flags + " --num_ppo_epochs 3")[0]
        policy, value = adapters(tmp_path / name / "final_checkpoint")
        sft, rm = (load_file(Path(chain[key]) / "adapter_model.safetensors") for key in ("sft", "rm"))
        moved = [policy[key] - sft[key] for key in sft] + [value[key] - rm[key] for key in rm]
        return torch.cat([tensor.flatten() for tensor in moved]).norm().item(), update["grad_norm"]

    clipped, norm = distance("clipped", 0.001)
    assert 0.001 < clipped <= 0.003 * 1.001
    assert norm > 0.1  # logged before clipping
    assert distance("free", 0)[0] > 0.1


@pytest.mark.parametrize(("epochs", "mini_batches"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_optimizer_steps_are_epochs_times_mini_batches(rl, chain, tmp_path, epochs, mini_batches):
    """Item 7 and 8: in every update, also the last of a pass over a data set that is no multiple (10 prompts, 4 each)."""
    flags = f"--num_ppo_epochs {epochs} --num_mini_batches {mini_batches} --per_device_train_batch_size 1"
    flags += " --gradient_accumulation_steps 4 --max_samples 10 --total_episodes 20 --save_steps 1 --save_total_limit 9"
    updates = run(rl, chain, tmp_path / "out", flags)
    assert [update["episode"] for update in updates] == [4, 8, 12, 16, 20]
    for step in range(1, 6):
        optimizer = torch.load(tmp_path / "out" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        counts = {int(state["step"]) for state in optimizer["state"].values()}
        assert counts == {step * epochs * mini_batches}


def test_every_update_takes_its_full_number_of_prompts(rl, chain, tmp_path, monkeypatch):
    """Item 8: an incomplete last batch of a pass is left out, and the next pass goes through other pairs."""
    asked = fix_responses(monkeypatch, rl)
    run(rl, chain, tmp_path / "out", "--max_samples 10 --total_episodes 20")
    assert [len(prompts) for prompts in asked] == [4, 4, 4, 4, 4]
    first, second = asked[0] + asked[1], asked[2] + asked[3]
    assert len({str(prompt) for prompt in first}) == 8 and len({str(prompt) for prompt in second}) == 8
    assert asked[0] != asked[2]


@pytest.mark.parametrize(
    "flags", ["--set optim=sgd --learning_rate 0.1", "--attn_implementation eager --learning_rate 1e-4"]
)
def test_one_micro_batch_of_four_equals_four_of_one(rl, wide, tmp_path, monkeypatch, flags):
    """Item 9: each token counts the same whatever micro-batch it is in, over several optimizer steps and updates."""
    fix_responses(monkeypatch, rl)
    flags += " --num_ppo_epochs 2 --whiten_rewards --response_length 8 --max_prompt_length"
    limit = max(len(prompt) for prompt in prompts_of(rl, wide))  # a pass takes as many tokens as the longest would
    batches = spy_rollouts(monkeypatch, rl)
    for name, (size, steps) in {"one": (4, 1), "four": (1, 4), "two": (2, 2)}.items():
        sizes = f" --per_device_train_batch_size {size} --gradient_accumulation_steps {steps}"
        run(rl, wide, tmp_path / name, f"{flags} {limit}{sizes}")
    assert [len(groups) for groups in batches[:4]] == [1, 1, 4, 4] and len(batches[4]) == 2
    one, four, two = (adapters(tmp_path / name / "final_checkpoint") for name in ("one", "four", "two"))
    for i, start in enumerate(("sft", "rm")):
        start = load_file(Path(wide[start]) / "adapter_model.safetensors")
        assert max((one[i][name] - start[name]).abs().max() for name in start) > 1e-4
        assert_close(one[i], four[i], 1e-6)
        assert_close(one[i], two[i], 1e-6)


@pytest.mark.parametrize(
    "responses", [[[5]], [[STOP]], [[STOP], [5, 6, STOP]]], ids=["one_token", "only_EOS", "EOS_and_longer"]
)
def test_short_responses_give_no_nan(rl, chain, tmp_path, monkeypatch, responses):
    """Item 10: a batch of one response of one token, and EOS alone where EOS is the pad token."""
    queue = [response for _ in range(4) for response in responses]
    fix_responses(monkeypatch, rl, lambda prompt: queue.pop())
    size = len(responses)
    flags = f"--per_device_train_batch_size {size} --total_episodes {2 * size} --whiten_rewards"
    updates = run(rl, chain, tmp_path / "out", flags)
    assert len(updates) == 2
    for update in updates:
        assert all(math.isfinite(value) for value in update.values())
    for weights in adapters(tmp_path / "out" / "final_checkpoint"):
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


# ---- memory and precision ----


@pytest.mark.parametrize("flags", ["", "--normalize_reward", "--eval_steps 1", "--bf16", "--gradient_checkpointing"])
def test_only_policy_and_value_change(rl, chain, tmp_path, monkeypatch, flags):
    """Item 11: base, reference and reward keep their bytes; two adapters and a head are all that the optimizer has."""
    seen = spy_roles(monkeypatch, rl)
    run(rl, chain, tmp_path / "out", flags + " --save_steps 2")
    now, names = dict(seen["roles"].named_parameters()), kinds(seen["start"])
    same = {kind: {torch.equal(now[name], seen["start"][name]) for name in names[kind]} for kind in names}
    assert same.pop("heads") == {True, False}  # the reward model's and the value model's
    assert same == {
        "base": {True},
        "ppo_reference": {True},
        "ppo_reward": {True},
        "default": {False},
        "ppo_value": {False},
    }
    optimizer = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    policy, value = adapters(tmp_path / "out" / "final_checkpoint")
    trained = sum(tensor.numel() for tensor in [*policy.values(), *value.values()])
    assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == trained


@pytest.mark.parametrize("lora", [True, False])
def test_bf16_trains_float32_weights_from_ratio_one(rl, chain, full_rm, tmp_path, monkeypatch, lora):
    """Items 12 and 16: in bf16 the first KL is 0 and the first ratio 1, and steps of 3e-6 move the weights."""
    seen = spy_roles(monkeypatch, rl)
    flags = "--bf16 --num_ppo_epochs 1 --learning_rate 3e-6 --total_episodes 4"
    which = {"model": "sft", "reward": "rm"} if lora else {"model": "base", "reward": full_rm}
    update = run(rl, chain, tmp_path / "out", flags, **which)[0]
    assert update["objective/kl"] == 0.0
    assert update["val/ratio"] == 1.0
    assert update["policy/approxkl_avg"] == 0.0
    roles, start = seen["roles"], seen["start"]
    names = {id(p): name for name, p in roles.named_parameters()}
    for role in (roles.policy, roles.value):
        trained = list(role.parameters())
        assert {p.dtype for p in trained} == {torch.float32}
        assert sum(not torch.equal(p, start[names[id(p)]]) for p in trained) > len(trained) / 2
    frozen = roles.reference.parameters() if not lora else [p for p in roles.parameters() if "lora" not in names[id(p)]]
    frozen = [p for p in frozen if p.ndim == 2 and p.shape[0] > 1]
    assert {p.dtype for p in frozen} == {torch.bfloat16 if lora else torch.float32}


def test_the_first_ratio_is_one_in_float32(rl, chain, tmp_path):
    """Item 16: old log-probabilities come from the same forward pass as new ones, also in several micro-batches."""
    flags = "--num_ppo_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 4"
    update = run(rl, chain, tmp_path / "out", flags)[0]
    assert (update["objective/kl"], update["val/ratio"], update["policy/clipfrac_avg"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit"])
def test_a_quantized_base_is_trained(rl, chain, tmp_path, monkeypatch, flag):
    """Item 13: four roles on one base in 4 or 8 bit, in bf16; the base keeps its bytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    bnb = importlib.import_module("bitsandbytes.nn.modules")  # packed weights have no backward pass
    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb, "_convert_weight_packed_for_cpu", lambda *args: pytest.fail("the weights were packed"))
    base = make_model(tmp_path / "base", hidden_size=64, intermediate_size=128)  # 4 bit: blocks of 64
    wide = {
        name: make_adapter(base, tmp_path / name, kind, 1) for name, kind in (("sft", "CAUSAL_LM"), ("rm", "SEQ_CLS"))
    }
    seen, flags = spy_roles(monkeypatch, rl), f"{flag} --bf16 --use_lora --total_episodes 4 --num_ppo_epochs 1"
    update = run(rl, {**chain, **wide}, tmp_path / "out", flags)[0]
    assert len(seen["roles"].models) == 1
    assert any(p.dtype in (torch.uint8, torch.int8) for p in seen["roles"].parameters())
    assert update["objective/kl"] == 0.0 and update["val/ratio"] == 1.0
    now, names = dict(seen["roles"].named_parameters()), kinds(seen["start"])
    assert all(torch.equal(now[name], seen["start"][name]) for name in names["base"])
    assert not any(torch.equal(now[name], seen["start"][name]) for name in names["default"] + names["ppo_value"])


@pytest.mark.parametrize("model", ["sft", "base"])
def test_gradient_checkpointing_gives_the_same_update(rl, chain, tmp_path, monkeypatch, model):
    """Item 14: the layers run again in the backward pass; samples, weights and greedy answers stay the same."""
    seen, passes = spy_roles(monkeypatch, rl), {}
    for name, flag in (("with", "--gradient_checkpointing"), ("without", "")):
        original = rl.PPOTrainer.optimize

        def optimize(self, *args, name=name, original=original, **kwargs):
            layer = next(m for n, m in seen["roles"].models[0].named_modules() if n.endswith("layers.0.mlp"))
            hook = layer.register_forward_pre_hook(lambda *_: passes.update({name: passes.get(name, 0) + 1}))
            losses = original(self, *args, **kwargs)
            hook.remove()
            return losses

        with monkeypatch.context() as patch:
            patch.setattr(rl.PPOTrainer, "optimize", optimize)
            run(rl, chain, tmp_path / name, "--eval_steps 1 --total_episodes 4 " + flag, model=model)
    assert passes["with"] == 2 * passes["without"]
    assert (tmp_path / "with" / "samples.jsonl").read_text() == (tmp_path / "without" / "samples.jsonl").read_text()
    if model == "sft":
        for ours, theirs in zip(*(adapters(tmp_path / name / "final_checkpoint") for name in ("with", "without"))):
            assert_close(ours, theirs, 1e-6)
    else:
        ours, theirs = (
            load_file(tmp_path / name / "final_checkpoint" / "model.safetensors") for name in ("with", "without")
        )
        assert_close(ours, theirs, 1e-6)


def test_dropout_is_off_also_under_gradient_checkpointing(rl, chain, tmp_path):
    """Items 14 and 16: checkpointing works in train mode, where a model whose config has dropout would use it."""
    base = make_model(tmp_path / "base", attention_dropout=0.5)
    kinds = {"sft": "CAUSAL_LM", "rm": "SEQ_CLS"}
    models = {**chain, **{name: make_adapter(base, tmp_path / name, kinds[name], 1) for name in kinds}}
    flags = "--gradient_checkpointing --num_ppo_epochs 1 --total_episodes 4"
    assert run(rl, models, tmp_path / "out", flags)[0]["val/ratio"] == 1.0


def test_logits_are_asked_for_response_positions_only(rl, wide, tmp_path, monkeypatch):
    """Item 15: with four prompts of 15 tokens and more, the head never sees more than the answers' positions."""
    shapes = []

    def watch(roles):
        head = roles.policy.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[:-1].numel()))

    spy_roles(monkeypatch, rl, watch)
    asked = fix_responses(monkeypatch, rl)
    run(rl, wide, tmp_path / "out", "--eval_steps 1")
    assert min(len(prompt) for prompts in asked for prompt in prompts) >= 15
    assert 8 < max(shapes) <= 4 * (8 + 1)


# ---- tokens ----


def test_stopping_is_trained_where_eos_is_the_pad_token(rl, chain, tmp_path, monkeypatch):
    """Item 17: EOS is an action with a gradient, and the reward that it earns is its own."""
    queue = [response for _ in range(16) for response in ([STOP], [5, 6, 7])]
    asked = fix_responses(monkeypatch, rl, lambda prompt: queue.pop())
    flags = f"--reward_function {chain['rules']}:empty_is_best --missing_eos_penalty 0 --total_episodes 12"
    updates = run(rl, chain, tmp_path / "out", flags, reward=None)
    assert [update["objective/scores"] for update in updates] == [0.0] * 3
    assert [update["response/stop_rate"] for update in updates] == [0.5] * 3
    for prompt in asked[0]:
        before, after = (
            logprobs_of(path, prompt, [STOP])[0].item()
            for path in (chain["sft"], tmp_path / "out" / "final_checkpoint")
        )
        assert after > before + 0.01


def test_logprobs_are_those_of_the_unpadded_sequences(rl, wide, tmp_path, monkeypatch):
    """Items 17 and 20: EOS inside the prompt is seen, left padding is not; values and log-probabilities to 1e-5."""
    asked, batches = fix_responses(monkeypatch, rl), spy_rollouts(monkeypatch, rl)
    run(rl, wide, tmp_path / "out", "--total_episodes 4")
    (prompts,), (group,) = asked, batches
    assert len(group) == 1 and len({len(prompt) for prompt in prompts}) > 1
    assert "wide_gpt2" in wide["base"] or all(STOP in prompt for prompt in prompts)
    batch, scorer, checked = group[0], load_scorer(wide["rm"]), 0
    for i, row in enumerate(batch.rows):
        prompt, response = row["prompt_ids"], choose_response(row["prompt_ids"])
        by_hand, entropy = logprobs_of(wide["sft"], prompt, response)
        values = scalars_of(scorer, prompt + response)[len(prompt) - 1 : -1]
        torch.testing.assert_close(batch.logprobs[i][batch.actions[i]], by_hand, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.entropy[i][batch.actions[i]], entropy, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.values[i][batch.actions[i]], values, atol=1e-5, rtol=0)
        checked += len(response)
    assert checked == int(batch.actions.sum())


def test_no_embedding_is_added_for_a_missing_pad_token(rl, chain, tmp_path, monkeypatch):
    """Item 18: the pad token is one that the vocabulary has, and the embedding keeps its rows."""
    bare = tmp_path / "bare"
    shutil.copytree(chain["base"], bare)
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    assert AutoTokenizer.from_pretrained(bare).pad_token is None
    rows = AutoModelForCausalLM.from_pretrained(bare).get_input_embeddings().weight.shape
    run(
        rl,
        chain,
        tmp_path / "out",
        f"--total_episodes 4 --reward_function {chain['rules']}:tokens",
        model=str(bare),
        reward=None,
    )
    saved = tmp_path / "out" / "final_checkpoint"
    assert AutoModelForCausalLM.from_pretrained(saved).get_input_embeddings().weight.shape == rows
    assert len(AutoTokenizer.from_pretrained(saved)) == len(tokenizer)


def test_every_stop_id_stops_and_none_is_penalized(rl, chain, tmp_path, monkeypatch):
    """Item 19: the tokenizer's EOS, and all ids that the model's generation config names."""
    several = tmp_path / "several"
    shutil.copytree(chain["base"], several)
    config = json.loads((several / "generation_config.json").read_text())
    stops = [0, *range(10, 40)]
    (several / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": stops}))
    original, responses = rl.PPOTrainer.generate, []

    def generate(self, role, prompts, sample=True):
        found = original(self, role, prompts, sample)
        responses.extend(found if sample else [])
        return found

    monkeypatch.setattr(rl.PPOTrainer, "generate", generate)
    flags = f"--reward_function {chain['rules']}:nothing --total_episodes 16 --kl_coef 0 --missing_eos_penalty 3"
    updates = run(rl, chain, tmp_path / "out", flags, model=str(several), reward=None)
    every = {*stops, STOP}
    assert len(responses) == 16 and {response[-1] for response in responses} - {STOP} <= set(range(400))
    assert len({response[-1] for response in responses} & every) > 2
    for i, update in enumerate(updates):
        these = responses[4 * i : 4 * i + 4]
        assert all(len(r) == 8 or r[-1] in every for r in these) and not any(every & set(r[:-1]) for r in these)
        missing = sum(r[-1] not in every for r in these) / 4
        assert update["response/stop_rate"] == 1 - missing
        assert update["objective/rlhf_reward"] == pytest.approx(-3 * missing)
    assert 0 < sum(update["response/stop_rate"] for update in updates) < 4


def test_long_prompts_are_left_out_and_counted(rl, chain, tmp_path, monkeypatch, capsys):
    """Item 21: also the embedding's 512 positions are never reached."""
    rows = [{"prompt": "a b c " * (200 if i % 3 == 0 else 1) + str(i)} for i in range(12)]
    write_rows(tmp_path / "rl" / "rl.jsonl", rows)
    asked = fix_responses(monkeypatch, rl)
    run(rl, {**chain, "data": str(tmp_path / "rl")}, tmp_path / "out", "--max_prompt_length 60")
    assert "8 prompts, 4 left out" in capsys.readouterr().out
    assert {len(prompt) <= 60 for prompts in asked for prompt in prompts} == {True}
    record = json.loads((tmp_path / "out" / "final_checkpoint" / "run.json").read_text())
    assert (record["dataset"]["rows"], record["dataset"]["too_long"]) == (8, 4)


@pytest.mark.parametrize("policy_chat", [True, False], ids=["chat_policy", "qa_policy"])
@pytest.mark.parametrize("vocab_size", [300, 400], ids=["other_vocabulary", "other_template"])
def test_a_reward_model_of_another_family_scores_text(
    rl, chain, gpt2, plain_llama, tmp_path, monkeypatch, policy_chat, vocab_size
):
    """Item 22: other tokenizer, other template; the scores are those of the decoded text, scored by hand."""
    policy, other = (chain["sft"], gpt2) if policy_chat else (plain_llama, chain["base"])
    shutil.copytree(other, tmp_path / "other")
    tokenizer, words = make_tokenizer(not policy_chat, vocab_size), make_tokenizer(policy_chat)
    assert (tokenizer.get_vocab() == words.get_vocab()) == (vocab_size == 400)
    tokenizer.save_pretrained(tmp_path / "other")
    reward = make_adapter(str(tmp_path / "other"), tmp_path / "rm", "SEQ_CLS", 5)
    if vocab_size == 400:  # of the same family: by default in the policy's format
        (tmp_path / "rm" / "run.json").write_text(json.dumps({"prompt_format": "qa" if policy_chat else "chat"}))

    def choose(prompt):
        text = "The capital is Paris" if len(prompt) % 2 else "blue light"
        space = "" if policy_chat else " "  # the space of "Answer: x" belongs to the answer's first token
        return words(space + text)["input_ids"] + ([words.eos_token_id] if len(prompt) % 2 else [])

    fix_responses(monkeypatch, rl, choose)
    batches, seen = spy_rollouts(monkeypatch, rl), spy_roles(monkeypatch, rl)
    run(rl, chain, tmp_path / "out", "--total_episodes 8 --use_lora", model=policy, reward=reward)
    scorer, checked = load_scorer(reward), []
    for batch in [batch for group in batches for batch in group]:
        for row, score in zip(batch.rows, batch.scores.tolist()):
            ended = len(row["prompt_ids"]) % 2 == 1
            answer = "The capital is Paris" if ended else "blue light"
            if policy_chat:
                ids = tokenizer(f"Question: {row['text']}\n\nAnswer:")["input_ids"]
                ids += tokenizer(f" {answer}")["input_ids"] + [tokenizer.eos_token_id] * ended
            else:
                turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]
                text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
                ids = tokenizer(text if ended else text.removesuffix("<|im_end|>"))["input_ids"]
            assert score == pytest.approx(scalars_of(scorer, ids)[-1].item(), abs=1e-5)
            checked.append((ended, round(score, 4)))
    assert len(checked) == 8 and len(set(checked)) > 4 and {ended for ended, _ in checked} == {True, False}
    on_policy = vocab_size == 300  # the value model reads the policy's tokens
    assert (seen["roles"].value.model is seen["roles"].policy.model) == on_policy
    assert (seen["roles"].value.model is seen["roles"].reward.model) != on_policy


# ---- the algorithm ----


@pytest.mark.parametrize(
    ("optim", "rate", "estimator", "whiten", "longest"),
    [("adamw_torch", 1e-3, "k1", False, 12), ("sgd", 0.1, "k1", True, 12), ("sgd", 0.1, "k3", False, 9)],
)
def test_one_update_equals_that_of_the_stock_trainer(
    rl, llama, tmp_path, monkeypatch, optim, rate, estimator, whiten, longest
):
    """Full fine-tuning, float32, one mini-batch, no clipping, pad != EOS: where the stock trainer is right, weights of
    policy and value model and the metrics are the same. With `sgd` the reference is another model, so that the KL is not 0 (AdamW makes a step of full size out
    of a gradient that is rounding alone)."""
    from trl.experimental import ppo as stock
    from trl.experimental.ppo import ppo_trainer as stock_module

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    rm = make_classifier(base, tmp_path / "rm")
    config = json.loads((Path(rm) / "config.json").read_text())
    (Path(rm) / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.pad_token_id}))
    write_rows(tmp_path / "rl" / "rl.jsonl", [{"prompt": f"What is {'very ' * (i % 3)}{i}?"} for i in range(8)])

    def choose(prompt):
        chance = random.Random(str(prompt))
        response = [chance.randrange(3, 300) for _ in range(longest)]
        return response if chance.random() < 0.4 else [*response[: chance.randrange(longest)], STOP]

    reference = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(9)
    for parameter in reference.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter) * (optim == "sgd")
    spy_roles(monkeypatch, rl, lambda roles: roles.reference.model.load_state_dict(reference.state_dict()))
    asked = fix_responses(monkeypatch, rl, choose)
    flags = "--per_device_train_batch_size 8 --response_length 12 --num_ppo_epochs 3 --max_grad_norm 0 --kl_coef 0.2"
    flags += f" --set optim={optim} --learning_rate {rate} --kl_estimator {estimator}" + " --whiten_rewards" * whiten
    ours = run(rl, {"data": str(tmp_path / "rl")}, out, flags, model=str(base), reward=rm)[0]

    prompts = asked[0]
    lengths = {len(choose(prompt)) for prompt in prompts}
    assert max(lengths) == longest and len(lengths) > 2
    data = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])
    args = stock.PPOConfig(
        output_dir=str(tmp_path / "stock"), per_device_train_batch_size=8, total_episodes=8, response_length=12,
        num_ppo_epochs=3, stop_token="eos", missing_eos_penalty=1.0, learning_rate=rate, optim=optim, kl_coef=0.2,
        kl_estimator=estimator, whiten_rewards=whiten, temperature=0.7, bf16=False, use_cpu=True,
        gradient_checkpointing=False, num_sample_generations=0, save_strategy="no", report_to=[], seed=42,
    )  # fmt: skip
    trainer = stock.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(base),
        ref_model=reference,
        reward_model=AutoModelForSequenceClassification.from_pretrained(rm),
        value_model=AutoModelForSequenceClassification.from_pretrained(rm),
        train_dataset=data,
        eval_dataset=data,
    )

    def batch_generation(model, queries, size, pad, config):
        rows = [(row, choose([token for token in row if token != pad])) for row in queries.tolist()]
        rows = torch.tensor([row + response + [pad] * (longest - len(response)) for row, response in rows])
        logits = stock_module.forward(model, rows, pad).logits
        return rows, logits[:, queries.shape[1] - 1 : -1] / (args.temperature + 1e-7)

    monkeypatch.setattr(stock_module, "batch_generation", batch_generation)
    trainer.train()
    final, start = out / "final_checkpoint", AutoModelForCausalLM.from_pretrained(base).state_dict()
    policy = AutoModelForCausalLM.from_pretrained(final).state_dict()
    value = AutoModelForSequenceClassification.from_pretrained(final / "value").state_dict()
    assert max((policy[name] - start[name]).abs().max() for name in start) > 2e-3
    assert_close(policy, trainer.model.policy.state_dict(), 1e-5)
    assert_close(value, trainer.model.value_model.state_dict(), 1e-5)
    theirs = trainer.state.log_history[0]
    for name in ("objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg"):  # fmt: skip
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert (ours["objective/non_score_reward"] != 0) == (optim == "sgd")
    if estimator == "k1":
        assert ours["objective/kl"] == pytest.approx(theirs["objective/kl"], rel=1e-4)


def test_metrics_are_over_response_tokens_only(rl, chain, tmp_path, monkeypatch):
    """Item 25: recomputed by hand from unpadded sequences, for the first update and the KL of the second."""
    asked = fix_responses(monkeypatch, rl)
    flags = "--num_ppo_epochs 1 --save_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    first, second = run(rl, chain, tmp_path / "out", flags + " --missing_eos_penalty 0.5")
    scorer = load_scorer(chain["rm"])
    surprise, entropies, stops, scores, returns, errors = [], [], [], [], [], []
    width = max(len(choose_response(prompt)) for prompt in asked[0])
    for prompt in asked[0]:
        response = choose_response(prompt)
        logprobs, entropy = logprobs_of(chain["sft"], prompt, response)
        surprise.append(-logprobs.sum().item())
        entropies += entropy.tolist()
        stops.append(response[-1] == STOP)
        states = scalars_of(scorer, prompt + response)[len(prompt) - 1 :]
        scores.append(states[-1].item())
        states = states[:width]  # the state after the last token counts where the longest response leaves room for it
        advantage = 0.0
        for t in reversed(range(len(states))):
            reward = scores[-1] - 0.5 * (not stops[-1]) if t == len(states) - 1 else 0.0
            following = states[t + 1].item() if t + 1 < len(states) else 0.0
            advantage = reward + following - states[t].item() + 0.95 * advantage
            errors.append(advantage)
            returns.append(advantage + states[t].item())
    length = sum(len(choose_response(prompt)) for prompt in asked[0]) / 4
    expected = {
        "objective/scores": sum(scores) / 4,
        "objective/scores_std": torch.tensor(scores).std(unbiased=False).item(),
        "objective/rlhf_reward": sum(scores) / 4 - 0.5 * (1 - sum(stops) / 4),
        "objective/entropy": sum(surprise) / 4,
        "policy/entropy_avg": sum(entropies) / len(entropies),
        "response/length": length,
        "response/stop_rate": sum(stops) / 4,
        "val/explained_variance": 1 - (torch.tensor(errors).var() / torch.tensor(returns).var()).item(),
        "loss/value_avg": 0.5 * torch.tensor(errors).square().mean().item(),
        "val/ratio": 1.0,
        "policy/approxkl_avg": 0.0,
        "episode": 4,
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < sum(stops) < 4 and len(set(map(len, asked[0]))) > 1
    after = tmp_path / "out" / "checkpoint-1"
    kl = [
        (logprobs_of(after, prompt, choose_response(prompt))[0] - logprobs_of(chain["sft"], prompt, choose_response(prompt))[0]).sum().item()
        for prompt in asked[1]
    ]  # fmt: skip
    assert second["objective/kl"] == pytest.approx(sum(kl) / 4, abs=1e-4)
    assert abs(second["objective/kl"]) > 1e-3
    assert second["objective/non_score_reward"] == pytest.approx(-0.05 * second["objective/kl"])


def test_ratio_and_clip_fraction_count_no_padding(rl, chain, tmp_path, monkeypatch):
    """Item 25: with plain gradient descent, the second pass's ratio is that of the weights after the first."""
    fix_responses(monkeypatch, rl)
    flags = "--set optim=sgd --learning_rate 1 --lr_scheduler_type constant --total_episodes 4 --cliprange 0.01"
    once = run(rl, chain, tmp_path / "once", flags + " --num_ppo_epochs 1")[0]
    asked = fix_responses(monkeypatch, rl)
    twice = run(rl, chain, tmp_path / "twice", flags + " --num_ppo_epochs 2")[0]
    assert once["val/ratio"] == 1.0
    logs = []
    for prompt in asked[0]:
        pair = [logprobs_of(path, prompt, choose_response(prompt))[0] for path in (tmp_path / "once" / "final_checkpoint", chain["sft"])]  # fmt: skip
        logs += (pair[0] - pair[1]).tolist()
    ratios = torch.tensor(logs).exp()
    assert twice["val/ratio"] == pytest.approx((1 + ratios.mean().item()) / 2, abs=1e-5)
    assert twice["policy/approxkl_avg"] == pytest.approx(torch.tensor(logs).square().mean().item() / 4, rel=1e-3)
    assert twice["policy/clipfrac_avg"] <= ((ratios - 1).abs() > 0.01).float().mean().item() / 2 + 1e-6
    assert twice["policy/clipfrac_avg"] > 0


# ---- control ----


def test_target_kl_adapts_the_coefficient(rl, chain, tmp_path):
    """Each coefficient follows from the one before and the KL measured with it (Ziegler et al. 2019)."""
    updates = run(rl, chain, tmp_path / "out", "--target_kl 0.1 --total_episodes 16 --kl_coef 0.3")
    expected = 0.3
    for update in updates:
        assert update["objective/kl_coef"] == pytest.approx(expected, rel=1e-12)
        error = min(max(update["objective/kl"] / 0.1 - 1, -0.2), 0.2)
        expected *= 1 + error * 4 / 10_000
    assert expected != 0.3
    fixed = run(rl, chain, tmp_path / "fixed", "--total_episodes 16 --kl_coef 0.3")
    assert {update["objective/kl_coef"] for update in fixed} == {0.3}


def test_max_kl_stops_with_the_policy_from_before(rl, chain, tmp_path, monkeypatch):
    """The update that led to a KL above --max_kl is taken back, in the policy and in the value model."""
    flags = "--learning_rate 3e-3 --lr_scheduler_type constant --total_episodes 24 --save_steps 1 --save_total_limit 9"
    free = [update["objective/kl"] for update in run(rl, chain, tmp_path / "free", flags)]
    stop = next(i for i in range(2, 6) if free[i] > max(free[:i]))  # the update whose rollout shows a new high
    limit = (free[stop] + max(free[:stop])) / 2
    updates = run(rl, chain, tmp_path / "out", f"{flags} --max_kl {limit}")
    assert [update["objective/kl"] for update in updates] == free[:stop]
    for ours, theirs in zip(adapters(tmp_path / "out" / "final_checkpoint"), adapters(tmp_path / "free" / f"checkpoint-{stop - 1}")):  # fmt: skip
        assert_close(ours, theirs, 0)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["stopped"].startswith("KL") and metrics["objective/kl"] == free[stop] > limit
    assert not (tmp_path / "out" / f"checkpoint-{stop + 1}").exists()
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "out" / f"checkpoint-{stop}", resumed / f"checkpoint-{stop}")
    rl.main(command(chain, resumed, f"{flags} --max_kl {limit} --resume_from_checkpoint"))
    for ours, theirs in zip(*(adapters(tmp_path / name / "final_checkpoint") for name in ("resumed", "out"))):
        assert_close(ours, theirs, 0)


def test_a_reward_function_alone_and_beside_a_reward_model(rl, chain, tmp_path, monkeypatch):
    """It gets the prompts' texts and the decoded responses, and its numbers are added to the model's."""
    asked, flags = (
        fix_responses(monkeypatch, rl),
        f"--reward_function {chain['rules']}:prompt_digits --total_episodes 4",
    )
    model = run(rl, chain, tmp_path / "model", "--total_episodes 4")[0]["objective/scores"]
    alone = run(rl, chain, tmp_path / "alone", flags, reward=None)[0]["objective/scores"]
    both = run(rl, chain, tmp_path / "both", flags)[0]["objective/scores"]
    assert asked[0] == asked[1] == asked[2]
    texts = [make_tokenizer().decode(prompt) for prompt in asked[0]]
    assert alone == sum(float("".join(c for c in text if c.isdigit())) for text in texts) / 4
    assert both == pytest.approx(alone + model, abs=1e-5) and abs(model) > 1e-4


def test_reward_clip_bounds_the_score_but_not_its_report(rl, chain, tmp_path):
    """Scores of +-100 count as +-2; the penalty for a missing EOS comes after."""
    flags = f"--reward_function {chain['rules']}:hundred --total_episodes 4 --reward_clip 2 --missing_eos_penalty 0.5"
    update = run(rl, chain, tmp_path / "out", flags, reward=None)[0]
    assert update["objective/scores"] in (-100, -50, 0, 50, 100)
    penalty = 0.5 * (1 - update["response/stop_rate"])
    assert update["objective/rlhf_reward"] == pytest.approx(update["objective/scores"] / 50 - penalty)


def test_normalize_reward_uses_the_references_own_answers(rl, chain, tmp_path, monkeypatch):
    """Mean and spread of the score over the prompts, measured before the first update and kept."""
    asked = fix_responses(monkeypatch, rl)
    flags = f"--reward_function {chain['rules']}:prompt_digits --normalize_reward --missing_eos_penalty 0 --kl_coef 0"
    updates = run(rl, chain, tmp_path / "out", flags, reward=None)
    assert len(asked[0]) == 24 and len(updates) == 2
    scores = torch.arange(24.0)
    for update in updates:
        expected = (update["objective/scores"] - scores.mean().item()) / scores.std().item()
        assert update["objective/rlhf_reward"] == pytest.approx(expected, rel=1e-5)
    policy, sft = (
        adapters(tmp_path / "out" / "final_checkpoint")[0],
        load_file(Path(chain["sft"]) / "adapter_model.safetensors"),
    )
    assert all((policy[name] != sft[name]).any() for name in sft)


# ---- other chains ----


def test_full_fine_tuning_leaves_models_that_load(rl, chain, full_rm, tmp_path, monkeypatch):
    """Policy and value model are trained in full, without LoRA; both load with one call of transformers."""
    seen, ids = spy_roles(monkeypatch, rl), list(range(40, 60))
    run(rl, chain, tmp_path / "out", model="base", reward=full_rm)
    final, roles = tmp_path / "out" / "final_checkpoint", seen["roles"]
    with torch.no_grad():
        policy = roles.policy.model(torch.tensor([ids])).logits[0]
        value = roles.value.head(roles.value.model.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
    torch.testing.assert_close(logits_of(final, ids), policy, atol=1e-6, rtol=0)
    torch.testing.assert_close(scalars_of(load_scorer(final / "value"), ids), value, atol=1e-6, rtol=0)
    assert (policy - logits_of(chain["base"], ids)).abs().max() > 1e-3
    assert (value - scalars_of(load_scorer(full_rm), ids)).abs().max() > 1e-3
    for role, path in ((roles.reference, chain["base"]), (roles.reward, full_rm)):
        for name, tensor in load_file(Path(path) / "model.safetensors").items():
            assert torch.equal(role.model.state_dict()[name], tensor), name
    run(rl, chain, tmp_path / "again", "--total_episodes 4", model=str(final), reward=str(final / "value"))


def test_full_fine_tuning_without_a_reward_model(rl, chain, tmp_path):
    """The value model starts from the policy with a zero head; it is saved as a classifier of one number."""
    run(rl, chain, tmp_path / "out", f"--reward_function {chain['rules']}:tokens", model="base", reward=None)
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "final_checkpoint" / "value")
    assert value.score.weight.shape == (1, 32) and value.score.weight.abs().max() > 0
    start = load_file(Path(chain["base"]) / "model.safetensors")
    assert value.state_dict().keys() - {"score.weight"} <= start.keys()
    assert any((value.state_dict()[name] != start[name]).any() for name in start if name in value.state_dict())


def test_a_full_reward_model_beside_lora(rl, chain, full_rm, tmp_path, monkeypatch):
    """Reward and value stand on one classifier: the reward is the bare one, the value a new adapter with a head."""
    seen, ids = spy_roles(monkeypatch, rl), list(range(40, 60))
    run(rl, chain, tmp_path / "out", "--use_lora --save_steps 1", reward=full_rm)
    roles, value_dir = seen["roles"], tmp_path / "out" / "final_checkpoint" / "value"
    assert roles.reward.model is roles.value.model and len(roles.models) == 2
    start = load_file(Path(full_rm) / "model.safetensors")
    now = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p
        for name, p in roles.reward.model.named_parameters()
    }
    assert all(torch.equal(now[name], tensor) for name, tensor in start.items())
    with torch.no_grad(), roles.value.active() as model:
        trained = roles.value.head(model.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
    torch.testing.assert_close(scalars_of(load_scorer(value_dir), ids), trained, atol=1e-6, rtol=0)
    assert (trained - scalars_of(load_scorer(full_rm), ids)).abs().max() > 1e-4
    weights = load_file(value_dir / "adapter_model.safetensors")
    assert [name for name in weights if "score" in name] == ["base_model.model.score.weight"]
    optimizer = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == sum(map(len, adapters(value_dir.parent)))
    run(rl, chain, tmp_path / "again", f"--total_episodes 4 --value_model_path {value_dir}", reward=full_rm)
    run(
        rl,
        chain,
        tmp_path / "rule",
        f"--total_episodes 4 --value_model_path {full_rm} --reward_function {chain['rules']}:tokens",
        reward=None,
    )


def test_a_gpt2_chain(rl, gpt2, chain, tmp_path):
    """Conv1D layers, learned positions, no chat template: the policy moves and loads, the value model too."""
    policy, rm = (make_adapter(gpt2, tmp_path / kind, kind, 1) for kind in ("CAUSAL_LM", "SEQ_CLS"))
    updates = run(rl, chain, tmp_path / "out", model=policy, reward=rm)
    assert updates[0]["objective/kl"] == 0.0 and len(updates) == 2
    final, ids = tmp_path / "out" / "final_checkpoint", list(range(40, 60))
    assert (logits_of(final, ids) - logits_of(policy, ids)).abs().max() > 1e-3
    assert (scalars_of(load_scorer(final / "value"), ids) - scalars_of(load_scorer(rm), ids)).abs().max() > 1e-3
    run(rl, chain, tmp_path / "full", f"--reward_function {chain['rules']}:tokens", model=gpt2, reward=None)
    assert (logits_of(tmp_path / "full" / "final_checkpoint", ids) - logits_of(gpt2, ids)).abs().max() > 1e-3


# ---- a run's outputs and bad input ----


def test_logging_saving_and_evaluation_steps(rl, chain, tmp_path):
    """Item 24: each at its own interval; evaluation answers the same prompts and writes them beside the reference's."""
    eval_rows = [{"question": f"Why is {i} blue?"} for i in range(3)]
    write_rows(tmp_path / "eval" / "test.jsonl", eval_rows)
    flags = "--total_episodes 20 --logging_steps 2 --save_steps 3 --eval_steps 2 --save_total_limit 5"
    flags += f" --eval_subset {tmp_path / 'eval'} --eval_split test --learning_rate 1e-2"
    updates = run(rl, chain, tmp_path / "out", flags)
    assert [update["step"] for update in updates] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    evaluations = [line for line in read_lines(tmp_path / "out" / "metrics.jsonl") if "eval_policy_score" in line]
    samples = read_lines(tmp_path / "out" / "samples.jsonl")
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    assert [sample["step"] for sample in samples] == [2] * 3 + [4] * 3 + [5] * 3
    words, scorer = make_tokenizer(), load_scorer(chain["rm"])
    for evaluation in evaluations:
        these = [sample for sample in samples if sample["step"] == evaluation["step"]]
        assert [sample["prompt"] for sample in these] == [row["question"] for row in eval_rows]
        for who in ("policy", "reference"):
            mean = sum(sample[f"{who}_score"] for sample in these) / 3
            assert evaluation[f"eval_{who}_score"] == pytest.approx(mean, abs=1e-6)
    assert len({sample["reference_answer"] for sample in samples if sample["row"] == 0}) == 1
    final = tmp_path / "out" / "final_checkpoint"
    for who, path in (("policy", final), ("reference", chain["sft"])):
        for sample in samples[-3:]:
            turn = [{"role": "user", "content": sample["prompt"]}]
            prompt = words(words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))["input_ids"]
            response = []
            while len(response) < 8 and STOP not in response:
                response.append(logits_of(path, prompt + response)[-1].argmax().item())
            assert sample[f"{who}_answer"] == words.decode(response, skip_special_tokens=True)
            assert sample[f"{who}_score"] == pytest.approx(scalars_of(scorer, prompt + response)[-1].item(), abs=1e-5)
            assert (sample[f"{who}_length"], sample[f"{who}_ended"]) == (len(response), STOP in response)
    assert any(sample["policy_answer"] != sample["reference_answer"] for sample in samples)


def test_the_final_checkpoint_and_its_record(rl, chain, tmp_path):
    """run.json and metrics.json; the tokenizer is there; no draft is left."""
    run(rl, chain, tmp_path / "out")
    final = tmp_path / "out" / "final_checkpoint"
    record = json.loads((final / "run.json").read_text())
    assert record["stage"] == "rl" and record["base_model"] == chain["base"]
    assert Path(record["parent"]) == Path(chain["sft"]) and record["prompt_format"] == "chat"
    assert record["arguments"]["num_ppo_epochs"] == 2 and record["dataset"]["rows"] == 24
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"objective/kl", "eval_policy_score", "eval_reference_score", "stopped"} <= metrics.keys()
    assert metrics["stopped"] is None
    assert len(AutoTokenizer.from_pretrained(final)) == len(make_tokenizer())
    assert not list((tmp_path / "out").glob("*.partial")) and not list((tmp_path / "out").glob("*.old"))


def test_dry_run_writes_nothing(rl, chain, tmp_path, capsys, monkeypatch):
    """It says what an update is, and loads no weights."""
    monkeypatch.setattr(rl, "build_roles", None)
    rl.main(command(chain, tmp_path / "out", "--dry_run --num_mini_batches 2"))
    assert "2 updates of 4 episodes, 4 optimizer steps each" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


BAD_INPUT = {
    "no reward": (None, "", "a reward is needed"),
    "mini-batches": ("rm", "--num_mini_batches 3", "--num_mini_batches 3 does not divide the 4 episodes"),
    "micro-batches": ("rm", "--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --num_mini_batches 2", "into whole micro-batches"),
    "small data set": ("rm", "--max_samples 3", "there are only 3 prompts"),
    "only long prompts": ("rm", "--max_prompt_length 3", "no prompt is within --max_prompt_length 3"),
    "positions": ("rm", "--response_length 600", "has 512 positions"),
    "no such file": (None, "--reward_function nowhere.py:fn", "should read FILE.py:NAME"),
    "no colon": (None, "--reward_function RULES", "should read FILE.py:NAME"),
    "no such function": (None, "--reward_function RULES:absent", "has no function absent"),
    "too few numbers": (None, "--reward_function RULES:too_few", "returned 0 numbers for"),
    "not finite": (None, "--reward_function RULES:not_a_number", "a reward in the prompt rows"),
    "no such split": ("rm", "--eval_subset nowhere", "nowhere"),
    "reward model is an SFT adapter": ("sft", "", "is not a reward model's adapter"),
    "both precisions": ("rm", "--bf16 --fp16", "exclude each other"),
    "taken by a flag": ("rm", "--set num_ppo_epochs=3", "flag of its own"),
    "rank of the adapter": ("rm", "--lora_r 64", "has 4"),
    "no such model": ("/nowhere/at/all", "", "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(rl, chain, tmp_path, monkeypatch, case):
    """Item 21 and others: an error that says what would be right, and no trained weights."""
    reward, flags, expected = BAD_INPUT[case]
    if case not in ("too few numbers", "not finite"):
        monkeypatch.setattr(rl, "build_roles", None)  # found before any weight is loaded
    with pytest.raises(rl.UserError, match=expected.replace("(", r"\(")) as error:
        rl.main(command(chain, tmp_path / "out", flags.replace("RULES", chain["rules"]), reward=reward))
    assert "\n" not in str(error.value).strip()
    assert not (tmp_path / "out" / "final_checkpoint").exists()


def test_a_missing_column_is_named(rl, chain, tmp_path):
    write_rows(tmp_path / "rl" / "rl.jsonl", [{"text": "What?"}] * 8)
    with pytest.raises(rl.UserError, match="has the columns text; one of these is needed: prompt; question"):
        run(rl, {**chain, "data": str(tmp_path / "rl")}, tmp_path / "out")


@pytest.mark.parametrize(("value", "expected"), [(None, "null"), ("  ", "empty"), (3, "text")])
def test_a_bad_prompt_is_named_by_row(rl, chain, tmp_path, value, expected):
    write_rows(
        tmp_path / "rl" / "rl.jsonl",
        [{"prompt": "What?"}] * 5 + [{"prompt": value}] if value != 3 else [{"prompt": 3}] * 6,
    )
    with pytest.raises(rl.UserError, match=f"row {0 if value == 3 else 5}.*{expected}"):
        run(rl, {**chain, "data": str(tmp_path / "rl")}, tmp_path / "out")


def test_prompts_may_be_conversations(rl, chain, tmp_path, monkeypatch):
    """A list of messages that ends with the user's goes through the template as it is."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    write_rows(tmp_path / "rl" / "rl.jsonl", [{"prompt": turns}] * 4)
    asked = fix_responses(monkeypatch, rl)
    run(rl, {**chain, "data": str(tmp_path / "rl")}, tmp_path / "out", "--total_episodes 4")
    words = make_tokenizer()
    assert (
        asked[0][0] == words(words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    )
