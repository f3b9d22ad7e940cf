"""The Python client of Shoal's servers: replicas, shards, deadlines, retries, hedging; Arrow and NumPy without copying.

Use `Client` in threads, and `shoal.client.aio.AsyncClient` with asyncio.
"""

from shoal.client.answers import Answer as Answer
from shoal.client.answers import Position as Position
from shoal.client.answers import Pushed as Pushed
from shoal.client.client import Client as Client
from shoal.client.errors import DeadlineExceeded as DeadlineExceeded
from shoal.client.errors import NoAnswer as NoAnswer
from shoal.client.errors import PushIncomplete as PushIncomplete
from shoal.client.errors import ServerError as ServerError
from shoal.client.errors import ShardsDisagree as ShardsDisagree
from shoal.client.errors import ShoalError as ShoalError
from shoal.client.replicas import Limits as Limits
