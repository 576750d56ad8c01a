"""NVIDIA DALI pipelines: a loader each for arrays, files, packed images. Which images: datasets, images."""
