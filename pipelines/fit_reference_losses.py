"""Predict reference losses at a target's size from the losses of sibling models.

    python pipelines/fit_reference_losses.py LOSSES.yaml --parameters N [--unbounded] [--json]

LOSSES.yaml holds `parameters: [N1, N2, ...]` and `losses: {domain: [l1, l2, ...]}`, nats a token. Four models or more
give the predictions a standard error.
"""

import argparse
import json
import sys

from shearing.data.references import ScalingLawFit, fit_domains, load_siblings
from shearing.errors import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line to options. Exits with status 2 for a wrong one."""
    parser = argparse.ArgumentParser(description="Fit loss = a / N^b + c to each domain and predict it at a size.")
    parser.add_argument("losses", metavar="LOSSES.yaml")
    parser.add_argument("--parameters", required=True, type=float, metavar="N", help="size to predict the losses at")
    parser.add_argument("--unbounded", action="store_true", help="let c, the irreducible loss, be negative")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args(arguments)
    if not 1 <= options.parameters < float("inf"):
        parser.error(f"--parameters = {options.parameters:g}; allowed: a number of parameters, 1 or more")
    return options


def table(fits: dict[str, ScalingLawFit], parameters: float) -> str:
    """Predictions, fits and warnings as text."""
    width = max(len("domain"), *(len(domain) for domain in fits))
    lines = [
        f"{'domain':{width}}  {'loss':>8}  {'± error':>8}  {'a':>12}  {'b':>8}  {'c':>8}   "
        f"at {parameters:,.0f} parameters"
    ]
    lines += [
        f"{d:{width}}  {fit.predict(parameters):8.4f}  {_error(fit, parameters):>8}  {fit.a:12.5g}  {fit.b:8.4f}  "
        f"{fit.c:8.4f}"
        for d, fit in fits.items()
    ]
    common = set.intersection(*(set(fit.warnings) for fit in fits.values()))
    lines += [f"warning: {warning}" for fit in list(fits.values())[:1] for warning in fit.warnings if warning in common]
    lines += [f"warning: {d}: {w}" for d, fit in fits.items() for w in fit.warnings if w not in common]
    return "\n".join(lines)


def _error(fit: ScalingLawFit, parameters: float) -> str:
    error = fit.standard_error(parameters)
    return "unknown" if error is None else f"{error:.4f}"


def main(arguments: list[str] | None = None) -> int:
    """Print the predictions. Returns the exit status: 2 for input that a user has to change."""
    options = parse(arguments)
    try:
        siblings = load_siblings(options.losses)
        fits = fit_domains(siblings, bounded=not options.unbounded)
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    if options.json:
        domains = {
            d: {
                "loss": fit.predict(options.parameters),
                "standard_error": fit.standard_error(options.parameters),
                **{key: getattr(fit, key) for key in ("a", "b", "c", "warnings")},
            }
            for d, fit in fits.items()
        }
        print(json.dumps({"parameters": options.parameters, "domains": domains}, indent=2))
    else:
        print(table(fits, options.parameters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
