"""The driver's errors, translated: what they mean for the caller, and which host or setting is to blame.

No message quotes a document, a query or a URL; host names are no secret.
"""

from __future__ import annotations

import re
from typing import Any, Final, cast

from bson.errors import InvalidBSON
from pymongo import errors

from vtoken.errors import BackendClosed, BackendError, BackendUnavailable, CorruptStore, OutcomeUnknown

Details = dict[str, Any]

_DENIED: Final = frozenset({13, 18})
_INTERRUPTED: Final = frozenset(
    {6, 7, 50, 64, 89, 91, 100, 189, 262, 9001, 10107, 11600, 11601, 11602, 13435, 13436}
)
"""Codes of MongoDB's specification of retryable writes, of time limits, and of the write concern."""
_NOT_PRIMARY: Final = frozenset({10107, 13435, 10058})
_CONFLICT: Final = 112
_TRANSIENT: Final = "TransientTransactionError"
_RUN_AGAIN: Final = (
    "MongoDB: another write was quicker than the transaction: run it again, as session.with_transaction()"
    " does by itself"
)
_NO_SPACE: Final = frozenset({14031, 28})
_OVER_QUOTA: Final = 8000
_BAD_HINT: Final = re.compile("hint provided does not correspond|bad hint", re.IGNORECASE)


class Duplicate(BackendError):
    """A unique index refused a write. It never leaves the backend."""


class Conflict(BackendError):
    """Another write of the same document was quicker; nothing happened. It never leaves the backend."""


class Blocked(BackendError):
    """A document stays changed by a transaction that is not committed yet; nothing happened. It never leaves
    the backend."""


class TransientFailure(BackendUnavailable, errors.PyMongoError):
    """A transaction of the application's own has to run again: another write was quicker, or the server has
    ended it for another passing reason.

    It is an error of PyMongo's as well, and has the label of such ones: for no other one does
    ``with_transaction`` run a transaction again.
    """

    def __init__(self, message: str = _RUN_AGAIN) -> None:
        errors.PyMongoError.__init__(self, message, [_TRANSIENT])


def translated_within(error: Exception, *, names: str, topology: Any = None) -> BackendError:
    """What the caller is told within a transaction, where nothing that has failed can have happened.

    Args:
        error: as for :func:`translated`, as are the others.
        names: likewise.
        topology: likewise.
    """
    failure = translated(error, writes=False, names=names, topology=topology)
    if isinstance(failure, Conflict | Duplicate):
        return TransientFailure()
    if isinstance(error, errors.PyMongoError) and error.has_error_label(_TRANSIENT):
        return TransientFailure(f"{failure}; run the transaction again")
    return failure


def translated(error: Exception, *, writes: bool, names: str, topology: Any = None) -> BackendError:
    """What the caller is told instead of a driver's error.

    Args:
        error: the driver's, or one of ours about a document.
        writes: whether the operation would have left something behind.
        names: the index that look-ups go by, as the message shall name it.
        topology: what the driver knows of each server.
    """
    if isinstance(error, CorruptStore):
        return CorruptStore(*error.args)
    if isinstance(error, InvalidBSON):
        return CorruptStore("MongoDB: a document is damaged")
    if isinstance(error, errors.InvalidOperation):
        return BackendClosed("the MongoDB client was closed")
    if not isinstance(error, errors.PyMongoError):
        return BackendError(f"MongoDB: {type(error).__name__}")
    if isinstance(error, errors.ServerSelectionTimeoutError):
        return BackendUnavailable(f"MongoDB: {_why_no_server(error, topology)}")
    if isinstance(error, errors.ConfigurationError):
        return BackendUnavailable(_why_refused(error))
    return _translated_answer(error, writes, names)


def _translated_answer(error: errors.PyMongoError, writes: bool, names: str) -> BackendError:
    """Of an error that came after a server had been selected."""
    details = getattr(error, "details", None)
    details = details if isinstance(details, dict) else {}
    if isinstance(error, errors.BulkWriteError):
        details = worst(details)
    code = details.get("code", getattr(error, "code", None))
    text = str(details.get("errmsg", error))
    said = type(error).__name__.lstrip("_") + (
        f", code {code} {details.get('codeName', '')}".rstrip() if code else ""
    )
    if code == 11000:
        return Duplicate("MongoDB: duplicate key")
    if code == _CONFLICT:
        return Conflict("MongoDB: write conflict")
    if code == 2 and _BAD_HINT.search(text):
        return missing_index(names)
    if code == _OVER_QUOTA and re.search("quota|space", text, re.IGNORECASE):
        return BackendUnavailable(f"MongoDB: the cluster is over its storage quota ({said})")
    if code in _DENIED or code == _OVER_QUOTA:
        return BackendUnavailable(
            f"MongoDB: access denied ({said}): check the user, its password and its roles"
        )
    if code in _NO_SPACE:
        return BackendUnavailable(f"MongoDB: the server has no disk space left ({said})")
    # After a lost connection PyMongo tries again with a transaction number, which a standalone server
    # refuses: that attempt was not carried out, the one before may have been.
    lost = isinstance(error, errors.ConnectionFailure | errors.WriteConcernError | errors.ExecutionTimeout)
    lost = lost or (code == 20 and "retryable writes" in str(error))
    if not lost and code not in _INTERRUPTED and "writeConcernError" not in details:
        return BackendError(f"MongoDB refused ({said})")
    not_sent = isinstance(error, errors.WaitQueueTimeoutError) or error.has_error_label("NoWritesPerformed")
    if code in _NOT_PRIMARY:
        said = f"the server is not the primary of its replica set; {said}"
    if not writes or not_sent:
        return BackendUnavailable(f"MongoDB: interrupted ({said})")
    return OutcomeUnknown(f"MongoDB: the write may or may not have happened ({said})")


def missing_index(names: str) -> CorruptStore:
    """The error of an index without which nothing may be written."""
    return CorruptStore(
        f"MongoDB: the unique index {names} is missing; nothing is written without it. Open the store"
        " again: that makes the index, unless there are duplicates"
    )


def worst(details: Details) -> Details:
    """Of a bulk write's problems one that leaves its outcome unknown, if there is such a one."""
    problems: list[Details] = [*details.get("writeConcernErrors", ()), *details.get("writeErrors", ())]
    interrupted = (problem for problem in problems if problem.get("code") in _INTERRUPTED)
    return next(interrupted, problems[0] if problems else {})


def refusals(error: errors.BulkWriteError, names: str) -> dict[int, BackendError]:
    """What became of each refused step of a bulk write; nothing where the outcome of others is unknown."""
    details = cast("Details", error.details)
    problems: list[Details] = details.get("writeErrors", [])
    if details.get("writeConcernErrors") or worst(details).get("code") in _INTERRUPTED:
        return {}
    return {
        problem["index"]: _translated_answer(errors.WriteError("", problem["code"], problem), True, names)
        for problem in problems
    }


_CAUSES: Final = (
    (
        "nodename nor servname|name or service not known|name resolution|getaddrinfo|no address associated",
        "there is no host of that name",
    ),
    (
        "certificate verify failed: (self|unable to get|unable to verify)",
        "its certificate is not from a known CA: set tlsCAFile",
    ),
    ("hostname mismatch|doesn't match|not valid for", "its certificate is for another host name"),
    ("certificate verify failed", "its certificate is not valid"),
    ("wrong version number|record layer failure|unknown protocol", "it speaks no TLS: leave tls=true out"),
    (
        "certificate required|handshake failure|bad certificate",
        "it refused our TLS certificate: set tlsCertificateKeyFile",
    ),
    ("ssl handshake failed", "the TLS handshake failed: does it speak TLS, as the URL says?"),
    ("connection refused|errno 111|connect call failed", "nothing listens on that port"),
    (
        "connection closed|connection reset|incomplete read",
        "it closed the connection: does it want tls=true?",
    ),
    ("timed out|timeout", "it does not answer"),
    ("network is unreachable|no route to host", "there is no way to it in the network"),
)
"""What the driver knows of a server, by what its message says."""


def _why_no_server(error: errors.ServerSelectionTimeoutError, topology: Any) -> str:
    """What the driver knows of each server that it could not use."""
    servers = topology.server_descriptions() if topology is not None else {}
    name = getattr(topology, "replica_set_name", None)
    said = [f"{host}:{port}: {_why_not(server, name)}" for (host, port), server in sorted(servers.items())]
    if not said and name is not None:
        said.append(f"none of the hosts is a member of a replica set {name!r}: check replicaSet in the URL")
    why = "; ".join(said) or cause_of(str(error)) or "none was found"
    return f"no server answers ({why})"


def _why_not(server: Any, set_name: str | None) -> str:
    if server.error is not None:
        return cause_of(str(server.error)) or type(server.error).__name__.lstrip("_")
    if set_name and server.replica_set_name and server.replica_set_name != set_name:
        return f"it belongs to the replica set {server.replica_set_name!r}, not {set_name!r}"
    return f"it is {server.server_type_name}, and a primary is needed"


def cause_of(message: str) -> str | None:
    """A cause in plain words, of a message of the driver or the operating system."""
    said = message.partition("(configured timeouts")[0]
    for pattern, cause in _CAUSES:
        if re.search(pattern, said, re.IGNORECASE):
            return cause
    return None


def _why_refused(error: errors.PyMongoError) -> str:
    text = str(error)
    if re.search("dns|query name|resolution|srv|nodename", text, re.IGNORECASE):
        return "MongoDB: the driver finds no SRV record for the host of the URL; is its name right?"
    return f"MongoDB: the driver refuses the settings of the URL ({type(error).__name__.lstrip('_')})"
