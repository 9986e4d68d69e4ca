"""Opening the text of an extraction, and describing it for the manifest."""

from __future__ import annotations

from ...cache.format.manifest import TEMPLATE, TextIdentity
from ..config import TextSource
from ..model.load import LanguageModel, ModelOutline, name_of
from .chat import ChatTemplate
from .documents import Documents, is_held_out
from .hub_stream import open_stream
from .local_files import looks_local, open_local, recorded_path

__all__ = ["is_held_out", "open_documents", "resolve_text"]


def resolve_text(
    source: TextSource, model: LanguageModel | ModelOutline, documents: Documents | None = None
) -> TextIdentity:
    """What the manifest records about text and rows; pass ``documents`` if they are already open.

    Raises:
        TextError: as :func:`open_documents`.

    """
    documents = documents or open_documents(source)
    template = f"{TEMPLATE}{ChatTemplate(model.tokenizer, name_of(model)).sha256}" if source.chat_template else ""
    return TextIdentity(
        dataset=recorded_name(source),
        split=source.split,
        revision=documents.revision,
        text_column=getattr(documents, "column", source.text_column),
        label_column=source.label_column,
        fingerprint=documents.fingerprint + template,
        packing=source.packing,
        context=source.context,
        bos_token_id=model.bos_token_id,
        special_token_ids=model.special_token_ids,
        seed=source.seed,
        held_out=source.held_out,
    )


def recorded_name(source: TextSource) -> str:
    """The dataset's name in the manifest. Local files have their absolute path, so that evaluation finds them."""
    path = None if source.dataset == "demo" else recorded_path(source.dataset)
    return path or source.dataset


def open_documents(source: TextSource) -> Documents:
    """The documents that ``source`` names, in the order given by its seed.

    Raises:
        TextError: there is no such text, split or column, it is empty, or the hub cannot be reached.

    """
    if source.dataset == "demo":
        from ..assets import demo_text

        return open_local(demo_text(), source)
    return open_local(source.dataset, source) if looks_local(source.dataset) else open_stream(source)
