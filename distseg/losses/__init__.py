"""One loss a file. Each takes tensors and scalars and returns one value per slot, [B]: the step takes their mean."""
