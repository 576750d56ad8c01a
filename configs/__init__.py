"""Recipes by data set. Fields and how files are read: trainer.config."""
