"""A suite proves nothing until it has failed: every planted bug is caught by the case named for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from tests import broken
from tests import test_memory_conformance as memory
from vtoken import subject
from vtoken.backend import TokenBackend
from vtoken.errors import VTokenError
from vtoken.keys import Candidates, Keyring
from vtoken.policy import ResolvedPolicy, Settings, TokenPolicy
from vtoken.testing import BackendConformance, DurableBackendConformance
from vtoken_backends.memory import MemoryBackend

FAILURES = (AssertionError, VTokenError)
"""How a case fails: by its own assertion, or because a call that must succeed is refused."""
A_TOKEN = "test_two_writes_on_a_token_have_an_order"
A_BUDGET = "test_two_writes_on_a_budget_have_an_order"
EXACT = "test_every_write_minds_exact_strings"


def run(case: str, directory: Path, kind: type[MemoryBackend] = MemoryBackend) -> None:
    """Run one case on a backend of this kind, in as many rounds as the everyday tests of the servers."""

    class Suite(memory.TestMemory):
        rounds = 4

        def backend(self, store: str) -> TokenBackend:
            return kind.from_url(store)

    getattr(Suite(), case)(directory)


CAUGHT: list[tuple[type[MemoryBackend], str]] = [
    (broken.RacyUse, "test_of_concurrent_uses_as_many_win_as_are_left"),
    (broken.RacyUse, A_TOKEN),
    (broken.RacyHold, "test_of_concurrent_holds_as_many_as_uses_are_free"),
    (broken.RacyHold, A_TOKEN),
    (broken.ComparesUsesAlone, A_TOKEN),
    (broken.RacyReplace, "test_of_concurrent_replaces_one_stays_active"),
    (broken.RacyReplace, "test_a_cancelled_replace_happens_wholly_or_not_at_all"),
    (broken.RacyReplace, A_TOKEN),
    (broken.RacyOverlap, A_TOKEN),
    (broken.RacyIfNoneValid, "test_of_concurrent_if_none_valid_one_inserts"),
    (broken.RacyOnce, "test_of_concurrent_once_all_get_one"),
    (broken.ReplaceOverwritesUses, A_TOKEN),
    (broken.RewritesTheRow, "test_a_save_beside_a_use_loses_neither"),
    (broken.RewritesTheRow, A_TOKEN),
    (broken.RewritesTheRowOnRelease, "test_a_save_beside_a_use_loses_neither"),
    (broken.RewritesTheRowOnRelease, A_TOKEN),
    (broken.RacySpend, "test_of_concurrent_spendings_the_limit_is_allowed"),
    (broken.RacySpend, A_BUDGET),
    (broken.RacySpendInThreads, "test_event_loops_in_threads_share_a_store"),
    (broken.RefundsAbsolutely, "test_concurrent_refunds_lose_none"),
    (broken.RefundsAbsolutely, A_BUDGET),
    (broken.SpendsFromSome, "test_all_are_charged_or_none"),
    (broken.SpendsFromSome, "test_of_concurrent_spendings_the_narrowest_limit_counts"),
    (broken.RacyDeactivate, "test_concurrent_deactivations_count_a_token_once"),
    (broken.DeactivateOverwritesUses, A_TOKEN),
    (broken.RacyPurge, "test_concurrent_purges_count_a_token_once"),
    (broken.ForgetsWhatBeganAnew, "test_a_budget_that_began_anew_stays"),
    (broken.ForgetsWhatBeganAnew, A_BUDGET),
    (broken.ComparesBeforeItCharges, "test_wrong_keys_at_once_hold_the_limit"),
    (broken.RefusesBesideARightKey, "test_the_right_key_twice_on_the_last_attempt"),
    (broken.RefusesBesideARightKey, "test_right_keys_at_once_pass_a_small_limit"),
    (broken.ChargesOneAfterTheOther, "test_a_right_key_beside_wrong_ones_that_another_limit_refuses"),
    (broken.ChargesOneAfterTheOther, "test_an_insert_beside_others_that_another_limit_refuses"),
    (broken.InsertsThenCharges, "test_of_concurrent_inserts_under_a_limit_so_many_succeed"),
    (broken.KeepsTheChargeOfNothing, "test_what_inserts_nothing_costs_nothing"),
    (broken.SwallowsCancellation, "test_a_cancelled_use_happens_wholly_or_not_at_all"),
    (broken.SwallowsCancellation, "test_a_cancelled_call_leaves_the_others"),
    (broken.UsesInTwoSteps, "test_a_cancelled_use_happens_wholly_or_not_at_all"),
    (broken.HalfOpens, "test_cancelled_opens_and_closes_leave_nothing"),
    (broken.WorksWhenClosed, "test_a_closed_backend_says_so"),
    (broken.BelongsToItsLoop, "test_another_event_loop_is_served_or_refused"),
    (broken.ClosesAtOnce, "test_opens_are_counted"),
    (broken.LeavesATask, "test_a_closed_backend_leaves_no_task"),
    (broken.KeepsToItself, "test_backends_see_each_others_writes"),
    (broken.AcceptsAnyOption, "test_an_unknown_option_is_refused"),
    (broken.AcceptsAnyHandle, "test_a_handle_of_another_kind_is_refused"),
    (broken.LastNoteWins, "test_notes_are_kept"),
    (broken.ForgetsSlug, "test_every_given_field_must_hold"),
    (broken.ForgetsSlug, EXACT),
    (broken.ForgetsContextInCompany, "test_of_keys_at_once_each_minds_its_own_match"),
    (broken.ForgetsObject, "test_deactivate_minds_every_field"),
    (broken.ForgetsKind, "test_kind_is_that_of_the_presented_key"),
    (broken.TestsAnyKey, "test_a_match_is_about_one_key"),
    (broken.FoldsCase, "test_strings_are_compared_exactly"),
    (broken.FoldsCaseInUpdate, EXACT),
    (broken.FoldsCaseInReplace, "test_replace_minds_exact_strings"),
    (broken.FoldsCaseInDeactivate, "test_deactivating_and_erasing_mind_exact_strings"),
    (broken.TrimsUseIds, "test_names_of_holds_uses_and_notes_are_exact"),
    (broken.TakesNoDigestForAny, "test_no_digest_matches_nothing"),
    (broken.ExclusiveBoundary, "test_the_last_millisecond_is_good"),
    (broken.OldestFirst, "test_find_is_newest_first"),
    (broken.RepeatsThePage, "test_find_goes_on_after_a_page"),
    (broken.LosesMilliseconds, "test_every_field_comes_back_exactly"),
    (broken.LosesEmptyExtraData, "test_every_field_comes_back_exactly"),
    (broken.StoresOneKey, "test_every_field_comes_back_exactly"),
    (broken.ReplacesBeforeTheCollision, "test_what_inserts_nothing_costs_nothing"),
    (broken.ReplacesTheNewestOnly, "test_replace_ends_its_own_line_alone"),
    (broken.ReplacesEveryContext, "test_contexts_have_lines_of_their_own"),
    (broken.KeepsNoOverlap, "test_a_new_token_takes_over_the_keys"),
    (broken.KeepsEveryOverlap, "test_a_key_is_taken_over_once"),
    (broken.OverlapsWhatIsHeld, "test_what_is_not_the_same_is_not_taken_over"),
    (broken.SupersedesNothing, "test_an_own_code_can_be_issued_again_and_again"),
    (broken.SupersedesAnyones, "test_a_taken_key_changes_nothing"),
    (broken.UsesNothing, "test_a_use_counts_and_ends"),
    (broken.IgnoresUseId, "test_the_same_use_is_answered_again"),
    (broken.RemembersSixteenUses, "test_the_latest_uses_are_remembered"),
    (broken.RemembersByToken, "test_a_use_is_remembered_for_the_origin_of_its_key"),
    (broken.CountsOneUseOnly, "test_a_use_counts_and_ends"),
    (broken.UseEndsSiblings, "test_without_a_context_others_stay"),
    (broken.LeavesOtherContexts, "test_the_last_use_ends_other_contexts"),
    (broken.LeavesResets, "test_a_use_forgets_budgets"),
    (broken.ChargesTheHeld, "test_a_wrong_key_is_charged"),
    (broken.LimitsARepeatedUse, "test_a_repeated_use_comes_before_the_limit"),
    (broken.HoldsWithoutFence, "test_a_hold_is_used_while_it_runs"),
    (broken.UsesHoldsThatRanOut, "test_a_hold_is_used_while_it_runs"),
    (broken.UsesHoldsOfUsedTokens, "test_a_hold_does_not_outlive_the_uses"),
    (broken.HoldsNothing, "test_a_hold_runs_until_its_end"),
    (broken.HoldsOnce, "test_of_concurrent_holds_as_many_as_uses_are_free"),
    (broken.ForgetsWhatIsHeld, "test_one_use_is_held_once"),
    (broken.ForgetsWhatIsHeld, "test_of_concurrent_holds_of_one_use_one_is_taken"),
    (broken.HoldsUsesByIdAlone, "test_one_use_is_held_once"),
    (broken.BelievesStaleHolds, "test_a_stale_hold_does_not_count"),
    (broken.RevokesNoHold, "test_deactivate_ends_every_match"),
    (broken.SparesNoHold, "test_deactivate_spares_named_holds"),
    (broken.EndsTheWholeOverlap, "test_deactivate_by_a_key"),
    (broken.EndsAKeyByTheClock, "test_deactivate_by_a_key"),
    (broken.RevivesOnRelease, "test_giving_back_changes_nothing_else"),
    (broken.RevivesOnSave, "test_a_change_touches_its_own_fields_alone"),
    (broken.PurgesHeld, "test_purge_deletes_what_ended_and_no_more"),
    (broken.PurgesTheLastMillisecond, "test_purge_deletes_what_ended_and_no_more"),
    (broken.PurgesWithoutBound, "test_purge_takes_the_longest_ended_first"),
    (broken.PurgesOneLess, "test_purge_takes_the_longest_ended_first"),
    (broken.PurgesBudgets, "test_purge_forgets_ended_budgets"),
    (broken.PurgesBudgetsBesideTokens, "test_purge_drains_any_number_of_budgets"),
    (broken.ErasesTokensOnly, "test_erase_removes_an_object"),
    (broken.CountsThePretended, "test_count_tells_the_states_apart"),
    (broken.ResetsOnReissue, "test_an_insert_charges_in_its_step"),
    (broken.ResetsOnRefund, "test_refund_gives_back_to_the_running_window"),
    (broken.RefundsAnyWindow, "test_refund_gives_back_to_the_running_window"),
    (broken.NeverRefunds, "test_refund_gives_back_to_the_running_window"),
    (broken.SharesBudgets, "test_both_parts_of_a_name_count"),
    (broken.AllowsOneMore, "test_a_window_holds_its_limit"),
    (broken.NeverGrows, "test_an_exhausted_window_doubles_the_next"),
    (broken.BelievesTheClock, "test_a_clock_that_was_ahead_locks_nobody_out"),
    # The same through the manager:
    (broken.RacyUse, "test_of_concurrent_consumers_one_wins"),
    (broken.RacyUse, "test_of_concurrent_redeemers_one_wins"),
    (broken.RacyHold, "test_what_is_used_up_by_holds_and_uses"),
    (broken.RacyReplace, "test_of_concurrent_issues_one_stays_valid"),
    (broken.RacyReplace, "test_a_cancelled_issue_leaves_no_token_without_an_owner"),
    (broken.RacyIfNoneValid, "test_of_concurrent_get_active_or_create_one_creates"),
    (broken.ComparesBeforeItCharges, "test_parallel_wrong_codes_cost_at_most_the_cap"),
    (broken.RefusesBesideARightKey, "test_the_right_code_twice_at_once"),
    (broken.UsesInTwoSteps, "test_a_cancelled_consume_is_resolved_by_its_id"),
    (broken.KeepsToItself, "test_managers_see_each_others_writes"),
    (broken.ForgetsSlug, "test_another_object_type_or_slug_never_matches"),
    (broken.ForgetsObject, "test_deactivate_ends_what_it_names"),
    (broken.ExclusiveBoundary, "test_the_last_millisecond_is_valid"),
    (broken.OldestFirst, "test_active_tokens_are_listed_newest_first"),
    (broken.ReadsIdsAsNumbers, "test_a_text_that_is_no_id_matches_nothing"),
    (broken.ReadsIdsAsNumbers, "test_a_foreign_id_is_nobodys"),
    (broken.LosesMilliseconds, "test_times_come_back_exactly"),
    (broken.LosesEmptyExtraData, "test_extra_data_comes_back_exactly"),
    (broken.ReplacesBeforeTheCollision, "test_a_key_collision_leaves_the_old_token"),
    (broken.KeepsNoOverlap, "test_an_overlap_lasts_until_the_first_success"),
    (broken.KeepsEveryOverlap, "test_an_overlap_lasts_until_the_first_success"),
    (broken.EndsTheWholeOverlap, "test_deactivating_by_the_older_key_ends_that_key"),
    (broken.UsesNothing, "test_consume_works_once"),
    (broken.IgnoresUseId, "test_the_same_consume_id_gives_the_same_answer"),
    (broken.CountsOneUseOnly, "test_a_token_has_as_many_uses_as_its_policy_says"),
    (broken.LeavesOtherContexts, "test_contexts_cool_down_apart"),
    (broken.UsesHoldsThatRanOut, "test_a_late_block_loses_its_hold"),
    (broken.HoldsNothing, "test_a_redeemed_token_is_used"),
    (broken.HoldsOnce, "test_thirty_people_join_with_one_invitation"),
    (broken.BelievesStaleHolds, "test_no_hold_is_for_ever"),
    (broken.RevokesNoHold, "test_deactivating_outside_revokes_the_hold"),
    (broken.SparesNoHold, "test_deactivating_inside_spares_the_block"),
    (broken.RevivesOnRelease, "test_giving_back_revives_nothing"),
    (broken.RevivesOnSave, "test_saving_a_stale_copy_revives_nothing"),
    (broken.PurgesHeld, "test_purge_leaves_a_held_token"),
    (broken.PurgesTheLastMillisecond, "test_purge_removes_no_valid_token"),
    (broken.PurgesBudgets, "test_a_new_token_does_not_reset_the_budget"),
    (broken.PurgesBudgetsBesideTokens, "test_budgets_are_drained"),
    (broken.ResetsOnReissue, "test_a_new_token_does_not_reset_the_budget"),
    (broken.NeverRefunds, "test_an_unsent_token_is_ended"),
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
        if isinstance(kind, type) and kind.__module__ == broken.__name__ and kind is not broken.Broken
    }
    assert planted == {kind for kind, _ in CAUGHT} | {suite.kind for suite in (RacySpend, RacyRefund)}


# Races between processes --------------------------------------------------------------------------


class _OnFiles(DurableBackendConformance):
    __test__ = False
    kind: ClassVar[type[TokenBackend]]

    def new_store(self, directory: Path) -> str:
        return f"sqlite:///{directory}/tokens.db"

    def backend(self, store: str) -> TokenBackend:
        return self.kind.from_url(store)

    def raw(self, store: str) -> bytes:
        raise NotImplementedError


class RacySpend(_OnFiles):
    kind = broken.RacySpendInProcesses


class RacyRefund(_OnFiles):
    kind = broken.RacyRefundInProcesses


@pytest.mark.parametrize("suite", [RacySpend, RacyRefund])
def test_a_race_between_processes_is_caught(suite: type[_OnFiles], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        suite().test_writes_of_processes_lose_nothing(tmp_path)


class NotDurable(DurableBackendConformance):
    """Memory, where a durable store is asked for."""

    __test__ = False
    processes = 2

    def new_store(self, directory: Path) -> str:
        return f"memory://{directory.name}"

    def backend(self, store: str) -> TokenBackend:
        return MemoryBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        raise NotImplementedError


def test_a_store_that_dies_with_its_process_is_not_durable(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        NotDurable().test_of_consumers_in_processes_one_wins(tmp_path)
    with pytest.raises(AssertionError):
        NotDurable().test_acknowledged_writes_survive_a_kill(tmp_path)


# Faults of the library ----------------------------------------------------------------------------


def test_a_stored_plaintext_key_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("test_the_store_holds_no_key", tmp_path)
    resolved = ResolvedPolicy.of

    def plain(policy: TokenPolicy, settings: Settings) -> ResolvedPolicy:
        return replace(resolved(policy, settings), storage="plain")

    monkeypatch.setattr(ResolvedPolicy, "of", plain)
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

    def unscoped(self: Keyring, content_type: str, object_id: str, slug: str, code: str) -> Candidates:
        return self.links(code)

    monkeypatch.setattr(Keyring, "codes", unscoped)
    with pytest.raises(FAILURES):
        run(case, tmp_path)


def test_an_unchecked_object_id_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "test_hostile_input_is_refused_and_stores_nothing"
    run(case, tmp_path)
    monkeypatch.setattr(subject, "check_object_id", str)
    with pytest.raises(AssertionError):
        run(case, tmp_path)


# The suite itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), [("rounds", 2), ("tasks", 5), ("processes", 1), ("kills", 0)])
def test_a_suite_that_asks_for_too_little_is_refused(name: str, number: int, tmp_path: Path) -> None:
    suite = type("Suite", (NotDurable,), {name: number})()
    with pytest.raises(RuntimeError, match=name):
        suite.test_find_is_newest_first(tmp_path)


def test_an_overridden_case_is_caught(tmp_path: Path) -> None:
    class Overrides(memory.TestMemory):
        def test_a_use_counts_and_ends(self, tmp_path: Path) -> None:
            pass

    class Removes(memory.TestMemory):
        test_a_use_counts_and_ends: Callable[[Path], None] = None  # type: ignore[assignment]  # it must not pass

    class Mixin:
        def test_a_use_counts_and_ends(self, tmp_path: Path) -> None:
            pass

    class Mixed(Mixin, memory.TestMemory):
        pass

    memory.TestMemory().test_no_standard_test_is_overridden(tmp_path)
    for suite in (Overrides(), Removes(), Mixed()):
        with pytest.raises(AssertionError, match="test_a_use_counts_and_ends"):
            suite.test_no_standard_test_is_overridden(tmp_path)


def test_the_cases_are_listed_with_their_guarantees() -> None:
    cases = DurableBackendConformance.cases()
    assert {case.guarantee for case in cases} == set(range(1, 15))
    assert all(case.title for case in cases)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name in dir(DurableBackendConformance) if name.startswith("test_")}
    assert {case.name for case in BackendConformance.cases()} < set(names)
