"""The progress record of a store, in a file next to `live`. A store that is behind its record is damaged; it is never a
new store.

    <store>/begun    two slots of the store's id, the number of its live environment and its last commit

LMDB cannot distinguish an environment that lost its content from a new environment. With this file, Shoal can
distinguish them. The writer fills the slots alternately, one slot after each commit
(`shoal.loaders.commit.progress_file`). An interrupted write of one slot therefore leaves the other slot intact. The
record is never ahead of the data of `live` on the disk. The record may be behind the data: by one commit if the writer
was killed, and by the commits of about one second after a power failure.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shoal.engine.base.errors import StoreUnreadable

NAME = "begun"
SLOT_OFFSETS = (0, 4096)
"""The offsets of the slots in bytes. Each slot is in a disk block of its own."""
FILE_BYTES = 8192
ID_BYTES = 16

_SLOT = struct.Struct(f"<8s{ID_BYTES}sQQ")  # Magic, store id, number of the live environment, commit.
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"SHOALBGN"


@dataclass(frozen=True)
class Begun:
    """The recorded state of a store: its id, the number of its live environment, and that environment's last commit."""

    store_id: bytes
    live: int
    commit: int

    @property
    def is_readable(self) -> bool:
        """Whether a slot of the record is intact. If no slot is intact, the store is not new, but its last commit is
        unknown."""
        return self.store_id != b""

    def __str__(self) -> str:
        if not self.is_readable:
            return "a record that cannot be read"
        return f"store {self.store_id.hex()[:8]} at commit {self.commit} of live/{self.live}"


_UNREADABLE = Begun(b"", 0, 0)


def begun_path(store: Path) -> Path:
    """Return the path of a store's progress record."""
    return store / NAME


def read_begun(store: Path) -> Begun | None:
    """Read the progress record of a store. Return None if there is no record: the store is new, or was last written by
    a release without this record.

    Raises:
        StoreUnreadable: the operating system currently refuses to read the file.
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
    """Decode the slot at an offset in a record's content; return None if the slot is incomplete or damaged."""
    slot = content[offset : offset + _SLOT.size + _CHECKSUM.size]
    if len(slot) < _SLOT.size + _CHECKSUM.size:
        return None
    magic, store_id, live, commit = _SLOT.unpack_from(slot)
    (checksum,) = _CHECKSUM.unpack_from(slot, _SLOT.size)
    is_whole = magic == _MAGIC and checksum == xxhash.xxh3_64_intdigest(slot[: _SLOT.size])
    return Begun(store_id, live, commit) if is_whole else None


def encode_slot(begun: Begun) -> bytes:
    """Return the bytes of one slot."""
    content = _SLOT.pack(_MAGIC, begun.store_id, begun.live, begun.commit)
    return content + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(content))


def encode_file(begun: Begun) -> bytes:
    """Return the content of a new file, with the same record in both slots."""
    content = bytearray(FILE_BYTES)
    slot = encode_slot(begun)
    for offset in SLOT_OFFSETS:
        content[offset : offset + len(slot)] = slot
    return bytes(content)
