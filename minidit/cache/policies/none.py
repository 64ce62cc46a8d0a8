"""No caching: every step runs every block of every branch. The baseline of every method."""

from minidit.cache.plan import RUN_ALL, Plan


class NoCache:
    """Needs nothing, keeps nothing, measures nothing."""

    def plan(self, step) -> Plan:
        return RUN_ALL
