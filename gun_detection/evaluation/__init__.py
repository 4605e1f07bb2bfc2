"""How good a detector is: COCO average precision, false alarms, operating threshold, report."""
