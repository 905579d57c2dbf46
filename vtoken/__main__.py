"""``python -m vtoken`` and the console script ``vtoken``."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Run the command line; without the ``cli`` extra, say how to install it and exit with status 2."""
    try:
        from vtoken.cli import main as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("vtoken"):
            raise
        message = f'the command line needs {missing}: pip install "vtoken[cli]"'
        as_json = json.dumps({"error": "ConfigurationError", "message": message})
        print(as_json if "--json" in sys.argv else f"vtoken: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # while the packages are loaded
        sys.exit(130)
    sys.exit(run())


if __name__ == "__main__":
    main()
