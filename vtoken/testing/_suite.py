"""The suite, put together."""

from __future__ import annotations

from pathlib import Path

from vtoken.testing._bench import Case
from vtoken.testing._budget import BudgetCases
from vtoken.testing._change import ChangeCases
from vtoken.testing._find import FindCases
from vtoken.testing._insert import InsertCases
from vtoken.testing._life import LifeCases
from vtoken.testing._limits import LimitCases
from vtoken.testing._matching import MatchingCases
from vtoken.testing._once import OnceCases
from vtoken.testing._redeem import RedeemCases
from vtoken.testing._sweep import SweepCases


class BackendConformance(
    OnceCases,
    LimitCases,
    MatchingCases,
    RedeemCases,
    SweepCases,
    InsertCases,
    FindCases,
    ChangeCases,
    BudgetCases,
    LifeCases,
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


def _standard_tests(suite: type) -> dict[str, object]:
    return {
        name: test
        for cls in reversed(suite.__mro__)
        if cls.__module__.startswith("vtoken.testing.")
        for name, test in vars(cls).items()
        if name.startswith("test_")
    }
