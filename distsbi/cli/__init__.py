"""The command line: `distsbi simulate | train | sample | check | catalog | status | verify | plan | info | demo`.

Thin: each command reads its options, calls the function of the same name in the library and says what it did. JAX is
imported inside the commands, so that `--help` is quick and `--devices` can still say how many virtual devices JAX has.

Exit codes: 0 done; 1 failed; 2 the user's to mend (options, files, values); 130 interrupted; 143 ended by SIGTERM.
"""

from distsbi.cli import catalog, check, info, sample, simulate, train  # noqa: F401  (they put their commands into the group)
from distsbi.cli.entry import main
from distsbi.cli.group import cli

__all__ = ["cli", "main"]
