"""The server under test: `python -m tests.consistency.serve SETTINGS WRITER`, both JSON, as for `tests.server.serve`.

It also folds small views, and soon replaces a live environment that is held. If the writer's choice names a bug as
"planted", the server has this bug: tests use it to check the checker.
"""

import json
import sys
from pathlib import Path

from shoal.engine.server.run import run
from shoal.engine.server.settings import server_settings
from shoal.loaders.apply import compaction
from shoal.loaders.commit import live_replacement
from shoal.loaders.warming import warm
from tests.consistency.planted import PLANTED
from tests.server.serve import writer_for

FOLD_LEAST_ROWS = 30
LEAST_HELD_BYTES = 1 << 18
HELD_SECONDS = 0.3

if __name__ == "__main__":
    compaction.FOLD_LEAST_ROWS = FOLD_LEAST_ROWS
    live_replacement.LEAST_HELD_BYTES = LEAST_HELD_BYTES
    live_replacement.HELD_SECONDS = HELD_SECONDS
    choice = json.loads(sys.argv[2])
    if choice.get("planted"):
        PLANTED[choice["planted"]]()
    checked = server_settings(**json.loads(sys.argv[1]))
    run(checked, writer_for(Path(checked.store), choice, checked.scrub_hours), warm_writer=warm)
