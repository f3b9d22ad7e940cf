"""The command `shoal feast-diff`."""

import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click

from shoal.engine.base.errors import ShoalError
from shoal.engine.base.server_access import access_options, server_access
from shoal.engine.cli.status_command import LocalPath
from shoal.engine.cli.terminal import cell, say, say_json
from shoal.engine.feast.diff import (
    Difference,
    FeastSide,
    Keys,
    ServerSide,
    StoreSide,
    Summary,
    Value,
    compare,
)
from shoal.engine.feast.keys import read_keys, sample_keys
from shoal.engine.feast.repository import open_repository
from shoal.engine.format.schema import split_reference
from shoal.engine.lookup.given_keys import given_keys


@click.command("feast-diff", short_help="Look the same keys up in Feast and in Shoal, and show what differs.")
@click.option("--repo", "repository", required=True, metavar="DIR", help="The Feast repository, as deployed.")
@click.option("--store", type=LocalPath(), metavar="DIR", help="The store of Shoal to read.")
@click.option("--server", metavar="URL", help="The server of Shoal to ask instead.")
@access_options
@click.option("--features", metavar="VIEW:FEATURE,…", help="The features to compare; VIEW:* means all of a view.")
@click.option("--service", metavar="NAME", help="Compare the features of this feature service instead.")
@click.option("--keys", "keys_path", type=click.Path(path_type=Path), metavar="FILE", help="Keys, as Parquet or CSV.")
@click.option("--key", "given", multiple=True, metavar="KEY=VALUE", help="A join key; repeat it for more rows.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Sample N keys from the store.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.0, help="The allowed difference of numbers.")
@click.option("--max", "shown", type=click.IntRange(min=0), default=100, show_default=True, help="Differences to show.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def feast_diff_command(
    repository: str,
    features: str | None,
    service: str | None,
    tolerance: float,
    shown: int,
    form: str,
    as_json: bool,
    **sources: Any,
) -> None:
    """Look the same keys up in Feast and in Shoal, and show what differs.

    Rows older than their TTL are compared too, because Feast serves them; they are counted. The exit code is 0 if all
    values are equal, 1 if anything differs, and 2 if the comparison failed.
    """
    chosen = _Sources(**sources)
    chosen.check()
    _check_one({"--features": features, "--service": service})
    as_json = as_json or form == "json"
    summary = Summary()
    kept = []
    try:
        shoal = chosen.shoal_side()
        feast = FeastSide(open_repository(repository))
        asked = _features_of_service(feast, shoal, service) if service else _features_listed(shoal, features or "")
        if not asked.references:
            raise click.UsageError("there is no feature to compare; name features that both sides have")
        keys = chosen.keys_of(shoal, asked.references)
        differences = compare(
            asked.references, keys, feast, shoal, shoal.description, tolerance=tolerance, summary=summary
        )
        for difference in islice(differences, shown):
            kept.append(difference)
            if not as_json:
                say(_line(difference))
        for _ in differences:
            pass  # The summary counts all differences.
    except ShoalError as error:
        # The exit code 1 is reserved for differences.
        say(f"shoal: {error}", err=True)
        sys.exit(2)
    if as_json:
        document = {
            "summary": asdict(summary),
            "only_in_feast": asked.only_in_feast,
            "only_in_shoal": asked.only_in_shoal,
            "differences": [asdict(difference) for difference in kept],
        }
        say_json(document)
    else:
        for side, others in (("Feast", asked.only_in_feast), ("Shoal", asked.only_in_shoal)):
            for reference in others:
                say(f"feature service {service}: only {side} has {reference}")
        for line in _summary_lines(summary, len(kept)):
            say(line)
    sys.exit(0 if summary.agrees and not asked.only_in_feast and not asked.only_in_shoal else 1)


@dataclass(frozen=True)
class _Sources:
    """The options that name Shoal's side of a comparison, and the keys."""

    store: Path | None
    server: str | None
    token_file: Path | None
    tls_ca: Path | None
    tls_certificate: Path | None
    tls_key: Path | None
    keys_path: Path | None
    given: tuple[str, ...]
    sample: int | None

    def check(self) -> None:
        """Raise UsageError unless the options name exactly one side of Shoal, and exactly one source of keys."""
        _check_one({"--store": self.store, "--server": self.server})
        _check_one({"--keys": self.keys_path, "--key": self.given or None, "--sample": self.sample})
        if self.sample is not None and self.store is None:
            raise click.UsageError("--sample reads keys from a store; give --store, or keys with --keys or --key")

    def shoal_side(self) -> StoreSide | ServerSide:
        """Open the store, or describe the server."""
        if self.store is not None:
            return StoreSide(self.store)
        access = server_access(self.token_file, self.tls_ca, self.tls_certificate, self.tls_key)
        return ServerSide(self.server or "", access)

    def keys_of(self, shoal: StoreSide | ServerSide, references: list[str]) -> Keys:
        """Return the keys to compare, by join key."""
        types = shoal.description.join_keys(references)
        if self.keys_path is not None:
            return read_keys(self.keys_path, types)
        if isinstance(shoal, StoreSide) and self.sample is not None:
            views = dict.fromkeys(split_reference(reference)[0] for reference in references)
            return sample_keys(shoal.store.version(), [*views], self.sample)
        return given_keys(self.given, types)


@dataclass(frozen=True)
class _Asked:
    """The features to compare, and the features of a feature service that only one side has."""

    references: list[str]
    only_in_feast: list[str] = field(default_factory=list)
    only_in_shoal: list[str] = field(default_factory=list)


def _features_of_service(feast: FeastSide, shoal: StoreSide | ServerSide, service: str) -> _Asked:
    ours = shoal.description.service(service)
    theirs = feast.service(service)
    return _Asked(
        [reference for reference in ours if reference in theirs],
        only_in_feast=[reference for reference in theirs if reference not in ours],
        only_in_shoal=[reference for reference in ours if reference not in theirs],
    )


def _features_listed(shoal: StoreSide | ServerSide, features: str) -> _Asked:
    listed = [part.strip() for part in features.split(",")]
    return _Asked(shoal.description.references([part for part in listed if part]))


def _check_one(options: dict[str, Any]) -> None:
    if sum(value is not None for value in options.values()) != 1:
        *names, last = options
        raise click.UsageError(f"give one of {', '.join(names)} and {last}")


def _line(difference: Difference) -> str:
    key = " ".join(f"{name}={cell(value)}" for name, value in difference.key.items())
    return f"{key} {difference.feature}: Feast {_side(difference.feast)}, Shoal {_side(difference.shoal)}"


def _side(value: Value) -> str:
    details = [value.status, *([cell(value.event_time)] if value.event_time else [])]
    return f"{cell(value.value)} ({', '.join(details)})"


def _summary_lines(summary: Summary, shown: int) -> list[str]:
    differences = summary.compared - summary.equal
    lines = [f"… and {differences - shown:,} more differences"] if differences > shown else []
    lines.append(
        f"{summary.compared:,} values of {summary.keys:,} keys compared: {summary.equal:,} equal, "
        f"{summary.different:,} different, {summary.missing_in_feast:,} missing in Feast, "
        f"{summary.missing_in_shoal:,} missing in Shoal"
    )
    if summary.older_than_ttl:
        lines.append(f"{summary.older_than_ttl:,} values are older than the TTL: Shoal serves them only if asked to")
    if summary.other_event_times:
        lines.append(f"{summary.other_event_times:,} equal values have other event times")
    return lines
