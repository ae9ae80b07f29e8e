"""The templates of pages: what they are handed is escaped."""

from jinja2 import Environment, PackageLoader


def templates() -> Environment:
    """Returns the templates beside this file."""
    return Environment(
        loader=PackageLoader("influence.runtime.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
