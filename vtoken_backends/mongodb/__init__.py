"""Tokens in MongoDB.

- ``backend``: the class, its URL, its life, and its batches.
- ``store``: what its methods do.
- ``transactions``: the same store through a transaction of the application's own.
- ``documents``: what is stored, and how records become documents.
- ``lines``: what becomes of a document by each operation, without input or output.
- ``commands``: operations that are one command.
- ``writes``: every other operation: read, decide, compare and set; alone and in batches.
- ``budgets``, ``purging``, ``schema``: what their names say.
- ``client``, ``collections``, ``failures``, ``urls``, ``command_log``: the driver's client, its collections,
  errors, URLs and log.
- ``diagnostics``: what the command line asks about a server.
"""

from vtoken_backends.mongodb.backend import MongoDBBackend

__all__ = ["MongoDBBackend"]
