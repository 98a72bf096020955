"""Recipes: how models of this project were made, step by step."""
