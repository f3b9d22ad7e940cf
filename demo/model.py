"""A model of delays that can be checked by hand: a base, and so many minutes for each minute of some mean delays.

The weights are a least-squares fit to the evening departures of February to November 2013, rounded. The model knows
little of the day itself, so it explains little of a single delay; as a ranking it is better than none.
"""

import numpy as np
import numpy.typing as npt

from engine.schema import embedding_size
from spark_export.views import ViewsFile

SERVICE = "departures_v1"
BASE_MINUTES = 1.3
WEIGHTS = {
    "planes:delay_mean_28d": 0.03,
    "routes:delay_mean_28d": 0.29,
    "carriers:delay_mean_1d": 0.13,
    "carriers:delay_mean_28d": 0.93,
    "airports:delay_mean_1d": 0.20,
}

Matrix = npt.NDArray[np.float64]


def weights_of_columns(views_file: ViewsFile) -> Matrix:
    """The weight of each column of the matrix in which the feature service is answered; an embedding has several."""
    types = {f"{view.name}:{feature.name}": feature.type for view in views_file.views for feature in view.features}
    (service,) = (service for service in views_file.services if service.name == SERVICE)
    columns: list[float] = []
    for reference in service.features:
        columns += [WEIGHTS.get(reference, 0.0)] * (embedding_size(types[reference]) or 1)
    return np.array(columns)


def expected_delays(features: Matrix, weights: Matrix) -> Matrix:
    """Minutes for each row of features; one that is absent counts as no delay."""
    return BASE_MINUTES + np.nan_to_num(features) @ weights
