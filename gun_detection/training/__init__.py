"""Training: configuration, loop, and the whole recipe from data set to model version."""
