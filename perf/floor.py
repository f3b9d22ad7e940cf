"""The least work of any aiohttp server, as a lower bound: read the request's body and send a constant response."""

from pathlib import Path

import click
import uvloop
from aiohttp import web


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--body", type=click.Path(path_type=Path), required=True, help="A file with the answer's body.")
def main(port: int, body: Path) -> None:
    """Send a constant response to every POST."""
    content = body.read_bytes()

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=content, content_type="application/octet-stream")

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
