"""Moving tokens: from one store to another, and from the Django application that this library grew out of."""

from vtoken.migrate.copying import Copied, copy
from vtoken.migrate.dumpdata import DumpReader, Useless
from vtoken.migrate.importing import Imported, check_secret, import_tokens
from vtoken.migrate.stores import pages

__all__ = ["Copied", "DumpReader", "Imported", "Useless", "check_secret", "copy", "import_tokens", "pages"]
