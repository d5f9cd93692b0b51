"""`distsbi sample`: one observation in, draws out."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distsbi.cli.group import cli
from distsbi.cli.options import DEVICES, MESH, NETWORK, RUN, SEED, counted, make_mesh, several_processes, solver_options

if TYPE_CHECKING:
    import numpy as np


@cli.command()
@RUN
@click.option(
    "--x", "x_o", help="The observation: a .npy file, or its numbers as 0.1,0.2. Not of a density without conditions."
)
@click.option("-n", "--nsamples", type=int, default=10_000, show_default=True, help="Draws.")
@SEED
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="draws.npy",
    show_default=True,
    help=".npy, .parquet, or a folder for a Parquet dataset, which the same command again completes.",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@solver_options
@NETWORK
@DEVICES
@MESH
@several_processes
def sample(
    run: Path,
    x_o: str | None,
    nsamples: int,
    seed: int,
    out: Path,
    overwrite: bool,
    network: str | None,
    devices: int | None,
    mesh: dict[str, int] | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    distributed: str,
    **solver: Any,
) -> None:
    """Draw from the posterior of RUN for one observation.

    Several processes draw together into one Parquet dataset when each is given the same command, with its own --process-id or by srun, mpirun or
    on each host of a TPU pod of GKE; --out is then a folder that all of them share.
    """
    from distsbi.processes import find_rank

    rank = find_rank(coordinator, num_processes, process_id, detect=distributed == "auto")
    if out.suffix not in (".npy", ".parquet", ""):
        raise click.UsageError(f"--out must end in .npy or .parquet, or be a folder; got {out}.")
    if rank is not None and out.suffix:
        raise click.UsageError(
            f"several processes write a dataset: give a folder as --out, such as {out.stem}; got {out}."
        )
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"--out {out}: there is no folder {out.parent}.")
    axes = make_mesh(devices, mesh)
    if rank is not None:
        from distsbi.processes import join

        join(rank)
    from distsbi.sampling import load
    from distsbi.sampling.run import read_spec

    spec = read_spec(run) if x_o is None else None
    if spec is not None and spec["sizes"][2] and "unconditional" not in spec.get("kind", ()):
        raise click.UsageError("give --x, the observation: a .npy file, or its numbers as 0.1,0.2.")
    posterior = load(run, mesh=axes, network=network)
    x = None if x_o is None else _observation(x_o, posterior)
    solver = {name: value for name, value in solver.items() if value is not None}
    start = time.perf_counter()
    if not out.suffix:
        done = posterior.sample_dataset(out, seed, x, nsamples, overwrite=overwrite, **solver)
        seconds = time.perf_counter() - start
        if rank is not None and rank.index:
            return
        rate = f"{done.drawn:,} drawn now, {done.drawn / seconds:,.0f} draws/s with compilation"
        click.echo(f"{counted(done.nsamples, 'draw')} in {counted(done.parts, 'part')} in {out} ({rate})")
        click.echo(f"next: python -c \"import pyarrow.parquet as pq; print(pq.read_table('{out}'))\"")
        return
    if out.exists() and not overwrite:
        raise click.UsageError(f"{out} exists; give --overwrite or another --out.")
    draws = posterior.sample(seed, x, nsamples, **solver)
    seconds = time.perf_counter() - start
    _write_draws(out, draws, posterior.parameter_names)
    click.echo(
        f"{counted(len(draws), 'draw')} in {out} ({seconds:.1f} s with compilation, {len(draws) / seconds:,.0f} draws/s)"
    )
    table(("parameter", "mean", "sd", "5 %", "95 %"), _summaries(draws, posterior.parameter_names))


def _observation(text: str, posterior: Any) -> "np.ndarray":
    """One observation [1, dim_x, ch_x] from a .npy file, an .npz file (an array for each instrument) or from numbers; axes of size one are
    added."""
    import numpy as np

    dim_x, ch_x = posterior.dim_x, posterior.ch_x
    if text.endswith((".npy", ".npz")):
        try:
            x = np.load(text, allow_pickle=False)
            x = x if isinstance(x, np.ndarray) else dict(x)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"--x {text} cannot be read as arrays: {error}.") from error
        if not posterior.layout.is_plain:
            try:  # with the axis of one observation, as `sample` takes it
                packed = posterior.layout.pack(x)
            except ValueError as error:
                try:
                    return posterior.check_x(x)[None]
                except ValueError:
                    raise error from None
            if len(packed) != 1:
                raise ValueError(
                    f"--x {text} holds {len(packed)} observations and must hold one; for many use distsbi catalog."
                )
            return posterior.check_x(packed[0])[None]
        if isinstance(x, dict):
            raise ValueError(f"--x {text} holds {sorted(x)}; this run takes one array, as .npy.")
    else:
        try:
            x = np.array([float(number) for number in re.split(r"[,\s]+", text.strip())])
        except ValueError as error:
            raise ValueError(f"--x must be a .npy file or numbers such as 0.1,0.2; got {text!r}.") from error
    if ch_x == 1 and x.shape in ((dim_x,), (1, dim_x)):
        x = x.reshape(1, dim_x, 1)
    elif x.shape == (dim_x, ch_x):
        x = x[None]
    if x.shape != (1, dim_x, ch_x):
        raise ValueError(
            f"--x must be one observation of shape ({dim_x}, {ch_x}); got {x.shape}. "
            f"For many observations use distsbi catalog."
        )
    return x


def _write_draws(out: Path, draws: "np.ndarray", names: tuple[str, ...]) -> None:
    """Draws [n, dim_theta, ch_theta] as .npy, or as .parquet with a column for each parameter; whole or not at all."""
    import numpy as np

    from distsbi.files import write_whole

    def write(file: Any) -> None:
        if out.suffix == ".npy":  # not np.save, whose error on a full disk says nothing
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(draws))
            file.write(np.ascontiguousarray(draws).data)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            from distsbi.sampling.dataset import columns

            pq.write_table(pa.table(columns(draws, names)), file)

    try:
        write_whole(out, write)
    except OSError as error:
        raise OSError(
            error.errno, f"{out} could not be written ({error.strerror or error}); free space or give another --out"
        ) from error


def _summaries(draws: "np.ndarray", names: tuple[str, ...]) -> list[tuple[str, ...]]:
    import numpy as np

    from distsbi.sampling.dataset import columns

    rows = []
    for name, column in columns(draws, names).items():
        low, high = np.quantile(column, (0.05, 0.95))
        rows.append((name, *(f"{value:.4g}" for value in (column.mean(), column.std(), low, high))))
    return rows


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
