"""Runs minidit on recorded inputs: one file per family, found by the component name of a recording."""
