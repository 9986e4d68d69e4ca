"""Cutting documents into rows of tokens. A row is one context of the model: BOS, then consecutive tokens.

With ``document`` packing every document is cut into rows of its own, and the tail that does not fill a row is dropped.
With ``concat`` packing documents are joined into one stream of tokens before cutting; the documents array tells which
token belongs to which document, and BOS still appears only at the beginning of a row.

Special tokens that are written out in a text are tokenised as ordinary characters, so that a text cannot contain a
false end of text.

Shapes: B rows, T positions (the context).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ...cache.format.layout import SPECIAL, RowBlock, role_flags
from ...errors import TextError
from ..config import TextSource
from ..model.load import LanguageModel, ModelOutline, name_of
from .chat import ROLE_SHIFT, ChatTemplate, Conversation
from .documents import LARGE, Content, Documents, LargeText, is_held_out, text_hash
from .given_ids import GivenIds
from .large_documents import tokenize_large
from .open import open_documents

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 64, 100_000  # a batch to be tokenised ends when it reaches one of these


@dataclass(frozen=True)
class Cursor:
    """A position in the text: the next token is token ``offset`` of document ``document``.

    ``check`` is the hash of that document's text.
    """

    document: int = 0
    offset: int = 0
    check: str = ""
    held_out_documents: int = 0
    short_documents: int = 0
    """Documents so far that are shorter than one row (``document`` packing)."""
    dropped_tokens: int = 0
    """Tokens so far in tails that do not fill a row (``document`` packing)."""
    end: bool = False
    """Whether the text ends here."""

    @classmethod
    def read(cls, record: dict[str, Any] | None) -> Cursor:
        """A cursor from its saved JSON; None gives the beginning of the text."""
        return cls(**record) if record else cls()


class Tokenized(NamedTuple):
    """One document as token ids, with its number and the hash of its text. A large one has its ids in several parts,
    which can be read once. Ids of conversations carry roles (see :class:`~tcsae.extract.text.chat.ChatTemplate`).
    """

    number: int
    parts: Iterable[np.ndarray]
    check: str


class Row(NamedTuple):
    """One row, with the cursor after it; its tokens may carry roles."""

    tokens_T: np.ndarray
    documents_T: np.ndarray
    cursor: Cursor


def row_blocks(
    text: TextSource,
    model: LanguageModel | ModelOutline,
    *,
    held_out: bool = False,
    cursor: dict[str, Any] | None = None,
    rows_per_block: int = 64,
    documents: Documents | None = None,
) -> Iterator[tuple[RowBlock, dict[str, Any]]]:
    """Blocks of ``rows_per_block`` rows (the last one may be shorter), each with the cursor after it.

    ``held_out`` yields only rows of the documents that are never extracted. ``cursor`` continues after an earlier
    block; the text before it is skipped without being tokenised. Pass ``documents`` if they are already open.

    Raises:
        TextError: the text is missing or too short for a single row, or the cursor belongs to another text.

    """
    start = Cursor.read(cursor)
    rows = read_rows(text, model, documents or open_documents(text), start, held_out=held_out)
    while block := list(islice(rows, rows_per_block)):
        yield gather(block, model.special_token_ids), asdict(block[-1].cursor)


def read_rows(
    text: TextSource,
    model: LanguageModel | ModelOutline,
    documents: Documents,
    start: Cursor,
    *,
    held_out: bool = False,
) -> Iterator[Row]:
    """The rows of :func:`row_blocks`, one by one."""
    given = GivenIds(model, text.dataset, text.text_column)
    chat = ChatTemplate(model.tokenizer, name_of(model)) if text.chat_template else None
    tokenized = tokenize(documents, model.tokenizer, text.held_out, start, given, chat, held_out=held_out)
    found = bool(start.check)
    for row in pack(tokenized, text.packing, text.context, model.bos_token_id, start):
        found = True
        yield row
    if not found:
        raise TextError(_nothing(text, held_out))


def _nothing(text: TextSource, held_out: bool) -> str:
    if held_out:
        return (
            f"{text.dataset} has no held-out document long enough for a row of {text.context} tokens at a held-out "
            f"share of {text.held_out:g}: extract with a larger --held-out, or evaluate on another --dataset"
        )
    remedy = "use --packing concat or a smaller --context" if text.packing == "document" else "give more text"
    return f"{text.dataset} fills not a single row of {text.context} tokens: {remedy}"


def tokenize(
    documents: Documents,
    tokenizer: Any,
    share: float,
    start: Cursor,
    given: GivenIds,
    chat: ChatTemplate | None,
    *,
    held_out: bool,
) -> Iterator[tuple[Tokenized, int]]:
    """Token ids of the documents that are held out (or of those that are not).

    Yields each document with the number of documents that were skipped before it. Documents are tokenised in batches
    for speed; the result is the same as one by one.
    """
    encode = partial(
        tokenizer,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )

    def parts_of(number: int, text: Content) -> Iterable[np.ndarray]:
        if isinstance(text, np.ndarray):
            return [given.checked(number, text)]
        if isinstance(text, Conversation):
            if chat is None:
                raise ValueError("conversations need a chat template")
            return [chat.tokens(text, f"document {number}")]
        large = LargeText.of(text, f"document {number}") if isinstance(text, str) else text
        return tokenize_large(large, tokenizer, encode)

    batch: list[tuple[int, str, int]] = []
    characters = passed = 0
    for number, text in documents.read(start.document):
        if number == start.document and start.check:
            _check_unchanged(text, start)
        if is_held_out(text, share) != held_out:
            passed += 1
            continue
        if isinstance(text, str) and len(text) <= LARGE:
            batch.append((number, text, passed))
            characters, passed = characters + len(text), 0
            if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield from _tokenize_batch(batch, encode)
                batch, characters = [], 0
            continue
        yield from _tokenize_batch(batch, encode)
        batch, characters = [], 0
        check = f"{text_hash(text):016x}"
        yield Tokenized(number, parts_of(number, text), check), passed
        passed = 0
    yield from _tokenize_batch(batch, encode)


def _check_unchanged(text: Content, start: Cursor) -> None:
    if f"{text_hash(text):016x}" != start.check:
        raise TextError(
            f"document {start.document} is not the one this store was reading when it stopped: the text or its order "
            "changed; restore the text, or begin anew with --fresh"
        )


def _tokenize_batch(
    batch: Sequence[tuple[int, str, int]], encode: Callable[..., Any]
) -> Iterator[tuple[Tokenized, int]]:
    if not batch:
        return
    encoded = encode([text for _, text, _ in batch])["input_ids"]
    for (number, text, passed), ids in zip(batch, encoded, strict=True):
        yield Tokenized(number, [np.asarray(ids, dtype=np.int32)], f"{text_hash(text):016x}"), passed


def pack(
    documents: Iterable[tuple[Tokenized, int]], packing: str, context: int, bos: int | None, start: Cursor | None = None
) -> Iterator[Row]:
    """Rows of ``context`` tokens from tokenised documents, from ``start`` on; the top of this file explains packing."""
    start = start or Cursor()
    body = context - (bos is not None)
    return (_by_document if packing == "document" else _joined)(documents, body, bos, start)


def _by_document(
    documents: Iterable[tuple[Tokenized, int]], body: int, bos: int | None, cursor: Cursor
) -> Iterator[Row]:
    for document, passed in documents:
        offset = cursor.offset if document.number == cursor.document else 0
        cursor = replace(
            cursor,
            document=document.number,
            offset=offset,
            check=document.check,
            held_out_documents=cursor.held_out_documents + passed,
        )
        rest, total = np.empty(0, np.int32), 0
        for ids in document.parts:
            rest = np.concatenate([rest, _after(ids, offset - total)])
            total += len(ids)
            whole = len(rest) // body
            for row_ids in rest[: whole * body].reshape(whole, body):
                cursor = replace(cursor, offset=cursor.offset + body)
                tokens_T = _with_bos(row_ids, bos)
                yield Row(tokens_T, np.full(len(tokens_T), document.number, np.int32), cursor)
            rest = rest[whole * body :]
        cursor = replace(
            cursor,
            dropped_tokens=cursor.dropped_tokens + len(rest),
            short_documents=cursor.short_documents + (total < body),
        )


def _joined(documents: Iterable[tuple[Tokenized, int]], body: int, bos: int | None, cursor: Cursor) -> Iterator[Row]:
    ids: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    missing = body
    for document, passed in documents:
        offset = cursor.offset if document.number == cursor.document else 0
        cursor = replace(
            cursor,
            document=document.number,
            check=document.check,
            held_out_documents=cursor.held_out_documents + passed,
        )
        total = 0
        for part in document.parts:
            left = _after(part, offset - total)
            total += len(part)
            while len(left):
                piece, left = left[:missing], left[missing:]
                ids.append(piece)
                numbers.append(np.full(len(piece), document.number, np.int32))
                missing -= len(piece)
                if not missing:
                    cursor = replace(cursor, offset=total - len(left))
                    documents_T = np.concatenate(numbers)
                    if bos is not None:
                        documents_T = np.concatenate([documents_T[:1], documents_T])
                    yield Row(_with_bos(np.concatenate(ids), bos), documents_T, cursor)
                    ids, numbers, missing = [], [], body
        cursor = replace(cursor, offset=total)


def _after(ids: np.ndarray, n: int) -> np.ndarray:
    """Without the first ``n``, if n is positive."""
    return ids[max(0, n) :]


def _with_bos(ids: np.ndarray, bos: int | None) -> np.ndarray:
    return ids if bos is None else np.concatenate([np.array([bos], np.int32), ids])


def gather(rows: Sequence[Row], special_token_ids: Sequence[int]) -> RowBlock:
    """Stack rows into a block and flag the special tokens."""
    carried_BT = np.stack([row.tokens_T for row in rows])
    tokens_BT = carried_BT & ((1 << ROLE_SHIFT) - 1)
    flags_BT = np.where(np.isin(tokens_BT, np.asarray(special_token_ids, np.int32)), SPECIAL, 0).astype(np.uint8)
    flags_BT |= role_flags(carried_BT >> ROLE_SHIFT)
    return RowBlock(tokens_BT, np.stack([row.documents_T for row in rows]), flags_BT)
