"""The server under test: `python -m tests.consistency.serve SETTINGS WRITER`, both JSON, as `tests.server.serve`.

It folds small views too. Where the writer's choice names a bug as "planted", the server has it: that is how the checker
is checked.
"""

import json
import sys
from pathlib import Path

from engine.server import run
from engine.settings import server_settings
from loaders import compaction
from tests.consistency.planted import PLANTED
from tests.server.serve import writer_for

FOLD_LEAST_ROWS = 30

if __name__ == "__main__":
    compaction.FOLD_LEAST_ROWS = FOLD_LEAST_ROWS
    choice = json.loads(sys.argv[2])
    if choice.get("planted"):
        PLANTED[choice["planted"]]()
    checked = server_settings(**json.loads(sys.argv[1]))
    run(checked, writer_for(Path(checked.store), choice))
