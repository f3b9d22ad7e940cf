"""The command `shoal feast-diff`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from engine.commands import LocalPath
from engine.errors import ShoalError
from engine.feast_diff import Difference, FeastSide, Keys, ServerSide, StoreSide, Summary, Value, compare
from engine.feast_keys import read_keys, sample_keys
from engine.feast_repository import open_repository
from engine.given_keys import given_keys
from engine.server_access import access_options, server_access
from engine.terminal import cell, say, say_json


@click.command("feast-diff", short_help="Look the same keys up in Feast and in Shoal, and show what differs.")
@click.option("--repo", "repository", required=True, metavar="DIR", help="The Feast repository, as deployed.")
@click.option("--store", type=LocalPath(), metavar="DIR", help="The store of Shoal to read.")
@click.option("--server", metavar="URL", help="The server of Shoal to ask instead.")
@access_options
@click.option("--features", metavar="VIEW:FEATURE,…", help="What to compare; VIEW:* is all of a view.")
@click.option("--service", metavar="NAME", help="Compare the features of this feature service instead.")
@click.option("--keys", "keys_path", type=click.Path(path_type=Path), metavar="FILE", help="Keys, as Parquet or CSV.")
@click.option("--key", "given", multiple=True, metavar="KEY=VALUE", help="A join key; given again, another row.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Take N keys of the store itself.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.0, help="How far numbers may be apart.")
@click.option("--max", "shown", type=click.IntRange(min=0), default=100, show_default=True, help="Differences to show.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def feast_diff_command(
    repository: str,
    store: Path | None,
    server: str | None,
    token_file: Path | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    features: str | None,
    service: str | None,
    keys_path: Path | None,
    given: tuple[str, ...],
    sample: int | None,
    tolerance: float,
    shown: int,
    form: str,
    as_json: bool,
) -> None:
    """Look the same keys up in Feast and in Shoal, and show what differs.

    Rows older than their TTL are compared too, since Feast serves them, and counted. Ends with 0 if all is equal, with
    1 if anything differs, and with 2 if it could not be compared.
    """
    _check_one({"--store": store, "--server": server})
    _check_one({"--features": features, "--service": service})
    _check_one({"--keys": keys_path, "--key": given or None, "--sample": sample})
    if sample is not None and store is None:
        raise click.UsageError("--sample reads keys from a store; give --store, or keys by --keys or --key")
    try:
        if store is not None:
            shoal: StoreSide | ServerSide = StoreSide(store)
        else:
            shoal = ServerSide(server or "", server_access(token_file, tls_ca, tls_certificate, tls_key))
        description = shoal.description
        feast = FeastSide(open_repository(repository))
        only_in_feast: list[str] = []
        only_in_shoal: list[str] = []
        if service is not None:
            ours, theirs = description.service(service), feast.service(service)
            references = [reference for reference in ours if reference in theirs]
            only_in_feast = [reference for reference in theirs if reference not in ours]
            only_in_shoal = [reference for reference in ours if reference not in theirs]
        else:
            references = description.references([part.strip() for part in (features or "").split(",") if part.strip()])
        if not references:
            raise click.UsageError("there is no feature to compare; name some that both have")
        types = description.join_keys(references)
        if keys_path is not None:
            keys: Keys = read_keys(keys_path, types)
        elif isinstance(shoal, StoreSide) and sample is not None:
            views = dict.fromkeys(reference.partition(":")[0] for reference in references)
            keys = sample_keys(shoal.store.version(), [*views], sample)
        else:
            keys = given_keys(given, types)
        summary, kept = Summary(), []
        for number, difference in enumerate(
            compare(references, keys, feast, shoal, description, tolerance=tolerance, summary=summary)
        ):
            if number < shown:
                kept.append(difference)
                if not as_json and form == "text":
                    say(_line(difference))
    except ShoalError as error:
        # 1 is said of answers that differ, and of nothing else.
        say(f"shoal: {error}", err=True)
        sys.exit(2)
    if as_json or form == "json":
        document = {
            "summary": asdict(summary),
            "only_in_feast": only_in_feast,
            "only_in_shoal": only_in_shoal,
            "differences": [asdict(difference) for difference in kept],
        }
        say_json(document)
    else:
        for side, others in (("Feast", only_in_feast), ("Shoal", only_in_shoal)):
            for reference in others:
                say(f"feature service {service}: only {side} has {reference}")
        for line in _summary_lines(summary, len(kept)):
            say(line)
    sys.exit(0 if summary.agrees and not only_in_feast and not only_in_shoal else 1)


def _check_one(options: dict[str, Any]) -> None:
    if sum(value is not None for value in options.values()) != 1:
        *names, last = options
        raise click.UsageError(f"give one of {', '.join(names)} and {last}")


def _line(difference: Difference) -> str:
    key = " ".join(f"{name}={cell(value)}" for name, value in difference.key.items())
    return f"{key} {difference.feature}: Feast {_side(difference.feast)}, Shoal {_side(difference.shoal)}"


def _side(value: Value) -> str:
    told = [value.status, *([cell(value.event_time)] if value.event_time else [])]
    return f"{cell(value.value)} ({', '.join(told)})"


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
