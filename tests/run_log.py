"""A log of runs that outlives a probe: a snapshot puts plain containers back, and leaves this one alone."""


class RunLog(list):
    """A list of the user's own class, which a snapshot does not follow."""

    __slots__ = ()
