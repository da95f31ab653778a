"""The reading order of boxes of text, which may be upright or tilted, large or small."""

import numpy as np
from scipy.sparse.csgraph import connected_components

LEAST_OVERLAP = 0.5  # two boxes share a row (column) if they overlap by this part of the lower (narrower) one
WIDE = 1.5  # width over height from which a box's own direction can be trusted


def reading_order(boxes: np.ndarray) -> list[int]:
    """The indices of the boxes in their reading order: row by row, from left to right.

    boxes (N, 4, 2): corners x, y in pixels, clockwise from the upper left, of text tilted by less than 45 degrees.
    Distances are compared with the boxes' own sizes, so that the scale does not matter. Rows are found along the common
    direction of the wide boxes, and each box is followed along its own slope. A row that holds several columns is read
    column by column.
    """
    if len(boxes) < 2:
        return list(range(len(boxes)))
    corners = np.asarray(boxes, dtype=np.float64)
    along = (corners[:, 1] - corners[:, 0] + corners[:, 2] - corners[:, 3]) / 2
    down = (corners[:, 3] - corners[:, 0] + corners[:, 2] - corners[:, 1]) / 2
    widths, heights = (np.maximum(np.linalg.norm(side, axis=1), 1e-6) for side in (along, down))
    wide = widths >= WIDE * heights
    common = along[wide].sum(0) if wide.any() else np.array([1.0, 0.0])
    common = common / np.linalg.norm(common)
    turned = np.array([common, [-common[1], common[0]]])
    (x, y), (run, rise) = turned @ corners.mean(1).T, turned @ along.T
    slopes = np.where(wide, rise / np.where(wide, run, 1), 0)
    starts, ends = x - widths / 2, x + widths / 2
    meeting = (np.maximum(starts[:, None], starts) + np.minimum(ends[:, None], ends)) / 2  # between boxes, or in both
    level = y[:, None] + slopes[:, None] * (meeting.clip(starts[:, None], ends[:, None]) - x[:, None])
    in_row = _overlap(np.abs(level - level.T), heights)
    in_column = _overlap(np.abs(x[:, None] - x), widths)

    def ordered(places: np.ndarray) -> list[int]:
        rows = _parts(in_row, places, y)
        if len(rows) > 1:
            return [place for row in rows for place in ordered(row)]
        columns = _parts(in_column, places, x)
        if len(columns) > 1:
            return [place for column in columns for place in ordered(column)]
        return [int(place) for place in places[np.argsort(starts[places], kind="stable")]]

    return ordered(np.arange(len(boxes)))


def _overlap(distances: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether two intervals overlap by LEAST_OVERLAP of the shorter, from the distances (N, N) of their middles."""
    shared = (lengths[:, None] + lengths) / 2 - distances
    return shared > LEAST_OVERLAP * np.minimum(lengths[:, None], lengths)


def _parts(linked: np.ndarray, places: np.ndarray, middles: np.ndarray) -> list[np.ndarray]:
    """The places in linked parts, ordered by the mean of each part's middles."""
    count, labels = connected_components(linked[np.ix_(places, places)], directed=False)
    parts = [places[labels == label] for label in range(count)]
    return sorted(parts, key=lambda part: float(middles[part].mean()))
