"""``python -m password_reset``: run the application on the address of its base URL."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import uvicorn

from password_reset.app import create_app
from password_reset.config import Config


def main() -> None:
    """Run the application until it is interrupted."""
    config = Config.from_env(os.environ)
    here = urlsplit(config.base_url)
    # No access log: the URL of a link holds its key.
    uvicorn.run(
        create_app(config), host=here.hostname or "127.0.0.1", port=here.port or 8000, access_log=False
    )


if __name__ == "__main__":
    main()
