"""Training: the loop, the recipe, checkpoints, several processes.

Takes a data set and gives a classifier and a `TrainResult`.
"""
