"""Reference losses: what each domain's loss should come down to, in nats a token.

They are given, or predicted for the target's size from the losses of sibling models by a scaling law a / N^b + c
(Sheared LLaMA, arXiv 2310.06694, section 3.2).
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from shearing.data.config import ReferencesConfig
from shearing.errors import UserError
from shearing.storage import resolve

SMALLEST_EXPONENT, LARGEST_EXPONENT = 1e-4, 10.0
SHALLOW_EXPONENT = 0.05


@dataclass(frozen=True)
class ScalingLawFit:
    """loss(N) = a / N^b + c in nats a token, N in parameters."""

    a: float
    b: float
    c: float
    degrees_of_freedom: int
    largest_residual: float
    warnings: list[str] = field(default_factory=list)
    errors: "FitErrors | None" = None

    def predict(self, parameters: float) -> float:
        """The loss of a model of that many parameters."""
        return self.a * math.exp(-self.b * math.log(parameters)) + self.c

    def standard_error(self, parameters: float) -> float | None:
        """Of `predict`, nats a token, by the delta method; None where the points leave no measure of their scatter.

        Of the curve, not of one more model. Where the bound on c binds, given that c is 0.
        """
        return self.errors.of_prediction(parameters) if self.errors else None


@dataclass(frozen=True)
class FitErrors:
    """How far a fit may be off: the scatter of its points, and the fitted curve's slopes in each parameter.

    `triangle_KK` is R of the QR decomposition of the slopes at the N points, K parameters: (scale, b) or (scale, b, c)
    with log sizes counted from `centre`.
    """

    scatter: float
    triangle_KK: np.ndarray
    centre: float
    scale: float
    b: float

    def of_prediction(self, parameters: float) -> float:
        """Standard error of the curve at a size; infinite where the points do not tell its parameters apart."""
        x = np.array([math.log(parameters) - self.centre])
        slopes_K = _slopes(x, self.scale, self.b, len(self.triangle_KK))[0]
        try:
            return self.scatter * float(np.linalg.norm(np.linalg.solve(self.triangle_KK.T, slopes_K)))
        except np.linalg.LinAlgError:
            return math.inf


@dataclass(frozen=True)
class References:
    """Reference loss of each domain, nats a token, what to be wary of, and standard errors where there are any."""

    losses: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    standard_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SiblingLosses:
    """Losses of models of one family: `losses[domain][i]` belongs to a model of `parameters[i]`."""

    parameters: list[float]
    losses: dict[str, list[float]]


def fit_scaling_law(parameters: list[float], losses: list[float], bounded: bool = True) -> ScalingLawFit:
    """Least squares fit of a / N^b + c to at least three models; `bounded` holds c at or above zero.

    For each b the best a and c are a straight line's, so only b is searched for. Raises UserError for fewer than three
    different sizes, values that are not finite and positive, or losses that do not fall with size.
    """
    _check_points(parameters, losses)
    log_size = np.log(np.asarray(parameters, dtype=np.float64))
    centre = float(log_size.mean())
    x_N, y_N = log_size - centre, np.asarray(losses, dtype=np.float64)
    b = _best_exponent(x_N, y_N, bounded)
    scale, c = _line(x_N, y_N, b, bounded)
    if scale <= 0:
        raise UserError(
            f"losses {losses} do not fall with size over {parameters} parameters; a scaling law needs losses that do. "
            f"Check the order of both lists."
        )
    binds = bounded and c == 0.0
    fitted = 2 if binds else 3
    residual_N = scale * np.exp(-b * x_N) + c - y_N
    residual = float(np.abs(residual_N).max())
    scatter = math.sqrt(float(residual_N @ residual_N) / max(1, len(losses) - fitted))
    triangle_KK = np.asarray(np.linalg.qr(_slopes(x_N, scale, b, fitted), mode="r"))
    errors = FitErrors(scatter, triangle_KK, centre, scale, b)
    return ScalingLawFit(
        a=scale * math.exp(b * centre),
        b=b,
        c=c,
        degrees_of_freedom=len(losses) - fitted,
        largest_residual=residual,
        warnings=_fit_warnings(b, c, binds=binds, points=len(losses), residual=residual),
        errors=errors if len(losses) > 3 else None,
    )


def _slopes(x_N: np.ndarray, scale: float, b: float, count: int) -> np.ndarray:
    """Derivatives [N, count] of scale * exp(-b x) + c by scale, b and, where it was fitted, c."""
    power_N = np.exp(-b * x_N)
    return np.stack([power_N, -scale * x_N * power_N, np.ones_like(x_N)][:count], axis=1)


def _fit_warnings(b: float, c: float, *, binds: bool, points: int, residual: float) -> list[str]:
    warnings = []
    if points == 3:
        warnings.append("three models for three parameters: no degrees of freedom left, so the fit has no error bar")
    if binds:
        warnings.append(
            f"the irreducible loss is held at 0 (without the bound it would be negative); two parameters are "
            f"fitted and miss the given losses by up to {residual:.4f}"
        )
    if c < 0:
        warnings.append(f"the irreducible loss is negative (c = {c:.2f}): do not trust predictions far outside")
    if b < SHALLOW_EXPONENT:
        warnings.append(f"the exponent is very small (b = {b:.4f}): the loss falls nearly like log N")
    return warnings


def _check_points(parameters: list[float], losses: list[float]) -> None:
    if len(parameters) != len(losses):
        raise UserError(f"{len(losses)} losses for {len(parameters)} sizes; give one loss a size.")
    wrong = [
        v
        for v in [*parameters, *losses]
        if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) or v <= 0
    ]
    if wrong:
        raise UserError(f"sizes and losses must be finite numbers above 0; found {', '.join(map(repr, wrong))}.")
    if len(set(parameters)) < 3:
        raise UserError(
            f"a scaling law a / N^b + c has three parameters and needs models of at least three sizes; "
            f"given: {parameters}. Add models, or use references.kind=values."
        )


def _line(x_N: np.ndarray, y_N: np.ndarray, b: float, bounded: bool) -> tuple[float, float]:
    """The best (scale, c) of scale * exp(-b x) + c, by least squares, for one b.

    expm1 keeps exp(-b x) - 1 exact where b is tiny and the two columns are nearly the same.
    """
    curve_N = np.expm1(-b * x_N)
    centred_N = curve_N - curve_N.mean()
    scale = float(centred_N @ (y_N - y_N.mean()) / (centred_N @ centred_N))
    c = float(y_N.mean()) - scale * float(curve_N.mean() + 1)
    if bounded and c < 0:
        power_N = curve_N + 1
        return float(power_N @ y_N / (power_N @ power_N)), 0.0
    return scale, c


def _best_exponent(x_N: np.ndarray, y_N: np.ndarray, bounded: bool) -> float:
    """The b of the least squared error: a grid over its logarithm, then golden sections."""

    def error(log_b: float) -> float:
        b = math.exp(log_b)
        scale, c = _line(x_N, y_N, b, bounded)
        return float(((scale * (np.expm1(-b * x_N) + 1) + c - y_N) ** 2).sum())

    grid = np.linspace(math.log(SMALLEST_EXPONENT), math.log(LARGEST_EXPONENT), 800)
    best = int(np.argmin([error(g) for g in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(100):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if error(left) <= error(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def fit_domains(siblings: SiblingLosses, bounded: bool = True) -> dict[str, ScalingLawFit]:
    """One fit a domain. Raises UserError with the problems of all domains at once."""
    fits, problems = {}, []
    for domain, losses in siblings.losses.items():
        try:
            fits[domain] = fit_scaling_law(siblings.parameters, losses, bounded)
        except UserError as error:
            problems += [f"domain {domain}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
    return fits


def load_siblings(uri: str) -> SiblingLosses:
    """Read `parameters: [N1, N2, ...]` and `losses: {domain: [l1, l2, ...]}`. Raises UserError."""
    value = _load_yaml(uri)
    form = "allowed: parameters: [N1, N2, ...] and losses: {domain: [l1, l2, ...]}"
    unknown = sorted(str(key) for key in set(value) - {"parameters", "losses"})
    if unknown:
        raise UserError(f"{uri} holds unknown keys {', '.join(unknown)}; {form}.")
    parameters, losses = value.get("parameters"), value.get("losses")
    if not isinstance(parameters, list) or not isinstance(losses, dict) or not losses:
        raise UserError(f"{uri} lacks parameters or losses, or one has the wrong form; {form}.")
    problems = [
        f"{uri}: losses of domain {domain} are {row!r}; allowed: a list of {len(parameters)} numbers, one a size."
        for domain, row in losses.items()
        if not isinstance(row, list) or len(row) != len(parameters)
    ]
    numbers = [*parameters, *(loss for row in losses.values() if isinstance(row, list) for loss in row)]
    problems += [
        f"{uri}: {number!r} is not a number (YAML reads 1e9 as text: write 1.0e+9)."
        for number in numbers
        if isinstance(number, bool) or not isinstance(number, int | float)
    ]
    if problems:
        raise UserError(problems)
    return SiblingLosses(parameters, {str(domain): row for domain, row in losses.items()})


def load_references(config: ReferencesConfig, domains: Iterable[str], parameters: int) -> References:
    """Reference losses of `domains` for the kinds `values`, `file` and `scaling_law` at a target of `parameters`.

    Raises UserError where a domain has none, or the settings are incomplete. The kind `source` is measured, not loaded.
    """
    assert config.kind != "source", "the source model's losses are measured"
    wanted = list(domains)
    if config.kind == "values":
        if config.values is None:
            raise UserError("references.kind = values needs references.values: {domain: loss in nats a token}.")
        return References(_checked(config.values, wanted, "references.values"))
    if config.file is None:
        raise UserError(f"references.kind = {config.kind} needs references.file, a YAML file.")
    if config.kind == "file":
        return References(_checked(_load_yaml(config.file), wanted, config.file))
    fits = fit_domains(load_siblings(config.file), config.bounded)
    losses = _checked({d: fit.predict(parameters) for d, fit in fits.items()}, wanted, config.file)
    errors = {d: error for d in wanted if (error := fits[d].standard_error(parameters)) is not None}
    return References(losses, [f"domain {d}: {w}" for d in wanted for w in fits[d].warnings], errors)


def _checked(given: dict[Any, Any], wanted: list[str], where: str) -> dict[str, float]:
    """The wanted domains' losses as floats; all problems at once."""
    problems = []
    for domain in wanted:
        if domain not in given:
            near = difflib.get_close_matches(domain, [str(key) for key in given], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            held = ", ".join(sorted(map(str, given))) or "nothing"
            problems.append(f"{where} has no reference loss for domain {domain}; it holds: {held}.{hint}")
            continue
        loss = given[domain]
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not (math.isfinite(loss) and loss >= 0):
            problems.append(f"{where}: the loss of {domain} is {loss!r}; allowed: a finite number of nats, 0 or more.")
    if problems:
        raise UserError(problems)
    return {domain: float(given[domain]) for domain in wanted}


def _load_yaml(uri: str) -> dict[Any, Any]:
    filesystem, path = resolve(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            value = yaml.safe_load(stream.read())
    except OSError as error:
        raise UserError(f"cannot read {uri}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{uri} is not YAML: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{uri} holds {type(value).__name__}, not a mapping.")
    return value
