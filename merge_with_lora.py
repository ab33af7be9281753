"""Merge a LoRA adapter into its base model: a full model that loads without PEFT.

In: an adapter (`final_checkpoint/` of any stage, or one of your own) and its base model, both in safetensors.
Out, in --output_dir: the model (a reward model is a sequence classifier), tokenizer, generation config and run.json.
Weights are added to in float32, rounded once and written file by file: memory holds one file of --max_shard_size.

    python merge_with_lora.py --adapter_path checkpoints/ppo/final_checkpoint --output_dir checkpoints/merged
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.20,<6", "peft>=0.21,<1", "accelerate>=1.15,<2", "safetensors>=0.8"]
# ///

import argparse
import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path


def fail(message):
    """What a user can mend: one line on stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """It takes hyphens for underscores, and names the flag that was perhaps meant."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        self.words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
        return super().parse_known_args(self.words, namespace)

    def error(self, message):
        known = self._option_string_actions
        flags = [word.partition("=")[0] for word in self.words if word.startswith("--")]
        near = [(flag, difflib.get_close_matches(flag, known, 1)) for flag in flags if flag not in known]
        hint = "".join(f"; {flag}: is {found[0]} meant?" for flag, found in near if found)
        fail(f"{message}{hint} (see {self.prog} --help)")


def build_parser():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--adapter_path", required=True, help="directory or hub id of the LoRA adapter")
    add("--output_dir", required=True, help="directory for the merged model; empty, or with --overwrite_output_dir")
    add("--base_model_path", help="directory or hub id of the base model (the one that the adapter's config names)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: that of the base")
    add("--max_shard_size", default="2GB", help="largest file of weights, as much memory is taken (default: 2GB)")
    add("--verify", action="store_true", help="compare the logits with those of base + adapter; loads whole models")
    add("--overwrite_output_dir", action="store_true", help="replace a merged model (nothing else) in --output_dir")
    add("--push_to_hub", action="store_true", help="upload the merged model under the name of --output_dir")
    return parser


def parse_flags(argv=None):
    """The flags, checked as far as that needs no library."""
    args = build_parser().parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", args.max_shard_size):
        fail("--max_shard_size should be like 500MB or 5GB")
    for flag in ("adapter_path", "base_model_path"):
        path = getattr(args, flag) or "."
        if not Path(path).exists() and (re.match(r"[.~/\\]|[A-Za-z]:", path) or path.count("/") > 1):
            fail(f"--{flag} {path} does not exist")  # a/b may be on the hub
    return args


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    parse_flags()

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses a name of before v6

import torch
from huggingface_hub import create_repo, snapshot_download, split_torch_state_dict_into_shards, upload_folder
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # what PEFT puts in the place of a module
BLOCK = 2**20  # weights that are summed at a time: they stay in the processor's cache, five times as fast as a matrix
# What a LoRA config may set and still be streamed: no DoRA, no parts of layers, no start that changes the base model.
STREAMED = set(
    "alpha_pattern auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode lora_alpha "
    "layers_pattern layers_to_transform lora_dropout modules_to_save peft_version r rank_pattern revision "
    "runtime_config target_modules task_type use_rslora".split()
)
OLDER = ["rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"]  # now in rope_parameters


def require(condition, message):
    if not condition:
        fail(message)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_folder(path, flag, revision=None):
    """The directory of a model or an adapter; for a hub id the one in the hub's cache."""
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        found = path if Path(path).is_dir() else snapshot_download(path, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        fail(f"{flag} {path} does not exist, neither as a directory nor on the hub: {error}")
    return Path(found).resolve()


def find_models(args):
    """(directory of the adapter, its PEFT config, directory of the base model)."""
    adapter = find_folder(args.adapter_path, "--adapter_path")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        require((adapter / name).is_file(), f"--adapter_path {adapter} is no adapter (final_checkpoint/?): no {name}")
    config = PeftConfig.from_pretrained(adapter)
    require(config.task_type in (None, "CAUSAL_LM", "SEQ_CLS"), f"{adapter} holds a {config.task_type} adapter")
    name = args.base_model_path or config.base_model_name_or_path
    require(name, f"{adapter / 'adapter_config.json'} names no base model; pass it as --base_model_path")
    base = find_folder(name, "the base model (--base_model_path)", None if args.base_model_path else config.revision)
    require(any(base.glob("model*.safetensors")), f"--base_model_path {base} holds no model.safetensors")
    recorded = read_json(adapter / "run.json").get("base_digest") or digest_base(base)
    require(recorded == digest_base(base), f"the weights of {base} are not those {adapter} was trained on")
    return adapter, config, base


def digest_base(base):
    """Hash of a part of one weight matrix of a base model, which training it in place would change."""
    with safe_open(min(base.glob("*.safetensors")), framework="pt") as file:
        matrices = sorted(name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2)
        rows = file.get_slice(matrices[len(matrices) // 2])[:64]
    return hashlib.sha256(rows.float().numpy().tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def publish(folder):
    """Yield a directory to fill. Its files come to be in `folder` when all of them are complete."""
    draft = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        if folder.is_dir():  # of a merged model that gives way; other files are somebody's
            ours = "config.json generation_config.json chat_template.* tokenizer.model model.safetensors* model-*-of-*"
            for path in [path for pattern in ours.split() for path in folder.glob(pattern)]:
                path.unlink()
            shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
            for path in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):  # nothing loads before
                os.replace(path, folder / path.name)
        else:
            os.replace(draft, folder)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:  # as the libraries say it
        fail(f"no merged model in {folder}: {error}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_model(folder, adapter, task, dtype=None):
    """The model in `folder`, on the meta device without a dtype; its embeddings are resized where the adapter's are."""
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder, **({"num_labels": 1} if task == "SEQ_CLS" else {}))
    if dtype:
        model = auto.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
    else:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=config.dtype)
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in {f"base_model.model.{name}{part}.weight" for part in ("", ".base_layer")} & {*file.keys()}:
            if file.get_slice(key).get_shape()[0] != embeddings.num_embeddings:
                model.resize_token_embeddings(file.get_slice(key).get_shape()[0], mean_resizing=False)
    return model.eval()


def read_adapter(model, adapter, config):
    """(tensors that take the place of parameters of the meta `model`, PEFT layers that add to one), by their names."""
    if special := {k for k, value in vars(config).items() if value and value != vars(LoraConfig()).get(k)} - STREAMED:
        raise NotImplementedError(f"{config.peft_type.value} with {', '.join(special)}")
    weights = {key: weight.float() for key, weight in load_file(adapter / "adapter_model.safetensors").items()}
    peft = get_peft_model(model, config, low_cpu_mem_usage=True)
    # assign: there is nothing to copy into. PEFT's own low_cpu_mem_usage moves weights to the base's device, meta.
    peft.load_state_dict = functools.partial(peft.load_state_dict, assign=True)
    result = set_peft_model_state_dict(peft, weights)
    odd = [key for key in result.unexpected_keys if ".modules_to_save." not in key]  # those are second copies
    odd += [key for key in result.missing_keys if ".default" in key]
    require(not odd, f"the adapter {adapter} does not fit the base model: {', '.join(odd[:3])} in one of them only")
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, (Linear, Embedding))}
    real = {name: w.data for name, w in model.named_parameters() if not (w.is_meta or ".original_module." in name)}
    own = [name for name in real if f"{name.partition('.lora_')[0]}.weight" not in layers]
    return {re.sub(r"\.(base_layer|modules_to_save\.default)(?=\.)", "", name): real[name] for name in own}, layers


def merge_tensor(name, dtype, path, value, layer):
    """The base's tensor in the file `path`, or the adapter's own `value` in its place, plus what `layer` adds to it."""
    if value is None:
        with safe_open(path, framework="pt", backend="pread") as file:  # a mapped file would stay in memory
            value = file.get_tensor(name)
    if layer is None:
        return value.to(dtype).contiguous()
    merged = value if value.dtype == dtype else torch.empty_like(value, dtype=dtype)
    # Rows of the gain come from the same rows of B; where a matrix's rows are inputs, from columns of A.
    side, dim = ("A", 1) if isinstance(layer, Embedding) or layer.fan_in_fan_out else ("B", 0)
    factor = next(weight for key, weight in layer.named_parameters() if re.match(rf"lora_(embedding_)?{side}\.", key))
    step = max(1, BLOCK // value.shape[1])
    for old, new, rows in zip(value.split(step), merged.split(step), factor.data.split(step, dim)):
        factor.data = rows
        new.copy_(layer.get_delta_weight("default") + old)
        if not (new.sum().isfinite() or new.isfinite().all()):  # a sum is fast
            raise ValueError(f"NaN or infinity in {name}, {dtype}")
    return merged


def merge_by_tensor(model, base, adapter, adapter_config, dtype, folder, limit):
    """Merge and write one file after another; `model` is on the meta device. Returns the config of the merged model."""
    state, head = model.state_dict(), model.get_output_embeddings()
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    conversions, prefix = get_model_conversion_mapping(model), model.base_model_prefix
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    values, layers = read_adapter(model, adapter, adapter_config)
    files = read_json(base / "model.safetensors.index.json").get("weight_map", {})
    if (base / "model.safetensors").is_file():
        files = dict.fromkeys(safe_open(base / "model.safetensors", "pt").keys(), "model.safetensors")
    empty, sources = {}, {}  # of each tensor: one without memory; the file, value and layer that it is made of, or None
    for name in sorted(files, key=dot_natural_key):  # the order and the rule of transformers' loader
        place, converted = rename_source_key(name, renamings, converters, prefix, state)
        place = name if place not in state and name in state else place
        if place in state or head:  # a classifier has no use for the head of the language model
            own = None if converted or place in tied else place
            stored = safe_open(base / files[name], "pt").get_tensor(name)  # a view of the file, not read yet
            kind = dtype if dtype and stored.is_floating_point() else stored.dtype
            empty[name] = torch.empty_like(stored, dtype=kind, device="meta")
            sources[name] = (base / files[name], values.pop(own, None), layers.pop(own, None))
    for name in [name for name in values if not head and not name.startswith(f"{prefix}.")]:  # it has its own
        empty[name] = torch.empty_like(values[name], dtype=dtype or model.dtype, device="meta")
        sources[name] = (None, values.pop(name), None)
    if rest := [*values, *layers]:
        raise NotImplementedError(f"{rest[0]} is tied, or not stored as a tensor of its own")
    split, threads = split_torch_state_dict_into_shards(empty, max_shard_size=limit), torch.get_num_threads()
    torch.set_num_threads(1)  # a block is done before a second thread has woken, and on a busy machine waits for it
    for file, names in split.filename_to_tensors.items():
        with tqdm(names, desc=file, unit="tensor") as bar:  # which ends its line also before an error
            tensors = {name: merge_tensor(name, empty[name].dtype, *sources[name]) for name in bar}
        save_file(tensors, folder / file, {"format": "pt"})
        del tensors  # else the next file would be in memory beside it
    torch.set_num_threads(threads)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return model.config


def merge_in_peft(base, adapter, task, kind, folder, limit):
    """The merge by PEFT; returns the config of the merged model."""
    model = PeftModel.from_pretrained(load_model(base, adapter, task, torch.float32), adapter, torch_device="cpu")
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    head = getattr(ends[1], "base_layer", ends[1])
    if isinstance(head, torch.nn.Linear) and any(isinstance(end, WRAPPERS) for end in ends):
        head.weight = torch.nn.Parameter(head.weight.clone())  # where it is tied, each merge would change both
    model = model.merge_and_unload(safe_merge=True)
    for weight in model.parameters():
        weight.data = weight.data.to(kind)
    model.generation_config = type(model.generation_config)()  # replaced below: not every base's own can be saved
    model.save_pretrained(folder, max_shard_size=limit)
    return model.config


@torch.no_grad()
def verify_merge(base, adapter, task, folder, kind):
    """Figures of how far the merged model's logits (scores) are from those of base + adapter; too far is refused."""

    def score(model):
        return torch.cat([model(input_ids=text).logits.flatten() for text in torch.arange(10, 74).view(8, 1, 8)])

    model = PeftModel.from_pretrained(load_model(base, adapter, task, torch.float32), adapter, torch_device="cpu")
    expected = score(model)
    for name, module in model.named_modules():  # all off but a reward model's head, which the base has not
        if isinstance(module, WRAPPERS) and not name.endswith(".score"):
            module.enable_adapters(False)
    changed = (score(model) - expected).norm().item()
    del model
    distance = (score(load_model(folder, adapter, task, torch.float32)) - expected).norm().item()
    rounding = 4 * torch.finfo(kind).eps * expected.norm().item()
    share = distance / changed if changed else float("inf")
    hint = "; rounding loses that, --dtype float32 keeps it" if kind != torch.float32 and share > 0.2 else ""
    print(f"logits: the merged model is {distance:.3g} from base + adapter, {share:.2%} of the adapter's change{hint}")
    if not distance <= changed * (0.05 if kind == torch.float32 else 0.5):  # nor where it is NaN
        require(changed < rounding, "that is too much of what the adapter changes; nothing was saved")
        print(f"the adapter changes less than rounding to {kind} may, {rounding:.3g}")
    return {"adapter_changes": changed, "distance": distance, "rounding": rounding}


def add_older_names(folder, base):
    """Let readers that are built on transformers 4 know what version 5 saves under other names: they would take a
    rope_theta of 10000 in silence, and no tokenizer."""
    config, named = read_json(folder / "config.json"), read_json(base / "config.json")
    for new, old in ((config, named), (config.get("text_config", {}), named.get("text_config", {}))):
        new |= {name: old[name] for name in OLDER if name in old and name not in new}
    config["torch_dtype"] = config["dtype"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (path := folder / "tokenizer_config.json").is_file():
        text = path.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        text = text.replace('"extra_special_tokens": [', '"additional_special_tokens": [')
        # those that tokenizer.model has not, which GGUF converters would leave without a name
        added = {token.pop("id"): token for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
        text = json.dumps({"added_tokens_decoder": added} | json.loads(text), indent=2, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")


def main(argv=None):
    args = parse_flags(argv)
    output_dir = Path(args.output_dir).resolve()
    adapter, adapter_config, base = find_models(args)
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
        merged = read_json(output_dir / "run.json").get("stage") == "merge" and output_dir != base
        require(merged and args.overwrite_output_dir, f"--output_dir {output_dir} is in use (--overwrite_output_dir?)")
    base_name = args.base_model_path or adapter_config.base_model_name_or_path  # PEFT writes into its config
    task, dtype = adapter_config.task_type, None if args.dtype == "auto" else getattr(torch, args.dtype)
    with publish(output_dir) as draft:
        place = next((folder for folder in (adapter, base) if (folder / "tokenizer_config.json").is_file()), None)
        tokenizer = AutoTokenizer.from_pretrained(place) if place else None
        model = load_model(base, adapter, task)
        require(not hasattr(model.config, "quantization_config"), f"{base} is quantized; see --base_model_path")
        kind = dtype or model.dtype
        try:
            config = merge_by_tensor(model, base, adapter, adapter_config, dtype, draft, args.max_shard_size)
        except NotImplementedError as reason:
            print(f"merged by PEFT, with the whole model in memory in float32: {reason}")
            config = merge_in_peft(base, adapter, task, kind, draft, args.max_shard_size)
        config.architectures, config.dtype = [type(model).__name__], kind
        if task == "SEQ_CLS" and tokenizer:
            # where EOS pads, a classifier passes over the EOS at which the score stands
            config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token != tokenizer.eos_token else None
        vars(config).pop("auto_map", None)  # code that lies beside the base
        config.save_pretrained(draft)
        metrics = verify_merge(base, adapter, task, draft, kind) if args.verify else {}
        if tokenizer:
            tokenizer.save_pretrained(draft)
        add_older_names(draft, base)
        for folder in (base, adapter):  # the adapter's own go last: they have the ids that end an answer
            for pattern in ("generation_config.json", "*processor_config.json", "tokenizer.model"):  # the last for GGUF
                for path in folder.glob(pattern):
                    shutil.copy(path, draft)
        earlier = read_json(adapter / "run.json")
        run = earlier | {
            "stage": "merge", "parent": str(adapter), "parent_stage": earlier.get("stage"), "base_model": base_name,
            "base_digest": digest_base(base), "arguments": vars(args), "metrics": metrics,
            "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft")} | {"scripts": 2},
        }  # fmt: skip
        (draft / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"saved {args.output_dir}")
    if args.push_to_hub:
        upload_folder(repo_id=create_repo(output_dir.name, exist_ok=True).repo_id, folder_path=output_dir)


if __name__ == "__main__":
    main()
