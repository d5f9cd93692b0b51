"""The group that every command of `distsbi` belongs to."""

from typing import Any

import click

from distsbi import __version__
from distsbi.compile_cache import use_compile_cache


class Command(click.Command):
    """A command whose options are given once, unless they take several values: of two, click would take the last without a word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        for option in order:
            if isinstance(option, click.Option) and not (option.multiple or option.is_flag) and order.count(option) > 1:
                raise click.UsageError(f"{option.opts[-1]} is given twice; keep one.", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        use_compile_cache()  # a command's process is its own; before jax is imported
        return super().invoke(ctx)


class Group(click.Group):
    command_class = Command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="distsbi")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="Log warnings alone, not every shard.")
def cli(debug: bool, quiet: bool) -> None:
    """Amortised posteriors from simulations: train on a mesh, draw at scale."""
