"""The record of how far a store got, which lies beside `live`: less than it says is damage, and never a new store.

    <store>/begun    two slots of the store's id, the number of its live environment and its last commit

LMDB cannot tell an environment that lost its content from one that is new. This file can. The writer fills the slots in
turn, one after each commit (`loaders.begun_file`), so that a slot whose write was cut off leaves the other. The record
is never ahead of what `live` has on the disk, and may be behind it: by one commit if the writer was killed, by those
of about a second if power failed.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

from engine.errors import StoreUnreadable

NAME = "begun"
SLOT_OFFSETS = (0, 4096)
"""In bytes: each slot is alone in its block."""
FILE_BYTES = 8192
ID_BYTES = 16

_SLOT = struct.Struct(f"<8s{ID_BYTES}sQQ")  # Magic, store id, number of the live environment, commit.
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"SHOALBGN"


@dataclass(frozen=True)
class Begun:
    """The state that a store had: its id, the number of its live environment, and that environment's last commit."""

    store_id: bytes
    live: int
    commit: int

    @property
    def is_readable(self) -> bool:
        """False if both slots are damaged: the store was begun, and nothing is known about how far it got."""
        return self.store_id != b""

    def __str__(self) -> str:
        if not self.is_readable:
            return "a record that cannot be read"
        return f"store {self.store_id.hex()[:8]} at commit {self.commit} of live/{self.live}"


_UNREADABLE = Begun(b"", 0, 0)


def begun_path(store: Path) -> Path:
    """Where the record of a store is."""
    return store / NAME


def read_begun(store: Path) -> Begun | None:
    """The record of a store. None if it has none: it is new, or was last written by a release without this record.

    Raises:
        StoreUnreadable: the system does not let the file be read now.
    """
    try:
        content = begun_path(store).read_bytes()[:FILE_BYTES]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreUnreadable(f"{begun_path(store)} cannot be read now: {error}") from error
    slots = [slot for offset in SLOT_OFFSETS if (slot := decode_slot(content, offset)) is not None]
    return max(slots, key=lambda begun: (begun.commit, begun.live), default=_UNREADABLE)


def decode_slot(content: bytes, offset: int) -> Begun | None:
    """The slot at an offset in a record's content; None if it is not whole."""
    slot = content[offset : offset + _SLOT.size + _CHECKSUM.size]
    if len(slot) < _SLOT.size + _CHECKSUM.size:
        return None
    magic, store_id, live, commit = _SLOT.unpack_from(slot)
    (checksum,) = _CHECKSUM.unpack_from(slot, _SLOT.size)
    is_whole = magic == _MAGIC and checksum == xxhash.xxh3_64_intdigest(slot[: _SLOT.size])
    return Begun(store_id, live, commit) if is_whole else None


def encode_slot(begun: Begun) -> bytes:
    """One slot."""
    content = _SLOT.pack(_MAGIC, begun.store_id, begun.live, begun.commit)
    return content + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(content))


def encode_file(begun: Begun) -> bytes:
    """A whole new file, with the same record in both slots."""
    content = bytearray(FILE_BYTES)
    slot = encode_slot(begun)
    for offset in SLOT_OFFSETS:
        content[offset : offset + len(slot)] = slot
    return bytes(content)
