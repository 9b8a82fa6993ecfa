"""What goes wrong in a way its user can mend: one sentence that names the thing and the remedy."""


class UserError(Exception):
    """A mistake or a missing thing that the user can put right; the message is one sentence saying how."""


class Stopped(Exception):
    """A signal asked the run to stop; everything is saved. `signum` becomes the exit status 128 + signum."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def refuse(problems: list[str]) -> None:
    """Raise one UserError that lists every problem at once; do nothing when there is none."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} things are wrong:\n" + "\n".join(f"  - {p}" for p in problems))
