"""A suite proves nothing until it has failed: every planted bug is caught by the case named for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import pytest

from tests import broken
from tests import test_memory_conformance as memory
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


CAUGHT: list[tuple[type[MemoryBackend], str]] = [
    (broken.RacyUpdate, "test_of_concurrent_consumers_one_wins"),
    (broken.RacyUpdate, "test_of_concurrent_redeemers_one_wins"),
    (broken.RacyUpdate, "test_of_concurrent_uses_as_many_win_as_are_left"),
    (broken.RacyReplace, "test_of_concurrent_issues_one_stays_valid"),
    (broken.RacyReplace, "test_of_concurrent_replaces_one_stays_active"),
    (broken.RacyReplace, "test_a_cancelled_issue_leaves_one_valid_token"),
    (broken.RacyReplace, "test_a_cancelled_replace_happens_wholly_or_not_at_all"),
    (broken.RacyOverlap, "test_uses_beside_an_overlapping_replace_come_before_or_after"),
    (broken.RacyIfNoneValid, "test_of_concurrent_get_active_or_create_one_creates"),
    (broken.RacySpend, "test_parallel_guesses_cost_at_most_the_cap"),
    (broken.RacySpend, "test_of_concurrent_issues_under_a_cooldown_one_goes_out"),
    (broken.CountsAfterComparing, "test_parallel_guesses_cost_at_most_the_cap"),
    (broken.CountsAfterComparing, "test_cancelled_guesses_are_no_free_guesses"),
    (broken.RacyDeactivate, "test_concurrent_deactivations_count_a_token_once"),
    (broken.RacyPurge, "test_concurrent_purges_count_each_token_once"),
    (broken.HalfOpens, "test_cancelled_opens_and_closes_leave_nothing"),
    (broken.SwallowsCancellation, "test_a_cancelled_update_happens_wholly_or_not_at_all"),
    (broken.TakesUseInTwoSteps, "test_a_cancelled_consume_is_resolved_by_its_id"),
    (broken.ForgetsSlug, "test_another_object_type_or_slug_never_matches"),
    (broken.ForgetsSlug, "test_every_given_field_must_hold"),
    (broken.ForgetsContextInCompany, "test_of_changes_at_once_each_minds_its_own_match"),
    (broken.ForgetsObject, "test_deactivate_ends_what_it_names"),
    (broken.ForgetsObject, "test_deactivate_changes_every_match"),
    (broken.FoldsCase, "test_strings_are_compared_exactly"),
    (broken.TakesNoDigestForAny, "test_no_digest_matches_nothing"),
    (broken.ExclusiveBoundary, "test_the_last_millisecond_is_valid"),
    (broken.OldestFirst, "test_active_tokens_are_listed_newest_first"),
    (broken.OldestFirst, "test_find_is_newest_first"),
    (broken.RepeatsThePage, "test_find_goes_on_after_a_page"),
    (broken.LosesMilliseconds, "test_times_come_back_exactly"),
    (broken.LosesMilliseconds, "test_every_field_comes_back_exactly"),
    (broken.LosesEmptyExtraData, "test_extra_data_comes_back_exactly"),
    (broken.DeactivatesBeforeTheCollision, "test_a_key_collision_leaves_the_old_token"),
    (broken.DeactivatesBeforeTheCollision, "test_a_taken_key_changes_nothing"),
    (broken.ReplacesTheNewestOnly, "test_replace_after_an_overlap_ends_it"),
    (broken.ForgetsOverlap, "test_an_overlap_lasts_until_the_first_success"),
    (broken.UsesNothing, "test_consume_works_once"),
    (broken.IgnoresUseId, "test_the_same_consume_id_gives_the_same_answer"),
    (broken.CountsOneUseOnly, "test_a_token_has_as_many_uses_as_its_policy_says"),
    (broken.LeasesWithoutFence, "test_a_late_committer_loses_its_lease"),
    (broken.LeasesWithoutFence, "test_a_lease_is_fenced_by_its_id"),
    (broken.LeasesNothing, "test_a_redeemed_token_is_used"),
    (broken.RevivesOnRelease, "test_a_deactivated_token_is_not_redeemed"),
    (broken.RevivesOnSave, "test_saving_a_stale_copy_revives_nothing"),
    (broken.PurgesLeased, "test_purge_leaves_a_leased_token"),
    (broken.PurgesTheLastMillisecond, "test_purge_removes_no_valid_token"),
    (broken.PurgesWithoutBound, "test_purge_takes_the_longest_ended_first"),
    (broken.PurgesOneLess, "test_purge_takes_the_longest_ended_first"),
    (broken.PurgesOneLess, "test_purge_works_in_batches"),
    (broken.PurgesBudgets, "test_a_new_token_does_not_reset_the_budget"),
    (broken.ResetsOnReissue, "test_a_new_token_does_not_reset_the_budget"),
    (broken.ResetsOnRefund, "test_refund_forgets_no_strike"),
    (broken.NeverRefunds, "test_a_failed_issue_costs_no_cooldown"),
    (broken.NeverRefunds, "test_the_last_attempt_may_be_right"),
    (broken.SharesBudgets, "test_budgets_are_apart"),
    (broken.AllowsOneMore, "test_a_window_holds_its_limit"),
    (broken.NeverGrows, "test_the_window_ends_and_grows"),
    (broken.WorksWhenClosed, "test_a_closed_backend_says_so"),
    (broken.ClosesAtOnce, "test_opens_are_counted"),
    (broken.BelongsToItsLoop, "test_another_event_loop_is_served_or_refused"),
    (broken.LeavesATask, "test_a_closed_backend_leaves_no_task"),
    (broken.TakesAnyOption, "test_an_unknown_option_is_refused"),
    (broken.KeepsToItself, "test_managers_see_each_others_writes"),
]
"""Each planted bug with a case that must catch it."""


@pytest.mark.parametrize("case", sorted({case for _, case in CAUGHT}))
def test_the_unbroken_backend_passes(case: str, tmp_path: Path) -> None:
    run(case, tmp_path)


@pytest.mark.parametrize(("kind", "case"), CAUGHT, ids=[f"{kind.__name__}-{case}" for kind, case in CAUGHT])
def test_the_broken_backend_is_caught(kind: type[MemoryBackend], case: str, tmp_path: Path) -> None:
    with pytest.raises(FAILURES):
        run(case, tmp_path, kind)


def test_every_broken_backend_is_tried() -> None:
    planted = {
        kind
        for kind in vars(broken).values()
        if isinstance(kind, type) and kind.__module__ == broken.__name__
    }
    assert planted == {kind for kind, _ in CAUGHT}


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
