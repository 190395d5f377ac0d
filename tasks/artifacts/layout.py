"""Names of artifacts inside a run's folder."""


def round_name(round: int) -> str:
    """Folder of a round, counted from 0."""
    return f"round-{round:04d}"


def round_number(name: str) -> int:
    """The inverse of `round_name`."""
    return int(name.removeprefix("round-"))


def evaluation_name(rounds_done: int, *, preview: bool = False) -> str:
    """Artifact of the evaluation after so many rounds; a preview shows the picture grid's cases
    alone."""
    kind = "preview" if preview else "evaluate"
    return f"{round_name(rounds_done - 1)}/{kind}" if rounds_done else kind
