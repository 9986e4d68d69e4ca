"""Preparing stores for writing.

New stores are created and existing ones are recognised; all layers are brought to their common last commit; and the
free disk space is checked.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping

import numpy as np

from ..console import format_bytes
from ..errors import ResourceError, StoreError
from ..sites import Location
from .format.commit_log import LOG, agreed, rows_in, table_of
from .format.layout import StoreLayout
from .format.log_index import FILES, IndexedLog, open_log
from .format.manifest import StoreManifest, first_difference, group_document, manifest_at
from .format.zarr_documents import ARRAYS, array_document, shard_key, shard_of_name, to_json
from .storage.local import PARTIAL, LocalPlace
from .storage.lock import LOCK, Lock, acquire
from .storage.places import Place

_SPARE_BYTES = 64_000_000  # to be left free on the disk, or a tenth of the plan if that is less


def lock_all(places: Mapping[Location, Place], *, fresh: bool) -> list[Lock]:
    """Take the writer's locks of all stores, all with one token. If one fails, all are released.

    Raises:
        StoreError: a folder holds other files, another process writes one of the stores, or permission is missing.

    """
    locks: list[Lock] = []
    owner = uuid.uuid4().hex
    try:
        for _, place in sorted(places.items()):
            _refuse_foreign(place, fresh=fresh)
            place.make_folder("activations")
            locks.append(acquire(place, owner))
    except BaseException:
        for lock in locks:
            lock.release()
        raise
    return locks


def _refuse_foreign(place: Place, *, fresh: bool) -> None:
    """Refuse a folder that holds anything but a store, so that no user's file is ever overwritten or deleted."""
    names = [name for name in place.names("") if not is_partial("", name)]
    if "zarr.json" in names:
        try:
            manifest_at(place)
        except StoreError:
            if not fresh or not set(names) <= {*ARRAYS, "zarr.json"}:
                raise
    elif not set(names) <= set(ARRAYS):
        raise StoreError(f"{place} is a folder with other things in it: name a new or empty one")


def open_or_create(place: Place, manifest: StoreManifest, *, fresh: bool) -> StoreManifest:
    """The manifest of the store at ``place``, which is created from ``manifest`` if there is none.

    Raises:
        StoreError: the store holds other data; the first differing field is named.

    """
    if fresh or not place.exists("zarr.json"):
        _wipe(place)
        for name in ARRAYS:
            place.make_folder(name)
            place.replace(f"{name}/zarr.json", to_json(array_document(name, manifest.layout, 0)))
        place.replace(LOG, b"")
        created = manifest.model_copy(update={"finished": False})
        place.replace("zarr.json", to_json(group_document(created)))
        return created
    stored = manifest_at(place)
    difference = first_difference(stored, manifest)
    if difference:
        raise StoreError(other_rows(place, difference))
    return stored


def other_rows(path: object, difference: str) -> str:
    """The error message when a store holds other data than requested."""
    return f"{path} holds other rows ({difference}): choose another --out, or --fresh to begin it anew"


def _wipe(place: Place) -> None:
    place.remove("zarr.json")  # first: if the process is killed here, what remains does not count as a store
    remove_partial(place, "")
    for folder in ARRAYS:
        for name in place.names(folder):
            if f"{folder}/{name}" != LOCK:
                place.remove(f"{folder}/{name}")


def remove_partial(place: Place, folder: str) -> None:
    """Remove the unfinished files of earlier writers from a folder. Only local stores have such files."""
    for name in place.names(folder) if place.local else []:
        if is_partial(folder, name):
            place.remove(f"{folder}/{name}" if folder else name)


def is_partial(folder: str, name: str) -> bool:
    """Whether a file is one of our unfinished files. Outside the array folders only ``zarr.json`` can be unfinished."""
    return name.endswith(PARTIAL) and (folder != "" or name.startswith("zarr.json."))


def recover(places: Mapping[Location, Place], layouts: Mapping[Location, StoreLayout]) -> dict[Location, IndexedLog]:
    """Cut every layer's log to the commits that all layers have, and remove the leftovers of a killed writer.

    Raises:
        StoreError: a log is damaged before its last line, the layers differ by more than one commit (a crash explains
            only one), or a committed file is missing or has another size.

    """
    logs = {layer: _sound_log(place) for layer, place in places.items()}
    shard_rows = {layout.shard_rows for layout in layouts.values()}
    kept = agreed(logs, [layer for layer, place in places.items() if manifest_at(place).finished])
    if kept is None or len(shard_rows) > 1:
        raise StoreError(uneven({str(places[layer]): rows_in(log) for layer, log in logs.items()}, shard_rows))
    for layer, place in places.items():
        if len(kept[layer]) < len(logs[layer]):
            whole = place.read(LOG)  # its last line goes
            place.replace(LOG, whole[: whole.rstrip(b"\n").rfind(b"\n") + 1])
        _clean(place, kept[layer])
        _repair_shapes(place, layouts[layer], rows_in(kept[layer]))
    return kept


def uneven(rows: Mapping[str, int], shard_rows: Collection[int]) -> str:
    """The error message for stores (path → rows) that cannot be continued together, without the command that helps."""
    if len(shard_rows) > 1:
        sizes = " and ".join(map(str, sorted(shard_rows)))
        return (
            f"{' and '.join(rows)} have shards of {sizes} rows and cannot be written together: name one layer at a time"
        )
    longest, shortest = max(rows, key=rows.__getitem__), min(rows, key=rows.__getitem__)
    return (
        f"{longest} holds {rows[longest]} rows but {shortest} {rows[shortest]}: stores written together grow together, "
        "so extract what is missing by itself first, or all of them with --fresh"
    )


def _sound_log(place: Place) -> IndexedLog:
    try:
        log, size = open_log(place)
    except FileNotFoundError:
        raise StoreError(
            f"{place}/{LOG} is missing, so nothing says which rows are good: restore it or use --fresh"
        ) from None
    rest = bytearray(size - log.sound)
    place.read_into(LOG, log.sound, [rest])
    if rest.count(b"\n") > 1 or (b"\n" in rest and not rest.endswith(b"\n")):
        raise StoreError(f"{place}/{LOG} is damaged at line {len(log) + 1}, before its end: restore it or use --fresh")
    if rest:  # a line that a crash left incomplete: its shard will be written again
        place.replace(LOG, place.read(LOG)[: log.sound])
    return log


def _clean(place: Place, log: IndexedLog) -> None:
    """Remove partial files and uncommitted shards, and check that the committed files are there."""
    shards = int(table_of(log)[-1, 0]) + 1 if len(log) else 0
    remove_partial(place, "")
    wanted = log.file_sizes() if isinstance(place, LocalPlace) else None  # elsewhere it would be one request per file
    for at, name in enumerate(FILES):
        found, gone = np.full(shards, -1, np.int64), list[str]()
        for file, size in place.sizes(name) if isinstance(place, LocalPlace) else ((f, 0) for f in place.names(name)):
            shard = shard_of_name(name, file)
            if (is_partial(name, file) and place.local) or (shard is not None and shard >= shards):
                gone.append(file)
            elif shard is not None:
                found[shard] = size
        for file in gone:
            place.remove(f"{name}/{file}")
        if wanted is not None:
            _compare_sizes(place, name, found, wanted[:, at])


def _compare_sizes(place: Place, name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    wrong = (found != wanted) & (wanted >= 0)
    if len(wrong) and found[-1] > 0:
        # The last shard may have been replaced by a longer one just before the process died and lost its commit.
        wrong[-1] = False
    if wrong.any():
        shard = int(wrong.argmax())
        size = int(found[shard])
        held = "is missing" if size < 0 else f"has {size} bytes where {wanted[shard]} were committed"
        raise StoreError(f"{place}/{shard_key(name, shard)} {held}: restore it or extract anew with --fresh")


def _repair_shapes(place: Place, layout: StoreLayout, rows: int) -> None:
    for name in ARRAYS:
        wanted = to_json(array_document(name, layout, rows))
        if not place.exists(f"{name}/zarr.json") or place.read(f"{name}/zarr.json") != wanted:
            place.replace(f"{name}/zarr.json", wanted)


def wiped_bytes(place: Place) -> int:
    """Bytes of disk space that ``fresh`` frees by removing the present store; 0 for object storage."""
    if not isinstance(place, LocalPlace):
        return 0
    keys = ["zarr.json", *(f"{folder}/{name}" for folder in ARRAYS for name in place.names(folder))]
    found = [place.path(key).stat() for key in keys if place.exists(key)]
    return sum(file.st_blocks * 512 for file in found if file.st_nlink == 1)


def check_space(
    places: Mapping[Location, Place],
    layouts: Mapping[Location, StoreLayout],
    planned: int,
    committed: int,
    *,
    fresh: bool = False,
) -> None:
    """Check that the rows still to be written fit on the disk, uncompressed and with a small reserve.

    Stores on the same file system are added up. With ``fresh``, the space of the present files counts as free, since
    they will be removed first.

    Raises:
        ResourceError: they do not fit; the message gives the bytes needed and the bytes free.

    """
    needed: dict[object, int] = {}
    free: dict[object, int] = {}
    for layer, place in places.items():
        found = place.free_bytes()
        if found is not None and planned > committed:
            where = found[0]
            free[where] = free.get(where, found[1]) + (wiped_bytes(place) if fresh else 0)
            layout = layouts[layer]
            more = layout.store_bytes(planned) - layout.store_bytes(committed)
            needed[where] = needed.get(where, 0) + more
    gone = " once --fresh has removed what is there" if fresh else ""
    for where, wanted in needed.items():
        if wanted + min(_SPARE_BYTES, wanted // 10) > free[where]:
            raise ResourceError(
                f"{format_bytes(wanted)} more are needed ({wanted:,} bytes for {planned - committed} rows × "
                f"{len(places)} layers) and {format_bytes(free[where])} are free{gone}: free some space, or ask for "
                "fewer tokens or layers"
            )
