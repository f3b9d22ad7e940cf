"""Step: print the measurements, and commands to try next. The step runs each command before it prints the command."""

import os
import shutil
from collections.abc import Sequence

from demo import server
from demo.client import Client, body
from demo.departures import Departure, entities
from demo.model import SERVICE
from demo.setting import Setting

Command = list[str]


def requests_about(departure: Departure, client: Client, port: int) -> list[Command]:
    """Return curl commands for the running server, and run them. Without curl, only the lookup request is sent."""
    url = f"http://127.0.0.1:{port}/v1"
    request = body(entities([departure]), service=SERVICE)
    client.lookup(request)
    commands = [["curl", "-s", f"{url}/status"], ["curl", "-s", f"{url}/lookup", "-d", request.decode()]]
    if shutil.which("curl"):
        for command in commands:
            server.run([*command, "--fail"])
    return commands


def commands_about(departure: Departure, setting: Setting) -> list[Command]:
    """Return commands that read the store and the root, or follow the root, without a server, and run them."""
    shoal = str(server.shoal())
    store = str(setting.workspace.store)
    keys = entities([departure])
    options = [option for name, (value,) in keys.items() for option in ("--key", f"{name}={value}")]
    plane = ["--features", "planes:*", "--key", f"tailnum={departure.tailnum}"]
    commands = [
        [shoal, "lookup", "--store", store, *plane, "--explain"],
        [shoal, "lookup", "--store", store, "--service", SERVICE, *options],
        [shoal, "status", "--store", store],
        [shoal, "verify", str(setting.workspace.root)],
        [shoal, "verify", str(setting.workspace.store)],
        [shoal, "reload", "--store", store],
    ]
    for command in commands:
        server.run(command)
    return commands


def close(setting: Setting, commands: Sequence[Command], requests: Sequence[Command], port: int) -> None:
    """Print the measurements and the commands."""
    terminal = setting.terminal
    workspace = setting.workspace
    terminal.heading("What was measured")
    terminal.show(terminal.findings())
    terminal.say(f"\nOn {os.cpu_count()} cores, shared by Spark, the server and its clients.")
    terminal.heading("What to try next")
    terminal.say(f"The export root is {workspace.root}, the store is {workspace.store}. Look into them:\n")
    for command in commands:
        terminal.command(command)
    terminal.say("\nServe the store again, and send requests to the server from another terminal:\n")
    for command in (server.serve_command(workspace, port), *requests):
        terminal.command(command)
