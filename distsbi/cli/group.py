"""The group that every command of `distsbi` belongs to."""

import click

from distsbi import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="distsbi")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="Log warnings alone, not every shard.")
def cli(debug: bool, quiet: bool) -> None:
    """Amortised posteriors from simulations: train on a mesh, draw at scale."""
