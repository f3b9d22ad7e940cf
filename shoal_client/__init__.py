"""The Python client of Shoal's servers: replicas, shards, deadlines, retries, hedging; Arrow and NumPy without copying.

`Client` is for threads; `shoal_client.aio.AsyncClient` is for asyncio.
"""

from shoal_client.answers import Answer as Answer
from shoal_client.answers import Position as Position
from shoal_client.answers import Pushed as Pushed
from shoal_client.client import Client as Client
from shoal_client.errors import DeadlineExceeded as DeadlineExceeded
from shoal_client.errors import NoAnswer as NoAnswer
from shoal_client.errors import PushIncomplete as PushIncomplete
from shoal_client.errors import ServerError as ServerError
from shoal_client.errors import ShardsDisagree as ShardsDisagree
from shoal_client.errors import ShoalError as ShoalError
from shoal_client.replicas import Limits as Limits
