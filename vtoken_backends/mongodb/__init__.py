"""Tokens in MongoDB.

- ``backend``: the class, and what its methods do.
- ``documents``: what is stored, and how records become documents.
- ``lines``: what becomes of a document by each operation, without input or output.
- ``commands``: operations that are one command.
- ``writes``: every other operation: read, decide, compare and set; alone and in batches.
- ``budgets``, ``purging``, ``schema``: what their names say.
- ``client``, ``failures``, ``urls``: the driver's client, its errors, and its URLs.
"""

from vtoken_backends.mongodb.backend import MongoDBBackend

__all__ = ["MongoDBBackend"]
