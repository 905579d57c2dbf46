"""Moving tokens: from one store to another, and from the Django application that this library grew out of."""

from vtoken.migrate.copying import Copied, copy
from vtoken.migrate.dumpdata import DumpReader
from vtoken.migrate.importing import Imported, import_tokens
from vtoken.migrate.stores import pages

__all__ = ["Copied", "DumpReader", "Imported", "copy", "import_tokens", "pages"]
