"""A linear model of delays that can be checked by hand: a constant plus a weighted sum of some mean delays.

The weights are a least-squares fit to the evening departures of February to November 2013, rounded. The model knows
little about the day itself, so it explains little of a single delay; but its ranking is better than no ranking.
"""

import numpy as np
import numpy.typing as npt

from shoal.engine.format.schema import embedding_size
from shoal.spark_export.views.definition import ViewsFile

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
    """Return the weight of each column of the feature service's NumPy matrix. An embedding has several columns."""
    types = {f"{view.name}:{feature.name}": feature.type for view in views_file.views for feature in view.features}
    (service,) = (service for service in views_file.services if service.name == SERVICE)
    columns: list[float] = []
    for reference in service.features:
        columns += [WEIGHTS.get(reference, 0.0)] * (embedding_size(types[reference]) or 1)
    return np.array(columns)


def expected_delays(features: Matrix, weights: Matrix) -> Matrix:
    """Return the expected delay in minutes for each row of features. A missing feature counts as no delay."""
    return BASE_MINUTES + np.nan_to_num(features) @ weights
