"""The time that a probe takes, and the time that it is a part of."""


class Account:
    """Adds up the seconds that a probe takes since the end of the first step that it measured.

    Attributes:
        seconds: taken so far, on the host and on devices.
    """

    def __init__(self):
        self.seconds = 0.0
        self._began = 0.0
        self._ended: float | None = None

    def add_step(self, began: float, ended: float) -> float:
        """Adds the host's part of a step, from one time to another.

        Returns:
            The seconds added: none of the first step, which has no step before it to be a fraction of.
        """
        first = self._ended is None
        if first:
            self._began = ended
        self._ended = ended
        taken = 0.0 if first else ended - began
        self.seconds += taken
        return taken

    def add_device(self, seconds: float):
        """Adds what a device took for a measurement."""
        if self._ended is not None:
            self.seconds += seconds

    @property
    def overhead(self) -> float:
        """The fraction of the time that was taken."""
        if self._ended is None or not self.seconds:
            return 0.0
        return self.seconds / (self._ended - self._began)
