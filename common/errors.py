"""The exceptions a user can cause, by what they should look at next.

::

    ConsiliumError                exit code 2 unless said otherwise
    ├── ConfigError               a setting is unknown, mistyped or contradicts another
    ├── DataError                 a file, column, split or label is missing or wrong
    ├── ModelError                the base model, its tokenizer or its modules do not fit the settings
    ├── AdapterError              an adapter has another layout or another base model
    ├── PrivacyError              a privacy target cannot be reached or stated
    │   └── CoverageError         a trainable parameter would escape per-unit clipping
    ├── LedgerError               the site's privacy ledger refuses or cannot be read
    ├── WireError                 a message does not have the agreed form
    ├── ConnectionFailed          the site agent or the SuperLink cannot be reached or trusted
    ├── OutputError               the output folder cannot be used for this run
    └── RunFailed                 the run itself failed (exit code 3)

Every message names the field, the value and the remedy. Messages about a site's data stay at the site: nothing that
crosses the network carries the text of an exception (see ``client/egress.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ConsiliumError(Exception):
    """Anything a user can cause and mend. ``str(error)`` is the one message shown."""

    exit_code = 2


class ConfigError(ConsiliumError):
    """One or several settings are wrong; all of them are listed at once.

    Args:
        problems: one line per problem, each naming field, value and remedy.
        source: the file or command the settings came from.
    """

    def __init__(self, problems: str | Sequence[str], source: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        where = f" in {source}" if source else ""
        if len(self.problems) == 1:
            super().__init__(f"setting{where}: {self.problems[0]}" if where else self.problems[0])
        else:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} settings{where} are wrong:\n{listed}")


class DataError(ConsiliumError):
    """A file, column, split or label is missing or wrong."""


class ModelError(ConsiliumError):
    """The base model, its tokenizer or its modules do not fit the settings."""


class AdapterError(ConsiliumError):
    """An adapter has another layout or was made for another base model."""


class PrivacyError(ConsiliumError):
    """A privacy target cannot be reached or stated."""


class CoverageError(PrivacyError):
    """A trainable parameter would escape per-unit clipping."""


class LedgerError(ConsiliumError):
    """The site's privacy ledger refuses, is damaged, or was written by a newer version."""


class WireError(ConsiliumError):
    """A message does not have the agreed form."""


class ConnectionFailed(ConsiliumError):
    """The site agent or the SuperLink cannot be reached or cannot be trusted."""


class OutputError(ConsiliumError):
    """The output folder cannot be used for this run."""


class RunFailed(ConsiliumError):
    """The run started and could not be completed; it can be resumed once the cause is mended."""

    exit_code = 3


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, else the list of known names."""
    names = sorted(known)
    near = get_close_matches(value, names, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known: {', '.join(names)})" if names else ""
