"""No caching: every step runs every block of every branch. The baseline of every method."""

from minidit.cache.plan import RUN_ALL, Need, Plan, RunInfo, Values


class NoCache:
    """Every step runs in full: the baseline that the others are compared with."""

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        return ()

    def plan(self, step) -> Plan:
        return RUN_ALL

    def tell(self, step, values: Values) -> None:
        pass
