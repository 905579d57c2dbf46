"""A suite proves nothing until it has failed: every planted bug is caught by the case named for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import pytest

from tests import test_memory_conformance as memory
from tests.broken import BROKEN, Broken
from vtoken import guess, subject
from vtoken.backend import TokenBackend
from vtoken.errors import VTokenError
from vtoken.keys import Digest, Digests, Keyring
from vtoken.policy import Rules, Settings, TokenPolicy
from vtoken.testing import BackendConformance, DurableBackendConformance
from vtoken_backends.memory import MemoryBackend

FAILURES = (AssertionError, VTokenError)
"""How a case fails: by its own assertion, or because a call that must succeed is refused."""


def run(case: str, directory: Path, kind: type[MemoryBackend] = MemoryBackend) -> None:
    """Run one case on a backend of this kind."""

    class Suite(memory.TestMemory):
        def backend(self, store: str) -> TokenBackend:
            return kind.from_url(store)

    getattr(Suite(), case)(directory)


@pytest.mark.parametrize("case", sorted({broken.case for broken in BROKEN}))
def test_the_unbroken_backend_passes(case: str, tmp_path: Path) -> None:
    run(case, tmp_path)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.backend.__name__}-{broken.case}")
def test_the_broken_backend_is_caught(broken: Broken, tmp_path: Path) -> None:
    with pytest.raises(FAILURES):
        run(broken.case, tmp_path, broken.backend)


def test_a_stored_plaintext_key_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("test_the_store_holds_no_key", tmp_path)
    rules_of = Rules.of

    def plain(policy: TokenPolicy, settings: Settings) -> Rules:
        return replace(rules_of(policy, settings), storage="plain")

    monkeypatch.setattr(Rules, "of", plain)
    with pytest.raises(AssertionError):
        run("test_the_store_holds_no_key", tmp_path)


def test_a_blind_raw_probe_is_caught(tmp_path: Path) -> None:
    class Blind(memory.TestMemory):
        def raw(self, store: str) -> bytes:
            return b""

    for case in ("test_the_store_holds_no_key", "test_the_raw_probe_sees_a_plain_key"):
        with pytest.raises(AssertionError):
            getattr(Blind(), case)(tmp_path)


def test_an_unscoped_code_digest_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "test_codes_are_scoped_to_their_object"
    run(case, tmp_path)

    def code(self: Keyring, content_type: str, object_id: str, slug: str, code: str) -> Digest:
        return self.link(code)

    def codes(self: Keyring, content_type: str, object_id: str, slug: str, code: str) -> Digests:
        return self.links(code)

    monkeypatch.setattr(Keyring, "code", code)
    monkeypatch.setattr(Keyring, "codes", codes)
    with pytest.raises(FAILURES):
        run(case, tmp_path)


def test_a_folded_digit_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "test_digits_of_other_scripts_match_nothing"
    run(case, tmp_path)

    def folded(code: str, chars: str | None) -> str:
        return normalize("NFKC", code)

    monkeypatch.setattr(guess, "normalise_code", folded)
    with pytest.raises(FAILURES):
        run(case, tmp_path)


def test_an_unchecked_object_id_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "test_hostile_input_is_refused_and_stores_nothing"
    run(case, tmp_path)
    monkeypatch.setattr(subject, "check_object_id", str)
    with pytest.raises(AssertionError):
        run(case, tmp_path)


def test_a_store_that_dies_with_its_process_is_not_durable(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        NotDurable().test_of_consumers_in_processes_one_wins(tmp_path)
    with pytest.raises(AssertionError):
        NotDurable().test_acknowledged_writes_survive_a_kill(tmp_path)


def test_an_overridden_case_is_caught(tmp_path: Path) -> None:
    class Overrides(memory.TestMemory):
        def test_consume_works_once(self, tmp_path: Path) -> None:
            pass

    class Removes(memory.TestMemory):
        test_consume_works_once = None  # type: ignore[assignment]  # the very thing that must not pass

    class Mixin:
        def test_consume_works_once(self, tmp_path: Path) -> None:
            pass

    class Mixed(Mixin, memory.TestMemory):
        pass

    memory.TestMemory().test_no_standard_test_is_overridden(tmp_path)
    for suite in (Overrides(), Removes(), Mixed()):
        with pytest.raises(AssertionError, match="test_consume_works_once"):
            suite.test_no_standard_test_is_overridden(tmp_path)


def test_the_cases_are_listed_with_their_guarantees() -> None:
    cases = DurableBackendConformance.cases()
    assert {case.guarantee for case in cases} == set(range(1, 14))
    assert all(case.title for case in cases)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name in dir(DurableBackendConformance) if name.startswith("test_")}
    assert {case.name for case in BackendConformance.cases()} < set(names)


class NotDurable(DurableBackendConformance):
    """Memory, where a durable store is asked for."""

    rounds = 1
    processes = 2

    def new_store(self, directory: Path) -> str:
        return f"memory://{directory.name}"

    def backend(self, store: str) -> TokenBackend:
        return MemoryBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        raise NotImplementedError
