"""The suite, put together."""

from __future__ import annotations

from pathlib import Path

from vtoken.testing.cases.around import AgainCases, PairCases, ScreenCases
from vtoken.testing.cases.budgets import BudgetCases, InsertLimitCases, SpendingCases
from vtoken.testing.cases.cancelled import CancelledCases, PurgeCases
from vtoken.testing.cases.durable import DurableCases
from vtoken.testing.cases.find import FindCases
from vtoken.testing.cases.history import HistoryCases
from vtoken.testing.cases.insert import InsertCases
from vtoken.testing.cases.life import CancellationCases, LifeCases
from vtoken.testing.cases.limits import AttemptCases, IssueLimitCases
from vtoken.testing.cases.matching import MatchingCases
from vtoken.testing.cases.matrix import MatrixCases
from vtoken.testing.cases.once import IssueCases, OnceCases
from vtoken.testing.cases.overlap import OverlapCases
from vtoken.testing.cases.present import (
    HoldCases,
    OtherContextCases,
    PresentCases,
    PresentLimitCases,
    ReplayCases,
    ResetCases,
)
from vtoken.testing.cases.redeem import OverlapUseCases, RedeemCases
from vtoken.testing.cases.strings import StringCases
from vtoken.testing.cases.sweep import SweepCases
from vtoken.testing.cases.update import DeactivateCases, UpdateCases
from vtoken.testing.harness import Case


class BackendConformance(
    OnceCases,
    IssueCases,
    RedeemCases,
    OverlapUseCases,
    AttemptCases,
    IssueLimitCases,
    MatchingCases,
    PairCases,
    AgainCases,
    ScreenCases,
    PurgeCases,
    CancelledCases,
    InsertCases,
    OverlapCases,
    PresentCases,
    HoldCases,
    ReplayCases,
    OtherContextCases,
    ResetCases,
    PresentLimitCases,
    UpdateCases,
    DeactivateCases,
    FindCases,
    StringCases,
    SweepCases,
    BudgetCases,
    SpendingCases,
    InsertLimitCases,
    LifeCases,
    CancellationCases,
    MatrixCases,
    HistoryCases,
):
    """Every guarantee as a test, for a store that may live and die with its process.

    Subclass it in a test module, name the subclass ``Test...``, and write ``new_store``, ``backend`` and
    ``raw``. Take :class:`DurableBackendConformance` for a store that outlives the process.
    """

    @classmethod
    def cases(cls) -> list[Case]:
        """All standard cases by guarantee, to be run without pytest: ``getattr(suite,
        case.name)(directory)``."""
        cases: list[Case] = []
        for name, test in _standard_tests(cls).items():
            number, _, title = " ".join((test.__doc__ or "").split()).partition(": ")
            cases.append(Case(name, int(number.removeprefix("Guarantee ")), title))
        return sorted(cases, key=lambda case: case.guarantee)

    def test_no_standard_test_is_overridden(self, tmp_path: Path) -> None:
        """Guarantee 1: a subclass changes none of the standard cases, else they would prove nothing."""
        standard = _standard_tests(type(self))
        changed = [name for name in standard if getattr(type(self), name) is not standard[name]]
        assert not changed, f"these standard tests are overridden: {', '.join(changed)}"


class DurableBackendConformance(DurableCases, BackendConformance):
    """:class:`BackendConformance` and what a store must do that outlives the process.

    Its cases start other processes, which import the subclass by its module and name, make an instance
    of it without a test's fixtures, and call ``backend(store)``, for one case's store after the other.
    """


def _standard_tests(suite: type) -> dict[str, object]:
    return {
        name: test
        for cls in reversed(suite.__mro__)
        if cls.__module__.startswith("vtoken.testing.")
        for name, test in vars(cls).items()
        if name.startswith("test_")
    }
