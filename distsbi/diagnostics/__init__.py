"""How good is a posterior: scores against references."""

from distsbi.diagnostics.c2st import c2st as c2st
