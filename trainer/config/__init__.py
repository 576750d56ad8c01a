"""Recipes: their fields, how they are found, read and checked. Nothing is built here from what they say."""
