"""Settings are checked once, and an error names the wrong setting."""

import os
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import ServerRunning, SettingsInvalid, StoreNotWritable
from shoal.engine.process.run_directory import (
    ServerRecord,
    read_server_record,
    remove_server_record,
    serving,
    started_at,
    write_server_record,
)
from shoal.engine.server.settings import server_settings
from shoal.loaders.commit.store_writer import StoreWriter


def test_defaults_serve_this_machine_only() -> None:
    settings = server_settings(store="/srv/shoal")
    assert (settings.host, settings.port, settings.max_keys) == ("127.0.0.1", 8080, 100_000)
    assert settings.workers >= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the setting 'store' is missing"),
        ({"store": "s", "port": 70000}, "port is 70000: Input should be less than or equal to 65535"),
        ({"store": "s", "workers": 0}, "workers is 0: Input should be greater than or equal to 1"),
        ({"store": "s", "scrub_hours": -1}, "scrub_hours is -1: Input should be greater than or equal to 0"),
        ({"store": "s", "scrub_hours": float("nan")}, "scrub_hours is nan: Input should be"),
        ({"store": "s", "drain": 1}, "there is no setting 'drain'; the settings are: store, host, port"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsInvalid, match=message):
        server_settings(**values)


def test_a_store_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file", tmp_path / "file" / "store", tmp_path / "loop", Path("/proc/store")):
        with pytest.raises(StoreNotWritable, match="cannot be written to"), serving(path):
            pass
        with pytest.raises(StoreNotWritable, match="cannot be written to"):
            StoreWriter(path)


def test_the_record_of_a_process_that_is_gone_counts_for_nothing(tmp_path: Path) -> None:
    with serving(tmp_path):
        record = ServerRecord(
            pid=os.getpid(), started_at=started_at(os.getpid()), address="http://127.0.0.1:1", workers=(1, 2)
        )
        write_server_record(tmp_path, record)
        assert read_server_record(tmp_path) == record
        owner = f"is served by process {os.getpid()} at http://127.0.0.1:1"
        with pytest.raises(ServerRunning, match=owner), serving(tmp_path):
            pass
        write_server_record(tmp_path, record.model_copy(update={"started_at": record.started_at - 60}))
        assert read_server_record(tmp_path) is None
        remove_server_record(tmp_path)
        assert read_server_record(tmp_path) is None
