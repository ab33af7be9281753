"""The PPO script: its roles, its rollout, what happens to tokens, the advantages, the update, and its errors."""

import contextlib
import functools
import importlib.util
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from conftest import make_adapter, make_model, make_tokenizer, run, write_rows
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

for table in (torch.storage._dtype_to_storage_type_map, torch.storage._storage_type_to_dtype_map):
    table()  # torch keeps it: it is not to be made while the fixture float64 is at work
STOP = 2  # <|im_end|>: EOS, pad and the end of a chat turn at once
TAIL = make_tokenizer(True)("\n", add_special_tokens=False)["input_ids"]  # what the template writes after it
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

calls = []
def not_a_number_later(prompts, responses):
    calls.append(prompts)  # the trial, the first update, the second
    return [float('nan') if len(calls) == 3 else 0.0] * len(responses)

def too_few(prompts, responses):
    return []
"""
SGD = "--set optim=sgd --lr_scheduler_type constant --max_grad_norm 0 "


def make_classifier(base, directory, seed=3):
    """A full reward model with its tokenizer."""
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return str(directory)


def make_chain(base, place):
    """What the stages before PPO leave behind, on the model `base`."""
    (place / "rules.py").write_text(RULES, encoding="utf-8")
    write_rows(place / "rl" / "rl.jsonl", [{"prompt": f"What is {'very ' * (i % 4)}{i}?"} for i in range(24)])
    return {
        "base": base,
        "sft": make_adapter(base, place / "sft", "CAUSAL_LM", 1),
        "rm": make_adapter(base, place / "rm", "SEQ_CLS", 2),
        "full_rm": make_classifier(base, place / "full_rm"),
        "rules": str(place / "rules.py"),
        "data": str(place / "rl"),
    }


@pytest.fixture(scope="session")
def chain(llama, tmp_path_factory):
    return make_chain(llama, tmp_path_factory.mktemp("chain"))


@pytest.fixture
def exact(float64, tmp_path_factory):
    """A chain that is saved, and computes, in float64."""
    place = tmp_path_factory.mktemp("exact")
    return make_chain(make_model(place / "base"), place)


@pytest.fixture(params=["llama", "gpt2", "window"])
def wide(request, float64, tmp_path_factory):
    """The same of models that are wide enough for four episodes to share a pass (hidden size = tokens of a pass)."""
    place, kind = tmp_path_factory.mktemp(request.param), "gpt2" if request.param == "gpt2" else "llama"
    size = {"n_embd" if kind == "gpt2" else "hidden_size": 256}
    base = make_model(place / "base", kind=kind, chat=kind == "llama", **size)
    if request.param == "window":  # the same weights, with attention to the last 12 tokens
        config = json.loads((place / "base" / "config.json").read_text())
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 12}
        (place / "base" / "config.json").write_text(json.dumps(config))
    return make_chain(base, place)


def command(chain, out, flags="", model="sft", reward="rm"):
    """The command line; later flags win over the small sizes given here."""
    paths = ["--model_path", chain.get(model, model)]
    paths += ["--reward_model_path", chain.get(reward, reward)] if reward else []
    small = (
        "--per_device_train_batch_size 4 --total_episodes 8 --response_length 8 --num_ppo_epochs 2 --learning_rate 1e-3"
    )
    data = ["--dataset_name", "json", "--subset", chain["data"], "--output_dir", str(out)]
    return [*paths, *data, *small.split(), *flags.replace("RULES", chain["rules"]).split()]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_updates(out):
    return [line for line in read_lines(out / "metrics.jsonl") if "objective/scores" in line]


def train(rl, chain, out, flags="", **which):
    """Run the script; returns the metrics of its updates."""
    run(rl, *command(chain, out, flags, **which))
    return read_updates(out)


def choose_response(prompt):
    """A response that depends on the prompt alone: 1 to 8 tokens, about half of them ending with EOS."""
    chance = random.Random(str(prompt))
    response = [chance.randrange(3, 300) for _ in range(chance.randrange(1, 8))]
    return response + [STOP] if chance.random() < 0.5 else response + [7] * (8 - len(response))


@pytest.fixture
def choose(rl, monkeypatch):
    """choose(function): sampled responses become function(prompt); returns the list of lists of prompts asked for."""
    original = rl.PPOTrainer.generate

    def start(function=choose_response):
        asked = []

        def generate(self, role, rows, sample=True):
            if not sample:
                return original(self, role, rows, sample)
            asked.append([row["prompt_ids"] for row in rows])
            return [function(prompt) for prompt in asked[-1]]

        monkeypatch.setattr(rl.PPOTrainer, "generate", generate)
        return asked

    return start


@pytest.fixture
def rollouts(rl, monkeypatch):
    """A list that will hold (trainer, micro-batches, copies of all weights) of each rollout."""
    original, seen = rl.PPOTrainer.roll_out, []

    def roll_out(self, rows):
        weights = {name: p.detach().clone() for name, p in self.roles.named_parameters()}
        seen.append((self, original(self, rows), weights))
        return seen[-1][1]

    monkeypatch.setattr(rl.PPOTrainer, "roll_out", roll_out)
    return seen


def adapters(directory):
    """The tensors of policy and value model, the latter's names with `value/` before them."""
    directory = Path(directory)
    value = load_file(directory / "value" / "adapter_model.safetensors")
    return load_file(directory / "adapter_model.safetensors") | {f"value/{name}": value[name] for name in value}


def starts(chain):
    """What `adapters` were before training."""
    value = load_file(Path(chain["rm"]) / "adapter_model.safetensors")
    return load_file(Path(chain["sft"]) / "adapter_model.safetensors") | {
        f"value/{name}": value[name] for name in value
    }


def distance(ours, theirs):
    """The largest difference of two dicts of tensors with the same names."""
    assert ours.keys() == theirs.keys() and ours
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def load_policy(directory):
    adapter = (Path(directory) / "adapter_config.json").is_file()
    return (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(directory).eval()


def load_scorer(directory):
    if (Path(directory) / "adapter_config.json").is_file():
        return AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1).base_model.model.eval()
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()


@torch.no_grad()
def logprobs_of(directory, prompt, response, temperature=0.7):
    """Log-probabilities of the response's tokens and the entropies there, of one unpadded sequence."""
    logits = load_policy(directory)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def scalars_of(directory, ids):
    """The score head on every position of one unpadded sequence."""
    scorer = load_scorer(directory)
    return scorer.score(scorer.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]


# ---- roles ----


def test_policy_and_reference_start_as_the_sft_adapter(rl, chain, tmp_path):
    """The first KL is 0 though the adapter is far from its base, the second is not, and the reference's greedy answers
    are those of the SFT model."""
    updates = train(rl, chain, tmp_path)
    assert [update["objective/kl"] == 0 for update in updates] == [True, False]
    ids = torch.arange(40, 60)[None]
    assert (load_policy(chain["sft"])(ids).logits - load_policy(chain["base"])(ids).logits).abs().max() > 0.1
    words = make_tokenizer()
    samples = read_lines(tmp_path / "samples.jsonl")
    for sample in (line for line in samples if "reference_answer" in line):
        turn = [{"role": "user", "content": sample["prompt"]}]
        prompt = words(words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))["input_ids"]
        response = []
        while len(response) < 8 and STOP not in response:
            response.append(load_policy(chain["sft"])(torch.tensor([prompt + response])).logits[0, -1].argmax().item())
        assert sample["reference_answer"] == words.decode(response, skip_special_tokens=True)
        score = scalars_of(chain["rm"], prompt + response)[-1].item()
        assert sample["reference_score"] == pytest.approx(score, abs=1e-4)
        assert (sample["reference_length"], sample["reference_ended"]) == (len(response), STOP in response)


def test_both_adapters_are_trained_and_load_with_one_call(rl, chain, tmp_path, rollouts):
    """Every tensor of the SFT adapter and of the reward model's copy moves, without --use_lora; what is saved is what
    was trained, relative to the same base; and the value model is a reward model's checkpoint."""
    train(rl, chain, tmp_path / "out")
    final, start = tmp_path / "out" / "final_checkpoint", starts(chain)
    trained = adapters(final)
    assert trained.keys() == start.keys() and all((trained[name] != start[name]).any() for name in start)
    config = json.loads((final / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (chain["base"], 4)
    assert not [*final.rglob("README.md")]  # PEFT's would name the base's path, for which the hub refuses an upload
    roles, ids = rollouts[0][0].roles, torch.arange(40, 60)[None]
    with torch.no_grad(), roles.policy.active() as network:
        assert (load_policy(final)(ids).logits - network(ids).logits).abs().max() < 1e-5
    with torch.no_grad(), roles.value.active() as network:
        values = roles.value.head(network.model(ids).last_hidden_state)[0, :, 0]
    assert (scalars_of(final / "value", ids[0].tolist()) - values).abs().max() < 1e-5
    still = f"--learning_rate 0 --total_episodes 4 --max_grad_norm 0 --model_path {final}"
    train(rl, chain, tmp_path / "again", still, reward=str(final / "value"))
    assert distance(adapters(tmp_path / "again" / "final_checkpoint"), trained) == 0


@pytest.mark.parametrize("flags", ["", "--normalize_reward --eval_steps 1", "--bf16 --gradient_checkpointing"])
def test_only_policy_and_value_change(rl, chain, tmp_path, rollouts, flags):
    """Base, reference and reward keep their bytes; two adapters and a head are all that the optimizer has."""
    train(rl, chain, tmp_path, flags + " --save_steps 2")
    trainer, _, start = rollouts[0]
    same = {}
    for name, parameter in trainer.roles.named_parameters():
        kind = next((k for k in ("default", "ppo_reference", "ppo_reward", "ppo_value", "heads") if k in name), "base")
        same.setdefault(kind, set()).add(torch.equal(parameter, start[name]))
    assert same.pop("heads") == {True, False}  # the reward model's and the value model's
    assert same == {
        "base": {True},
        "ppo_reference": {True},
        "ppo_reward": {True},
        "default": {False},
        "ppo_value": {False},
    }
    assert len(trainer.roles.models) == 1
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    trained = sum(tensor.numel() for tensor in adapters(tmp_path / "final_checkpoint").values())
    assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == trained


@pytest.mark.parametrize("reward", ["full_rm", None])
def test_full_fine_tuning_leaves_models_that_load(rl, chain, tmp_path, rollouts, reward):
    """Policy and value model are trained in full; the value model starts from the reward model, or from the policy
    with a zero head. The saved config keeps the dropout that training went without, under gradient checkpointing too;
    for a missing pad token no embedding is added."""
    base = make_model(tmp_path / "base", attention_dropout=0.5)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    flags = "--num_ppo_epochs 1 --gradient_checkpointing" + ("" if reward else " --reward_function RULES:tokens")
    updates = train(rl, chain, tmp_path / "out", flags, model=base, reward=reward)
    assert (updates[0]["val/ratio"], updates[0]["objective/kl"]) == (1, 0)
    final, roles, ids = tmp_path / "out" / "final_checkpoint", rollouts[0][0].roles, torch.arange(40, 60)[None]
    with torch.no_grad():
        policy = roles.policy.model(ids).logits
        value = roles.value.head(roles.value.model.model(ids).last_hidden_state)[0, :, 0]
    assert (load_policy(final)(ids).logits - policy).abs().max() < 1e-5
    assert (scalars_of(final / "value", ids[0].tolist()) - value).abs().max() < 1e-5
    assert (policy - load_policy(base)(ids).logits).abs().max() > 1e-3 and value.abs().max() > 1e-3
    assert policy.shape[-1] == load_policy(final).get_input_embeddings().num_embeddings == len(tokenizer)
    assert json.loads((final / "config.json").read_text())["attention_dropout"] == 0.5
    frozen = [(roles.reference, base), (roles.reward, chain["full_rm"])][: 2 if reward else 1]
    for role, path in frozen:
        for name, tensor in load_file(Path(path) / "model.safetensors").items():
            assert torch.equal(role.model.state_dict()[name], tensor), name


def test_a_full_reward_model_beside_lora(rl, chain, tmp_path, rollouts):
    """Reward and value stand on one classifier: the reward is the bare one, the value a new adapter with a head."""
    train(rl, chain, tmp_path, "--use_lora --save_steps 1", reward="full_rm")
    roles, value = rollouts[0][0].roles, tmp_path / "final_checkpoint" / "value"
    assert roles.reward.model is roles.value.model and len(roles.models) == 2
    now = {name.replace(".base_layer", ""): p for name, p in roles.reward.network.named_parameters()}
    assert all(torch.equal(now[k], v) for k, v in load_file(Path(chain["full_rm"]) / "model.safetensors").items())
    ids = list(range(40, 60))
    assert (scalars_of(value, ids) - scalars_of(chain["full_rm"], ids)).abs().max() > 1e-4
    heads = [name for name in load_file(value / "adapter_model.safetensors") if "score" in name]
    assert heads == ["base_model.model.score.weight"]
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(adapters(value.parent))


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit"])
def test_a_quantized_base_is_trained(rl, chain, tmp_path, monkeypatch, rollouts, flag):
    """Four roles on one base in 4 or 8 bit, in bf16; the base keeps its bytes, the adapters are float32 and move."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    bnb = importlib.import_module("bitsandbytes.nn.modules")  # packed weights have no backward pass
    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb, "_convert_weight_packed_for_cpu", lambda *args: pytest.fail("the weights were packed"))
    base = make_model(tmp_path / "base", hidden_size=64, intermediate_size=128)  # 4 bit: blocks of 64
    (tmp_path / "chain").mkdir()
    models = make_chain(base, tmp_path / "chain")
    update = train(rl, models, tmp_path / "out", f"{flag} --bf16 --use_lora --total_episodes 4 --num_ppo_epochs 1")[0]
    assert update["objective/kl"] == 0 and update["val/ratio"] == 1
    roles, start = rollouts[0][0].roles, rollouts[0][2]
    assert len(roles.models) == 1
    assert any(p.dtype in (torch.uint8, torch.int8) for p in roles.parameters())
    for name, parameter in roles.named_parameters():
        trained = any(kind in name for kind in (".default.", ".ppo_value.", "heads.1"))
        assert torch.equal(parameter, start[name]) != trained, name
        assert parameter.dtype == torch.float32 or not trained


@pytest.mark.parametrize("policy_chat", [True, False], ids=["chat_policy", "qa_policy"])
@pytest.mark.parametrize("vocab_size", [300, 400], ids=["other_vocabulary", "other_template"])
def test_a_reward_model_of_another_family_scores_text(
    rl, chain, gpt2, plain_llama, tmp_path, choose, rollouts, policy_chat, vocab_size
):
    """Other tokenizer, other template; the scores are those of the decoded text in the reward model's own format."""
    policy, other = (chain["sft"], gpt2) if policy_chat else (plain_llama, chain["base"])
    shutil.copytree(other, tmp_path / "other")
    tokenizer, words = make_tokenizer(not policy_chat, vocab_size), make_tokenizer(policy_chat)
    assert (tokenizer.get_vocab() == words.get_vocab()) == (vocab_size == 400)
    tokenizer.save_pretrained(tmp_path / "other")
    reward = make_adapter(str(tmp_path / "other"), tmp_path / "rm", "SEQ_CLS", 5)
    if vocab_size == 400:  # of the same family: by default in the policy's format
        (tmp_path / "rm" / "run.json").write_text(json.dumps({"prompt_format": "qa" if policy_chat else "chat"}))

    def respond(prompt):
        text = "The capital is Paris" if len(prompt) % 2 else "blue light"
        space = "" if policy_chat else " "  # the space of "Answer: x" belongs to the answer's first token
        return words(space + text)["input_ids"] + ([words.eos_token_id] if len(prompt) % 2 else [])

    choose(respond)
    train(rl, chain, tmp_path / "out", "--total_episodes 8 --use_lora", model=policy, reward=reward)
    checked = []
    for batch in [batch for _, batches, _ in rollouts for batch in batches]:
        for row, score in zip(batch.rows, batch.scores.tolist()):
            ended = len(row["prompt_ids"]) % 2 == 1
            answer = "The capital is Paris" if ended else "blue light"
            if policy_chat:
                ids = tokenizer(f"Question: {row['text']}\n\nAnswer:")["input_ids"]
                ids += tokenizer(f" {answer}")["input_ids"] + [tokenizer.eos_token_id] * ended
            else:
                turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]
                text = tokenizer.apply_chat_template(turns, tokenize=False)
                ids = tokenizer(text if ended else text.removesuffix("<|im_end|>\n"))["input_ids"]
            assert score == pytest.approx(scalars_of(reward, ids)[-1].item(), abs=1e-4)
            checked.append((ended, round(score, 3)))
    assert len(checked) == 8 and len(set(checked)) > 4 and {ended for ended, _ in checked} == {True, False}
    roles = rollouts[0][0].roles
    assert (roles.value.model is roles.policy.model) == (vocab_size == 300)  # it reads the policy's tokens


def test_an_empty_answer_is_none_in_the_format_of_another_reward_model(rl, chain, tmp_path, choose, rollouts):
    """Its score is that of a question without an answer; an end that was cut off is not scored."""
    rm, words = shutil.copytree(chain["rm"], tmp_path / "rm"), make_tokenizer()
    (rm / "run.json").write_text(json.dumps({"prompt_format": "qa"}))
    choose(lambda prompt: [STOP] if len(prompt) % 2 else [words.convert_tokens_to_ids("<|im_start|>")])
    train(rl, chain, tmp_path / "out", "--total_episodes 8", reward=str(rm))
    checked = set()
    for batch in [batch for _, batches, _ in rollouts for batch in batches]:
        for row, score in zip(batch.rows, batch.scores.tolist()):
            ended = len(row["prompt_ids"]) % 2 == 1
            ids = words(f"Question: {row['text']}\n\nAnswer:")["input_ids"] + [STOP] * ended
            assert score == pytest.approx(scalars_of(rm, ids)[-1].item(), abs=1e-4)
            checked.add(ended)
    assert checked == {True, False}


# ---- rollout ----


@pytest.mark.numerical
@pytest.mark.parametrize(("steps", "own_format"), [(1, False), (4, False), (1, True)])
def test_the_rollout_is_that_of_every_text_alone(rl, wide, tmp_path, choose, rollouts, steps, own_format):
    """Log-probabilities, entropies, values and scores of four episodes in a pass, or one, with EOS inside the prompt
    and at the end or not: those of the unpadded texts through PEFT's models. A window keeps texts out of one row, also
    where the reward model on the same base reads another format."""
    choose()
    if own_format:
        Path(wide["rm"], "run.json").write_text(json.dumps({"prompt_format": "qa"}))
    flags = f"--total_episodes 4 --per_device_train_batch_size {4 // steps} --gradient_accumulation_steps {steps}"
    output = run(rl, *command(wide, tmp_path, flags))[0]
    batches, endings = rollouts[0][1], set()
    windowed = "window" in wide["base"]
    assert ("each has a row of its own" in output) == windowed
    if steps == 1:
        assert [len(batch.input_ids) for batch in batches] == [4 if windowed else 1]
    for batch in batches:
        for i, row in enumerate(batch.rows):
            prompt, response, actions = row["prompt_ids"], batch.responses[i], batch.actions[i]
            logprobs, entropy = logprobs_of(wide["sft"], prompt, response)
            scalars = scalars_of(wide["rm"], prompt + response)
            tail = TAIL if "gpt2" not in wide["base"] and response[-1] == STOP else []
            score = scalars_of(wide["rm"], prompt + response + tail)[-1]
            pairs = [(batch.logprobs[i][actions], logprobs), (batch.entropy[i][actions], entropy)]
            if not own_format:
                pairs += [(batch.values[i][actions], scalars[len(prompt) - 1 : -1]), (batch.scores[i], score)]
            assert max((ours - theirs).abs().max().item() for ours, theirs in pairs) < 1e-9
            endings.add((response[-1] == STOP, len(response)))
    assert {ended for ended, _ in endings} == {True, False}


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("flags", "which"),
    [
        ("--per_device_train_batch_size 2 --gradient_accumulation_steps 4", {}),
        ("--gradient_checkpointing --lora_dropout 0.5 --use_lora", {"model": "base"}),
        ("--bf16 --learning_rate 3e-6", {}),
        ("--bf16 --learning_rate 3e-6", {"model": "base", "reward": "full_rm"}),
    ],
)
def test_the_first_ratio_is_one_and_the_first_kl_is_zero(rl, chain, tmp_path, rollouts, flags, which):
    """Old, new and reference log-probabilities come from one code path; in bf16 the weights that are trained are
    float32, so that steps of 3e-6 move them, and frozen ones are not."""
    update = train(rl, chain, tmp_path, "--num_ppo_epochs 1 " + flags, **which)[0]
    assert (update["objective/kl"], update["val/ratio"], update["policy/approxkl_avg"]) == (0, 1, 0)
    trainer, _, start = rollouts[0]
    moved = [name for name, p in trainer.roles.named_parameters() if not torch.equal(p, start[name])]
    parameters = dict(trainer.roles.named_parameters())
    assert len(moved) > 20 and {parameters[name].dtype for name in moved} == {torch.float32}
    if "--bf16" in flags and not which:
        assert parameters["models.0.base_model.model.lm_head.weight"].dtype == torch.bfloat16


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "first_k_dense_replace": 1,
}  # fmt: skip


@torch.no_grad()
def test_families_that_share_rows_compute_texts_alone(rl, float64):
    """For every family that the script names, the last hidden states of three texts in one row are those that each has
    in a row of its own: a short one, the longest, and again a short one, which share a beginning."""
    ids = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    rows, responses = [{"prompt_ids": ids[:30]}] * 3, [ids[-1:], ids[30:], ids[-2:-1]]
    words = make_tokenizer()
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False), tokenizer=words)
    trainer.beat = lambda: None
    trainer.stop_ids, trainer.accelerator = [STOP], SimpleNamespace(autocast=contextlib.nullcontext)
    for name in ("tree_mask", "read"):
        setattr(trainer, name, functools.partial(getattr(rl.PPOTrainer, name), trainer))
    alone = [rl.PPOTrainer.collate(trainer, [row], [response], 30) for row, response in zip(rows, responses)]
    together = rl.PPOTrainer.collate(trainer, rows, responses, 30, one_row=True)
    assert len(together.input_ids) == 1 and together.input_ids.shape[1] == 29 + 2 + 31 + 2
    for kind in rl.SHARES_ROWS:
        fields = {
            "vocab_size": 400, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "sliding_window": None,
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, **(LATENT if "deepseek" in kind else {}), **EXPERTS,
        }  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**fields)).eval()
        assert rl.shares_rows(model, 60), kind
        states = [
            rl.PPOTrainer.hidden_states(trainer, model, batch)[batch.state_index[batch.actions]] for batch in alone
        ]
        shared = rl.PPOTrainer.hidden_states(trainer, model, together)[together.state_index[together.actions]]
        assert (shared - torch.cat(states)).abs().max() < 1e-9 * shared.abs().max(), kind


def test_logits_are_asked_for_response_positions_only(rl, wide, tmp_path, monkeypatch, choose):
    """With four prompts of 15 tokens and more, the head never sees more than the answers' positions."""
    shapes, linear = [], torch.nn.functional.linear
    rows = load_policy(wide["base"]).get_output_embeddings().weight.shape

    def watch(inputs, weight, bias=None):
        shapes.extend([inputs.shape[:-1].numel()] if weight.shape == rows else [])
        return linear(inputs, weight, bias)

    asked = choose()
    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    train(rl, wide, tmp_path, "--eval_steps 1")
    assert min(len(prompt) for prompts in asked for prompt in prompts) >= 15
    longest = max(len(prompt) for prompts in asked for prompt in prompts) - 15 if "window" in wide["base"] else 0
    assert 8 < max(shapes) <= 4 * (8 + longest + 1)


def test_a_reward_function_alone_and_beside_a_reward_model(rl, chain, tmp_path, choose):
    """It gets the prompts' texts and the decoded responses, and its numbers are added to the model's."""
    asked, flags = choose(), "--reward_function RULES:prompt_digits --total_episodes 4"
    model = train(rl, chain, tmp_path / "model", "--total_episodes 4")[0]["objective/scores"]
    alone = train(rl, chain, tmp_path / "alone", flags, reward=None)[0]["objective/scores"]
    both = train(rl, chain, tmp_path / "both", flags)[0]["objective/scores"]
    assert asked[0] == asked[1] == asked[2]
    texts = [make_tokenizer().decode(prompt) for prompt in asked[0]]
    assert alone == sum(float("".join(c for c in text if c.isdigit())) for text in texts) / 4
    assert both == pytest.approx(alone + model, abs=1e-4) and abs(model) > 1e-3


# ---- tokens ----


def test_stopping_is_trained_where_eos_is_the_pad_token(rl, chain, tmp_path, choose):
    """EOS is an action with a gradient, and the reward that it earns is its own."""
    queue = [response for _ in range(16) for response in ([STOP], [5, 6, 7])]
    asked = choose(lambda prompt: queue.pop())
    flags = "--reward_function RULES:empty_is_best --missing_eos_penalty 0 --total_episodes 12"
    updates = train(rl, chain, tmp_path, flags, reward=None)
    assert [(update["objective/scores"], update["response/stop_rate"]) for update in updates] == [(0, 0.5)] * 3
    for prompt in asked[0]:
        paths = (chain["sft"], tmp_path / "final_checkpoint")
        before, after = (logprobs_of(path, prompt, [STOP])[0].item() for path in paths)
        assert after > before + 0.01


def test_every_stop_id_stops_and_none_is_penalized(rl, chain, tmp_path, rollouts):
    """The tokenizer's EOS, and all ids that the model's generation config names, which the checkpoint names again."""
    several = tmp_path / "several"
    shutil.copytree(chain["base"], several)
    config = json.loads((several / "generation_config.json").read_text())
    every = {0, STOP, *range(10, 40)}
    (several / "generation_config.json").write_text(
        json.dumps({**config, "eos_token_id": sorted(every - {STOP}), "temperature": 0.6})
    )
    flags = "--reward_function RULES:nothing --total_episodes 16 --kl_coef 0 --missing_eos_penalty 3"
    updates = train(rl, chain, tmp_path / "out", flags, model=str(several), reward=None)
    assert len({r[-1] for _, batches, _ in rollouts for batch in batches for r in batch.responses} & every) > 2
    for update, (_, batches, _) in zip(updates, rollouts):
        responses = [response for batch in batches for response in batch.responses]
        assert len(responses) == 4
        assert all(len(r) == 8 or r[-1] in every for r in responses) and not any(every & set(r[:-1]) for r in responses)
        missing = sum(response[-1] not in every for response in responses) / 4
        assert update["response/stop_rate"] == 1 - missing
        assert update["objective/rlhf_reward"] == pytest.approx(-3 * missing)
    assert 0 < sum(update["response/stop_rate"] for update in updates) < 4
    saved = json.loads((tmp_path / "out" / "final_checkpoint" / "generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == every
    assert "temperature" not in saved  # which without do_sample could not be saved again


def test_prompts_that_do_not_fit_are_left_out_and_counted(rl, chain, tmp_path, choose):
    """Long ones, and empty or null ones up to a tenth; a conversation goes through the template as it is."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    texts = ["a b c " * (200 if i % 3 == 0 else 1) + str(i) for i in range(24)]
    rows = [[{"role": "user", "content": text}] for text in texts] + [turns, [{"role": "user", "content": " "}], None]
    write_rows(tmp_path / "rl" / "rl.jsonl", [{"prompt": row} for row in rows])
    asked, words = choose(), make_tokenizer()
    models, flags = {**chain, "data": str(tmp_path / "rl")}, "--max_prompt_length 60 --per_device_train_batch_size 17"
    output, errors = run(rl, *command(models, tmp_path / "out", flags + " --total_episodes 17"))
    assert "17 prompts, 8 left out" in output and "2 of 27 rows (row 25, 26): column prompt should have text" in errors
    prompt = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert words(prompt)["input_ids"] in asked[0] and max(map(len, asked[0])) <= 60
    record = json.loads((tmp_path / "out" / "final_checkpoint" / "run.json").read_text())["dataset"]
    assert (record["rows"], record["too_long"], record["left_out"]) == (17, 8, 2)


# ---- advantages ----


@pytest.mark.numerical
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_metrics_and_advantages_by_hand(rl, exact, tmp_path, choose, rollouts, estimator):
    """Rewards, advantages, returns and every metric, recomputed from unpadded texts over response tokens only, for the
    second update, where the KL is not 0."""
    asked = choose()
    flags = "--num_ppo_epochs 1 --save_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
    flags += f"--learning_rate 1e-2 --missing_eos_penalty 0.5 --kl_coef 0.2 --kl_estimator {estimator} --gamma 0.9"
    ours = train(rl, exact, tmp_path, flags)[1]
    value, policy = tmp_path / "checkpoint-1" / "value", tmp_path / "checkpoint-1"
    width, sums = max(len(choose_response(prompt)) for prompt in asked[1]), []
    for prompt in asked[1]:
        response = choose_response(prompt)
        logprobs, entropy = logprobs_of(policy, prompt, response)
        kl = logprobs - logprobs_of(exact["sft"], prompt, response)[0]
        penalty = kl if estimator == "k1" else (-kl).exp() - 1 + kl
        ended = response[-1] == STOP
        score = scalars_of(exact["rm"], prompt + response + TAIL * ended)[-1].item()
        states = scalars_of(value, prompt + response)[len(prompt) - 1 :].tolist()
        states = states[:width]  # the state after the last token counts where the longest response leaves room for it
        rewards = [-0.2 * number for number in penalty.tolist()] + [0.0] * (len(states) - len(response))
        rewards[-1] += score - 0.5 * (not ended)
        advantage, errors = 0.0, []
        for t in reversed(range(len(states))):
            following = states[t + 1] if t + 1 < len(states) else 0.0
            advantage = rewards[t] + 0.9 * following - states[t] + 0.9 * 0.95 * advantage
            errors.append(advantage)
        returns = [error + state for error, state in zip(errors, reversed(states))]
        sums.append((score, ended, kl.sum(), penalty.sum(), -logprobs.sum(), entropy, errors, returns, len(response)))
    scores, ends, kls, penalties, surprises, entropies, errors, returns, lengths = zip(*sums)
    errors, returns = torch.tensor(sum(errors, [])), torch.tensor(sum(returns, []))
    expected = {
        "objective/scores": sum(scores) / 4,
        "objective/scores_std": torch.tensor(scores).std(unbiased=False).item(),
        "objective/kl": sum(kls).item() / 4,
        "objective/non_score_reward": -0.2 * sum(penalties).item() / 4,
        "objective/rlhf_reward": (sum(scores) - 0.2 * sum(penalties).item()) / 4 - 0.5 * (1 - sum(ends) / 4),
        "objective/entropy": sum(surprises).item() / 4,
        "policy/entropy_avg": torch.cat(entropies).mean().item(),
        "response/length": sum(lengths) / 4,
        "response/stop_rate": sum(ends) / 4,
        "val/explained_variance": 1 - (errors.var() / returns.var()).item(),
        "loss/value_avg": 0.5 * errors.square().mean().item(),
        "val/ratio": 1.0,
        "policy/approxkl_avg": 0.0,
        "episode": 8,
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert 0 < sum(ends) < 4 and len(set(lengths)) > 1 and abs(ours["objective/kl"]) > 1e-2
    advantages = torch.cat([batch.advantages[batch.actions] for batch in rollouts[1][1]])
    assert abs(advantages.mean().item()) < 1e-9 and advantages.std().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("responses", [[[5]], [[STOP]], [[STOP], [5, 6, STOP]]], ids=["token", "EOS", "EOS_and_longer"])
def test_short_responses_give_no_nan(rl, chain, tmp_path, choose, responses):
    """A batch of one response of one token, and EOS alone where EOS is the pad token."""
    queue, size = responses * 4, len(responses)
    choose(lambda prompt: queue.pop())
    flags = f"--per_device_train_batch_size {size} --total_episodes {2 * size} --whiten_rewards"
    updates = train(rl, chain, tmp_path, flags)
    assert len(updates) == 2 and all(math.isfinite(value) for update in updates for value in update.values())
    assert all(tensor.isfinite().all() for tensor in adapters(tmp_path / "final_checkpoint").values())


def test_answers_are_written_as_many_at_a_time_as_their_cache_fits(rl, llama, monkeypatch):
    """On a GPU, in seven tenths of the free memory; the bytes of a text are those of the cache that the model fills, and
    of what its prompt takes on its way through a layer. Layers may differ (Gemma 4)."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    cache = model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    text = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    args = {"local_rollout_forward_batch_size": 64, "longest_text": 10, "bf16": False, "fp16": False}
    for device, prompt, free, expected in (
        ("cuda", 0, 10.1, 7), ("cuda", 0, 1, 1), ("cuda", 0, 1000, 64), ("cpu", 0, 10, 64), ("cuda", 4, 10.1, 2)
    ):  # fmt: skip
        monkeypatch.setattr(rl, "free_memory", lambda free=free: free * text)
        trainer = SimpleNamespace(
            args=SimpleNamespace(**args, response_length=10 - prompt, device=torch.device(device))
        )
        assert rl.PPOTrainer.texts_at_once(trainer, model.config) == expected
        assert 1 <= rl.PPOTrainer.texts_at_once(trainer, CONFIG_MAPPING["gemma4_text"]()) <= 64


def test_mini_batches_are_of_all_lengths(rl):
    """Cut by length, one would have all of the long answers, whose advantages are of one sign."""
    rows, responses = [{"prompt_ids": [5]}] * 8, [[7] * (1 + 7 * (i % 2)) for i in range(8)]
    args = SimpleNamespace(per_device_train_batch_size=4, num_mini_batches=2, longest_text=99, shard_base=False)
    trainer = SimpleNamespace(args=args, share_rows=True)
    torch.manual_seed(0)
    mixed = 0
    for _ in range(20):
        groups = rl.PPOTrainer.make_groups(trainer, rows, responses)
        assert sorted(sum(groups, [])) == list(range(8)) and [len(group) for group in groups] == [4, 4]
        mixed += len({len(responses[i]) for i in groups[0]}) == 2
    assert mixed > 12  # 68 of 70 ways


def test_an_answer_that_the_reward_models_template_cannot_write_is_scored_without_its_thoughts(rl, tmp_path):
    template = Path(trl.__file__).parent / "chat_templates" / "deepseek_r1_distill.jinja"
    tokenizer = make_tokenizer(True)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    reward_format = rl.PromptFormat(tokenizer, "chat")
    read = []
    role = SimpleNamespace(active=lambda: contextlib.nullcontext(None), read=lambda states: torch.zeros(1))
    trainer = SimpleNamespace(roles=SimpleNamespace(reward=role), reward_format=reward_format)
    trainer.collate = lambda rows, responses, width: read.append(rows[0]["prompt_ids"] + responses[0])
    trainer.hidden_states = lambda network, batch: torch.zeros(1, 2)
    rows = [{"messages": json.dumps([{"role": "user", "content": "2+2?"}])}] * 2
    batch = SimpleNamespace(rows=rows, ended=[True, True])
    rl.PPOTrainer.model_scores(trainer, batch, ["<think>\nHm.\n</think>\n\n4.", "4."])
    with_thoughts, without = map(tokenizer.decode, read)
    assert "Hm." not in with_thoughts and with_thoughts.split() == without.split()


def test_the_score_is_normalized_then_clipped_then_penalized(rl, chain, tmp_path, choose):
    """Mean and spread are those of 64 of the reference's own answers, measured once; the reported score is plain."""
    asked = choose()
    normal = "--reward_function RULES:prompt_digits --normalize_reward --missing_eos_penalty 0 --kl_coef 0"
    updates = train(rl, chain, tmp_path / "normal", normal, reward=None)
    assert len(asked[0]) == 64 and len(updates) == 2
    scores = torch.arange(64.0) % 24  # the prompts again and again
    for update in updates:
        expected = (update["objective/scores"] - scores.mean().item()) / scores.std().item()
        assert update["objective/rlhf_reward"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    flags = "--reward_function RULES:hundred --total_episodes 4 --reward_clip 2 --missing_eos_penalty 0.5"
    update = train(rl, chain, tmp_path / "clip", flags, reward=None)[0]
    assert update["objective/scores"] in (-100, -50, 0, 50, 100)
    penalty = 0.5 * (1 - update["response/stop_rate"])
    assert update["objective/rlhf_reward"] == pytest.approx(update["objective/scores"] / 50 - penalty)


def test_target_kl_adapts_the_coefficient(rl, chain, tmp_path):
    """Each coefficient follows from the one before and the KL measured with it (Ziegler et al. 2019)."""
    updates = train(rl, chain, tmp_path, "--target_kl 0.1 --total_episodes 16 --kl_coef 0.3")
    expected = 0.3
    for update in updates:
        assert update["objective/kl_coef"] == pytest.approx(expected, rel=1e-12)
        expected *= 1 + min(max(update["objective/kl"] / 0.1 - 1, -0.2), 0.2) * 4 / 10_000
    assert expected != 0.3


# ---- update ----


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("optim", "rate", "estimator", "whiten", "longest"),
    [("adamw_torch", 1e-3, "k1", False, 12), ("sgd", 0.1, "k1", True, 12), ("sgd", 0.1, "k3", False, 9)],
)
def test_one_update_equals_that_of_the_stock_trainer(
    rl, tmp_path, monkeypatch, choose, float64, optim, rate, estimator, whiten, longest
):
    """Full fine-tuning, one mini-batch, no clipping, pad != EOS: where the stock trainer is right, the weights of
    policy and value model and the metrics are the same. With `sgd` the reference is another model, so that the KL is
    not 0."""
    from trl.experimental import ppo as stock
    from trl.experimental.ppo import ppo_trainer as stock_module

    base, out = tmp_path / "base", tmp_path / "out"
    make_model(base)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        " + '\n' }}{% endfor", " }}{% endfor"
    )  # a turn's end is the last
    tokenizer.save_pretrained(base)
    rm = make_classifier(base, tmp_path / "rm")
    config = json.loads((Path(rm) / "config.json").read_text())
    (Path(rm) / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.pad_token_id}))
    write_rows(tmp_path / "rl" / "rl.jsonl", [{"prompt": f"What is {'very ' * (i % 3)}{i}?"} for i in range(8)])

    def respond(prompt):
        chance = random.Random(str(prompt))
        response = [chance.randrange(3, 300) for _ in range(longest)]
        return response if chance.random() < 0.4 else [*response[: chance.randrange(longest)], STOP]

    def load(cls, path):
        return cls.from_pretrained(path, dtype=torch.float64)

    reference = load(AutoModelForCausalLM, base)
    torch.manual_seed(9)
    for parameter in reference.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter) * (optim == "sgd")
    roll_out = rl.PPOTrainer.roll_out

    def from_reference(self, rows):
        self.roles.reference.model.load_state_dict(reference.state_dict())
        return roll_out(self, rows)

    monkeypatch.setattr(rl.PPOTrainer, "roll_out", from_reference)
    asked = choose(respond)
    flags = "--per_device_train_batch_size 8 --response_length 12 --num_ppo_epochs 3 --max_grad_norm 0 --kl_coef 0.2"
    flags += f" --set optim={optim} --learning_rate {rate} --kl_estimator {estimator}" + " --whiten_rewards" * whiten
    models = {"data": str(tmp_path / "rl"), "rules": ""}
    ours = train(rl, models, out, flags, model=str(base), reward=rm)[0]

    prompts = asked[0]
    lengths = {len(respond(prompt)) for prompt in prompts}
    assert max(lengths) == longest and len(lengths) > 2
    data = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])
    args = stock.PPOConfig(
        output_dir=str(tmp_path / "stock"), per_device_train_batch_size=8, total_episodes=8, response_length=12,
        num_ppo_epochs=3, stop_token="eos", missing_eos_penalty=1.0, learning_rate=rate, optim=optim, kl_coef=0.2,
        kl_estimator=estimator, whiten_rewards=whiten, temperature=0.7 - 1e-7, bf16=False, use_cpu=True,
        gradient_checkpointing=False, num_sample_generations=0, save_strategy="no", report_to=[], seed=42,
    )  # fmt: skip
    trainer = stock.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, base),
        ref_model=reference,
        reward_model=load(AutoModelForSequenceClassification, rm),
        value_model=load(AutoModelForSequenceClassification, rm),
        train_dataset=data,
        eval_dataset=data,
    )

    def batch_generation(model, queries, size, pad, config):
        rows = [(row, respond([token for token in row if token != pad])) for row in queries.tolist()]
        rows = torch.tensor([row + response + [pad] * (longest - len(response)) for row, response in rows])
        logits = stock_module.forward(model, rows, pad).logits
        return rows, logits[:, queries.shape[1] - 1 : -1] / (args.temperature + 1e-7)

    monkeypatch.setattr(stock_module, "batch_generation", batch_generation)
    trainer.train()
    final, start = out / "final_checkpoint", load(AutoModelForCausalLM, base).state_dict()
    policy = load(AutoModelForCausalLM, final).state_dict()
    value = load(AutoModelForSequenceClassification, final / "value").state_dict()
    assert distance(policy, start) > 2e-3
    assert distance(policy, trainer.model.policy.state_dict()) < 1e-8
    assert distance(value, trainer.model.value_model.state_dict()) < 1e-8
    theirs = trainer.state.log_history[0]
    names = ["objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "policy/clipfrac_avg"]
    names += ["loss/policy_avg", "loss/value_avg", "val/clipfrac_avg"] + ["objective/kl"] * (estimator == "k1")
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-8, abs=1e-8), name
    assert (ours["objective/non_score_reward"] != 0) == (optim == "sgd")


@pytest.mark.numerical
def test_one_micro_batch_of_four_equals_four_of_one(rl, wide, tmp_path, choose, rollouts):
    """Each token counts the same whatever micro-batch and row it is in, over several optimizer steps and updates."""
    choose()
    places = []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        sizes = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {steps}"
        train(rl, wide, tmp_path / str(size), f"{SGD}--learning_rate 0.1 --whiten_rewards {sizes}")
        places.append(adapters(tmp_path / str(size) / "final_checkpoint"))
    assert [len(batches) for _, batches, _ in rollouts[:4]] == [1, 1, 4, 4]
    assert distance(places[0], starts(wide)) > 1e-3
    assert max(distance(places[0], places[1]), distance(places[0], places[2])) < 1e-9


def test_the_gradient_norm_is_clipped_at_every_optimizer_step(rl, chain, tmp_path):
    """With plain gradient descent a step is no longer than learning rate x max_grad_norm."""
    lengths = []
    for norm in (0.001, 0):
        flags = f"{SGD}--learning_rate 1 --max_grad_norm {norm} --total_episodes 4 --num_ppo_epochs 3"
        update = train(rl, chain, tmp_path / str(norm), flags)[0]
        now, start = adapters(tmp_path / str(norm) / "final_checkpoint"), starts(chain)
        lengths.append(torch.cat([(now[name] - start[name]).flatten() for name in start]).norm().item())
        assert update["grad_norm"] > 0.1  # logged before clipping
    assert 0.001 < lengths[0] <= 0.003 * 1.001 and lengths[1] > 0.1


@pytest.mark.parametrize(("epochs", "mini_batches"), [(3, 1), (2, 2), (1, 4)])
def test_optimizer_steps_are_epochs_times_mini_batches(rl, chain, tmp_path, choose, epochs, mini_batches):
    """In every update, also the last of a pass over data that is no multiple (10 prompts, 4 an update): what is left
    of a pass is left out, and the next one has another order."""
    asked = choose()
    flags = (
        f"--num_ppo_epochs {epochs} --num_mini_batches {mini_batches} --per_device_train_batch_size 1 --save_steps 1"
    )
    flags += " --gradient_accumulation_steps 4 --max_samples 10 --total_episodes 20 --save_total_limit 9"
    updates = train(rl, chain, tmp_path, flags)
    assert [update["episode"] for update in updates] == [4, 8, 12, 16, 20]
    for step in range(1, 6):
        optimizer = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert {int(state["step"]) for state in optimizer["state"].values()} == {step * epochs * mini_batches}
    assert [len(prompts) for prompts in asked] == [4] * 5
    assert (
        len({str(prompt) for prompt in asked[0] + asked[1]})
        == len({str(prompt) for prompt in asked[2] + asked[3]})
        == 8
    )
    assert asked[0] != asked[2]


@pytest.mark.numerical
def test_ratio_and_clip_fraction_count_no_padding(rl, exact, tmp_path, choose):
    """With plain gradient descent, the second pass's ratio is that of the weights after the first."""
    asked = choose()
    flags = SGD + "--learning_rate 0.2 --total_episodes 4 --cliprange 0.01 --num_ppo_epochs "
    assert train(rl, exact, tmp_path / "once", flags + "1")[0]["val/ratio"] == 1
    twice = train(rl, exact, tmp_path / "twice", flags + "2")[0]
    paths = (tmp_path / "once" / "final_checkpoint", exact["sft"])
    pairs = [[logprobs_of(path, prompt, choose_response(prompt))[0] for path in paths] for prompt in asked[0]]
    logs = torch.cat([after - before for after, before in pairs])
    assert twice["val/ratio"] == pytest.approx((1 + logs.exp().mean().item()) / 2, abs=1e-6)
    assert twice["policy/approxkl_avg"] == pytest.approx(logs.square().mean().item() / 4, rel=1e-4)
    assert 0 < twice["policy/clipfrac_avg"] <= ((logs.exp() - 1).abs() > 0.01).double().mean().item() / 2 + 1e-9


@pytest.mark.numerical
@pytest.mark.parametrize("model", ["sft", "base"])
def test_gradient_checkpointing_gives_the_same_update(rl, exact, tmp_path, monkeypatch, model):
    """The layers run again in the backward pass; samples, weights and greedy answers stay the same."""
    passes, forward = [0], importlib.import_module("transformers.models.llama.modeling_llama").LlamaMLP.forward

    def counted(self, x):
        passes[-1] += torch.is_grad_enabled()
        return forward(self, x)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", counted)
    saved = []
    for name in ("without", "--gradient_checkpointing"):
        train(
            rl,
            exact,
            tmp_path / name,
            SGD + "--learning_rate 0.1 --total_episodes 4 " + name.replace("without", ""),
            model=model,
        )
        final = tmp_path / name / "final_checkpoint"
        saved.append(adapters(final) if model == "sft" else load_file(final / "model.safetensors"))
        passes.append(0)
    assert passes[1] == 2 * passes[0] > 0
    assert distance(*saved) < 1e-9
    assert (
        len({(tmp_path / name / "samples.jsonl").read_text() for name in ("without", "--gradient_checkpointing")}) == 1
    )


# ---- life of a run ----


def test_what_is_not_finite_stops_the_run_at_once(rl, chain, tmp_path, monkeypatch):
    """A reward in the second update, a gradient in an inner step: one line with the update and the last good
    checkpoint, no weight that is not finite, nothing in final_checkpoint."""
    flags = "--reward_function RULES:not_a_number_later --save_steps 1"
    _, errors = run(rl, *command(chain, tmp_path / "reward", flags, reward=None), code=2)
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "a reward is NaN or infinite in update 2" in line and line.endswith("checkpoint-1")
    assert not (tmp_path / "reward" / "final_checkpoint").exists()
    backward, calls = rl.PPOTrainer.policy_backward, []

    def spoiled(self, batch, actions):
        found = backward(self, batch, actions)
        calls.append(self.roles.policy.parameters()[0].detach().clone())
        if len(calls) == 6:  # each of an optimizer step's four episodes has its own pass
            self.roles.policy.parameters()[0].grad[0, 0] = float("inf")
        return found

    monkeypatch.setattr(rl.PPOTrainer, "policy_backward", spoiled)
    _, errors = run(rl, *command(chain, tmp_path / "gradient", "--num_ppo_epochs 5 --max_grad_norm 0"), code=2)
    assert "error: the gradient is NaN or infinite in update 1; the last good checkpoint: none" in errors
    assert len(calls) == 8 and calls[-1].isfinite().all()


def test_max_kl_stops_the_run(rl, chain, tmp_path):
    """Above --max_kl no further step is taken; metrics and run.json say so, and a line names the newest checkpoint
    whose KL was measured below it."""
    flags = "--learning_rate 3e-3 --lr_scheduler_type constant --total_episodes 24 --save_steps 1 --save_total_limit 9"
    free = [update["objective/kl"] for update in train(rl, chain, tmp_path / "free", flags)]
    stop = next(i for i in range(2, 6) if free[i] > max(free[:i]))  # the update whose rollout shows a new high
    limit = (free[stop] + max(free[:stop])) / 2
    output, _ = run(rl, *command(chain, tmp_path / "out", f"{flags} --max_kl {limit}"))
    assert (
        f"stopped after update {stop}; the newest checkpoint below it: {tmp_path}/out/checkpoint-{stop - 1}" in output
    )
    assert [update["objective/kl"] for update in read_updates(tmp_path / "out")] == free[:stop]
    final = tmp_path / "out" / "final_checkpoint"
    assert distance(adapters(final), adapters(tmp_path / "free" / f"checkpoint-{stop}")) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["stopped"].startswith("KL") and metrics["objective/kl"] == free[stop] > limit
    assert json.loads((final / "run.json").read_text())["metrics"]["stopped"] == metrics["stopped"]


def test_a_run_that_does_not_learn_says_so(rl, chain, tmp_path, choose):
    """From the tenth update on a line names what goes wrong and what to try, once; a run that learns gets none."""
    choose(lambda prompt: [5 + len(prompt) % 3, 6, 7])
    flags = "--learning_rate 0 --total_episodes 44"
    _, errors = run(rl, *command(chain, tmp_path / "flat", flags))
    lines = [line for line in errors.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" (")[0][9:] for line in lines] == [
        "the values explain nothing of the returns",
        "hardly any answer ends",
        "the reward is flat and hardly a ratio is clipped",
    ]
    assert all("(update 10): " in line and "--" in line for line in lines)
    _, errors = run(rl, *command(chain, tmp_path / "brief", "--learning_rate 0 --total_episodes 36"))
    assert "does not learn" not in errors and "warning: " not in errors

    keys = ("scores", "scores_std", "kl")
    good = dict(zip([f"objective/{key}" for key in keys], (0.0, 1.0, 15.0)))
    good |= {"val/explained_variance": 0.3, "response/stop_rate": 0.9, "policy/clipfrac_avg": 0.0}
    later, away = good | {"objective/scores": 2.0}, good | {"objective/scores": 2.0, "objective/kl": 31.0}
    args = SimpleNamespace(episodes_per_update=4, world_size=1, learning_rate=1e-4, kl_coef=0.05)
    assert not list(rl.find_stalls([good] * 3, [later] * 3, args))
    ((problem, _),) = rl.find_stalls([good] * 3, [away] * 3, args)
    assert problem == "the KL runs away"


def test_logging_saving_and_evaluation_steps(rl, chain, tmp_path):
    """Each at its own interval; evaluation answers the same prompts and writes them beside the reference's."""
    rows = [{"question": f"Why is {i} blue?"} for i in range(3)]
    write_rows(tmp_path / "eval" / "test.jsonl", rows)
    flags = "--total_episodes 20 --logging_steps 2 --save_steps 3 --eval_steps 2 --save_total_limit 5"
    flags += f" --eval_subset {tmp_path / 'eval'} --eval_split test --learning_rate 1e-2"
    updates = train(rl, chain, tmp_path / "out", flags)
    assert [update["step"] for update in updates] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    evaluations = [line for line in read_lines(tmp_path / "out" / "metrics.jsonl") if "eval_policy_score" in line]
    lines = read_lines(tmp_path / "out" / "samples.jsonl")
    episodes = [line for line in lines if "answer" in line]
    assert [line["step"] for line in episodes] == sorted([1, 2, 3, 4, 5] * 3)
    for step in range(1, 6):  # the update's lowest, middle and highest
        scores = [line["score"] for line in episodes if line["step"] == step]
        assert scores == sorted(scores) and len(set(scores)) > 1
    samples = [line for line in lines if "policy_answer" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (step, row["question"]) for step in (2, 4, 5) for row in rows
    ]
    for evaluation, these in zip(evaluations, (samples[:3], samples[3:6], samples[6:])):
        for who in ("policy", "reference"):
            mean = sum(sample[f"{who}_score"] for sample in these) / 3
            assert evaluation[f"eval_{who}_score"] == pytest.approx(mean, abs=1e-6)
    assert len({sample["reference_answer"] for sample in samples if sample["row"] == 0}) == 1
    assert any(sample["policy_answer"] != sample["reference_answer"] for sample in samples)


def test_the_final_checkpoint_and_its_record(rl, chain, tmp_path):
    """run.json and metrics.json; the tokenizer is there; no draft is left; the bar has shown reward, KL and length."""
    output, errors = run(rl, *command(chain, tmp_path / "out"))
    assert "KL=0.00, length=" in errors and "objective/kl" not in output
    final = tmp_path / "out" / "final_checkpoint"
    record = json.loads((final / "run.json").read_text())
    assert (record["stage"], record["base_model"], record["parent"]) == ("rl", chain["base"], chain["sft"])
    assert record["prompt_format"] == "chat" and record["dataset"]["rows"] == 24 and record["base_digest"]
    assert record["arguments"]["num_ppo_epochs"] == 2 and record["versions"]["scripts"] == 4
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"objective/kl", "eval_policy_score", "eval_reference_score", "train_runtime"} <= metrics.keys()
    assert metrics["stopped"] is None
    assert len(AutoTokenizer.from_pretrained(final)) == len(AutoTokenizer.from_pretrained(final / "value"))
    assert not list((tmp_path / "out").glob("*.partial")) and not list((tmp_path / "out").glob("*.old"))


def test_dry_run_writes_nothing(rl, chain, tmp_path, monkeypatch):
    """It says what an update is, shows prompts, and loads no weights; a reward model near chance is told."""
    monkeypatch.setattr(rl, "load_model", None)
    shutil.copytree(chain["rm"], tmp_path / "rm")
    report = {"accuracy": 0.52, "pairs": 50, "accuracy_interval": [0.38, 0.66]}
    (tmp_path / "rm" / "run.json").write_text(
        json.dumps({"stage": "reward", "score_at": "end", "metrics": {"report": report}})
    )
    flags = command(chain, tmp_path / "out", "--dry_run --num_mini_batches 2", reward=str(tmp_path / "rm"))
    output, _ = run(rl, *flags)
    assert "2 updates of 4 episodes, 4 optimizer steps each" in output and "What is 0?" in output
    assert "0.520 of 50 pairs (95% interval 0.380 to 0.660), which is not above chance" in output
    assert not (tmp_path / "out").exists()


def test_adapters_compute_the_same_in_fewer_steps_while_answers_are_written(rl, llama, tmp_path):
    """And PEFT's own forward is back afterwards; DoRA keeps it throughout."""
    ids = torch.arange(5, 20)[None]
    for name, more in (("plain", {}), ("dora", {"use_dora": True})):
        model = AutoPeftModelForCausalLM.from_pretrained(make_adapter(llama, tmp_path / name, **more)).double().eval()
        wanted = model(ids).logits
        with rl.quick_adapters(model, torch.float64):
            quick = [layer for layer in model.modules() if "forward" in vars(layer)]
            assert (model(ids).logits - wanted).abs().max() < 1e-9
        assert len(quick) == (14 if name == "plain" else 0)
        assert not any("forward" in vars(layer) for layer in model.modules())
        with model.disable_adapter():
            assert (model(ids).logits - wanted).abs().max() > 1e-3


def test_a_reward_model_of_an_earlier_version_is_refused(rl, chain, tmp_path):
    """It was read at the token before the template's last: its scores would mean something else."""
    shutil.copytree(chain["rm"], tmp_path / "rm")
    (tmp_path / "rm" / "run.json").write_text(json.dumps({"stage": "reward", "prompt_format": "chat"}))
    _, error = run(rl, *command(chain, tmp_path / "out", "--dry_run", reward=str(tmp_path / "rm")), code=2)
    assert "earlier version, which read scores elsewhere: train it again" in error


def test_an_adapter_on_the_embeddings_of_a_tied_model_is_trained_and_saved(rl, chain, tmp_path, rollouts):
    """All of it moves, of the policy and of the value model that starts as its copy; nothing else is saved."""
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    flags = "--use_lora --lora_target_modules embed_tokens q_proj --reward_function RULES:tokens"
    train(rl, chain, tmp_path / "out", flags, model=base, reward=None)
    saved = adapters(tmp_path / "out" / "final_checkpoint")
    assert all("lora_" in name or "score" in name for name in saved)
    trainer, _, start = rollouts[0]
    now = dict(trainer.roles.named_parameters())
    for kind in ("default", "ppo_value"):
        of_embeddings = [name for name in now if "lora_embedding" in name and name.endswith(kind)]
        assert len(of_embeddings) == 2 and not any(torch.equal(now[name], start[name]) for name in of_embeddings)
    assert sum("embedding" in name for name in saved) == 4


BAD_INPUT = {
    "no reward": (None, "", "a reward is needed"),
    "micro-batches": ("rm", "--gradient_accumulation_steps 3 --num_mini_batches 2", "into whole micro-batches"),
    "too many mini-batches": ("rm", "--num_mini_batches 8", "--num_mini_batches 8 does not divide the 4 episodes"),
    "no colon": (None, "--reward_function RULES", "should read FILE.py:NAME"),
    "too few numbers": (None, "--reward_function RULES:too_few", "returned 0 numbers for"),
    "reward model is an SFT adapter": ("sft", "", "is not a reward model's adapter"),
    "reward model without a head": ("base", "", "LlamaForCausalLM; a classifier with one label is needed"),
    "policy is a classifier": ("rm", "--model_path {full_rm}", "Classification; a language model is needed"),
    "policy is a reward model": ("rm", "--model_path {rm}", "changes more than LoRA weights"),
    "a column is missing": ("rm", "--subset TEXTS", "has the columns text; one of these is needed: prompt; question"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(rl, chain, tmp_path, monkeypatch, case):
    """An error that says what would be right, before any weight is loaded, and nothing is written."""
    reward, flags, expected = BAD_INPUT[case]
    write_rows(tmp_path / "texts" / "a.jsonl", [{"text": "What?"}] * 8)
    flags = (
        flags.replace("TEXTS", str(tmp_path / "texts"))
        .replace("{rm}", chain["rm"])
        .replace("{full_rm}", chain["full_rm"])
    )
    monkeypatch.setattr(rl, "load_model", None)
    _, errors = run(rl, *command(chain, tmp_path / "out", flags, reward=reward), code=2)
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert expected in line and not (tmp_path / "out").exists()
