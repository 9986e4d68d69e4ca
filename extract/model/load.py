"""Any Hugging Face causal language model, cut off above the deepest layer that is wanted and identified by
its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ...cache.format.manifest import ModelIdentity
from ...errors import ModelError, ResourceError, needs
from ...sites import Location
from ...system.device import DTYPES, resolve_device, resolve_dtype
from ..config import ModelSource
from .blocks import cut_above, verified_blocks
from .fast_linear import speed_up
from .files import ModelFiles, fetch_weights, locate_model, tokenizer_fingerprint, weight_fingerprint
from .hub import first_line
from .module_hook import ModuleHook
from .placement import main_device, offload_folder, placement_options


@dataclass(frozen=True)
class ModelOutline:
    """What is known of a model before its weights are read."""

    source: ModelSource
    """With the folder's absolute path or the hub's commit, the device and the dtype filled in."""
    files: ModelFiles
    config: Any
    tokenizer: Any
    attn_implementation: str
    n_layers: int
    d_model: int

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.get_text_config().vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins every row; None for tokenizers without one."""
        return self.tokenizer.bos_token_id

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Tokens that stand for no text, ascending."""
        return tuple(sorted(set(self.tokenizer.all_special_ids)))


@dataclass
class LanguageModel:
    """A model ready to run. ``model`` is the whole causal LM, or its cut decoder when only lower layers
    were asked for.
    """

    model: Any
    decoder: nn.Module
    """Embedding, blocks and final norm: called with token ids it never runs the head."""
    blocks: nn.ModuleList
    tokenizer: Any
    identity: ModelIdentity
    device: torch.device
    dtype: torch.dtype
    d_model: int
    n_layers: int
    """Of the whole model, however many blocks are left."""
    vocab_size: int
    bos_token_id: int | None
    special_token_ids: tuple[int, ...]
    module_hooks: dict[Location, ModuleHook] = field(default_factory=dict)
    """Where the tensors of hook points are, as far as they were asked for."""
    block_calls: dict[int, Any] = field(default_factory=dict)
    """How the model calls each block, for looking into it."""


def name_of(model: LanguageModel | ModelOutline) -> str:
    """The model's name for messages."""
    return model.files.name if isinstance(model, ModelOutline) else model.identity.id


def outline_model(source: ModelSource, *, elsewhere: bool = False) -> ModelOutline:
    """Configuration and tokenizer, without the weights. ``elsewhere``: device and dtype are those of another machine.

    Raises:
        ModelError: not there, gated, out of reach, or no causal language model.
        UsageError: a device that is not there.

    """
    needs("transformers", extra="extract", what="a language model")
    from transformers import AutoConfig, AutoTokenizer

    _quieten()
    files = locate_model(source)
    if files.gguf_file:
        needs("gguf", "accelerate", extra="gguf", what="a model in a GGUF file")
    gguf = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    with _load_failures(files):
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, **gguf)
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, **gguf)
    if not elsewhere:
        device = resolve_device(source.device)
        source = replace(source, device=str(device), dtype=resolve_dtype(source.dtype, device))
    text_config = config.get_text_config()
    if not getattr(text_config, "num_hidden_layers", None) or not getattr(text_config, "hidden_size", None):
        raise ModelError(
            f"{files.name} is a {config.model_type} model without layers and a width: give a causal language model"
        )
    return ModelOutline(
        source=replace(source, id=files.id, gguf_file=files.gguf_file, revision=files.revision),
        files=files,
        config=config,
        tokenizer=tokenizer,
        attn_implementation=choose_attention(config),
        n_layers=text_config.num_hidden_layers,
        d_model=text_config.hidden_size,
    )


def identify_model(outline: ModelOutline) -> ModelIdentity:
    """Hash the weights (downloading them first) and say which model this is."""
    files = outline.files
    backend = getattr(outline.tokenizer, "backend_tokenizer", None)
    serialized = backend.to_str() if backend is not None else str(sorted(outline.tokenizer.get_vocab().items()))
    return ModelIdentity(
        id=files.id,
        revision=files.revision,
        gguf_file=files.gguf_file,
        fingerprint=weight_fingerprint(files, fetch_weights(outline.source, files)),
        architecture=_model_class(outline.config).__name__,
        n_layers=outline.n_layers,
        vocab_size=outline.vocab_size,
        attn_implementation=outline.attn_implementation,
        dtype=outline.source.dtype,
        tokenizer_fingerprint=tokenizer_fingerprint(files, serialized),
        load_in=outline.source.load_in,
    )


def load_language_model(
    source: ModelSource | ModelOutline, *, deepest_layer: int | None = None, identity: ModelIdentity | None = None
) -> LanguageModel:
    """Load a model for running, weights in ``source.dtype`` on ``source.device``, or where ``source.device_map`` puts
    them.

    With ``deepest_layer`` the blocks above it and the head are dropped. ``identity`` spares hashing the weights again.
    The blocks are verified: what they put out is what the model reports as its hidden states.

    Raises:
        ModelError, UsageError: as :func:`outline_model`; or no such layer, or weights missing.
        ResourceError: not enough memory on the device.

    """
    outline = source if isinstance(source, ModelOutline) else outline_model(source)
    check_layers(outline, () if deepest_layer is None else (deepest_layer,))
    identity = identity or identify_model(outline)
    dtype, device = DTYPES[outline.source.dtype], torch.device(outline.source.device)
    model = _read_weights(outline, dtype)
    main = main_device(model, device)  # before it is cut, which takes its map along
    found = verified_blocks(model, outline.n_layers, outline.d_model)
    if deepest_layer is not None:
        cut_above(found, deepest_layer)
        model = found.decoder
    if outline.source.is_placed:
        device = main
    else:
        model = _moved(model, outline, device)
    speed_up(model)
    return LanguageModel(
        model=model,
        decoder=found.decoder,
        blocks=found.blocks,
        tokenizer=outline.tokenizer,
        identity=identity,
        device=device,
        dtype=dtype,
        d_model=outline.d_model,
        n_layers=outline.n_layers,
        vocab_size=outline.vocab_size,
        bos_token_id=outline.bos_token_id,
        special_token_ids=outline.special_token_ids,
    )


def _moved(model: Any, outline: ModelOutline, device: torch.device) -> Any:
    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"{outline.files.name} in {outline.source.dtype} does not fit into the memory of {device}: spread it with "
            "--device-map auto, or give --load-in 8bit"
        ) from None


def check_layers(outline: ModelOutline, layers: tuple[int, ...]) -> None:
    """Raise ModelError for the first layer that the model does not have."""
    for layer in layers:
        if not 0 <= layer < outline.n_layers:
            raise ModelError(
                f"{outline.files.name} has {outline.n_layers} layers, numbered 0 to {outline.n_layers - 1}; "
                f"you asked for layer {layer}"
            )


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")


def check_context(config: Any, name: str, context: int) -> None:
    """Raise ModelError if the model ``name`` reads fewer tokens at a time. Numbers below 1 mean that nobody knows."""
    text_config = config.get_text_config()
    known = [getattr(text_config, field, None) for field in _POSITIONS]
    longest = next((n for n in known if isinstance(n, int) and n > 0), None)
    if longest is not None and context > longest:
        raise ModelError(f"{name} reads at most {longest} tokens at a time; you asked for --context {context}")


def choose_attention(config: Any) -> str:
    """``eager`` where attention logits are soft-capped (fused kernels leave the cap out in many versions), else
    ``sdpa``.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    return "sdpa" if getattr(_model_class(config), "_supports_sdpa", False) else "eager"


def _model_class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ModelError(f"a {config.model_type} model is no causal language model that transformers knows") from None


def _read_weights(outline: ModelOutline, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    gguf = {"gguf_file": outline.files.gguf_file} if outline.files.gguf_file else {}
    placed = placement_options(outline.source, dtype)
    with _load_failures(outline.files), offload_folder(outline.source) as offloaded:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            outline.files.folder,
            dtype=dtype,
            attn_implementation=outline.attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
            **gguf,
            **placed,
            **offloaded,
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"the weights of {outline.files.name} lack {len(missing)} tensors, such as {missing[0]}: "
            "download them again"
        )
    return model.eval().requires_grad_(False)


_TOKENIZER_LIBRARIES = {"sentencepiece": "sentencepiece", "tiktoken": "tiktoken", "protobuf": "google.protobuf"}


@contextmanager
def _load_failures(files: ModelFiles) -> Iterator[None]:
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        for package, module in _TOKENIZER_LIBRARIES.items():
            if package in str(problem).lower() and find_spec(module) is None:
                raise ModelError(
                    f"{files.name} has a tokenizer that needs {package}, which is not installed: pip install {package}"
                ) from problem
        raise ModelError(
            f"{files.name} cannot be opened as a causal language model: {first_line(problem)}"
        ) from problem


def _quieten() -> None:
    """Our own progress is shown through the console; transformers' bars and advice would only be noise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
