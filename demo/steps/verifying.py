"""Step: verify that the server's responses are right."""

from datetime import date

from demo.client import Client
from demo.errors import DemoFailed
from demo.replay import table_of
from demo.setting import Setting, named
from demo.verification import Verified, verify_ages, verify_gone, verify_values


def verify(setting: Setting, client: Client, day: date) -> None:
    """Compare all served values with the feature tables of a day. Raise DemoFailed if any differ."""
    terminal = setting.terminal
    workspace = setting.workspace
    first_day = setting.calendar.replayed[0]
    values = Verified()
    gone = Verified()
    old = Verified()
    for view in setting.views_file.views:
        table = table_of(workspace, view.name, day)
        values += verify_values(client, view, table)
        gone += verify_gone(client, view, table_of(workspace, view.name, first_day), table)
        old += verify_ages(client, view, table)
    if wrong := (*values.wrong, *gone.wrong, *old.wrong):
        raise DemoFailed(f"served values differ from the feature tables of {day}: {'; '.join(wrong[:10])}")
    terminal.say(
        f"\nVerified against the tables of {named(day)}, read with pyarrow only: all {values.compared:,} values of all "
        f"rows of all views are equal{_but(values)}.\n{gone.compared:,} keys that were removed from the tables are "
        f"NOT_FOUND; {old.compared:,} rows older than their view's TTL are OUTSIDE_MAX_AGE."
    )
    terminal.finding(f"verified, as of {day:%a %d %b}", f"{values.compared:,} values, none wrong")


def _but(values: Verified) -> str:
    return f", {values.within_tolerance:,} of them within their feature's tolerance" if values.within_tolerance else ""
