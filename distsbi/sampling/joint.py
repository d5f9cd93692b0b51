"""The posterior of a joint model: every conditional of (theta, x), by name.

Each pattern (what is drawn, what is given) is a `Posterior` of its own that shares the weights, so tiles, meshes and densities serve
it as they serve p(theta | x).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from distsbi import mesh as meshes
from distsbi.data.standardise import Standardizer
from distsbi.hints import did_you_mean
from distsbi.methods import Method
from distsbi.networks.joint import Conditional, JointNetwork
from distsbi.sampling import tiles
from distsbi.sampling.checks import as_reals, one_of
from distsbi.sampling.posterior import Posterior
from distsbi.sampling.tiles import Tile, Weights
from distsbi.solvers import Solver, solver_from_dict

X, THETA = "x", "theta"  # all of the data, all of the parameters


class JointPosterior(Posterior):
    """p(theta | x), and with `given=` any other conditional, of a joint model.

    Tokens are named: the parameters by their names, the data x_0, x_1, ...; "x" and "theta" are all of them.

    Args:
        network: a trained joint network over dim_theta + dim_x tokens.
        method: what it predicts.
        standardizer: fitted on all tokens as if they were parameters.
        dim_theta: how many tokens are parameters; the rest are data.
        names: parameter names.
        solver: the solver of p(theta | x); None: the default. `facts["patterns"]` holds those of other patterns.
        tile, mesh, facts: as for `Posterior`.
    """

    no_given = (
        'given= goes with sample alone: posterior.pattern(["x_0", ...]) is the posterior where what is named is given, and takes the values '
        "as its x, in token order."
    )

    def __init__(
        self,
        network: JointNetwork,
        method: Method,
        standardizer: Standardizer,
        dim_theta: int,
        *,
        names: tuple[str, ...] | None = None,
        solver: Solver | None = None,
        tile: Tile | Mapping[str, Tile] | None = None,
        mesh: meshes.MeshLike = None,
        facts: dict[str, Any] | None = None,
    ):
        total = network.num_tokens
        if not 0 < dim_theta <= total:
            raise ValueError(f"dim_theta must be 1 to {total}, the tokens of this network; got {dim_theta}.")
        free, given = tuple(range(dim_theta)), tuple(range(dim_theta, total))
        super().__init__(
            Conditional(network, free, given), method, standardizer.restrict(free, given),
            names=names, solver=solver, tile=tile, mesh=mesh, facts=facts,
        )  # fmt: skip
        self.joint_network, self.joint_standardizer = network, standardizer
        self.token_names = (*self.parameter_names, *data_names(total - dim_theta))
        self._patterns: dict[tuple[tuple[int, ...], tuple[int, ...]], Posterior] = {(free, given): self}

    def rename(self, names: tuple[str, ...]) -> None:
        super().rename(names)
        self.token_names = (*names, *self.token_names[len(names) :])
        self.forget_patterns()

    def calibrate(self, xs: Any, given: Sequence[str] = (X,)) -> dict[str, Any]:
        """See `Posterior.calibrate`; of the pattern where the tokens named are given, of which `xs` [n, tokens, ch] are values, in token order. Raises
        ValueError as `pattern` does too."""
        pattern = self.pattern(given)
        certificate = Posterior.calibrate(pattern, xs)
        if pattern is not self:
            key = pattern_key(self.tokens(given))
            known = {"solver": pattern.default_solver.to_dict(), "certificate": certificate}
            self.facts["patterns"] = {**self.facts.get("patterns", {}), key: known}
        self.forget_patterns()  # those without a grid of their own have that of p(theta | x)
        return certificate

    def adopt_grids(self, other: Posterior) -> None:
        super().adopt_grids(other)
        self.forget_patterns()

    @property
    def joint(self) -> JointNetwork:
        """The network over all tokens, with its weights."""
        return self.network.network  # type: ignore[attr-defined]

    def tokens(self, names: Sequence[str]) -> tuple[int, ...]:
        """The token numbers of these names. Raises ValueError naming one that does not exist, or comes twice, and for parameters that are called as
        data are."""
        check_names(self.parameter_names, len(self.token_names) - self.dim_theta)
        found: list[int] = []
        for name in (names,) if isinstance(names, str) else names:
            if name == X:
                found += range(self.dim_theta, len(self.token_names))
            elif name == THETA:
                found += range(self.dim_theta)
            elif name in self.token_names:
                found.append(self.token_names.index(name))
            else:
                raise ValueError(
                    f"there is no {name!r};{did_you_mean(name, self.token_names)} There are {', '.join(self.token_names)}, and theta and x for all of them."
                )
        twice = sorted({self.token_names[i] for i in found if found.count(i) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice.")
        return tuple(found)

    def forget_patterns(self) -> None:
        """So that patterns are made again with their grids."""
        self._patterns = {k: posterior for k, posterior in self._patterns.items() if posterior is self}

    def pattern(self, given: Sequence[str]) -> Posterior:
        """The posterior of all other tokens where those named `given` are: x of `sample` and `log_prob` has them in token order.

        It uses the grid calibrated for this pattern, if there is one, else that of p(theta | x), and says so in its
        `facts["certificate"]`. Raises ValueError for a name that does not exist, if nothing is left to draw, and for a run that was trained on
        p(theta | x) alone.
        """
        fixed = tuple(sorted(self.tokens(given)))
        free = tuple(i for i in range(len(self.token_names)) if i not in fixed)
        if not free:
            raise ValueError("all tokens are given; leave out at least one to draw it.")
        if (free, fixed) not in self._patterns:
            if self.facts.get("condition_mask") == "posterior":
                raise ValueError(
                    'this run learned p(theta | x) alone (condition_mask="posterior"), no other conditional: train one with '
                    'condition_mask="structured", the default, to draw with given=.'
                )
            known = self.facts.get("patterns", {}).get(pattern_key(fixed))
            facts = {
                **{
                    name: fact for name, fact in self.facts.items() if name != "x_extent"
                },  # of x, not of what is given here
                "certificate": known["certificate"] if known else {"met": None, "of": "another pattern"},
                "given": [self.token_names[i] for i in fixed],
            }
            network, scales = (
                Conditional(self.joint_network, free, fixed),
                self.joint_standardizer.restrict(free, fixed),
            )
            each = tiles.bytes_per_row(network, scales)  # of which there may be many more tokens than of theta
            fitting = {kind: tile.within(tiles.KINDS[kind].most_rows(each)) for kind, tile in self.tile_by_kind.items()}
            made = Pattern(
                network, self.method, scales,
                names=tuple(self.token_names[i] for i in free),
                solver=solver_from_dict(known["solver"]) if known else self.default_solver,
                tile=fitting, mesh=self.mesh, facts=facts,
            )  # fmt: skip
            # all patterns share the weights on the devices: the paths are the same
            made.weights = Weights(self.weights.params, made.weights.standardizer)
            far = self.facts.get("token_extent", ())
            if len(far) == len(self.token_names) * self.ch_theta:
                made.facts["x_extent"] = np.reshape(far, (-1, self.ch_theta))[list(fixed)].ravel().tolist()
            made.whole = self
            self._patterns[free, fixed] = made
        return self._patterns[free, fixed]

    def sample(
        self,
        key: Any = None,
        x_o: Any = None,
        nsamples: int | None = None,
        *,
        rng: Any = None,
        given: Mapping[str, Any] | None = None,
        of: Sequence[str] | None = None,
        **options: Any,
    ) -> Float[np.ndarray, "nsamples free ch"]:
        """Draws from p(theta | x_o); with `given={"x": x_o, "mass": 1.2}` from all other tokens where these are.

        `of`: the names wanted, in this order; the rest is drawn too and left out (the exact marginal of the model). Values are
        scalars, or arrays [tokens, ch] or [1, tokens, ch]; `given={}`: where nothing is known. See `Posterior.sample`.

        Raises ValueError for a name that does not exist, x given twice, a value of a wrong shape or outside its prior, NaN, and as `pattern` does.
        """
        if given is None and (of is None or x_o is None):  # which says that x_o is missing
            return super().sample(key, x_o, nsamples, rng=rng, **options)
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f'given must be a dict of what is known by name, such as {{"x": x_o}}; got {given!r}.')
        if x_o is not None:
            if X in given:
                raise ValueError("x is given twice, as x_o and in given; leave one of them out.")
            given = {X: x_o, **given}
        if of is not None and not len(of):
            raise ValueError("of names nothing to draw; leave it out for all that is not given.")
        posterior, x = self.condition(given)
        wanted = None if of is None else [self.token_names[i] for i in self.tokens(of)]
        for name in wanted or ():
            if name not in posterior.parameter_names:
                raise ValueError(f"{name!r} is given, so it cannot be drawn; leave it out of `of`.")
        drawn = Posterior.sample(posterior, one_of(rng=rng, key=key), x, nsamples, **options)
        if options.get("check"):
            self.last_check = posterior.last_check
        return drawn if wanted is None else drawn[..., [posterior.parameter_names.index(name) for name in wanted], :]

    def condition(self, given: Mapping[str, Any]) -> tuple[Posterior, Float[np.ndarray, "1 given ch"]]:
        """(the posterior of what is not given, what is given as its x). Raises as `sample` does."""
        self.tokens(list(given))
        values: dict[int, np.ndarray] = {}
        for name, value in given.items():
            numbers = self.tokens([name])
            shape = (len(numbers), self.ch_theta)
            array = as_reals(value, str(shape), f"given[{name!r}]")
            known = (
                array.shape in (shape, (1, *shape)) or 1 in shape
            )  # else the order of tokens and channels is not known
            if not known or array.size != shape[0] * shape[1]:
                raise ValueError(f"given[{name!r}] must have shape {shape}; got {array.shape}.")
            if not np.isfinite(array).all():
                raise ValueError(f"given[{name!r}] holds NaN or inf; leave out what is not known: it is drawn.")
            values.update(zip(numbers, array.reshape(shape), strict=True))
        posterior = self.pattern(list(given))
        x = (
            np.stack([values[i] for i in sorted(values)])[None]
            if values
            else np.zeros((1, 0, self.ch_theta), np.float32)
        )
        return posterior, x


class Pattern(Posterior):
    """The posterior of one pattern, of a joint posterior that keeps its grid. Saved and loaded it is a `Posterior` alone."""

    whole: JointPosterior

    def calibrate(self, xs: Any) -> dict[str, Any]:
        """See `Posterior.calibrate`; the grid is saved with the joint posterior too."""
        certificate = self.whole.calibrate(xs, self.given_names)
        self.adopt_grids(self.whole.pattern(self.given_names))
        return certificate


def data_names(dim_x: int) -> tuple[str, ...]:
    """What the tokens of the data are called."""
    return tuple(f"x_{i}" for i in range(dim_x))


def check_names(parameters: Sequence[str], dim_x: int) -> None:
    """Raises ValueError for a parameter named as data are, or all of either."""
    for name in parameters:
        if name in (X, *data_names(dim_x)) or (name == THETA and len(parameters) > 1):
            raise ValueError(
                f"a parameter cannot be called {name!r}: in given= it means data, or all of the parameters. Give it another name."
            )


def pattern_key(given: Sequence[int]) -> str:
    """How a pattern is named in spec.json."""
    return ",".join(map(str, sorted(given)))
