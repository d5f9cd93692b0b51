"""Where the draws of a folder come from: what run.json says beside their definition, and the command that goes on."""

import datetime
import os
import shlex
from typing import Any

import distsbi
from distsbi import keys
from distsbi.environment import versions
from distsbi.fanout.worker import Job
from distsbi.store import Output, SourceSpec, source
from distsbi.store.place import Place, as_place, shown


def about(job: Job, told: dict[str, Any]) -> dict[str, Any]:
    """For `record.begin`. `told`: by the first worker."""
    spec = job.source
    return {
        "run": job.run,
        "catalog": as_place(spec.path).without_secrets,
        "columns": {"id_column": spec.id_column, "x_column": spec.x_column, "x_columns": spec.x_columns},
        "options": job.options,
        "network": job.network,
        "parameter_names": told["parameter_names"],
        "observation_ids": "row number" if spec.id_column is None else "blake2b of id",
        "first_worker": told["worker"],
        "devices": [told["worker"]["device"]],
        "distsbi": distsbi.__version__,
        "versions": versions(),
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def job_of(kept: dict[str, Any], out: Place, loader: str, **instead: str | None) -> Job:
    """The job that began a folder, from its run.json. `instead`: `run`, `catalog` or `network`, where they are now.

    Raises ValueError if the run.json is of a version that did not keep it, or the catalog is not there.
    """
    found, definition = _found(kept, out, instead), kept["definition"]
    columns = found["columns"]
    x_columns = None if columns["x_columns"] is None else tuple(columns["x_columns"])
    spec = SourceSpec(found["catalog"], columns["id_column"], columns["x_column"], x_columns)
    output = definition["output"]
    return Job(
        run=found["run"],
        source=spec,
        glance=source.glance(spec),
        out=out.url,
        nsamples=definition["nsamples"],
        seed=tuple(definition["seed"]),
        options=found["options"],
        output=Output(output["draws"], output["thin"], tuple(output["quantiles"])),
        loader=loader,
        network=found["network"],
    )


def _found(
    kept: dict[str, Any], out: "str | os.PathLike[str] | Place", instead: dict[str, str | None]
) -> dict[str, Any]:
    """What was remembered of the call that began a folder, with what is now instead."""
    there = kept["about"]
    if "columns" not in there:
        raise ValueError(
            f"{as_place(out)} was begun by distsbi {there.get('distsbi')}, which did not keep how; rows cannot be drawn again."
        )
    return {**there, **{name: value for name, value in instead.items() if value is not None}}


def call(kept: dict[str, Any], out: "str | os.PathLike[str] | Place", **instead: str | None) -> dict[str, Any]:
    """The arguments of `sample_catalog` that go on with the folder `out`, but for the workers, from its run.json. `instead`: as for `job_of`.

    Raises ValueError if the run.json is of a version that did not keep them.
    """
    found = _found(kept, out, instead)
    definition = kept["definition"]
    return {
        "run": found["run"],
        "catalog": found["catalog"],
        "out": out,
        "nsamples": definition["nsamples"],
        "seed": keys.seed_of(definition["seed"]),
        "rows_per_shard": definition["rows_per_shard"],
        **found["columns"],
        **found["options"],
        **definition["output"],
        "network": found["network"],
    }


def each_worker(run: dict[str, Any]) -> dict[str, Any]:
    """What each worker gets, arguments of `sample_catalog` and `simulate`: as in the last call that had workers, from run.json. Of a catalog
    without any such call, or of before this was kept, a GPU where its rows were drawn on one; nothing where all is as by default."""
    there = run["about"]
    if "each_worker" in there:
        return there["each_worker"]
    on_gpu = not there.get("devices", ["cpu"])[0].startswith(("cpu", "tpu"))
    return {"num_gpus_per_worker": 1} if on_gpu and "tile" in run["definition"] else {}


def worker_words(run: dict[str, Any]) -> list[str]:
    """`each_worker` as options of the command line, where it is not the default."""
    each, words = each_worker(run), []
    if each.get("cpus_per_worker", 1) != 1:
        words += ["--cpus-per-worker", str(each["cpus_per_worker"])]
    if each.get("num_gpus_per_worker"):
        words += ["--gpus-per-worker", str(each["num_gpus_per_worker"]).removesuffix(".0")]
    if each.get("time_limit") is not None:
        words += ["--time-limit", str(each["time_limit"]).removesuffix(".0")]
    return words


def command(run: dict[str, Any], out: str) -> str:
    """The command that goes on with the folder `out`, a path or URI, from its run.json: that of `call`, with the folder's division and what each
    worker got."""
    there, definition = run["about"], run["definition"]
    columns, kept = there.get("columns", {}), definition["output"]
    seed = keys.seed_of(definition["seed"])
    words = [
        "distsbi",
        "catalog",
        there["run"],
        there["catalog"],
        shown(out),
        "--nsamples",
        str(definition["nsamples"]),
    ]
    words += ["--seed", str(seed)] if seed else []
    if columns.get("id_column") != "id" and not there["catalog"].endswith(".npy"):
        words += ["--id-column", columns.get("id_column") or ""]
    if columns.get("x_columns"):
        words += ["--x-columns", ",".join(columns["x_columns"])]
    elif columns.get("x_column", "x") != "x":
        words += ["--x-column", columns["x_column"]]
    words += [] if kept["draws"] else ["--no-draws"]
    words += ["--thin", str(kept["thin"])] if kept["thin"] != 1 else []
    if tuple(kept["quantiles"]) != Output().quantiles:
        words += ["--quantiles", ",".join(map(str, kept["quantiles"]))]
    options = dict(there.get("options", {}))
    for name, value in options.pop("solver_options", {}).items():
        words += ["--solver-option", f"{name}={value}"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--network", there["network"]] if there.get("network") else []
    return shlex.join([*words, *worker_words(run)])
