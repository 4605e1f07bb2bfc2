"""What a detector finds in a picture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Detections:
    """Boxes of one picture, best first.

    boxes: float32 (N, 4), xyxy in pixels of the upright picture, inside it.
    scores: float32 (N,), in [0, 1].
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.scores), 4):
            raise ValueError(f"boxes {self.boxes.shape} do not match {len(self.scores)} scores")

    def above(self, threshold: float) -> "Detections":
        keep = self.scores >= threshold
        return Detections(self.boxes[keep], self.scores[keep])

    def resized(self, before: tuple[int, int], after: tuple[int, int]) -> "Detections":
        """In pixels of the same picture in another size; sizes are (width, height)."""
        if before == after:
            return self
        scale = np.array([after[0] / before[0], after[1] / before[1]] * 2, np.float32)
        return Detections(self.boxes * scale, self.scores)
