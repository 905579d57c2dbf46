"""Why targets are not reached, in a few words; the page says more. By how the title of a target begins."""

from typing import Final

WHY_NOT: Final[dict[str, str]] = {}
