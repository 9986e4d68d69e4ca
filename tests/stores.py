"""Small activation stores through the real writer, for every stage's tests: random, but shaped like a
language model's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tcsae.cache.format.commit_log import LOG, parse_log
from tcsae.cache.format.layout import ROLES, SPECIAL, Compression, RowBlock, StoreLayout, role_flags
from tcsae.cache.format.manifest import (
    TEMPLATE,
    Execution,
    ModelIdentity,
    StoreManifest,
    TextIdentity,
    group_document,
    read_manifest,
)
from tcsae.cache.format.zarr_documents import ARRAYS, array_document, shard_key, to_json
from tcsae.cache.writer import StoreSetWriter

if TYPE_CHECKING:
    from tcsae.cache.store import ActivationStore

BOS, VOCAB = 0, 300
Packing = Literal["document", "concat"]
Bits = Mapping[int, np.ndarray]  # layer → uint16 [B, T, D]
VERSIONS = {"tcsae": "0", "torch": "0"}


def make_manifest(
    *,
    layer: int = 3,
    layout: StoreLayout | None = None,
    planned_rows: int = 64,
    model_id: str = "tiny",
    packing: str = "document",
    turns: bool = False,
) -> StoreManifest:
    """A manifest of an imaginary model and text; everything in it is constant."""
    layout = layout or StoreLayout(d_model=8, context=16, chunk_rows=4, shard_rows=16)
    return StoreManifest(
        layer=layer,
        d_model=layout.d_model,
        model=ModelIdentity(
            id=model_id, fingerprint="m" * 32, architecture="LlamaForCausalLM", n_layers=6, vocab_size=VOCAB,
            attn_implementation="eager", dtype="float32", tokenizer_fingerprint="t" * 32,
        ),
        text=TextIdentity(
            dataset="made up", split="train", text_column="text",
            fingerprint="x" * 32 + (TEMPLATE + "c" * 64 if turns else ""), packing=packing,
            context=layout.context,
            bos_token_id=BOS, special_token_ids=(BOS,), seed=0, held_out=0.01,
        ),
        execution=Execution(batch_size=4, threads=1, device="cpu", device_name="imaginary"),
        layout=layout,
        planned_rows=planned_rows,
        created="2026-01-01T00:00:00+00:00",
        versions=VERSIONS,
    )  # fmt: skip


def make_block(
    rows: int, context: int, *, seed: int = 0, documents: int | None = None, packing: str = "document"
) -> RowBlock:
    """BOS at position 0 flagged special, then tokens of documents of varying length.

    ``document`` packing keeps a row inside one document; ``concat`` lets documents end anywhere.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (rows, context), dtype=np.int32)
    tokens[:, 0] = BOS
    flags = np.zeros((rows, context), np.uint8)
    flags[:, 0] = SPECIAL
    most = rows if packing == "document" else rows * (context - 1)
    count = max(1, min(most, documents or max(2, rows // 4)))
    if packing == "document":
        cuts = np.sort(rng.choice(np.arange(1, rows), count - 1, replace=False)) if count > 1 else np.empty(0, int)
        numbers = np.searchsorted(cuts, np.arange(rows), side="right")[:, None].repeat(context, axis=1)
    else:
        ends = rng.random(rows * (context - 1)) < count / (rows * (context - 1))
        numbers = np.zeros((rows, context), int)
        numbers[:, 1:] = np.cumsum(ends).reshape(rows, context - 1)
        numbers[:, 0] = numbers[:, 1]
    return RowBlock(tokens, numbers.astype(np.int32), flags)


def with_turns(block: RowBlock, *, seed: int = 0) -> RowBlock:
    """The same rows as conversations: a header of nobody's, two to six tokens of the user or the assistant, and so on.
    Some of the messages end at a special token.
    """
    rng = np.random.default_rng(seed)
    numbers, flags = np.zeros(block.flags_BT.shape, int), block.flags_BT.copy()
    for row in range(len(block)):
        position, speaker = 2, int(rng.integers(2))
        while position < block.flags_BT.shape[1]:
            length = int(rng.integers(2, 7))
            numbers[row, position : position + length] = 1 + ROLES.index(("user", "assistant")[speaker])
            position, speaker = position + length + int(rng.integers(1, 3)), 1 - speaker
            if position <= block.flags_BT.shape[1] and rng.random() < 0.3:
                flags[row, position - 1] |= SPECIAL
    return RowBlock(block.tokens_BT, block.documents_BT, flags | role_flags(numbers))


def make_activations(block: RowBlock, d_model: int, *, layer: int = 3, seed: int = 0) -> np.ndarray:
    """bfloat16 bits ``[B, T, D]``, smooth in time within a row, offset from zero, BOS with a norm a hundred times the
    rest.
    """
    rows, context = block.tokens_BT.shape
    rng = np.random.default_rng([seed, layer])
    x = rng.standard_normal((rows, context, d_model), dtype=np.float32)
    for t in range(1, context):
        x[:, t] = 0.6 * x[:, t - 1] + 0.8 * x[:, t]
    table = rng.standard_normal((VOCAB, d_model), dtype=np.float32)
    x += table[block.tokens_BT] + rng.standard_normal(d_model, dtype=np.float32)
    x[block.flags_BT & SPECIAL != 0] = 100 * table[BOS]
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def pieces(
    block: RowBlock, bits: Mapping[int, np.ndarray], start: int, stop: int, step: int
) -> Iterator[tuple[RowBlock, dict]]:
    """Rows ``start`` … ``stop`` in blocks of ``step``."""
    for low in range(start, stop, step):
        high = min(low + step, stop)
        yield block.slice(low, high), {layer: x[low:high] for layer, x in bits.items()}


def write_rows(
    writer: StoreSetWriter, block: RowBlock, bits: Mapping[int, np.ndarray], *, step: int = 3, finish: bool = True
) -> None:
    """Write everything from where the writer stands; the cursor is {"row": n}."""
    size = writer.layout.shard_rows
    for first in range(writer.rows_committed, len(block), size):
        stop = min(first + size, len(block))
        for part, activations in pieces(block, bits, first, stop, step):
            writer.append(part, activations)
        writer.commit({"row": stop})
    writer.drain()
    if finish:
        writer.finish()


def make_stores(
    folder: Path, layers: Sequence[int] = (3,), *, rows: int = 64, context: int = 16, d_model: int = 8, seed: int = 0,
    documents: int | None = None, packing: Packing = "document", chunk_rows: int = 4, shard_rows: int = 16,
    compression: Compression = "none", finish: bool = True, step: int = 3, model_id: str = "tiny",
    turns: bool = False,
) -> dict[int, Path]:  # fmt: skip
    """Finished stores ``folder/l3.zarr`` … that hold :func:`make_block` and :func:`make_activations`; layer → path.

    ``turns``: of conversations, see :func:`with_turns`.
    """
    layout = StoreLayout(d_model, context, chunk_rows, shard_rows, compression)
    block = make_block(rows, context, seed=seed, documents=documents, packing=packing)
    block = with_turns(block, seed=seed) if turns else block
    bits = {layer: make_activations(block, d_model, layer=layer, seed=seed) for layer in layers}
    paths = {layer: Path(folder) / f"l{layer}.zarr" for layer in layers}
    manifests = {
        n: make_manifest(layer=n, layout=layout, planned_rows=rows, packing=packing, model_id=model_id, turns=turns)
        for n in layers
    }
    with StoreSetWriter.open(paths, manifests) as writer:
        write_rows(writer, block, bits, step=step, finish=finish)
    return paths


def grow_store(path: Path, rows: int) -> Path:
    """Extend a finished store: its own rows again, then others."""
    import torch  # here, so that a process that only writes starts at once
    from tcsae.cache.store import ActivationStore

    store = ActivationStore.open(path)
    n = store.n_rows
    old = RowBlock(store.tokens(0, n), store.documents(0, n), store.flags(0, n))
    more = make_block(rows - n, store.context, seed=rows)
    block = RowBlock.concatenate([old, more])
    bits = store.rows(0, n).view(torch.uint16).numpy()
    bits = np.concatenate([bits, make_activations(more, store.d_model, seed=rows)])
    manifest = store.manifest.model_copy(update={"planned_rows": rows})
    with StoreSetWriter.open({store.layer: path}, {store.layer: manifest}) as writer:
        write_rows(writer, block, {store.layer: bits})
    return path


def tile_store(path: Path, shards: int) -> None:
    """Lengthen a finished store of whole shards to ``shards``: the others are hard links to the first ones, hashes and
    all.
    """
    manifest, (first, _) = read_manifest(path), parse_log((path / LOG).read_bytes())
    size = manifest.layout.shard_rows
    lines = [replace(first[n % len(first)], shard=n, first_row=n * size).to_line() for n in range(shards)]
    for shard in range(len(first), shards):
        for name in ARRAYS:
            os.link(path / shard_key(name, shard % len(first)), path / shard_key(name, shard))
    (path / LOG).write_bytes(b"".join(lines))
    grown = manifest.model_copy(update={"planned_rows": shards * size})
    (path / "zarr.json").write_bytes(to_json(group_document(grown)))
    for name in ARRAYS:
        (path / name / "zarr.json").write_bytes(to_json(array_document(name, manifest.layout, shards * size)))


def make_store(folder: Path, *, layer: int = 3, **options) -> Path:
    """One finished store, ``folder/l3.zarr``; options as :func:`make_stores`."""
    return make_stores(folder, [layer], **options)[layer]


# A small layout and what tests of writing and growing ask of stores in it.
LAYOUT = StoreLayout(8, 16, 4, 16)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bits_of(store: ActivationStore, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Stored bits of some rows, all by default."""
    import torch

    return store.rows(start, store.n_rows if stop is None else stop).view(torch.uint16).numpy()


def write_all(paths, block, bits):
    """Write all rows of a plan that is as long as the block."""
    with StoreSetWriter.open(paths, manifests(paths, len(block))) as writer:
        write_rows(writer, block, bits)


def manifests(layers, rows, layout=LAYOUT, **about):
    """One manifest per layer."""
    return {n: make_manifest(layer=n, layout=layout, planned_rows=rows, **about) for n in layers}
