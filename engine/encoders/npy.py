"""The answer as one NumPy matrix (see `LookupResult.to_numpy`) in the .npy format, for rankers that want nothing else.

It is float32 if that holds every value of the features exactly, which it does for float32, float32[N] and bool, and
float64 otherwise; so it is the features asked for that decide, never their values. An int64 beyond 2^53 is rounded.
"""

import io

import numpy as np

from engine.result import LookupResult
from engine.schema import embedding_size

MEDIA_TYPE = "application/x-npy"


def encode(result: LookupResult) -> bytes:
    """The answer as a .npy file.

    Raises:
        LookupInvalid: a feature is a string, bytes or a variable list.
    """
    types = {feature.type for part in result.parts for feature in part.features}
    exact = all(name in ("float32", "bool") or embedding_size(name) for name in types)
    file = io.BytesIO()
    np.lib.format.write_array(file, result.to_numpy(np.float32 if exact else np.float64), allow_pickle=False)
    return file.getvalue()
