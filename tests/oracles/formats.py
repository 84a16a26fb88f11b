"""Names of formats short enough for the ids of tests."""


def label(format) -> str:
    return getattr(format, "name", str(format)).replace(" ", "")
