"""From candidate to champion: registry of model versions, gate, promotions."""
