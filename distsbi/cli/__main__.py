"""`python -m distsbi.cli`."""

from distsbi.cli.entry import main

main()
