"""Merge a LoRA adapter into its base model: a full model that loads without PEFT, checked against base + adapter.

In: an adapter directory (`final_checkpoint/` of any stage, or one of your own) and its base model in safetensors.
Out, in --output_dir: the full model in safetensors, config, tokenizer, chat template, generation config and run.json;
from a reward model's adapter a sequence classifier with its score head.

The weights are streamed: a tensor that the adapter changes is summed in float32 and rounded once, block by block; the
others are copied byte for byte. Memory does not grow with the model.

    python merge_with_lora.py --adapter_path checkpoints/ppo/final_checkpoint --output_dir checkpoints/merged
    python merge_with_lora.py --adapter_path my_adapter --base_model_path models/llama --output_dir merged --dtype bfloat16
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.20,<6", "peft>=0.21,<1", "accelerate>=1.15,<2", "bitsandbytes>=0.49"]
# ///

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from pathlib import Path


# >>> block base: the same in training_sft.py, training_reward_model.py, training_rl.py, merge_with_lora.py
class UserError(Exception):
    """What is wrong, where, and what would be right: shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """Full flag names only; the default value in the help; a mistake is one line."""

    def __init__(self, description):
        summary = description.split("\n\n")[0]
        super().__init__(
            description=summary, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def run_as_script(function):
    """Call `function()`; what a user can mend becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    code = 0
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # of several processes the first one talks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe on Windows knows few characters
    try:
        function()
    except Exception as error:
        # safetensors and torch have types of their own for a full disk
        full = re.search(r"No space left|os error 28|PytorchStreamWriter failed", str(error))
        if not full and not isinstance(error, (UserError, OSError)):
            raise
        hint = "no space left to save; what was saved before is complete: " if full else ""
        print(f"error: {hint}{' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if code:
        sys.exit(code)


def read_json(path):
    """The JSON object in the file `path`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path, value):
    """Write `value` as JSON; the file is either the old one or the whole new one."""
    draft = Path(f"{path}.partial")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(draft, path)


@contextlib.contextmanager
def reading(what):
    """What is wrong with a file from elsewhere becomes one line: libraries raise dozens of types for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = type(error).__name__
        text = str(error) if isinstance(error, (OSError, ValueError)) else f"{kind} {error}"
        text = "it holds more than tensors, and code in files is not run" if kind == "UnpicklingError" else text
        raise UserError(f"{what} cannot be loaded: {text}") from error


@contextlib.contextmanager
def publish(directory):
    """Yield an empty directory to fill; it takes the name `directory` only when it is complete."""
    directory = Path(directory)
    draft, old = directory.with_name(directory.name + ".partial"), directory.with_name(directory.name + ".old")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if directory.exists():
        os.replace(directory, old)
    os.replace(draft, directory)
    shutil.rmtree(old, ignore_errors=True)


@dataclasses.dataclass
class Source:
    """Where a model comes from: `base`, a full model (hub id or absolute directory); `adapter`, a directory with a
    LoRA adapter for it, or None; `run`, the run.json that an earlier stage left beside it, or {}."""

    base: str
    adapter: Path | None
    run: dict


def locate_model(path, flag):
    """Find out what `path` (a hub id, a model directory or an adapter directory) is, without loading weights."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{flag} {path} is a file; it should be a model directory or a hub id")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
            raise UserError(f"{flag} {path} does not exist; it should be a model directory or a hub id")
        return Source(str(path), None, {})
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = [child.parent.name for child in folder.glob("*/*config.json")]
        hint = f"; did you mean {folder / sorted(inside)[0]}?" if inside else ""
        raise UserError(f"{flag} {path} holds neither config.json nor adapter_config.json{hint}")
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if not (folder / "adapter_config.json").is_file():
        return Source(str(folder.resolve()), None, run)
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / 'adapter_config.json'} names no base model (base_model_name_or_path)")
    looks_local = Path(base).is_absolute() or base.startswith(".") or "\\" in base or base.count("/") > 1
    if looks_local and not Path(base).is_dir():
        raise UserError(
            f"{flag} {path} is an adapter for the base model {base}, which is not there; put the base model back or "
            f"write its new place into base_model_name_or_path in {folder / 'adapter_config.json'}"
        )
    return Source(str(Path(base).resolve()) if Path(base).is_dir() else base, folder.resolve(), run)


# <<< block base


def build_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--adapter_path", required=True, help="directory or hub id of the LoRA adapter")
    add("--output_dir", required=True, help="directory for the merged model; empty, or with --overwrite_output_dir")
    add("--base_model_path", help="directory or hub id of the base model (the one that the adapter's config names)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: that of the base")
    add("--max_shard_size", default="5GB", help="largest file of weights, e.g. 500MB or 5GB")
    add("--verify", action="store_true", default=True, help="compare with base + adapter on a few short texts")
    add("--no_verify", dest="verify", action="store_false", help="leave that comparison out")
    add("--overwrite_output_dir", action="store_true", help="replace the model in --output_dir")
    add("--push_to_hub", action="store_true", help="upload the merged model under the name of --output_dir")
    add("--force", action="store_true", help="go on with a base that is not the one the adapter was trained on")
    return parser


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    run_as_script(build_parser().parse_args)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an optional CPU kernel at every start
warnings.filterwarnings("ignore", module="peft")  # advice on tied embeddings, which are untied here where they differ

import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi, snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors import SafetensorError, safe_open
from torch.nn import functional
from torch.utils._pytree import tree_map
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights that are summed or used at a time, and bytes that are copied at a time: small enough for the processor's
# cache, and to be allocated again and again without growing or leaving the heap.
BLOCK = 2**18
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?")
# What a LoRA config may set and still be read below. An adapter that uses anything else (target_parameters,
# trainable_token_indices, lora_bias, ...) is left to PEFT.
FIELDS = set(
    "alpha_pattern auto_mapping base_model_name_or_path bias eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_core "
    "modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "task_type use_dora use_rslora".split()
)
# What can be asked of a tensor of torch without its values.
METADATA = {"__get__", "__set__", "size", "dim", "numel", "to", "requires_grad_", "_has_compatible_shallow_copy_type"}
TEXT = (
    "The capital of France is Paris, and the sky is blue because air scatters blue light more than red light. Water "
    "boils at 100 degrees Celsius at sea level; on a high mountain it boils sooner. Question: How many legs does a "
    "spider have? Answer: A spider has eight legs, two more than an insect."
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The bytes from `start` to `end` of a safetensors file, of the type `stored`; `updates` change them, in float32,
    and the sum is rounded to `dtype`. A model is a {name: Tensor}, and an adapter makes another one of it."""

    path: Path
    start: int
    end: int
    shape: tuple
    stored: str
    dtype: str
    updates: tuple = ()

    @property
    def computed(self):
        return bool(self.updates) or self.dtype != self.stored

    @property
    def size(self):
        """Bytes that it takes when it is written."""
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize if self.computed else self.end - self.start


@dataclasses.dataclass(frozen=True)
class Update:
    """Adds scaling * B @ A to a tensor (transposed where the tensor's rows are inputs), and for DoRA then scales every
    output of the sum to the norm in `magnitude`."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scaling: float
    transposed: bool

    @property
    def shape(self):
        """The shape of the tensor that this fits."""
        outputs, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)


def shorten(names):
    """The first three of some names, for an error."""
    names = [str(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fetch_folder(path, flag, revision=None):
    """The directory of a model or an adapter; for a hub id the one in the hub's cache."""
    if Path(path).is_dir():
        return Path(path).resolve()
    locate_model(path, flag)  # refuses what cannot be a hub id
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with reading(f"{flag} {path} is not a directory here, and from the hub it"):
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))


def follow_chain(args):
    """The adapters, from the one on the full model to --adapter_path, and the directory of the full model."""
    folder, chain, override = fetch_folder(args.adapter_path, "--adapter_path"), [], args.base_model_path
    while (folder / "adapter_config.json").is_file():
        if folder in chain:
            raise UserError(f"the adapter {folder} is its own base model")
        chain.insert(0, folder)
        config = read_json(folder / "adapter_config.json")
        base = config.get("base_model_name_or_path")
        if override and not (base and (Path(base) / "adapter_config.json").is_file()):
            folder, override = fetch_folder(override, "--base_model_path"), None
        elif not isinstance(base, str) or not base:
            raise UserError(f"{folder / 'adapter_config.json'} names no base model; pass it as --base_model_path")
        else:
            flag = f"the adapter {folder} needs its base model (--base_model_path names another):"
            folder = fetch_folder(base, flag, config.get("revision"))
    locate_model(folder, "--base_model_path" if chain else "--adapter_path")  # refuses a directory without a model
    if not chain:
        raise UserError(f"--adapter_path {args.adapter_path} is a full model, not an adapter: nothing to merge")
    return chain, folder


def read_headers(folder, stem):
    """{name: Tensor} of `stem`.safetensors, or of the files that its index names, in the order of their bytes."""
    single, index, tensors = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json", {}
    if not single.is_file() and not index.is_file():
        raise UserError(f"{folder} holds no {single.name}; weights in other formats (pickle, GGUF) are not read")
    names = {} if single.is_file() else read_json(index).get("weight_map") or {}
    if any(Path(file).name != file for file in names.values()):
        raise UserError(f"{index} names files in other directories")
    for path in [folder / file for file in sorted(set(names.values()))] or [single]:
        try:  # the format: https://huggingface.co/docs/safetensors
            with safe_open(path, framework="pt"), open(path, "rb") as file:  # safe_open checks header and length
                data = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(data - 8))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a complete safetensors file: {error}") from error
        header.pop("__metadata__", None)
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = (data + offset for offset in info["data_offsets"])
            tensors[name] = Tensor(path, start, end, tuple(info["shape"]), info["dtype"], info["dtype"])
    if lost := set(names) - set(tensors):
        raise UserError(f"the files in {folder} lack tensors of their index: {shorten(lost)}")
    return tensors


def main_dtype(tensors):
    return next((tensor.dtype for tensor in tensors.values() if tensor.dtype in FLOATS), "F32")


def read_bytes(tensor, begin, end):
    data = torch.empty(end - begin, dtype=torch.uint8)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.start + begin)
        if file.readinto(data.numpy()) != len(data):
            raise UserError(f"{tensor.path} was cut while it was read")
    return data


def read_rows(tensor, begin=0, end=None):
    """Rows of a tensor (all by default) in float32, as its updates change them."""
    rows = (tensor.shape or (1,))[0]
    end = rows if end is None else end
    if end - begin < rows and any(update.magnitude and update.transposed for update in tensor.updates):
        return read_cached(tensor)[begin:end]  # the norms run over all rows
    kind, row = FLOATS[tensor.stored], math.prod(tensor.shape[1:])
    weight = read_bytes(tensor, begin * row * kind.itemsize, end * row * kind.itemsize).view(kind).float()
    weight = weight.view(end - begin, *tensor.shape[1:]) if tensor.shape else weight[0]
    for update in tensor.updates:
        a, b = read_cached(update.a), read_cached(update.b)
        delta = (b @ a[:, begin:end]).T if update.transposed else b[begin:end] @ a
        weight = delta.mul_(update.scaling).add_(weight)
        if update.magnitude:
            magnitude = read_cached(update.magnitude).flatten()
            magnitude = magnitude[None] if update.transposed else magnitude[begin:end, None]
            weight *= magnitude / torch.linalg.norm(weight, dim=0 if update.transposed else 1, keepdim=True)
    return weight


read_cached = functools.lru_cache(maxsize=8)(read_rows)  # A, B and magnitude: needed for every block of a tensor


def split_rows(shape):
    """(begin, end) of the blocks of rows that a tensor is read and summed in."""
    rows, block = (shape or (1,))[0], max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [(begin, min(begin + block, rows)) for begin in range(0, rows, block)]


def output_bytes(name, tensor):
    """The bytes of a tensor of the merged model, in pieces."""
    if not tensor.computed:
        for begin in range(0, tensor.size, BLOCK):
            yield read_bytes(tensor, begin, min(begin + BLOCK, tensor.size)).numpy()
        return
    for begin, end in split_rows(tensor.shape):
        block = read_rows(tensor, begin, end).to(FLOATS[tensor.dtype])
        if not block.sum().isfinite() and not block.isfinite().all():  # the sum is 20 times as fast
            raise UserError(f"{name} would hold NaN or infinity in {FLOATS[tensor.dtype]}")
        yield block.contiguous().view(-1).view(torch.uint8).numpy()


def write_weights(folder, tensors, limit):
    """Write the merged model's tensors as safetensors, in files of at most the size `limit`."""
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda t: t.size, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    with tqdm(total=split.metadata["total_size"], unit="B", unit_scale=True, desc="Merging") as bar:
        for filename, names in split.filename_to_tensors.items():
            # Wide types first, so that every tensor starts at a multiple of its width, as the format's own writer does.
            names = sorted(names, key=lambda name: -tensors[name].size // max(1, math.prod(tensors[name].shape)))
            header, offset = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                span = [offset, offset := offset + tensors[name].size]
                header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": span}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with open(folder / filename, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    for data in output_bytes(name, tensors[name]):
                        bar.update(file.write(data))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def flush_file(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def build_model(auto, config):
    """The model without its weights; `auto` is AutoModelForCausalLM, or for reward models ...SequenceClassification."""
    with reading("the base model"), init_empty_weights(include_buffers=False), no_init_weights():
        return auto.from_config(copy.deepcopy(config), dtype=torch.float32).eval()  # from_config writes into it


def match_names(model, tensors):
    """What each parameter of `model` is loaded from, by the names that transformers' own loader gives the tensors.

    Returns places, {parameter: [(tensor name, pattern, converter)]}, where a converter of transformers (or None) makes
    the parameter out of one or several tensors; and tied, {parameter without a tensor: the parameter it equals}."""
    places, state, conversions = {}, model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    for name in tensors:
        place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if place not in state and name in state:
            place, pattern = name, None
        converter = next((entry for entry in converters if pattern in entry.source_patterns), None)
        for target in converter.target_patterns if converter else [place]:
            parameter = place.replace(converter.target_patterns[0], target) if converter else place
            if parameter in state:
                places.setdefault(parameter, []).append((name, pattern, converter))
    singles = [(tensors[place[0][0]], name) for name, place in places.items() if not place[0][2]]
    if odd := [name for tensor, name in singles if tensor.shape != tuple(state[name].shape)]:
        raise UserError(f"the base model's weights do not have the shapes of its config.json: {shorten(odd)}")
    pairs = model.all_tied_weights_keys.items()
    tied = {a: b for pair in pairs for a, b in (pair, pair[::-1]) if a not in places and b in places}
    return {name: places[twin] for name, twin in tied.items()} | places, tied


def apply_adapter(folder, model, tensors):
    """(`tensors` as an adapter changes them, None), or (`tensors`, why that is left to PEFT)."""
    config, stored = read_json(folder / "adapter_config.json"), read_headers(folder, "adapter_model")
    if config.get("peft_type") != "LORA":
        return tensors, f"a {config.get('peft_type')} adapter"
    special = [name for name, value in config.items() if value and name not in FIELDS]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        special.append("init_lora_weights")  # the other ways to start change the base model
    if special:
        return tensors, f"it uses {', '.join(special)}"
    (places, tied), state, wrong = match_names(model, tensors), model.state_dict(), []
    parameters = {place[0][0]: name for name, place in places.items() if not place[0][2]}

    def find(name):
        """The parameter of that name, or the one made out of the tensor of that name, or the tensor."""
        return name if name in state else parameters.get(name, name)

    changes, factors = {}, {}  # changes: {parameter or tensor: the Tensor that takes its place, or an Update of it}
    for key, tensor in stored.items():
        name = key.removeprefix("base_model.model.")
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2].replace("_embedding", "")] = tensor
        elif not name.endswith(".base_layer.weight"):  # PEFT's copy of an embedding that has LoRA factors
            changes[find(re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", name))] = tensor
    for module, parts in factors.items():
        name = find(f"{module}.weight")
        a, b, magnitude = (parts.get(part) for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
        if not a or not b:
            wrong.append(f"{module} has only {', '.join(parts)}")
            continue
        if len(a.shape) != 2 or len(b.shape) != 2:
            return tensors, f"{name} is not a matrix"
        rank, patterns = a.shape[0], config.get("alpha_pattern") or {}
        if rank != b.shape[1] or (magnitude and math.prod(magnitude.shape) != b.shape[0]):
            wrong.append(f"the LoRA factors of {module} do not fit each other")
        alpha = patterns.get(get_pattern_key(patterns, module), config.get("lora_alpha", 8))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        owner = model.get_submodule(name.removesuffix(".weight")) if name in state else None
        changes[name] = Update(a, b, magnitude, scaling, isinstance(owner, (Conv1D, torch.nn.Embedding)))

    tensors = dict(tensors)
    for name, twin in tied.items():
        if {name, twin} & set(changes):  # no longer equal: a tensor for each
            tensors[name], places[name] = tensors[places[twin][0][0]], [(name, None, None)]
    for name, change in changes.items():
        key, _, converter = places.get(name, [(name, None, None)])[0]
        if converter:
            return tensors, f"{name} is made out of several tensors when the model is loaded"
        old = tensors.get(key)
        shape = tuple(state[name].shape) if name in state else old.shape if old else "missing"
        if shape != change.shape:
            wrong.append(f"{name} is {shape} in the base model, {change.shape} in the adapter")
        elif old and old.stored not in FLOATS:
            wrong.append(f"{name} is stored quantized in the base model, which is needed in full precision")
        elif isinstance(change, Update):
            tensors[key] = dataclasses.replace(old, updates=(*old.updates, change))
        else:
            tensors[key] = dataclasses.replace(change, dtype=old.dtype if old else main_dtype(tensors))
    if wrong:
        raise UserError(f"the adapter {folder} does not fit the base model: {shorten(wrong)}")
    return tensors, None


class Apart:
    """The last texts of a batch: they go through a model in one sweep with the others, but through changed weights."""

    def __init__(self, ids, texts):
        self.tokens, self.tail = ids.numel(), texts * ids.shape[1]
        self.generator = torch.Generator().manual_seed(0)

    def draw_signs(self, size):
        return torch.randint(0, 2, (size,), generator=self.generator) * 2.0 - 1

    def change(self, output, function):
        """The output of a layer with function(rows) in the place of the rows of these texts."""
        values = output[0] if isinstance(output, tuple) else output
        rows = values.reshape(-1, values.shape[-1])  # some modules get the tokens of all texts in one dimension
        if len(rows) == self.tokens:
            rows[-self.tail :] = function(rows[-self.tail :])
        return (rows.view(values.shape), *output[1:]) if isinstance(output, tuple) else rows.view(values.shape)

    def keep_base(self, layer):
        """Let these texts get what the base model's module would give where PEFT put `layer`."""
        kept = []

        def keep(output):
            self.change(output, lambda rows: kept.append(rows.clone()) or rows)

        if isinstance(layer, BaseTunerLayer):
            layer.base_layer.register_forward_hook(lambda module, args, output: keep(output))
        else:
            layer.register_forward_pre_hook(lambda module, args: keep(module.original_module(*args)))
        layer.register_forward_hook(lambda module, args, output: self.change(output, lambda rows: kept.pop()))


class Lazy(torch.Tensor):
    """A parameter of that `shape` without memory: `read(begin, end)` gives rows of it when a function of torch wants
    its values (https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-with-a-tensor-like-type).

    For the texts in `apart` every weight is off by the relative `error`, with random signs row_i * column_j. That moves
    W x by error * row * (W (column * x)), for which it takes no other weights than those that all texts need."""

    @staticmethod
    def __new__(cls, shape, read, apart, error=0.0):
        lazy = torch.zeros(()).expand(shape).as_subclass(cls)
        lazy.read, lazy.apart, lazy.error, lazy._is_param = read, apart, error, True  # torch looks for _is_param
        return lazy

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = (*args, *kwargs.values(), None)
        if function.__name__ == "detach":  # for a state_dict
            return args[0]
        if function.__name__ in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                found = function(*args, **kwargs)
            # .T, .data and to(another type) come to a new tensor, and have values
            if found is args[0] or not isinstance(found, torch.Tensor):
                return found
        if function is functional.linear and isinstance(values[1], cls):
            return values[1].apply_linear(values[0], values[2])
        if function is torch.addmm and isinstance(values[2], cls) and not kwargs:  # transformers' Conv1D
            return values[2].apply_linear(values[1], values[0], transposed=True)
        if function is functional.embedding and isinstance(values[1], cls):
            used, places = values[0].unique(return_inverse=True)
            result = torch.cat([values[1].read(row, row + 1) for row in used.tolist()])[places]
        else:
            args, kwargs = tree_map(lambda value: value.read() if isinstance(value, cls) else value, (args, kwargs))
            result = function(*args, **kwargs)
        for lazy in values:
            if isinstance(lazy, cls) and lazy.error and isinstance(result, torch.Tensor) and result.dim():
                signs = lazy.apart.draw_signs(result.shape[-1])
                result = lazy.apart.change(result, lambda rows: rows * (1 + lazy.error * signs))
        return result

    def apply_linear(self, x, bias, transposed=False):
        rows, tail = x.reshape(-1, x.shape[-1]), self.apart.tail
        disturbed = self.error and len(rows) == self.apart.tokens
        if disturbed:
            rows = torch.cat([rows, rows[-tail:] * self.apart.draw_signs(rows.shape[1])])
        y = rows.new_zeros(len(rows), self.shape[1 if transposed else 0])
        for begin, end in split_rows(self.shape):
            if transposed:
                y.addmm_(rows[:, begin:end], self.read(begin, end))
            else:
                y[:, begin:end] = functional.linear(rows, self.read(begin, end))
        if disturbed:
            y, moved = y[:-tail], y[-tail:]
            y[-tail:] += self.error * self.apart.draw_signs(y.shape[1]) * moved
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


@torch.no_grad()
def run_lazily(model, tensors, ids, adapter=None, bits=0, apart=0, noise=None):
    """The logits of `model` for `ids`, its parameters read from `tensors` as they are used; with an adapter, in PEFT;
    with `bits`, as if the base model were loaded in 4 bit (NF4) or 8 bit. The last `apart` texts go without the
    adapter, or with errors of the relative size noise[name of the tensor].

    Memory: of linear layers a block of rows in float32, of embeddings the rows in use, of other modules one tensor; of
    the adapter no more."""
    places, base, apart, modules = match_names(model, tensors)[0], model, Apart(ids, apart), list(model.named_modules())
    head = model.get_output_embeddings()  # stays as it is where the others are quantized
    quantized = {f"{name}.weight" for name, m in modules if bits and type(m) is torch.nn.Linear and m is not head}

    def read(name, begin=0, end=None):
        tensor, _, converter = places[name][0]
        if converter:
            converter = copy.deepcopy(converter)
            for tensor, pattern, _ in places[name]:
                converter.add_tensor(name, tensor, pattern, read_rows(tensors[tensor]))
            rows = converter.convert(name, model=base, config=base.config)[name]
            rows = (rows[0] if isinstance(rows, list) else rows)[begin:end]
        else:
            rows = read_rows(tensors[tensor], begin, end)
        if name in quantized and bits == 4:
            from bitsandbytes import functional as bnb

            rows = bnb.dequantize_4bit(*bnb.quantize_4bit(rows, quant_type="nf4", compress_statistics=True))
        elif name in quantized:
            scale = rows.abs().amax(dim=1, keepdim=True) / 127
            rows = (rows / scale.clamp(min=1e-30)).round() * scale
        return rows

    for name, buffer in model.named_buffers():
        if name in places and tensors[places[name][0][0]].dtype in FLOATS:
            buffer.copy_(read(name))
    if adapter:
        with reading(f"the adapter {adapter}"):
            model = get_peft_model(model, LoraConfig.from_pretrained(adapter), low_cpu_mem_usage=True)
    for prefix, module in modules:
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{leaf}"
                error = noise.get(places[name][0][0], 0.0) if noise and name in places else 0.0
                module._parameters[leaf] = Lazy(parameter.shape, functools.partial(read, name), apart, error)
    if adapter:
        values = {
            key: Lazy(tensor.shape, functools.partial(read_rows, tensor), apart)
            for key, tensor in read_headers(adapter, "adapter_model").items()
            if not key.endswith(".base_layer.weight")
        }
        with reading(f"the adapter {adapter}"):
            set_peft_model_state_dict(model, values, low_cpu_mem_usage=True)
        if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise UserError(f"the adapter {adapter} lacks tensors that its config calls for: {shorten(absent)}")
        for layer in model.modules() if apart.tail else ():
            if isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
                apart.keep_base(layer)
    try:
        return model.eval()(input_ids=ids, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        name = type(base).__name__
        raise UserError(f"{name} cannot be run to verify the merge (--no_verify leaves that out): {error}") from error


def verify_merge(model, tensors, ids, expected, rounded, apart):
    """Compare the merged checkpoint with the logits (or scores) `expected`; refuse more than rounding explains.

    What rounding explains is measured: how far the logits of the first `apart` texts move when the tensors `rounded`
    get random errors of that size. Four times that is allowed, and 5e-5 of the largest logit for the order of
    additions in float32."""
    # 0.21 eps: the root mean square of the relative error of rounding, where all magnitudes are equally likely
    noise = {name: 0.21 * torch.finfo(FLOATS[tensors[name].dtype]).eps for name in rounded}
    found = run_lazily(model, tensors, torch.cat([ids, ids[:apart]]), apart=apart, noise=noise)
    found, moved = found.split([len(ids), apart])
    difference = (found - expected).abs_().max().item()
    allowed = 4 * (moved - found[:apart]).abs().max().item() + 5e-5 * expected.abs().max().item()
    figures = f"the largest difference is {difference:.2g}, rounding explains {allowed:.2g}"
    if not difference <= allowed:  # nor where one of them is NaN
        raise UserError(f"the merged model differs from base + adapter: {figures}; nothing was saved")
    print(f"verified against base + adapter on {len(ids)} texts: of their logits, {figures}")
    return found, {"texts": len(ids), "largest_difference": difference, "allowed": allowed}


def merge_in_peft(chain, base, auto, config, dtype, folder, max_shard_size, ids):
    """The merge by PEFT, the whole model in memory. Returns what base + adapters say about `ids`."""
    try:
        options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        model = auto.from_pretrained(base, config=config, **options)
        for adapter in chain:
            model = PeftModel.from_pretrained(model, adapter, torch_device="cpu").eval()
            with torch.no_grad():
                expected = model(input_ids=ids, use_cache=False).logits
            model = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError, KeyError, TypeError) as error:
        raise UserError(f"PEFT cannot merge the adapter {adapter}: {error}") from error
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return expected


def check_base(base, tensors, run, force):
    """Refuse a base model that is not the one of the training, if run.json says which that was: in `base_hash`, of some
    tensors, by their type, their shape and their first 64 KiB."""
    changed = []
    for name, expected in (run.get("base_hash") or {}).items():
        if tensor := tensors.get(name):
            text = f"{tensor.dtype} {list(tensor.shape)} ".encode()
            data = read_bytes(tensor, 0, min(2**16, tensor.size)).numpy().tobytes()
        if not tensor or hashlib.sha256(text + data).hexdigest()[:16] != expected:
            changed.append(name)
    if changed:
        text = f"the base model {base} is not the one that the adapter was trained on: {shorten(changed)} differ"
        if not force:
            raise UserError(f"{text} (--force merges all the same)")
        print(text)


def check_output_dir(args, sources):
    """Refuse a directory that holds something else than a model to be replaced, or what the merge reads."""
    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise UserError(f"--output_dir {output_dir} is a file; it should be a directory")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not args.overwrite_output_dir:
            raise UserError(f"--output_dir {output_dir} is not empty; name another, or pass --overwrite_output_dir")
        if not (output_dir / "config.json").is_file():
            raise UserError(f"--output_dir {output_dir} holds no model; --overwrite_output_dir replaces models only")
    for folder in sources:
        if output_dir.resolve() in [folder, *folder.parents]:
            raise UserError(f"--output_dir {output_dir} holds {folder}, which is merged; name another directory")


def write_rest(folder, tokenizer, own_tokenizer, folders, config_json, run):
    """Everything but the weights. config.json comes last: a directory without it does not load."""
    if tokenizer:
        tokenizer.save_pretrained(folder)
    for path in folders[-1].glob("*processor_config.json"):  # of models that also take images or sound
        shutil.copy(path, folder)
    files = [place / "generation_config.json" for place in folders]
    generation = next((read_json(file) for file in files if file.is_file()), {})
    ends = generation.get("eos_token_id", config_json.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if own_tokenizer and tokenizer.eos_token_id not in [*ends, None]:  # the token that the adapter learned to end with
        generation |= {"eos_token_id": [tokenizer.eos_token_id, *ends], "pad_token_id": tokenizer.pad_token_id}
    if generation:
        write_json(folder / "generation_config.json", generation)
    write_json(folder / "run.json", run)
    write_json(folder / "config.json", config_json)


def main(argv=None):
    args = build_parser().parse_args(argv)
    output_dir = Path(args.output_dir).resolve()
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", args.max_shard_size, re.IGNORECASE):
        raise UserError(f"--max_shard_size {args.max_shard_size} should be a whole number of MB or GB, e.g. 500MB")
    if args.push_to_hub:
        with reading("--push_to_hub: the name of --output_dir"):
            validate_repo_id(output_dir.name)
    chain, base = follow_chain(args)
    adapter, folders = chain[-1], [*chain[::-1], base]
    check_output_dir(args, folders)
    task, config_json = read_json(adapter / "adapter_config.json").get("task_type"), read_json(base / "config.json")
    classifier = task == "SEQ_CLS"
    run = read_json(adapter / "run.json") if (adapter / "run.json").is_file() else {}
    if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise UserError(f"{adapter} is a {task} adapter; only CAUSAL_LM and SEQ_CLS (reward model) ones are merged")
    if config_json.get("quantization_config"):
        raise UserError(f"the base model {base} is stored quantized; pass the full-precision one as --base_model_path")
    tensors = read_headers(base, "model")
    check_base(base, tensors, run, args.force)

    with reading(f"the config of {base}"):
        config_class = type(AutoConfig.from_pretrained(base, trust_remote_code=False))
    place = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    with reading(f"the tokenizer of {place}"):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False) if place else None
        templates = tokenizer.chat_template if tokenizer and isinstance(tokenizer.chat_template, dict) else {}
        if not all(re.fullmatch(r"[\w-]+", name) for name in templates):
            raise ValueError("a chat template has a name that cannot be that of a file")
    if classifier:
        if tokenizer and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        config_json |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config_json["pad_token_id"] = tokenizer.pad_token_id if tokenizer else config_json.get("pad_token_id")
    if args.dtype != "auto":
        config_json["torch_dtype" if "torch_dtype" in config_json else "dtype"] = args.dtype
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    config = config_class.from_dict(config_json)
    model = build_model(auto, config)
    config_json["architectures"] = [type(model).__name__]
    embeddings = model.get_input_embeddings().num_embeddings
    if place in chain and len(tokenizer) > embeddings:
        text = f"the adapter's tokenizer has {len(tokenizer)} tokens, the base model embeddings for {embeddings}"
        raise UserError(text)

    places, tied = match_names(model, tensors)
    if model.get_output_embeddings() is None:  # a classifier has no use for the head of the language model
        used = {name for place in places.values() for name, *_ in place}
        tensors = {name: tensor for name, tensor in tensors.items() if name in used}
    dtype = next((code for code, value in FLOATS.items() if str(value) == f"torch.{args.dtype}"), None)
    outputs, reason = tensors, None
    for folder in chain:
        before = outputs
        outputs, reason = apply_adapter(folder, model, before)
        if reason:
            text = f"the adapter {folder} cannot be streamed ({reason})"
            print(f"{text}: merged by PEFT, with the whole model in memory in float32")
            dtype, outputs = dtype or main_dtype(tensors), tensors
            break
    else:
        places = match_names(model, outputs)[0]
        if odd := [name for name, _ in model.named_parameters() if name not in places]:
            raise UserError(f"neither the base model nor the adapter has a tensor for {shorten(odd)}")
    if dtype:
        outputs = {n: dataclasses.replace(t, dtype=dtype) if t.dtype in FLOATS else t for n, t in outputs.items()}
    if set(tied) & set(outputs):
        config_json["tie_word_embeddings"] = False
    size, existing = sum(tensor.size for tensor in outputs.values()), next(f for f in output_dir.parents if f.is_dir())
    if shutil.disk_usage(existing).free < size + 2**26:
        raise UserError(f"the merged model takes {size / 1e9:.2f} GB, more than is free in {existing}")

    rows, length = (16, 4) if classifier else (4, 8)  # a classifier says one number a row
    ids = tokenizer(TEXT)["input_ids"] if tokenizer else list(range(rows * length))
    ids = torch.tensor((ids * rows * length)[: rows * length]).view(rows, length)
    base_name = args.base_model_path or read_json(chain[0] / "adapter_config.json")["base_model_name_or_path"]
    flags = run.get("arguments") or {}
    bits = 4 if flags.get("load_in_4bit") else 8 if flags.get("load_in_8bit") else 0
    run = {key: value for key, value in run.items() if key != "base_hash"} | {
        "stage": "merge",
        "parent_stage": run.get("stage"),
        "base_model": str(base) if Path(base_name).is_dir() else base_name,
        "parent": str(adapter),
        "arguments": vars(args),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "accelerate")},
    }
    with concurrent.futures.ThreadPoolExecutor(1) as pool, publish(output_dir) as draft:
        if reason:
            expected = merge_in_peft(chain, base, auto, config, FLOATS[dtype], draft, args.max_shard_size, ids)
        else:
            write_weights(draft, outputs, args.max_shard_size)
        flushed = pool.map(flush_file, [*draft.glob("*.safetensors")])  # meanwhile:
        if args.verify:
            apart = 0 if classifier or reason else 1  # without its adapter a reward model has no head
            if not reason:
                both = torch.cat([ids, ids[:apart]])
                expected = run_lazily(build_model(auto, config), before, both, adapter, apart=apart)
            expected, bare = expected.split([len(ids), apart])
            merged, merged_model = read_headers(draft, "model"), build_model(auto, config_class.from_dict(config_json))
            rounded = [name for name in merged if merged[name].dtype in FLOATS and (reason or outputs[name].computed)]
            # a text has thousands of logits, or one score
            found, figures = verify_merge(merged_model, merged, ids, expected, rounded, len(ids) if classifier else 1)
            run["verification"] = figures
            if apart:
                figures["adapter_moves"] = effect = (expected[:1] - bare).abs().max().item()
                if effect < 2 * figures["largest_difference"]:
                    print(f"the adapter moves the logits by {effect:.2g} only: --dtype float32 would keep more of that")
        if bits:
            gap = "by how much could not be measured here"
            with contextlib.suppress(ImportError, UserError):  # no bitsandbytes, or one that cannot do it here
                if args.verify and not reason:
                    trained = run_lazily(build_model(auto, config), before, ids, adapter, bits)
                    figures["difference_from_quantized"] = (found - trained).abs().max().item()
                    gap = f"on the same texts by up to {figures['difference_from_quantized']:.2g}"
            text = f"trained on the base model in {bits} bit, merged into it in full precision"
            print(f"{text}: the logits differ, {gap}")
        list(flushed)  # on the disk before the directory takes its name
        write_rest(draft, tokenizer, place in chain, folders, config_json, run)
    print(f"saved {args.output_dir}")
    if args.push_to_hub:
        repo = HfApi().create_repo(output_dir.name, exist_ok=True).repo_id
        print(f"uploaded {HfApi().upload_folder(repo_id=repo, folder_path=output_dir)}")


if __name__ == "__main__":
    run_as_script(main)
