"""What a destination remembers of what it took, so that nothing comes back that has ended since.

A token that was copied, used and purged is gone from the destination, while the source may still hold it as
it was. So the destination writes down what it took from which source, and takes none of that again.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final, NamedTuple, Self

from vtoken.backend import TokenBackend
from vtoken.errors import CorruptStore

_SEED: Final = "seed"


class CopyReceipt(NamedTuple):
    """What was taken from another store, by the ids of its tokens.

    A copy reads tokens from the newest to the oldest. So what was taken is everything up to ``floor``, by the
    copies that came to their end, and what lies from ``reached`` to ``top``, by the one that did not, if any.
    """

    floor: str = ""
    top: str = ""
    reached: str = ""

    @classmethod
    async def read(cls, destination: TokenBackend, name: str) -> Self:
        """The receipt that the destination has under a name; an empty one where it has none."""
        text = await destination.note(name, "")
        if not text:
            return cls()
        found = re.fullmatch("([0-9a-f]*) ([0-9a-f]*) ([0-9a-f]*)", text)
        if found is None:
            raise CorruptStore("the store's receipt of an earlier copy is damaged")
        return cls(floor=found[1], top=found[2], reached=found[3])

    async def write(self, destination: TokenBackend, name: str) -> None:
        """Write the receipt down under a name."""
        await destination.note(name, f"{self.floor} {self.top} {self.reached}", replace=True)


class ImportReceipt(NamedTuple):
    """What was taken from the dumps of another application."""

    floor: int = 0
    """Tokens that were created up to this moment were taken, by the imports that came to their end."""
    dump: str = ""
    """The digest of the dump whose import did not come to its end, ``""`` for none."""
    done: int = 0
    """How many of its tokens were taken."""

    @classmethod
    async def read(cls, destination: TokenBackend, name: str) -> Self:
        """The receipt that the destination has under a name; an empty one where it has none."""
        text = await destination.note(name, "")
        if not text:
            return cls()
        found = re.fullmatch("([0-9]{1,18}) ([0-9a-f]*) ([0-9]{1,18})", text)
        if found is None:
            raise CorruptStore("the store's receipt of an earlier import is damaged")
        return cls(floor=int(found[1]), dump=found[2], done=int(found[3]))

    async def write(self, destination: TokenBackend, name: str) -> None:
        """Write the receipt down under a name."""
        await destination.note(name, f"{self.floor} {self.dump} {self.done}", replace=True)


def import_receipt_name(source: str) -> str:
    """The name under which a store keeps its receipt of an application's dumps."""
    return f"imported-from:{_short_digest(source)}"


async def copy_receipt_name(source: TokenBackend) -> str:
    """The name under which destinations keep their receipts of a source.

    The source is known by its seed, the random value that it keeps beside its schema, which goes with the
    store where a file or a database is moved or restored. Of the seed itself the destination learns nothing.
    """
    seed = await source.note(_SEED, "") or await source.note(_SEED, secrets.token_hex(32))
    return f"copied-from:{_short_digest(seed)}"


def _short_digest(text: str) -> str:
    return hashlib.sha256(b"vtoken:receipt:v1" + text.encode()).hexdigest()[:32]
